"""What the variables of launching programs may hold, and which of them ask for another trainer."""

from collections.abc import Mapping

from launcher.errors import UserError

# What Accelerate takes for true and for false.
_TRUE = ("1", "true", "yes", "on", "t", "y")
_FALSE = ("0", "false", "no", "off", "f", "n")
_FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "FORK_LAUNCHED")
_OTHER_TRAINERS = (
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
_MOST = 2**63 - 1
_MOST_THREADS = 4096  # more is a slip of the finger, and the C library ends the process


def is_true(text: str) -> bool:
    """Whether a variable is set to what Accelerate takes for true."""
    return text.lower() in _TRUE


def number_in(
    environ: Mapping[str, str],
    name: str,
    default: int | None = None,
    least: int = 0,
    most: int = _MOST,
) -> int:
    """The whole number that a variable holds; raises `UserError` where it is none of that range."""
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise UserError(
            f"{name} is not in the environment",
            expected="a whole number, as srun sets it",
            instead="start it with srun, or type unset SLURM_STEP_ID to train with one process",
        )
    is_number = text.isascii() and text.isdecimal() and len(text) < 20
    if not is_number or not least <= int(text) <= most:
        limits = f"of at least {least}" if most == _MOST else f"from {least} to {most}"
        raise _unusable(name, text, f"a whole number {limits}")
    return int(text)


def refuse_unusable(environ: Mapping[str, str]) -> None:
    """Raise `UserError` for what Accelerate or the C library would stumble over, or ignore."""
    for name in (*_FLAGS, *_OTHER_TRAINERS):
        text = environ.get(name, "false")
        if text.lower() not in (*_TRUE, *_FALSE):
            raise _unusable(name, text, "true or false")
        if name in _OTHER_TRAINERS and is_true(text):
            config = "accelerate launch --config_file accelerate_config/gpu_many.yaml"
            raise _unusable(name, text, "a copy of the network on each rank", f", or {config} ...")
    name = "ACCELERATE_DYNAMO_BACKEND"
    if environ.get(name, "no").lower() != "no":
        more = ", or accelerate launch --dynamo_backend no ..."
        raise _unusable(name, environ[name], "no, as the recipe's setting `compile` says it", more)
    name = "ACCELERATE_TORCH_DEVICE"
    if name in environ:
        expected = "ACCELERATE_USE_CPU=true for the CPU, or CUDA_VISIBLE_DEVICES for other GPUs"
        raise _unusable(name, environ[name], expected)
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    if (steps := number_in(environ, name, 1)) != 1:
        more = f", and accumulate={steps} after the recipe"
        raise _unusable(name, f"{steps}", "the recipe's setting `accumulate`", more)
    number_in(environ, "OMP_NUM_THREADS", 1, least=1, most=_MOST_THREADS)


def _unusable(name: str, text: str, expected: str, more: str = "") -> UserError:
    given = f"{name}={text:.40} in the environment"
    return UserError(given, expected=expected, instead=f"type unset {name}{more}")
