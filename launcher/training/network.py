"""What is asked of any network: its parameters, its numbers, its state before a trial."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from launcher.utils.user_code import comparable

MemoryFormat = Literal["channels_last", "contiguous"]


def first_parameter(network: nn.Module) -> Tensor:
    """The parameter whose type the images are given: so a model in float64 trains in float64."""
    return next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))


def upcast(values: Tensor) -> Tensor:
    """Half precision as float32; wider types as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def names_of(network: nn.Module, parameters: Iterable[nn.Parameter]) -> list[str]:
    """The names of some of its parameters."""
    chosen = set(map(id, parameters))
    return [name for name, parameter in network.named_parameters() if id(parameter) in chosen]


def count_parameters(network: nn.Module) -> int:
    """The number of trained parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def shapes(network: nn.Module) -> dict[str, str]:
    """The shapes and types of its parameters and buffers, by name."""
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    return {
        name: f"{tuple(value.shape)} {value.dtype}{' frozen' * (name in frozen)}"
        for name, value in network.state_dict().items()
    }


def takes_hooks(module: nn.Module) -> bool:
    """Whether what is done in a module can be watched: what torch.jit has compiled cannot."""
    return not isinstance(module, torch.jit.ScriptModule)


def watchable_leaves(network: nn.Module) -> list[nn.Module]:
    """The modules without others in them, as far as they can be watched."""
    leaves = (module for module in network.modules() if not any(True for _ in module.children()))
    return [leaf for leaf in leaves if takes_hooks(leaf)]


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


def kept_numbers(network: nn.Module) -> dict[str, Any]:
    """What layers keep of numbers that are neither parameters nor buffers."""
    return {
        f"{name}.{attribute}".lstrip("."): comparable(value)
        for name, module in network.named_modules()
        for attribute, value in vars(module).items()
        if attribute[0] != "_" and attribute != "training"
    }


def changed_parameters(network: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the parameters that are others now than `before`, by name."""
    named = ((name, p.detach()) for name, p in network.named_parameters() if name in before)
    return {name: value.clone() for name, value in named if not are_equal(value, before[name])}


def are_equal(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors hold the same; what is no number is the same as itself."""
    if torch.equal(one, two):
        return True
    return one.shape == two.shape and torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)


@contextmanager
def restored_afterwards(network: nn.Module, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Put back parameters, buffers, gradients and random numbers at the end.

    What a lazy layer makes of its own in its first pass stays, and so do buffers that nobody saves:
    what a network computes once and keeps there. Yields the parameters as they were, by name.
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
    copies = {id(tensor): value for tensor, value in values}
    named = {n: copies[id(p)] for n, p in network.named_parameters() if id(p) in copies}
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield named
    finally:
        network.zero_grad()
        with torch.no_grad():
            for buffers, before in places:
                for name, buffer in before.items():
                    if buffers[name] is not buffer:
                        buffers[name] = buffer
            for tensor, value in values:
                if tensor.shape == value.shape and 0 not in tensor.stride():
                    tensor.copy_(value)
                else:  # resized by an observer of a quantization, or expanded: one value for many
                    tensor.data = value
