"""Weights from elsewhere: torchvision's and timm's files, wrapped networks, another head."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import PerChannelMinMaxObserver
from torchvision.models import resnet18

from launcher import cli
from launcher.checkpoint.resume import initial_weights
from launcher.checkpoint.weights import load_initial_weights, load_weights, save_weights
from tests.support.helpers import Tiny, refused

State = dict[str, Tensor]


def with_prefix(prefix: str) -> Callable[[State], Any]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


WRAPPED: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "DDP": with_prefix("module."),
    "compiled": with_prefix("_orig_mod."),
    "compiled DDP": with_prefix("_orig_mod.module."),
}


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("form", WRAPPED)
def test_a_state_dict_is_taken_however_it_was_saved(form: str, suffix: str, tmp_path: Path) -> None:
    path, wanted, network = tmp_path / f"weights{suffix}", Tiny(), Tiny()
    torch.save(WRAPPED[form](wanted.state_dict()), path)
    assert load_initial_weights(network, initial_weights(tmp_path, str(path))) == []
    assert all(map(torch.equal, network.parameters(), wanted.parameters()))


def test_a_head_of_another_size_is_left_out_where_it_is_asked_for(tmp_path: Path) -> None:
    path, wanted, network = tmp_path / "resnet18.pth", resnet18(), resnet18(num_classes=10)
    torch.save(wanted.state_dict(), path)
    head = network.fc.weight.clone()
    with refused("fc.weight (1000, 512), the model (10, 512)", "type --skip fc,"):
        load_initial_weights(network, path)
    with refused("--skip head, which names nothing", "type --skip layer4,", "fc"):
        load_initial_weights(network, path, ["fc", "head"])
    with refused("--skip f,"):
        load_initial_weights(network, path, ["f"])
    assert load_initial_weights(network, path, ["fc"]) == ["fc.bias", "fc.weight"]
    assert torch.equal(network.fc.weight, head)
    assert torch.equal(network.layer4[1].conv2.weight, wanted.layer4[1].conv2.weight)


def test_a_head_of_another_name_is_skipped_on_both_sides(tmp_path: Path) -> None:
    path, network = tmp_path / "weights.pt", nn.ModuleDict({"body": Tiny(), "top": Tiny()})
    torch.save(nn.ModuleDict({"body": Tiny(), "head": Tiny()}).state_dict(), path)
    skipped = load_initial_weights(network, path, ["top", "head"])
    assert {name.split(".")[0] for name in skipped} == {"top", "head"}


@pytest.mark.parametrize(
    "content", [Tiny(), {"args": argparse.Namespace()}, [1, 2], {"weight": {"a": 1}}, b"no file"]
)
def test_a_file_without_weights_alone_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with refused("cannot be read", "torch.save(model.state_dict(), FILE)"):
        load_initial_weights(Tiny(), path)


def test_skip_says_what_it_goes_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes/simplecnn.py", "--skip", "fc"]) == 2
    assert "--skip needs --init-from" in capsys.readouterr().err


def observed(channels: int = 4) -> nn.Module:
    """With an observer whose buffers have the number of channels only after a pass."""
    return nn.Sequential(nn.Conv2d(3, channels, 3), PerChannelMinMaxObserver(ch_axis=1))


def test_buffers_that_a_network_resizes_as_it_loads_them_are_loaded(tmp_path: Path) -> None:
    """A run of a network prepared for quantization could be neither resumed nor exported."""
    trained, path = observed(), tmp_path / "weights.safetensors"
    trained(torch.rand(2, 3, 8, 8))
    save_weights(trained, path)
    loaded = observed()
    assert load_weights(loaded, path)
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with refused("has 0.weight (4, 3, 3, 3), the model (5, 3, 3, 3)"):
        load_weights(observed(5), path)
    norms = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    save_weights(norms, path)
    norms[1].register_buffer("running_mean", torch.zeros(1))
    with refused("has 1.running_mean (4,), the model (1,)"):
        load_weights(norms, path)
