"""`launcher pack`: writes the images of a source once into files that a training maps (`packed`).

Chunk after chunk is read in all cores, and decoded into SPLIT.images; encoded ones are decoded to
check them, and appended to SPLIT.pictures as they are. After each, pack.partial.json says how far
it is: so a pack that ends early, however it ends, goes on from there when the same command is typed
again. Typed again for one that is whole, it compares the files with their digests.
"""

import json
import math
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from launcher.data.images import ImageSet
from launcher.data.packed import MANIFEST, VERSION, Manifest, PackedSplit, file_of, read_manifest
from launcher.data.storage import Encoded, Reading, Stored, as_stored, read, reading_threads
from launcher.errors import BrokenPictureError, UserError
from launcher.utils import atomic_write, json_text
from launcher.utils.terminal import progress
from launcher.utils.text import count, sizes, some

PARTIAL, LOCK = "pack.partial.json", ".pack.lock"
CHUNK_IMAGES, CHUNK_BYTES = 1024, 2**26  # at most so much is lost when packing is killed
_HASHED_AT_ONCE = 2**24  # bytes
Advance = Callable[[int], None]
# A chunk: its places, the bytes to append to each file, and the places of broken pictures, which
# are known once all is appended.
_Chunk = tuple[range, Iterable[tuple[str, bytes | memoryview]], list[int]]


@dataclass(frozen=True)
class _Done:
    """The progress of one split; `skipped` are the places of broken pictures among those read.

    `written` are the bytes and the digest of each of its files.
    """

    read: int = 0
    written: dict[str, tuple[int, str]] = field(default_factory=dict)
    listed: str = ""
    skipped: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Images that are written."""
        return self.read - len(self.skipped)


@dataclass(frozen=True)
class Job:
    """What is packed into which folder."""

    source: str  # a description for people
    splits: dict[str, ImageSet]
    out: Path
    encoded: bool

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Height, width and channels of the decoded images; None where they stay encoded."""
        return None if self.encoded else self.splits["train"].shape

    @property
    def image_bytes(self) -> int:
        """The bytes of one decoded image."""
        return math.prod(self.splits["train"].shape)

    @property
    def grow(self) -> tuple[str, ...]:
        """The files of a split to which each chunk is appended."""
        return ("pictures", "offsets") if self.encoded else ("images",)

    @property
    def chunk(self) -> int:
        """Images that are read and written at once."""
        if self.encoded:  # which are written one by one
            return CHUNK_IMAGES
        return max(1, min(CHUNK_IMAGES, CHUNK_BYTES // self.image_bytes))

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for an interrupted pack to continue."""
        classes = list(self.splits["train"].classes)
        shape = list(self.shape) if self.shape else None
        about = {"source": self.source, "shape": shape, "classes": classes}
        return {"version": VERSION, **about, "chunk": self.chunk}


def unwritable(out: Path, error: OSError) -> UserError:
    """For a folder in which the pack cannot be written."""
    return UserError(
        f"OUT={out} ({error.strerror})",
        expected="a folder that can be written, with room for the images",
        instead="make room and type the same command, which goes on, or name another folder",
    )


def pack(job: Job, *, skips: bool) -> None:
    """Begin or continue. Raises `UserError` for a picture that cannot be read, unless `skips`."""
    done = _begun(job)
    _refuse_no_room(job, done)
    try:
        with _locked(job.out):
            done = _begun(job)
            with progress("packing", sum(map(len, job.splits.values())), "image") as advance:
                splits = {name: _packed(job, name, done, skips, advance) for name in job.splits}
            classes = job.splits["train"].classes
            manifest = Manifest(job.source, job.shape, classes, splits)
            atomic_write.replace(job.out / MANIFEST, manifest.text().encode())
            for name in (PARTIAL, LOCK):
                (job.out / name).unlink(missing_ok=True)
            atomic_write.flush_folder(job.out)
    except OSError as error:
        raise unwritable(job.out, error) from None
    _tell(f"packed {_summary(manifest)} into {job.out}")
    _tell_skipped(manifest)


def _begun(job: Job) -> dict[str, _Done]:
    """The progress of each split. Raises `UserError` for a pack of another source."""
    path = job.out / PARTIAL
    if not path.exists():
        return {name: _Done() for name in job.splits}
    try:
        content = json_text.read(path)
        done = {name: _as_done(about) for name, about in content.pop("splits").items()}
        same = content == job.identity and done.keys() == job.splits.keys()
        same = same and all(d.read <= len(job.splits[name]) for name, d in done.items())
        found = f"{content['source']}, {_form(content['shape'])}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}, which is damaged",
            expected="what launcher pack has written",
            instead=f"delete the folder {job.out} and pack again",
        ) from None
    if not same or any(_listed(job, n, d.read) != d.listed for n, d in done.items() if d.read):
        raise UserError(
            f"OUT={job.out}, where a pack of {found} was begun",
            expected="the same source and size, and no change in what is already packed",
            instead="name another folder, or delete that one",
        )
    return done


def _as_done(about: dict[str, Any]) -> _Done:
    """From JSON; invalid content raises ValueError, KeyError, TypeError or AttributeError."""
    written = {kind: (int(size), str(digest)) for kind, (size, digest) in about["written"].items()}
    return _Done(**{**about, "written": written, "skipped": tuple(about["skipped"])})


def _listed(job: Job, name: str, places: int) -> str:
    """The digest of the first images of a split as the source lists them."""
    whole, split = blake2b(digest_size=16), job.splits[name]
    for part in _parts(0, places, job.chunk):
        _list(whole, split, part)
    return whole.hexdigest()


def _list(whole: Any, split: ImageSet, part: range) -> None:
    """Add a chunk to the digest: labels, names of files, and the content of the first image."""
    whole.update(split.labels[part.start : part.stop].numpy().tobytes())
    whole.update("\0".join(split.files[part.start : part.stop]).encode(errors="surrogateescape"))
    whole.update(as_stored(split.images).contents([part.start]))


def _parts(start: int, stop: int, chunk: int) -> list[range]:
    return [range(first, last) for first, last in pairwise([*range(start, stop, chunk), stop])]


def _refuse_no_room(job: Job, done: dict[str, _Done]) -> None:
    needed = sum(_bytes_left(job, split, done[name].read) for name, split in job.splits.items())
    place = next(
        path for path in (job.out.absolute(), *job.out.absolute().parents) if path.is_dir()
    )
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{sizes(needed)} to be written to {job.out}, where {sizes(free)} are free",
            expected="room for all images",
            instead="make room, or name a folder on another disk"
            if job.encoded
            else "make room, name a folder on another disk, or type a smaller --size",
        )


def _bytes_left(job: Job, split: ImageSet, read: int) -> int:
    """How many bytes of a split are still to be written."""
    if not isinstance(split.images, Encoded) or not job.encoded:
        return (len(split) - read) * job.image_bytes + 8 * len(split)
    total = 16 * len(split) + 8 + len(_names(split.files))
    for name in split.files[read:]:
        with suppress(OSError):  # it is broken
            total += Path(split.images.root, name).stat().st_size
    return total


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Make the folder, and be the only one who packs into it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / LOCK).touch()  # where that fails FileLock would wait for ever
    try:
        with FileLock(out / LOCK, blocking=False):
            for litter in out.glob(f".{PARTIAL}.*"):  # of one that was killed
                litter.unlink()
            yield
    except Timeout:
        raise UserError(
            f"OUT={out}, into which another process packs",
            expected="one at a time",
            instead="wait for it, or name another folder",
        ) from None


def _packed(
    job: Job, name: str, done: dict[str, _Done], skips: bool, advance: Advance
) -> PackedSplit:
    """Write what is left of a split, and note each chunk in `done` and on disk."""
    split = job.splits[name]

    def note(state: _Done) -> None:
        done[name] = state
        splits = {other: asdict(about) for other, about in done.items()}
        content = json.dumps({**job.identity, "splits": splits})
        atomic_write.replace(job.out / PARTIAL, content.encode())

    if not (job.out / PARTIAL).exists():
        note(_Done())
    state = done[name]
    with ExitStack() as opened:
        files = {
            kind: opened.enter_context(closing(_Growing(file_of(job.out, name, kind))))
            for kind in job.grow
        }
        before = {kind: state.written.get(kind, (0, "")) for kind in files}
        for kind, file in files.items():
            file.keep(before[kind][0])
        changed = [file for kind, file in files.items() if file.written != before[kind]]
        if state.read and changed:
            _tell(f"{changed[0].path} has changed since it was packed: it is packed again")
            state = _Done()
            for file in files.values():
                file.keep(0)
        listed = blake2b(digest_size=16)
        for part in _parts(0, state.read, job.chunk):
            _list(listed, split, part)
        advance(state.read)
        parts = _parts(state.read, len(split), job.chunk)
        for part, contents, broken in _chunks(job, split, parts, skips, files):
            for kind, content in contents:
                files[kind].append(content)
            _list(listed, split, part)
            for file in files.values():
                file.flush()
            written = {kind: file.written for kind, file in files.items()}
            skipped = (*state.skipped, *broken)
            state = _Done(part.stop, written, listed.hexdigest(), skipped)
            note(state)
            advance(len(part))
    return _finished(job, name, state)


def _finished(job: Job, name: str, state: _Done) -> PackedSplit:
    """Write the labels, and the names, of a split of which all images are written."""
    split = job.splits[name]
    if not state.count:
        raise UserError(
            f"no picture for {name} that can be read in {job.source}",
            expected="at least one",
            instead="repair them, or name another source",
        )
    kept = torch.ones(len(split), dtype=torch.bool)
    kept[list(state.skipped)] = False
    labels = split.labels[kept].numpy().astype("<i8").tobytes()
    atomic_write.replace(file_of(job.out, name, "labels"), labels)
    skipped = tuple(_name(split, place) for place in state.skipped)
    size, digest = state.written[job.grow[0]]
    packed = PackedSplit(state.count, digest, _digest(labels), state.listed, skipped)
    if not job.encoded:
        return packed
    names = _names([split.files[place] for place in kept.nonzero()[:, 0].tolist()])
    atomic_write.replace(file_of(job.out, name, "names"), names)
    offsets = state.written["offsets"][1]
    return replace(packed, bytes=size, offsets=offsets, names=_digest(names))


def _names(files: Iterable[str]) -> bytes:
    return b"".join(os.fsencode(name) + b"\0" for name in files)


def _name(split: ImageSet, place: int) -> str:
    return split.files[place] if split.files else f"image {place}"


class _Growing:
    """A file that grows, with its digest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("r+b" if path.exists() else "x+b")
        self._size, self._whole = 0, blake2b(digest_size=16)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def written(self) -> tuple[int, str]:
        """Its bytes, and their digest."""
        return self._size, self._whole.hexdigest()

    def keep(self, size: int) -> None:
        """Cut the file to its first `size` bytes, and compute their digest again."""
        self._file.seek(0)
        self._size, self._whole = 0, blake2b(digest_size=16)
        for piece in _read_pieces(self._file, size):
            self._size += len(piece)
            self._whole.update(piece)
        self._file.truncate(self._size)
        self._file.seek(self._size)

    def append(self, content: bytes | memoryview) -> None:
        """Add bytes."""
        self._file.write(content)
        self._whole.update(content)
        self._size += len(content)

    def flush(self) -> None:
        """Bring what was added to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())


def _chunks(
    job: Job, split: ImageSet, parts: Sequence[range], skips: bool, files: dict[str, _Growing]
) -> Iterator[_Chunk]:
    if isinstance(split.images, Encoded) and job.encoded:
        return _encoded_chunks(split.images, parts, skips, files["pictures"].written[0])
    return _decoded_chunks(split, parts, skips)


def _encoded_chunks(
    encoded: Encoded, parts: Sequence[range], skips: bool, start: int
) -> Iterator[_Chunk]:
    """Each part with those of its pictures that can be read; the first begins at byte `start`."""
    for part in parts:
        offsets, broken = [start], list[int]()
        yield part, _as_they_are(encoded, part, skips, offsets, broken), broken
        start = offsets[-1]


def _as_they_are(
    encoded: Encoded, part: range, skips: bool, offsets: list[int], broken: list[int]
) -> Iterator[tuple[str, bytes]]:
    """Yield the bytes to append; also adds to `offsets` and `broken`."""
    for place, picture in _checked(encoded, part):
        try:
            content = picture.result()
        except BrokenPictureError as error:
            if not skips:
                raise _stopped(error) from None
            broken.append(place)
        else:
            offsets.append(offsets[-1] + len(content))
            yield "pictures", content
    # Each picture ends where the next begins; so only the first chunk writes the leading 0.
    yield "offsets", numpy.array(offsets[part.start > 0 :], "<i8").tobytes()


def _checked(encoded: Encoded, part: range) -> Iterator[tuple[int, Future[bytes]]]:
    """Each place, in order, with its picture; a few are read ahead."""
    ahead = deque[tuple[int, Future[bytes]]]()
    try:
        for place in part:
            ahead.append((place, reading_threads().submit(encoded.checked, place)))
            if len(ahead) > 2 * torch.get_num_threads():
                yield ahead.popleft()
        while ahead:
            yield ahead.popleft()
    finally:
        for _, left in ahead:
            left.cancel()


def _stopped(error: BrokenPictureError) -> UserError:
    instead = f"{error.instead}, or type --on-broken skip; what is packed stays"
    return UserError(error.given, expected=error.expected, instead=instead)


def _decoded_chunks(split: ImageSet, parts: Sequence[range], skips: bool) -> Iterator[_Chunk]:
    """Each part, its images that can be read, and the places of the others."""
    stored, reading = as_stored(split.images), list[Reading]()
    try:
        for number, part in enumerate(parts):
            for other in parts[number + len(reading) : number + 2]:  # this one and the next
                reading.append(Reading(stored, torch.arange(other.start, other.stop)))
            try:
                pixels, broken = reading.pop(0).images(), list[int]()
            except BrokenPictureError as error:
                if not skips:
                    raise _stopped(error) from None
                pixels, broken = _readable(stored, part)
            yield part, [("images", pixels.numpy().reshape(-1).data)], broken
    finally:
        for left in reading:
            left.cancel()


def _readable(stored: Stored, part: range) -> tuple[Tensor, list[int]]:
    """The images of a part that can be read, and the places of the others."""
    images, broken = [torch.empty((0, *stored.shape[1:]), dtype=torch.uint8)], list[int]()
    for place in part:
        try:
            images.append(read(stored, torch.tensor([place])))
        except BrokenPictureError:
            broken.append(place)
    return torch.cat(images), broken


def verify(job: Job) -> None:
    """Compare a complete pack with its digests, and its source with the recorded one."""
    manifest = read_manifest(job.out)
    classes = job.splits["train"].classes
    same = (job.source, job.shape, classes) == (manifest.source, manifest.shape, manifest.classes)
    if not same or list(job.splits) != list(manifest.splits):
        raise UserError(
            f"OUT={job.out}, a whole pack of {manifest.source}, {_form(manifest.shape)}",
            expected="the same source and size, or another folder",
            instead="name another folder, or delete that one",
        )
    for name, split in manifest.splits.items():
        if _listed(job, name, len(job.splits[name])) != split.listed:
            raise UserError(
                f"{name} images of {job.source}, which have changed since they were packed",
                expected=f"those of {job.out}",
                instead="delete that folder and pack again, or name another folder",
            )
    with progress("verifying", _total(manifest), "byte") as advance:
        for name, split in manifest.splits.items():
            size = split.bytes if job.encoded else split.count * job.image_bytes
            _compare(file_of(job.out, name, job.grow[0]), size, split.images, advance)
            own = {"labels": (8 * split.count, split.labels)}
            if job.encoded:
                files, left_out = job.splits[name].files, set(split.skipped)
                names = _names(file for file in files if file not in left_out)
                own["offsets"] = 8 * (split.count + 1), split.offsets
                own["names"] = len(names), split.names
            for kind, (size, digest) in own.items():
                _compare(file_of(job.out, name, kind), size, digest, lambda _: None)
    with suppress(OSError):  # left by a process killed at its end, or on a read-only disk
        (job.out / PARTIAL).unlink()
    _tell(f"{job.out} is whole: {_summary(manifest)}, as their digests say")
    _tell_skipped(manifest)


def _compare(path: Path, size: int, digest: str, advance: Advance) -> None:
    whole, found = blake2b(digest_size=16), "is damaged: its digest is not that of the manifest"
    try:
        if not path.is_file() or path.stat().st_size != size:
            found = f"is no file of {size:,} bytes"
        else:
            with path.open("rb") as file:
                for piece in _read_pieces(file, size):
                    whole.update(piece)
                    advance(len(piece))
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
    if whole.hexdigest() != digest:
        raise UserError(
            f"{path}, which {found}",
            expected=f"the file whose digest is in {MANIFEST}",
            instead=f"delete the folder {path.parent} and pack again",
        )


def _read_pieces(file: Any, size: int) -> Iterator[bytes]:
    """The first bytes of a file, or all if there are fewer."""
    while size > 0 and (piece := file.read(min(size, _HASHED_AT_ONCE))):
        size -= len(piece)
        yield piece


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _summary(manifest: Manifest) -> str:
    counts = [f"{split.count:,} for {name}" for name, split in manifest.splits.items()]
    what = f"images of {_form(manifest.shape)}" if manifest.shape else _form(None)
    return f"{what}, {' and '.join(counts)} ({sizes(_total(manifest))})"


def _total(manifest: Manifest) -> int:
    """The bytes of all images."""
    if manifest.shape is None:
        return sum(split.bytes for split in manifest.splits.values())
    return sum(split.count for split in manifest.splits.values()) * math.prod(manifest.shape)


def _form(shape: Sequence[int] | None) -> str:
    return "encoded pictures" if shape is None else " x ".join(map(str, shape))


def _tell_skipped(manifest: Manifest) -> None:
    skipped = [name for split in manifest.splits.values() for name in split.skipped]
    if skipped:
        _tell(f"left out: {count(len(skipped), 'broken picture')}: {some(skipped, 5)}")


def _tell(line: str) -> None:
    sys.stdout.write("".join(c if c.isprintable() else "?" for c in line) + "\n")
