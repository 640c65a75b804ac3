"""Which training images are held out for validation: by seed, class by class.

Pure functions of the labels, so every rank, and every later run of the same seed, finds the same
images.
"""

import numpy
import torch
from torch import Tensor

from launcher.config.recipe import parse_fold
from launcher.data.rng import VALIDATION, make_rng
from launcher.errors import UserError
from launcher.utils.text import count


def held_out(labels: Tensor, validation: int | float | str, seed: int) -> Tensor:
    """The places of the validation images among `labels` `(n,)`: int64, ascending.

    `validation` is a number of images, a fraction of them, or a fold such as 2/5. Each class gives
    the same part of its images, up to one. The folds of one seed have no image in common, and all
    images together. Raises `UserError` where there are too few images.
    """
    labels = labels.cpu()
    order, size = _shuffled_by_class(labels, seed), count_held_out(len(labels), validation)
    if isinstance(validation, str) and (fold := parse_fold(validation)):
        number, folds = fold
        chosen = order[number - 1 :: folds]
    else:  # places that are evenly spread over images in the order of their classes
        chosen = order[torch.arange(size) * len(labels) // size]
    return chosen.sort().values


def count_held_out(images: int, validation: int | float | str) -> int:
    """How many training images are held out; 0 where the source has its own validation split.

    Raises `UserError` where there are too few.
    """
    if isinstance(validation, str):
        fold = parse_fold(validation)
        if fold is None:
            return 0
        size = len(range(fold[0] - 1, images, fold[1]))
    else:
        size = validation if isinstance(validation, int) else round(validation * images)
    if not 0 < size < images:
        raise UserError(
            f"data.validation={validation} of {count(images, 'training image')}",
            expected="at least one image for validation and one for training",
            instead="type data.validation=0.1, for example, or data.validation=none",
        )
    return size


def _shuffled_by_class(labels: Tensor, seed: int) -> Tensor:
    """All places, class after class; the seed decides the order within a class."""
    random = torch.from_numpy(make_rng(VALIDATION, seed).permutation(len(labels)))
    return random[torch.from_numpy(numpy.argsort(labels[random].numpy(), kind="stable"))]
