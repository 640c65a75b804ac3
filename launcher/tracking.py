"""Weights & Biases: the only importer of wandb, on the main process and only where it is wanted.

Three promises: it never asks a question, it never makes training wait for a network, and a failure
of W&B is one warning line, never an exception in the training.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from launcher.datasets import Data
from launcher.metrics import EpochReport, StepReport, sample_indices

if TYPE_CHECKING:
    import wandb

HTTP_TIMEOUT = 5  # seconds; tables and artifacts wait this long for a silent server, login as well
INIT_TIMEOUT = 30.0  # seconds until a run that cannot begin online begins offline
FINISH_TIMEOUT = 60.0  # seconds to upload the rest; what is left stays on disk
GRAPHQL_RETRIES = 2  # the client's default retries for minutes, and `finish` waits for that
MOST_WAITING = 16  # epochs whose tables may wait for the network
MOST_CLASS_CURVES = 20
MOST_TABLE_CLASSES = 100  # W&B shows at most 10,000 rows: the confusion matrix of 100 classes

_log = logging.getLogger("launcher")


class Tracker(Protocol):
    """Where the measurements of a run are followed."""

    mode: str  # online, offline or off
    where: str  # the run's address, or its folder for `wandb sync`; empty when off
    notice: str  # why this mode; empty if it is the one that was asked for

    def log_step(self, report: StepReport) -> None:
        """Record the training since the last report."""
        ...

    def log_epoch(self, report: EpochReport, best: EpochReport) -> None:
        """Record an epoch and the best one so far."""
        ...

    def finish(self, exit_code: int) -> None:
        """End the record with the exit code of the run."""
        ...


class NullTracker:
    """Tracks nothing: when W&B is off, and on all other ranks."""

    def __init__(self, notice: str = "") -> None:
        """Say why, where it was not asked for."""
        self.mode, self.where, self.notice = "off", "", notice

    def log_step(self, report: StepReport) -> None:
        """Do nothing."""

    def log_epoch(self, report: EpochReport, best: EpochReport) -> None:
        """Do nothing."""

    def finish(self, exit_code: int) -> None:
        """Do nothing."""


class WandbTracker:
    """A run of W&B. Tables are made and sent by one thread of their own, since they may wait."""

    def __init__(self, run: "wandb.Run", data: Data, notice: str) -> None:
        """Record into a run that has begun."""
        self.mode = "offline" if run.offline else "online"
        self.where = str(Path(run.dir).parent) if run.offline else run.url or ""
        self.notice = notice
        self._run, self._warned = run, False
        self._samples = Samples(data)
        self._waiting: SimpleQueue[EpochReport | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._log_tables, name="tables", daemon=True)
        self._thread.start()
        with self._warning_only():
            _define_axes(run)

    def log_step(self, report: StepReport) -> None:
        """Record the training since the last report."""
        with self._warning_only():
            self._run.log(step_scalars(report))

    def log_epoch(self, report: EpochReport, best: EpochReport) -> None:
        """Record an epoch, the best one so far, the sample images, and later the tables."""
        with self._warning_only():
            images = self._samples.captioned(report)
            scalars = epoch_scalars(report, best, self._samples.classes)
            self._run.log({**scalars, "samples": images})
            if self._waiting.qsize() >= MOST_WAITING:
                raise TimeoutError(f"the tables of {MOST_WAITING} epochs wait already")
            self._waiting.put(report)

    def finish(self, exit_code: int) -> None:
        """Send what is left, for a limited time, and end the run with an exit code."""
        deadline = time.monotonic() + FINISH_TIMEOUT / 2
        self._waiting.put(None)
        self._thread.join(deadline - time.monotonic())
        with self._warning_only():
            self._run.finish(exit_code=exit_code)

    def _log_tables(self) -> None:
        while (report := self._waiting.get()) is not None:
            with self._warning_only():
                self._run.log({"epoch": report.epoch, **self._samples.tables(report)})

    @contextmanager
    def _warning_only(self) -> Iterator[None]:
        """Turn the first exception into a warning and hide those that follow it."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                self._warned = True
                _log.warning("W&B misses something (training goes on): %s", _one_line(error))


class Samples:
    """The test images that every epoch shows."""

    def __init__(self, data: Data) -> None:
        """Take the fixed images out of the test set."""
        chosen = sample_indices(len(data.test))
        self.classes = data.test.classes
        self._truths = [self.classes[label] for label in data.test.labels[chosen].tolist()]
        # PIL reads one channel as (height, width).
        pixels = (image.squeeze(-1).numpy() for image in data.test.images[chosen])
        self._pictures = [Image.fromarray(array) for array in pixels]

    def captioned(self, report: EpochReport) -> "list[wandb.Image]":
        """The images under what the model takes them for: "cat 91% (is dog)"."""
        import wandb

        captions = [
            f"{guess} {confidence:.0%}" + ("" if guess == truth else f" (is {truth})")
            for truth, guess, confidence in self._guesses(report)
        ]
        pairs = zip(self._pictures, captions, strict=True)
        return [wandb.Image(picture, caption=caption) for picture, caption in pairs]

    def tables(self, report: EpochReport) -> dict[str, Any]:
        """The predictions as a table, and the confusion matrix where it is not too large."""
        if len(self.classes) > MOST_TABLE_CLASSES:
            return {"predictions": self._predictions(report, ())}
        return {
            "predictions": self._predictions(report, self.classes),
            "confusion_matrix": _confusion_matrix(report, self.classes),
        }

    def _guesses(self, report: EpochReport) -> Iterator[tuple[str, str, float]]:
        """Truth, prediction and confidence of each image."""
        confidences, guesses = (part.tolist() for part in report.probabilities.max(dim=1))
        for truth, guess, confidence in zip(self._truths, guesses, confidences, strict=True):
            yield truth, self.classes[guess], confidence

    def _predictions(self, report: EpochReport, scored: Sequence[str]) -> "wandb.Table":
        import wandb

        columns = ["image", "truth", "prediction", "confidence"]
        scores = report.probabilities[:, : len(scored)].tolist()
        rows = zip(self._pictures, self._guesses(report), scores, strict=True)
        return wandb.Table(
            columns=[*columns, *(f"score {name}" for name in scored)],
            data=[[wandb.Image(picture), *guess, *row] for picture, guess, row in rows],
        )


def start(
    mode: str | None,
    *,
    folder: Path,
    project: str,
    name: str,
    config: dict[str, Any],
    tags: Sequence[str],
    data: Data,
    note: str,
) -> Tracker:
    """Begin to track a run: `mode` is online, offline, off, or None for whatever is possible.

    Call it on the main process only. Never raises and never asks: where W&B cannot do what was
    wanted, the tracker does less and its `notice` says why.
    """
    if (mode or os.environ.get("WANDB_MODE")) in ("off", "disabled"):
        return NullTracker()
    _prepare_environment(folder)
    try:
        import wandb

        mode, notice = _choose(mode)
        if mode == "off":
            return NullTracker()
        begin = partial(
            wandb.init,
            dir=folder,
            project=project,
            name=name,
            config={**config, "data_fallback": data.fallback},
            tags=list(tags),
            notes=note or None,
            settings=_settings(),
        )
        try:
            run = begin(mode=mode)
        except Exception as error:
            if mode != "online":
                raise
            notice = f"W&B refused to begin online, so the run is kept offline: {_one_line(error)}"
            wandb.teardown()  # or the same id is refused
            run = begin(mode="offline")
        return WandbTracker(run, data, notice)
    except Exception as error:  # whatever is wrong with W&B, training can do without it
        return NullTracker(f"W&B is off: {_one_line(error)}")


def step_scalars(report: StepReport) -> dict[str, float]:
    """What a report of training is called in W&B."""
    return {
        "epoch": report.epoch,
        "train/step": report.step,
        "train/loss": report.loss,
        "train/learning_rate": report.learning_rate,
        "train/images_per_second": report.images_per_second,
    }


def epoch_scalars(
    report: EpochReport, best: EpochReport, classes: Sequence[str]
) -> dict[str, float]:
    """What a report of an epoch is called in W&B: `train_epoch/` is the mean of an epoch."""
    scalars: dict[str, float] = {
        name.replace("train/", "train_epoch/"): value
        for name, value in report.metrics().items()
        if not isinstance(value, list)
    }
    scalars["train/step"] = int(scalars.pop("step"))
    if len(classes) <= MOST_CLASS_CURVES:
        for name, accuracy in zip(classes, report.test.per_class, strict=True):
            if accuracy is not None:
                scalars[f"test/class_accuracy/{name}"] = accuracy
    return {**scalars, "best/test_accuracy": best.test.accuracy, "best/epoch": best.epoch}


def _confusion_matrix(report: EpochReport, classes: Sequence[str]) -> Any:
    """A chart from counts; `wandb.plot.confusion_matrix` wants every image of the test set."""
    import wandb

    columns = ["Actual", "Predicted", "nPredictions"]
    counts = [
        [truth, guess, count]
        for truth, row in zip(classes, report.test.confusion, strict=True)
        for guess, count in zip(classes, row, strict=True)
    ]
    return wandb.plot_table(
        "wandb/confusion_matrix/v1",
        wandb.Table(columns=columns, data=counts),
        {name: name for name in columns},
        {"title": "Test images: truth and prediction"},
    )


def _prepare_environment(folder: Path) -> None:
    """Set what the client reads while it is imported, and where it keeps what it will upload."""
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(HTTP_TIMEOUT))
    # Outside the run folder, a later `wandb sync` on another machine would miss the tables.
    os.environ["WANDB_DATA_DIR"] = str(folder.absolute() / "wandb" / "data")


def _settings() -> "wandb.Settings":
    import wandb

    return wandb.Settings(
        console="off",  # or progress bars fill the Logs tab with their control codes
        capture_loggers={"launcher": "INFO"},
        silent=True,  # the launcher says itself where the run is
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH_TIMEOUT / 2,
        x_graphql_retry_max=GRAPHQL_RETRIES,
        x_transaction_log_flush_interval=1,  # or a killed process loses its last 15 seconds
    )


def _choose(asked: str | None) -> tuple[str, str]:
    """The mode that is possible here, and why it is not the one that was wanted."""
    import wandb

    overrides = wandb.Settings(mode=asked) if asked else None  # type: ignore[arg-type]
    wanted = wandb.setup(overrides).settings.mode
    if wanted == "disabled":
        return "off", ""
    if wanted in ("offline", "dryrun"):
        return "offline", ""
    try:
        if wandb.login(prompt=False, verify=True):
            return "online", ""
        reason = "nobody is logged in; `wandb login` once puts the next runs online"
    except Exception as error:
        reason = _one_line(error)
    return "offline", f"W&B keeps the run offline: {reason}"


def _define_axes(run: "wandb.Run") -> None:
    """Draw each curve over what it counts; W&B's own step counts rows of its log."""
    run.define_metric("train/step", hidden=True)
    run.define_metric("epoch", hidden=True)
    run.define_metric("train/*", step_metric="train/step")
    for name in ("train_epoch/*", "test/*", "best/*", "seconds", "samples", "predictions"):
        run.define_metric(name, step_metric="epoch")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
