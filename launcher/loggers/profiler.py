"""`--profile`: where the time of a recipe goes, measured from outside the loop.

The loop knows nothing of it. For the steps of a profile, the epoch iterator of `Batches` and
`Tensor.backward` are replaced by ones that tell a clock where one phase ends and the next begins.
Training itself is as without: the steps, the reports and the checkpoints are those of a run with
--max-steps. Some steps run freely; in some the clock waits for the device at every boundary, which
gives the split; a few are recorded by torch's profiler, into a trace file. How long gradients are
waited for is found by a few steps more behind the end of the run, in which none travels.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from launcher.checkpoint.run_dir import RunFolder
from launcher.checks.timing import synchronize
from launcher.config.plan import Plan, Position
from launcher.data.batches import Batches, MicroBatch, steps_at_once
from launcher.data.sources import Data
from launcher.errors import UserError
from launcher.loggers.advice import Split
from launcher.training.loop import Event, SavePoint, fit
from launcher.training.metrics import EpochReport, StepReport
from launcher.training.state import TrainState, first_parameter
from launcher.training.step import Job

WARM_UP, MEASURED, TRACED = 5, 15, 3  # steps

Windows = tuple[tuple[str, int], ...]


def windows_for(job: Job, learner: TrainState, data: Data) -> Windows:
    """The steps of a profile: whole groups of steps where images are made for several at once."""
    size = first_parameter(learner.network).element_size()
    image_bytes = data.train.images[0].numel() * size
    group = steps_at_once(job.plan, image_bytes, job.accelerator.device)
    group = min(group, job.plan.steps_per_epoch)
    measured = group * -(-MEASURED // group)
    return ("warm-up", WARM_UP), ("free", measured), ("split", measured), ("trace", TRACED)


def shortened(job: Job, windows: Windows) -> Job:
    """The job up to the end of the profile. Raises `UserError` for one that ends before."""
    plan, needed = job.plan, sum(steps for _, steps in windows)
    if plan.last_step < needed:
        raise UserError(
            f"--profile of a training of {plan.last_step} steps",
            expected=f"at least {needed} steps",
            instead=f"type epochs={-(-needed // plan.steps_per_epoch)}, without --max-steps",
        )
    return replace(job, plan=replace(plan, last_step=needed))


class _Clock:
    """Divides time among phases; between phases, none runs."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.waits = self.marks = False
        self._phase: str | None = None
        self._since = 0.0
        self._mark: record_function | None = None

    def enter(self, phase: str | None) -> None:
        """End the present phase and begin another; None: the time is not the loop's."""
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
        if self.waits:
            synchronize()
        now = time.perf_counter()
        if self._phase is not None:
            self.spent[self._phase] = self.spent.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now
        if self.marks and phase is not None:
            self._mark = record_function(phase)
            self._mark.__enter__()  # type: ignore[no-untyped-call]

    def take(self) -> dict[str, float]:
        """The seconds of each phase since the last taking."""
        self.enter(None)
        spent, self.spent = self.spent, {}
        return spent


class Stopwatch:
    """Times the steps that pass through it, window by window.

    `seconds` are those of each window and phase, `outside` those that the loggers took over each
    kind of event, `busy` the fraction of the traced time in which a GPU computed.
    """

    def __init__(self, windows: Windows, folder: RunFolder | None, job: Job) -> None:
        """Rank 0 writes the trace into `folder`, if there is a window for it."""
        self.windows = dict(windows)
        self.seconds: dict[str, dict[str, float]] = {}
        self.outside: dict[type, list[float]] = {StepReport: [], EpochReport: [], SavePoint: []}
        self.busy: float | None = None
        is_main = job.accelerator.is_main_process
        self.trace = folder.path / "trace.json" if folder and is_main else None
        self._names = [name for name, steps in windows for _ in range(steps)]
        self._clock = _Clock()
        self._done, self._window, self._backwards = 0, "", 0
        self._profiler: profile | None = None

    def through(self, events: Iterator[Event]) -> Iterator[Event]:
        """Pass on the loop's events; what their taker does with them is timed as well."""
        with self._replacing():
            for event in events:
                self._clock.enter(None)
                if self._done == len(self._names):
                    self._open_window()  # so that no saving is in the trace
                started = time.perf_counter()
                yield event
                self.outside[type(event)].append(time.perf_counter() - started)

    @contextmanager
    def _replacing(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_replaced(Batches, "epoch", self._timed_epoch))
            stack.enter_context(_replaced(Tensor, "backward", self._timed_backward))
            yield

    def _timed_epoch(self, epoch: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*words: Any, **named: Any) -> Iterator[tuple[int, list[MicroBatch]]]:
            steps = epoch(*words, **named)
            while True:
                self._open_window()
                self._clock.enter("data")
                item = next(steps, None)
                if item is None:
                    self._clock.enter(None)
                    self._open_window()  # so that the evaluation is in no trace
                    return
                self._done, self._backwards = self._done + 1, len(item[1])
                self._clock.enter("forward")
                yield item

        return timed

    def _timed_backward(self, backward: Callable[..., None]) -> Callable[..., None]:
        def timed(tensor: Tensor, *words: Any, **named: Any) -> None:
            self._clock.enter("backward")
            backward(tensor, *words, **named)
            self._backwards -= 1
            self._clock.enter("forward" if self._backwards else "update")

        return timed

    def _open_window(self) -> None:
        """Go over to the window of the coming step, if that is another one."""
        name = self._names[self._done] if self._done < len(self._names) else ""
        if name == self._window:
            return
        synchronize()
        if self._window:
            self.seconds[self._window] = self._clock.take()
        if self._profiler is not None:
            self._end_trace(self._profiler)
        self._window = name
        self._clock.waits, self._clock.marks = name == "split", False
        if name == "trace" and self.trace is not None:
            gpu = [ProfilerActivity.CUDA] * torch.cuda.is_available()
            # There is one cycle to keep events of; without acc_events torch 2.11 warns of others.
            self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu], acc_events=True)
            self._profiler.start()
            self._clock.marks = True

    def _end_trace(self, profiler: profile) -> None:
        profiler.stop()
        profiler.export_chrome_trace(str(self.trace))
        self._profiler = None
        if torch.cuda.is_available():
            kernels = sum(event.self_device_time_total for event in profiler.key_averages())
            self.busy = kernels / 1e6 / sum(self.seconds["trace"].values())


@contextmanager
def _replaced(owner: type, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """The method `name` of a class, wrapped for a while."""
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def rows(
    main: Stopwatch, job: Job, learner: TrainState, data: Data, precision: str
) -> dict[str, str]:
    """The closing table; every rank calls this after its run, whose weights it spoils."""
    rows = split_of(main, job, learner, data).rows(precision)
    return rows | {"trace": f"{main.trace}: open it at https://ui.perfetto.dev"}


def split_of(main: Stopwatch, job: Job, learner: TrainState, data: Data) -> Split:
    """What an epoch's time is spent on, from the windows and from a few steps more."""
    steps = main.windows["split"]
    phases = {name: seconds / steps for name, seconds in main.seconds["split"].items()}
    free = sum(main.seconds["free"].values()) / main.windows["free"]
    alone, evaluation = _aside(job, learner, data)
    if job.plan.world_size > 1:
        phases = divided(phases, alone)
    whole = replace(job.plan, last_step=job.plan.steps)
    epoch = {name: seconds * whole.steps_per_epoch for name, seconds in phases.items()}
    reports = sum(map(whole.is_reported, whole.epoch_steps(1)))
    outside = {kind: sum(times) / max(1, len(times)) for kind, times in main.outside.items()}
    steady = main.outside[StepReport][1:]  # the first report is special
    epoch["evaluation"] = evaluation
    epoch["logging"] = sum(steady) / max(1, len(steady)) * reports + outside[EpochReport]
    epoch["checkpoints"] = outside[SavePoint] * _saves(whole)
    return Split(epoch, whole.steps_per_epoch, free, main.busy)


def divided(phases: Mapping[str, float], alone: float) -> dict[str, float]:
    """Communication is what a backward pass takes longer than one `alone`, without any."""
    communication = max(0.0, phases["backward"] - alone)
    backward = phases["backward"] - communication
    return {**phases, "backward": backward, "communication": communication}


def _saves(plan: Plan) -> float:
    """Checkpoints per epoch."""
    if plan.save_steps is not None:
        return plan.steps_per_epoch / plan.save_steps
    return 1 / plan.save_epochs if plan.save_epochs is not None else 0.0


def _aside(job: Job, learner: TrainState, data: Data) -> tuple[float, float]:
    """Seconds of a backward pass without communication, and of an evaluation after its first.

    The last steps are trained again, and no gradient travels. Views are left out: a run takes them
    once, and not in each epoch.
    """
    job = replace(job, recipe=replace(job.recipe, views=None))
    several = job.plan.world_size > 1
    windows = (("warm-up", WARM_UP), ("split", MEASURED)) if several else (("warm-up", 1),)
    watch = Stopwatch(windows, None, job)
    before = job.plan.last_step - sum(watch.windows.values())
    start = Position(before, before // job.plan.steps_per_epoch)
    since = evaluation = 0.0
    with job.accelerator.no_sync(learner.wrapped):
        for event in watch.through(fit(job, learner, data, start)):
            if isinstance(event, EpochReport):
                evaluation = time.perf_counter() - since
            since = time.perf_counter()
    return watch.seconds.get("split", {}).get("backward", 0.0) / MEASURED, evaluation
