"""The order of the images and each rank's piece of it: pure functions of (seed, epoch, step).

Nothing here has state to save. Every rank computes the order of the whole epoch, takes its
pieces, and uses the draws that belong to its images, so N ranks see what one rank would.
Images stay uint8 on the device; a batch is gathered by index and normalised there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from launcher.augment import DRAWS_PER_AUGMENTATION, Draws
from launcher.datasets import ImageSet
from launcher.plan import Plan
from launcher.recipe import Images, Recipe

# What a random stream is for. Streams of different purposes never share numbers.
_ORDER, _FRESH, _FIXED, _MIX, _LAYERS = range(5)


@dataclass(frozen=True)
class Piece:
    """The images of one forward pass on one rank.

    `images` is `(n, c, h, w)`, `targets` is `(n,)` labels or `(n, classes)` probabilities.
    `share` is n over the images of the whole global batch: the weight of this piece's mean loss
    in the step's. A rank that has no image left in a small last batch gets one of share 0, since
    it must still take part in the backward pass.
    """

    images: Tensor
    targets: Tensor
    share: float


def stream(purpose: int, *numbers: int) -> numpy.random.Generator:
    """Random numbers that depend on the purpose and the numbers alone."""
    return numpy.random.default_rng([purpose, *numbers])


def layer_seeds(seed: int, epoch: int, rank: int, steps: int) -> list[int]:
    """The seeds of the random layers (dropout) of one rank in each step of an epoch."""
    sequence = numpy.random.SeedSequence([_LAYERS, seed, epoch, rank])
    return sequence.generate_state(steps).tolist()


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which epoch `epoch` visits `count` images: int64 `(count,)`."""
    return torch.from_numpy(stream(_ORDER, seed, epoch).permutation(count))


def piece_bounds(count: int, pieces: int, index: int) -> tuple[int, int]:
    """Start and stop of piece `index` of `count` things: sizes differ by at most one."""
    return count * index // pieces, count * (index + 1) // pieces


def successors(order: Tensor, batch_size: int) -> Tensor:
    """Each image's partner for mixing: the next image of its global batch, the last's the first."""
    starts = torch.arange(0, len(order), batch_size)
    stops = torch.clamp(starts + batch_size, max=len(order))
    following = order.roll(-1)
    following[stops - 1] = order[starts]
    return following


class Normalise:
    """uint8 `(n, h, w, c)` -> floating point `(n, c, h, w)` with the recipe's mean and std."""

    def __init__(self, data: Images, shape: torch.Size, like: Tensor, contiguous: bool) -> None:
        """Spread mean and std over a whole image, so the inner loop is long and vectorised.

        `shape` is `(h, w, c)`; the result has the device and the type of `like`.
        """
        height, width, _ = shape
        mean = torch.tensor(data.mean, dtype=torch.float64) * 255
        std = torch.tensor(data.std, dtype=torch.float64) * 255
        self._scale = (1 / std).to(like).repeat(height * width)
        self._shift = (-mean / std).to(like).repeat(height * width)
        self._contiguous = contiguous

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise a batch; in channels_last memory unless told otherwise."""
        flat = images.reshape(len(images), -1).to(self._scale.dtype)
        flat = flat.mul_(self._scale).add_(self._shift)
        pictures = flat.view(images.shape).permute(0, 3, 1, 2)
        return pictures.contiguous() if self._contiguous else pictures


class Batches:
    """The training images of one rank, epoch by epoch."""

    def __init__(
        self, images: ImageSet, recipe: Recipe, plan: Plan, normalise: Normalise, rank: int
    ) -> None:
        """`images` lie on the device already."""
        self._images, self._recipe, self._plan = images, recipe, plan
        self._normalise, self._rank = normalise, rank
        self._fixed = self._draws(stream(_FIXED, recipe.seed))

    def epoch(self, epoch: int) -> Iterator[tuple[int, list[Piece]]]:
        """The steps of epoch `epoch`, each with its number and its `accumulate` pieces."""
        plan, seed = self._plan, self._recipe.seed
        device = self._images.images.device
        order = epoch_order(seed, epoch, plan.train_images)
        partners = None
        if self._recipe.data.mix:
            partners = successors(order, plan.batch_size).to(device)
        order = order.to(device)
        fresh = self._draws(stream(_FRESH, seed, epoch))
        for step in plan.epoch_steps(epoch):
            yield (
                step,
                [
                    self._piece(order, partners, fresh, epoch, step, number)
                    for number in range(plan.accumulate)
                ],
            )

    def _draws(self, random: numpy.random.Generator) -> Tensor | None:
        """Draws of all images for all augmentations: `(augmentations, images, 4)`."""
        kinds = len(self._recipe.data.augment)
        if not kinds:
            return None
        size = (kinds, self._plan.train_images, DRAWS_PER_AUGMENTATION)
        table = torch.from_numpy(random.random(size, dtype=numpy.float32))
        return table.to(self._images.images.device)

    def _piece(
        self,
        order: Tensor,
        partners: Tensor | None,
        fresh: Tensor | None,
        epoch: int,
        step: int,
        number: int,
    ) -> Piece:
        plan = self._plan
        first = (step - 1) % plan.steps_per_epoch * plan.batch_size
        size = plan.step_images(step)
        start, stop = piece_bounds(size, plan.pieces, number * plan.world_size + self._rank)
        share = (stop - start) / size
        chosen = slice(first + start, first + max(stop, start + 1))
        indices = order[chosen]
        images = self._pictures(indices, fresh, epoch)
        targets = self._images.labels.index_select(0, indices)
        if partners is None:
            return Piece(images, targets, share)
        others = self._pictures(partners[chosen], fresh, epoch)
        other_targets = self._images.labels.index_select(0, partners[chosen])
        random = stream(_MIX, self._recipe.seed, step)
        return self._mix(images, targets, others, other_targets, share, random)

    def _pictures(self, indices: Tensor, fresh: Tensor | None, epoch: int) -> Tensor:
        """Gather, augment and normalise: int64 `(n,)` -> floating point `(n, c, h, w)`."""
        images = self._images.images.index_select(0, indices)
        if fresh is not None and self._fixed is not None:
            pictures = images.permute(0, 3, 1, 2)
            for number, augmentation in enumerate(self._recipe.data.augment):
                draws = Draws(
                    fresh[number].index_select(0, indices),
                    self._fixed[number].index_select(0, indices),
                    epoch,
                )
                pictures = augmentation(pictures, draws)
            images = pictures.permute(0, 2, 3, 1)
        return self._normalise(images)

    def _mix(
        self,
        images: Tensor,
        targets: Tensor,
        others: Tensor,
        other_targets: Tensor,
        share: float,
        random: numpy.random.Generator,
    ) -> Piece:
        mix = self._recipe.data.mix
        assert mix is not None
        mixed, weight = mix(images, others, random)
        classes = len(self._images.classes)
        own = one_hot(targets, classes).to(images.dtype)
        other = one_hot(other_targets, classes).to(images.dtype)
        return Piece(mixed, own * weight + other * (1 - weight), share)
