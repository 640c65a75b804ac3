"""The Accelerator: its precision, device and threads; what runs on rank 0 for all ranks."""

import ctypes
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from launcher.distributed.world import ALONE, Launcher, World, check_world
from launcher.errors import LauncherError, OtherRankError, UserError
from launcher.utils.text import count

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


T = TypeVar("T")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_ACCELERATE_NAMES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
_WITHOUT_AUTOCAST = ("fp32", "pure_bf16", "pure_fp16")


def choose_precision(
    recipe_precision: str | None, has_gpu: bool, configured: str = ""
) -> tuple[str, str]:
    """The precision and where it came from: the recipe, else Accelerate's config, else fp32.

    `configured` is `World.mixed_precision`.

    Raises `UserError` for fp16 without a GPU, which Accelerate would silently ignore, and for a
    precision in Accelerate's config that the launcher does not have.
    """
    origin = "recipe" if recipe_precision else "accelerate config" if configured else "default"
    precision = recipe_precision or _ACCELERATE_NAMES.get(configured or "no")
    if precision is None:
        raise UserError(
            f"mixed_precision {configured!r} in Accelerate's config",
            expected="no, bf16 or fp16",
            instead="type accelerate launch --mixed_precision bf16 ...",
        )
    if precision in ("fp16", "pure_fp16") and not has_gpu:
        raise UserError(
            f"precision {precision} ({origin}) without a GPU",
            expected="bf16 or fp32 on a CPU",
            instead=f"type precision={precision.replace('fp16', 'bf16')} after the recipe",
        )
    return precision, origin


def create_accelerator(
    precision: str, world: World = ALONE, deterministic: bool = False
) -> "Accelerator":
    """The Accelerator with its device, in the process group that there is.

    What `deterministic` sets is set for the whole process. Raises `UserError` where the number of
    processes that runs is not the number asked for.
    """
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs

    use_cpu = runs_on_cpu(world)
    if not use_cpu:
        _check_gpus(world, torch.cuda.device_count())
    set_threads(world)
    if use_cpu:
        keep_freed_memory()
    if deterministic:
        be_deterministic()
    # The sizes of batches hardly change; but the fastest algorithm is not always the same one.
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    handlers: list[Any] = [
        # Running statistics are averaged before each evaluation instead of broadcast each step.
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
    _tell_torch(world)
    accelerator = Accelerator(
        cpu=use_cpu,
        mixed_precision="no" if precision in _WITHOUT_AUTOCAST else precision,
        kwargs_handlers=handlers,
    )
    check_world(world, accelerator.num_processes)
    return accelerator


def _tell_torch(world: World) -> None:
    """Set the variables from which torch and Accelerate read what `world` says.

    They take it from nowhere else. A launcher has set them itself, but srun sets only its own. A
    single process gets none: with LOCAL_RANK, Accelerate would look for others.
    """
    if world.launcher is Launcher.SRUN and world.size > 1:
        os.environ |= {
            "RANK": str(world.rank),
            "WORLD_SIZE": str(world.size),
            "LOCAL_RANK": str(world.device),  # to them the number of the GPU
            "LOCAL_WORLD_SIZE": str(world.local_size),
            "MASTER_ADDR": world.address,
            "MASTER_PORT": str(world.port),
        }


def be_deterministic() -> None:
    """Equal runs on a GPU end with equal bits; an operation that cannot is a RuntimeError."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    # Meant for code that reads memory before it writes there; costs a write of each new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def runs_on_cpu(world: World) -> bool:
    """Whether training runs on the CPU: because the user said so, or there is nothing else."""
    import torch

    return world.use_cpu or not torch.accelerator.is_available()


def device_of(world: World) -> "torch.device":
    """The device on which this rank computes."""
    import torch

    kind = torch.accelerator.current_accelerator()
    if runs_on_cpu(world) or kind is None:
        return torch.device("cpu")
    return torch.device(kind.type, world.device)


def _check_gpus(world: World, gpus: int) -> None:
    if gpus and world.device >= gpus:
        raise UserError(
            f"process {world.device + 1} of this machine, which has {count(gpus, 'GPU')}",
            expected="at most one process per GPU",
            instead=f"type --num_processes {gpus} before -m launcher",
        )


def set_threads(world: World) -> None:
    """On a CPU, share the cores among the processes of this node, unless the user chose.

    `accelerate launch` and torchrun give each process one thread, even where it is alone.
    """
    import torch

    if world.threads is not None:
        torch.set_num_threads(world.threads)
    elif world.shares_cores and runs_on_cpu(world):
        torch.set_num_threads(max(1, usable_cores() // world.local_size))


def keep_freed_memory() -> None:
    """Let the C library keep the memory of one step for the next.

    glibc gives large blocks back to the kernel, which has to clear each of their pages again:
    a quarter of the time of a step with large activations (benchmarks/memory.py).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # not with musl
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def usable_cores() -> int:
    """The cores that this process may use, which a batch system may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_on_main(accelerator: "Accelerator", action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank.

    A `UserError` is raised on all, shared; for any other exception, the others raise
    `OtherRankError`.
    """
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None]
    fault = None
    if accelerator.is_main_process:
        try:
            outcome = [action()]
        except UserError as error:
            outcome = [error.shared() if accelerator.num_processes > 1 else error]
        except Exception as error:
            fault, outcome = error, [OtherRankError()]
    if accelerator.num_processes > 1:
        outcome = broadcast_object_list(outcome)
    if fault is not None:
        raise fault
    if isinstance(outcome[0], LauncherError):
        raise outcome[0]
    return outcome[0]


def count_over_ranks(accelerator: "Accelerator", is_so: bool) -> int:
    """On how many ranks it is so, which all of them then know."""
    import torch

    here = torch.tensor(float(is_so), device=accelerator.device)
    return int(accelerator.reduce(here, reduction="sum"))


def device_name(accelerator: "Accelerator") -> str:
    """The device by its usual name: `NVIDIA H100 80GB HBM3`, `CPU, 2 threads`."""
    import torch

    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    if accelerator.device.type == "cpu":
        return f"CPU, {count(torch.get_num_threads(), 'thread')}"
    return str(accelerator.device)


def synchronize() -> None:
    """Wait for the device, where there is one beside the CPU."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def has_accelerator() -> bool:
    """Whether this process has an Accelerator already, or a process group of torch."""
    from torch import distributed

    state = sys.modules.get("accelerate.state")  # which takes long to import
    return bool(state and state.PartialState._shared_state) or distributed.is_initialized()


def reset_accelerator() -> None:
    """Let the next training of this process choose its precision: Accelerate keeps the first."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
