"""`launcher tune RECIPE --search NAME=RANGE ...`: settings that make a recipe better.

Optuna proposes; each trial is an ordinary run, judged by its validation images and ended early
where it is worse than others. The journal of the search is a file beside the runs, which several
processes and machines may share; an interrupted search can be continued.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from filelock import FileLock, Timeout
from rich.table import Table
from rich.text import Text

from launcher.checkpoint.resume import FILE, described_changes
from launcher.checkpoint.run_files import RunFiles
from launcher.config import imports
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.config.overrides import override
from launcher.config.plan import Plan
from launcher.distributed import signals
from launcher.distributed.accelerator import reset_accelerator, usable_cores
from launcher.distributed.world import ALONE, World
from launcher.errors import EXIT_SAVED, StoppedBeforeTrainingError, TrainingError, UserError
from launcher.loggers.logger import Logger
from launcher.run.train import train_loaded
from launcher.training.metrics import Best, EpochReport
from launcher.utils.redaction import redacted
from launcher.utils.terminal import make_console
from launcher.utils.text import have_changed, printable, some

if TYPE_CHECKING:
    import optuna

_SPAN = re.compile(r"(log:)?([-+0-9.eE]+)\.\.([-+0-9.eE]+)")
_PRUNED = "the search, as others were better by this epoch"
_RANGES = "NAME=low..high, NAME=log:low..high or NAME=a|b|c"
_EXAMPLE = "type --search 'optimizer.lr=log:1e-4..1e-1', for example"


@dataclass(frozen=True)
class Range:
    """The values of a setting to try: from `low` to `high`, or one of `words`."""

    name: str
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    is_whole: bool = False
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As it is typed after `NAME=`."""
        if self.words:
            return "|".join(self.words)
        return f"{'log:' * self.is_log}{_typed(self.low, self)}..{_typed(self.high, self)}"

    def distribution(self) -> "optuna.distributions.BaseDistribution":
        """The same as an Optuna distribution."""
        from optuna import distributions as d

        if self.words:
            return d.CategoricalDistribution(self.words)
        if self.is_whole:
            return d.IntDistribution(int(self.low), int(self.high), log=self.is_log)
        return d.FloatDistribution(self.low, self.high, log=self.is_log)


@dataclass(frozen=True)
class Search:
    """The ranges, the number of trials and the name; `fixed` are the settings of all trials."""

    loaded: LoadedRecipe
    ranges: tuple[Range, ...]
    trials: int
    options: RunOptions
    fixed: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """The beginning of the trials' names."""
        return self.options.name or f"{self.loaded.name}-search"

    @property
    def folder(self) -> Path:
        """The folder of the journal and the locks, which all processes and machines share."""
        return self.options.runs / f"{self.base}.files"

    @property
    def journal(self) -> Path:
        """Optuna's journal of all trials."""
        return self.folder / "journal"

    def run_name(self, number: int) -> str:
        """The name of the run of one trial."""
        return f"{self.base}-trial{number}"


def parse_range(text: str) -> Range | None:
    """`optimizer.lr=log:1e-4..1e-1`, `epochs=1..5` or `model.width=16|32`; None for one value.

    Raises `UserError` for an invalid range.
    """
    name, equals, value = text.removeprefix("--").partition("=")
    if not equals or not name:
        raise UserError(f"--search {text}", expected=_RANGES, instead=_EXAMPLE)
    if "|" in value:
        words = tuple(value.split("|"))
        if not all(words) or len(set(words)) < len(words):
            raise UserError(f"--search {text}", expected="different values", instead=_EXAMPLE)
        return Range(name, words=words)
    if ".." not in value:
        return None
    found = _SPAN.fullmatch(value)
    low = high = float("nan")
    with suppress(ValueError):
        low, high = (float(part) for part in found.groups()[1:]) if found else (low, high)
    is_log = bool(found and found[1])
    if not low < high or (is_log and low <= 0) or not abs(high) < 1e300:
        expected = "a lower and a higher number" + (" above 0" if is_log else "")
        raise UserError(f"--search {text}", expected=expected, instead=_EXAMPLE)
    assert found is not None
    is_whole = all(re.fullmatch(r"[-+]?\d+", part) for part in found.groups()[1:])
    return Range(name, low, high, is_log, is_whole)


def prepare(
    loaded: LoadedRecipe,
    words: Sequence[str],
    trials: int,
    options: RunOptions,
    *,
    on_test: bool,
    settings: Sequence[str] = (),
) -> Search:
    """Check what is typed; `settings` are the words by which `loaded` was changed.

    Raises `UserError`, among others, for words that are no ranges of the recipe's settings.
    """
    found = [(word, parse_range(word)) for word in words]
    fixed = [word for word, searched in found if searched is None]
    ranges = tuple(searched for _, searched in found if searched is not None)
    if not ranges:
        raise UserError("--search without a range", expected=_RANGES, instead=_EXAMPLE)
    recipe = override(loaded.recipe, fixed)
    for searched in ranges:  # both ends must be values that the recipe takes
        for value in searched.words or (searched.low, searched.high):
            override(recipe, [f"{searched.name}={_typed(value, searched)}"])
    if recipe.data.validation is None and not on_test:
        raise UserError(
            f"a search over {loaded.name} without validation images",
            expected="images to choose by, which are not those of the result",
            instead="type data.validation=0.1 as well; or --on-test, which every output then says",
        )
    import_optuna()
    loaded = replace(loaded, recipe=recipe)
    return Search(loaded, ranges, trials, options, (*settings, *fixed))


def import_optuna() -> Any:
    """Import Optuna and silence its log. Raises `UserError` where it is not installed."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError(
            "--search, but Optuna is not installed",
            expected="the package that proposes the settings",
            instead="type pip install optuna",
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _typed(value: Any, searched: Range) -> str:
    return str(int(value) if searched.is_whole else value)


def run(search: Search, world: World, *, jobs: int, words: Sequence[str]) -> int:
    """Make the missing trials in `jobs` processes and show all; returns the exit code.

    `words` is the command line, for the other processes.
    """
    if world.size > 1:
        raise UserError(
            f"--search on {world.size} processes",
            expected="1, which starts others with --jobs",
            instead="type python -m launcher tune RECIPE --search ... --jobs N",
        )
    _study(search)  # refuses another search once, and not in each process
    code = _in_processes(jobs, words) if jobs > 1 else work(search)
    show(search)
    return code


def _in_processes(jobs: int, words: Sequence[str]) -> int:
    """Start the same command `jobs` times, and pass signals on to the processes."""
    command = [sys.executable, "-m", "launcher", *words]
    processes = [
        subprocess.Popen([*command, "--job", str(job)], env=os.environ | share_of(job, jobs))
        for job in range(jobs)
    ]
    told = False
    while any(process.poll() is None for process in processes):
        if signals.stop_reason() and not told:
            told = True
            for process in processes:
                process.terminate()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
    codes = [process.returncode for process in processes]
    return next((code for code in codes if code), 0)


def share_of(job: int, jobs: int) -> dict[str, str]:
    """The cores and the GPU of one of the processes, as environment variables."""
    threads = max(1, usable_cores() // jobs)
    share = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = map(str, range(torch.cuda.device_count())) if visible is None else visible.split(",")
    if devices := [device for device in devices if device]:
        share["CUDA_VISIBLE_DEVICES"] = devices[job % len(devices)]
    return share


# One process


def work(search: Search, job: int = 0) -> int:
    """Make one trial after the other until there are enough; returns the exit code.

    It begins with trials that an ended process left unfinished.
    """
    study = _study(search, job)
    while claimed := _claim(search, study):
        trial, lock = claimed
        try:
            if _make(search, study, trial):
                return EXIT_SAVED
        finally:
            lock.release()
    return 0


def _claim(search: Search, study: Any) -> "tuple[Any, FileLock] | None":
    """A trial that no other process works on, with its lock held; None when all are made.

    One process at a time chooses one, or two might choose the same. A lock ends with its
    process, however it ends.
    """
    optuna = import_optuna()
    with FileLock(search.folder / "claim.lock"):
        trials = _trials(study)
        for frozen in trials:
            if frozen.state == optuna.trial.TrialState.RUNNING:
                lock = FileLock(search.folder / f"trial{frozen.number}.lock", blocking=False)
                with suppress(Timeout):
                    lock.acquire()
                    if all(searched.name in frozen.params for searched in search.ranges):
                        return optuna.trial.Trial(study, frozen._trial_id), lock
                    # Its process ended before Optuna had proposed settings.
                    study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
                    lock.release()
        if len(trials) >= search.trials:
            return None
        trial = study.ask({r.name: r.distribution() for r in search.ranges})
        lock = FileLock(search.folder / f"trial{trial.number}.lock")
        lock.acquire()
        return trial, lock


def _files(search: Search, number: int) -> RunFiles:
    return RunFiles(search.options.runs / search.run_name(number))


def _study(search: Search, job: int = 0) -> "optuna.Study":
    """Load the study from the journal. Raises `UserError` where it is of another search."""
    optuna = import_optuna()
    try:
        search.folder.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(search.journal))
        study = optuna.create_study(
            study_name=search.base,
            storage=optuna.storages.journal.JournalStorage(backend),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
            direction="maximize",
            load_if_exists=True,
        )
    # The latter is what Optuna raises where lines of a journal are damaged.
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise UserError(
            f"{search.journal}, which is damaged or out of reach ({type(error).__name__}: {error})",
            expected="what the search has written, in a folder that can be written",
            instead="type another --name, or --runs FOLDER",
        ) from None
    trials = len(_trials(study))
    options = {"--max-steps": search.options.max_steps, "--init-from": search.options.init_from}
    searched = {
        "recipe": search.loaded.config,
        "ranges": {r.name: str(r) for r in search.ranges},
        "options": options | {"--skip": list(search.options.skip)},
        "file": search.loaded.digest,
        "neighbours": dict(search.loaded.neighbours),
    }
    if trials:
        _refuse_other_search(search, study.user_attrs.get("searched", {}), searched)
    else:
        study.set_user_attr("searched", searched)
    # Another seed in each process and each call: otherwise the same settings are proposed again.
    numbers = numpy.random.SeedSequence([search.loaded.recipe.seed, job, trials])
    study.sampler = optuna.samplers.TPESampler(seed=int(numbers.generate_state(1)[0]))
    return study


def _refuse_other_search(search: Search, saved: Any, present: Any) -> None:
    """Accuracies on other images, or with other settings, cannot be compared with these."""
    parts = [
        described_changes(saved.get(part, {}), present[part])
        for part in ("recipe", "ranges", "options")
    ]
    changes = [change for part in parts for change in part.values()]
    if changes:
        raise UserError(
            f"the search {search.base} with other settings: {', '.join(changes)}",
            expected="the settings and ranges that its trials have been made with",
            instead="type another --name",
        )


def _trials(study: "optuna.Study") -> list[Any]:
    return study.get_trials(deepcopy=False)


class Judge(Logger):
    """Reports the accuracy of each epoch to Optuna, and stops the run where others are better."""

    def __init__(self, trial: "optuna.Trial") -> None:
        """Judge one trial."""
        self._trial, self.is_pruned = trial, False
        stored = trial.study._storage.get_trial(trial._trial_id)
        self._told = set(stored.intermediate_values)

    def epoch(self, report: EpochReport, plan: Plan, best: Best | None) -> None:
        """Report the accuracy of an epoch, unless a run before the resume has done so."""
        if report.epoch not in self._told:
            self._trial.report(report.evaluation.accuracy, report.epoch)
        if not report.ends_training and self._trial.should_prune():
            self.is_pruned = True
            signals.ask_to_stop(_PRUNED)


def _make(search: Search, study: Any, trial: Any) -> bool:
    """Make or continue one trial; returns whether a signal stopped it before its end.

    Settings that the recipe refuses, or that diverge, make a failed trial.
    """
    states = import_optuna().trial.TrialState
    name, judge = search.run_name(trial.number), Judge(trial)
    words = [f"{key}={value}" for key, value in trial.params.items()]
    sys.stdout.write(redacted(f"=== {name} of {search.trials} trials: {' '.join(words)}\n"))
    sys.stdout.flush()
    options = replace(search.options, name=name, group=search.base, resume=True, report=False)
    try:
        loaded = replace(search.loaded, recipe=override(search.loaded.recipe, words))
        result = train_loaded(loaded, options, ALONE, also=(judge,))
    except StoppedBeforeTrainingError:
        raise  # the trial can be continued
    except Exception as error:
        study.tell(trial, state=states.FAIL)  # otherwise the next command would repeat it
        if not isinstance(error, TrainingError | UserError):
            raise
        sys.stderr.write(redacted(f"launcher: {name}: {error}\n"))
        return False
    finally:
        signals.withdraw()
        reset_accelerator()
    if result.stopped and not judge.is_pruned:
        return True
    value = None if judge.is_pruned else _files(search, trial.number).best_accuracy
    state = states.PRUNED if judge.is_pruned else states.COMPLETE
    study.tell(trial, value, state)
    return False


# What is shown


def show(search: Search) -> None:
    """Print a line for each trial, the best first, and how to measure the best one."""
    console = make_console()
    if not search.journal.is_file():
        console.print(f"no trial of {search.base} in {search.options.runs}", markup=False)
        return
    study = _study(search)
    rows = [(trial, _files(search, trial.number)) for trial in _trials(study)]
    rows.sort(key=lambda row: -(_accuracy(*row) or 0.0))
    images = "test" if search.loaded.recipe.data.validation is None else "validation"
    table = Table(box=None, pad_edge=False)
    for column in ("run", "trial", "epochs", f"{images} accuracy"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for searched in search.ranges:
        table.add_column(Text(printable(searched.name)), justify="right")
    for trial, run_files in rows:
        accuracy = _accuracy(trial, run_files)
        cells = (
            search.run_name(trial.number),
            trial.state.name.lower(),
            str(run_files.epoch),
            "-" if accuracy is None else f"{accuracy:.2%}",
            *(_shown(trial.params.get(searched.name)) for searched in search.ranges),
        )
        table.add_row(*(Text(printable(redacted(cell))) for cell in cells))
    console.print(table)
    searched = study.user_attrs["searched"]
    files = [FILE] * (searched.get("file", search.loaded.digest) != search.loaded.digest)
    files += imports.changed(searched.get("neighbours"), search.loaded.neighbours)
    if files:
        text = f"{have_changed(files)} the search began: trials may be of both"
        console.print(printable(text), markup=False, soft_wrap=True)
    if len({run.about.get("data_digest") for _, run in rows if run.about}) > 1:
        console.print("the images have changed since the search began: trials are of both")
    others = [r.name for t, r in rows if r.best_accuracy != _accuracy(t, r)]
    if others:
        text = f"judged by what the search left, but other runs by now: {some(others)}"
        console.print(printable(text), markup=False, soft_wrap=True)
    for line in _about_best(search, rows, images):
        console.print(redacted(line), markup=False, soft_wrap=True, highlight=False)


def _accuracy(trial: Any, run: RunFiles) -> float | None:
    """What a trial has ended with, also where its run went on or is gone; else what it has now."""
    ended: float | None = trial.value if trial.state.name == "COMPLETE" else run.best_accuracy
    return ended


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _about_best(search: Search, rows: Sequence[tuple[Any, RunFiles]], images: str) -> list[str]:
    ended = [(t, r) for t, r in rows if t.state.name == "COMPLETE" and t.value is not None]
    if not ended:
        return ["no trial has ended"]
    trial, best = ended[0]
    is_as_left = best.best_accuracy == trial.value
    words = " ".join(f"{name}={_shown(value)}" for name, value in trial.params.items())
    lines = [f"best of {len(ended)} that ended: {words}"]
    if images == "test":
        lines.append(
            f"CHOSEN ON THE TEST IMAGES (--on-test): {trial.value:.2%} is biased: it "
            "is the best of many on these very images"
        )
    elif is_as_left and (tested := best.test_accuracy("best")) is not None:
        lines.append(
            f"chosen by the validation images ({trial.value:.2%}, the best of many and so "
            f"too high); on the test images, which the search did not look at: {tested:.2%}"
        )
    exact = [*search.fixed, *(f"{name}={value}" for name, value in trial.params.items())]
    others = [word for word in exact if not word.removeprefix("--").startswith("seed=")]
    lines.append(f"measure it: launcher repeat RECIPE {shlex.join(others)} --seeds 0-4")
    return lines
