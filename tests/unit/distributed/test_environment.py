"""What the variables of launching programs may hold."""

import pytest

from launcher import train
from launcher.cli import main
from launcher.distributed.environment import is_true, refuse_unusable
from tests.support.helpers import refused, tiny_recipe

WRONG = [
    ("ACCELERATE_USE_CPU", "abc", "true or false"),
    ("ACCELERATE_USE_CPU", "", "true or false"),
    ("ACCELERATE_DEBUG_MODE", "x", "true or false"),
    ("ACCELERATE_CPU_AFFINITY", "2", "true or false"),
    ("FORK_LAUNCHED", "x", "true or false"),
    ("ACCELERATE_USE_FSDP", "true", "a copy of the network on each rank"),
    ("ACCELERATE_USE_DEEPSPEED", "true", "accelerate_config/gpu_many.yaml"),
    ("ACCELERATE_USE_MEGATRON_LM", "1", "a copy of the network on each rank"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "on", "a copy of the network on each rank"),
    ("ACCELERATE_DYNAMO_BACKEND", "abc", "accelerate launch --dynamo_backend no"),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "the recipe's setting `compile`"),
    ("ACCELERATE_TORCH_DEVICE", "abc", "ACCELERATE_USE_CPU=true"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "x", "a whole number"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "accumulate=4"),
    *[("OMP_NUM_THREADS", text, "from 1 to 4096") for text in ("", "x", "0", "2,1", "99999999")],
]


@pytest.mark.parametrize(("name", "text", "words"), WRONG)
def test_what_accelerate_stumbles_over_or_ignores_is_refused(
    name: str, text: str, words: str
) -> None:
    with refused(f"{name}={text} in the environment", f"unset {name}", words):
        refuse_unusable({name: text})


def test_what_accelerate_launch_sets_passes() -> None:
    refuse_unusable(
        {
            "ACCELERATE_USE_CPU": "False",
            "ACCELERATE_USE_FSDP": "false",
            "ACCELERATE_DYNAMO_BACKEND": "NO",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
            "OMP_NUM_THREADS": "1",
        }
    )


def test_true_is_what_accelerate_takes_for_true() -> None:
    from accelerate.utils import str_to_bool

    words = ("y", "YES", "t", "True", "on", "1", "n", "no", "f", "false", "off", "0")
    assert [is_true(word) for word in words] == [bool(str_to_bool(word)) for word in words]


def test_a_run_reads_them_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "abc")
    assert main(["no_such_recipe.py"]) == 2
    assert "ACCELERATE_USE_CPU=abc" in capsys.readouterr().err
    with refused("ACCELERATE_USE_CPU=abc"):
        train(tiny_recipe())
