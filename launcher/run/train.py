"""One training, from a recipe to its result: `train_loaded` is called on each rank.

The ranks meet, the training is prepared (`prepare`), its run folder begun or continued, and its
loop run in front of the loggers (`events`).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import datetime

import torch

from launcher.checkpoint import checkpoint, run_dir
from launcher.checkpoint.compiled import CompiledCode
from launcher.checkpoint.resume import ResumePoint, initial_weights, resumed_run
from launcher.checkpoint.run_files import RunFiles, chosen_after
from launcher.checkpoint.saver import Saver
from launcher.checkpoint.weights import digest_of_file
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.config.plan import START
from launcher.distributed import process_group
from launcher.distributed.accelerator import run_on_main
from launcher.distributed.process_group import RankGroup, Timeouts
from launcher.distributed.world import ALONE, World
from launcher.errors import EXIT_FAULT, EXIT_SAVED, LauncherError, SharedUserError, UserError
from launcher.loggers import wandb
from launcher.loggers.console import make_console, tta_note
from launcher.loggers.logger import Logger
from launcher.loggers.profiler import Profiler
from launcher.loggers.report import page_of, report_at_end
from launcher.run.events import ActiveRun, RunResult, best_that_is_kept, run_loop, why_stopped
from launcher.run.prepare import fallback_warning, training_of
from launcher.training.loop import warm_up_ddp
from launcher.training.metrics import IMAGES_OF, sample_indices
from launcher.training.smoke import SmokeTest, smoke_options
from launcher.training.state import TrainContext
from launcher.utils.redaction import redacted
from launcher.utils.text import count

LONGEST_REASON = 500  # characters of end.json
# Is shown a training that is ready to begin, and returns it, perhaps with phases that it marks.
Watch = Callable[[TrainContext], TrainContext]


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


def describe_position(ctx: TrainContext) -> str:
    """Where the training is, in words."""
    step = ctx.state.current_step
    return f"in step {step} (epoch {ctx.plan.epoch_of(step)})" if step else "outside training"


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
            start = replace(start, notes=(*start.notes, note))
            start = describe_run(ctx, start, loaded, options, facts)
        loggers = (console, *make_loggers(ctx, start, loaded, options, also))
        best = start.best if start else None
        saver = Saver(start.folder if start else None, is_main, console.say)
        if start and is_main and options.makes_report:
            reported.append(start.folder.path)
        run = ActiveRun(ctx, loaded, console, loggers, saver, code, best, highest)
        run.is_tested = start is not None and start.is_tested
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
            saver.end(exit_code, why_failed(sys.exception()))
            for logger in loggers:
                logger.finish(exit_code)
    return run.result()


def why_failed(error: BaseException | None) -> str:
    """What ended the training, in one line; empty for nothing."""
    if error is None:
        return ""
    kind = "" if isinstance(error, LauncherError) else f"{type(error).__name__}: "
    return redacted(" ".join(f"{kind}{error}".split())[:LONGEST_REASON])


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
        start.folder.tidy(start.checkpoint)
        return start

    return run_on_main(ctx.accelerator, choose)


def describe_run(
    ctx: TrainContext,
    start: ResumePoint,
    loaded: LoadedRecipe,
    options: RunOptions,
    facts: dict[str, str],
) -> ResumePoint:
    """Write on rank 0 what the run is, for all ranks."""

    def write() -> ResumePoint:
        train = ctx.data.train
        about = {
            "name": loaded.name,
            "recipe_folder": loaded.folder,
            "neighbours": dict(loaded.neighbours),
            "classes": list(train.classes),
            "image_shape": list(train.shape),
            "data_digest": ctx.data.digest,
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "evaluated_on": ctx.data.evaluated_on,
            "samples": sample_indices(len(ctx.data.evaluated)),
        }
        before = RunFiles(start.folder.path)
        if start.checkpoint is not None:
            began = ("weights", "weights_digest")
            about |= {k: v for k, v in before.about.items() if k in began}
            about["changes"] = list(map(asdict, start.changes))
        elif options.init_from is not None:
            given = initial_weights(options.runs, options.init_from)
            about["weights_digest"] = digest_of_file(given)[:12]
        best = best_that_is_kept(start.folder, start.best, start.progress)
        outdated = [] if best else ["best.safetensors", "best.npz"]
        last, present = before.last, start.progress.epochs
        if last and not chosen_after(start.changes) < last.epoch <= present:
            outdated.append("last.npz")
        if start.keeps_description:
            own = replace(start.folder, identity=start.wandb_id)
        else:
            own = start.folder.describe(loaded.config, facts | about, loaded.source, start.wandb_id)
        own.drop(["end.json", *["test.json"] * (not start.is_tested), *outdated])
        if ctx.data.held_out is not None:
            own.keep_held_out(ctx.data.held_out.tolist())
        notes = start.notes
        if damaged := own.forget_after(start.progress.epochs):
            dropped = f"{count(damaged, 'damaged line')} dropped"
            notes = (*notes, f"metrics.jsonl and details.jsonl: {dropped}")
        return replace(start, folder=own, notes=notes, best=best)

    return run_on_main(ctx.accelerator, write)


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
