"""Words for numbers: the same in every command."""

import pytest

from launcher.utils.text import count, duration, sizes


@pytest.mark.parametrize(
    ("number", "said"),
    [
        *((0, "0 bytes"), (949, "949 bytes"), (950, "0.9 KB"), (12_345, "12.3 KB")),
        *((99_949, "99.9 KB"), (99_950, "100 KB"), (256e6, "256 MB"), (8.59e10, "85.9 GB")),
        *((999.6e9, "1.0 TB"), (5e16, "50,000 TB")),
    ],
)
def test_bytes_are_told_in_powers_of_a_thousand(number: float, said: str) -> None:
    assert sizes(number) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *((-0.2, "0.0 s"), (0.26, "0.3 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s")),
        *((197, "3 min 17 s"), (7325, "2 h 2 min"), (86_400, "1 d 0 h"), (273_600, "3 d 4 h")),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [
        (1, "epoch", "1 epoch"),
        (2, "epoch", "2 epochs"),
        (2, "pass", "2 passes"),
        (2, "batch", "2 batches"),
        (1_000, "rank", "1,000 ranks"),
    ],
)
def test_a_noun_follows_its_number(number: int, noun: str, words: str) -> None:
    assert count(number, noun) == words
