"""From a recipe to its network: built, tried on two images, initialized, placed on the device."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from launcher.config.recipe import Recipe
from launcher.config.serialize import code_name, short_name
from launcher.data.batches import Normalize
from launcher.data.images import ImageSet
from launcher.data.sources import NAMELESS
from launcher.distributed.accelerator import count_over_ranks
from launcher.errors import UserError
from launcher.utils.text import some
from launcher.utils.user_code import (
    comparable,
    global_states,
    is_users,
    place_of,
    seeded_draws,
    user_line,
    user_location,
)

INITIAL_IMAGES = 5000  # training images that a data-dependent initialization sees
_PURE = {"pure_bf16": torch.bfloat16, "pure_fp16": torch.float16}
_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
_SHAPE_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
)  # what torch raises for wrong shapes

MemoryFormat = Literal["channels_last", "contiguous"]


def build_network(recipe: Recipe, data: ImageSet) -> nn.Module:
    """Build the network from the recipe's seed and try it on two images.

    Raises `UserError` where it cannot be built, cannot take the images, or its output does not fit
    the classes.
    """
    if len(data.classes) < 2:
        raise UserError(
            f"images of the class {data.classes[0]} alone",
            expected="two classes at least, between which the scores decide",
            instead="add images of another class",
        )
    name = code_name(recipe.model)
    try:
        network = _drawn(recipe)
        found = f"makes {type(network).__name__}{place_of(recipe.model)}"
    except Exception as error:  # such as of a library that cannot download its weights
        network = None
        found = f"cannot be built: {type(error).__name__}: {error}{user_location(error)}"
    if not isinstance(network, nn.Module):
        raise UserError(
            f"{name} {found}",
            expected="a class or a function that makes an nn.Module from these settings",
            instead="correct that line, or see launcher RECIPE --help for the model's settings",
        )
    before, images = _values(network), two_images(network, recipe, data, "contiguous")
    shape, after = _try_first_pass(network, images, recipe)
    if _differing(before, after):  # it may be a constraint, which is the same for any images
        _, others = _try_first_pass(_drawn(recipe), images / 2, recipe)
        _refuse_changed(_differing(after, others), recipe)
    expected = (2, len(data.classes))
    if shape != expected:
        nameless = "; or give the data set a list `classes` of their names: without one it has ten"
        raise UserError(
            f"{name} turns 2 images into an output of shape {shape}",
            expected=f"{expected}, one score for each of the {len(data.classes)} classes",
            instead="change the size of the model's last layer"
            + nameless * (data.classes == NAMELESS),
        )
    return network


def _drawn(recipe: Recipe) -> Any:
    with seeded_draws(recipe.seed):
        return recipe.model()


def _values(network: nn.Module) -> dict[str, Tensor]:
    """Copies of its parameters; those of lazy layers are made by the first pass."""
    named: Iterable[tuple[str, Tensor]] = network.named_parameters()
    return {name: value.detach().clone() for name, value in named if not is_lazy(value)}


def _differing(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """The names of the values that both have, and that are not the same."""
    return [n for n, value in after.items() if n in before and not torch.equal(value, before[n])]


def _refuse_changed(names: list[str], recipe: Recipe) -> None:
    """Refuse parameters into which a pass writes what follows from its images."""
    if names:
        raise UserError(
            f"{code_name(recipe.model)}, whose forward pass sets its parameter {some(names)} by "
            "the images",
            expected="parameters that are alike on all ranks, each of which has other images",
            instead="keep it in a buffer (register_buffer), or set it by the first images in "
            "initialize= of the recipe",
        )


def two_images(
    network: nn.Module, recipe: Recipe, data: ImageSet, memory_format: MemoryFormat
) -> Tensor:
    """The first image twice, normalized: `(2, c, h, w)`."""
    is_contiguous = memory_format == "contiguous"
    like = first_parameter(network)
    normalize = Normalize(recipe.data, data.shape, like, is_contiguous)
    return normalize(data.pixels(slice(1)).to(like.device).expand(2, -1, -1, -1))


def _try_first_pass(
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
            after = _values(network)
    except Exception as error:
        if not is_users(error, _SHAPE_ERRORS):
            raise  # of the launcher's own
        raise _refused_images(code_name(recipe.model), images, error) from error
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


def _refused_images(name: str, images: Tensor, error: Exception, mode: str = "") -> UserError:
    where = user_location(error)
    what = error if isinstance(error, _SHAPE_ERRORS) else f"{type(error).__name__}: {error}"
    return UserError(
        f"{name} fails on images of shape {tuple(images.shape)}{mode}: {what}{where}",
        expected="a model that takes (n, channels, height, width)",
        instead="see which layer does not fit, and what to write: type launcher check RECIPE",
    )


def first_parameter(network: nn.Module) -> Tensor:
    """The parameter whose type the images are given: so a model in float64 trains in float64."""
    return next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))


def initialize(network: nn.Module, recipe: Recipe, images: ImageSet, device: torch.device) -> None:
    """Move the network to the device and run the recipe's initialization, if it has one."""
    network.to(device)
    if recipe.initialize is not None:
        like = upcast(first_parameter(network))
        normalize = Normalize(recipe.data, images.shape, like, contiguous=False)
        first = normalize(images.pixels(slice(INITIAL_IMAGES)).to(device))
        try:
            with torch.no_grad(), seeded_draws(recipe.seed):
                recipe.initialize(network, first)
        except Exception as error:
            if not is_users(error, _SHAPE_ERRORS):
                raise  # of the launcher's own
            what = f"{type(error).__name__}: {error}{user_location(error)}"
            raise UserError(
                f"{code_name(recipe.initialize)} fails: {what}",
                expected=f"a function of the network and of images {tuple(first.shape)}",
                instead="correct that line, or type initialize=none",
            ) from error


def upcast(values: Tensor) -> Tensor:
    """Half precision as float32; wider types as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class PlacedNetwork:
    """A network on its device, in a memory format; `notes` are lines for the user."""

    network: nn.Module
    memory_format: MemoryFormat
    notes: tuple[str, ...] = ()


def place_network(
    network: nn.Module, recipe: Recipe, accelerator: Accelerator, data: ImageSet
) -> PlacedNetwork:
    """Move the network to the device, in the recipe's precision and memory format.

    Raises `UserError` for SyncBatchNorm on a CPU, and where a pass in training mode fails.
    """
    if recipe.sync_batch_norm:
        network = _with_sync_batch_norm(network, accelerator)
    network = _in_pure_precision(network.to(accelerator.device), recipe)
    before = _attributes(network)
    placed = _choose_memory_format(network, recipe, accelerator, data)
    if hidden := layers_in_lists(network):
        note = (
            f"layers in {some(list(hidden))} of {short_name(recipe.model)} are neither trained nor "
            "saved: write nn.ModuleList([...]) for [...], or nn.ModuleDict, if they are to be"
        )
        placed = replace(placed, notes=(*placed.notes, note))
    after = _attributes(network)
    if after == before:
        return _with_note_of_state(placed, recipe, data, accelerator)
    # What is computed anew from the images is the same after a second pass over them.
    images = two_images(network, recipe, data, placed.memory_format)
    _try_training_pass(network, recipe, images, accelerator)
    changed = [name for name, value in _attributes(network).items() if value != after.get(name)]
    if not changed:
        return placed
    note = (
        f"a pass changes {some(changed)} of {short_name(recipe.model)}, which no checkpoint holds: "
        "keep in buffers (register_buffer) what lasts from step to step"
    )
    return replace(placed, notes=(*placed.notes, note))


def _with_note_of_state(
    placed: PlacedNetwork, recipe: Recipe, data: ImageSet, accelerator: Accelerator
) -> PlacedNetwork:
    """Note what two passes over the same images, with the same draws, show of a hidden state."""
    network, scores = placed.network, list[Tensor]()
    for _ in range(2):
        images = two_images(network, recipe, data, placed.memory_format)  # it may write into them
        undone = restored_afterwards(network, accelerator.device)
        with undone, torch.no_grad(), accelerator.autocast():
            scores += [network(images).float()]
    first, second = scores
    if torch.allclose(first, second, rtol=0.01, atol=0.001, equal_nan=True):
        return placed
    note = (
        f"a second pass of {short_name(recipe.model)} over the same images makes other scores: "
        "keep in buffers (register_buffer) what lasts from step to step, which no checkpoint holds"
    )
    return replace(placed, notes=(*placed.notes, note))


def layers_in_lists(network: nn.Module) -> dict[str, list[nn.Module]]:
    """By attribute, the layers that torch does not see, since they stand in a list or the like.

    Those that have something to train or to save: transforms of torchvision, say, have not.
    """
    known, found = set(network.modules()), dict[str, list[nn.Module]]()
    for name, module in network.named_modules():
        for attribute, value in vars(module).items():
            if attribute[0] == "_" or not isinstance(value, list | tuple | dict):
                continue
            items = value.values() if isinstance(value, dict) else value
            hidden = [x for x in items if isinstance(x, nn.Module) and x not in known]
            if any(layer.state_dict() for layer in hidden):
                found[f"{name}.{attribute}".lstrip(".")] = hidden
    return found


def _attributes(network: nn.Module) -> dict[str, Any]:
    """What layers keep of numbers that are neither parameters nor buffers."""
    return {
        f"{name}.{attribute}".lstrip("."): comparable(value)
        for name, module in network.named_modules()
        for attribute, value in vars(module).items()
        if attribute[0] != "_" and attribute != "training"
    }


def _with_sync_batch_norm(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    if accelerator.device.type == "cpu":
        raise UserError(
            "sync_batch_norm=true on a CPU",
            expected="GPUs: torch synchronizes BatchNorm only there",
            instead="type sync_batch_norm=false",
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]


def _in_pure_precision(network: nn.Module, recipe: Recipe) -> nn.Module:
    """All but BatchNorm, whose statistics need float32, in the recipe's pure half precision."""
    if recipe.precision in _PURE:
        network.to(_PURE[recipe.precision])
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.float()
    return network


def _choose_memory_format(
    network: nn.Module, recipe: Recipe, accelerator: Accelerator, data: ImageSet
) -> PlacedNetwork:
    """Put the network into the recipe's format, or for auto into channels_last if it takes it.

    A format is tried on two images, forward and backward in training mode; all ranks choose alike.
    """
    wanted, note = recipe.memory_format, ""
    formats: tuple[MemoryFormat, ...] = ("channels_last", "contiguous")
    if wanted != "auto":
        formats = (wanted,)
    for memory_format in formats:
        network.to(memory_format=_FORMATS[memory_format])
        images = two_images(network, recipe, data, memory_format)
        error, unused = _try_training_pass(network, recipe, images, accelerator)
        if not count_over_ranks(accelerator, error is not None):
            if recipe.unused_parameters == "refuse":
                unused_ranks = count_over_ranks(accelerator, bool(unused))
                if unused_ranks:
                    shown = some(unused) if unused else "those named on another rank"
                    raise unused_parameters(recipe, shown)
            return PlacedNetwork(network, memory_format, (note,) if note else ())
        refusal = error or RuntimeError("it fails on another rank")
        note = note or _contiguous_note(recipe, refusal)
    if wanted == "channels_last":
        raise UserError(
            f"memory_format=channels_last, which {short_name(recipe.model)} refuses: {refusal}"
            f"{user_location(refusal)}",
            expected="a model that takes it, forward and backward",
            instead="write x.flatten(1) for x.view(x.size(0), -1), or type memory_format=auto",
        )
    name = code_name(recipe.model)
    raise _refused_images(name, images, refusal, " in training mode") from refusal


def unused_parameters(recipe: Recipe, names: str, moment: str = "") -> UserError:
    """What is wrong with a network that does not use the parameters of these names."""
    when = f" {moment}" if moment else ""
    return UserError(
        f"parameters of {code_name(recipe.model)} that its scores{when} do not depend on: {names}",
        expected="a gradient for each parameter in each step, for which several ranks wait",
        instead="leave them out, call requires_grad_(False) on them, or type "
        "unused_parameters=allow",
    )


def _contiguous_note(recipe: Recipe, error: Exception) -> str:
    """Why a network trains in the contiguous format, and what to write to be faster."""
    line = user_line(error)
    name = short_name(recipe.model)
    if line is None or ".view(" not in (line.line or ""):
        return f"{name} refuses channels_last, the faster format{user_location(error)}: {error}"
    return (
        f"{line.filename}, line {line.lineno}: `{line.line}` refuses channels_last, "
        "the faster format; write x.flatten(1) or x.reshape(...) there"
    )


def _try_training_pass(
    network: nn.Module, recipe: Recipe, images: Tensor, accelerator: Accelerator
) -> tuple[Exception | None, list[str]]:
    """Run forward and backward as in training, and leave no trace.

    Returns what torch refuses, and the names of the parameters that got no gradient. Raises
    `UserError` for an output that is no tensor of scores.
    """
    network.train()
    try:
        with restored_afterwards(network, accelerator.device):
            before = _values(network)
            with accelerator.autocast(), _refusing_what_is_lost(network, recipe):
                output = network(images)
            after = _values(network)
            _refuse_several_outputs(output, recipe, " in training mode")
            if output.requires_grad:
                upcast(output).square().sum().backward()  # type: ignore[no-untyped-call]
            trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
            unused = [name for name, p in trained if p.grad is None]
        with restored_afterwards(network, accelerator.device), torch.no_grad():
            # What the network keeps of a pass is then without its graph, and can be copied.
            with accelerator.autocast():
                network(images / 2)
            if _differing(before, after):
                _refuse_changed(_differing(after, _values(network)), recipe)
        return None, unused
    except torch.OutOfMemoryError:
        raise
    except _SHAPE_ERRORS as error:
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


@contextmanager
def restored_afterwards(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back parameters, buffers, gradients and random numbers at the end.

    What a lazy layer makes of its own in its first pass stays, and so do buffers that nobody saves:
    what a network computes once and keeps there.
    """
    # A pass may put other buffers in their place, of another shape or where there was none.
    places = [
        (module._buffers, {n: b for n, b in module._buffers.items() if n not in unsaved})
        for module in network.modules()
        for unsaved in (getattr(module, "_non_persistent_buffers_set", ()),)
    ]
    tensors = [
        *network.parameters(),
        *(b for _, own in places for b in own.values() if b is not None),
    ]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors if not is_lazy(tensor)]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        network.zero_grad()
        with torch.no_grad():
            for buffers, before in places:
                for name, buffer in before.items():
                    if buffers[name] is not buffer:
                        buffers[name] = buffer
            for tensor, value in values:
                if tensor.shape == value.shape:
                    tensor.copy_(value)
                else:  # an observer of a quantization resizes what it has
                    tensor.data = value


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
    return None


def names_of(network: nn.Module, parameters: Iterable[nn.Parameter]) -> list[str]:
    """The names of some of its parameters."""
    chosen = set(map(id, parameters))
    return [name for name, parameter in network.named_parameters() if id(parameter) in chosen]


def count_parameters(network: nn.Module) -> int:
    """The number of trained parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
