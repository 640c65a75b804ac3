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
from launcher.data.batches import Batches, Normalize
from launcher.data.sources import Data
from launcher.distributed.accelerator import create_accelerator
from launcher.training import state
from launcher.training.evaluation import evaluate
from launcher.training.loop import train_epoch
from launcher.training.metrics import StepReport
from launcher.training.step import Job

Figures = dict[str, Any]
T = TypeVar("T")


class Trainer:
    """A recipe ready to be trained again and again by one compiled network."""

    def __init__(self, recipe: Recipe, data: Data) -> None:
        self.recipe = recipe
        self.accelerator = fresh_accelerator(recipe.precision or "fp32")
        device = self.accelerator.device
        self.on_cpu = data.train  # what a fresh network is tried on
        self.train, self.test = data.train.to(device), data.test.to(device)
        self.learner = state.prepare(state.build(recipe, data.train), recipe, self.accelerator)
        self.learner.network.train()
        self.untrained = self.learner.optimizer.state_dict()

    def renew(self, seed: int) -> None:
        """Fresh weights of that seed, and an optimizer without a past."""
        self.recipe = replace(self.recipe, seed=seed)
        weights = state.build(self.recipe, self.on_cpu).state_dict()
        self.learner.network.load_state_dict(weights)
        self.learner.optimizer.load_state_dict(self.untrained)
        self.learner.network.train()

    def epochs(self, log_every: int | None = None, last: int | None = None) -> Iterator[StepReport]:
        """Initialize and train; `log_every=None` reads the loss once an epoch."""
        recipe, device = self.recipe, self.accelerator.device
        state.initialize(self.learner.network, recipe, self.train, device)
        job, normalize = self.job(log_every), self.normalize()
        batches = Batches(self.train, recipe, job.plan, normalize, rank=0)
        for epoch in range(1, (last or recipe.epochs) + 1):
            for event in train_epoch(job, self.learner, batches, epoch):
                if isinstance(event, StepReport):
                    yield event

    def job(self, log_every: int | None = None) -> Job:
        """The plan of a whole training, in this one process."""
        steps = len(self.train) // self.recipe.data.batch_size + 1
        sizes = {"train_images": len(self.train), "test_images": len(self.test)}
        plan = make_plan(self.recipe, world_size=1, **sizes, log_every=log_every or steps)
        return Job(self.recipe, plan, self.accelerator)

    def normalize(self) -> Normalize:
        """As the launcher feeds this network."""
        like = state.first_parameter(self.learner.network)
        return Normalize(self.recipe.data, self.train.images.shape[1:], like, False)

    def accuracy(self, with_views: bool) -> float:
        """On the test images, with or without the recipe's test-time augmentation."""
        views = self.recipe.views if with_views else None
        network = self.learner.evaluated
        return evaluate(self.job(), network, self.test, self.normalize(), views).accuracy


def fresh_accelerator(precision: str) -> Accelerator:
    """Accelerate knows one precision at a time."""
    Accelerator(cpu=not torch.cuda.is_available()).state._reset_state(reset_partial_state=True)
    return create_accelerator(precision)


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
    size = min(recipe.data.batch_size, len(trainer.train))
    network, images = trainer.learner.network, trainer.train.images[:size]
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
            logits = state.upcast(network.forward(trainer.normalize()(images)))
            loss = recipe.loss(logits, trainer.train.labels[:size])
        loss.backward()  # type: ignore[no-untyped-call]
    network.zero_grad()
    return counter.get_total_flops(), sum(kept.values())


def use_of_device(trainer: Trainer, train_seconds: float) -> Figures:
    """MFU: see the top of the file."""
    recipe = trainer.recipe
    size = min(recipe.data.batch_size, len(trainer.train))
    flops, _ = work_of_step(trainer)
    step = train_seconds / (recipe.epochs * (len(trainer.train) / size))
    rate = matmul_rate(trainer.accelerator.device, torch.bfloat16)
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
    job, normalize = trainer.job(), trainer.normalize()
    batches = Batches(trainer.train, trainer.recipe, job.plan, normalize, rank=0)
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as watch:
        seconds, _ = timed(lambda: list(train_epoch(job, trainer.learner, batches, 2)))
    steps = job.plan.steps_per_epoch
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
