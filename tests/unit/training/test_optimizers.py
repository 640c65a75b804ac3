"""Muon, several optimizers as one, and schedules of single groups."""

import io
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, Rprop

from launcher import ChainedOptimizer, Muon, NamedParameters, no_decay
from launcher.config.overrides import override
from launcher.config.serialize import resolve
from launcher.training.loop import fit
from launcher.training.optimizer_setup import bring_steps, fuse, load_state
from launcher.training.optimizers import orthogonalize
from launcher.training.state import TrainState, make_state
from tests.support.helpers import context_of, refused, tiny_recipe
from tests.support.world_worker import Small, Small64, divided, late, plain


@pytest.fixture
def network() -> Small:
    torch.manual_seed(0)
    return Small64()


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randn(16, 3, 32, 32, generator=random, dtype=torch.float64)
        yield images, torch.randint(10, (16,), generator=random)


def train(network: nn.Module, optimizer: Optimizer, steps: int, skip: int = 0) -> list[float]:
    losses = []
    for images, labels in list(batches(skip + steps))[skip:]:
        loss = cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shape", [(3, 8, 40), (2, 40, 8)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices[0] *= 1e-3  # the scale does not matter
    values = torch.linalg.svdvals(orthogonalize(matrices, newton_steps=5))
    assert values.min() > 0.5
    assert values.max() < 1.5
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (orthogonalize(matrices, 5) * (left @ right)).sum() / (left @ right).norm() ** 2
    assert cosine == pytest.approx(1, abs=0.3)


def test_muon_steps_against_the_gradient_by_the_rate_and_keeps_the_norm() -> None:
    torch.manual_seed(0)
    filters = nn.Parameter(torch.randn(8, 3, 3, 3, dtype=torch.float64))
    muon = Muon([("filters", filters)], lr=1e-3)
    before = filters.detach() * (8**0.5 / filters.detach().norm())
    filters.grad = torch.randn_like(filters)
    expected = orthogonalize(filters.grad.flatten(1)[None] * 1.6, 3)[0].view(8, 3, 3, 3)
    muon.step()
    torch.testing.assert_close(filters.detach(), before - 1e-3 * expected, rtol=0, atol=1e-9)
    assert filters.detach().norm() == pytest.approx(8**0.5, abs=0.01)


def test_muon_treats_filters_alike_together_and_alone() -> None:
    banks = [nn.Parameter(torch.randn(4, 2, 3, 3, dtype=torch.float64)) for _ in range(3)]
    alone = [nn.Parameter(bank.detach().clone()) for bank in banks]
    for bank, single in zip(banks, alone, strict=True):
        bank.grad = torch.randn_like(bank)
        single.grad = bank.grad.clone()
        Muon([("one", single)], lr=0.1).step()
    Muon([(str(index), bank) for index, bank in enumerate(banks)], lr=0.1).step()
    for bank, single in zip(banks, alone, strict=True):
        torch.testing.assert_close(bank, single, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rate", "momentum"), [(-1.0, 0.6), (1.0, 1.0)])
def test_muon_refuses_settings_out_of_range(rate: float, momentum: float) -> None:
    with pytest.raises(ValueError, match="lr="):
        Muon([("filters", nn.Parameter(torch.ones(2, 2)))], lr=rate, momentum=momentum)


def test_muon_refuses_a_vector() -> None:
    with pytest.raises(ValueError, match="one dimension"):
        Muon([("bias", nn.Parameter(torch.ones(2)))], lr=0.1)


def test_together_does_what_its_parts_do_alone(network: Small) -> None:
    twin = Small64()
    twin.load_state_dict(network.state_dict())
    together = divided(network.named_parameters())
    parts = divided(twin.named_parameters())
    assert isinstance(parts, ChainedOptimizer)
    for images, labels in batches(4):
        for each in (network, twin):
            each.zero_grad()
            loss = cross_entropy(each(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
        together.step()
        for part in parts.parts:
            part.step()
    assert list(network.state_dict()) == list(twin.state_dict())
    for one, other in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("prepared", [False, True])
def test_together_resumes_exactly_from_its_state(network: Small, prepared: bool) -> None:
    def made(network: Small) -> Any:
        optimizer = divided(network.named_parameters())
        for group in optimizer.param_groups:
            group.pop("schedule", None)
        return Accelerator(cpu=True).prepare(optimizer) if prepared else optimizer

    optimizer = made(network)
    train(network, optimizer, 3)
    file = io.BytesIO()
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, file)
    whole = train(network, optimizer, 3, skip=3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Small64()
    other.load_state_dict(saved["network"])
    resumed = made(other)
    resumed.load_state_dict(saved["optimizer"])
    assert train(other, resumed, 3, skip=3) == whole
    fresh = Small64()
    fresh.load_state_dict(saved["network"])
    assert train(fresh, made(fresh), 3, skip=3) != whole, "the state made no difference"


def test_together_keeps_no_state_that_a_checkpoint_does_not_have(network: Small) -> None:
    """As after a roll back to a time at which a group had not been trained yet."""
    optimizer = divided(network.named_parameters())
    before = optimizer.state_dict()
    train(network, optimizer, 2)
    assert optimizer.state
    optimizer.load_state_dict(before)
    assert not optimizer.state


def test_together_has_the_state_with_which_a_part_begins(network: Small) -> None:
    part = Adagrad(network.parameters())
    assert set(ChainedOptimizer(part).state) == set(network.parameters())


def test_a_rate_set_on_together_reaches_its_parts(network: Small) -> None:
    optimizer = divided(network.named_parameters())
    optimizer.load_state_dict(optimizer.state_dict())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.param_groups[1]["lr"] = 0.1  # the head and its bias
    train(network, optimizer, 2)
    after = network.state_dict()
    assert torch.equal(after["layers.0.bias"], before["layers.0.bias"])
    assert not torch.equal(after["layers.4.weight"], before["layers.4.weight"])


def state_of(network: nn.Module, optimizer: Any) -> TrainState:
    return make_state(network, replace(plain, optimizer=optimizer), Accelerator(cpu=True))


def test_a_group_has_its_own_schedule_and_is_frozen_at_zero(network: Small) -> None:
    state = state_of(network, divided)
    bias = network.layers[0].bias

    state.set_learning_rates(0.25, lambda fraction: 1 - fraction)
    rates = [group["lr"] for group in state.optimizer.param_groups]
    assert rates == pytest.approx([0.05 * 0.75, 0.05 * 0.75, 0.05 * 0.5])
    assert bias.requires_grad

    state.set_learning_rates(0.75, lambda fraction: 1 - fraction)
    rates = [group["lr"] for group in state.optimizer.param_groups]
    assert rates == pytest.approx([0.05 * 0.25, 0.05 * 0.25, 0.0])
    assert [p.requires_grad for p in network.parameters()] == [True, False, True, True]
    state.set_learning_rates(0.25, lambda fraction: 1 - fraction)
    assert bias.requires_grad


def test_all_groups_may_be_frozen_at_once(network: Small) -> None:
    def scheduled(parameters: NamedParameters) -> Optimizer:
        return SGD([{"params": list(parameters), "schedule": late}], lr=0.1)

    state = state_of(network, scheduled)
    state.set_learning_rates(0.25, late)
    before = [parameter.clone() for parameter in network.parameters()]
    images, labels = next(batches(1))
    cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
    state.drop_frozen_gradients()
    state.optimizer.step()
    assert all(map(torch.equal, before, network.parameters()))


def test_torch_optimizers_take_named_parameters(network: Small) -> None:
    state = state_of(network, lambda parameters: SGD(parameters, lr=0.1))
    names = state.optimizer.param_groups[0]["param_names"]
    assert names == [name for name, _ in network.named_parameters()]


@pytest.mark.slow
def test_a_compiled_muon_computes_the_same(network: Small) -> None:
    twin = Small64()
    twin.load_state_dict(network.state_dict())
    filters = [pair for pair in network.named_parameters() if pair[1].ndim == 4]
    twins = [pair for pair in twin.named_parameters() if pair[1].ndim == 4]
    eager, compiled = Muon(filters, lr=0.05), Muon(twins, lr=0.05)
    compiled.compile()
    assert train(network, eager, 3) == pytest.approx(train(twin, compiled, 3), abs=1e-10)


TEXT: dict[str, Any] = {"momentum": "0.9"}
NUMBERS: list[Any] = [0.1]


def of_parameters(params: Any) -> Optimizer:
    return SGD([p for p in params if p.ndim > 1], lr=0.1)


def of_another_network(params: NamedParameters) -> Optimizer:
    return SGD([*params, *Small64().named_parameters()], lr=0.1)


def twice(params: NamedParameters) -> Optimizer:
    first, *others = params
    return SGD([first, first, *others], lr=0.1)


def in_two_groups(params: NamedParameters) -> Optimizer:
    named = list(params)
    return SGD([{"params": named}, {"params": named[:1]}], lr=0.1)


def without_return(params: NamedParameters) -> None:
    SGD(params, lr=0.1)


def too_much_momentum(params: NamedParameters) -> Optimizer:
    return SGD([{"params": list(params), "momentum": 1.0}], lr=0.1)


def decayed(params: NamedParameters, by: object) -> Optimizer:
    return SGD([{"params": list(params), "weight_decay": by}], lr=0.1)


def grown(params: NamedParameters) -> Optimizer:
    return AdamW([{"params": list(params), "weight_decay": -1e-3}], lr=0.1)


def misspelt(params: NamedParameters) -> Optimizer:
    return SGD([{"params": list(params), "weight_decy": 1e-3, "name": "all"}], lr=0.1)


def of_nothing(params: NamedParameters) -> Optimizer:
    return SGD([{"params": []}], lr=0.1)


@pytest.mark.parametrize(
    ("optimizer", "parts"),
    [
        (misspelt, ("a group of SGD with 'weight_decy'", "write 'weight_decay'")),
        (of_nothing, ("of_nothing trains nothing",)),
        (grown, ("a group of AdamW with weight_decay=-0.001", "a number of at least 0")),
        (partial(decayed, by=None), ("a group of SGD with weight_decay=None", "weight_decay=0")),
        (partial(decayed, by=True), ("a group of SGD with weight_decay=True", "weight_decay=0")),
        (partial(decayed, by=1e40), ("a group of SGD with weight_decay=1e+40", "below 1e+35")),
        (of_parameters, ("pairs (name, parameter)", "for name, p in params")),
        (of_another_network, ("trains 4 tensors", "of the network only")),
        (twice, ("layers.0.weight twice", "each parameter once")),
        (in_two_groups, ("more than one parameter group",)),
        (without_return, ("returns NoneType", "return")),
        (too_much_momentum, ("momentum=1.0", "below 1")),
        (partial(LBFGS, lr=1.0), ("LBFGS", "closure", "AdamW")),
        (partial(SGD, lr=0.1, momentum=1.5), ("optimizer.momentum=1.5", "=0.9")),
        (partial(SGD, lr=0.1, **TEXT), ("optimizer.momentum='0.9'", "=0.9")),
        (
            partial(SGD, *NUMBERS),
            ("SGD with 0.1, which stands where the parameters", "write lr=0.1 for"),
        ),
        (partial(SGD, lr=-0.1), ("optimizer.lr=-0.1", "type optimizer.lr=0.01")),
        (partial(SGD, lr=float("nan")), ("optimizer.lr=nan",)),
        (partial(AdamW, lr=1e40), ("optimizer.lr=1e+40", "below 1e+35")),  # no float32
        (no_decay(AdamW, lr=-1.0), ("optimizer.base.lr=-1.0", "type optimizer.base.lr=0.01")),
        (no_decay(Rprop, lr=0.1), ("Rprop has no weight_decay",)),
    ],
)
def test_what_cannot_train_is_refused(network: Small, optimizer: Any, parts: list[str]) -> None:
    with refused(*parts):
        state_of(network, optimizer)


def test_norms_and_biases_get_no_weight_decay(network: Small) -> None:
    slot = no_decay(AdamW, lr=1e-3, weight_decay=0.5)
    (recipe, form) = (
        override(tiny_recipe(optimizer=slot), ["optimizer.base.lr=0.5"]),
        resolve(slot),
    )
    assert form["call"] == "launcher.training.optimizers:without_decay"
    assert (form["base"]["call"], form["base"]["lr"]) == ("torch.optim.adamw:AdamW", 1e-3)
    groups = state_of(network, recipe.optimizer).optimizer.param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.5, 0.5), (0.5, 0.0)]
    assert [{p.ndim for p in g["params"]} for g in groups] == [{2, 4}, {1}]


def test_a_rate_that_is_a_tensor_is_its_number(network: Small) -> None:
    state = state_of(network, partial(AdamW, lr=torch.tensor(0.25)))
    state.set_learning_rates(0.5, float)
    assert state.optimizer.param_groups[0]["lr"] == 0.125
    assert type(state.optimizer.param_groups[0]["lr"]) is float
    with refused("optimizer.lr=x", "type optimizer.lr=0.25 to keep it"):
        override(tiny_recipe(optimizer=partial(AdamW, lr=torch.tensor(0.25))), ["optimizer.lr=x"])


def only_matrices(params: NamedParameters) -> Optimizer:
    return SGD([pair for pair in params if pair[1].ndim > 1], lr=0.1)


def test_parameters_left_out_of_the_optimizer_are_named_in_a_note() -> None:
    notes = context_of(tiny_recipe(optimizer=only_matrices)).notes
    assert notes == ("not in the optimizer, so never changed: layers.2.bias, layers.4.bias",)
    assert context_of(tiny_recipe()).notes == ()


# Fused, where the device is a GPU; a CPU's kernels stand in for them


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_torchs_optimizers_are_fused_on_a_gpu(kind: Callable[..., Optimizer]) -> None:
    network, twin = Small64(), Small64()
    twin.load_state_dict(network.state_dict())
    plain, fused = (kind(n.named_parameters(), lr=0.01) for n in (network, twin))
    fuse(plain)  # which is on no GPU
    fuse(fused, "cpu")
    assert [group["fused"] for group in plain.param_groups] == [None]
    assert [group["fused"] for group in fused.param_groups] == [True]
    assert train(network, plain, 3) == pytest.approx(train(twin, fused, 3), abs=1e-10)
    fused.load_state_dict(deepcopy(plain.state_dict()))  # of a run that was not fused
    twin.load_state_dict(network.state_dict())
    fuse(fused, "cpu")
    bring_steps(fused)
    assert train(network, plain, 2, skip=3) == pytest.approx(
        train(twin, fused, 2, skip=3), abs=1e-10
    )


def test_what_the_recipe_says_of_it_is_left() -> None:
    network = Small64()
    for said in ({"fused": False}, {"foreach": True}, {"foreach": False}):
        optimizer = SGD(network.named_parameters(), lr=0.01, **said)
        fuse(optimizer, "cpu")
        assert optimizer.param_groups[0]["fused"] is said.get("fused")


def test_the_parts_of_several_as_one_are_fused() -> None:
    network = Small64()
    named = list(network.named_parameters())
    filters = [pair for pair in named if pair[1].ndim == 4]
    others = [pair for pair in named if pair[1].ndim != 4]
    optimizer = ChainedOptimizer(Muon(filters, lr=0.01), SGD(others, lr=0.01))
    fuse(optimizer, "cpu")
    assert [group.get("fused") for group in optimizer.param_groups] == [None, True]
    train(network, optimizer, 2)


def test_a_state_is_taken_over_in_its_own_type(network: Small) -> None:
    """torch makes its tensors those of the weights: NAdam went on with other bits in float64."""
    first = NAdam(network.parameters(), lr=0.01)
    train(network, first, steps=2)
    other = NAdam(network.parameters(), lr=0.01)
    load_state(other, deepcopy(first.state_dict()))
    for parameter in network.parameters():
        kinds = {name: value.dtype for name, value in first.state[parameter].items()}
        assert {name: value.dtype for name, value in other.state[parameter].items()} == kinds


def head_only(params: NamedParameters) -> Optimizer:
    return SGD([pair for pair in params if pair[0].startswith("layers.4")], lr=0.1)


def test_gradients_of_parameters_left_out_of_the_optimizer_are_not_computed() -> None:
    """Nothing cleared them, so they added up, and counted where the gradient is clipped."""
    ctx = context_of(tiny_recipe(optimizer=head_only, clip_norm=0.1, epochs=1))
    list(fit(ctx))
    rests = dict(ctx.state.network.named_parameters())["layers.2.weight"]
    assert rests.grad is None
    assert len(ctx.notes) == 1
