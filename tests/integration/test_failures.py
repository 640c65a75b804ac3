"""One rank fails: all end in time, and the log names it and says why, once."""

import json
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.processes import PATIENCE, RESUMABLE, ROOT, TORCHRUN, Run, fingerprint, free_port

FAILING = ROOT / "tests" / "support" / "failing.py"
SHORT = ("epochs=4", "--name", "run", "--checkpoint-every", "7")
EPOCHS = ("--checkpoint-every", "1e")
HOST = re.escape(socket.gethostname())


def failing(
    launch: int | tuple[str, ...],
    folder: Path,
    fail: str,
    *words: str,
    rank: int = 1,
    at: str = "40",
) -> Run:
    environment = {"FAIL": fail, "FAIL_RANK": str(rank), "FAIL_PASS": at}
    return Run(launch, folder, *SHORT, *words, recipe=FAILING, environment=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "rank"),
    [(2, 0), (TORCHRUN, 1)],
    ids=["srun", "torchrun"],
)
def test_the_rank_that_raised_is_named_once_with_its_traceback(
    launch: int | tuple[str, ...], rank: int, tmp_path: Path
) -> None:
    run = failing(launch, tmp_path, "raise", rank=rank)
    assert run.end() != 0
    ours = run.text().partition("torch/distributed/run.py")[0]
    assert ours.count("Traceback") == 1 + ours.count('<frozen runpy>", line 198')
    assert len(re.findall(rf"launcher: rank {rank} of 2 on {HOST} failed\n", ours)) == 1
    assert ours.count("ArithmeticError: a fault of the recipe\nin step 40 (epoch 2)") == 1
    assert "closed by peer" not in ours
    assert "does not answer" not in ours  # rank 0 hosts the store, which is gone after its failure


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "fail"), [(TORCHRUN, "kill"), (2, "stop")])
def test_a_rank_that_does_not_answer_ends_the_run_and_is_named(
    launch: int | tuple[str, ...], fail: str, tmp_path: Path
) -> None:
    run = failing(launch, tmp_path, fail, "--timeout", "4")
    run.wait_for("epoch 1/4")
    stopped = run.ranks()[1]
    run.wait_for("does not answer")
    assert len(re.findall(rf"launcher: rank 1 on {HOST} does not answer.*step 40", run.text())) == 1
    if fail == "stop":
        stopped.send_signal(signal.SIGKILL)
    assert run.end() != 0


@pytest.mark.slow
@pytest.mark.thorough
def test_the_one_of_four_ranks_that_was_killed_is_named(tmp_path: Path) -> None:
    """Not those who were waiting for others who were waiting for it."""
    run = failing(4, tmp_path, "kill", rank=2)
    assert run.end() != 0
    assert len(re.findall(rf"launcher: rank 2 on {HOST} does not answer", run.text())) == 1
    assert run.text().count("launcher: ") == 2  # the header is the other


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named_in_time(tmp_path: Path) -> None:
    port = str(free_port())
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run = Run(1, tmp_path, *SHORT, "--join-timeout", "2", environment=world)
    assert run.end() == 1
    assert "3 of 4 processes did not come within 2 s: ranks 1-3" in run.text()
    assert "--join-timeout" in run.text()
    lonely = world | {"RANK": "2"}  # nobody listens there
    run = Run(1, tmp_path, *SHORT, "--join-timeout", "2", environment=lonely)
    assert run.end() == 1
    assert re.search(rf"rank 2 on {HOST} cannot reach rank 0 at 127.0.0.1 port {port}", run.text())


@pytest.mark.slow
def test_a_signal_ends_the_wait_for_the_others(tmp_path: Path) -> None:
    port = str(free_port())
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run = Run(1, tmp_path, *SHORT, environment=world)
    until = time.monotonic() + PATIENCE
    while not listens(int(port)) and time.monotonic() < until:
        time.sleep(0.1)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 75
    assert "was stopped by SIGTERM before training began" in run.text()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_what_one_rank_refuses_ends_all_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\nfrom dataclasses import replace\n"
        "from tests.support.resumable import recipe\n"
        "recipe = recipe if os.environ['RANK'] == '0' else replace(recipe, precision='fp16')\n"
    )
    run = Run(2, tmp_path, recipe=tmp_path / "mine.py")
    assert run.end() == 2
    assert run.text().count("launcher: ") == 1
    assert re.search(rf"launcher: rank 1 of 2 on {HOST}: precision fp16", run.text())
    assert not (tmp_path / "runs").exists()


def nan_run(folder: Path, *words: str, ranks: int = 1, rank: int = 0) -> Run:
    return failing(ranks, folder, "nan", *words, rank=rank)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    run = nan_run(tmp_path, *EPOCHS, "--log-every", "25", "clip_norm=none")
    assert run.end() == 1
    # The losses are read after step 50, and name the step all the same.
    assert "the loss is not finite at step 40 (epoch 2, learning rate 0.000" in run.text()
    assert "gradient norm nan at step 50" in run.text()
    names = [path.name for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir()]
    assert names == ["step-000000025"]


def test_a_gradient_that_is_not_finite_replaces_no_good_state(tmp_path: Path) -> None:
    """Under a finite loss, at the last step of an epoch: the next loss would come too late."""
    run = failing(1, tmp_path, "gradient", *EPOCHS, "clip_norm=none", rank=0, at="50")
    assert run.end() == 1
    assert "a parameter is not finite after step 50 (epoch 2, learning rate 0.000" in run.text()
    folder = tmp_path / "runs" / "run"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000000025"]
    for path in (
        folder / "best.safetensors",
        folder / "checkpoints/step-000000025/weights.safetensors",
    ):
        assert all(value.isfinite().all() for value in load_file(path).values())


@pytest.mark.slow
def test_rolling_back_finds_the_step_whose_gradient_was_not_finite(tmp_path: Path) -> None:
    """The loss is not finite from step 39 on; with 39 left out, 38 fails again, and is found."""
    prints = {}
    for on_nan, at in (("skip", "38"), ("rollback", "38,42")):
        folder = tmp_path / on_nan
        folder.mkdir()
        run = failing(2, folder, "gradient", f"on_nan={on_nan}", at=at)
        assert run.end() == 0, run.text()
        prints[on_nan] = fingerprint(folder / "runs" / "run")
    assert "rolled back to step 35; step 39 is skipped" in run.text()
    assert "rolled back to step 35; step 38 is skipped" in run.text()
    assert prints["skip"] == prints["rollback"]


@pytest.mark.slow
def test_an_evaluation_whose_loss_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    recipe = tmp_path / "blind.py"
    recipe.write_text(
        "from dataclasses import replace\nimport math\nfrom tests.support import resumable\n"
        "class Blind(resumable.Network):\n    def forward(self, images):\n"
        "        return super().forward(images) * (1 if self.training else math.nan)\n"
        "recipe = replace(resumable.recipe, model=Blind)\n"
    )
    run = Run(1, tmp_path, *SHORT, "epochs=1", "--wandb", "offline", recipe=recipe)
    assert run.end() == 1, run.text()
    assert "epoch 1/1" in run.text()
    assert "!!! the test loss of epoch 1 is nan !!!" in run.text()
    assert "launcher: the test loss at the end is nan, not a finite number" in run.text()
    assert "best" not in run.text()
    (row,) = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row, parse_constant=pytest.fail)["test/loss"] is None
    assert not (tmp_path / "runs" / "run" / "best.safetensors").exists()


@pytest.mark.slow
def test_a_skipped_update_leaves_the_run_finite(tmp_path: Path) -> None:
    run = nan_run(tmp_path, "on_nan=skip")
    assert run.end() == 0, run.text()
    assert "no update in step 40" in run.text()
    weights = load_file(tmp_path / "runs" / "run" / "final.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.slow
def test_skipping_and_rolling_back_leave_out_the_same_update(tmp_path: Path) -> None:
    """Also over two ranks, of which one has the bad loss, and with running statistics."""
    prints = {}
    for on_nan in ("skip", "rollback"):
        folder = tmp_path / on_nan
        folder.mkdir()
        run = nan_run(folder, f"on_nan={on_nan}", ranks=2, rank=1)
        assert run.end() == 0, run.text()
        prints[on_nan] = fingerprint(folder / "runs" / "run")
        assert ("rolled back to step 35; step 40 is skipped" in run.text()) == (on_nan != "skip")
    assert prints["skip"] == prints["rollback"]


@pytest.mark.slow
def test_a_run_without_any_good_update_stops(tmp_path: Path) -> None:
    recipe = tmp_path / "hopeless.py"
    recipe.write_text(
        "from dataclasses import replace\nimport math\nfrom tests.support.resumable import recipe\n"
        "def loss(logits, targets):\n    return logits.sum() * math.inf\n"
        "recipe = replace(recipe, loss=loss, on_nan='skip')\n"
    )
    run = Run(1, tmp_path, *SHORT, recipe=recipe)
    assert run.end() == 1
    assert "not finite in each of the" in run.text()


@pytest.mark.slow
def test_an_operation_without_a_deterministic_algorithm_is_refused(tmp_path: Path) -> None:
    """It would make a run that promises to repeat bit by bit differ without a word."""
    run = failing(1, tmp_path, "unsteady", "deterministic=true", rank=0)
    assert run.end() == 2
    assert re.search(r"launcher: deterministic=true, and put_ in step 40; expected", run.text())
    assert "Traceback" not in run.text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_parameters_without_a_gradient_are_named_before_training(
    tmp_path: Path, ranks: int
) -> None:
    recipe, start = tmp_path / "unused.py", "        super().__init__()\n"
    unused = f"{start}        self.unused = nn.Linear(3, 3)\n"
    recipe.write_text(RESUMABLE.read_text().replace(start, unused, 1))
    run = Run(ranks, tmp_path, *SHORT, recipe=recipe)
    assert run.end() == 2
    line = r"launcher: parameters of .*Network that its scores do not depend on: unused.weight, "
    assert len(re.findall(line, run.text())) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "rank", "words", "at"),
    [(2, 0, (), "40"), (TORCHRUN, 1, (), "40"), (2, 1, ("accumulate=2",), "80")],
    ids=["srun", "torchrun", "last of two passes"],
)
def test_parameters_that_one_rank_leaves_out_in_a_step_are_named(
    launch: int | tuple[str, ...], rank: int, words: tuple[str, ...], at: str, tmp_path: Path
) -> None:
    """The others have no such step: what only one rank refuses is said all the same, and once."""
    run = failing(launch, tmp_path, "skip", *words, rank=rank, at=at)
    assert run.end() != 0
    line = r"launcher: parameters of .*Failing that its scores in step 40 do not depend on: layers"
    assert len(re.findall(line, run.text())) == 1
    assert f"type unused_parameters=allow{' (rank 1 of 2' * rank}" in run.text()
    assert "killed, stopped or cut off" not in run.text()
