"""A matrix product on the device of each rank: its speed, and whether it is correct."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from launcher.distributed.accelerator import device_of, synchronize
from launcher.distributed.world import World

_ROUNDS, _SECONDS = 5, 0.2  # longer than the 0.1 s period of a control group's quota
_SIZE, _SIZE_ON_CPU = 4096, 512


@dataclass(frozen=True)
class Product:
    """The result of the product: the median speed of a few rounds, and a fault."""

    device: str = ""
    speed: float = 0.0  # floating-point operations per second
    fault: str = ""


def multiply(world: World) -> Product:
    """Multiply whole numbers whose products and sums are exact in every precision."""
    import torch

    device = device_of(world)
    name = "CPU" if device.type == "cpu" else str(device.type)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    size = _SIZE_ON_CPU if device.type == "cpu" else _SIZE
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randint(-4, 5, (size, size), generator=generator).float().to(device) for _ in range(2)
    )
    product = (left @ right).cpu()
    ones = torch.ones(size, dtype=torch.float64)  # on the CPU: not every device has float64
    expected = left.cpu().double() @ (right.cpu().double() @ ones)
    fault = ""
    if not torch.isfinite(product).all():
        fault = "the product of two matrices of whole numbers is not finite"
    elif not torch.equal(product.double() @ ones, expected):
        fault = "the product of two matrices of whole numbers is wrong"
    per_second = median(_per_second(lambda: left @ right) for _ in range(_ROUNDS))
    return Product(name, 2 * size**3 * per_second, fault)


def _per_second(work: Callable[[], object]) -> float:
    done, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < _SECONDS:
        work()
        synchronize()
        done += 1
    return done / spent
