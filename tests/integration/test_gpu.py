"""What must hold on a GPU: `pytest -m gpu` there."""

import pytest
import torch

from benchmarks.checks import CHECKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or not pytest -m gpu"),
    pytest.mark.filterwarnings("default"),  # torch advises less precision than a check needs
]


@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(name: str) -> None:
    figures = CHECKS[name]()
    assert figures["passed"], figures
