"""Every way to start the launcher, with real processes: what runs, and what is stopped and why."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "accelerate_config"
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """SimpleCNN on a few embedded images."""
    text = (ROOT / "recipes" / "simplecnn.py").read_text()
    path = tmp_path / "tiny.py"
    path.write_text(text.replace("        CIFAR10,", "        Synthetic,"))
    return str(path)


def words(recipe: str, tmp_path: Path) -> list[str]:
    settings = ["data.source.count=200", "data.batch_size=20", "epochs=1"]
    return ["-m", "launcher", recipe, *settings, "--wandb", "off", "--runs", str(tmp_path / "runs")]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    home = {"HF_HOME": "/nonexistent"}  # no default config of this machine's user
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **home, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def ranks(done: subprocess.CompletedProcess[str]) -> int:
    """The number of ranks that the header tells; one header only."""
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = re.findall(r"= (\d+) rank\(s\)", done.stdout)
    return int(found)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("launch", "wanted"),
    [
        ((sys.executable,), 1),
        ((*ACCELERATE, "--config_file", str(CONFIGS / "cpu.yaml")), 1),
        ((*ACCELERATE, "--config_file", str(CONFIGS / "cpu_many.yaml")), 2),
        ((*ACCELERATE, "--multi_gpu", "--num_processes", "2"), 2),
        ((*TORCHRUN, "--standalone", "--nproc-per-node", "2"), 2),
    ],
    ids=["python", "cpu.yaml", "cpu_many.yaml", "multi_gpu", "torchrun"],
)
def test_as_many_processes_train_together_as_were_asked_for(
    launch: tuple[str, ...], wanted: int, recipe: str, tmp_path: Path
) -> None:
    done = run([*launch, *words(recipe, tmp_path)], ACCELERATE_USE_CPU="true")
    assert ranks(done) == wanted
    (folder,) = (tmp_path / "runs").iterdir()
    row = json.loads((folder / "metrics.jsonl").read_text())
    assert row["test/images"] == 40


def test_two_nodes_train_together(recipe: str, tmp_path: Path) -> None:
    """The configuration for several nodes, with two "nodes" on this machine."""
    port = str(free_port())
    nodes = []
    for machine_rank in ("1", "0"):
        command = [*ACCELERATE, "--config_file", str(CONFIGS / "nodes.yaml")]
        command += ["--num_processes", "2", "--machine_rank", machine_rank]
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        nodes.append(
            subprocess.Popen(
                [*command, *words(recipe, tmp_path)],
                cwd=ROOT,
                env={**os.environ, "ACCELERATE_USE_CPU": "true"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "= 2 rank(s) x 10 image(s)" in outputs[1][0]
    assert "bf16 (accelerate config)" in outputs[1][0]
    assert outputs[0][0] == "", "only rank 0 speaks"


def test_a_gpu_configuration_without_a_gpu_runs_on_the_cpu(recipe: str, tmp_path: Path) -> None:
    command = [*ACCELERATE, "--config_file", str(CONFIGS / "gpu.yaml")]
    done = run([*command, *words(recipe, tmp_path)], ACCELERATE_USE_CPU="true")
    assert ranks(done) == 1
    assert "bf16 (accelerate config)" in done.stdout


def test_a_configuration_for_eight_gpus_starts_as_many_ranks_as_told(
    recipe: str, tmp_path: Path
) -> None:
    command = [*ACCELERATE, "--config_file", str(CONFIGS / "gpu_many.yaml")]
    done = run(
        [*command, "--num_processes", "2", *words(recipe, tmp_path)], ACCELERATE_USE_CPU="true"
    )
    assert ranks(done) == 2


def test_processes_that_were_asked_for_but_do_not_start_stop_the_run(
    recipe: str, tmp_path: Path
) -> None:
    command = [*ACCELERATE, "--cpu", "--num_processes", "2"]
    done = run([*command, *words(recipe, tmp_path)])
    assert done.returncode != 0
    assert "2 processes were asked for, but accelerate launch started 1" in done.stderr
    assert "--multi_gpu --num_processes 2" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_an_error_of_the_user_is_said_once_by_all_ranks_together(
    recipe: str, tmp_path: Path
) -> None:
    done = run(
        [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *words(recipe, tmp_path), "epochs=0"],
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode != 0
    assert done.stderr.count("launcher: epochs=0") == 1
    assert 'File "' not in done.stderr.partition("torch/distributed")[0]
