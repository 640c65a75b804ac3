"""Networks that others wrote, and their ways of writing, on 1 rank and 2, interrupted and resumed.

All of them, and a table: `python -m tests.corpus.trial`; here the classical ones in the project's
own text, and a few of the libraries'.
"""

from pathlib import Path

import pytest

from tests.corpus.classical import CLASSICAL
from tests.corpus.trial import agrees, is_same_on_each_rank, try_network

OF_LIBRARIES = ("timm/vit_tiny_patch16_224", "torchvision/googlenet", "torchvision/mobilenet_v2")
# One habit each that has been in the way of some trainer.
OFTEN = ("LeNet", "Lazy", "Tied", "Buffers")
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in OFTEN else SLOW)
        for name in (*CLASSICAL, *OF_LIBRARIES)
    ],
)
def test_a_network_trains_on_any_number_of_ranks_and_resumes_to_the_bit(
    name: str, tmp_path: Path
) -> None:
    trial = try_network(name, tmp_path)
    assert trial.images == 4
    assert trial.resumes
    assert not is_same_on_each_rank(name) or agrees(name, trial)
