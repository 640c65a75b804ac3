"""The rows that W&B was given are known to the next attempt."""

from pathlib import Path

from launcher.loggers.wandb_history import WandbHistory, last_row_on_disk


def test_what_was_logged_once_is_not_new_to_the_next_attempt(tmp_path: Path) -> None:
    first = WandbHistory(tmp_path)
    assert first.is_new("step", 1)
    assert first.is_new("epoch", 1)
    first.add({"train/loss": 0.5, "train/step": 5, "epoch": 1})
    first.add({"test/accuracy": 0.5, "train/step": 9, "epoch": 1})
    second = WandbHistory(tmp_path)
    assert second.rows == first.rows
    assert [second.is_new("step", step) for step in (5, 6, 9)] == [False, True, True]
    assert [second.is_new("epoch", epoch) for epoch in (1, 2)] == [False, True]


def test_a_line_that_a_kill_cut_off_was_not_logged(tmp_path: Path) -> None:
    first = WandbHistory(tmp_path)
    first.add({"train/loss": 0.5, "train/step": 5})
    path = tmp_path / "wandb-rows.jsonl"
    path.write_text(path.read_text() + '{"train/loss": 0.4, "train/st')
    second = WandbHistory(tmp_path)
    second.add({"train/loss": 0.3, "train/step": 7})
    assert [row["train/step"] for row in WandbHistory(tmp_path).rows] == [5, 7]


def test_a_log_that_w_and_b_cannot_read_has_no_row(tmp_path: Path) -> None:
    (tmp_path / "offline-run-1").mkdir()
    assert last_row_on_disk(tmp_path.glob("offline-run-*")) == 0
