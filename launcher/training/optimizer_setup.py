"""From the recipe's slot to an optimizer: made, checked, and tried on copies of the parameters.

`make_optimizer` is the one place where the slot is called: it refuses what cannot be trained with.
`try_step` and `goes_on` find what a step keeps where no checkpoint holds it; `load_state` gives an
optimizer a saved state.
"""

import difflib
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from numbers import Real
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.config.recipe import Recipe
from launcher.config.serialize import code_name
from launcher.config.settings import children
from launcher.config.slots import NamedParameters
from launcher.errors import UserError
from launcher.training.optimizers import ChainedOptimizer, Muon
from launcher.utils.text import count, some
from launcher.utils.user_code import comparable, function_of, is_users, place_of, user_location

MOST_RATE = 1e35  # of learning: with more, what Adam makes of it is no float32


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


def is_of_torch(optimizer: Optimizer) -> bool:
    """Whether it, or each of several as one, is of a class of torch or of the launcher."""
    kinds = (type(part).__module__ for part in _parts(optimizer))
    return all(name.startswith(("torch.optim.", "launcher.")) for name in kinds)


def try_step(recipe: Recipe, network: nn.Module, state: dict[str, Any] | None = None) -> list[str]:
    """A step of the recipe's optimizer on copies of the parameters, with gradients of one.

    It begins with a saved state, where there is one, and with gradients that are as sparse. Returns
    the names of the numbers and tensors beside the state that the step changes. Raises what the
    optimizer's code does, or torch's: as for gradients that must be sparse, or a state of other
    parameters; and `UserError` where a new optimizer changes its rate.
    """
    optimizer = _made(recipe, _copies(network.named_parameters()))
    if state is not None:
        load_state(optimizer, deepcopy(state))  # it would take the tensors as they are
    before, rates = _own(optimizer), _rates(optimizer)
    _step(optimizer)
    if state is None and _rates(optimizer) != rates:
        raise UserError(
            f"{code_name(recipe.optimizer)}, whose step changes the rate of a group itself",
            expected="a rate that the schedule sets, which is before each step",
            instead="write that as the schedule of the recipe, or group['factor'] for group['lr'], "
            "by which the step then multiplies",
        )
    return [name for name, value in _own(optimizer).items() if value != before.get(name)]


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


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
        return all(_alike(one.nan_to_num(), two.nan_to_num()) for (_, one), (_, two) in pairs)


def _alike(one: Tensor, two: Tensor) -> bool:
    """Bit for bit; a GPU may add in another order when it is asked again."""
    return torch.allclose(one, two, rtol=1e-5, atol=0) if one.is_cuda else torch.equal(one, two)


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
