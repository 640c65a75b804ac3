"""`launcher tune RECIPE --lr`: the loss while the learning rate rises, and a suggested rate.

The recipe is trained as usual, except for its schedule: from one step to the next
the rate rises by the same factor, over at most one epoch (Smith, "Cyclical Learning Rates for
Training Neural Networks", 2017). Nothing is evaluated, and nothing is kept.
"""

import io
import json
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw

from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.config.plan import NEVER, Plan
from launcher.distributed.stop_sync import StoppedError
from launcher.distributed.world import World
from launcher.errors import EXIT_SAVED, NotFiniteError, TrainingError, UserError
from launcher.run.events import RequestPoll, why_stopped
from launcher.run.prepare import training_of
from launcher.run.train import ranks_together
from launcher.training.loop import SavePoint, fit
from launcher.training.metrics import StepReport
from launcher.training.state import TrainContext, put_back
from launcher.utils import atomic_write
from launcher.utils.terminal import plot
from launcher.utils.text import spread

STEPS = 400  # at most, and at most one epoch
LOW, HIGH = 1e-3, 1e3  # times the recipe's own rate
SMOOTHING = 0.9  # of the running mean of the losses
# The ramp ends when the smoothed loss is so many times its lowest value, or its highest at first.
DIVERGED, WORSE = 2.0, 1.2
FEWEST = 20  # steps, for a suggestion
FALLEN = 0.97  # fraction of the first loss that the lowest must be below
COLUMNS = 64
_SIZE, _MARGIN = (800, 400), 50  # pixels of the picture


@dataclass(frozen=True)
class RateCurve:
    """The rates of the steps, of the optimizer's first group, and the mean loss of each batch."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The exponential moving average, corrected for its beginning."""
        mean, values = 0.0, []
        for number, loss in enumerate(self.losses, start=1):
            mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
            values.append(mean / (1 - SMOOTHING**number))
        return tuple(values)

    @property
    def lowest(self) -> float:
        """The rate of the lowest smoothed loss: higher rates do harm."""
        values = self.smoothed
        return self.rates[values.index(min(values))]

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss falls most for the same factor."""
        values = self.smoothed
        stop = values.index(min(values)) + 1
        width = max(1, len(values) // 20)
        falls = [values[i - width] - values[i + width] for i in range(width, stop - width)]
        return self.rates[falls.index(max(falls)) + width] if falls else self.lowest / 10

    @property
    def suggestion(self) -> float | None:
        """The steepest rate, at most half of the lowest; None where the loss did not fall."""
        values = self.smoothed
        if min(values) > FALLEN * max(values[:FEWEST]):
            return None
        return min(self.steepest, self.lowest / 2)


def ramp(progress: float, *, until: float) -> float:
    """Rise from LOW to HIGH over a fraction `until` of the training, by equal factors."""
    return LOW * (HIGH / LOW) ** (progress / until)


def find_rate(ctx: TrainContext, steps: int = STEPS) -> RateCurve:
    """Train with a rising rate until the loss rises, and restore the state.

    Every rank calls this; the losses are those of all ranks, so that all end with the same step.
    Raises `StoppedError` where a signal came to any of them.
    """
    last = min(steps, ctx.plan.steps_per_epoch)
    plan = replace(ctx.plan, last_step=last, log_every=1, save=NEVER)
    schedule = partial(ramp, until=last / plan.steps)
    recipe = replace(ctx.recipe, schedule=schedule, on_nan="stop")
    rates: list[float] = []
    losses: list[float] = []
    with put_back(ctx):
        # The rates of all groups rise, also of those with their own schedules.
        ctx.state.group_schedules = (None,) * len(ctx.state.group_schedules)
        events = fit(replace(ctx, plan=plan, recipe=recipe), poll_requests=RequestPoll(NEVER))
        try:
            for event in events:
                if isinstance(event, SavePoint):
                    raise StoppedError
                assert isinstance(event, StepReport), "the ramp ends before an evaluation"
                rates.append(event.learning_rate)
                losses.append(event.loss)
                smoothed = RateCurve(tuple(rates), tuple(losses)).smoothed
                limit = min(DIVERGED * min(smoothed), WORSE * max(smoothed[:FEWEST]))
                if event.step == last or (len(rates) > FEWEST and smoothed[-1] > limit):
                    break
        except NotFiniteError:  # the same on every rank
            pass
    return RateCurve(tuple(rates), tuple(losses))


def run(
    loaded: LoadedRecipe,
    options: RunOptions,
    world: World,
    *,
    steps: int | None = None,
    folder: Path | None = None,
) -> int:
    """Show the curve and the suggestion; every rank calls this. Returns the exit code."""
    with ranks_together(world, options.timeouts) as group:
        training = training_of(loaded, options, group)
        _refuse_few_steps(training.ctx.plan, steps or STEPS)
        try:
            curve = find_rate(training.ctx, steps or STEPS)
        except StoppedError:
            curve = None
        own = training.ctx.state.group_options[0]["lr"]
    if curve is None:
        if world.is_main:
            sys.stderr.write(f"launcher: stopped by {why_stopped()}: nothing of the ramp is kept\n")
        return EXIT_SAVED
    if not world.is_main:
        return 0
    if len(curve.rates) < FEWEST:
        raise TrainingError(
            f"the loss was not finite after {len(curve.rates)} steps, at a rate of "
            f"{max(curve.rates, default=own * LOW):.2g}: there is no curve to read"
        )
    for line in describe(curve, own):
        sys.stdout.write(f"{line}\n")
    if folder is not None:
        try:
            save(curve, folder)
        except OSError as error:
            raise UserError(
                f"--save {folder} ({error.strerror})",
                expected="a folder that can be written, and room for it",
                instead="type --save curve, for example",
            ) from None
        sys.stdout.write(f"{folder}: learning_rate.png, learning_rate.json\n")
    return 0


def _refuse_few_steps(plan: Plan, most: int) -> None:
    if most < FEWEST:
        raise UserError(
            f"--steps {most}",
            expected=f"at least {FEWEST} steps, to read a curve",
            instead=f"type --steps {STEPS}, for example",
        )
    if plan.steps_per_epoch < FEWEST:
        raise UserError(
            f"a ramp of the {plan.steps_per_epoch} steps of an epoch",
            expected=f"at least {FEWEST} steps, to read a curve",
            instead=f"type data.batch_size={max(1, plan.train_images // FEWEST)}, for example",
        )


def describe(curve: RateCurve, own: float) -> list[str]:
    """The plot, and the suggestion with its method; `own` is the recipe's rate."""
    rate = curve.suggestion
    first, last = f"{curve.rates[0]:.1e}", f"{curve.rates[-1]:.1e}"
    shown = spread(list(curve.smoothed), COLUMNS)
    return [
        f"smoothed loss over the learning rate, in {len(curve.rates)} steps",
        *plot(shown, first, last, min(shown)),
        *(
            [
                f"steepest fall at {curve.steepest:.2g}, lowest loss at {curve.lowest:.2g}",
                f"try a rate of {rate:.2g} (the recipe has {own:g}): the steepest, but at most a "
                "half of the lowest",
                "one run with one seed: any rate within a factor of three is as plausible",
            ]
            if rate is not None
            else [
                f"the loss does not fall in these {len(curve.rates)} steps: type a smaller "
                "data.batch_size, for more steps in an epoch, or look at the recipe with "
                "launcher check --overfit"
            ]
        ),
    ]


def save(curve: RateCurve, folder: Path) -> None:
    """Write a picture and the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "rates": curve.rates,
        "losses": curve.losses,
        "smoothed": curve.smoothed,
        "lowest": curve.lowest,
        "steepest": curve.steepest,
        "suggestion": curve.suggestion,
    }
    text = json.dumps(content) + "\n"
    atomic_write.replace(folder / "learning_rate.json", text.encode(), is_kept=False)
    drawn = io.BytesIO()
    picture(curve).save(drawn, "PNG")
    atomic_write.replace(folder / "learning_rate.png", drawn.getvalue(), is_kept=False)


def picture(curve: RateCurve) -> Image.Image:
    """The losses in grey, their running mean in blue, over the rates on a logarithmic axis."""
    image = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(image)
    values = curve.smoothed
    low, high = min(values), max(values[0], min(values) * DIVERGED)
    left, right = math.log10(curve.rates[0]), math.log10(curve.rates[-1])
    width, height = _SIZE[0] - 2 * _MARGIN, _SIZE[1] - 2 * _MARGIN

    def place(rate: float, loss: float) -> tuple[float, float]:
        across = (math.log10(rate) - left) / (right - left)
        up = (min(max(loss, low), high) - low) / (high - low)
        return _MARGIN + across * width, _SIZE[1] - _MARGIN - up * height

    for exponent in range(math.ceil(left), math.floor(right) + 1):
        x, bottom = place(10.0**exponent, low)
        draw.line([(x, _MARGIN), (x, bottom)], fill="#dddddd")
        draw.text((x, bottom + 8), f"1e{exponent}", fill="black", anchor="mt")
    for loss in (low, (low + high) / 2, high):
        x, y = place(curve.rates[0], loss)
        draw.text((x - 6, y), f"{loss:.2f}", fill="black", anchor="rm")
    for numbers, colour, thick in ((curve.losses, "#bbbbbb", 1), (values, "#1f5fbf", 3)):
        points = [place(rate, loss) for rate, loss in zip(curve.rates, numbers, strict=True)]
        draw.line(points, fill=colour, width=thick)
    marks = (("lowest", curve.lowest, "#888888"), ("try", curve.suggestion, "#c03020"))
    for name, rate, colour in marks:
        if rate is not None and curve.rates[0] <= rate <= curve.rates[-1]:
            x, bottom = place(rate, low)
            draw.line([(x, _MARGIN), (x, bottom)], fill=colour, width=2)
            draw.text((x, _MARGIN - 6), f"{name} {rate:.2g}", fill=colour, anchor="mb")
    return image
