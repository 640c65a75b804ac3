"""A recipe x a world x the sizes of the data -> the numbers of the run. The last user errors.

Pure: no device, no file. What a plan accepts can be trained.
"""

import math
from dataclasses import dataclass

from launcher.config.recipe import Recipe
from launcher.config.resolutions import resolutions_of
from launcher.errors import UserError
from launcher.utils.text import count


@dataclass(frozen=True)
class Progress:
    """Where a training stands between two steps: with the recipe, all that a resume must know."""

    step: int = 0  # steps done
    epochs: int = 0  # epochs done, evaluation included
    epoch_loss_sum: float = 0.0  # sum of the losses of the images counted in the present epoch
    epoch_images: int = 0
    to_beat: float | None = None  # the evaluated accuracy above which patience begins anew
    epochs_without: int = 0  # epochs since it was reached

    def after_epoch(self, epoch: int, steps: int, accuracy: float, min_delta: float) -> "Progress":
        """After the evaluation of epoch `epoch`, the last step of which is `steps`."""
        if self.to_beat is None or accuracy > self.to_beat + min_delta:
            return Progress(steps, epoch, to_beat=accuracy)
        return Progress(steps, epoch, to_beat=self.to_beat, epochs_without=self.epochs_without + 1)

    def has_waited(self, patience: int | None) -> bool:
        """Whether the training ends since no epoch was better for so many."""
        return patience is not None and self.epochs_without >= patience


START = Progress()


@dataclass(frozen=True)
class SaveInterval:
    """How often a checkpoint is written; all None: only when a signal stops the run."""

    steps: int | None = None
    epochs: int | None = None
    minutes: float | None = None


EVERY_EPOCH = SaveInterval(epochs=1)
NEVER = SaveInterval()


@dataclass(frozen=True)
class Plan:
    """How many steps of how many images. A step is one optimizer step.

    `resolutions` are those of the training images, in pixels a side, epoch by epoch; empty where
    they stay as they come.
    """

    train_images: int
    evaluated_images: int
    world_size: int
    batch_size: int
    accumulate: int
    epochs: int
    steps_per_epoch: int
    last_step: int  # where the run ends: all steps, or --max-steps
    log_every: int
    save: SaveInterval = NEVER
    resolutions: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """Steps of the whole training, on which fractions and so the learning rate depend."""
        return self.epochs * self.steps_per_epoch

    @property
    def num_micro_batches(self) -> int:
        """Forward passes of one step over all ranks."""
        return self.world_size * self.accumulate

    @property
    def pass_sizes(self) -> tuple[int, ...]:
        """The images that a forward pass of the training may have; first the most."""
        last = self.steps_per_epoch
        steps = (self.batch_size, *([self.step_images(last)] if self.last_step >= last else []))
        passes = self.num_micro_batches
        sizes = (size for n in steps for size in (-(-n // passes), n // passes))
        return tuple(dict.fromkeys(size for size in sizes if size))

    @property
    def last_epoch(self) -> int:
        """The epoch in which the run ends, counted from 1."""
        return self.epoch_of(self.last_step)

    def epoch_of(self, step: int) -> int:
        """The epoch to which a step belongs, both counted from 1."""
        return math.ceil(step / self.steps_per_epoch)

    def step_images(self, step: int) -> int:
        """Images of step `step`, counted from 1: the last step of an epoch may have fewer."""
        start = (step - 1) % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self.train_images - start)

    def epoch_steps(self, epoch: int) -> range:
        """The steps of epoch `epoch`, both counted from 1; the run's last epoch may end early."""
        stop = min(epoch * self.steps_per_epoch, self.last_step)
        return range((epoch - 1) * self.steps_per_epoch + 1, stop + 1)

    def resolution(self, epoch: int) -> int | None:
        """Pixels a side of the training images in an epoch, counted from 1; None: as they come."""
        return self.resolutions[epoch - 1] if self.resolutions else None

    @property
    def largest_resolution(self) -> int | None:
        """That of the epoch which takes the most memory and time; None: as the images come."""
        return max(self.resolutions, default=None)

    def is_reported(self, step: int) -> bool:
        """Whether the loss is read after this step: at intervals and at the end of an epoch."""
        ends_epoch = step % self.steps_per_epoch == 0 or step == self.last_step
        return step == 1 or step % self.log_every == 0 or ends_epoch

    def is_saved_after_step(self, step: int) -> bool:
        """Whether a checkpoint is due within an epoch: also where --max-steps ends the run there.

        The evaluation that follows then leaves no trace in it, as it has none in a longer run.
        """
        due = self.save.steps is not None and step % self.save.steps == 0
        return due or (self.save.epochs is not None and self._is_cut(step))

    def is_saved_after_epoch(self, epoch: int, *, is_last: bool) -> bool:
        """Whether a checkpoint is due after the evaluation: always after the last epoch.

        Patience may make any epoch the last one, so `is_last` says whether it is this one.
        """
        if self.save.epochs is None or self._is_cut(self.epoch_steps(epoch)[-1]):
            return False
        return is_last or epoch % self.save.epochs == 0

    def _is_cut(self, step: int) -> bool:
        """Whether --max-steps ends the run after this step, within an epoch."""
        return step == self.last_step and step % self.steps_per_epoch != 0

    def fraction(self, step: int) -> float:
        """The fraction of the training behind the middle of step `step`, counted from 1."""
        return (step - 0.5) / self.steps

    def describe_batch(self) -> str:
        """The global batch as ranks x images per rank (x accumulated passes)."""
        small, rest = divmod(self.batch_size, self.num_micro_batches)
        each = f"{small}-{small + 1}" if rest else f"{small}"
        passes = f" x {self.accumulate} passes" if self.accumulate > 1 else ""
        ranks = count(self.world_size, "rank")
        return f"{self.batch_size} = {ranks} x {each} image{'s' * (each != '1')}{passes}"


def make_plan(
    recipe: Recipe,
    *,
    world_size: int,
    train_images: int,
    evaluated_images: int,
    max_steps: int | None = None,
    log_every: int | None = None,
    save: SaveInterval = NEVER,
    image_size: tuple[int, int] | None = None,
) -> Plan:
    """Count the steps. Raises `UserError` for a batch that cannot be divided over the ranks.

    And for a resolution that images of this height and width cannot be trained at, if it is known.
    """
    batch_size = min(recipe.data.batch_size, train_images)
    steps_per_epoch = math.ceil(train_images / batch_size)
    steps = recipe.epochs * steps_per_epoch
    resolution = recipe.data.train_resolution
    plan = Plan(
        train_images=train_images,
        evaluated_images=evaluated_images,
        world_size=world_size,
        batch_size=batch_size,
        accumulate=recipe.passes,
        epochs=recipe.epochs,
        steps_per_epoch=steps_per_epoch,
        last_step=min(steps, max_steps or steps),
        log_every=log_every or max(1, min(50, steps_per_epoch // 20)),
        save=save,
        resolutions=resolutions_of(resolution, recipe.epochs, image_size) if resolution else (),
    )
    _check_division(plan, recipe)
    return plan


def _check_division(plan: Plan, recipe: Recipe) -> None:
    parts = f"{count(plan.world_size, 'rank')} x {count(plan.accumulate, 'pass')}"
    needed = plan.num_micro_batches
    if plan.batch_size < needed:
        raise UserError(
            f"a global batch of {plan.batch_size} images over {parts}",
            expected="at least one image for each",
            instead=f"type data.batch_size={needed} or more, or start fewer processes"
            if needed <= plan.train_images
            else f"start fewer processes: there are {plan.train_images} training images",
        )
    last = plan.step_images(plan.steps_per_epoch)
    if recipe.sync_batch_norm and last < needed:
        sizes = _sizes_that_work(plan)
        raise UserError(
            f"a last batch of {last} images over {parts} with sync_batch_norm",
            expected="at least one image for each in every step",
            instead=f"type data.batch_size={sizes}",
        )


def _sizes_that_work(plan: Plan) -> str:
    """The nearest batch sizes, below and above, whose last batch is enough for all ranks."""
    least = plan.num_micro_batches

    def works(size: int) -> bool:
        return (plan.train_images % size or size) >= least

    below = next((s for s in range(plan.batch_size, least - 1, -1) if works(s)), None)
    above = next((s for s in range(plan.batch_size, plan.train_images + 1) if works(s)), None)
    return " or ".join(str(size) for size in (below, above) if size is not None)
