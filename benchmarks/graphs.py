"""A whole training step as one CUDA graph: measured by gpu.py beside the launcher, until it wins.

The launcher's own batches, network, loss, optimizer and schedule; but forward, backward and update
of each shape of a batch are captured once and replayed, and the next batch is made on a second
stream meanwhile. What the launcher does beside that in a step (the mean loss, reports, checks for
what is not finite, saving) is left out, as in the bare loop. It has one pass per step, one process,
and no gradient scaler.

It has not run on a GPU yet. On a CPU the same step is called without being captured, and its losses
are the launcher's bit for bit (tests/integration/test_graphs.py). On a GPU they may differ in the
last bits: a captured Adam keeps its rate and its count of steps as float32 tensors on the device,
where the launcher's are Python numbers.
"""

from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.competitors import Launched
from launcher import Recipe
from launcher.data.batches import MicroBatch, layer_seeds
from launcher.data.images import Data, ImageSet
from launcher.training.loop import make_batches
from launcher.training.network import upcast
from launcher.training.state import TrainContext
from launcher.training.step import seed_layers

Step = tuple[int, list[MicroBatch]]
WARM_UP = 3  # steps before a capture, as torch's documentation of CUDA graphs advises


class OneGraph(Launched):
    """The launcher whose steps are replayed; see above."""

    def __init__(self, recipe: Recipe, data: Data, accelerator: Accelerator) -> None:
        super().__init__(recipe, data, accelerator)
        self.steps: dict[torch.Size, Callable[[MicroBatch], Tensor]] = {}

    def epoch(self, images: ImageSet) -> None:
        """Train on the images once, in a new order."""
        total = torch.zeros((), device=self.ctx.accelerator.device)
        for loss in self.losses(images):
            total.add_(loss)
        total.item()

    def losses(self, images: ImageSet) -> Iterator[Tensor]:
        """Train on the images once and yield the loss of every step, which the next overwrites."""
        ctx = self.next_epoch(images)
        device, rank = ctx.accelerator.device, ctx.accelerator.process_index
        seeds = layer_seeds(ctx.recipe.seed, self.epochs, rank, ctx.plan.steps_per_epoch)
        batches = made_ahead(make_batches(ctx).epoch(self.epochs), device)
        for step, (batch,) in batches:
            seed_layers(seeds[(step - 1) % ctx.plan.steps_per_epoch], device)
            set_rates(ctx, step)
            shape = batch.images.shape
            if shape not in self.steps:
                whole = WholeStep(ctx, batch)
                self.steps[shape] = whole.captured() if device.type == "cuda" else whole
            yield self.steps[shape](batch)


class WholeStep:
    """Forward, backward and update of batches of one shape, which lie in the same memory."""

    def __init__(self, ctx: TrainContext, like: MicroBatch) -> None:
        self.ctx = ctx
        self.images, self.targets = like.images.clone(), like.targets.clone()

    def __call__(self, batch: MicroBatch) -> Tensor:
        """The loss of one step, made as it stands."""
        self.take(batch)
        return self.step()

    def take(self, batch: MicroBatch) -> None:
        """Put a batch where the step looks for it."""
        self.images.copy_(batch.images)
        self.targets.copy_(batch.targets)

    def step(self) -> Tensor:
        """The loss; the gradients begin anew in each step, so that a replay adds nothing up."""
        state = self.ctx.state
        state.optimizer.zero_grad()
        loss = self.ctx.loss(upcast(state.network(self.images)), self.targets, self.images)
        loss.backward()  # type: ignore[no-untyped-call]
        state.optimizer.step()
        return loss.detach()

    def captured(self) -> Callable[[MicroBatch], Tensor]:
        """The same as a graph. The steps before the capture are undone, the capture makes none."""
        state, aside = self.ctx.state, torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for group in state.optimizer.param_groups:
            group["capturable"] = True
            if not isinstance(group["lr"], Tensor):
                group["lr"] = torch.tensor(group["lr"], device=self.images.device)
        kept = [value.clone() for value in tensors_of(self.ctx)]
        is_new = not state.optimizer.state
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        state.optimizer.zero_grad()
        with torch.cuda.graph(graph):
            loss = self.step()
        values = tensors_of(self.ctx)
        if is_new:  # the optimizer's state began with the first of the steps
            kept += [torch.zeros_like(value) for value in values[len(kept) :]]
        for value, before in zip(values, kept, strict=True):  # in place: the graph has the places
            value.copy_(before)

        def replay(batch: MicroBatch) -> Tensor:
            self.take(batch)
            graph.replay()
            return loss

        return replay


def largest_difference(
    recipe: Recipe, data: Data, accelerator: Accelerator, images: ImageSet
) -> float:
    """Between the losses of the launcher and those of replayed steps, over these images once."""
    launched, replayed = Launched(recipe, data, accelerator), OneGraph(recipe, data, accelerator)
    expected = [report.loss for report in launched.reports(images, log_every=1)]
    losses = [float(loss) for loss in replayed.losses(images)]
    return max(abs(one - other) for one, other in zip(losses, expected, strict=True))


def tensors_of(ctx: TrainContext) -> list[Tensor]:
    """What a step changes: parameters, buffers, and the optimizer's state, which comes last."""
    network, optimizer = ctx.state.network, ctx.state.optimizer
    of_optimizer = [
        value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, Tensor)
    ]
    return [*(p.detach() for p in network.parameters()), *network.buffers(), *of_optimizer]


def set_rates(ctx: TrainContext, step: int) -> None:
    """The schedule's rates of this step; those of a graph are tensors, whose values it reads."""
    state, fraction = ctx.state, ctx.plan.fraction(step)
    for index, group in enumerate(state.optimizer.param_groups):
        rate = state.scheduled_options(index, fraction, ctx.recipe.schedule)["lr"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def made_ahead(steps: Iterator[Step], device: torch.device) -> Iterator[Step]:
    """Make each step's batch on a second stream of the device while the one before is trained."""
    if device.type != "cuda":
        yield from steps
        return
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    step, is_made = made_on(aside, steps)
    while step is not None:
        torch.cuda.current_stream().wait_event(is_made)
        for batch in step[1]:
            for value in (batch.images, batch.targets):  # its memory is in use until it is read
                value.record_stream(torch.cuda.current_stream())
        yield step
        step, is_made = made_on(aside, steps)


def made_on(
    stream: torch.cuda.Stream, steps: Iterator[Step]
) -> tuple[Step | None, torch.cuda.Event]:
    """The next step, and when its batch is made."""
    with torch.cuda.stream(stream):
        step = next(steps, None)
        is_made = torch.cuda.Event()  # type: ignore[no-untyped-call]
        is_made.record(stream)
    return step, is_made
