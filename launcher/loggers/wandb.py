"""Weights & Biases, with `wandb_end`: imported on rank 0 only, and only where it is wanted.

Three promises: no question is ever asked, training never waits for a network, and a failure of W&B
is a line of warning, never an exception in the training.
"""

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from PIL import Image

from launcher.checkpoint.outcomes import as_picture
from launcher.checkpoint.run_dir import RunDir
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.config.plan import Plan
from launcher.data.images import Data
from launcher.loggers import wandb_end
from launcher.loggers.logger import Logger
from launcher.loggers.wandb_history import (
    ROW,
    Row,
    WandbHistory,
    epoch_scalars,
    log_records,
    step_scalars,
)
from launcher.training.metrics import Best, EpochReport, FinalReport, StepReport, sample_indices
from launcher.utils.arguments import obstacle
from launcher.utils.redaction import cleaned, redacted

if TYPE_CHECKING:
    import wandb

# What is set for W&B where the user's environment says nothing else.
ENVIRONMENT = {
    "WANDB_HTTP_TIMEOUT": "5",  # seconds; login, tables and artifacts wait for a silent server
    "WANDB_INIT_TIMEOUT": "30",  # seconds until a run that cannot begin online begins offline
    "WANDB_FINISH_TIMEOUT": "30",  # seconds to upload the rest; what is left stays on disk
    "WANDB_ERROR_REPORTING": "false",  # its own retries hold up the end by 12 s without a network
    "WANDB_SILENT": "true",  # the launcher's own header names the run
}
GRAPHQL_RETRIES = 2  # the client's default goes on for minutes, and `finish` waits for it
MOST_WAITING = 16  # epochs whose images and tables may wait for the network
MOST_TABLE_CLASSES = 100  # W&B takes at most 10,000 rows: the confusion matrix of 100 classes

_log = logging.getLogger("launcher")


@dataclass(frozen=True)
class WandbRun:
    """How a run appears in W&B, and the launcher's own run folder, in which its files lie.

    With `run_id` the run of that id is continued, or begun under it. `has_report` and `has_model`
    say whether it gets the page and the weights at the end.
    """

    folder: Path
    project: str
    name: str
    config: dict[str, Any]
    tags: Sequence[str] = ()
    note: str = ""
    group: str | None = None
    run_id: str | None = None
    has_report: bool = False
    has_model: bool = False


def describe(
    folder: RunDir, loaded: LoadedRecipe, options: RunOptions, is_fallback: bool
) -> WandbRun:
    """How a run appears in W&B, by its options, W&B's variables, or else its recipe and folder."""
    # What is given to wandb.init, W&B does not take from the environment: so that is done here.
    environ = os.environ
    group = options.group or environ.get("WANDB_RUN_GROUP")
    own_tags = filter(None, environ.get("WANDB_TAGS", "").split(","))
    return WandbRun(
        folder=folder.path,
        project=redacted(options.project or environ.get("WANDB_PROJECT", "launcher")),
        name=redacted(options.name or environ.get("WANDB_NAME", folder.path.name)),
        config=loaded.config,
        tags=cleaned([loaded.name, *own_tags, *(["synthetic-data"] if is_fallback else [])]),
        note=redacted(environ.get("WANDB_NOTES", loaded.note)),
        group=redacted(group) if group else None,
        run_id=folder.identity,
        has_report=options.makes_report,
        has_model=options.wandb_model,
    )


class NullLogger(Logger):
    """Where W&B is off. `notice` says why, if somebody expected it."""

    name, mode = "W&B", "off"

    def __init__(self, notice: str = "") -> None:
        """`notice` is empty where nobody expected W&B."""
        self.notice = notice


class WandbLogger(Logger):
    """A run of W&B: `mode` is online or offline, `where` its address or its folder.

    `notice` says why it is not the mode that was asked for. Images and tables are made and sent by
    a thread of their own: making them takes 30 ms, and sending them may wait for the network.
    """

    name = "W&B"

    def __init__(
        self, run: "wandb.Run", samples: "Samples", notice: str, described: WandbRun
    ) -> None:
        """Log into a run that has begun, and is `described`."""
        self._run, self._samples, self._warned = run, samples, False
        self._described, self._is_complete = described, False
        self._folder = Path(run.dir).parent
        self.mode = "offline" if run.offline else "online"
        self.where = str(self._folder) if run.offline else run.url or ""
        self.notice = notice
        self._history = WandbHistory(described.folder)
        self._waiting: SimpleQueue[EpochReport | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._log_images, name="images", daemon=True)
        self._thread.start()
        with self._only_warning():
            _define_axes(run)
            for row in self._history.rows[self._last_row_kept() :]:
                run.log(row)  # its images are lost with the process that was killed

    def step(self, report: StepReport, plan: Plan) -> None:
        """Log the training since the last report."""
        with self._only_warning():
            if self._history.is_new("step", report.step):  # else trained again after a resume
                self._log(step_scalars(report))

    def epoch(self, report: EpochReport, plan: Plan, best: Best | None) -> None:
        """Log an epoch, the best one so far, and later the sample images and the tables."""
        with self._only_warning():
            if not self._history.is_new("epoch", report.epoch):
                return
            self._log(epoch_scalars(report, best, self._samples.classes))
            if self._waiting.qsize() >= MOST_WAITING:
                raise TimeoutError(f"the images of {MOST_WAITING} epochs are waiting already")
            self._waiting.put(report)

    def tested(self, report: FinalReport) -> None:
        """Keep the figures of the test images, which are no curve, in the summary of the run."""
        with self._only_warning():
            for which, figures in report.metrics().items():
                numbers = {k: v for k, v in figures.items() if isinstance(v, int | float)}
                self._run.summary.update({f"{which}/{k}": v for k, v in numbers.items()})

    def finish(self, exit_code: int) -> None:
        """Send what is left, for a limited time, and end the run with an exit code.

        A run that was stopped or has failed has not come to its end: it gets no artifacts.
        """
        self._is_complete = exit_code == 0
        self._waiting.put(None)
        self._thread.join(self._run.settings.finish_timeout)
        self._history.close()
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            reason = _one_line(error)
            _log.warning("W&B lacks a part of the run (%s): wandb sync %s", reason, self._folder)

    def _log(self, scalars: Row) -> None:
        self._run.log(self._history.add(scalars))

    def _last_row_kept(self) -> int:
        """The number of the last row that W&B has from earlier attempts, or may get by a sync.

        Online the summary of the continued run holds it; offline the logs on disk do.
        """
        if not self._history.rows:
            return 0
        kinds = ("offline-run-*", "run-*") if self._run.offline else ("offline-run-*",)
        parts = {part for kind in kinds for part in self._folder.parent.glob(kind)}
        logs = (log for part in parts - {self._folder} for log in part.glob("*.wandb"))
        found = max(map(last_row, logs), default=0)
        return found if self._run.offline else max(found, dict(self._run.summary).get(ROW, 0))

    def _log_images(self) -> None:
        while (report := self._waiting.get()) is not None:
            with self._only_warning():
                self._run.log({"epoch": report.epoch, "samples": self._samples.captioned(report)})
                self._run.log({"epoch": report.epoch, **self._samples.tables(report)})
        if self._is_complete:
            self._log_end()

    def _log_end(self) -> None:
        its = self._described
        with self._only_warning():
            if tables := wandb_end.tables(its.folder):
                self._run.log(tables)
        with self._only_warning():
            wanted = {"has_report": its.has_report, "has_model": its.has_model}
            for artifact in wandb_end.artifacts(its.folder, self._run.id, **wanted):
                self._run.log_artifact(artifact)

    @contextmanager
    def _only_warning(self) -> Iterator[None]:
        """Turn the first exception into a warning and leave out those that follow it."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                self._warned = True
                _log.warning("W&B misses something (training goes on): %s", _one_line(error))


def last_row(log: Path) -> int:
    """The number of the last row in one of W&B's own logs; 0 where there is none."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    records = map(Record.FromString, log_records(log.read_bytes()))
    items = (item for record in records for item in record.history.item)
    return max(
        (json.loads(i.value_json) for i in items if ROW in (i.key, *i.nested_key)), default=0
    )


class Samples:
    """The evaluated images that every epoch shows."""

    def __init__(self, data: Data) -> None:
        """Take the fixed images out of those that are evaluated."""
        evaluated = data.evaluated
        chosen = sample_indices(len(evaluated))
        images = evaluated.pixels(chosen).cpu().numpy()
        self.classes = evaluated.classes
        self._pictures = [as_picture(pixels) for pixels in images]
        self._truths = [self.classes[label] for label in evaluated.labels[chosen].tolist()]

    def captioned(self, report: EpochReport) -> "list[wandb.Image]":
        """The images under what the model takes them for: "cat 91% (is dog)"."""
        import wandb

        return [
            wandb.Image(picture, caption=_caption(truth, guess, confidence))
            for picture, truth, guess, confidence in self._guesses(report)
        ]

    def tables(self, report: EpochReport) -> dict[str, Any]:
        """The predictions as a table, and the confusion matrix where it is not too large."""
        import wandb

        small = len(self.classes) <= MOST_TABLE_CLASSES
        scored = self.classes if small else ()
        scores = report.probabilities[:, : len(scored)].tolist()
        predictions = wandb.Table(
            columns=["image", "truth", "prediction", "confidence", *(f"score {c}" for c in scored)],
            data=[
                [wandb.Image(picture), *guess, *row]
                for (picture, *guess), row in zip(self._guesses(report), scores, strict=True)
            ],
        )
        if not small:
            return {"predictions": predictions}
        return {"predictions": predictions, "confusion_matrix": _confusion(report, self.classes)}

    def _guesses(self, report: EpochReport) -> Iterator[tuple[Image.Image, str, str, float]]:
        """Picture, truth, prediction and confidence of each image."""
        scores = report.probabilities
        guesses = [self.classes[index] for index in scores.argmax(axis=1)]
        confidences = scores.max(axis=1).tolist()
        return zip(self._pictures, self._truths, guesses, confidences, strict=True)


def start(mode: str | None, run: WandbRun, data: Data) -> Logger:
    """Begin to log a run: `mode` is online, offline, off, or None for whatever is possible.

    Call it on rank 0 only. Never raises and never asks: where W&B cannot do what was wanted, the
    logger does less and its `notice` says why. Rows that a continued run has are left out.
    """
    if (mode or os.environ.get("WANDB_MODE")) in ("off", "disabled"):
        return NullLogger()
    try:
        _prepare_environment(run.folder)
        import wandb

        samples = Samples(data)
        begin = partial(
            wandb.init,
            dir=run.folder,
            project=run.project,
            name=run.name,
            config={**run.config, "data_fallback": cleaned(data.fallback)},
            tags=list(run.tags),
            notes=run.note or None,
            group=run.group,
            id=run.run_id,
            resume="allow" if run.run_id else None,
            settings=_settings(),
        )
        mode, notice = _choose(mode)
        if mode == "online":
            try:
                return WandbLogger(begin(mode="online"), samples, notice, run)
            except Exception as error:
                notice = f"W&B keeps the run offline: {_one_line(error)}"
                wandb.teardown()  # or the same id is refused
        if mode == "off":
            return NullLogger()
        return WandbLogger(begin(mode="offline"), samples, notice, run)
    except Exception as error:  # whatever is wrong with W&B, training works without it
        return NullLogger(f"W&B is off: {_one_line(error)}")


def mode_here() -> tuple[str, str]:
    """The mode in which a run would begin here, and why it is not online if it could be.

    Nothing is begun, and nothing is left in the present folder; a login takes a few seconds at
    most. For a process that does not log afterwards.
    """
    if os.environ.get("WANDB_MODE") in ("off", "disabled"):
        return "off", ""
    with TemporaryDirectory() as folder:
        _set_environment(Path(folder))
        import wandb

        try:
            return _choose(None)
        finally:
            wandb.teardown()


def _caption(truth: str, guess: str, confidence: float) -> str:
    return f"{guess} {confidence:.0%}" + ("" if guess == truth else f" (is {truth})")


def _confusion(report: EpochReport, classes: Sequence[str]) -> Any:
    """A chart from counts; `wandb.plot.confusion_matrix` wants every image of the test set."""
    import wandb

    columns = ["Actual", "Predicted", "nPredictions"]
    counts = [
        [truth, guess, count]
        for truth, row in zip(classes, report.evaluation.confusion, strict=True)
        for guess, count in zip(classes, row, strict=True)
    ]
    return wandb.plot_table(
        "wandb/confusion_matrix/v1",
        wandb.Table(columns=[*columns], data=counts),
        {name: name for name in columns},
        {"title": f"{report.images.capitalize()} images: truth and prediction"},
    )


def _prepare_environment(folder: Path) -> None:
    """Set what the client reads while it is imported, and where it keeps what it will upload."""
    own = folder.absolute() / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    _set_environment(own / "cache")
    # Elsewhere, the tables of an offline run may be gone when `wandb sync` looks for them.
    os.environ["WANDB_DATA_DIR"] = str(own / "data")


def _set_environment(cache: Path) -> None:
    """`cache` is for a user without a home, as in a container: the client would log to stderr."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    home = os.environ.get("HOME", "")
    usual = os.environ.get("XDG_CACHE_HOME") or (home and os.path.join(home, ".cache"))
    if not usual or obstacle(Path(usual)):
        os.environ.setdefault("WANDB_CACHE_DIR", str(cache))


def _settings() -> "wandb.Settings":
    import wandb

    return wandb.Settings(
        console="off",  # or progress bars fill the Logs tab with their control codes
        capture_loggers={"launcher": "INFO"},
        finish_timeout_raises=True,
        x_graphql_retry_max=GRAPHQL_RETRIES,
        x_transaction_log_flush_interval=1,  # or a killed process loses its last 15 seconds
    )


def _choose(asked: str | None) -> tuple[str, str]:
    """The mode that is possible here, and why it is not the one that was wanted."""
    import wandb

    wanted = asked or wandb.setup().settings.mode
    if wanted == "disabled":
        return "off", ""
    if wanted in ("offline", "dryrun"):
        return "offline", ""
    wandb.setup(wandb.Settings(mode="online"))  # or login refuses where WANDB_MODE is offline
    try:
        if wandb.login(prompt=False, verify=True):
            return "online", ""
        reason = "nobody is logged in; `wandb login` once puts the next runs online"
    except Exception as error:
        reason = _one_line(error)
    return "offline", f"W&B keeps the run offline: {reason}"


def _define_axes(run: "wandb.Run") -> None:
    """Draw each curve over what it counts; W&B's own step counts the rows of its log."""
    run.define_metric("train/step", hidden=True)
    run.define_metric("epoch", hidden=True)
    run.define_metric(ROW, hidden=True)
    run.define_metric("train/*", step_metric="train/step")
    for name in ("train_epoch/*", "test/*", "val/*", "best/*", "seconds", "samples", "predictions"):
        run.define_metric(name, step_metric="epoch")


def _one_line(error: Exception) -> str:
    return redacted(" ".join(f"{type(error).__name__}: {error}".split()))
