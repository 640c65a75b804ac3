"""Who listens to signals: the main thread, for as long as it trains, and no other thread."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from launcher import train
from launcher.distributed import signals
from launcher.errors import StoppedBeforeTrainingError
from tests.support.helpers import tiny_recipe


def test_a_training_in_a_thread_leaves_signals_to_the_main_program(tmp_path: Path) -> None:
    short = partial(train, tiny_recipe(), runs=tmp_path, wandb="off", max_steps=2)
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as threads:
        assert not threads.submit(short, name="thread").result().stopped
    signals.ask_to_stop("one who does not train")
    signals.end_if_stopped("what comes later")
    signals.withdraw()
    assert not short(name="main").stopped
    with signals.listening(ends_process=False):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedBeforeTrainingError, match="SIGTERM"):
            signals.end_if_stopped("what comes later")
    assert signal.getsignal(signal.SIGTERM) is before
    assert not signals.stop_reason()  # it is not for the next one in this process
