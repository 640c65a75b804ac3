"""A pack on a file server, copied once to the node's own disk before the training.

It lies below TMPDIR (else /tmp), in a folder that only its user can write to, named by the digest
of its manifest. Later runs on the node use it as long as it is complete; on a cluster TMPDIR is
usually deleted with the job.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from launcher.config.recipe import Images
from launcher.config.serialize import short_name
from launcher.data.file_lock import held
from launcher.data.packed import MANIFEST, Manifest, Packed, file_of, read_manifest
from launcher.distributed import signals
from launcher.errors import UserError
from launcher.utils.terminal import progress
from launcher.utils.text import sizes
from launcher.utils.user_code import function_of

_AT_ONCE = 2**24  # bytes


def on_this_node(data: Images) -> Images:
    """Copy the pack to this node, if asked to and not done yet, and make the copy its `root`.

    One process of a node copies, and the others wait. Raises `UserError` where there is no room,
    where the images are no pack, and where the digest of a file is wrong.
    """
    if not data.local_copy:
        return data
    if function_of(data.source) is not Packed:
        raise UserError(
            f"data.local_copy=true of {short_name(data.source)}",
            expected="a pack, which is a few large files",
            instead="type launcher pack SOURCE OUT, or data.local_copy=false",
        )
    root = Path(os.path.expanduser(data.root))
    if not root.is_dir():
        return data  # who opens it says so, or takes the fallback
    manifest = read_manifest(root)
    try:
        return replace(data, root=str(_copied(root, manifest)))
    except OSError as error:
        raise UserError(
            f"data.local_copy=true, which fails in {folder()} ({error})",
            expected="a folder that can be written",
            instead="set TMPDIR to a local disk, or type data.local_copy=false",
        ) from None


def folder() -> Path:
    """Where this user's copies are on this node."""
    return Path(tempfile.gettempdir(), f"launcher-{os.getuid()}")


def _copied(root: Path, manifest: Manifest) -> Path:
    place = _own_folder() / f"pack-{blake2b(manifest.text().encode(), digest_size=16).hexdigest()}"
    with held(place.with_suffix(".lock")):
        files = _files(root, manifest)
        wanted = {file.name: file.stat().st_size for file in files}
        if not _is_whole(place, {**wanted, MANIFEST: len(manifest.text().encode())}):
            # A process that trains from it has mapped its files, and can still read them.
            shutil.rmtree(place, ignore_errors=True)
            partial_copy = place.with_suffix(".partial")
            shutil.rmtree(partial_copy, ignore_errors=True)  # of one that was killed
            total = sum(wanted.values())
            _refuse_no_room(total)
            try:
                partial_copy.mkdir()
                _copy(files, partial_copy, total)
                (partial_copy / MANIFEST).write_text(manifest.text())
                partial_copy.rename(place)
            finally:
                shutil.rmtree(partial_copy, ignore_errors=True)
    return place


def _is_whole(place: Path, wanted: dict[str, int]) -> bool:
    """Whether all files are there, of these sizes: a cleaner of /tmp removes old files singly."""
    return wanted.items() <= {file.name: file.stat().st_size for file in place.glob("*")}.items()


def _own_folder() -> Path:
    """Raises `OSError` where another user could put something in its place."""
    own = folder()
    own.mkdir(mode=0o700, exist_ok=True)
    about = own.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise PermissionError("it is not a folder that only you can write to")
    return own


def _files(root: Path, manifest: Manifest) -> dict[Path, str]:
    """All files of a pack but the manifest, with their digests."""
    return {
        file_of(root, name, kind): digest
        for name, split in manifest.splits.items()
        for kind, digest in {
            "labels": split.labels,
            "images" if manifest.shape else "pictures": split.images,
            "offsets": split.offsets,
            "names": split.names,
        }.items()
        if digest
    }


def _copy(files: dict[Path, str], target: Path, total: int) -> None:
    with progress(f"copying the pack to {target.parent}", total, "byte") as advance:
        for file, digest in files.items():
            if _copy_one(file, target / file.name, advance) != digest:
                raise UserError(
                    f"{file}, whose digest is not that of its {MANIFEST}",
                    expected="the file as it was packed",
                    instead="type the same launcher pack command again, which compares all bytes",
                )


def _copy_one(file: Path, target: Path, advance: Callable[[int], None]) -> str:
    """The digest of what was copied."""
    whole = blake2b(digest_size=16)
    with file.open("rb") as source, target.open("xb") as copy:
        while piece := source.read(_AT_ONCE):
            copy.write(piece)
            whole.update(piece)
            advance(len(piece))
            signals.end_if_stopped(f"the copy of {file}")
        copy.flush()
        os.fsync(copy.fileno())
    return whole.hexdigest()


def _refuse_no_room(needed: int) -> None:
    free = shutil.disk_usage(folder()).free
    if needed > free:
        raise UserError(
            f"data.local_copy=true needs {sizes(needed)} in {folder()}, where {sizes(free)} are "
            "free",
            expected="room for the whole pack",
            instead="set TMPDIR to a larger disk of this node, or type data.local_copy=false",
        )
