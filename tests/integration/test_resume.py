"""A run that was interrupted, anywhere and by anyone, ends with the weights it would have had."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.helpers import alike
from tests.support.processes import (
    ACCELERATE,
    ACCELERATE_2,
    PATIENCE,
    PYTHON,
    TORCHRUN_1,
    Run,
    fingerprint,
    places_of,
    write_double,
)

SHORT = ("epochs=8", "--checkpoint-every", "7")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on one process."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(1, folder, "--name", "whole", *SHORT)
    assert run.end() == 0, run.text()
    return folder / "runs" / "whole"


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on two processes."""
    folder = tmp_path_factory.mktemp("whole_of_two")
    run = Run(2, folder, "--name", "whole", *SHORT)
    assert run.end() == 0, run.text()
    return folder / "runs" / "whole"


def rows(run: Path) -> list[dict[str, object]]:
    """The figures of each epoch that do not depend on the clock."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    clock = {"seconds", "train/images_per_second"}
    return [{name: x[name] for name in x.keys() - clock} for x in lines]


def resume(folder: Path, ranks: int = 1) -> Run:
    run = Run(ranks, folder, "--name", "cut", "--resume", *SHORT)
    assert run.end() == 0, run.text()
    return run


@pytest.mark.parametrize("name", ["SIGTERM", alike("SIGINT"), alike("SIGUSR1")])
def test_a_signal_saves_and_the_resumed_run_ends_bit_identical(
    name: str, whole: Path, tmp_path: Path
) -> None:
    launch = PYTHON if name == "SIGTERM" else 1  # a new process has its own seed for hashes
    run = Run(launch, tmp_path, "--name", "cut", *SHORT)
    run.wait_for("epoch 3/8")
    run.process.send_signal(signal.Signals[name])
    assert run.end() == 75, run.text()
    assert f"by {name}" in run.text()
    assert "Traceback" not in run.text()
    assert "resumed after step" in resume(tmp_path).text()
    assert fingerprint(tmp_path / "runs" / "cut") == fingerprint(whole)
    assert rows(tmp_path / "runs" / "cut") == rows(whole)


INTERRUPTED = """
import os, signal
from dataclasses import replace
from launcher.training import evaluation
from tests.support import resumable

evaluation.EVALUATION_BATCH_ON_CPU = 50
signalling = int(os.environ.get("AT", 0)) if os.environ.get("RANK", "0") == "0" else 0

class Interrupted(resumable.Network):
    evaluated = 0

    def forward(self, images):
        if not self.training and len(images) > 2:  # fewer are a trial of the network
            Interrupted.evaluated += 1
            if Interrupted.evaluated == signalling:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(images)

recipe = replace(resumable.recipe, model=Interrupted, epochs=3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "passes"),  # of an epoch's evaluation on one rank, with that of the samples
    [(1, 6), alike(2, 4)],
)
def test_a_signal_within_an_evaluation_leaves_it_to_the_resumed_run(
    ranks: int, passes: int, tmp_path: Path
) -> None:
    recipe = tmp_path / "interrupted.py"
    recipe.write_text(INTERRUPTED)
    plain = Run(ranks, tmp_path, "--name", "whole", recipe=recipe)
    assert plain.end() == 0, plain.text()
    second = {"AT": str(passes + 2)}  # pass of the second epoch's
    cut = Run(ranks, tmp_path, "--name", "cut", recipe=recipe, environment=second)
    cut.end()
    assert "goes on from here" in cut.text()
    assert "epoch 2/3" not in cut.text()
    resumed = Run(ranks, tmp_path, "--name", "cut", "--resume", recipe=recipe)
    assert resumed.end() == 0, resumed.text()
    assert "resumed after step 50" in resumed.text()
    folders = [tmp_path / "runs" / name for name in ("whole", "cut")]
    assert rows(folders[0]) == rows(folders[1])
    for name in ("best.safetensors", "final.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(whole: Path, tmp_path: Path) -> None:
    chance = random.Random(int(time.time()))
    for _ in range(3):
        run = Run(1, tmp_path, "--name", "cut", "--resume", *SHORT)
        run.wait_for("run folder")
        time.sleep(chance.uniform(0, 1.0))
        run.process.kill()
        run.end()
    resume(tmp_path)
    assert fingerprint(tmp_path / "runs" / "cut") == fingerprint(whole)
    assert rows(tmp_path / "runs" / "cut") == rows(whole)


@pytest.mark.slow
def test_several_ranks_stop_together_and_resume_bit_identical(
    whole_of_two: Path, tmp_path: Path
) -> None:
    run = Run(2, tmp_path, "--name", "cut", *SHORT)
    run.wait_for("epoch 3/8")
    first, second = run.ranks()
    os.kill(first.pid, signal.SIGTERM)
    time.sleep(0.7)  # as seen on clusters; a rank that left alone would hang the other
    if second.is_running():
        os.kill(second.pid, signal.SIGTERM)
    assert run.end() != 0
    assert "goes on from here" in run.text()
    resume(tmp_path, 2)
    assert fingerprint(tmp_path / "runs" / "cut") == fingerprint(whole_of_two)


@pytest.mark.slow
@pytest.mark.thorough
def test_sums_over_four_ranks_are_rounded_the_same_after_a_resume(tmp_path: Path) -> None:
    """Two numbers have one sum; of more, the order decides, and DDP changes it after one step."""
    for name, parts in {"whole": ("60",), "cut": ("10", "55", "60")}.items():
        for steps in parts:
            words = ("--name", name, "epochs=4", "--resume", "--max-steps", steps)
            run = Run(4, tmp_path, *words)
            assert run.end() == 0, run.text()
    assert fingerprint(tmp_path / "runs" / "cut") == fingerprint(tmp_path / "runs" / "whole")
    assert rows(tmp_path / "runs" / "cut") == rows(tmp_path / "runs" / "whole")


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_costs_nothing(whole_of_two: Path, tmp_path: Path) -> None:
    run = Run(2, tmp_path, "--name", "cut", *SHORT)
    run.wait_for("epoch 3/8")
    run.ranks()[1].kill()
    assert run.end() != 0
    resume(tmp_path, 2)
    assert fingerprint(tmp_path / "runs" / "cut") == fingerprint(whole_of_two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "name"),
    [
        alike(ACCELERATE, "SIGTERM", id="dies-of-it"),
        alike(ACCELERATE, "SIGINT", id="a-terminal-tells-both"),
        pytest.param(ACCELERATE_2, "SIGTERM", id="passes-it-on"),
        pytest.param(TORCHRUN_1, "SIGUSR1", id="an-agent-dies-of-it"),
    ],
)
def test_a_signal_to_the_launcher_above_leaves_no_orphan_and_loses_nothing(
    launch: tuple[str, ...], name: str, whole: Path, whole_of_two: Path, tmp_path: Path
) -> None:
    """Some launchers pass a signal on, some die of it: then the ranks notice that it is gone."""
    run = Run(launch, tmp_path, "--name", "cut", *SHORT)
    run.wait_for("epoch 3/8")
    ranks = run.ranks()
    run.process.send_signal(signal.Signals[name])
    if name == "SIGINT":  # a terminal tells both: they are one group
        ranks[0].send_signal(signal.SIGINT)
    run.end()
    for rank in ranks:
        rank.wait(timeout=PATIENCE)
    assert "epoch 8/8" not in run.text()
    folder = tmp_path / "runs" / "cut"
    stopped = json.loads(newest_state(folder).read_text())["progress"]["step"]
    assert "goes on from here" in run.text(), run.text()
    resumed = resume(tmp_path, len(ranks))
    assert f"resumed after step {stopped}" in resumed.text()
    assert fingerprint(folder) == fingerprint(whole if len(ranks) == 1 else whole_of_two)


def newest_state(folder: Path) -> Path:
    return max((folder / "checkpoints").iterdir()) / "state.json"


@pytest.mark.slow
def test_five_kills_of_a_random_rank_at_random_moments_change_nothing(
    whole_of_two: Path, tmp_path: Path
) -> None:
    seed = int(time.time())
    chance = random.Random(seed)
    for _ in range(5):
        run = Run(2, tmp_path, "--name", "cut", "--resume", *SHORT)
        run.wait_for("run folder")
        time.sleep(chance.uniform(0, 1.0))
        if ranks := run.ranks():
            chance.choice(ranks).kill()
        run.end()
    resume(tmp_path, 2)
    assert fingerprint(tmp_path / "runs" / "cut") == fingerprint(whole_of_two), seed
    assert rows(tmp_path / "runs" / "cut") == rows(whole_of_two), seed


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    run = Run(1, tmp_path, "--name", "cut", "epochs=4000")
    run.wait_for("first step")
    while run.process.poll() is None:
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.0005)
    assert run.end() == 130


@pytest.mark.slow
@pytest.mark.parametrize("left", ["nothing", "another run"])
def test_only_the_machine_of_rank_0_need_have_the_run_folder(
    left: str, whole_of_two: Path, tmp_path: Path
) -> None:
    """The others take the checkpoint from it, whatever they have of that name themselves."""
    machines = [tmp_path / "first", tmp_path / "second"]
    for machine in machines:
        machine.mkdir()
    if left == "another run":
        other = ("--name", "cut", "seed=7", "epochs=8", "--max-steps", "90")
        assert Run(1, machines[1], *other).end() == 0

    def run(*words: str) -> None:
        runs = []
        for machine, place in zip(machines, places_of(2), strict=True):
            place |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": place["RANK"]}
            words = ("--name", "cut", "--resume", *SHORT, *words)
            runs.append(Run(1, machine, *words, environment=place))
        assert [run.end() for run in runs] == [0, 0], runs[0].text() + runs[1].text()

    run("--max-steps", "90")
    run()
    assert fingerprint(machines[0] / "runs" / "cut") == fingerprint(whole_of_two)


@pytest.mark.slow
def test_other_numbers_of_ranks_follow_the_same_trajectory(tmp_path: Path) -> None:
    """1 -> 2 -> 4 -> 1 processes, without what is each rank's own: dropout and BatchNorm."""
    recipe = write_double(tmp_path / "double.py")
    weights = {}
    for name, parts in {"one": (1,), "many": (1, 2, 4, 1)}.items():
        folder = tmp_path / name
        folder.mkdir()
        for number, ranks in enumerate(parts, start=1):
            steps = str(88 * number // len(parts))
            words = ("--name", "cut", "epochs=4", "--resume", "--max-steps", steps)
            run = Run(ranks, folder, *words, recipe=recipe)
            assert run.end() == 0, run.text()
        weights[name] = load_file(folder / "runs" / "cut" / "final.safetensors")
    assert weights["one"]["layers.0.weight"].dtype == torch.float64
    for key, value in weights["one"].items():
        torch.testing.assert_close(weights["many"][key], value, rtol=0, atol=1e-12, msg=key)


COUNTING = """
from functools import partial
import torch
from torch import nn
from torch.optim import SGD
from launcher import Images, Recipe, Synthetic

class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 10)
        self.register_buffer("brightest", torch.zeros(3, dtype=torch.long))
        self.register_buffer("turn", torch.ones(1, dtype=torch.complex64))

    def forward(self, images):
        means = images.mean((2, 3))
        if self.training:
            self.brightest += torch.bincount(means.argmax(1), minlength=3)
        return self.fc(means * (1 + self.brightest) * self.turn.real)

data = Images(partial(Synthetic, count=60), batch_size=10, mean=(0.5,) * 3, std=(0.5,) * 3)
recipe = Recipe(model=Counting, data=data, optimizer=partial(SGD, lr=0.01), epochs=2)
"""


@pytest.mark.slow
def test_counts_that_a_network_keeps_are_each_ranks_own(tmp_path: Path) -> None:
    """A resumed run had those of rank 0 on all ranks."""
    (tmp_path / "counting.py").write_text(COUNTING)
    for name, words in (("whole", ()), ("cut", ("--max-steps", "9")), ("cut", ("--resume",))):
        run = Run(2, tmp_path, "--name", name, *words, recipe=tmp_path / "counting.py")
        assert run.end() == 0, run.text()
    assert fingerprint(tmp_path / "runs" / "cut") == fingerprint(tmp_path / "runs" / "whole")
