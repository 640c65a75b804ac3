"""Every test starts as a fresh process would: no ranks, no Accelerate, no W&B from outside.

And on the CPU, so that the tests are the same on every machine; `pytest -m gpu` runs those that are
for the GPU.
"""

import os
from collections.abc import Iterator

import pytest

from tests.support.slurm_cluster import slurm

__all__ = ["slurm"]
_FOREIGN = ("ACCELERATE_", "WANDB_", "SLURM_", "MASTER_", "TORCHELASTIC_")
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "FORCE_COLOR", "NO_COLOR")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(_FOREIGN) or name in _RANKS:
            monkeypatch.delenv(name)
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
