"""From a data set of torchvision's shape (`data`, `targets`, `classes`) to images and labels.

Its pixels and labels are taken as a whole, and none by `__getitem__`: what would be lost by that is
refused.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from launcher.config.recipe import Images
from launcher.config.serialize import short_name
from launcher.config.slots import Source
from launcher.data.images import ImageSet
from launcher.data.packed import Packed
from launcher.data.storage import Encoded, Mapped
from launcher.errors import UserError
from launcher.utils.text import count
from launcher.utils.user_code import function_of

NAMELESS = tuple("0123456789")  # the classes of a set without names, such as SVHN
MOST_KINDS = 20  # of images, one of each of which is compared with the data set's item
_CHANNELS = (1, 2, 3, 4)  # of images, which are larger


def is_users_source(source: Source) -> bool:
    """Whether it is neither of the launcher nor of torchvision."""
    return function_of(source).__module__.partition(".")[0] not in ("launcher", "torchvision")


def as_image_set(dataset: Any, data: Images) -> ImageSet:
    """All of its images; raises `UserError` for what is no image set, naming what to write."""
    name = short_name(data.source)
    _refuse_transforms(dataset, name)
    labels_name = "targets" if hasattr(dataset, "targets") else "labels"
    encoded = getattr(dataset, "encoded", None)
    if isinstance(encoded, Encoded):
        return _of_pictures(dataset, encoded, data)
    if data.on_broken == "skip":
        raise UserError(
            f"data.on_broken=skip of {name}, whose images are not files of their own",
            expected="pictures in class folders, as Folder reads them",
            instead="type data.on_broken=stop",
        )
    if data.tier == "disk":
        raise UserError(
            f"data.tier=disk of {name}, whose images are not files of their own",
            expected="pictures in class folders, or a pack of them, --encoded",
            instead="type data.tier=host",
        )
    pixels, numbers = getattr(dataset, "data", None), getattr(dataset, labels_name, None)
    if pixels is None or numbers is None:
        lacking = " and ".join(["`data`"] * (pixels is None) + ["`targets`"] * (numbers is None))
        single = ", which makes images one by one" if isinstance(dataset, Dataset) else ""
        raise _not_images(f"makes a {type(dataset).__name__} without {lacking}{single}", name)
    images, targets = _tensor(pixels), _tensor(numbers)
    if images is None or targets is None:
        odd = pixels if images is None else numbers
        which = "data" if images is None else labels_name
        found = f"has a {type(odd).__name__} as `{which}` that is no array"
        better = "numpy.stack(...) of uint8 images of one size"
        if images is not None:
            better = f"numbers from 0 as `{which}`, their names as `classes`,"
        raise _not_images(found, name, better)
    labels = targets.long()
    if targets.is_floating_point() and not torch.equal(targets, labels.to(targets.dtype)):
        raise UserError(
            f"data.source={name}, with targets that are no whole numbers",
            expected="a class for each image, counted from 0",
            instead="give the data set whole numbers as `targets`",
        )
    shapes = tuple(images.shape), tuple(labels.shape)
    if images.dtype != torch.uint8 or images.ndim not in (3, 4) or shapes[1] != shapes[0][:1]:
        found = f"has data of {images.dtype} {shapes[0]} and targets of {shapes[1]}"
        raise _not_images(found, name, _better(images, targets))
    named = getattr(dataset, "classes", None)
    if not isinstance(named, Iterable | None):
        raise UserError(
            f"data.source={name} has classes={named!r}",
            expected="a list with the name of each class",
            instead="write classes = [str(number) for number in range(10)], for example",
        )
    classes = NAMELESS if named is None else tuple(map(str, named))
    _check_labels(labels, classes, name)
    files = tuple(map(str, getattr(dataset, "files", ())))
    images = _channels_last(images)
    _refuse_own_items(dataset, images, labels, name)
    is_packed = isinstance(dataset, Packed)
    kept = Mapped(torch.arange(len(images)), images, dataset.path) if is_packed else images
    return ImageSet(kept, labels, classes, files * (len(files) == len(labels)))


def _refuse_transforms(dataset: Any, name: str) -> None:
    """Refuse transforms of a data set: the launcher takes all its images at once, unchanged."""
    for word in ("target_transform", "transform", "transforms"):
        if (given := getattr(dataset, word, None)) is None:
            continue
        kind, instead = "images", "write augment=(flip, crop), mean= and std= in Images(...)"
        if word == "target_transform":
            kind, instead = "labels", "write a function that changes `targets` and returns the set"
        raise UserError(
            f"data.source={name} with {word}={' '.join(str(given).split())}, which nothing calls",
            expected=f"{kind} as they are stored, which the launcher takes all at once",
            instead=f"{instead}, and leave out {word}",
        )


def _refuse_own_items(dataset: Any, images: Tensor, labels: Tensor, name: str) -> None:
    """Refuse items that are others than `data` and `targets` hold, since nothing takes an item.

    As of a class of the user's that changes labels or pictures in `__getitem__`, or shows a part.
    """
    if any(_is_users_method(dataset, method) for method in ("__len__", "__getitem__")):
        try:
            differs = _difference(dataset, images, labels)
        except Exception:  # it cannot be asked: nothing is known of its items
            return
        if differs:
            raise UserError(
                f"data.source={name}, whose items are not what its `data` and `targets` hold: "
                f"{differs}",
                expected="images and labels in `data` and `targets` as they are to be trained "
                "with: all are taken from there, and none by __getitem__",
                instead="change `data` and `targets` once, in its __init__, and write what is "
                "drawn for each image as an augmentation",
            )


def _is_users_method(dataset: Any, name: str) -> bool:
    owner = next((kind for kind in type(dataset).__mro__ if name in vars(kind)), None)
    return owner is not None and is_users_source(owner)


def _difference(dataset: Any, images: Tensor, labels: Tensor) -> str:
    """How the items differ from images `(n, h, w, c)` and labels; empty where they do not."""
    if _is_users_method(dataset, "__len__") and len(dataset) != len(labels):
        return f"it has {count(len(dataset), 'item')} and {count(len(labels), 'label')}"
    if not _is_users_method(dataset, "__getitem__"):
        return ""
    for kind in torch.unique(labels)[:MOST_KINDS]:
        place = int((labels == kind).nonzero()[0])
        item = dataset[place]
        shown, label = item.values() if isinstance(item, dict) else item
        if float(label) != float(labels[place]):
            return f"item {place} has the label {label}, not {labels[place]}"
        found, kept = torch.as_tensor(numpy.array(shown)).double(), images[place].double()
        if found.numel() == kept.numel() and found.ndim == 3 and found.shape != kept.shape:
            found = found.permute(1, 2, 0)  # channels first
        scale = 255 if found.max() <= 1 < kept.max() else 1
        if (
            found.numel() != kept.numel()
            or (found.reshape(-1) * scale - kept.reshape(-1)).abs().max() > 1
        ):
            return f"item {place} is another image"
    return ""


def _of_pictures(dataset: Any, encoded: Encoded, data: Images) -> ImageSet:
    """The pictures of a data set, not decoded."""
    labels, classes = torch.as_tensor(dataset.targets), tuple(dataset.classes)
    _check_labels(labels, classes, short_name(data.source))
    files = tuple(encoded.files[place] for place in encoded.places.tolist())
    return ImageSet(encoded, labels, classes, files)


def _better(images: Tensor, targets: Tensor) -> str:
    """What to give in place of images or labels of another form."""
    if targets.ndim > 1:
        return "targets.argmax(1) of one-hot targets, or targets.reshape(-1) of a column,"
    if images.ndim == 2:
        return "data.reshape(len(data), 3, 32, 32), for example, of rows of pixels"
    if images.is_floating_point():
        return "(data * 255).to(torch.uint8), if they end at 1,"
    return "data.astype(numpy.uint8) of pixels from 0 to 255"


def _not_images(found: str, name: str, better: str = "") -> UserError:
    return UserError(
        f"data.source={name} {found}",
        expected="an object that holds all images as uint8 `data` (n, h, w, c), and as `targets` "
        "a label for each",
        instead=f"give it {better or 'both'} or use a set of torchvision such as CIFAR10, "
        "or Folder for pictures on disk",
    )


def _tensor(values: Any) -> Tensor | None:
    """`values` as a tensor; None where they are not numbers, or ragged."""
    try:
        if isinstance(values, list | tuple) and any(isinstance(v, numpy.ndarray) for v in values):
            values = numpy.stack(values)  # torch copies them number by number
        if isinstance(values, numpy.ndarray) and any(stride < 0 for stride in values.strides):
            values = values.copy()  # torch has no negative strides, as of BGR turned to RGB
        with warnings.catch_warnings():  # of a mapped file, which nobody writes into
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None


def _channels_last(images: Tensor) -> Tensor:
    """`(n, h, w)` or `(n, c, h, w)` or `(n, h, w, c)` -> contiguous `(n, h, w, c)`."""
    if images.ndim == 3:
        return images[..., None].contiguous()
    if images.shape[-1] not in _CHANNELS and images.shape[1] in _CHANNELS:
        images = images.permute(0, 2, 3, 1)
    return images.contiguous()


def _check_labels(labels: Tensor, classes: tuple[str, ...], name: str) -> None:
    if not len(labels):
        raise UserError(
            f"no images in {name}",
            expected="at least one to train with, and one to test with",
            instead="correct the data set: each of its splits has its own `data` and `targets`",
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        instead = "correct the data set, or its list `classes`"
        if low == 1 and high == len(classes):
            instead = "give it `targets - 1`: classes count from 0"
        elif low >= 0 and classes is NAMELESS:
            instead = "give the data set a list `classes` of their names: without one it has ten"
        raise UserError(
            f"labels from {low} to {high} in {name}",
            expected=f"labels from 0 to {len(classes) - 1}, one for each of its classes",
            instead=instead,
        )
