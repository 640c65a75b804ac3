"""A recipe that gpu.py trains again and again, and what it reads off it: see there."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from launcher import Recipe
from launcher.config.plan import make_plan
from launcher.data.images import Data
from launcher.distributed.accelerator import create_accelerator
from launcher.distributed.world import World
from launcher.training.evaluation import evaluate
from launcher.training.loop import make_batches, train_epoch
from launcher.training.metrics import StepReport
from launcher.training.model import build_network, initialize
from launcher.training.network import upcast
from launcher.training.state import TrainContext, make_context

Figures = dict[str, Any]
T = TypeVar("T")


class Trainer:
    """A recipe ready to be trained again and again by one compiled network."""

    def __init__(self, recipe: Recipe, data: Data) -> None:
        self.accelerator = fresh_accelerator(recipe.precision or "fp32")
        self.on_cpu = data.train  # what a fresh network is tried on
        plan = make_plan(
            recipe, world_size=1, train_images=len(data.train), evaluated_images=len(data.test)
        )
        network = build_network(recipe, data.train)
        self.ctx = make_context(network, recipe, plan, self.accelerator, data)
        self.ctx.state.network.train()
        self.untrained = self.ctx.state.optimizer.state_dict()

    @property
    def recipe(self) -> Recipe:
        """With the seed of the last `renew`."""
        return self.ctx.recipe

    def renew(self, seed: int) -> None:
        """Fresh weights of that seed, and an optimizer without a past."""
        recipe, state = replace(self.recipe, seed=seed), self.ctx.state
        self.ctx = replace(self.ctx, recipe=recipe)
        weights = build_network(recipe, self.on_cpu).state_dict()
        state.network.load_state_dict(weights)
        state.optimizer.load_state_dict(self.untrained)
        state.network.train()

    def epochs(self, log_every: int | None = None, last: int | None = None) -> Iterator[StepReport]:
        """Initialize and train; `log_every=None` reads the loss once an epoch."""
        ctx = self.reporting(log_every)
        initialize(ctx.state.network, ctx.recipe, ctx.data.train, self.accelerator.device)
        batches = make_batches(ctx)
        for epoch in range(1, (last or ctx.recipe.epochs) + 1):
            for event in train_epoch(ctx, batches, epoch):
                if isinstance(event, StepReport):
                    yield event

    def reporting(self, log_every: int | None = None) -> TrainContext:
        """The same training with another log interval; None: once an epoch."""
        plan = self.ctx.plan
        return replace(self.ctx, plan=replace(plan, log_every=log_every or plan.steps_per_epoch))

    def accuracy(self, with_views: bool) -> float:
        """On the test images, with or without the recipe's test-time augmentation."""
        return evaluate(
            self.ctx, self.ctx.data.test, self.recipe.views if with_views else None
        ).accuracy


def fresh_accelerator(precision: str) -> Accelerator:
    """Accelerate knows one precision at a time."""
    Accelerator(cpu=not torch.cuda.is_available()).state._reset_state(reset_partial_state=True)
    return create_accelerator(precision, World.of_this_process())


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of the work, with all that it left for the device to do, and its result."""
    synchronize()
    started = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - started, result


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def work_of_step(trainer: Trainer) -> tuple[int, int]:
    """The arithmetic of a full step, and the bytes that it keeps for its backward pass."""
    recipe = trainer.recipe
    train = trainer.ctx.data.train
    size = min(recipe.data.batch_size, len(train))
    network, images = trainer.ctx.state.network, train.tensor[:size]
    kept = {parameter.untyped_storage().data_ptr(): 0 for parameter in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())  # a weight is not kept, but there
        return tensor

    for parameter in network.parameters():
        parameter.grad = None
    with FlopCounterMode(display=False) as counter, trainer.accelerator.autocast():
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            # `forward` is the network as it was before compiling.
            pictures = trainer.ctx.normalize(images)
            logits = upcast(network.forward(pictures))
            loss = trainer.ctx.loss(logits, train.labels[:size], pictures)
        loss.backward()  # type: ignore[no-untyped-call]
    network.zero_grad()
    return counter.get_total_flops(), sum(kept.values())


def use_of_device(trainer: Trainer, train_seconds: float) -> Figures:
    """MFU: see the top of the file."""
    recipe = trainer.recipe
    images = len(trainer.ctx.data.train)
    size = min(recipe.data.batch_size, images)
    flops, _ = work_of_step(trainer)
    step = train_seconds / (recipe.epochs * (images / size))
    on_gpu = trainer.accelerator.device.type == "cuda"  # a CPU may take minutes in half precision
    rate = matmul_rate(trainer.accelerator.device, torch.bfloat16 if on_gpu else torch.float32)
    return {
        "flops_per_image": flops / size,
        "milliseconds_per_step": step * 1e3,
        "achieved_tflops": flops / step / 1e12,
        "matmul_tflops": rate / 1e12,
        "mfu": flops / step / rate,
    }


def matmul_rate(device: torch.device, number: torch.dtype) -> float:
    """Floating-point operations per second of a large product of such numbers."""
    side, times = (8192, 30) if device.type == "cuda" else (2048, 5)
    left, right = (torch.randn(side, side, device=device, dtype=number) for _ in range(2))
    timed(lambda: [left @ right for _ in range(5)])
    seconds, _ = timed(lambda: [left @ right for _ in range(times)])
    return 2 * side**3 * times / seconds


def profiled(trainer: Trainer) -> Figures:
    """Where the second epoch's time goes: the longest kernels, and how long the device is idle."""
    ctx = trainer.reporting()
    batches = make_batches(ctx)
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as watch:
        seconds, _ = timed(lambda: list(train_epoch(ctx, batches, 2)))
    steps = ctx.plan.steps_per_epoch
    events = [e for e in watch.key_averages() if "CUDA" in str(e.device_type) or not on_gpu]

    def spent(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    events.sort(key=spent, reverse=True)
    return {
        "milliseconds_per_step": seconds * 1e3 / steps,  # with the profiler's own cost
        "device_milliseconds_per_step": sum(map(spent, events)) / 1e3 / steps,
        "kernels_per_step": sum(event.count for event in events) / steps,
        "longest": [
            [event.key[:90], round(spent(event) / steps, 1), round(event.count / steps, 2)]
            for event in events[:30]  # name, microseconds per step, calls per step
        ],
    }


def spread(values: list[float]) -> Figures:
    """Mean, standard deviation, number."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": deviation, "n": len(values)}
