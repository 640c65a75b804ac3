"""Files that are whole or not there, and that lie where they seem to lie.

A file is written beside its place and renamed into it, which also replaces a link instead of
following it. Every failure is an `OSError`.
"""

import errno
import os
import stat
from pathlib import Path
from typing import TextIO


def replace(path: Path, content: bytes, *, is_kept: bool = True) -> None:
    """Write a file at once, into a folder that is made if need be.

    Unless it `is_kept`, it may be lost with the power, and nobody waits for the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        if is_kept:
            write_new(temporary, content)
        else:
            temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, to the disk and not only to its cache."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append(path: Path, line: str) -> None:
    """Add a line to a file, which may be neither a link nor a FIFO: no reader is waited for."""
    with open_lines(path) as file:
        file.write(line + "\n")


def open_lines(path: Path) -> TextIO:
    """Open a file to add lines, which each are written at once."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileExistsError(errno.EEXIST, "no plain file", str(path))
    return os.fdopen(descriptor, "a", buffering=1, encoding="utf-8")


def flush_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
