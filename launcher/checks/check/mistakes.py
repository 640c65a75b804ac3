"""Mistakes of a network, named by the layer that fails, with what to write instead."""

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from launcher.checks.check.layers import Walk, declared, walk
from launcher.utils.user_code import place_of, user_line, user_location

_SIZES = (28, 32, 64, 96, 128, 224)  # pixels: usual sizes of images
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# In torch's message where a layer's weights have another type than its input.
_OTHER_TYPE = ("must have the same dtype", "should be the same", "expected scalar type")
_POOLINGS = (nn.MaxPool2d, nn.AvgPool2d)


@dataclass(frozen=True)
class Mistake:
    """A mistake, with the place in the user's file if it is known; and what to write."""

    what: str
    instead: str


def find_mistake(walked: Walk, classes: int) -> Mistake | None:
    """The first mistake that appeared when images went through a network, if any."""
    if walked.error is None:
        return _of_output(walked, classes)
    if walked.refused is None:
        return _of_forward(walked)
    return _of_layer(walked)


def _of_output(walked: Walk, classes: int) -> Mistake | None:
    output, count = walked.output, len(walked.images)
    own = getattr(type(walked.network), "forward", None)  # not so where torch.jit has made it
    forward = f"forward{place_of(own) if own else ''}"
    if output is None:
        return Mistake(f"{forward} returns nothing", "end it with `return x`")
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        return Mistake(
            f"{forward} returns a {kind}", "return the scores alone, such as `return x[0]`"
        )
    if len(output) != count:
        return Mistake(
            f"{forward} makes {len(output)} rows of scores of {count} images: a `view` changes the "
            "batch",
            "write x.flatten(1) where it is flattened",
        )
    if tuple(output.shape) != (count, classes):
        last = next((x for x in reversed(walked.layers) if isinstance(x.module, nn.Linear)), None)
        scores = " x ".join(map(str, output.shape[1:])) or "1"
        where, instead = "", f"end with {classes} scores for each image"
        if last is not None:
            where = declared(walked.network, last.name)
            instead = (
                f"write {last.name} = nn.Linear({_linear(last.module).in_features}, {classes})"
            )
        return Mistake(f"it ends in {scores} scores for {classes} classes{where}", instead)
    return None


def _of_forward(walked: Walk) -> Mistake:
    """A mistake in the code between the layers."""
    error, images = walked.error, walked.images
    before = walked.layers[-1].made if walked.layers else tuple(images.shape)
    assert error is not None
    line = user_line(error)
    code = f"`{line.line}` " if line and line.line else ""
    what = f"{code}fails{user_location(error)}: {type(error).__name__}: {error}"
    per_image = prod(before[1:])
    if isinstance(error, NameError) and getattr(error, "name", "") == "F":
        return Mistake(what, "begin the file with `import torch.nn.functional as F`")
    if isinstance(error, NameError) and getattr(error, "name", "") in ("nn", "torch"):
        module = {"nn": "from torch import nn", "torch": "import torch"}[str(error.name)]
        return Mistake(what, f"begin the file with `{module}`")
    if "is invalid for input of size" in str(error):
        return Mistake(
            f"{code}does not fit the {per_image} numbers of an image{user_location(error)}",
            f"write x.flatten(1) there and nn.Linear({per_image}, ...) behind it",
        )
    if "view size is not compatible" in str(error):
        return Mistake(what, "write x.flatten(1) or x.reshape(...) there")
    return Mistake(what, "correct that line")


def _of_layer(walked: Walk) -> Mistake:
    assert walked.refused is not None
    assert walked.error is not None
    name, layer, given = walked.refused
    place = declared(walked.network, name) if name else ""
    head = f"{name or type(layer).__name__} = {layer}{place}"
    where = user_location(walked.error)
    got = " x ".join(map(str, given[1:])) or "single numbers"
    what = f"{head} gets {got} for each image{where}"
    if any(words in str(walked.error) for words in _OTHER_TYPE):
        return Mistake(
            f"{head} gets numbers of another type{where}: {walked.error}",
            "leave out what changes the type, such as .double() or .half(), or write x.float() "
            "before it",
        )
    if isinstance(layer, nn.Linear):
        return _of_linear(walked, head, where)
    if isinstance(layer, nn.Conv1d):
        arguments = _arguments(layer, layer.in_channels, layer.out_channels)
        return Mistake(what, f"write nn.Conv2d({arguments}): pictures have two dimensions")
    if isinstance(layer, _CONVOLUTIONS) and len(given) == 4 and given[1] != layer.in_channels:
        return _of_channels(layer, given, head, where)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and len(given) > 1:
        kind = type(layer).__name__
        return Mistake(f"{head} gets {given[1]} channels{where}", f"write nn.{kind}({given[1]})")
    if isinstance(layer, (*_CONVOLUTIONS, *_POOLINGS)) and len(given) == 4:
        return Mistake(
            f"{head} gets pictures of {given[2]} x {given[3]} pixels, fewer than it needs{where}",
            "leave out a pooling before it, write padding=1 in the convolutions, or train larger "
            "images",
        )
    return Mistake(f"{what}: {walked.error}", "compare its arguments with what it gets")


def _of_linear(walked: Walk, head: str, where: str) -> Mistake:
    assert walked.refused is not None
    _, layer, given = walked.refused
    linear, count = _linear(layer), len(walked.images)
    if len(given) == 4:
        numbers = prod(given[1:])
        return Mistake(
            f"{head} gets pictures, {given[1]} x {given[2]} x {given[3]}{where}",
            f"write x.flatten(1) before it, and nn.Linear({numbers}, {linear.out_features})",
        )
    if given[0] != count:
        numbers = prod(given) // count
        return Mistake(
            f"{head} gets {given[0]} rows of {count} images: a `view` changes the batch{where}",
            f"write x.flatten(1) before it, and nn.Linear({numbers}, {linear.out_features})",
        )
    instead = f"write nn.Linear({given[-1]}, {linear.out_features})"
    if size := _fitting_size(walked):
        instead += f"; as it is, the network takes images of {size} x {size} pixels"
    return Mistake(f"{head} gets {given[-1]} numbers for each image{where}", instead)


def _of_channels(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, given: tuple[int, ...], head: str, where: str
) -> Mistake:
    out = layer.out_channels
    what = f"{head} gets {given[1]} channels{where}"
    if given[1] == out:
        what += ", as many as it is to make: in_channels and out_channels are exchanged"
        out = layer.in_channels
    arguments = _arguments(layer, given[1], out)
    return Mistake(what, f"write nn.{type(layer).__name__}({arguments})")


def _arguments(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, given: int, out: int) -> str:
    """`3, 16, 5, padding=2`: the channels, and the layer's other arguments if they fit."""
    written = [f"{given}, {out}, {_short(layer.kernel_size)}"]
    for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)):
        value = _short(getattr(layer, name))
        fits = name != "groups" or not (given % layer.groups or out % layer.groups)
        written += [f"{name}={value!r}"] * (value != usual and fits)
    return ", ".join([*written, "bias=False"] if layer.bias is None else written)


def _short(value: Any) -> Any:
    """(3, 3) as 3."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def _fitting_size(walked: Walk) -> int | None:
    """The usual size of images that the network can take unchanged."""
    channels, like = walked.images.shape[1], walked.images
    for size in _SIZES:
        if walk(walked.network, like.new_zeros(2, channels, size, size)).error is None:
            return size
    return None


def _linear(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    return layer
