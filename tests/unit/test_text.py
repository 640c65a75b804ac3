"""Words for numbers."""

import pytest

from launcher.utils.text import count


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
