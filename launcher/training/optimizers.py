"""Optimizers that torch does not have: Muon for convolutions, and several optimizers as one.

The slot `optimizer` of a recipe is called with pairs of names and parameters, as
`network.named_parameters()` gives them; torch's own optimizers take them as they are. A function
in a recipe can divide them and give each group its own rate and schedule:

    def divided(parameters: NamedParameters, *, lr: float = 0.1) -> Optimizer:
        named = list(parameters)
        filters = [pair for pair in named if pair[1].ndim == 4]
        others = [pair for pair in named if pair[1].ndim != 4]
        sgd = SGD([{"params": others, "schedule": cosine}], lr=lr)
        return ChainedOptimizer(Muon(filters, lr=lr), sgd)

The schedule of a group stands in for the recipe's. While it is exactly zero, no gradient of the
group is computed (on several ranks it is, and has no effect).

`optimizer_setup` calls the slot, and refuses what cannot be trained with.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.optim import Optimizer

from launcher.config.slots import NamedParameters

# The quintic whose slope at zero is the steepest of those that stay near one (Jordan, see Muon).
_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315
Settings = ParamSpec("Settings")


class Muon(Optimizer):
    """Nesterov momentum whose step is orthogonalized: for the filters of convolutions.

    Each parameter is read as a matrix with one row per filter. A filter bank keeps the norm
    sqrt(filters), which suits convolutions with a normalization behind them. `lr` is the size of
    a step in those units and does not depend on the scale of the loss.

    Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); with
    the fixed norm in Jordan's script airbench94_muon. torch's own Muon takes matrices only.
    """

    def __init__(
        self, params: NamedParameters, lr: float, *, momentum: float = 0.6, newton_steps: int = 3
    ) -> None:
        """Raises `ValueError` for settings out of range, and parameters without rows."""
        if lr < 0 or not 0 <= momentum < 1 or newton_steps < 1:
            raise ValueError(f"lr={lr}, momentum={momentum}, newton_steps={newton_steps}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "newton_steps": newton_steps})
        if any(p.ndim < 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("a parameter of one dimension, which Muon cannot orthogonalize")
        self._update = _update

    def compile(self, is_wanted: bool = True) -> None:
        """Fuse the step into few kernels, or leave it as it is written."""
        self._update = torch.compile(_update, dynamic=False) if is_wanted else _update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the parameters; those without a gradient stay."""
        for group in self.param_groups:
            filters = [p for p in group["params"] if p.grad is not None]
            if not filters:
                continue
            momenta = [self._momentum(p) for p in filters]
            gradients = [p.grad for p in filters]
            rate = torch.full((), group["lr"], device=filters[0].device)  # constant to a compiler
            banks = [p.detach() for p in filters]
            self._update(banks, gradients, momenta, rate, group["momentum"], group["newton_steps"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


class ChainedOptimizer(Optimizer):
    """Several optimizers as one, with the groups and the state of all."""

    def __init__(self, *parts: Optimizer) -> None:
        """Each part has parameters of its own."""
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            self.state.update(part.state)
        self._use_common_state()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every part."""
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over groups and state as `state_dict()` gave them."""
        super().load_state_dict(state_dict)
        self._use_common_state()

    def _use_common_state(self) -> None:
        """Let the parts use these very groups and this state."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]


def no_decay(
    kind: Callable[Concatenate[Any, Settings], Optimizer],
    *args: Settings.args,
    **settings: Settings.kwargs,
) -> Callable[[NamedParameters], Optimizer]:
    """An optimizer without weight decay for norms and biases: parameters of one dimension or none.

    A value for the slot: `optimizer=no_decay(AdamW, lr=1e-3, weight_decay=0.05)`. Its settings are
    `optimizer.base.lr` and so on.
    """
    return partial(without_decay, base=partial(kind, *args, **settings))


def without_decay(params: NamedParameters, *, base: Callable[..., Optimizer]) -> Optimizer:
    """What `no_decay` fills in: `base` with two groups of parameters."""
    named = list(params)
    decayed = [pair for pair in named if pair[1].ndim > 1]
    others = [pair for pair in named if pair[1].ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = base([group for group in groups if group["params"]])
    if "weight_decay" not in optimizer.defaults:
        raise ValueError(f"{type(optimizer).__name__} has no weight_decay that no_decay could set")
    return optimizer


def orthogonalize(matrices: Tensor, newton_steps: int) -> Tensor:
    """Bring all singular values near one: `(n, rows, columns)` -> the same shape.

    A Newton-Schulz iteration of fifth order; a few steps leave them between about 0.5 and 1.5.
    Half precision is computed in bfloat16, whose range suits it; wider types in their own.
    """
    turn = matrices.shape[1] > matrices.shape[2]
    work = matrices.mT if turn else matrices
    work = work.bfloat16() if work.element_size() == 2 else work
    work = work / (work.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(newton_steps):
        gram = work @ work.mT
        work = _LINEAR * work + (_CUBIC * gram + _QUINTIC * gram @ gram) @ work
    return (work.mT if turn else work).to(matrices.dtype)


def _update(
    banks: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    rate: Tensor,
    momentum: float,
    newton_steps: int,
) -> None:
    """One step of Muon; filter banks of one shape are orthogonalized together."""
    alike: dict[torch.Size, list[int]] = {}
    for index, bank in enumerate(banks):
        alike.setdefault(bank.shape, []).append(index)
    for indices in alike.values():
        directions = []
        for index in indices:
            momenta[index].mul_(momentum).add_(gradients[index])
            directions.append(gradients[index].add(momenta[index], alpha=momentum).flatten(1))
        steps = orthogonalize(torch.stack(directions), newton_steps)
        for index, step in zip(indices, steps.unbind(), strict=True):
            bank = banks[index]
            bank.mul_(len(bank) ** 0.5 / bank.norm())
            bank.sub_(rate.to(step.dtype) * step.view(bank.shape))
