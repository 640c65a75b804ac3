"""A network layer by layer, as two images go through it: shapes, parameters, flops, memory."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from launcher.training.network import restored_afterwards, watchable_leaves


@dataclass(frozen=True)
class Layer:
    """One call of a module without submodules. Shapes are those for all images given."""

    name: str  # as in named_modules: `fc1`, `layers.7`
    module: nn.Module
    given: tuple[int, ...]
    made: tuple[int, ...]
    parameters: int
    flops: int  # of the forward pass of one image
    activations: int  # bytes of the output for one image

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self.module).__name__

    def describe_shapes(self) -> tuple[str, str]:
        """The shapes of input and output for one image: `16 x 32 x 32`."""
        given, made = (" x ".join(map(str, shape[1:])) for shape in (self.given, self.made))
        return given, made

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        shapes = {"given": self.given, "made": self.made}
        work = {"flops": self.flops, "activations": self.activations}
        return {"name": self.name, "kind": self.kind, "parameters": self.parameters} | shapes | work


@dataclass
class Walk:
    """The layers that the images passed, and the one that raised an error."""

    network: nn.Module
    images: Tensor
    layers: list[Layer] = field(default_factory=list)
    output: Any = None
    error: Exception | None = None
    refused: tuple[str, nn.Module, tuple[int, ...]] | None = None  # and the shape of its input
    flops: int = 0  # of the forward pass of one image, in layers and between them


def walk(network: nn.Module, images: Tensor) -> Walk:
    """Run `(n, c, h, w)` through the network in evaluation mode, and leave it as it was."""
    found = Walk(network, images)
    was_training = network.training
    network.eval()
    counter = FlopCounterMode(display=False)
    # The counter follows gradients, and so fails where a network computes some by torch.func.
    for counting in (counter, nullcontext()):
        found.layers, found.refused, found.error = [], None, None
        try:
            with (
                restored_afterwards(network, images.device),
                torch.no_grad(),
                _plain_attention(),
                _watched(found, counter),
                counting,
            ):
                found.output = network(images.clone())  # it may write into them
            break
        except Exception as error:
            found.error = error
    network.train(was_training)
    found.flops = counter.get_total_flops() // len(images)
    return found


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as products and a softmax, whose flops torch can count on every device."""
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)


@contextmanager
def _watched(found: Walk, counter: FlopCounterMode) -> Iterator[None]:
    """Record each call of a module without submodules inside this context."""
    names = {module: name for name, module in found.network.named_modules()}
    images, done_before = len(found.images), 0

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal done_before
        found.refused = (names[module], module, _shape(inputs))
        done_before = counter.get_total_flops()

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        numbers = output.numel() * output.element_size() if isinstance(output, Tensor) else 0
        parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        given, made = _shape(inputs), _shape((output,))
        flops = (counter.get_total_flops() - done_before) // images
        sizes = (parameters, flops, numbers // images)
        found.layers.append(Layer(names[module], module, given, made, *sizes))
        found.refused = None

    leaves = watchable_leaves(found.network)
    handles = [module.register_forward_pre_hook(before) for module in leaves]
    handles += [module.register_forward_hook(after) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shape(values: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape of the first tensor; () where there is none."""
    tensors = (value for value in values if isinstance(value, Tensor) and not value.is_nested)
    return next((tuple(tensor.shape) for tensor in tensors), ())


def declared(network: nn.Module, name: str) -> str:
    """` (file, line n)` where the user's class makes a layer; empty where it cannot be told."""
    *parents, leaf = name.split(".")
    while leaf.isdecimal() and parents:  # within a Sequential: the line of that
        *parents, leaf = parents
    made_in = type(network.get_submodule(".".join(parents))).__init__
    try:
        file, (lines, first) = inspect.getsourcefile(made_in), inspect.getsourcelines(made_in)
    except (OSError, TypeError):
        return ""
    for number, line in enumerate(lines, first):
        if re.search(rf"\bself\.{re.escape(leaf)}\s*[=:]", line):
            return f" ({file}, line {number})"
    return ""
