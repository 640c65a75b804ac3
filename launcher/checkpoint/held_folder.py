"""The run folder while a run writes into it, which no other run's folder can be taken for.

A path is looked up anew at each use. Where the folder was removed meanwhile and another run has
made one of the same name, a file could land there, at whatever instant one asks before. What Linux
calls `/proc/self/fd/N` is the very folder that was opened, also where it has another name by now.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from launcher.checkpoint.run_dir import RunDir

_OPEN_FILES = Path("/proc/self/fd")  # elsewhere than on Linux files are written by the path


class HeldFolder:
    """Holds the folder of one run open, on rank 0, until `close`."""

    def __init__(self, folder: RunDir) -> None:
        """The folder of a run that is about to train."""
        self.folder = folder
        folder.path.mkdir(parents=True, exist_ok=True)
        self._remaking = threading.Lock()  # checkpoints are written by a thread of their own
        self._descriptor = self._open()

    @contextmanager
    def writing(self) -> Iterator[RunDir]:
        """The folder by a path that means no other; made anew where it was removed.

        Every `OSError`, also one of the block, says the path that users know. It is one where
        another run has the place.
        """
        held = self.folder.path
        try:
            if self._descriptor is not None:
                with self._remaking:
                    if os.fstat(self._descriptor).st_nlink == 0:
                        self._remake()
                    held = _OPEN_FILES / str(self._descriptor)
            folder = replace(self.folder, path=held)
            if not folder.is_own:
                raise OSError(f"{self.folder.path} is another run's now")
            yield folder
        except OSError as error:
            raise OSError(str(error).replace(str(held), str(self.folder.path))) from None

    def close(self) -> None:
        """Nothing is written any more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _remake(self) -> None:
        path = self.folder.path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
        except FileExistsError:
            raise OSError(f"{path} is another run's now") from None
        self.close()
        self._descriptor = self._open()

    def _open(self) -> int | None:
        return os.open(self.folder.path, os.O_RDONLY) if _OPEN_FILES.is_dir() else None
