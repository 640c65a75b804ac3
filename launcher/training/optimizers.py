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

`make_optimizer` is the one place where the slot is called: it answers what cannot be trained with.
"""

import difflib
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from numbers import Real
from typing import Any, Concatenate, ParamSpec

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.config.recipe import Recipe
from launcher.config.serialize import code_name
from launcher.config.settings import children
from launcher.config.slots import NamedParameters
from launcher.errors import UserError
from launcher.utils.text import count, some
from launcher.utils.user_code import (
    comparable,
    function_of,
    is_users,
    place_of,
    user_location,
)

MOST_RATE = 1e35  # of learning: with more, what Adam makes of it is no float32
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


def make_optimizer(recipe: Recipe, network: nn.Module) -> Optimizer:
    """The recipe's optimizer for the trained parameters of a network.

    A rate that is a tensor is taken as its number. Raises `UserError` for what cannot be trained
    with.
    """
    return _made(recipe, list(network.named_parameters()))


def _made(recipe: Recipe, parameters: list[tuple[str, nn.Parameter]]) -> Optimizer:
    _refuse_settings(recipe.optimizer)
    if isinstance(recipe.optimizer, partial) and recipe.optimizer.args:
        raise UserError(
            f"{code_name(recipe.optimizer)} with {some(list(map(repr, recipe.optimizer.args)))}, "
            "which stands where the parameters come",
            expected="settings by their names",
            instead="write lr=0.1 for 0.1, for example, in the recipe file",
        )
    named = [(n, p) for n, p in parameters if p.requires_grad]
    if not named:
        raise UserError(
            f"{code_name(recipe.model)}, which has no parameter to train",
            expected="at least one that requires a gradient",
            instead="leave out requires_grad_(False) for some, in the recipe file",
        )
    try:
        with warnings.catch_warnings():  # of what is refused below
            warnings.filterwarnings("ignore", message=".*group with duplicate parameters")
            optimizer = recipe.optimizer(named)
    except Exception as error:
        if not is_users(error, (ValueError, TypeError)):
            raise  # of the launcher's own
        raise _refused_settings(recipe, error) from error
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            f"{code_name(recipe.optimizer)} returns {type(optimizer).__name__}"
            f"{place_of(recipe.optimizer)}",
            expected="an optimizer of torch",
            instead="end the function with `return` and the optimizer",
        )
    _refuse_unfinished(optimizer)
    _refuse_modes(optimizer)
    for part in _parts(optimizer):
        _refuse_closure(part)
        _refuse_misspelt(part)
        _refuse_other_types(part)
    for group in optimizer.param_groups:
        plain = {n: v.item() for n, v in group.items() if isinstance(v, numpy.generic)}
        group.update(plain)  # a checkpoint holds no numbers of numpy
        if group.get("lr") is None:
            raise UserError(
                f"{code_name(recipe.optimizer)}, of which a group has no lr",
                expected="a rate, which the schedule multiplies, in each group",
                instead=f"write partial({type(optimizer).__name__}, lr=0.01) in the recipe file, "
                "or lr into the defaults of a class of your own",
            )
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].item()
        for name in ("lr", "momentum"):
            _refuse_number(name, group.get(name), f"write a group or an optimizer with {name}=")
    _refuse_other_parameters(optimizer, parameters, recipe)
    fuse(optimizer)
    return optimizer


def _refuse_unfinished(optimizer: Optimizer) -> None:
    """Refuse one whose class has not called torch's own `__init__`."""
    try:
        optimizer.state_dict()
        _ = optimizer.defaults
    except AttributeError as error:
        kind = type(optimizer).__name__
        raise UserError(
            f"{kind}, whose state cannot be read: {error}{user_location(error)}",
            expected="an optimizer that torch's class has prepared",
            instead="call super().__init__(params, defaults) in its __init__",
        ) from error


def _refuse_modes(optimizer: Optimizer) -> None:
    """Refuse one that has other weights for an evaluation, for which nothing here asks it."""
    if any(callable(getattr(optimizer, name, None)) for name in ("train", "eval")):
        raise UserError(
            f"{type(optimizer).__name__}, whose train() and eval() exchange the weights",
            expected="an optimizer whose parameters are those to evaluate and to save",
            instead="write optimizer=partial(AdamW, lr=0.001) and average=ema, for example",
        )


def _refused_settings(recipe: Recipe, error: Exception) -> UserError:
    name = code_name(recipe.optimizer)
    where = user_location(error)
    if "'tuple' object has no attribute" in str(error):  # a pair was taken for a parameter
        return UserError(
            f"{name} fails: {error}{where}",
            expected="a function of pairs (name, parameter), as network.named_parameters() has",
            instead="write `for name, p in params` for `for p in params`",
        )
    if not isinstance(error, ValueError | TypeError):
        return UserError(
            f"{name} fails: {type(error).__name__}: {error}{where}",
            expected="a function of pairs (name, parameter) that returns an optimizer",
            instead="correct it in the recipe file",
        )
    return UserError(
        f"{name} refuses its settings: {error}{where}",
        expected="settings that this optimizer takes",
        instead="see launcher RECIPE --help",
    )


def _refuse_settings(slot: Any, prefix: str = "optimizer.") -> None:
    """Refuse the settings of torch's classes in the slot under the names to type for them."""
    function = function_of(slot)
    if isinstance(function, type) and issubclass(function, Optimizer):
        for setting in children(slot, prefix):
            _refuse_number(setting.name, setting.value, f"type {setting.name}=")
    else:
        for part in children(slot, prefix):
            if callable(part.value):
                _refuse_settings(part.value, f"{part.name}.")


def _refuse_number(name: str, value: Any, instead: str) -> None:
    """Refuse a rate or a momentum with which no training succeeds."""
    kind = name.rpartition(".")[2]
    if kind not in ("lr", "momentum") or value is None:
        return
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    is_number = isinstance(number, Real) and not isinstance(number, bool)
    limit = 1 if kind == "momentum" else MOST_RATE
    if not (is_number and 0 <= number < limit):
        raise UserError(
            f"{name}={value!r}",
            expected=f"a number of at least 0 and below {limit}",
            instead=f"{instead}{0.9 if kind == 'momentum' else 0.01}, for example",
        )


def _refuse_misspelt(optimizer: Optimizer) -> None:
    """Refuse an option of a group that is nearly one of the optimizer's: torch passes it over."""
    known = list(optimizer.defaults)
    for name in {name for group in optimizer.param_groups for name in map(str, group)}:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if close and name not in known:
            raise UserError(
                f"a group of {type(optimizer).__name__} with {name!r}",
                expected="options of this optimizer, which ignores all others",
                instead=f"write {close[0]!r} in the recipe file",
            )


def _refuse_other_types(optimizer: Optimizer) -> None:
    """Refuse what is no number where the optimizer's own default is one, and negative ones.

    torch looks at the defaults only, and not at what a group has of its own.
    """
    for group in optimizer.param_groups:
        for name, default in optimizer.defaults.items():
            if not isinstance(default, Real) or isinstance(default, bool):
                continue
            value: Any = group.get(name)
            least = -MOST_RATE if default < 0 else 0
            is_number = isinstance(value, Real | Tensor) and not isinstance(value, bool)
            if not (is_number and least <= value < MOST_RATE):
                raise UserError(
                    f"a group of {type(optimizer).__name__} with {name}={value!r}",
                    expected=f"a number of at least {least:g} and below {MOST_RATE:g}",
                    instead=f"write {name}={default} in the recipe file",
                )


def _refuse_closure(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose step evaluates the loss again, which the launcher does not."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(
            f"{type(optimizer).__name__}, whose step needs a closure",
            expected="an optimizer that takes one gradient per step",
            instead="write optimizer=partial(AdamW, lr=0.001), for example, in the recipe file",
        )


def _refuse_other_parameters(
    optimizer: Optimizer, parameters: list[tuple[str, nn.Parameter]], recipe: Recipe
) -> None:
    """Refuse parameters that the network has not, and one that is given twice."""
    names = {id(p): name for name, p in parameters}
    given = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    if not given:
        raise UserError(
            f"{code_name(recipe.optimizer)} trains nothing",
            expected="parameters in at least one group",
            instead="give the optimizer what the function is given",
        )
    if foreign := given.keys() - names.keys():
        raise UserError(
            f"{code_name(recipe.optimizer)} trains {count(len(foreign), 'tensor')} that the "
            "network does not have",
            expected="parameters of the network only",
            instead="give the optimizer what the function is given",
        )
    if twice := [names[key] for key, times in given.items() if times > 1]:
        raise UserError(
            f"{code_name(recipe.optimizer)} gives the optimizer {twice[0]} twice",
            expected="each parameter once",
            instead="leave it out of one of the lists",
        )


def freeze_left_out(optimizer: Optimizer, network: nn.Module) -> str:
    """Compute no gradients of parameters that the optimizer has not: nothing would clear them.

    Returns a line that names them; empty where there are none.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left = [n for n, p in network.named_parameters() if p.requires_grad and id(p) not in trained]
    for name in left:
        network.get_parameter(name).requires_grad_(False)
    return f"not in the optimizer, so never changed: {some(left)}" if left else ""


def _parts(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizers that several as one consist of, or the one."""
    yield from optimizer.parts if isinstance(optimizer, ChainedOptimizer) else (optimizer,)


def try_step(recipe: Recipe, network: nn.Module, state: dict[str, Any] | None = None) -> list[str]:
    """A step of the recipe's optimizer on copies of the parameters, with gradients of one.

    It begins with a saved state, where there is one, and with gradients that are as sparse. Returns
    the names of the numbers and tensors beside the state that the step changes. Raises what the
    optimizer's code does, or torch's: as for gradients that must be sparse, or a state of other
    parameters.
    """
    optimizer = _made(recipe, _copies(network.named_parameters()))
    if state is not None:
        load_state(optimizer, deepcopy(state))  # it would take the tensors as they are
    before = _own(optimizer)
    _step(optimizer)
    return [name for name, value in _own(optimizer).items() if value != before.get(name)]


def goes_on(recipe: Recipe, network: nn.Module) -> bool:
    """Whether an optimizer goes on from a saved state as the one from which it is.

    At another rate, which the groups that it then has must have told it.
    """
    parameters = _copies(network.named_parameters())
    first = _made(recipe, parameters)
    _step(first)
    others = _copies(parameters)
    second = _made(recipe, others)
    load_state(second, deepcopy(first.state_dict()))
    bring_steps(second)
    for optimizer in (first, second):
        for group in optimizer.param_groups:
            group["lr"] /= 2
        _step(optimizer)
    pairs = zip(parameters, others, strict=True)
    with torch.no_grad():
        return all(torch.equal(one.nan_to_num(), two.nan_to_num()) for (_, one), (_, two) in pairs)


def load_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Take over a saved state with its tensors in their own type: torch gives them the weights'."""
    optimizer.load_state_dict(saved)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter, {})
        for name, value in saved["state"].get(number, {}).items():
            taken = state.get(name)
            if isinstance(value, Tensor) and isinstance(taken, Tensor):
                state[name] = taken if taken.dtype == value.dtype else value.to(taken.device)


def _copies(named: NamedParameters) -> list[tuple[str, nn.Parameter]]:
    return [(name, deepcopy(parameter)) for name, parameter in named]


def _step(optimizer: Optimizer) -> None:
    """A step with gradients of one, which are sparse where the state is."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = torch.ones_like(parameter)
            kept = optimizer.state.get(parameter, {}).values()
            is_sparse = any(isinstance(value, Tensor) and value.is_sparse for value in kept)
            parameter.grad = gradient.to_sparse(1) if is_sparse else gradient
    optimizer.step()


def _own(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimizer's own class keeps in attributes, other than state and groups."""
    kept = ("state", "param_groups", "defaults", "parts")
    return {n: comparable(v) for n, v in vars(optimizer).items() if n not in kept and n[0] != "_"}


def compile_steps(optimizer: Optimizer, is_wanted: bool = True) -> None:
    """Compile what of an optimizer is worth it, or undo it; torch's own are fused already."""
    for part in _parts(optimizer):
        if isinstance(part, Muon):
            part.compile(is_wanted)


def fuse(optimizer: Optimizer, device: str = "cuda") -> None:
    """Let torch's own optimizers on a GPU make their step in one kernel, where nobody said how.

    It rounds otherwise than the step of several kernels, so a CPU keeps to that one.
    """
    for part in _parts(optimizer):
        if not type(part).__module__.startswith("torch.optim.") or not _takes_fused(type(part)):
            continue
        for group in part.param_groups:
            is_open = all(group.get(name) is None for name in ("fused", "foreach"))
            is_open = is_open and not group.get("differentiable")
            parameters = group["params"]
            if is_open and all(p.device.type == device for p in parameters):
                group["fused"] = True


def bring_steps(optimizer: Optimizer) -> None:
    """Where a step is fused, torch wants its numbers on the device: also of a run that was not."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            state = optimizer.state.get(parameter, {})
            if isinstance(step := state.get("step"), Tensor):
                state["step"] = step.to(parameter.device, torch.float32)


def _takes_fused(kind: type[Optimizer]) -> bool:
    return "fused" in inspect.signature(kind).parameters


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
