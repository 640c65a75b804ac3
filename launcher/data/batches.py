"""The order of the images and each rank's part of it: pure functions of (seed, epoch, step).

Nothing here has state to save. Every rank computes the order of the whole epoch, takes its
micro-batches, and uses the draws that belong to its images, so N ranks see what 1 rank would.
Images stay uint8 on the device; a batch is gathered by index and normalized there. Stored ones
(`storage`) are read ahead of the steps that take them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from launcher.config.plan import Plan
from launcher.config.recipe import Images, Recipe
from launcher.config.slots import DRAWS_PER_AUGMENTATION, Draws
from launcher.data.augment import as_augmentation, cut_of, resized
from launcher.data.decoding import Cut
from launcher.data.images import ImageSet
from launcher.data.rng import FIXED, FRESH, LAYERS, MIX, ORDER, make_rng
from launcher.data.storage import Encoded, Mapped, Reading, Stored

BYTES_AHEAD = 2**26  # size of the images that are read ahead of the training, ...
LEAST_STEPS_AHEAD, MOST_STEPS_AHEAD = 2, 16  # ... limited to so many steps
CHUNK_BYTES = 2**27  # size of the images that a GPU prepares at once; at least one step


@dataclass(frozen=True)
class MicroBatch:
    """The images of one forward pass on one rank.

    `images` is `(n, c, h, w)`, `targets` is `(n,)` labels or `(n, classes)` probabilities.
    `weight` is n over the images of the global batch: that of this mean loss in the step's. Where
    the loss weighs classes, it is the sum of its images' weights over the global batch's. A rank
    that has no image left in a small last batch gets one image of weight 0, since it must still
    take part in the backward pass.
    """

    images: Tensor
    targets: Tensor
    weight: float


@dataclass(frozen=True)
class _Span:
    """The part of an epoch's order that is one micro-batch: `order[start:stop]`."""

    start: int
    stop: int
    weight: float


def layer_seeds(seed: int, epoch: int, rank: int, steps: int) -> list[int]:
    """The seeds of the random layers (dropout) of one rank in each step of an epoch."""
    sequence = numpy.random.SeedSequence([LAYERS, seed, epoch, rank])
    return sequence.generate_state(steps).tolist()


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which epoch `epoch` visits `count` images: int64 `(count,)`."""
    return torch.from_numpy(make_rng(ORDER, seed, epoch).permutation(count))


def balanced_order(seed: int, epoch: int, labels: Tensor) -> Tensor:
    """The order of an epoch in which all classes come equally often: int64 `(n,)`.

    An image of a small class comes several times in an epoch, all of them equally often up to one;
    of a large class each epoch takes others.
    """
    labels = labels.cpu()
    random, present = make_rng(ORDER, seed, epoch), torch.unique(labels)
    quotas = torch.full((len(present),), len(labels) // len(present))
    quotas[random.permutation(len(present))[: len(labels) % len(present)]] += 1
    chosen = []
    for label, quota in zip(present, quotas.tolist(), strict=True):
        own = (labels == label).nonzero()[:, 0].numpy()
        chosen.append(numpy.resize(random.permutation(own), quota))
    return torch.from_numpy(random.permutation(numpy.concatenate(chosen)))


def shard_bounds(count: int, shards: int, index: int) -> tuple[int, int]:
    """Start and stop of shard `index` of `count` images: sizes differ by at most one."""
    return count * index // shards, count * (index + 1) // shards


def mix_partners(order: Tensor, batch_size: int) -> Tensor:
    """Each image's partner for mixing: the next image of its global batch, the last's the first."""
    starts = torch.arange(0, len(order), batch_size)
    stops = torch.clamp(starts + batch_size, max=len(order))
    following = order.roll(-1)
    following[stops - 1] = order[starts]
    return following


def cut_when_read(images: ImageSet, data: Images) -> Cut | None:
    """The first augmentation, where it is a crop that can be done while a picture is read."""
    can_cut = isinstance(images.images, Encoded) and data.augment
    return cut_of(data.augment[0]) if can_cut else None


def steps_per_chunk(plan: Plan, image_bytes: int, device: torch.device) -> int:
    """For how many steps images, of `image_bytes` each, are prepared together."""
    step_bytes = image_bytes * (-(-plan.batch_size // plan.world_size))
    return 1 if device.type == "cpu" else max(1, CHUNK_BYTES // step_bytes)


class Normalize:
    """uint8 `(n, h, w, c)` -> floating point `(n, c, h, w)` with the recipe's mean and std."""

    def __init__(
        self, data: Images, shape: tuple[int, ...], like: Tensor, contiguous: bool
    ) -> None:
        """Spread mean and std over a whole image, so the inner loop is long and vectorised.

        `shape` is `(h, w, c)`; the result has the device and the type of `like`.
        """
        height, width, _ = shape
        mean = torch.tensor(data.mean, dtype=torch.float64) * 255
        std = torch.tensor(data.std, dtype=torch.float64) * 255
        self._scale = (1 / std).to(like).repeat(height * width)
        self._shift = (-mean / std).to(like).repeat(height * width)
        self._contiguous = contiguous
        self.image_bytes = self._scale.nbytes

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize images of that size or smaller; in channels_last memory unless `contiguous`."""
        flat = images.reshape(len(images), -1).to(self._scale.dtype)
        scale, shift = self._scale, self._shift
        if (values := flat.shape[1]) < len(scale):  # which repeat from pixel to pixel
            scale, shift = scale[:values], shift[:values]
        flat = flat.mul_(scale).add_(shift)
        pictures = flat.view(images.shape).permute(0, 3, 1, 2)
        return pictures.contiguous() if self._contiguous else pictures


@dataclass(frozen=True)
class _Order:
    """Which images an epoch visits, in its order, and which draws each uses: int64 `(n,)` each.

    `places` index the data set, and `rows` the table of draws. They are equal, except with balanced
    sampling, by which an image may come several times: then the row is its position in the epoch,
    so that it has other draws each time.
    """

    places: Tensor
    rows: Tensor

    def take(self, positions: Tensor | slice) -> "_Order":
        """The part of the order at these positions of the epoch."""
        return self.each(lambda table: table[positions])

    def take_spans(self, spans: list[_Span]) -> "_Order":
        """The parts of the order in these spans, one after the other."""
        return self.each(lambda table: torch.cat([table[s.start : s.stop] for s in spans]))

    def each(self, change: Callable[[Tensor], Tensor]) -> "_Order":
        """Apply `change` to both tables; once, where they are the same tensor."""
        places = change(self.places)
        return _Order(places, places if self.rows is self.places else change(self.rows))


@dataclass(frozen=True)
class _Epoch:
    """What is drawn for one epoch: the order of the images, their partners, their draws."""

    number: int
    order: _Order
    partners: _Order | None
    fresh: Tensor | None
    cumulative_weights: Tensor | None = None  # of the images before each position, summed
    on_host: tuple[_Order, ...] = ()  # order and partners once more, for stored images
    cuts: Tensor | None = None  # draws for `Cut`, on the host, where it is done when reading


@dataclass(frozen=True)
class _Read:
    """Images that were read for some steps: `images[i]` belongs to `rows[i]`, ascending."""

    rows: Tensor
    images: Tensor

    def take(self, rows: Tensor) -> Tensor:
        """The images of the rows `(k,)`, all of which were read."""
        return self.images.index_select(0, torch.searchsorted(self.rows, rows))


class Batches:
    """The training images of one rank, epoch by epoch.

    On a GPU the pictures of several steps are made at once, as many as fit in `CHUNK_BYTES`, since
    the launching of kernels would otherwise take longer than their work; on a CPU those of one
    step, which then stay in its cache. The next epoch is drawn while the device is busy.
    """

    def __init__(
        self,
        images: ImageSet,
        recipe: Recipe,
        plan: Plan,
        normalize: Normalize,
        rank: int,
        class_weights: Tensor | None = None,
    ) -> None:
        """`images` are on the device already; `class_weights` `(classes,)` are the loss's."""
        self._images, self._recipe, self._plan = images, recipe, plan
        self._normalize, self._rank = normalize, rank
        self._augmentations = tuple(map(as_augmentation, recipe.data.augment))
        self._weights = None
        if class_weights is not None:
            self._weights = class_weights.double().cpu()[images.labels.cpu()]
        self._next_epoch: _Epoch | None = None
        self._stored = images.images if isinstance(images.images, Stored) else None
        self._cut = cut_when_read(images, recipe.data)
        self._ahead: dict[tuple[int, int], tuple[Tensor, Reading]] = {}  # by epoch and first step
        self._device = images.labels.device
        fixed = self._drawn(make_rng(FIXED, recipe.seed))
        self._fixed = None if fixed is None else self._send(fixed)
        self._steps_per_chunk = steps_per_chunk(plan, normalize.image_bytes, self._device)
        self._chunks_ahead = self._count_ahead()

    def epoch(self, epoch: int, after: int = 0) -> Iterator[tuple[int, list[MicroBatch]]]:
        """The steps of an epoch after step `after`, each with its number and its micro-batches."""
        drawn = (
            self._next_epoch
            if self._next_epoch and self._next_epoch.number == epoch
            else self._draw(epoch)
        )
        self._next_epoch = None
        steps = self._plan.epoch_steps(epoch)
        steps = range(max(steps.start, after + 1), steps.stop)
        chunks = self._chunks(steps)
        try:
            for number, chunk in enumerate(chunks):
                is_soon = number + 1 + self._chunks_ahead >= len(chunks)
                if is_soon and self._next_epoch is None and epoch < self._plan.last_epoch:
                    self._next_epoch = self._draw(epoch + 1)
                self._read_ahead(drawn, chunks[number : number + 1 + self._chunks_ahead])
                yield from self._make(drawn, chunk)
        except BaseException:  # an error, or a generator that is closed early
            for _, reading in self._ahead.values():
                reading.cancel()
            self._ahead.clear()
            raise

    def _chunks(self, steps: range) -> list[range]:
        """Group the steps whose images are prepared together."""
        size = self._steps_per_chunk
        return [steps[start : start + size] for start in range(0, len(steps), size)]

    def _draw(self, epoch: int) -> _Epoch:
        plan, seed = self._plan, self._recipe.seed
        if self._recipe.data.sampling == "balanced":
            places = balanced_order(seed, epoch, self._images.labels)
            on_host = [_Order(places, torch.arange(len(places)))]
        else:
            places = epoch_order(seed, epoch, plan.train_images)
            on_host = [_Order(places, places)]
        if self._recipe.data.mix:
            positions = torch.arange(len(places))
            on_host.append(on_host[0].take(mix_partners(positions, plan.batch_size)))
        weights = None
        if self._weights is not None:
            weights = nn.functional.pad(self._weights[places].cumsum(0), (1, 0))
        order, *partners = (visited.each(self._send) for visited in on_host)
        fresh = self._drawn(make_rng(FRESH, seed, epoch))
        cuts = fresh[0] if fresh is not None and self._cut else None
        return _Epoch(
            epoch,
            order,
            partners[0] if partners else None,
            None if fresh is None else self._send(fresh),
            weights,
            tuple(on_host) if self._stored is not None else (),
            cuts,
        )

    def _drawn(self, random: numpy.random.Generator) -> Tensor | None:
        """Random draws of all images, on the host: `(augmentations, images, 4)`."""
        kinds = len(self._recipe.data.augment)
        if not kinds:
            return None
        size = (kinds, self._plan.train_images, DRAWS_PER_AUGMENTATION)
        return torch.from_numpy(random.random(size, dtype=numpy.float32))

    def _send(self, table: Tensor) -> Tensor:
        """Copy to the device, without waiting for its present work."""
        if self._device.type == "cuda" and not table.is_pinned():
            table = table.pin_memory()
        return table.to(self._device, non_blocking=True)

    def _read_ahead(self, epoch: _Epoch, chunks: list[range]) -> None:
        """Begin to read the images of the first chunk, and of those after it, as far as may be."""
        if self._stored is None:
            return
        most = 1 + self._chunks_ahead
        # To wake a thread disturbs the training more than to copy images: so for many at once.
        is_begun = (epoch.number, chunks[0].start) in self._ahead
        if is_begun and isinstance(self._stored, Mapped) and len(self._ahead) > most // 2:
            return
        wanted = [(epoch, chunk) for chunk in chunks]
        if (following := self._next_epoch) and len(wanted) < most:
            chunks = self._chunks(self._plan.epoch_steps(following.number))
            wanted += [(following, chunk) for chunk in chunks[: most - len(wanted)]]
        for epoch, chunk in wanted:
            key = (epoch.number, chunk.start)
            if key not in self._ahead:
                spans = self._spans_of(chunk, epoch)
                parts = [order.take_spans(spans) for order in epoch.on_host]
                # Ascending, and without repetition of what both orders visit.
                rows, first = numpy.unique(torch.cat([p.rows for p in parts]), return_index=True)
                places = torch.cat([part.places for part in parts])[first]
                shares = None
                if self._cut is not None and epoch.cuts is not None:
                    shares = self._cut.shares(epoch.cuts[rows])
                reading = Reading(
                    self._stored,
                    places,
                    pinned=self._device.type == "cuda",
                    while_training=True,
                    shares=shares,
                    size=None if shares is None else self._plan.resolution(epoch.number),
                )
                self._ahead[key] = torch.from_numpy(rows), reading

    def _count_ahead(self) -> int:
        """How many chunks are read ahead of the one that is trained."""
        if self._stored is None:
            return 0
        if (steps := self._recipe.data.prefetch) is None:
            images = -(-self._plan.batch_size // self._plan.world_size)
            step_bytes = images * math.prod(self._stored.shape[1:])
            steps = min(MOST_STEPS_AHEAD, max(LEAST_STEPS_AHEAD, BYTES_AHEAD // step_bytes))
        return -(-steps // self._steps_per_chunk)

    def _read(self, epoch: int, first: int) -> _Read | None:
        """What `_read_ahead` has read for the steps from `first` on; None where nothing is."""
        if self._stored is None:
            return None
        rows, reading = self._ahead.pop((epoch, first))
        return _Read(self._send(rows), self._send(reading.images()))

    def _make(self, epoch: _Epoch, steps: range) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Prepare the images of `steps` together; yield each step with its micro-batches."""
        spans, read = self._spans_of(steps, epoch), self._read(epoch.number, steps.start)
        batches, partners = self._micro_batches(epoch.order, epoch, spans, read), None
        if epoch.partners is not None:
            partners = self._micro_batches(epoch.partners, epoch, spans, read)
        for number, step in enumerate(steps):
            of_step = slice(number * self._plan.accumulate, (number + 1) * self._plan.accumulate)
            if partners is None:
                yield step, batches[of_step]
            else:
                pairs = zip(batches[of_step], partners[of_step], strict=True)
                yield step, [self._mix(batch, partner, step) for batch, partner in pairs]

    def _micro_batches(
        self, order: _Order, epoch: _Epoch, spans: list[_Span], read: _Read | None
    ) -> list[MicroBatch]:
        """The images that `order` names in these spans of the epoch."""
        if len(spans) == 1:  # joining and splitting would take 1 % of a small step on a CPU
            (span,) = spans
            examples = self._examples(order.take(slice(span.start, span.stop)), epoch, read)
            return [MicroBatch(*examples, span.weight)]
        sizes = [span.stop - span.start for span in spans]
        examples = self._examples(order.take_spans(spans), epoch, read)
        images, targets = (torch.split(part, sizes) for part in examples)
        weights = [span.weight for span in spans]
        return [MicroBatch(*parts) for parts in zip(images, targets, weights, strict=True)]

    def _examples(
        self, visited: _Order, epoch: _Epoch, read: _Read | None
    ) -> tuple[Tensor, Tensor]:
        """The prepared images and their targets."""
        labels = self._images.labels.index_select(0, visited.places)
        return self._pictures(visited, epoch, read), labels

    def _spans_of(self, steps: range, epoch: _Epoch) -> list[_Span]:
        return [span for step in steps for span in self._spans(step, epoch.cumulative_weights)]

    def _spans(self, step: int, weights: Tensor | None) -> list[_Span]:
        """This rank's micro-batches of a step, in the order of the epoch."""
        plan = self._plan
        first = (step - 1) % plan.steps_per_epoch * plan.batch_size
        size = plan.step_images(step)
        spans = []
        for number in range(plan.accumulate):
            shard = number * plan.world_size + self._rank
            start, stop = shard_bounds(size, plan.num_micro_batches, shard)
            weight = (stop - start) / size
            if weights is not None:
                before, after = weights[[first + start, first + stop]].tolist()
                whole = float(weights[first + size] - weights[first])
                weight = (after - before) / whole if whole else 0.0
            # Where there are fewer images than shards, an empty one still takes an image, of weight
            # 0: DDP waits for a backward pass on every rank.
            spans.append(_Span(first + start, first + max(stop, start + 1), weight))
        return spans

    def _pictures(self, visited: _Order, epoch: _Epoch, read: _Read | None) -> Tensor:
        """Gather, augment, resize and normalize: floating point `(n, c, h, w)`."""
        if read is not None:
            images = read.take(visited.rows)
        else:
            images = self._images.tensor.index_select(0, visited.places)
        if epoch.fresh is not None and self._fixed is not None:
            pictures = images.permute(0, 3, 1, 2)
            for number, augmentation in enumerate(self._augmentations):
                if number == 0 and self._cut:
                    continue  # done when the picture was read
                draws = Draws(
                    epoch.fresh[number].index_select(0, visited.rows),
                    self._fixed[number].index_select(0, visited.places),
                    epoch.number,
                )
                pictures = augmentation(pictures, draws)
            images = pictures.permute(0, 2, 3, 1)
        return self._normalize(resized(images, self._plan.resolution(epoch.number)))

    def _mix(self, batch: MicroBatch, partner: MicroBatch, step: int) -> MicroBatch:
        mix = self._recipe.data.mix
        assert mix is not None
        random = make_rng(MIX, self._recipe.seed, step)
        images, weight = mix(batch.images, partner.images, random)
        classes = len(self._images.classes)
        targets, others = (
            one_hot(t, classes).to(images.dtype) for t in (batch.targets, partner.targets)
        )
        return MicroBatch(images, targets * weight + others * (1 - weight), batch.weight)
