"""`--profile`: where the time of a recipe goes, and one line of advice.

The step marks its parts by `ctx.phase`; the profiler is what stands behind that name. Training is
otherwise as without it: the steps, the reports and the checkpoints are those of a run with
--max-steps. Some steps run freely; in some the clock waits for the device at every boundary, which
gives the split; a few are recorded by torch's profiler, into a trace file. How long a step waits
for gradients of other ranks is found by some more steps after the run, in which none travels.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from launcher.checkpoint.run_dir import RunDir
from launcher.config.plan import Plan, Progress
from launcher.data.batches import steps_per_chunk
from launcher.distributed.accelerator import synchronize
from launcher.errors import UserError
from launcher.training.loop import Event, SavePoint, fit
from launcher.training.metrics import EpochReport, StepReport
from launcher.training.state import TrainContext

WARM_UP, MEASURED, TRACED = 5, 15, 3  # steps

# More than this share of an epoch is worth a word: what, from which share on, what to do.
_LIMITS = {
    "data": (0.15, "fewer or simpler augmentations, or more threads per process"),
    "communication": (0.15, "a larger data.batch_size, or fewer processes on a faster link"),
    "update": (0.30, "a larger data.batch_size, so that there are fewer updates"),
    "evaluation": (0.25, "fewer test images"),
    "logging": (0.02, "a larger --log-every, or --wandb off"),
    "checkpoints": (0.02, "a larger --checkpoint-every"),
}
IDLE = 0.6  # a GPU that computes for less of the time is waiting for work


@dataclass(frozen=True)
class Split:
    """Seconds of an epoch by what they are spent on; `step` are those of a step as it runs.

    `busy` is the fraction of the time in which a GPU computed, None without one.
    """

    seconds: Mapping[str, float]
    steps: int
    step: float
    busy: float | None = None

    def shares(self) -> dict[str, float]:
        """Fractions of the epoch, the largest first."""
        total = sum(self.seconds.values())
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        return {name: seconds / total for name, seconds in ordered}

    def rows(self, precision: str) -> dict[str, str]:
        """The closing table."""
        rows = {
            name: f"{share:6.1%}  {self.seconds[name]:9.3f} s an epoch"
            f"  {self.seconds[name] / self.steps * 1e3:9.3f} ms a step"
            for name, share in self.shares().items()
        }
        rows["a step"] = f"{self.step * 1e3:.3f} ms without the clock"
        if self.busy is not None:
            rows["the GPU"] = f"computes for {self.busy:.0%} of the traced steps"
        return rows | {"advice": advice(self.shares(), self.busy, precision)}


def advice(shares: Mapping[str, float], busy: float | None, precision: str) -> str:
    """What to try first: where a share is furthest over its limit, else how to compute faster."""
    over = {name: shares.get(name, 0.0) / limit for name, (limit, _) in _LIMITS.items()}
    worst = max(over, key=lambda name: over[name])
    if over[worst] >= 1:
        return f"{worst} takes {shares[worst]:.0%}: try {_LIMITS[worst][1]}"
    if busy is not None and busy < IDLE:
        return "the GPU waits for the CPU: try a larger data.batch_size, or compile=reduce-overhead"
    compute = shares.get("forward", 0.0) + shares.get("backward", 0.0)
    usual = f"forward and backward take {compute:.0%}, as they should"
    if precision.startswith("fp32"):
        return f"{usual}: try precision=bf16"
    return f"{usual}: only a smaller model or a faster device takes less"


class _Clock:
    """Divides time among phases; the time after a phase, until the next begins, counts to it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.waits_for_device = self.marks_trace = False
        self._phase: str | None = None
        self._since = 0.0
        self._mark: record_function | None = None

    def enter(self, phase: str | None) -> None:
        """End the present phase and begin another; None: the time is not the loop's."""
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
        if self.waits_for_device:
            synchronize()
        now = time.perf_counter()
        if self._phase is not None:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now
        if self.marks_trace and phase is not None:
            self._mark = record_function(phase)
            self._mark.__enter__()  # type: ignore[no-untyped-call]

    def take(self) -> dict[str, float]:
        """The seconds of each phase since the last call."""
        self.enter(None)
        seconds, self.seconds = self.seconds, {}
        return seconds


class StepTimer:
    """Times steps, window by window: `ctx` is a training whose steps it times.

    `seconds` are those of each window and phase, `outside` those that the loggers took over each
    kind of event, `busy` the fraction of the traced time in which a GPU computed.
    """

    def __init__(self, ctx: TrainContext, windows: Mapping[str, int]) -> None:
        """`windows` are numbers of steps."""
        self.ctx = replace(ctx, phase=self.phase)
        self.windows = windows
        self.trace: Path | None = None  # where the window of that name is recorded
        self.seconds: dict[str, dict[str, float]] = {}
        self.outside: dict[type, list[float]] = {StepReport: [], EpochReport: [], SavePoint: []}
        self.busy: float | None = None
        self._names = [name for name, steps in windows.items() for _ in range(steps)]
        self._clock = _Clock()
        self._steps_done, self._window = 0, ""
        self._profile: profile | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase of a step."""
        if name == "data":
            self._open_window()
        self._clock.enter(name)
        yield
        if name == "update":
            self._steps_done += 1

    def through(self, events: Iterator[Event]) -> Iterator[Event]:
        """Pass on the loop's events; what is done with them is timed as well."""
        for event in events:
            self._clock.enter(None)
            if self._steps_done == len(self._names):
                self._open_window()  # so that no saving is in the trace
            started = time.perf_counter()
            yield event
            self.outside[type(event)].append(time.perf_counter() - started)

    def _open_window(self) -> None:
        """Go over to the window of the coming step, if that is another one."""
        done = self._steps_done
        name = self._names[done] if done < len(self._names) else ""
        if name == self._window:
            return
        synchronize()
        if self._window:
            self.seconds[self._window] = self._clock.take()
        if self._profile is not None:
            self._end_trace(self._profile)
        self._window = name
        self._clock.waits_for_device, self._clock.marks_trace = name == "split", False
        if name == "trace" and self.trace is not None:
            gpu = [ProfilerActivity.CUDA] * torch.cuda.is_available()
            if not gpu:  # torch's profiler looks for one all the same, and writes into the bar
                os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            # There is one cycle to keep events of; without acc_events torch 2.11 warns of others.
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], acc_events=True)
            self._profile.start()
            self._clock.marks_trace = True

    def _end_trace(self, profile: profile) -> None:
        profile.stop()
        profile.export_chrome_trace(str(self.trace))
        self._profile = None
        if torch.cuda.is_available():
            kernels = sum(event.self_device_time_total for event in profile.key_averages())
            self.busy = kernels / 1e6 / sum(self.seconds["trace"].values())


class Profiler:
    """What `--profile` adds to a run: `ctx` is the training up to the end of the profile."""

    def __init__(self, ctx: TrainContext) -> None:
        """Raises `UserError` for a training that is too short."""
        windows = windows_for(ctx)
        self._timer = StepTimer(shortened(ctx, windows), windows)
        self.ctx = self._timer.ctx

    def through(self, folder: RunDir | None) -> Callable[[Iterator[Event]], Iterator[Event]]:
        """What the loop's events go through; rank 0 writes the trace into `folder`."""
        if folder and self.ctx.accelerator.is_main_process:
            self._timer.trace = folder.path / "trace.json"
        return self._timer.through

    def rows(self, precision: str) -> dict[str, str]:
        """The closing table; every rank calls this after its run, whose weights it spoils."""
        rows = split_of(self._timer).rows(precision)
        return rows | {"trace": f"{self._timer.trace}: open it at https://ui.perfetto.dev"}


def windows_for(ctx: TrainContext) -> dict[str, int]:
    """The steps of a profile: whole groups of steps where images are made for several at once."""
    group = steps_per_chunk(ctx.plan, ctx.normalize.image_bytes, ctx.accelerator.device)
    group = min(group, ctx.plan.steps_per_epoch)
    measured = group * -(-MEASURED // group)
    return {"warm-up": WARM_UP, "free": measured, "split": measured, "trace": TRACED}


def shortened(ctx: TrainContext, windows: Mapping[str, int]) -> TrainContext:
    """The training up to the end of the profile. Raises `UserError` for one that ends before."""
    plan, needed = ctx.plan, sum(windows.values())
    if plan.last_step < needed:
        raise UserError(
            f"--profile of a training of {plan.last_step} steps",
            expected=f"at least {needed} steps",
            instead=f"type epochs={-(-needed // plan.steps_per_epoch)}, without --max-steps",
        )
    # Nor does patience end it before all steps are measured.
    recipe = replace(ctx.recipe, patience=None)
    return replace(ctx, recipe=recipe, plan=replace(plan, last_step=needed))


def split_of(timer: StepTimer) -> Split:
    """What an epoch's time is spent on, from the windows and from some more steps."""
    plan, windows = timer.ctx.plan, timer.windows
    phases = {name: seconds / windows["split"] for name, seconds in timer.seconds["split"].items()}
    free = sum(timer.seconds["free"].values()) / windows["free"]
    alone, evaluation = _without_communication(timer.ctx)
    if plan.world_size > 1:
        phases = with_communication(phases, alone)
    whole = replace(plan, last_step=plan.steps)
    epoch = {name: seconds * whole.steps_per_epoch for name, seconds in phases.items()}
    reports = sum(map(whole.is_reported, whole.epoch_steps(1)))
    outside = {kind: sum(times) / max(1, len(times)) for kind, times in timer.outside.items()}
    steady = timer.outside[StepReport][1:]  # the first report is special
    epoch["evaluation"] = evaluation
    epoch["logging"] = sum(steady) / max(1, len(steady)) * reports + outside[EpochReport]
    epoch["checkpoints"] = outside[SavePoint] * saves_per_epoch(whole, sum(epoch.values()))
    return Split(epoch, whole.steps_per_epoch, free, timer.busy)


def with_communication(phases: Mapping[str, float], alone: float) -> dict[str, float]:
    """Communication is what a backward pass takes longer than one `alone`, without any."""
    communication = max(0.0, phases["backward"] - alone)
    backward = phases["backward"] - communication
    return {**phases, "backward": backward, "communication": communication}


def saves_per_epoch(plan: Plan, seconds: float) -> float:
    """In an epoch of so many seconds."""
    if plan.save.steps is not None:
        return plan.steps_per_epoch / plan.save.steps
    if plan.save.minutes is not None:
        return seconds / 60 / plan.save.minutes
    return 1 / plan.save.epochs if plan.save.epochs is not None else 0.0


def _without_communication(ctx: TrainContext) -> tuple[float, float]:
    """Seconds of a backward pass without communication, and of an evaluation after its first.

    The last steps are trained again, and no gradient travels. Views are left out: a run takes them
    once, and not in each epoch.
    """
    several = ctx.plan.world_size > 1
    windows = {"warm-up": WARM_UP, "split": MEASURED} if several else {"warm-up": 1}
    timer = StepTimer(replace(ctx, recipe=replace(ctx.recipe, views=None, uncertain=None)), windows)
    before = ctx.plan.last_step - sum(windows.values())
    start = Progress(before, before // ctx.plan.steps_per_epoch)
    since = evaluation = 0.0
    with ctx.accelerator.no_sync(ctx.state.ddp_model):
        for event in timer.through(fit(timer.ctx, start)):
            if isinstance(event, EpochReport):
                evaluation = time.perf_counter() - since
            since = time.perf_counter()
    return timer.seconds.get("split", {}).get("backward", 0.0) / MEASURED, evaluation
