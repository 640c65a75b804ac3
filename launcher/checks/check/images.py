"""The images of a recipe: number per class, duplicates, mean and std, samples."""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from launcher.checks.verdicts import Verdict
from launcher.config.plan import make_plan
from launcher.config.recipe import Images, Recipe
from launcher.data.batches import Batches, Normalize, epoch_order
from launcher.data.images import Data, ImageSet
from launcher.utils.text import count, some

NAME = "data"
MEASURED = 10_000  # images, from which mean and std are computed
IMBALANCED = 3  # ratio of the largest class to the smallest from which weights are proposed
SAMPLES, EPOCHS = 8, 5  # columns and rows of the picture of samples
NEAR = 4  # bits of 64 in which the hashes of nearly equal pictures may differ
_NEAR_PIXELS = 16.0  # mean difference of their pixels, of 255
_PART = 5000  # images that are read together
_CHUNK = 2**22  # comparisons at once
_SHOWN = 3
_SHORT = {"training": "train"}  # names in the JSON


def describe_images(data: Data, images: Images, *, near: bool) -> Iterator[Verdict]:
    """One verdict after another; `near` also looks for pictures that are nearly the same."""
    yield _classes(data)
    yield from _empty_classes(data)
    yield _twice(data)
    if near:
        yield _nearly_twice(data)
    yield _statistics(data.train, images)


def _classes(data: Data) -> Verdict:
    numbers = {split: _counts(images) for split, images in data.splits.items()}
    figures = {
        "classes": list(data.train.classes),
        **{_SHORT.get(split, split): each.tolist() for split, each in numbers.items()},
    }
    parts = []
    for split, each in numbers.items():
        low, high = int(each.min()), int(each.max())
        if low == high:
            parts.append(f"{low:,} {split} images of each")
        else:
            few, many = (data.train.classes[int(at)] for at in (each.argmin(), each.argmax()))
            parts.append(f"from {low:,} ({few}) to {high:,} ({many}) {split} images")
    answer = f"{count(len(data.train.classes), 'class')}: {', '.join(parts)}"
    of_training = numbers["training"]
    present = of_training[of_training > 0]
    if len(present) and present.max() >= IMBALANCED * present.min():
        return Verdict(NAME, answer, "notice", _advice(of_training), figures=figures)
    return Verdict(NAME, answer, figures=figures)


def _advice(each: Tensor) -> str:
    """Class weights that balance the classes, where there are few enough to write down."""
    weights = each.sum() / (len(each) * each.clamp(min=1))
    written = ", ".join(f"{weight:.3g}" for weight in weights.tolist())
    example = f"({written})" if len(each) <= 20 else "images / (classes * images of the class)"
    return (
        "accuracy then says little about rare classes; to balance them, write loss=partial("
        f"cross_entropy, weight=torch.tensor({example}))"
    )


def _empty_classes(data: Data) -> Iterator[Verdict]:
    for split, images in data.splits.items():
        lacking = [data.train.classes[int(at)] for at in (_counts(images) == 0).nonzero()]
        if lacking:
            yield Verdict(
                NAME,
                f"no {split} image of {some(lacking)}",
                "notice",
                "leave the class out of `classes`, or add images of it",
            )


def _counts(images: ImageSet) -> Tensor:
    return torch.bincount(images.labels.cpu(), minlength=len(images.classes))


def _twice(data: Data) -> Verdict:
    """Images that are equal to the byte: within the training set, and in both sets."""
    first: dict[bytes, int] = {}
    again, other_label = 0, 0
    for index, digest in enumerate(_digests(data.train)):
        before = first.setdefault(digest, index)
        if before != index:
            again += 1
            other_label += int(data.train.labels[before] != data.train.labels[index])
    held_back = {split: images for split, images in data.splits.items() if split != "training"}
    pairs, answers = 0, []
    for split, images in held_back.items():
        found = [(n, first[digest]) for n, digest in enumerate(_digests(images)) if digest in first]
        pairs += len(found)
        if found:
            shown = ", ".join(f"{other} = {train}" for other, train in found[:_SHOWN])
            answers.append(
                f"{count(len(found), f'{split} image')} of {len(images):,} in training as well, "
                f"counted from 0: {shown}{', ...' * (len(found) > _SHOWN)}"
            )
    figures = {"train_twice": again, "with_two_labels": other_label, "in_both": pairs}
    names = " or ".join(held_back)
    answer = "; ".join(answers) or f"no {names} image is a training image as well"
    if again:
        answer += f"; {count(again, 'training image')} there more than once"
        answer += f", {other_label:,} of them with two labels" if other_label else ""
    if pairs or other_label:
        advice = "remove them from one of the sets: the network may know them by heart"
        if not pairs:
            advice = "decide on one label for each"
        return Verdict(NAME, answer, "notice", advice, figures=figures)
    return Verdict(NAME, answer, figures=figures)


def _digests(images: ImageSet) -> Iterator[bytes]:
    for part in _in_parts(images):
        for picture in part.cpu().numpy():
            yield blake2b(picture.tobytes(), digest_size=16).digest()


def _in_parts(images: ImageSet) -> Iterator[Tensor]:
    """uint8 `(k, h, w, c)`, all images in their order."""
    parts = (slice(first, first + _PART) for first in range(0, len(images), _PART))
    return (pixels for _, pixels in images.in_parts(parts))


def _nearly_twice(data: Data) -> Verdict:
    pairs = near_pairs(data.test, data.train)
    figures = {"near": len(pairs)}
    if not pairs:
        return Verdict(NAME, "no test image is nearly equal to a training image", figures=figures)
    shown = ", ".join(f"{test} ~ {train}" for test, train in pairs[:_SHOWN])
    return Verdict(
        NAME,
        f"{count(len(pairs), 'test image')} of {len(data.test):,} nearly equal to training images: "
        f"{shown}{', ...' * (len(pairs) > _SHOWN)}",
        "notice",
        "look at them: photographs of one moment belong in the same split",
        figures=figures,
    )


def near_pairs(some: ImageSet, others: ImageSet) -> list[tuple[int, int]]:
    """The places of each image of `some` that is nearly equal to one of `others`, and of that one.

    By a hash of 64 bits, whether each of 8 x 8 fields is darker than the next (Krawetz, "Kind of
    Like That", 2013), and then by the pixels: plain backgrounds have similar hashes.
    """
    hashes = _hashes(some), _hashes(others)
    pairs = []
    step = max(1, _CHUNK // len(others))
    for first in range(0, len(some), step):
        part = hashes[0][first : first + step]
        distances = numpy.bitwise_count(part[:, None] ^ hashes[1][None, :])
        for row, column in zip(*numpy.nonzero(distances <= NEAR), strict=True):
            one = some.pixels([first + int(row)]).float()
            other = others.pixels([int(column)]).float()
            if (one - other).abs().mean() <= _NEAR_PIXELS:
                pairs.append((first + int(row), int(column)))
    return list({pair[0]: pair for pair in reversed(pairs)}.values())[::-1]


def _hashes(images: ImageSet) -> "numpy.ndarray[tuple[int], numpy.dtype[numpy.uint64]]":
    found = []
    for part in _in_parts(images):
        grey = part.cpu().permute(0, 3, 1, 2).float().mean(1, keepdim=True)
        fields = adaptive_avg_pool2d(grey, (8, 9))[:, 0]
        darker = (fields[:, :, :-1] < fields[:, :, 1:]).flatten(1).numpy()
        found.append(numpy.packbits(darker, axis=1).view(numpy.uint64)[:, 0])
    return numpy.concatenate(found)


def _statistics(train: ImageSet, images: Images) -> Verdict:
    """Compare the recipe's mean and std with those of the images."""
    step = -(-len(train) // MEASURED)
    pixels = train.pixels(slice(None, None, step)).cpu()
    channels = pixels.unbind(-1)
    # A histogram takes a fifth of the time of sums over floats, and is exact.
    counts = torch.stack([torch.bincount(c.reshape(-1), minlength=256) for c in channels]).double()
    shares, values = counts / channels[0].numel(), torch.arange(256).double() / 255
    mean = shares @ values
    std = (shares @ values.square() - mean.square()).clamp(min=0).sqrt()
    figures = {"mean": mean.tolist(), "std": std.tolist()}
    measured = f"mean=({_numbers(mean)}), std=({_numbers(std)})"
    shift = (mean - torch.tensor(images.mean)).abs() / torch.tensor(images.std)
    scale = std / torch.tensor(images.std)
    answer = f"the images have {measured}"
    is_normal = bool((shift <= 1).all() and (scale >= 1 / 3).all() and (scale <= 3).all())
    if is_normal:
        return Verdict(NAME, answer, figures=figures)
    found = f"the recipe normalizes them to a mean up to {shift.max():.1f} and a std down to "
    return Verdict(
        NAME, f"{answer}; {found}{scale.min():.2f}", "notice", f"write {measured}", figures=figures
    )


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.3f}" for value in values.tolist()) + "," * (len(values) == 1)


# What the network will see


def samples(recipe: Recipe, train: ImageSet) -> Tensor:
    """Pictures of several classes, and below each its augmented versions of some epochs.

    uint8 `(1 + epochs, pictures, h, w, c)`, by the code that trains: augmentation and mixing.
    """
    chosen = _of_each_class(train)
    own = train.pixels(chosen).cpu()
    few = ImageSet(own, train.labels[chosen].cpu(), train.classes)
    data = replace(recipe.data, batch_size=len(few), sampling="uniform")
    recipe = replace(recipe, data=data, epochs=EPOCHS, accumulate=1, sync_batch_norm=False)
    plan = make_plan(recipe, world_size=1, train_images=len(few), evaluated_images=len(few))
    normalize = Normalize(data, few.shape, torch.zeros(()), True)
    batches = Batches(few, recipe, plan, normalize, rank=0)
    rows = [own]
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    for epoch in range(1, EPOCHS + 1):
        ((_, (batch,)),) = batches.epoch(epoch)
        # A batch comes in the order of its epoch.
        order = epoch_order(recipe.seed, epoch, len(few)).argsort()
        pictures = ((batch.images * std + mean) * 255).round().clamp(0, 255).byte()
        if pictures.shape[2:] != own.shape[1:3]:  # a smaller resolution: enlarge its pixels
            pictures = interpolate(pictures, size=own.shape[1:3], mode="nearest")
        rows.append(pictures[order].permute(0, 2, 3, 1))
    return torch.stack(rows)


def _of_each_class(train: ImageSet) -> list[int]:
    labels = train.labels.tolist()
    firsts = {label: index for index, label in reversed(list(enumerate(labels)))}
    chosen = [firsts[label] for label in sorted(firsts)][:SAMPLES]
    others = [index for index in range(len(labels)) if index not in chosen]
    return chosen + others[: SAMPLES - len(chosen)]


def write_samples(pictures: Tensor, path: Path) -> None:
    """Write one PNG, with pixels enlarged so that people can see them."""
    rows = joined(pictures)
    times = max(1, 64 // pictures.shape[2])
    image = Image.fromarray(rows.numpy())
    image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST).save(path)


def joined(pictures: Tensor) -> Tensor:
    """`(rows, columns, h, w, c)` as one picture `(rows * h, columns * w, 3)`."""
    rows, columns, height, width, channels = pictures.shape
    whole = pictures.permute(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    return (whole if channels == 3 else whole[..., :1].expand(-1, -1, 3)).contiguous()
