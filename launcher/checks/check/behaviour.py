"""Mistakes that the layers do not show: random evaluation, lost gradients, softmax."""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.checks.check.layers import Walk, declared
from launcher.checks.verdicts import Verdict
from launcher.config.plan import Plan
from launcher.config.recipe import Recipe
from launcher.training.model import MOST_ALIKE
from launcher.training.network import layers_in_lists, restored_afterwards, takes_hooks, upcast
from launcher.utils.text import count, some
from launcher.utils.user_code import describe_line, function_of, innermost_user_line

NAME = "network"
_PASSES, _SEVERAL = 8, 16  # passes of so many images, after one of two that leaves something out


def find_behaviour(walked: Walk, recipe: Recipe) -> Iterator[Verdict]:
    """Find mistakes of a network that takes the images and returns a score for each class."""
    if created := list(_created(walked)):  # their weights are random in each evaluation
        yield from created
        return
    yield from _random_evaluation(walked)
    yield from _probabilities(walked, recipe)
    yield from _gradients(walked, recipe)
    yield from _shared(walked.network)
    yield from _scripted(walked.network)


def small_batches(network: nn.Module, plan: Plan) -> Iterator[Verdict]:
    """BatchNorm over a single image subtracts the image from itself."""
    norms = [n for n, module in network.named_modules() if isinstance(module, _BatchNorm)]
    images = plan.batch_size // plan.num_micro_batches
    if norms and images < 2:
        yield Verdict(
            NAME,
            f"BatchNorm ({some(norms)}) over 1 image: {plan.describe_batch()}",
            "notice",  # it trains, if the layer's input has several pixels
            f"type data.batch_size={8 * plan.num_micro_batches}, for example, or use GroupNorm",
        )


def _created(walked: Walk) -> Iterator[Verdict]:
    """Layers with weights that are not part of the network, so they are not trained.

    Not those in a plain list, which were there before: the header's note names them.
    """
    known, found = set(walked.network.modules()), {}
    for layers in layers_in_lists(walked.network).values():
        known.update(part for layer in layers for part in layer.modules())

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module not in known and any(True for _ in module.parameters(recurse=False)):
            line = innermost_user_line(traceback.extract_stack())
            found[describe_line(line)] = module

    handle = register_module_forward_pre_hook(before)
    try:
        _evaluated(walked)
    finally:
        handle.remove()
    for place, module in found.items():
        yield Verdict(
            NAME,
            f"{module} is made in forward{place}: its weights are new in each call",
            "wrong",
            "make it in __init__ as self.layer = ..., and call self.layer(x) there",
        )


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the user's line of the first operation that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.line = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not self.line and torch.Tag.nondeterministic_seeded in func.tags:
            self.line = describe_line(innermost_user_line(traceback.extract_stack()))
        return func(*args, **(kwargs or {}))


def _random_evaluation(walked: Walk) -> Iterator[Verdict]:
    with _Watch() as watch:  # between both others, by which it may remember other images
        first, _, second = _evaluated(walked, (1, 2, 1))
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-6, equal_nan=True):
        drawn = f"random numbers are drawn in eval mode{watch.line}"
        cause = drawn if watch.line else "it keeps something from one call to the next"
        yield Verdict(
            NAME,
            f"two evaluations of the same image differ: {cause}",
            "wrong",
            "use nn.Dropout made in __init__, or F.dropout(x, p, training=self.training)"
            if watch.line
            else "keep nothing in forward, or keep it in a buffer that evaluation does not change",
        )


def _probabilities(walked: Walk, recipe: Recipe) -> Iterator[Verdict]:
    """Judge by the output: a softmax where the loss has its own, or none where it needs one."""
    scores = upcast(walked.output)
    takes_scores = _is_loss(recipe.loss, cross_entropy, nn.CrossEntropyLoss)
    takes_logs = _is_loss(recipe.loss, nll_loss, nn.NLLLoss)
    one = torch.ones(len(scores), dtype=scores.dtype)
    are_shares = bool((scores >= 0).all()) and torch.allclose(scores.sum(1), one, atol=1e-4)
    are_logs = torch.allclose(scores.exp().sum(1), one, atol=1e-4)
    last = f": {walked.layers[-1].name}" if walked.layers else ""
    if takes_scores and are_shares:
        yield Verdict(
            NAME,
            f"its scores are probabilities (each row sums to 1){last}, and cross_entropy applies "
            "a second softmax: training is slow, and all predictions stay uncertain",
            "wrong",
            "return the scores before the softmax",
        )
    elif takes_scores and are_logs:
        more = "and cross_entropy applies log_softmax again, without effect"
        yield Verdict(
            NAME,
            f"its scores are log-probabilities{last}, {more}",
            "notice",
            "return the scores before the log_softmax, or write loss=nll_loss",
        )
    elif takes_logs and not are_logs:
        yield Verdict(
            NAME,
            "nll_loss takes log-probabilities, and its scores are none",
            "wrong",
            "write loss=cross_entropy, or return x.log_softmax(1)",
        )


def _is_loss(loss: Any, function: Any, kind: type[nn.Module]) -> bool:
    return function_of(loss) is function or isinstance(loss, kind)


def _gradients(walked: Walk, recipe: Recipe) -> Iterator[Verdict]:
    network = walked.network
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    frozen = [n for n, p in network.named_parameters() if not p.requires_grad]
    if frozen:
        yield Verdict(
            NAME,
            f"{count(len(frozen), 'parameter')} frozen by requires_grad=False: {some(frozen)}",
            "notice",
            "change nothing if they are not to be trained",
        )
    is_refused = recipe.unused_parameters == "refuse"
    lost = _without_gradient(walked, trained, walked.images) if is_refused else []
    if lost:  # it may divide the images of a pass among its layers
        size = min(max(2, recipe.data.batch_size // recipe.passes), MOST_ALIKE)
        whole = walked.images[:1].repeat(size, 1, 1, 1)
        lost = _without_gradient(walked, trained, whole, otherwise=lost)
    if lost and (at_times := sorted({*lost} - {*_never_trained(walked, trained)})):
        yield Verdict(
            NAME,
            f"in some passes only, forward uses {some(at_times)}",
            "wrong",
            "type unused_parameters=allow",
        )
        return
    called = {layer.name for layer in walked.layers}
    passed = [name for name in lost if name.rpartition(".")[0] in called]
    unused = [name for name in lost if name not in passed]
    if passed:
        layer = passed[-1].rpartition(".")[0]
        yield Verdict(
            NAME,
            f"no gradient reaches {some(passed)}: the computation of the scores is cut after "
            f"{layer}{declared(network, layer)}",
            "wrong",
            "use what it makes, without detach(), .data, .item(), numpy and torch.no_grad() after "
            "it, or call requires_grad_(False) on what is not to be trained",
        )
    elif unused:
        layer = unused[0].rpartition(".")[0] or unused[0]
        yield Verdict(
            NAME,
            f"forward does not use {some(unused)}{declared(network, layer)}",
            "wrong",
            "use it or leave it out; unused_parameters=allow where it is used in some steps only",
        )


def _never_trained(walked: Walk, trained: Mapping[str, nn.Parameter]) -> list[str]:
    """The parameters without a gradient in any of several passes, with other images and draws."""
    lost, images = {*trained}, walked.images
    with torch.random.fork_rng([]):
        for seed in range(_PASSES):
            torch.manual_seed(seed)
            others = torch.randn(_SEVERAL, *images.shape[1:]).to(images)
            lost &= {*_without_gradient(walked, trained, others, otherwise=[*lost])}
    return sorted(lost)


def _without_gradient(
    walked: Walk,
    trained: Mapping[str, nn.Parameter],
    images: Tensor,
    otherwise: Sequence[str] = (),
) -> list[str]:
    """Their names after a pass in training mode; `otherwise` where that fails."""
    network, was_training = walked.network, walked.network.training
    network.train()
    try:
        with restored_afterwards(network, walked.images.device):
            output = network(images.clone())
            if output.requires_grad:
                upcast(output).square().sum().backward()  # type: ignore[no-untyped-call]
            return [name for name, parameter in trained.items() if parameter.grad is None]
    except Exception:  # in training mode it fails: which is tried, and said, by what trains
        return [*otherwise]
    finally:
        network.train(was_training)


def _shared(network: nn.Module) -> Iterator[Verdict]:
    """One layer in several places: often `[nn.Conv2d(...)] * 3`."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if any(True for _ in module.parameters(recurse=False)):
            names.setdefault(module, []).append(name)
    for module, places in names.items():
        if len(places) > 1:
            yield Verdict(
                NAME,
                f"{some(places)} are one {type(module).__name__}, with the same weights"
                f"{declared(network, places[0])}",
                "notice",
                "change nothing if they are to share them; else write a new layer for each: "
                "[nn.Linear(...) for _ in range(n)], not [nn.Linear(...)] * n",
            )


def _scripted(network: nn.Module) -> Iterator[Verdict]:
    """What torch.jit has compiled is one thing: none of its layers can be looked at."""
    scripted = [name for name, m in network.named_modules() if not takes_hooks(m)]
    outer = [name for name in scripted if name.rpartition(".")[0] not in scripted or not name]
    outer = outer[:1] if "" in outer else outer
    if outer:
        what = "the network" if outer == [""] else some(outer)
        yield Verdict(
            NAME,
            f"torch.jit has compiled {what}, whose layers are not seen here",
            "notice",
            "leave out torch.jit.script(...) and torch.jit.trace(...), and type compile=true: "
            "torch exports neither by --to torch and onnx as a rule",
        )


@contextmanager
def _evaluating(walked: Walk) -> Iterator[None]:
    was_training = walked.network.training
    walked.network.eval()
    with restored_afterwards(walked.network, walked.images.device), torch.no_grad():
        yield
    walked.network.train(was_training)


def _evaluated(walked: Walk, divisors: Sequence[int] = (1,)) -> list[Tensor]:
    """The scores of the images over each divisor; the network may write into what it is given."""
    with _evaluating(walked):
        return [upcast(walked.network(walked.images / divisor)) for divisor in divisors]
