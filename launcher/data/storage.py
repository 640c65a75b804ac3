"""Images that are read only when a step needs them: from mapped memory, or from files.

Whoever trains on them asks for the images at some places and gets uint8 `(k, h, w, c)`, as from a
tensor that holds all of them. Which images are asked for, and in which order, is decided elsewhere
(`batches`), so nothing here has state that a checkpoint would need.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from launcher.data.decoding import cut_out, fitted, margin_of, not_a_picture, open_picture
from launcher.errors import BrokenPictureError

AT_ONCE = 256  # pictures


@dataclass(frozen=True)
class Stored(ABC):
    """Images that are not held as a tensor; `places` `(n,)` are their indices in the storage."""

    places: Tensor

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of a tensor of all of them: images, height, width and channels."""

    @abstractmethod
    def read(self, places: Tensor, out: Tensor, shares: Tensor | None = None) -> None:
        """Write the images at the places `(k,)` into `out` `(k, h, w, c)`; called in threads.

        `shares` `(k, 4)`, those of a `Cut`, take a part of each picture as it is stored, stretched
        to the size of `out`.
        """

    @abstractmethod
    def contents(self, places: Sequence[int]) -> bytes:
        """The stored bytes of the images at the places, for a digest."""

    def __len__(self) -> int:
        """The number of images."""
        return len(self.places)

    def at(self, places: Tensor) -> Self:
        """The images at the places `(k,)`, in that order; nothing is read."""
        return replace(self, places=self.places[places])


@dataclass(frozen=True)
class Mapped(Stored):
    """Images of one size in the memory of the host: a tensor there, or a file that is mapped.

    `array` is uint8 `(m, h, w, c)`; `path` is its file, if that outlives the process.
    """

    array: Tensor
    path: str | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Images, height, width and channels."""
        _, height, width, channels = self.array.shape
        return len(self), height, width, channels

    def read(self, places: Tensor, out: Tensor, shares: Tensor | None = None) -> None:
        """Copy them."""
        torch.index_select(self.array, 0, self.places[places], out=out)

    def contents(self, places: Sequence[int]) -> bytes:
        """Their pixels."""
        return self.array[self.places[list(places)]].numpy().tobytes()


@dataclass(frozen=True)
class Encoded(Stored):
    """Pictures in files, of any sizes, which are decoded to RGB of `size` pixels square.

    The shorter side is scaled to `scaled_to` pixels before the middle is cropped.
    """

    root: str
    files: tuple[str, ...]  # of all that are stored, below `root`
    size: int
    scaled_to: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Images, height, width and channels."""
        return len(self), self.size, self.size, 3

    def read(self, places: Tensor, out: Tensor, shares: Tensor | None = None) -> None:
        """Decode them; raises `BrokenPictureError` for a damaged one."""
        margin = margin_of(self.size, self.scaled_to)
        for number, place in enumerate(self.places[places].tolist()):
            with self._open(place) as picture:
                if shares is None:
                    out.numpy()[number] = fitted(picture, (self.size, self.size), margin=margin)
                else:
                    out[number] = cut_out(picture, shares[number], out.shape[1])

    def contents(self, places: Sequence[int]) -> bytes:
        """The bytes of their files, without those that cannot be read: decoding reports them."""
        found = []
        for place in self.places[list(places)].tolist():
            with suppress(OSError):
                found.append(self._content(place))
        return b"".join(found)

    def checked(self, place: int) -> bytes:
        """The bytes of a picture; raises `BrokenPictureError` where they cannot be decoded."""
        stored = int(self.places[place])
        file = Path(self.root, self.files[stored])
        try:
            content = self._content(stored)
        except OSError as error:
            raise not_a_picture(file, str(error)) from None
        with open_picture(file, content) as picture:
            fitted(picture, (self.size, self.size))
        return content

    def _open(self, place: int) -> AbstractContextManager[Image.Image]:
        return open_picture(Path(self.root, self.files[place]))

    def _content(self, place: int) -> bytes:
        return Path(self.root, self.files[place]).read_bytes()


@dataclass(frozen=True)
class Joined(Encoded):
    """Pictures one after the other in one mapped file, `root`.

    `array` is uint8 `(bytes,)`; picture i is between `offsets[i]` and `offsets[i + 1]`, int64.
    """

    array: Tensor
    offsets: Tensor

    @contextmanager
    def _open(self, place: int) -> Iterator[Image.Image]:
        try:
            with open_picture(Path(self.root, self.files[place]), self._content(place)) as picture:
                yield picture
        except BrokenPictureError as error:
            raise BrokenPictureError(
                error.given,
                expected="each picture as it was packed",
                instead="type the same launcher pack command again, which compares all bytes",
            ) from None

    def _content(self, place: int) -> bytes:
        start, stop = self.offsets[place : place + 2].tolist()
        # torch copies: other threads run while it waits for the disk; numpy would block them.
        return self.array[start:stop].clone().numpy().tobytes()


def as_stored(images: Tensor | Stored) -> Stored:
    """Keep images in the host's memory; stored ones are returned unchanged."""
    return Mapped(torch.arange(len(images)), images) if isinstance(images, Tensor) else images


class Reading:
    """Images that threads are reading."""

    def __init__(
        self,
        stored: Stored,
        places: Tensor,
        *,
        pinned: bool = False,
        while_training: bool = False,
        shares: Tensor | None = None,
        size: int | None = None,
    ) -> None:
        """Begin to read; with `pinned` memory a GPU copies while it computes.

        `size` is that of parts of pictures, in pixels a side, if not that of whole ones.
        """
        _, height, width, channels = stored.shape
        shape = (len(places), size or height, size or width, channels)
        self._images = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        threads = reading_threads()
        if while_training and isinstance(stored, Encoded):
            give_cores_to_reading()
        parts = min(len(places), torch.get_num_threads())
        bounds = [len(places) * part // parts for part in range(parts + 1)] if parts else []
        self._futures: list[Future[None]] = []
        for start, stop in pairwise(bounds):
            own = None if shares is None else shares[start:stop]
            out = self._images[start:stop]
            self._futures += [threads.submit(stored.read, places[start:stop], out, own)]

    def images(self) -> Tensor:
        """Wait for all: uint8 `(k, h, w, c)` on the host; raises what reading raised."""
        for future in self._futures:
            future.result()
        return self._images

    def cancel(self) -> None:
        """Begin no further reads."""
        for future in self._futures:
            future.cancel()


@cache
def reading_threads() -> ThreadPoolExecutor:
    """As many as this process computes with.

    Each uses one thread of torch: otherwise torch would take the training's threads as well.
    """
    count = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "reading")
    _in_each(pool, count, _compute_alone)
    torch.set_num_threads(count)  # for all other threads
    return pool


@cache
def give_cores_to_reading() -> None:
    """Let the threads of the training sleep between two operations, while others decode pictures.

    libgomp, with which torch computes, has them wait busily for milliseconds, unless it knows of
    more threads than cores: so it is shown one more for each thread that reads. Where images are
    only copied, which takes next to no time, that would slow the training.
    """
    count = torch.get_num_threads()
    _in_each(reading_threads(), count, _compute_with_another)
    torch.set_num_threads(count)


def _in_each(pool: ThreadPoolExecutor, count: int, function: Callable[[], None]) -> None:
    all_there = Barrier(count)

    def call() -> None:
        all_there.wait()
        function()

    for future in [pool.submit(call) for _ in range(count)]:
        future.result()


def _compute_alone() -> None:
    """Let torch use one thread for what this one computes."""
    torch.get_num_threads()  # what it does at the first use in a thread: it takes the process's own
    torch.set_num_threads(1)


def _compute_with_another() -> None:
    """Once, with a second thread that waits from then on."""
    torch.set_num_threads(2)
    torch.zeros(2**20).add_(1)
    torch.set_num_threads(1)


def broken(encoded: Encoded) -> Iterator[str]:
    """Try each picture: yields the error of one that cannot be decoded, else an empty text."""

    def try_one(place: int) -> str:
        try:
            encoded.checked(place)
        except BrokenPictureError as error:
            return error.given
        return ""

    for part in parts_of(len(encoded)):
        yield from reading_threads().map(try_one, range(part.start, part.stop))


def parts_of(count: int) -> Iterator[slice]:
    """Split `count` pictures into parts between which signals are checked."""
    for start in range(0, count, AT_ONCE):
        yield slice(start, min(start + AT_ONCE, count))


def read(stored: Stored, places: Tensor) -> Tensor:
    """The images at the places `(k,)`: uint8 `(k, h, w, c)` on the host."""
    return Reading(stored, places).images()


def read_in_parts(stored: Stored, parts: Iterable[slice]) -> Iterator[tuple[slice, Tensor]]:
    """Each part with its uint8 `(k, h, w, c)` on the host, while the next one is read."""
    places = torch.arange(len(stored))
    begun: deque[tuple[slice, Reading]] = deque()
    for part in parts:
        begun.append((part, Reading(stored, places[part])))
        if len(begun) > 1:
            before, reading = begun.popleft()
            yield before, reading.images()
    for before, reading in begun:
        yield before, reading.images()
