"""What one training works with: its network in the forms in which it is used, and the rest.

`make_context` puts it together; `fit`, `evaluate` and `preflight` take it as one value.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from launcher.config.plan import Plan
from launcher.config.recipe import Recipe
from launcher.config.schedules import describe_odd_range, schedulers_in
from launcher.config.serialize import code_name
from launcher.config.slots import CompileMode, Schedule, TorchSchedule
from launcher.data.batches import Normalize
from launcher.data.images import Data, are_same_images
from launcher.data.tiers import on_device
from launcher.errors import UserError
from launcher.training.losses import BatchLoss, make_loss
from launcher.training.model import place_network
from launcher.training.network import first_parameter, restored_afterwards
from launcher.training.optimizer_setup import (
    compile_steps,
    freeze_left_out,
    load_state,
    make_optimizer,
)
from launcher.training.torch_schedules import RateTable, describe_counting, replay
from launcher.utils.user_code import is_users, place_of, user_location

Phase = Callable[[str], AbstractContextManager[Any]]
_NOTHING = nullcontext()


def no_phase(name: str) -> AbstractContextManager[Any]:
    """In place of the profiler's `record_function`, which would cost 5 microseconds a phase."""
    return _NOTHING


@dataclass
class TrainState:
    """A network in the forms in which it is used, and what changes it.

    `network` is the plain module. `ddp_model` is what trains: on several ranks, DDP around it.
    `ema_model` is its running average, if the recipe keeps one. `group_options` are the settings of
    the optimizer's groups as the recipe made them, among them the learning rate before the
    schedule; `group_schedules` are the groups' own, where they have one; `frozen` are the
    parameters that the network's own code does not train; `left_out` is a line about those that the
    optimizer has not; `rate_table` holds, for each step, what a
    scheduler of torch sets, if the recipe has one. `current_step` is the step that is being
    trained; None between steps.
    """

    network: nn.Module
    ddp_model: nn.Module
    ema_model: AveragedModel | None
    optimizer: Optimizer
    group_schedules: tuple[Schedule | None, ...]
    group_options: tuple[dict[str, Any], ...]
    frozen: tuple[nn.Parameter, ...] = ()
    left_out: str = ""
    rate_table: RateTable | None = None
    current_step: int | None = None
    skips_in_a_row: int = 0  # steps without an update, up to the present one

    @property
    def eval_model(self) -> nn.Module:
        """What is evaluated and saved: the average where there is one."""
        return self.ema_model.module if self.ema_model is not None else self.network

    @property
    def learning_rate(self) -> float:
        """The present rate of the first group."""
        return self.optimizer.param_groups[0]["lr"]

    def learning_rate_at(self, fraction: float, schedule: Schedule | TorchSchedule) -> float:
        """The rate of the first group after a fraction of the training."""
        return self.scheduled_options(0, fraction, schedule)["lr"]

    def scheduled_options(
        self, index: int, fraction: float, schedule: Schedule | TorchSchedule
    ) -> dict[str, Any]:
        """What the group's or the recipe's schedule sets in group `index`: the rate at least."""
        own = self.group_schedules[index]
        if own is None and self.rate_table is not None:
            return self.rate_table.at(fraction)[index]
        multiplier = float((own or cast(Schedule, schedule))(fraction))  # numpy's may be float32
        return {"lr": self.group_options[index]["lr"] * multiplier}

    def set_learning_rates(self, fraction: float, schedule: Schedule | TorchSchedule) -> None:
        """Set each group's rate to its own times the multiplier of its or the recipe's schedule.

        A scheduler of torch says the rate itself, and may say the momentum.
        """
        groups = self.optimizer.param_groups
        for index, group in enumerate(groups):
            group.update(self.scheduled_options(index, fraction, schedule))
        # A group whose own schedule is at zero needs no backward pass. But DDP waits for a gradient
        # of every parameter, and a backward pass needs one parameter to train at least.
        may_freeze = self.ddp_model is self.network and any(group["lr"] != 0 for group in groups)
        for group, own in zip(groups, self.group_schedules, strict=True):
            if own and may_freeze:
                for parameter in group["params"]:
                    parameter.requires_grad_(group["lr"] != 0)

    def drop_frozen_gradients(self) -> None:
        """Drop the gradients that DDP makes for groups whose own schedule is at zero.

        They would count in the gradient's norm, and in the momentum with which the group goes on.
        """
        for group, own in zip(self.optimizer.param_groups, self.group_schedules, strict=True):
            if own and group["lr"] == 0:
                for parameter in group["params"]:
                    parameter.grad = None

    def largest_parameter(self) -> Tensor:
        """The largest magnitude of what is trained and of its average: finite only if each is.

        Buffers and frozen parameters do not count: a mask may well be infinite.
        """
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.ema_model is not None:
            trained += [p for p in self.ema_model.parameters() if p.requires_grad]
        return get_total_norm([p.detach() for p in trained if p.numel()], math.inf)


@dataclass(frozen=True)
class TrainContext:
    """One training: what is asked for, in which numbers, where, with which images and weights.

    `data` lies on the accelerator's device. `notes` are lines for the user. `skip_steps` are steps
    whose update is skipped, after a rollback. `phase` marks the parts of a step for a profiler.
    `trial_images` are as many as the network takes in training mode: two, unless it needs more.
    """

    recipe: Recipe
    plan: Plan
    accelerator: Accelerator
    data: Data
    state: TrainState
    normalize: Normalize
    loss: BatchLoss
    notes: tuple[str, ...] = ()
    skip_steps: frozenset[int] = frozenset()
    phase: Phase = no_phase
    trial_images: int = 2

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks."""
        return self.accelerator.reduce(values, reduction="sum")

    def gather(self, values: Tensor) -> Tensor:
        """The `values` of all ranks, joined along the first dimension."""
        return self.accelerator.gather(values)


def make_context(
    network: nn.Module, recipe: Recipe, plan: Plan, accelerator: Accelerator, data: Data
) -> TrainContext:
    """Move network and images to the device, and wrap the network for training.

    `recipe.memory_format` may be auto: that of the returned context's recipe is what was chosen.
    Raises `UserError` for an optimizer that refuses its settings, and SyncBatchNorm on a CPU.
    """
    data = on_device(data, recipe.data, accelerator.device)
    placed = place_network(network, recipe, plan, accelerator, data.train)
    recipe = replace(recipe, memory_format=placed.memory_format)
    state = make_state(placed.network, recipe, accelerator)
    if recipe.compile and plan.resolutions:
        _allow_compilations(len(set(plan.resolutions)))
    state.rate_table = replay(recipe.schedule, state.group_options, state.optimizer.defaults, plan)
    like = first_parameter(state.network)
    normalize = Normalize(recipe.data, data.train.shape, like, placed.memory_format == "contiguous")
    loss = make_loss(recipe, len(data.train.classes), normalize(data.train.pixels(slice(1))))
    notes = [
        *placed.notes,
        describe_counting(recipe.schedule) or describe_odd_range(recipe.schedule),
        state.left_out,
        "the test images are the training images: the accuracy says nothing of other ones"
        if are_same_images(data.train, data.test)
        else "",
    ]
    return TrainContext(
        recipe,
        plan,
        accelerator,
        data,
        state,
        normalize,
        loss,
        tuple(filter(None, notes)),
        trial_images=placed.trial_images,
    )


def make_state(network: nn.Module, recipe: Recipe, accelerator: Accelerator) -> TrainState:
    """Make the optimizer, and wrap the network, which is on the device already, in DDP."""
    ema_model = _make_average(recipe, network)
    frozen = tuple(p for p in network.parameters() if not p.requires_grad)
    optimizer = make_optimizer(recipe, network)
    left_out = freeze_left_out(optimizer, network)
    schedules = tuple(group.pop("schedule", None) for group in optimizer.param_groups)
    if any(True for own in schedules for _ in schedulers_in(own)):
        raise UserError(
            "a scheduler of torch as the schedule of a group of the optimizer",
            expected="a function of the fraction of the training, in [0, 1]",
            instead="write it as the schedule of the recipe, or use cosine, linear or steps",
        )
    options = tuple(_options(group) for group in optimizer.param_groups)
    if accelerator.ddp_handler is not None:
        may_be_unused = recipe.unused_parameters == "allow"
        accelerator.ddp_handler.find_unused_parameters = may_be_unused
    with warnings.catch_warnings():
        # Newer torch renames the option, older torch knows only this name.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        ddp_model, prepared = accelerator.prepare(network, optimizer)
    if recipe.compile:
        compile_state(network, optimizer, recipe.compile)
    if accelerator.scaler is not None:
        optimizer = prepared  # skips overflowed steps; without fp16 it only costs 4 % of a step
    return TrainState(
        network, ddp_model, ema_model, optimizer, schedules, options, frozen, left_out
    )


def compile_state(network: nn.Module, optimizer: Optimizer, mode: bool | CompileMode) -> None:
    """Compile the network, whatever wraps it, and what is worth it of the optimizer; or undo it."""
    if mode:
        network.compile(mode=None if mode in (True, "force") else mode, dynamic=False)
    else:
        network._compiled_call_impl = None  # torch has no public way back
    compile_steps(optimizer, bool(mode))


def _allow_compilations(resolutions: int) -> None:
    """torch compiles 8 shapes of batches; at the next one it warns and goes on eager.

    At each resolution a rank may meet four: ranks and passes differ by an image, and so they do in
    the last batch.
    """
    import torch._dynamo.config as settings  # which takes seconds

    needed = 8 + 4 * resolutions
    settings.recompile_limit = max(settings.recompile_limit, needed)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 4 * needed)


def _make_average(recipe: Recipe, network: nn.Module) -> AveragedModel | None:
    if recipe.average is None:
        return None
    try:
        average = recipe.average(network)
        found = f"returns {type(average).__name__}{place_of(recipe.average)}"
    except Exception as error:
        if not is_users(error, (ValueError, TypeError)):
            raise  # of the launcher's own
        average, found = None, f"refuses its settings: {error}{user_location(error)}"
    if not isinstance(average, AveragedModel):
        raise UserError(
            f"{code_name(recipe.average)} {found}",
            expected="an AveragedModel of torch.optim.swa_utils",
            instead="write average=partial(ema, decay=0.999), or type average=none",
        )
    return average


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of all but the parameters and their names."""
    return {n: deepcopy(v) for n, v in group.items() if n not in ("params", "param_names")}


def ema(network: nn.Module, *, decay: float = 0.999) -> AveragedModel:
    """An exponential moving average of weights and buffers, for the slot `average`."""
    if not 0 <= decay < 1:
        raise UserError(
            f"average.decay={decay}",
            expected="a number of at least 0 and below 1, at which nothing is averaged",
            instead="type average.decay=0.999, for example",
        )
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(network, multi_avg_fn=average, use_buffers=True)


def average_buffers(network: nn.Module, accelerator: Accelerator) -> None:
    """Make running statistics (BatchNorm) the mean over ranks; each rank saw other images.

    Of whole numbers and the like take those of rank 0, which are the ones that are saved.
    """
    if accelerator.num_processes > 1:
        for buffer in network.buffers():
            is_real = buffer.is_floating_point()
            buffer.copy_(accelerator.reduce(buffer, "mean") if is_real else _of_rank_0(buffer))


def broadcast_state(network: nn.Module, accelerator: Accelerator) -> None:
    """Give every rank the parameters and buffers that rank 0 has."""
    if accelerator.num_processes > 1:
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.copy_(_of_rank_0(tensor))


def _of_rank_0(tensor: Tensor) -> Tensor:
    return from_bytes(broadcast(as_bytes(tensor)), tensor)


def as_bytes(tensor: Tensor) -> Tensor:
    """A copy as uint8 `(bytes,)`, which ranks can send each other: they cannot send any type."""
    return tensor.detach().reshape(-1).clone().view(torch.uint8)


def from_bytes(values: Tensor, like: Tensor) -> Tensor:
    """uint8 `(..., bytes)` as tensors of that type and shape."""
    return values.view(like.dtype).view((*values.shape[:-1], *like.shape))


@contextmanager
def put_back(ctx: TrainContext) -> Iterator[None]:
    """Put back weights, averages, the optimizer's state and settings at the end, bit for bit.

    And the schedules, which may be replaced meanwhile.
    """
    state, scaler = ctx.state, ctx.accelerator.scaler
    models = [m for m in (state.network, state.ema_model) if m is not None]
    saved = [deepcopy(model.state_dict()) for model in models]
    optimizer, table = deepcopy(state.optimizer.state_dict()), state.rate_table
    schedules = state.group_schedules
    scale = scaler.state_dict() if scaler is not None else {}
    state.rate_table = None
    try:
        with restored_afterwards(state.network, ctx.accelerator.device):
            yield
    finally:
        for model, tensors in zip(models, saved, strict=True):
            model.load_state_dict(tensors)
        load_state(state.optimizer, optimizer)
        for group in state.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        state.rate_table, state.group_schedules = table, schedules
        state.current_step, state.skips_in_a_row = None, 0
        if scaler is not None:
            scaler.load_state_dict(scale)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """The network in evaluation mode without gradients; afterwards in training mode again."""
    network.eval()
    try:
        with torch.no_grad():  # not inference_mode: its tensors do not mix with CUDA graphs
            yield network
    finally:
        network.train()
