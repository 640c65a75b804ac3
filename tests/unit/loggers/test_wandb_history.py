"""The rows that W&B was given are known to the next attempt."""

from itertools import pairwise
from pathlib import Path

import pytest

from launcher.loggers.wandb import last_row
from launcher.loggers.wandb_history import BLOCK, WandbHistory, log_records
from tests.unit.loggers.test_wandb import PLAN, begin, inspect, own_world, step_report


def test_what_was_logged_once_is_not_new_to_the_next_attempt(tmp_path: Path) -> None:
    first = WandbHistory(tmp_path)
    assert first.is_new("step", 1)
    assert first.is_new("epoch", 1)
    first.add({"train/loss": 0.5, "train/step": 5, "epoch": 1})
    first.add({"test/accuracy": 0.5, "seconds": 3.0, "train/step": 9, "epoch": 1})
    first.close()
    second = WandbHistory(tmp_path)
    assert second.rows == first.rows
    assert [second.is_new("step", step) for step in (5, 6, 9)] == [False, True, True]
    assert [second.is_new("epoch", epoch) for epoch in (1, 2)] == [False, True]


@pytest.mark.parametrize("cut", ['{"train/loss": 0.4, "train/st', "12", "null"])
def test_a_line_that_is_no_row_was_not_logged(cut: str, tmp_path: Path) -> None:
    first = WandbHistory(tmp_path)
    first.add({"train/loss": 0.5, "train/step": 5})
    first.close()
    path = tmp_path / "wandb-rows.jsonl"
    path.write_text(path.read_text() + cut)
    second = WandbHistory(tmp_path)
    second.add({"train/loss": 0.3, "train/step": 7})
    second.close()
    assert [row["train/step"] for row in WandbHistory(tmp_path).rows] == [5, 7]


# One log of W&B's, as real as its client writes it


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An offline run of 300 rows, in several blocks."""
    home = tmp_path_factory.mktemp("home")
    with own_world(home):
        logger = begin("offline", home / "run")
        for step in range(1, 301):
            logger.step(step_report(1, step), PLAN)
        logger.finish(0)
    (path,) = Path(logger.where).glob("*.wandb")
    return path.read_bytes()


def test_the_log_of_an_ended_run_has_its_last_row(log: bytes, tmp_path: Path) -> None:
    assert len(log) > 2 * BLOCK
    assert last_row_of(log, tmp_path) == 300


@pytest.mark.parametrize("size", [BLOCK - 3, BLOCK + 5, 2 * BLOCK, 2 * BLOCK + 100])
def test_a_log_that_a_kill_cut_off_has_the_rows_that_w_and_b_reads(
    size: int, log: bytes, tmp_path: Path
) -> None:
    found = last_row_of(log[:size], tmp_path)
    items = [record.get("history", {}).get("item", {}) for record in inspect(tmp_path)]
    assert 0 < found < 300
    assert found == max(item.get("row", 0) for item in items)


def test_from_byte_to_byte_a_longer_log_has_the_next_row(log: bytes, tmp_path: Path) -> None:
    cuts = [last_row_of(log[:size], tmp_path) for size in range(BLOCK - 700, BLOCK + 700, 7)]
    assert {after - before for before, after in pairwise(cuts)} == {0, 1}


@pytest.mark.parametrize("size", [0, 5, 7, 20])
def test_the_log_of_a_run_that_was_killed_at_once_has_no_row(
    size: int, log: bytes, tmp_path: Path
) -> None:
    assert last_row_of(log[:size], tmp_path) == 0


def last_row_of(log: bytes, folder: Path) -> int:
    path = folder / "run-cut.wandb"
    path.write_bytes(log)
    return last_row(path)


# The format, at the ends of its blocks


@pytest.mark.parametrize("left", range(9))
def test_records_are_found_wherever_a_block_ends(left: int) -> None:
    """`left` bytes of the first block are behind the first record."""
    records = [b"a" * (BLOCK - 14 - left), b"b" * 100, b"c" * (3 * BLOCK), b"d"]
    log = in_blocks(records)
    assert list(log_records(log)) == records
    assert list(log_records(log[: 2 * BLOCK])) == records[:2]


def in_blocks(records: list[bytes]) -> bytes:
    """A log as LevelDB's format has it, with W&B's 7 bytes before; nobody reads its checksums."""
    log = b":W&B---"
    for record in records:
        rest, is_first = record, True
        while rest or is_first:
            if (left := BLOCK - len(log) % BLOCK) < 7:
                log += bytes(left)
                continue
            part, rest = rest[: left - 7], rest[left - 7 :]
            kind = (1 if not rest else 2) if is_first else (4 if not rest else 3)
            log += bytes(4) + len(part).to_bytes(2, "little") + bytes([kind]) + part
            is_first = False
    return log
