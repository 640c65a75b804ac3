"""One training: prepare it, run `fit`, hand each event to the loggers, save.

`train_loaded` is what the command line calls on each rank: prepare -> TrainContext -> run_loop.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from launcher.checkpoint import checkpoint, outcomes, run_dir
from launcher.checkpoint.compiled import CompiledCode
from launcher.checkpoint.resume import ResumePoint, initial_weights, resumed_run
from launcher.checkpoint.run_dir import RunDir
from launcher.checkpoint.run_files import RunFiles
from launcher.checkpoint.saver import Saver
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.config.plan import NEVER, START, Plan, Progress, SaveInterval, make_plan
from launcher.config.recipe import Recipe
from launcher.config.serialize import short_name
from launcher.config.slots import Precision
from launcher.data import cache, tiers
from launcher.data.images import Data
from launcher.distributed import process_group, signals
from launcher.distributed.accelerator import (
    choose_precision,
    create_accelerator,
    device_name,
    reset_accelerator,
    run_on_main,
    set_threads,
)
from launcher.distributed.process_group import RankGroup, Timeouts
from launcher.distributed.stop_sync import Requests
from launcher.distributed.world import ALONE, World
from launcher.errors import (
    EXIT_FAULT,
    EXIT_SAVED,
    LauncherError,
    NotFiniteError,
    SharedUserError,
    TrainingError,
    UserError,
)
from launcher.loggers import wandb
from launcher.loggers.console import Console, first_step_line, make_console, tta_note
from launcher.loggers.logger import Logger
from launcher.loggers.profiler import Profiler
from launcher.loggers.report import page_of, report_at_end
from launcher.training.accumulation import choose_passes
from launcher.training.compiling import choose_compiling, is_to_be_tried
from launcher.training.evaluation import evaluate
from launcher.training.loop import Event, SavePoint, fit, warm_up_ddp
from launcher.training.metrics import (
    IMAGES_OF,
    Best,
    EpochReport,
    FinalReport,
    StepReport,
    sample_indices,
)
from launcher.training.model import build_network, count_parameters, initialize
from launcher.training.preflight import preflight
from launcher.training.smoke import SmokeTest, smoke_options, smoke_version
from launcher.training.state import TrainContext, broadcast_state, make_context
from launcher.utils.json_text import flatten
from launcher.utils.redaction import redacted
from launcher.utils.text import count, of_uncertain

# Is shown a training that is ready to begin, and returns it, perhaps with phases that it marks.
Watch = Callable[[TrainContext], TrainContext]
MOST_ROLLBACKS = 10  # a run that needs more does not get better by skipping steps


@dataclass(frozen=True)
class RunResult:
    """The best epoch whose weights are kept, the last epoch, and the losses that were read.

    Best is the epoch of the highest accuracy of the images that are evaluated after each epoch:
    the validation images, or the test images where there are none. `highest` is the best one, too,
    unless the disk refused its weights. `tested` are the figures of the test images at the end of
    a run that has validation images. `stopped` says that a signal ended the run early, with its
    state saved. `folder` is the run folder; None for a smoke test.
    """

    best: Best | None
    highest: Best | None
    last: Best | None
    losses: tuple[float, ...]
    stopped: bool = False
    folder: Path | None = None
    tested: FinalReport | None = None


@dataclass
class ActiveRun:
    """A training in progress, and what its events have told so far.

    `loggers` are all that hear of it, the console first; on ranks other than 0 it shows nothing.
    `unsaved` says what it means that the state could not be saved when the run was stopped.
    """

    ctx: TrainContext
    loaded: LoadedRecipe
    console: Console
    loggers: tuple[Logger, ...]
    saver: Saver
    code: CompiledCode | None = None
    best: Best | None = None
    highest: Best | None = None
    losses: list[float] = field(default_factory=list)
    report: EpochReport | None = None  # of the last evaluation
    tested: FinalReport | None = None
    stopped: bool = False
    unsaved: str = ""

    @property
    def folder(self) -> RunDir | None:
        """The run folder; None in a smoke test."""
        return self.saver.folder

    @property
    def last(self) -> Best | None:
        """The figures of the last evaluation."""
        return Best.of(self.report) if self.report else None

    def result(self) -> RunResult:
        """What is left of it at its end."""
        folder = self.folder.path if self.folder else None
        losses = tuple(self.losses)
        return RunResult(
            self.best, self.highest, self.last, losses, self.stopped, folder, self.tested
        )


def train_loaded(
    loaded: LoadedRecipe,
    options: RunOptions,
    world: World = ALONE,
    watch: Watch | None = None,
    also: Sequence[Logger] = (),
) -> RunResult:
    """Train a recipe; every rank calls this. `watch` is called before the training begins.

    The loggers `also` hear of it, on rank 0, besides those that the options say.
    Raises `UserError` before anything is written, `TrainingError` for a loss that is not finite
    or a failed smoke test, and `RankError` where the ranks lose each other.
    """
    if options.smoke:
        options = smoke_options(options)
    with ranks_together(world, options.timeouts) as group:
        return prepare_and_run(loaded, options, group, watch, also)


@contextmanager
def ranks_together(world: World, timeouts: Timeouts) -> Iterator[RankGroup]:
    """The ranks meet, and part at the end; where one fails, it is found out which was the first."""
    group = process_group.rendezvous(world, timeouts)
    try:
        with report_first_failure(group, lambda: "outside training"):
            yield group
    except BaseException:
        group.stop_heartbeat()
        raise
    group.leave()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def report_first_failure(group: RankGroup, moment: Callable[[], str]) -> Iterator[None]:
    """Find out which rank failed first, where an exception ends the run: only that one reports."""
    try:
        yield
    except UserError as refusal:
        if isinstance(refusal, SharedUserError):
            raise
        raise group.attribute_failure(refusal, moment()) from None
    except LauncherError:
        raise
    except (Exception, SystemExit) as raised:
        error = raised if isinstance(raised, Exception) else _no_exit(raised)
        attributed_error = group.attribute_failure(error, moment())
        if attributed_error is raised:
            raise
        raise attributed_error from None


@contextmanager
def dry_context(
    recipe: Recipe, plan: Plan, network: nn.Module, data: Data
) -> Iterator[TrainContext]:
    """A training that has passed the preflight of a run, on a machine that may be far from its own.

    So in fp32, and without what only a GPU or several ranks have. Raises `UserError` as a run does.
    """
    recipe = replace(recipe, precision="fp32", compile=False, sync_batch_norm=False)
    try:
        accelerator = create_accelerator("fp32")
        if recipe.initialize is not None:
            initialize(network, recipe, data.train, accelerator.device)
        ctx = make_context(network, recipe, plan, accelerator, data)
        preflight(ctx)
        yield ctx
    finally:
        reset_accelerator()


def _no_exit(raised: SystemExit) -> Exception:
    """A recipe's code that ends the process is a failure like others, whatever it says."""
    error = RuntimeError(f"the recipe's code called sys.exit({raised.code})")
    return error.with_traceback(raised.__traceback__)


def prepare_and_run(
    loaded: LoadedRecipe,
    options: RunOptions,
    group: RankGroup,
    watch: Watch | None,
    also: Sequence[Logger],
) -> RunResult:
    """From the recipe to the result, on a rank that has met the others."""
    training = training_of(loaded, options, group)
    ctx, accelerator = training.ctx, training.ctx.accelerator
    profiler = Profiler(ctx) if options.profile else None
    ctx = profiler.ctx if profiler else ctx
    ctx = watch(ctx) if watch else ctx
    smoke_test = SmokeTest(ctx) if options.smoke else None
    with report_first_failure(group, lambda: describe_position(ctx)):
        result = log_and_run(ctx, training.loaded, options, training.facts, profiler, also)
        if smoke_test and not result.stopped and (note := smoke_test.verdict()):
            make_console(accelerator.is_main_process).say(note)
    return result


@dataclass(frozen=True)
class Training:
    """What is ready to be trained, and what it is in words."""

    ctx: TrainContext
    loaded: LoadedRecipe
    facts: dict[str, str]


def training_of(loaded: LoadedRecipe, options: RunOptions, group: RankGroup) -> Training:
    """From the recipe to a training that has passed its preflight; nothing is written yet."""
    prepared = prepare_on_all_ranks(loaded, options, group)
    loaded, data = prepared.loaded, prepared.data
    # What a resumed run is compared with is the precision that it had, whoever chose it.
    recipe = replace(loaded.recipe, precision=cast(Precision, prepared.precision))
    accelerator = create_accelerator(prepared.precision, group.world, recipe.deterministic)
    if options.init_from is None:
        initialize(prepared.network, recipe, data.train, accelerator.device)
    ctx = make_context(prepared.network, recipe, prepared.plan, accelerator, data)
    preflight(ctx)
    facts = prepared.facts
    is_tried = not prepared.compile_is_kept and is_to_be_tried(ctx)
    if recipe.accumulate == "auto":
        with torch.compiler.set_stance("force_eager" if is_tried else "default"):
            ctx = choose_passes(ctx)
        facts["batch"] = ctx.plan.describe_batch()
        preflight(ctx)  # of the smaller passes
    if is_tried:
        ctx, facts["compile"] = choose_compiling(ctx)
    facts |= {
        "memory": ctx.recipe.memory_format,
        "devices": f"{ctx.plan.world_size} x {device_name(accelerator)}",
        **options.host_facts,
    }
    if data.fallback:
        facts["fallback"] = fallback_warning(data)
    return Training(ctx, replace(loaded, recipe=ctx.recipe), facts)


def describe_position(ctx: TrainContext) -> str:
    """Where the training is, in words."""
    step = ctx.state.current_step
    return f"in step {step} (epoch {ctx.plan.epoch_of(step)})" if step else "outside training"


# What is trained


@dataclass(frozen=True)
class Prepared:
    """What each rank can make without the others."""

    loaded: LoadedRecipe
    data: Data
    plan: Plan
    network: nn.Module
    precision: str
    facts: dict[str, str]
    compile_is_kept: bool  # what compile=true means was settled when the run began


def prepare_on_all_ranks(loaded: LoadedRecipe, options: RunOptions, group: RankGroup) -> Prepared:
    """Prepare here, and go on when all ranks have; a `UserError` of one ends all."""
    set_threads(group.world)  # before the first images are read, by as many threads
    with group.sync_errors():
        group.refuse_differences(shared_facts(loaded, options))
        wanted = loaded.recipe.precision
        if options.smoke:
            loaded = replace(loaded, recipe=smoke_version(loaded.recipe, group))
        prepared = prepare(loaded, options, group)
        if prepared.loaded.recipe.precision != wanted:
            said = f"fp32 (this processor is slow in {wanted or group.world.mixed_precision})"
            prepared.facts["precision"] = said
    group.init_process_group()
    return prepared


def shared_facts(loaded: LoadedRecipe, options: RunOptions) -> dict[str, str]:
    """What must be the same on every rank, in words, with its name."""
    settings = flatten(loaded.config)
    del settings["data.root"]  # where the images lie on this machine, not what they are
    settings |= {
        "--max-steps": options.max_steps,
        "--log-every": options.log_every,
        "--checkpoint-every": options.checkpoint_every,
        "--resume": options.resume,
        "--profile": options.profile,
        "--skip": options.skip,
    }
    source = sha256(loaded.source.encode(errors="replace")).hexdigest()[:12]
    return {
        **{name: str(value) for name, value in settings.items()},
        "the recipe file (SHA-256)": source,
        **run_dir.versions(),
    }


def prepare(loaded: LoadedRecipe, options: RunOptions, group: RankGroup) -> Prepared:
    """Open the images, count the steps, build the network."""
    kept = kept_choices(loaded, options, group)
    recipe = replace(loaded.recipe, **kept)
    loaded = replace(loaded, recipe=recipe)
    world, has_gpu = group.world, torch.cuda.is_available()
    precision, origin = choose_precision(recipe.precision, has_gpu, world.mixed_precision)
    data = cache.load(recipe.data, group, recipe.seed)
    # Which each node has opened for itself.
    group.refuse_differences({"images of": data.name, "digest": data.digest}, "images")
    plan = plan_for(loaded, data, options, world.size)
    network = build_network(recipe, data.train)
    facts = describe(loaded, data, plan, network) | {"precision": f"{precision} ({origin})"}
    if weights := given_weights(loaded, options):
        skipped = checkpoint.load_initial_weights(network, weights, options.skip)
        without = f", without {', '.join(skipped)}" if skipped else ""
        facts["weights"] = f"from {weights}{without}"
    if "compile" in kept:
        said = "compiled" if kept["compile"] else "eager"
        facts["compile"] = f"{said}, as when the run began"
    return Prepared(loaded, data, plan, network, precision, facts, "compile" in kept)


def kept_choices(loaded: LoadedRecipe, options: RunOptions, group: RankGroup) -> dict[str, Any]:
    """What accumulate=auto and compile=true had become when the run began that is resumed."""
    is_open = {"accumulate": loaded.recipe.accumulate == "auto"}
    is_open |= {"compile": loaded.recipe.compile is True}
    if not options.resume or not any(is_open.values()):
        return {}

    def read() -> dict[str, Any]:
        folder = run_dir.find(options.runs, options.name, loaded.name)
        found = checkpoint.newest(folder.checkpoints)[0] if folder else None
        if folder is None:
            return {}
        config = checkpoint.read_state(found).config if found else folder.config()
        passes, compiles = config.get("accumulate"), config.get("compile")
        kept = {"accumulate": passes} if type(passes) is int else {}
        is_kept = isinstance(compiles, bool) or compiles == "force"
        is_kept = is_kept and "compile" not in options.resume_changed
        return kept | ({"compile": compiles} if is_kept else {})

    text = group.broadcast("choices", json.dumps(read()) if group.world.is_main else None)
    return {name: value for name, value in json.loads(text).items() if is_open[name]}


def given_weights(loaded: LoadedRecipe, options: RunOptions) -> Path | None:
    """What to begin with; a file that is gone is not missed where a checkpoint takes its place."""
    if options.init_from is None:
        return None
    try:
        return initial_weights(options.runs, options.init_from)
    except UserError:
        where = (options.runs, options.name, loaded.name)
        folder = run_dir.find(*where) if options.resume else None
        if folder is None or checkpoint.newest(folder.checkpoints)[0] is None:
            raise
        return None


def plan_for(loaded: LoadedRecipe, data: Data, options: RunOptions, world_size: int) -> Plan:
    """The plan of a recipe for these images on that many ranks."""
    save = options.checkpoint_every
    if save.steps or save.minutes:  # also after the last epoch, so that more can follow
        save = replace(save, epochs=loaded.recipe.epochs)
    return make_plan(
        loaded.recipe,
        world_size=world_size,
        train_images=len(data.train),
        evaluated_images=len(data.evaluated),
        max_steps=options.max_steps,
        log_every=options.log_every,
        save=save,
        image_size=data.train.shape[:2],
    )


def describe(loaded: LoadedRecipe, data: Data, plan: Plan, network: nn.Module) -> dict[str, str]:
    """What is trained, in words: for the header, `--dry-run` and `run.json`."""
    note = loaded.note.strip().splitlines()[:1]
    name = short_name(loaded.recipe.model)
    numbers = [f"{len(split):,} {name}" for name, split in data.splits.items()]
    sizes = f"{', '.join(numbers[:-1])} and {numbers[-1]} images"
    height, width, _ = data.train.shape
    sizes += f" of {height} x {width} pixels"
    if plan.resolutions:
        least, most = min(plan.resolutions), max(plan.resolutions)
        sizes += f", trained at {least}" + f" to {most}" * (least < most) + " pixels"
    where = tiers.describe(data)
    kept = f"; {where}" if where else ""
    early = f", stopping after {plan.last_step}" if plan.last_step < plan.steps else ""
    views, uncertain = loaded.recipe.views, loaded.recipe.uncertain
    facts = {
        "recipe": ": ".join([loaded.name, *note]),
        "model": f"{name}, {count_parameters(network):,} parameters",
        "data": f"{data.name}, {sizes}, {len(data.train.classes)} classes" + kept,
        "batch": plan.describe_batch(),
        "steps": f"{count(plan.epochs, 'epoch')} x {plan.steps_per_epoch} steps{early}",
    }
    if views and uncertain:
        facts["views"] = f"{short_name(views)}, only{of_uncertain(uncertain)}"
    return facts


def fallback_warning(data: Data) -> str:
    """What no reader of this run may miss; empty where the right images are used."""
    return f"NOT THE REAL DATA: {data.fallback}; using {data.name}" if data.fallback else ""


# From the first line of the header to the closing table


def log_and_run(
    ctx: TrainContext,
    loaded: LoadedRecipe,
    options: RunOptions,
    facts: dict[str, str],
    profiler: Profiler | None,
    also: Sequence[Logger],
) -> RunResult:
    """Begin or continue the run folder, train in front of the loggers, and close them."""
    is_main = ctx.accelerator.is_main_process
    console = make_console(is_main)
    # The stack holds the lock of the folder, until this process is done with it.
    with report_at_end(console.say) as reported, ExitStack() as exit_stack:
        start = None if options.smoke else open_run(ctx, loaded, options, exit_stack)
        code, note = None, ""
        if start and ctx.recipe.compile:
            code = CompiledCode(start.folder.path, ctx.accelerator)
            note = code.load()
        if start and start.checkpoint:
            warm_up_ddp(ctx)
            checkpoint.restore(start.checkpoint, ctx)
        highest = start.best if start else None
        if start:  # what was refused until here has left the folder as it was
            start = describe_run(ctx, replace(start, notes=(*start.notes, note)), loaded, facts)
        loggers = (console, *make_loggers(ctx, start, loaded, options, also))
        best = start.best if start else None
        saver = Saver(start.folder if start else None, is_main, console.say)
        if start and is_main and options.makes_report:
            reported.append(start.folder.path)
        run = ActiveRun(ctx, loaded, console, loggers, saver, code, best, highest)
        exit_code = EXIT_FAULT
        try:
            show_header(run, start, facts)
            progress = start.progress if start else START
            through = profiler.through(run.folder) if profiler else iter
            run_loop(run, progress, options.checkpoint_every, through)
            exit_code = EXIT_SAVED if run.stopped else 0
            rows = closing_rows(run)
            if profiler and not run.stopped:
                rows |= profiler.rows(facts["precision"])
            if run.folder and options.makes_report:
                rows |= {"report": str(page_of(run.folder.path))}
            console.closing(rows)
            if run.folder and not run.stopped:
                console.mistakes(RunFiles(run.folder.path))
        finally:
            saver.end(exit_code)
            for logger in loggers:
                logger.finish(exit_code)
    return run.result()


def open_run(
    ctx: TrainContext, loaded: LoadedRecipe, options: RunOptions, exit_stack: ExitStack
) -> ResumePoint:
    """Choose the run folder and the checkpoint on rank 0, for all ranks, and hold its lock."""

    def choose() -> ResumePoint:
        if options.resume:
            steps = ctx.plan.steps_per_epoch
            start = resumed_run(options, loaded, ctx.data, steps)
        else:
            start = ResumePoint(run_dir.create(options.runs, options.name, loaded.name))
        exit_stack.callback(start.folder.lock().release)
        start.folder.tidy()
        return start

    return run_on_main(ctx.accelerator, choose)


def describe_run(
    ctx: TrainContext, start: ResumePoint, loaded: LoadedRecipe, facts: dict[str, str]
) -> ResumePoint:
    """Write on rank 0 what the run is, for all ranks."""

    def write() -> ResumePoint:
        train = ctx.data.train
        about = {
            "name": loaded.name,
            "recipe_folder": loaded.folder,
            "classes": list(train.classes),
            "image_shape": list(train.shape),
            "data_digest": ctx.data.digest,
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "evaluated_on": ctx.data.evaluated_on,
            "samples": sample_indices(len(ctx.data.evaluated)),
        }
        own = start.folder.describe(loaded.config, facts | about, loaded.source, start.wandb_id)
        if ctx.data.held_out is not None:
            own.keep_held_out(ctx.data.held_out.tolist())
        notes = start.notes
        if damaged := own.forget_after(start.progress.epochs):
            dropped = f"{count(damaged, 'damaged line')} dropped"
            notes = (*notes, f"metrics.jsonl and details.jsonl: {dropped}")
        best = best_that_is_kept(own, start.best, start.progress)
        return replace(start, folder=own, notes=notes, best=best)

    return run_on_main(ctx.accelerator, write)


def best_that_is_kept(folder: RunDir, best: Best | None, progress: Progress) -> Best | None:
    """The best epoch; None where a later one, which is trained again, has replaced its weights.

    If it then comes out otherwise, they would pass for those of an epoch that they are not of.
    """
    kept = outcomes.read(folder.path / "best.npz")
    return None if kept and kept.epoch > progress.epochs else best


def make_loggers(
    ctx: TrainContext,
    start: ResumePoint | None,
    loaded: LoadedRecipe,
    options: RunOptions,
    also: Sequence[Logger],
) -> tuple[Logger, ...]:
    """W&B and those `also`, on rank 0; none in a smoke test."""
    if start is None or not ctx.accelerator.is_main_process:
        return ()
    shown = wandb.describe(start.folder, loaded, options, bool(ctx.data.fallback))
    return (wandb.start(options.wandb, shown, ctx.data), *also)


def show_header(run: ActiveRun, start: ResumePoint | None, facts: dict[str, str]) -> None:
    """What is about to run, and what the user should know about its beginning."""
    rows = {name: fact for name, fact in facts.items() if name != "fallback"}
    shown = [logger for logger in run.loggers if logger.name]
    rows |= {logger.name: f"{logger.mode} {logger.where}".strip() for logger in shown}
    rows |= {"run folder": str(run.folder.path)} if run.folder else {}
    run.console.header(f"launcher: {run.loaded.name}", rows, fallback_warning(run.ctx.data))
    notices = [logger.notice for logger in run.loggers]
    for note in (*run.ctx.notes, *notices, *(start.notes if start else ())):
        if note:
            run.console.say(note)


def closing_rows(run: ActiveRun) -> dict[str, str]:
    """What was reached and where it lies."""
    rows, images = {}, IMAGES_OF[run.ctx.data.evaluated_on]
    tested = run.tested.metrics() if run.tested else {}
    uncertain = run.ctx.recipe.uncertain
    if run.stopped:
        rows["stopped"] = f"by {why_stopped()}; the same command with --resume goes on from here"
    for label, epoch in (("best epoch", run.best), ("last epoch", run.last)):
        if epoch:
            figure = (
                f"{images} accuracy {epoch.accuracy:.2%}{tta_note(epoch.accuracy_tta, uncertain)}"
            )
            if label == "best epoch" and images == "test":
                figure += " (chosen on the test images)"
            figures = tested.get(label.partition(" ")[0])
            if figures:
                note = tta_note(figures.get("test/accuracy_tta"), uncertain)
                figure += f", test accuracy {figures['test/accuracy']:.2%}{note}"
            rows[label] = f"{epoch.epoch}, {figure}"
    if run.highest and run.highest != run.best:
        note = "its weights are not in the run folder"
        figure = f"epoch {run.highest.epoch}, {images} accuracy {run.highest.accuracy:.2%}"
        rows["not kept"] = f"{figure}: {note}"
    if run.ctx.data.fallback:
        rows["data"] = fallback_warning(run.ctx.data)
    if run.folder:
        if not run.stopped:
            best, final = run.folder.best, run.folder.final
            rows["weights"] = f"{best} and {final.name}" if run.best else f"{final}"
        rows["run folder"] = str(run.folder.path)
    for logger in run.loggers:
        if logger.where:
            rows[logger.name] = f"{logger.mode} {logger.where}"
    return rows


# The loop and its events


class RequestPoll:
    """What this rank wants after a step: to stop at a signal, to save when minutes have passed."""

    def __init__(self, interval: SaveInterval) -> None:
        self._seconds = interval.minutes * 60 if interval.minutes else math.inf
        self.saved = time.monotonic()

    def __call__(self) -> Requests:
        """Asked after each step, so it has to be fast."""
        due = time.monotonic() - self.saved >= self._seconds
        return Requests(bool(signals.stop_reason()), due)


def run_loop(
    run: ActiveRun,
    progress: Progress = START,
    interval: SaveInterval = NEVER,
    through: Callable[[Iterator[Event]], Iterator[Event]] = iter,
) -> None:
    """Run `fit` and handle its events, which go `through` the profiler first.

    Raises `NotFiniteError` where the recipe does not say to roll back, or that did not help; and
    `TrainingError` where the final weights, or the state at a stop, could not be written, or the
    last test loss is not finite.
    """
    poll = RequestPoll(interval)
    while True:
        try:
            for event in through(fit(run.ctx, progress, poll)):
                handle_event(run, event)
                if isinstance(event, SavePoint):
                    poll.saved = time.monotonic()
            break
        except NotFiniteError as error:
            progress = roll_back(run, error)
            # Later steps may have been suspected only for what this one did to them.
            before = {step for step in run.ctx.skip_steps if step < error.step}
            run.ctx = replace(run.ctx, skip_steps=frozenset(before | {error.step}))
    lost = run.unsaved if run.stopped else run.saver.weights(run.ctx.state.eval_model, "final")
    if run.report:
        run.saver.outcomes(run.report, run.ctx.data.evaluated, "last")
    if run.ctx.data.validation is not None and not run.stopped:
        run.tested = evaluate_test_images(run)
        run.saver.tested(run.tested)
        for logger in run.loggers:
            logger.tested(run.tested)
    run.saver.wait()
    accelerator = run.ctx.accelerator
    accelerator.wait_for_everyone()  # no rank ends while the state is being written
    if lost_on_main := run_on_main(accelerator, lambda: lost):
        raise TrainingError(lost_on_main)
    loss = run.report.evaluation.loss if run.report else 0.0
    if not run.stopped and not math.isfinite(loss):
        images = IMAGES_OF[run.ctx.data.evaluated_on]
        raise TrainingError(f"the {images} loss at the end is {loss}, not a finite number")


def evaluate_test_images(run: ActiveRun) -> FinalReport:
    """The only look at the test images of a run that has others to choose by; on every rank.

    First with the weights of the end, then with the best ones, which the network has afterwards.
    """
    ctx = run.ctx
    best = run_on_main(ctx.accelerator, lambda: run.best)  # which it alone may have failed to keep
    test, views = ctx.data.test, ctx.recipe.views
    last = evaluate(ctx, test)
    last_tta = evaluate(ctx, test, views) if views else None
    if best is None or run.folder is None:
        return FinalReport(last, last_tta, None)
    if run.last and best.epoch == run.last.epoch:
        return FinalReport(last, last_tta, last)
    network, path = ctx.state.eval_model, run.folder.best
    run_on_main(ctx.accelerator, lambda: checkpoint.load_weights(network, path))
    broadcast_state(network, ctx.accelerator)
    return FinalReport(last, last_tta, evaluate(ctx, test))


def handle_event(run: ActiveRun, event: Event) -> None:
    """Show, log, record and save what the loop has measured."""
    plan, saver = run.ctx.plan, run.saver
    if isinstance(event, StepReport):
        run.losses.append(event.loss)
        if event.first_predictions:
            run.console.say(first_step_line(event, run.ctx.data.train.classes))
        for logger in run.loggers:
            logger.step(event, plan)
    elif isinstance(event, EpochReport):
        run.report = event
        # An epoch that --max-steps cuts is the best one only if there is no other: a resumed run
        # trains all of it.
        is_whole = event.step == event.epoch * plan.steps_per_epoch or run.best is None
        if is_whole and is_better(event, run.highest):
            run.highest = run.last
        is_best = is_whole and is_better(event, run.best)
        if is_best and not saver.weights(run.ctx.state.eval_model, "best"):
            run.best = run.last
            saver.outcomes(event, run.ctx.data.evaluated, "best")
        for logger in run.loggers:
            logger.epoch(event, plan, run.best)
        loss = event.evaluation.loss
        if not math.isfinite(loss):
            saver.complain(f"the {event.images} loss of epoch {event.epoch} is {loss}")
        if event.ends_training and event.epoch < plan.last_epoch:
            run.console.say(early_stop_line(run.ctx.recipe, event))
        size = plan.resolution(event.epoch)
        row = event.metrics() | ({"train/resolution": size} if size else {})
        saver.epoch(row | {"data": run.ctx.data.name}, outcomes.details(event))
    else:
        run.stopped = event.stops
        details = partial(checkpoint_details, run, event.progress)
        if not saver.checkpoint(run.ctx, details, event.stops):
            run.unsaved = f"stopped by {why_stopped()}, not saved: --resume goes on from "
            run.unsaved += newest_progress(run)
        saver.compiled(run.code)


def early_stop_line(recipe: Recipe, report: EpochReport) -> str:
    """Why no further epoch is trained."""
    waited = f"{count(recipe.patience or 0, 'epoch')} without a better {report.images} accuracy"
    delta = f" (by more than {recipe.min_delta:g})" if recipe.min_delta else ""
    return f"training ends with epoch {report.epoch}: {waited}{delta}"


def is_better(report: EpochReport, best: Best | None) -> bool:
    """Whether an epoch is the best so far; never where its test loss is not a number."""
    has_more = best is None or report.evaluation.accuracy > best.accuracy
    return has_more and not math.isnan(report.evaluation.loss)


def roll_back(run: ActiveRun, error: NotFiniteError) -> Progress:
    """Restore the newest whole checkpoint on all ranks, which all have met the same error."""
    ctx, folder, skipped = run.ctx, run.folder, run.ctx.skip_steps
    if ctx.recipe.on_nan != "rollback" or folder is None:
        raise error
    run.saver.wait()
    found = run_on_main(ctx.accelerator, lambda: checkpoint.newest(folder.checkpoints)[0])
    if found is None or len(skipped) >= MOST_ROLLBACKS or error.step in skipped:
        raise error
    checkpoint.restore(found, ctx)

    def read() -> tuple[checkpoint.SavedState, Best | None]:
        state = checkpoint.read_state(found)
        return state, best_that_is_kept(folder, state.best, state.progress)

    state, run.best = run_on_main(ctx.accelerator, read)
    progress, run.highest = state.progress, state.best
    if run.report and run.report.epoch > progress.epochs:
        run.report = None
    ctx.state.skips_in_a_row = 0
    run.saver.forget_after(progress.epochs)
    run.console.say(f"{error}")
    run.console.say(f"rolled back to step {progress.step}; step {error.step} is skipped")
    return progress


def checkpoint_details(run: ActiveRun, progress: Progress) -> dict[str, Any]:
    """What state.json of a checkpoint says."""
    return {
        "progress": asdict(progress),
        "best": asdict(run.best) if run.best else None,
        "world_size": run.ctx.plan.world_size,
        "steps_per_epoch": run.ctx.plan.steps_per_epoch,
        "wandb_id": run.folder.identity if run.folder else "",
        "data": run.ctx.data.name,
        "data_digest": run.ctx.data.digest,
        "config": run.loaded.config,
        "source": redacted(run.loaded.source),
        "versions": run_dir.versions(),
    }


def newest_progress(run: ActiveRun) -> str:
    """Where a resumed run would begin."""
    found = checkpoint.newest(run.folder.checkpoints)[0] if run.folder else None
    return f"step {checkpoint.read_state(found).progress.step}" if found else "the beginning"


def why_stopped() -> str:
    """Why the run was stopped."""
    return signals.stop_reason() or "a signal to another rank"
