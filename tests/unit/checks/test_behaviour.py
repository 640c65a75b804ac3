"""What a network does wrongly although its layers fit: said with the line, and mended as said."""

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, nll_loss
from torch.optim import SGD

from launcher import Images, Recipe, Synthetic
from launcher.checks.check.behaviour import find_behaviour, small_batches
from launcher.checks.check.layers import declared, walk
from launcher.checks.verdicts import Verdict
from launcher.config.plan import make_plan
from tests.unit.checks.test_mistakes import NETWORK, network_of

RECIPE = Recipe(
    model=nn.Identity,
    data=Images(Synthetic, batch_size=8, mean=(0.5,) * 3, std=(0.5,) * 3),
    optimizer=partial(SGD, lr=0.1),
    epochs=1,
)
RELU = "x = F.relu(self.fc1(x))"
FC2 = "x = self.fc2(x)"
NORM = "self.norm = nn.BatchNorm2d(8)"
BOTH = "self.pool(F.relu(self.norm(self.conv1(x))))"

# what is written, and instead of what; how it stands, what is said, and the line that is named
WRONG = [
    (FC2, FC2 + ".softmax(1)", "wrong", "are probabilities", ""),
    (FC2, "x = torch.exp(F.log_softmax(self.fc2(x), -1))", "wrong", "are probabilities", ""),
    (FC2, FC2 + ".log_softmax(1)", "notice", "are log-probabilities", ""),
    (RELU, "x = F.dropout(F.relu(self.fc1(x)))", "wrong", "random numbers are drawn", "dropout"),
    (RELU, "x = nn.Dropout()(self.fc1(x))", "wrong", "random numbers are drawn", "Dropout"),
    (RELU, "x = self.fc1(x) + torch.rand(50)", "wrong", "random numbers are drawn", "rand"),
    (RELU, "x = nn.Linear(50, 50)(self.fc1(x))", "wrong", "is made in forward", "Linear(50, 50"),
    (RELU, "x = F.relu(self.fc1(x)).detach()", "wrong", "no gradient reaches", "self.fc1 ="),
    (FC2, "x = self.fc2(x.data)", "wrong", "no gradient reaches", "self.fc1 ="),
    (NORM, NORM + "; self.fc3 = nn.Linear(2, 2)", "wrong", "does not use fc3.weight", "fc3"),
    (
        "return x",
        "self.calls = getattr(self, 'calls', 0) + 1; return x * self.calls",
        "wrong",
        "it keeps something from one call",
        "",
    ),
    (
        "return x",
        "before = getattr(self, 'seen', 0 * x); self.seen = 0.1 * x.detach(); return x + before",
        "wrong",
        "it keeps something from one call",  # of the same images it keeps the same
        "",
    ),
    (
        NORM,
        NORM + "; self.conv1.requires_grad_(False)",
        "notice",
        "frozen by requires_grad=False: conv1.weight",
        "",
    ),
    (
        "return x",
        "return self.same[1](self.same[0](x))",
        "notice",
        "same.0, same.1 are one Linear",
        "self.same",
    ),
]


def prepared(source: str) -> str:
    return source.replace(NORM, NORM + "; self.same = nn.Sequential(*[nn.Linear(10, 10)] * 2)")


def found_in(network: nn.Module, recipe: Recipe = RECIPE) -> list[Verdict]:
    return list(find_behaviour(walk(network, torch.rand(2, 3, 32, 32)), recipe))


@pytest.mark.parametrize(("right", "wrong", "standing", "what", "line"), WRONG)
def test_what_a_network_does_wrongly_is_said(
    right: str, wrong: str, standing: str, what: str, line: str, tmp_path: Path
) -> None:
    source = NETWORK.replace(right, wrong)
    source = prepared(source) if "same" in wrong else source
    network = network_of(source, tmp_path)
    (verdict,) = found_in(network)
    assert (verdict.question, verdict.standing) == ("network", standing)
    assert what in verdict.answer
    assert verdict.instead
    assert network.training
    if line:
        number = next(n for n, text in enumerate(source.splitlines(), 1) if line in text)
        assert f"({tmp_path / 'net.py'}, line {number})" in verdict.answer


def test_a_right_network_gives_nothing_to_say(tmp_path: Path) -> None:
    assert found_in(network_of(NETWORK, tmp_path)) == []


@pytest.mark.parametrize("loss", [nll_loss, nn.NLLLoss()])
def test_a_loss_of_log_probabilities_needs_them(loss: Any, tmp_path: Path) -> None:
    recipe = replace(RECIPE, loss=loss)
    (verdict,) = found_in(network_of(NETWORK, tmp_path), recipe)
    assert verdict.instead == "write loss=cross_entropy, or return x.log_softmax(1)"
    mended = NETWORK.replace(FC2, FC2 + ".log_softmax(1)")
    assert found_in(network_of(mended, tmp_path), recipe) == []


def test_layers_in_a_list_are_not_made_in_forward(tmp_path: Path) -> None:
    """They are named by a note of the header, in a run and here."""
    source = NETWORK.replace(NORM, NORM + "; self.more = [nn.Sequential(nn.Linear(50, 50))]")
    network = network_of(source.replace(RELU, "x = self.more[0](self.fc1(x))"), tmp_path)
    assert found_in(network) == []


def test_probabilities_are_right_for_a_loss_that_takes_them(tmp_path: Path) -> None:
    def own(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nll_loss(scores.log(), labels)

    network = network_of(NETWORK.replace(FC2, FC2 + ".softmax(1)"), tmp_path)
    assert found_in(network, replace(RECIPE, loss=own)) == []
    (verdict,) = found_in(network, replace(RECIPE, loss=partial(cross_entropy, reduction="mean")))
    assert verdict.standing == "wrong"


def test_parameters_that_are_used_in_some_passes_only_are_told_what_to_type(tmp_path: Path) -> None:
    """Stochastic depth was told to look for a detach()."""
    source = NETWORK.replace(NORM, NORM + "; self.more = nn.Linear(10, 10)")
    skipping = "return self.more(x) if not self.training or torch.rand(()) < 0.5 else x"
    source = source.replace("return x", skipping)
    torch.manual_seed(5)
    network = network_of(source, tmp_path)
    while not (found := found_in(network)):  # it was used in the first pass
        torch.rand(1)
    (verdict,) = found
    assert verdict.answer == "in some passes only, forward uses more.bias, more.weight"
    assert verdict.instead == "type unused_parameters=allow"


def test_a_network_that_writes_into_its_images_keeps_nothing(tmp_path: Path) -> None:
    source = NETWORK.replace("self.conv1(x)", "self.conv1(x.mul_(0.5))")
    assert found_in(network_of(source, tmp_path)) == []


def test_a_network_that_computes_gradients_by_torch_func_is_no_mistake(tmp_path: Path) -> None:
    """torch's counter of operations fails in it."""
    gradient = "x = x - torch.func.vmap(torch.func.grad(lambda v: self.fc2(v).logsumexp(0)))(x)"
    source = NETWORK.replace(RELU, f"{RELU}\n        {gradient}")
    walked = walk(network_of(source, tmp_path), torch.rand(2, 3, 32, 32))
    assert walked.error is None
    assert [layer.name for layer in walked.layers][-1] == "fc2"


def test_a_layer_of_nested_tensors_is_no_mistake(tmp_path: Path) -> None:
    """They have no shape that could be shown, and it was taken for one of the network."""
    nested = "x = torch.nested.as_nested_tensor(list(x.unbind(0)))\n        x = self.fc2(x)"
    source = NETWORK.replace(FC2, f"{nested}\n        x = torch.nested.to_padded_tensor(x, 0.0)")
    source = source.replace("x = F.relu(self.fc1(x))", "x = F.relu(self.fc1(x))[:, None]")
    source = source.replace("to_padded_tensor(x, 0.0)", "to_padded_tensor(x, 0.0)[:, 0]")
    walked = walk(network_of(source, tmp_path), torch.rand(2, 3, 32, 32))
    assert walked.error is None
    assert walked.layers[-1].made == ()


def test_what_torch_jit_has_compiled_is_a_notice() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated")
        network = nn.Sequential(torch.jit.script(nn.Flatten()), nn.Linear(3072, 10))
    (verdict,) = found_in(network)
    assert verdict.standing == "notice"
    assert verdict.answer == "torch.jit has compiled 0, whose layers are not seen here"


def test_unused_parameters_may_be_allowed(tmp_path: Path) -> None:
    network = network_of(NETWORK.replace(NORM, NORM + "; self.a = nn.Linear(2, 2)"), tmp_path)
    assert found_in(network, replace(RECIPE, unused_parameters="allow")) == []


def test_a_network_that_fails_in_training_is_left_to_what_trains(tmp_path: Path) -> None:
    source = NETWORK.replace(FC2, FC2 + "\n        assert not self.training")
    assert found_in(network_of(source, tmp_path)) == []


@pytest.mark.parametrize(("world_size", "expected"), [(8, 1), (4, 0)])
def test_batch_norm_of_one_image(world_size: int, expected: int, tmp_path: Path) -> None:
    network = network_of(NETWORK, tmp_path)
    plan = make_plan(RECIPE, world_size=world_size, train_images=80, evaluated_images=8)
    verdicts = list(small_batches(network, plan))
    assert len(verdicts) == expected
    if verdicts:
        assert verdicts[0].standing == "notice"  # it trains
        assert "BatchNorm (norm) over 1 image" in verdicts[0].answer
        assert "data.batch_size=64" in verdicts[0].instead
        data = replace(RECIPE.data, batch_size=64)
        mended = make_plan(
            replace(RECIPE, data=data), world_size=8, train_images=80, evaluated_images=8
        )
        assert list(small_batches(network, mended)) == []
    assert list(small_batches(nn.Linear(2, 2), plan)) == []


def test_the_line_of_a_layer_within_a_sequential(tmp_path: Path) -> None:
    network = network_of(prepared(NETWORK), tmp_path)
    number = next(n for n, text in enumerate(NETWORK.splitlines(), 1) if NORM in text)
    assert declared(network, "same.1") == f" ({tmp_path / 'net.py'}, line {number})"
    assert declared(nn.Sequential(nn.Linear(2, 2)), "0") == ""
