"""Every command of docs/nodes.md and docs/kubernetes.md that can be run here is run as printed."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from launcher.cli import main
from tests.support.node_network import Node, needs_networks, network
from tests.support.processes import ACCELERATE, ROOT, Run

NODES = (ROOT / "docs" / "nodes.md").read_text(encoding="utf-8")
BLOCKS = [block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", NODES, re.DOTALL)]
PROGRAMS = {
    "accelerate": ACCELERATE[:-1],
    "torchrun": (sys.executable, "-m", "torch.distributed.run"),
    "python": (sys.executable,),
}


def start(line: str, node: Node, folder: Path) -> Run:
    """The line on that machine, with a small recipe and one process on each."""
    line = line.replace("--nproc-per-node 8", "--nproc-per-node 1")
    agent, words = line.split(" -m launcher recipes/simplecnn.py ")
    variables = re.findall(r"^(?:[A-Z_]+=\S+ )*", agent)[0].split()
    program, *own = shlex.split(agent)[len(variables) :]
    own += ["--num_processes", "2"] if program == "accelerate" else []
    command = node.on("env", *variables, *PROGRAMS[program], *own)
    return Run(command, folder, *shlex.split(words), "epochs=2")


@pytest.mark.slow
@needs_networks
@pytest.mark.parametrize("lines", BLOCKS, ids=lambda lines: lines[0].split()[0])
def test_the_commands_train_on_two_machines(lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "accelerate_config").symlink_to(ROOT / "accelerate_config")
    with network(2) as nodes:
        both = lines if len(lines) == 2 else lines * 2
        runs = [start(line, node, tmp_path) for line, node in zip(both, nodes, strict=True)]
        assert [run.end() for run in runs] == [0, 0], runs[0].text() + runs[1].text()
    assert "2 ranks" in runs[0].text() + runs[1].text()


def test_the_page_has_the_ways_that_are_tested() -> None:
    assert len(BLOCKS) == 4
    assert all(" -m launcher recipes/simplecnn.py " in line for block in BLOCKS for line in block)


def test_the_manifests_of_the_page_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    (line,) = [line.strip() for line in text.splitlines() if line.startswith("    launcher submit")]
    command, _, applied = line.partition(" | ")
    assert applied == "kubectl apply -f -"
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command)[1:]) == 0
    kinds = [item["kind"] for item in yaml.safe_load_all(capsys.readouterr().out)]
    assert kinds == ["Service", "Job"]
