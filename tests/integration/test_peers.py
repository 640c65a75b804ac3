"""The records' scripts in gpu.py: they wait for their turns, and their tables are read."""

from pathlib import Path

import pytest

from benchmarks.record import Peer, epochs_in, epochs_of, on_cpu, runs_in
from launcher.data import sources
from tests.support.helpers import tiny_recipe

# What the records' scripts have in common, as far as it is changed or read.
SCRIPT = """
import os
from math import ceil

import torch

@torch.compile(fullgraph=True)
def double(values: list[torch.half]):
    return values * 2

def main(run, model):
    saved = torch.load(os.path.join("cifar10", "train.pt"), map_location=torch.device("cuda"))
    images = torch.zeros(3, device="cuda").half().cuda()
    train_loader = range(4)
    total_train_steps = ceil(7.5 * len(train_loader))
    starter, ender = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    starter.record()
    for epoch in range(ceil(total_train_steps / len(train_loader))):
        ender.record()
        torch.cuda.synchronize()
        seconds = 1e-3 * starter.elapsed_time(ender)
        print(f"|  {run}  |  {epoch}  |  0.5  |          |  {seconds:.4f}  |")
    print(f"|     |  eval  |  0.6  |  0.{run}7  |  {epoch + 1}.5000  |")

if __name__ == "__main__":
    model = torch.nn.Linear(1, 1)
    model.compile(mode="max-autotune")
    print("|  run     |  epoch  |  val_acc  |  tta_val_acc  |  time_seconds  |")
    for run in range(200):
        main(run, model)
        if run == 2:
            raise SystemExit("the script is over")
"""


def test_a_script_runs_when_its_turn_comes(tmp_path: Path) -> None:
    script = tmp_path / "record.py"
    script.write_text(SCRIPT)
    peer = Peer(script, sources.load(tiny_recipe().data), cpu_epochs=2)
    try:
        for run in range(2):
            assert peer.turn(60) == {
                "accuracy": 0.6,
                "accuracy_tta": float(f"0.{run}7"),
                "seconds": 2.5,
            }
        assert "the script is over" in peer.turn(60)["failed"]
        assert "the script is over" in peer.turn(60)["failed"]
    finally:
        peer.end()


def test_a_script_on_a_cpu_keeps_nothing_of_a_gpu() -> None:
    assert epochs_of(SCRIPT) == 7.5
    text = on_cpu(SCRIPT, 3, "bfloat16")
    assert "cuda" not in text
    assert "compile" not in text
    assert "list[torch.bfloat16]" in text
    assert "for epoch in range(3):" in text
    with pytest.raises(SystemExit, match="another version"):
        on_cpu(SCRIPT.replace("starter.record()", "torch.cuda.nvtx.mark()"), 3, "float")
    with pytest.raises(SystemExit, match="another version"):
        on_cpu(SCRIPT.replace("for epoch in range", "for each in range"), 3, "float")


def test_the_columns_are_found_by_their_names() -> None:
    table = "|  run  |  epoch  |  tta_val_acc  |  val_acc  |  total_time_seconds  |\nother\n"
    table += (
        "|  0  |  1  |       |  0.91  |  1.25  |\n|     |  eval  |  0.95  |  0.94  |  2.50  |\n"
    )
    assert runs_in(table) == [{"accuracy": 0.94, "accuracy_tta": 0.95, "seconds": 2.5}]
    assert epochs_in(table) == [1.25, 2.5]
    assert runs_in("Traceback") == []
