"""Networks that others wrote, and their ways of writing, on 1 rank and 2, interrupted and resumed.

Here those whose habits have been in the way of trainers; `python -m tests.corpus.trial` tries all
of them and prints the table of docs/networks.md.
"""

from pathlib import Path

import pytest

from tests.corpus.trial import agrees, is_same_on_each_rank, try_network

TRIED = ("LeNet", "Recurrent", "Buffers", "Lazy", "torchvision/googlenet")
MORE = ("PreActivation", "VisionTransformer", "Tied", "Reparametrized", "timm/vit_tiny_patch16_224")
THOROUGH = [pytest.param(name, marks=pytest.mark.thorough) for name in MORE]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRIED, *THOROUGH])
def test_a_network_trains_on_any_number_of_ranks_and_resumes_to_the_bit(
    name: str, tmp_path: Path
) -> None:
    trial = try_network(name, tmp_path)
    assert trial.images == 4
    assert trial.resumes
    assert not is_same_on_each_rank(name) or agrees(name, trial)
