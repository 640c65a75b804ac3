"""While the ranks load their data: one that dies is named, slow ones are waited for, all stop."""

import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.helpers import alike
from tests.support.processes import RESUMABLE, Run, places_of

HOST = re.escape(socket.gethostname())
FAILING = "os.kill(os.getpid(), signal.{})"


@contextmanager
def two_ranks(folder: Path, odd: int, does: str, *words: str) -> Iterator[list[Run]]:
    """Two ranks as srun starts them, of which the odd one does something while it prepares."""
    hook = f'        if os.environ["RANK"] == "{odd}":\n            {does}\n'
    source = RESUMABLE.read_text().replace(
        "\nfrom functools", "\nimport os, signal, time\nfrom functools"
    )
    here = '        super().__init__()\n        print("prepares", flush=True)\n'
    recipe = folder / "preparing.py"
    recipe.write_text(source.replace("        super().__init__()\n", here + hook))
    words = ("--name", "run", "--timeout", "3", "--max-steps", "2", *words)
    places = places_of(2)
    runs = [Run(1, folder, *words, recipe=recipe, environment=place) for place in places]
    try:
        yield runs
    finally:
        for run in runs:
            run.process.kill()
            run.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGKILL", alike("SIGSTOP")])
def test_a_rank_that_stops_answering_is_named(number: str, tmp_path: Path) -> None:
    with two_ranks(tmp_path, 1, FAILING.format(number)) as (first, _):
        assert first.end() == 1
        named = rf"launcher: rank 1 on {HOST} does not answer: killed, stopped or cut off"
        assert re.search(rf"{named} \(rank 0 of 2 on {HOST}, before training\)", first.text())


@pytest.mark.slow
def test_rank_0_that_is_stopped_with_its_store_is_named(tmp_path: Path) -> None:
    with two_ranks(tmp_path, 0, FAILING.format("SIGSTOP")) as (_, second):
        assert second.end() == 1
        assert re.search(rf"launcher: rank 0 on {HOST}, or the key-value store", second.text())


@pytest.mark.slow
def test_a_rank_that_loads_for_long_is_waited_for(tmp_path: Path) -> None:
    with two_ranks(tmp_path, 1, "time.sleep(15)") as runs:
        assert [run.end() for run in runs] == [0, 0], "".join(run.text() for run in runs)


@pytest.mark.slow
@pytest.mark.parametrize("to", [(0, 1), pytest.param((0,), marks=pytest.mark.slow)])
def test_a_signal_ends_all_before_they_begin(to: tuple[int, ...], tmp_path: Path) -> None:
    with two_ranks(tmp_path, 1, "time.sleep(6)", "--resume") as runs:
        runs[1].wait_for("prepares")
        for rank in to:
            runs[rank].process.send_signal(signal.SIGTERM)
        assert [run.end() for run in runs] == [75, 75], "".join(run.text() for run in runs)
        both = runs[0].text() + runs[1].text()
        assert len(re.findall("launcher: rank . of 2 .* was stopped by SIGTERM before", both)) == 1
        assert "does not answer" not in both
        assert not (tmp_path / "runs").exists()
