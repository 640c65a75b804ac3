"""A network is tried on two images before the training: forwards, and backwards as in a step.

It is refused, or a line says so, where it cannot take the images, where the ranks would have other
weights, and where it keeps what no checkpoint holds. Each trial is undone.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from launcher.errors import UserError
from launcher.training.network import MemoryFormat, first_parameter, restored_afterwards, upcast
from launcher.utils.text import some
from launcher.utils.user_code import global_states, is_users, user_location

SHAPE_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
)  # what torch raises for wrong shapes


def two_images(
    network: nn.Module, recipe: Recipe, data: ImageSet, memory_format: MemoryFormat
) -> Tensor:
    """The first image twice, normalized: `(2, c, h, w)`."""
    is_contiguous = memory_format == "contiguous"
    like = first_parameter(network)
    normalize = Normalize(recipe.data, data.shape, like, is_contiguous)
    return normalize(data.pixels(slice(1)).to(like.device).expand(2, -1, -1, -1))


def try_first_pass(
    network: nn.Module, images: Tensor, recipe: Recipe
) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """The shape of the output, and the parameters as the pass has left them; it is undone."""
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
        with torch.no_grad(), restored_afterwards(network, images.device):
            output = network(images)
            after = parameter_values(network)
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
    return tuple(output.shape), after


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


def try_training_pass(
    network: nn.Module, recipe: Recipe, images: Tensor, accelerator: Accelerator
) -> tuple[Exception | None, list[str]]:
    """Run forward and backward as in training, and leave no trace.

    Returns what torch refuses, and the names of the parameters that got no gradient. Raises
    `UserError` for an output that is no tensor of scores.
    """
    network.train()
    try:
        with restored_afterwards(network, accelerator.device):
            before = parameter_values(network)
            with accelerator.autocast(), _refusing_what_is_lost(network, recipe):
                output = network(images)
            after = parameter_values(network)
            _refuse_several_outputs(output, recipe, " in training mode")
            if output.requires_grad:
                upcast(output).square().sum().backward()  # type: ignore[no-untyped-call]
            trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
            unused = [name for name, p in trained if p.grad is None]
        with restored_afterwards(network, accelerator.device), torch.no_grad():
            # What the network keeps of a pass is then without its graph, and can be copied.
            with accelerator.autocast():
                network(images / 2)
            if differing_values(before, after):
                refuse_set_parameters(differing_values(after, parameter_values(network)), recipe)
        return None, unused
    except torch.OutOfMemoryError:
        raise
    except SHAPE_ERRORS as error:
        if refusal := explain_torch_error(error, "before training"):
            raise refusal from None
        return error, []


@contextmanager
def _refusing_what_is_lost(network: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Refuse what a pass draws or changes that no checkpoint holds: it is lost to a resumed run."""
    saved = network.state_dict().keys()
    buffers = {name: b for name, b in network.named_buffers() if not is_lazy(b)}
    unsaved = {name: buffer.clone() for name, buffer in buffers.items() if name not in saved}
    before = global_states()
    yield
    buffers = dict(network.named_buffers())  # a pass may put others in their place
    changed = [name for name, value in unsaved.items() if not torch.equal(buffers[name], value)]
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


def parameter_values(network: nn.Module) -> dict[str, Tensor]:
    """Copies of its parameters; those of lazy layers are made by the first pass."""
    named: Iterable[tuple[str, Tensor]] = network.named_parameters()
    return {name: value.detach().clone() for name, value in named if not is_lazy(value)}


def differing_values(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """The names of the values that both have, and that are not the same."""
    return [n for n, value in after.items() if n in before and not torch.equal(value, before[n])]


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


def describe_hidden_state(
    network: nn.Module,
    recipe: Recipe,
    data: ImageSet,
    memory_format: MemoryFormat,
    accelerator: Accelerator,
) -> str:
    """What two passes over the same images, with the same draws, show of it; else empty."""
    scores = []
    for _ in range(2):
        images = two_images(network, recipe, data, memory_format)  # it may write into them
        undone = restored_afterwards(network, accelerator.device)
        with undone, torch.no_grad(), accelerator.autocast():
            scores.append(network(images).float())
    first, second = scores
    if torch.allclose(first, second, rtol=0.01, atol=0.001, equal_nan=True):
        return ""
    return (
        f"a second pass of {short_name(recipe.model)} over the same images makes other scores: "
        "keep in buffers (register_buffer) what lasts from step to step, which no checkpoint holds"
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
