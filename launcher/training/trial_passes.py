"""A network is tried on a few images before the training: forwards, and backwards as in a step.

It is refused, or a line says so, where it cannot take the images, where the ranks would have other
weights, and where it keeps what no checkpoint holds. Each trial is undone, and holds less memory
than a step of the training: the parameters once more, and their gradients.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from launcher.config.recipe import Recipe
from launcher.config.serialize import code_name, short_name
from launcher.data.batches import Normalize
from launcher.data.images import ImageSet
from launcher.errors import LauncherError, UserError
from launcher.training.network import (
    MemoryFormat,
    are_equal,
    changed_parameters,
    first_parameter,
    kept_numbers,
    restored_afterwards,
    upcast,
)
from launcher.utils.text import some
from launcher.utils.user_code import global_states, is_users, user_location

SHAPE_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
)  # what torch raises for wrong shapes


LOUDER = 4096.0  # times the loss: a hook that limits gradients then does so


def two_images(
    network: nn.Module,
    recipe: Recipe,
    data: ImageSet,
    memory_format: MemoryFormat,
    times: int = 2,
) -> Tensor:
    """The first image twice, or more often, normalized: `(times, c, h, w)`."""
    pixels = data.pixels(slice(1)).expand(times, -1, -1, -1)
    return _normalized(pixels, network, recipe, memory_format)


def first_images(
    network: nn.Module, recipe: Recipe, data: ImageSet, memory_format: MemoryFormat, size: int
) -> Tensor:
    """As many training images as a pass of the training has, normalized: `(size, c, h, w)`."""
    return _normalized(data.pixels(slice(size)), network, recipe, memory_format)


def _normalized(
    pixels: Tensor, network: nn.Module, recipe: Recipe, memory_format: MemoryFormat
) -> Tensor:
    like, shape = first_parameter(network), pixels.shape[1:]
    normalize = Normalize(recipe.data, shape, like, memory_format == "contiguous")
    return normalize(pixels.to(like.device))


def try_first_pass(
    network: nn.Module, images: Tensor, recipe: Recipe
) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """The shape of the output, and the parameters that the pass has changed; it is undone."""
    for mode, returned in (("train", network.train()), ("eval", network.eval())):
        if returned is not network:
            raise UserError(
                f"{code_name(recipe.model)}, whose {mode}() returns {type(returned).__name__}",
                expected="the network itself, as torch's does after it has set the mode",
                instead=f"write `return super().{mode}(...)` at the end of the train() or eval() "
                "that it overrides",
            )
    try:
        # In inference_mode a lazy layer would get weights that never train.
        with torch.no_grad(), restored_afterwards(network, images.device) as before:
            output = network(images)
            changed = changed_parameters(network, before)
    except Exception as error:
        if not is_users(error, SHAPE_ERRORS):
            raise  # of the launcher's own
        raise refused_images(code_name(recipe.model), images, error) from error
    _refuse_several_outputs(output, recipe, "")
    odd = [name for name, value in network.state_dict().items() if not _can_be_saved(value)]
    if odd:
        raise UserError(
            f"{code_name(recipe.model)}, whose state holds {some(odd)}, which is no tensor that a "
            "file of weights can hold",
            expected="dense parameters and buffers, of real numbers or of torch.complex64",
            instead="write self.register_buffer(name, torch.tensor(...)) for get_extra_state() or "
            "a sparse tensor, and torch.view_as_real(...) of torch.complex128",
        )
    return tuple(output.shape), changed


def _can_be_saved(value: object) -> bool:
    """Whether safetensors have room for it."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    try:
        save({"": torch.empty(0, dtype=value.dtype)})
    except KeyError:
        return False
    return True


def _refuse_several_outputs(output: Any, recipe: Recipe, mode: str) -> None:
    """Raise `UserError` for what is no tensor: with the output of an auxiliary head, say."""
    if isinstance(output, Tensor):
        return
    names = list(output) if isinstance(output, Mapping) else getattr(output, "_fields", ())
    item = repr(next(iter(names), 0)) if isinstance(output, Mapping) else "0"
    wrapped = f"wrap it in a module whose forward returns self.network(images)[{item}]"
    if any("aux" in str(name) for name in names):
        wrapped = f"write aux_logits=False where the network is built, or {wrapped}"
    elif not isinstance(output, Mapping | tuple | list):
        wrapped = "return the scores from its forward"
    raise UserError(
        f"{code_name(recipe.model)} returns a {type(output).__name__}{mode}",
        expected="one tensor of scores (n, classes), the same in training and evaluation",
        instead=wrapped,
    )


def refused_images(name: str, images: Tensor, error: Exception, mode: str = "") -> UserError:
    """For a network that cannot take the images; `mode` is empty, or the mode it was in."""
    where = user_location(error)
    what = error if isinstance(error, SHAPE_ERRORS) else f"{type(error).__name__}: {error}"
    return UserError(
        f"{name} fails on images of shape {tuple(images.shape)}{mode}: {what}{where}",
        expected="a model that takes (n, channels, height, width)",
        instead="see which layer does not fit, and what to write: type launcher check RECIPE",
    )


@dataclass(frozen=True)
class TrainingPass:
    """What a pass in training mode over `images` has shown: what torch refuses, or what came of it.

    `unused` are the names of the parameters that got no gradient, `norms` those of the gradients of
    the others, and `kept` what the network then kept beside parameters and buffers.
    """

    images: Tensor
    error: Exception | None = None
    unused: tuple[str, ...] = ()
    scores: Tensor | None = None
    norms: Mapping[str, float] | None = None
    kept: Mapping[str, Any] | None = None


def try_training_pass(
    network: nn.Module,
    recipe: Recipe,
    images: Tensor,
    accelerator: Accelerator,
    *,
    loudness: float = 1.0,
) -> TrainingPass:
    """Run forward and backward as in training, on copies of the images, and leave no trace.

    Raises `UserError` for an output that is no tensor of scores. `loudness` multiplies the loss.
    """
    network.train()
    shapes_before = {name: b.shape for name, b in network.named_buffers() if not is_lazy(b)}
    try:
        with restored_afterwards(network, accelerator.device) as before:
            with accelerator.autocast(), _refusing_what_is_lost(network, recipe):
                output = network(images.clone())  # it may write into them
            changed = changed_parameters(network, before)
            if recipe.average is not None:
                _refuse_resized(shapes_before, network, recipe)
            _refuse_several_outputs(output, recipe, " in training mode")
            scores = output.detach().float()
            if output.requires_grad:
                loss = upcast(output).square().sum() * loudness
                loss.backward()  # type: ignore[no-untyped-call]
            trained = {n: p.grad for n, p in network.named_parameters() if p.requires_grad}
            norms = {n: float(g.norm()) for n, g in trained.items() if g is not None}
        if changed:  # it may be a constraint, which is the same for any images
            with restored_afterwards(network, accelerator.device) as before, torch.no_grad():
                with accelerator.autocast():
                    network(images / 2)
                others = changed_parameters(network, before)
            refuse_set_parameters(differing_values(changed, others), recipe)
        unused = tuple(name for name in trained if name not in norms)
        return TrainingPass(images, None, unused, scores, norms, kept_numbers(network))
    except (torch.OutOfMemoryError, LauncherError):
        raise
    except Exception as error:
        if not is_users(error, SHAPE_ERRORS):
            raise  # of the launcher's own
        if refusal := explain_torch_error(error, "before training"):
            raise refusal from None
        return TrainingPass(images, error)


def _refuse_resized(before: Mapping[str, torch.Size], network: nn.Module, recipe: Recipe) -> None:
    """An average, which is a copy from before the first step, keeps the buffers' shapes of then."""
    now = {name: buffer.shape for name, buffer in network.named_buffers()}
    if resized := [name for name in before if name in now and now[name] != before[name]]:
        raise UserError(
            f"an average of {code_name(recipe.model)}, which resizes its buffer {some(resized)} in "
            "a pass",
            expected="buffers of one shape, as torch's averages need them",
            instead="make a pass over some images before the function returns the network, or type "
            "average=none",
        )


def describe_second_pass(
    network: nn.Module, recipe: Recipe, first: TrainingPass, accelerator: Accelerator
) -> str:
    """What another pass over the same images, with the same draws, shows of what is kept.

    After one over others, which the network may remember. Without gradients: what it keeps then has
    no graph, and can be copied.
    """
    for given in (first.images / 2, first.images.clone()):
        undone = restored_afterwards(network, accelerator.device)
        with undone, torch.no_grad(), accelerator.autocast():
            scores = network(given).float()
    # What is computed anew from the images is the same as after the first pass.
    now, before = kept_numbers(network), first.kept or {}
    if changed := [name for name, value in now.items() if value != before.get(name)]:
        return (
            f"a pass changes {some(changed)} of {short_name(recipe.model)}, which no checkpoint "
            "holds: keep in buffers (register_buffer) what lasts from step to step"
        )
    # In half precision, and on a GPU, other kernels may be taken where there are no gradients.
    is_exact = accelerator.device.type == "cpu" and accelerator.mixed_precision == "no"
    is_exact = is_exact and first_parameter(network).dtype in (torch.float32, torch.float64)
    if _are_close(first.scores, scores, 1e-3 if is_exact else 0.01):
        return ""
    return (
        f"a second pass of {short_name(recipe.model)} over the same images makes other scores: "
        "keep in buffers (register_buffer) what lasts from step to step, which no checkpoint holds"
    )


def _are_close(one: Tensor | None, two: Tensor | None, part: float = 0.01) -> bool:
    """Whether scores are the same to that part of them."""
    if one is None or two is None:  # a pass has failed
        return False
    return torch.allclose(one, two, rtol=part, atol=part / 10, equal_nan=True)


def describe_own_gradients(
    network: nn.Module, recipe: Recipe, first: TrainingPass, accelerator: Accelerator
) -> str:
    """Gradients that do not grow with the loss are no sum over ranks and passes; else empty.

    As where a hook limits or normalizes them in the pass of each rank.
    """
    louder = try_training_pass(network, recipe, first.images, accelerator, loudness=LOUDER)
    if not _are_close(first.scores, louder.scores):
        return ""  # it remembers the first pass, which is told of
    before, now = first.norms or {}, louder.norms or {}
    # What is 0 but for rounding, as that of a bias before BatchNorm, is any number on a GPU.
    rounding = 1e-5 * LOUDER * max(filter(math.isfinite, before.values()), default=0.0)
    odd = [
        name
        for name, norm in now.items()
        if math.isfinite(norm)
        and not math.isclose(norm, LOUDER * before.get(name, 0), rel_tol=1e-2, abs_tol=rounding)
    ]
    if not odd:
        return ""
    return (
        f"the gradients of {some(odd)} do not grow with the loss: a hook or a backward of "
        f"{short_name(recipe.model)} changes those of each pass for itself, so other numbers of "
        "ranks and passes train otherwise; clip_norm in the recipe limits their sum"
    )


@contextmanager
def _refusing_what_is_lost(network: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Refuse what a pass draws or changes that no checkpoint holds: it is lost to a resumed run."""
    saved = network.state_dict().keys()
    buffers = {name: b for name, b in network.named_buffers() if not is_lazy(b)}
    unsaved = {name: buffer.clone() for name, buffer in buffers.items() if name not in saved}
    before = global_states()
    yield
    buffers = dict(network.named_buffers())  # a pass may put others in their place
    changed = [name for name, value in unsaved.items() if not are_equal(buffers[name], value)]
    if changed:
        raise UserError(
            f"{code_name(recipe.model)} changes in training its buffer {some(changed)}, which is "
            "not persistent",
            expected="buffers that weights and checkpoints hold, for what lasts from step to step",
            instead="leave out persistent=False where it is registered",
        )
    now = global_states()
    used = [name for name in ("numpy", "Python") if now[name] != before[name]]
    if used:
        raise UserError(
            f"{code_name(recipe.model)} draws from the global generator of {' and '.join(used)}",
            expected="draws of torch, whose generator is seeded for each step, as a resumed run "
            "needs it",
            instead="write torch.rand(()).item() for random.random() in its forward, for example",
        )


def differing_values(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> list[str]:
    """The names of what two passes have changed, but not to the same values."""
    names = {**one, **two}
    return [n for n in names if not (n in one and n in two and are_equal(one[n], two[n]))]


def refuse_set_parameters(names: list[str], recipe: Recipe) -> None:
    """Refuse parameters into which a pass writes what follows from its images."""
    if names:
        raise UserError(
            f"{code_name(recipe.model)}, whose forward pass sets its parameter {some(names)} by "
            "the images",
            expected="parameters that are alike on all ranks, each of which has other images",
            instead="keep it in a buffer (register_buffer), or set it by the first images in "
            "initialize= of the recipe",
        )


def explain_torch_error(error: Exception, moment: str) -> UserError | None:
    """What a user can do about an exception of torch; None where it is no such one.

    torch has no exception types for them, so they are known by its words.
    """
    operation, refused, _ = str(error).partition(" does not have a deterministic impl")
    if refused:
        return UserError(
            f"deterministic=true, and {operation} {moment}",
            expected="operations for which torch has a deterministic algorithm",
            instead="use another layer, or type deterministic=false",
        )
    if "parameters that were not used in producing loss" in str(error):
        numbers = str(error).partition("did not receive grad for rank ")[2].partition("\n")[0]
        return UserError(
            f"parameters without a gradient, found {moment}, by number on rank {numbers}",
            expected="a gradient for each parameter in each step, for which several ranks wait",
            instead="leave out what the loss does not need, call requires_grad_(False) on it, or "
            "type unused_parameters=allow",
        )
    missing, is_sparse, _ = str(error).partition(" with arguments from the 'Sparse")
    if is_sparse:  # as the norm of sparse gradients before torch 2.14
        missing = missing.replace("Could", "could")
        return UserError(
            f"torch {torch.__version__}, {moment}: {missing} on a sparse tensor",
            expected="operations that this version of torch has for sparse gradients",
            instead="write sparse=False in nn.Embedding, or update torch",
        )
    return None
