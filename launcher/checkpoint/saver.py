"""What a run writes while it trains: a disk that refuses costs a line, not the training."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from launcher.checkpoint import checkpoint, compiled, outcomes
from launcher.checkpoint.checkpoint import Snapshot, Writer
from launcher.checkpoint.compiled import CompiledCode
from launcher.checkpoint.held_folder import HeldFolder
from launcher.checkpoint.run_dir import RunDir
from launcher.checkpoint.weights import save_weights
from launcher.data.images import ImageSet
from launcher.training.metrics import EpochReport, FinalReport
from launcher.training.state import TrainContext


class Saver:
    """Writes into the folder of one run, on rank 0; without a folder, nothing.

    Each method says on the console what could not be written.
    """

    def __init__(self, folder: RunDir | None, is_main: bool, say: Callable[[str], None]) -> None:
        """`say` shows a line to the user."""
        self.folder, self._say = folder, say
        self._held = HeldFolder(folder) if folder and is_main else None
        self._writer = Writer(self._held) if self._held else None

    def checkpoint(
        self, ctx: TrainContext, details: Callable[[], dict[str, Any]], is_last: bool
    ) -> bool:
        """Save the state, with `details` for `state.json`; returns whether it is safe to go on.

        Every rank takes part. Rank 0 writes in the background; for the last one before a stop it
        waits, tries a second time where the disk refuses, and returns False where that fails, too.
        """
        if self.folder is None:
            return True
        buffers = checkpoint.gather_buffers(ctx)
        if self._writer is None:
            return True
        snapshot = checkpoint.capture(ctx, details(), buffers)
        self.complain(self._writer.submit(snapshot))
        return not is_last or self._is_written(self._writer, snapshot)

    def _is_written(self, writer: Writer, snapshot: Snapshot) -> bool:
        complaint = writer.wait()
        if complaint:
            self.complain(complaint)
            complaint = writer.submit(snapshot) or writer.wait()
        return not complaint

    def weights(self, network: nn.Module, which: Literal["best", "final"]) -> str:
        """Write weights; returns what went wrong, or an empty text."""

        def save(folder: RunDir) -> None:
            path = folder.best if which == "best" else folder.final
            save_weights(network, path)

        return self._attempt(f"the {which} weights", save)

    def best(self, network: nn.Module, report: EpochReport, images: ImageSet) -> bool:
        """Write answers and weights of the best epoch; returns whether the weights are kept.

        The answers first: where the process ends between the two, they are of a later epoch than
        the next attempt has, and so neither passes for the best. Where only one can be written,
        there are no answers.
        """
        lost = self.outcomes(report, images, "best")
        failed = self.weights(network, "best")
        if lost or failed:
            name = "best.npz"
            self._attempt(name, lambda folder: (folder.path / name).unlink(missing_ok=True))
        return not failed

    def outcomes(
        self, report: EpochReport, images: ImageSet, which: Literal["best", "last"]
    ) -> str:
        """Write what was said of each of the evaluated images in the best or the last epoch.

        Returns what went wrong, or an empty text.
        """
        name = f"{which}.npz"
        return self._attempt(
            name, lambda of: outcomes.of_epoch(report, images).write(of.path / name)
        )

    def tested(self, report: FinalReport) -> None:
        """Write the figures of the test images at the end."""
        self._attempt("test.json", lambda folder: folder.tested(report.metrics()))

    def compiled(self, code: CompiledCode | None) -> None:
        """Write what torch has compiled, if anything is to be."""
        if code is not None:
            self._attempt(compiled.NAME, lambda folder: code.save(folder.path))

    def end(self, exit_code: int, why: str = "") -> None:
        """Write how this attempt ended, which is the last that is written."""
        self._attempt("end.json", lambda folder: folder.end(exit_code, why))
        self.wait()
        if self._held is not None:
            self._held.close()

    def epoch(self, row: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Append the figures of an epoch."""

        def record(folder: RunDir) -> None:
            if not folder.is_described and self.folder is not None:
                lost = f"{self.folder.path} was removed: what is still to come cannot be resumed"
                self.complain(lost)
            folder.record(row, details)

        self._attempt("metrics.jsonl", record)

    def forget_after(self, epochs: int) -> None:
        """Drop the figures of later epochs, which will be trained again."""
        self._attempt("metrics.jsonl", lambda folder: folder.forget_after(epochs))

    def wait(self) -> None:
        """Until the checkpoint that is being written is on the disk."""
        if self._writer is not None:
            self.complain(self._writer.wait())

    def complain(self, text: str) -> None:
        """Say what went wrong, if anything did."""
        if text:
            self._say(f"!!! {text} !!!")

    def _attempt(self, what: str, action: Callable[[RunDir], object]) -> str:
        if self._held is None:
            return ""
        try:
            with self._held.writing() as folder:
                action(folder)
        except OSError as error:
            complaint = f"{what} could not be written ({error})"
            self.complain(complaint)
            return complaint
        return ""
