"""Every test starts as a fresh process would: no ranks, no Accelerate, no W&B from outside.

And on the CPU, with one thread, so that the tests are the same on every machine and do not wait for
each other's; `pytest -m gpu` runs those that are for the GPU.
"""

import os
from collections.abc import Iterator

import pytest

from tests.support import forked
from tests.support.slurm_cluster import slurm

__all__ = ["slurm"]
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
_FOREIGN = ("ACCELERATE_", "WANDB_", "SLURM_", "MASTER_", "TORCHELASTIC_")
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "FORCE_COLOR", "NO_COLOR")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` alone runs in two processes, each file in one; all else in this one."""
    option = config.option
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # which would start workers of its own
    if is_worker or option.usepdb or not config.pluginmanager.hasplugin("xdist"):
        return
    is_alone = config.args_source is not pytest.Config.ArgsSource.ARGS
    if is_alone and option.markexpr == "not slow" and option.numprocesses is None:
        option.numprocesses = 2
    if option.numprocesses:
        option.dist, option.loadscopereorder = "loadfile", False  # the files with long tests first


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(_FOREIGN) or name in _RANKS:
            monkeypatch.delenv(name)
    # Coverage of a new Python traces all that torch imports and takes a third of its time; forked
    # programs are measured, and what those start.
    forked.measured = os.environ.get(forked.MEASURED, "")
    monkeypatch.delenv(forked.MEASURED, raising=False)
    # A process of a second after each training; test_report_at_end.py has the real one.
    monkeypatch.setattr("launcher.loggers.report.write", lambda folder: "")
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
