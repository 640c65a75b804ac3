"""From a recipe to its network: built, tried on two images, initialized, placed on the device."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from launcher.config.plan import Plan
from launcher.config.recipe import Recipe
from launcher.config.serialize import code_name, short_name
from launcher.config.settings import list_settings
from launcher.data.batches import Normalize
from launcher.data.data_sets import NAMELESS
from launcher.data.images import ImageSet
from launcher.distributed.accelerator import count_over_ranks
from launcher.errors import UserError
from launcher.training.network import (
    MemoryFormat,
    first_parameter,
    layers_in_lists,
    upcast,
)
from launcher.training.trial_passes import (
    SHAPE_ERRORS,
    TrainingPass,
    describe_own_gradients,
    describe_second_pass,
    differing_values,
    first_images,
    refuse_set_parameters,
    refused_images,
    try_first_pass,
    try_training_pass,
    two_images,
)
from launcher.utils.text import count, some
from launcher.utils.user_code import is_users, place_of, seeded_draws, user_line, user_location

MOST_ALIKE = 64  # images among which a network may divide its layers
INITIAL_IMAGES = 5000  # training images that a data-dependent initialization sees
_PURE = {"pure_bf16": torch.bfloat16, "pure_fp16": torch.float16}
_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def build_network(recipe: Recipe, data: ImageSet) -> nn.Module:
    """Build the network from the recipe's seed and try it on two images.

    Raises `UserError` where it cannot be built, cannot take the images, or its output does not fit
    the classes.
    """
    if len(data.classes) < 2:
        raise UserError(
            f"images of the class {data.classes[0]} alone",
            expected="two classes at least, between which the scores decide",
            instead="add images of another class",
        )
    name = code_name(recipe.model)
    try:
        network = _drawn(recipe)
        found = f"makes {type(network).__name__}{place_of(recipe.model)}"
    except Exception as error:  # such as of a library that cannot download its weights
        network = None
        found = f"cannot be built: {type(error).__name__}: {error}{user_location(error)}"
    if not isinstance(network, nn.Module):
        raise UserError(
            f"{name} {found}",
            expected="a class or a function that makes an nn.Module from these settings",
            instead="correct that line, or see launcher RECIPE --help for the model's settings",
        )
    images = two_images(network, recipe, data, "contiguous")
    shape, changed = try_first_pass(network, images.clone(), recipe)
    if changed:  # it may be a constraint, which is the same for any images
        _, others = try_first_pass(_drawn(recipe), images / 2, recipe)
        refuse_set_parameters(differing_values(changed, others), recipe)
    expected = (2, len(data.classes))
    if shape != expected:
        nameless = "; or give the data set a list `classes` of their names: without one it has ten"
        raise UserError(
            f"{name} turns 2 images into an output of shape {shape}",
            expected=f"{expected}, one score for each of the {len(data.classes)} classes",
            instead=_with_scores(recipe, shape[-1:], len(data.classes))
            + nameless * (data.classes == NAMELESS),
        )
    return network


def _with_scores(recipe: Recipe, found: tuple[int, ...], classes: int) -> str:
    """How a network that makes so many scores is given one for each class."""
    for setting in list_settings(recipe):
        is_count = "class" in setting.name and (setting.value,) == found
        if is_count and setting.name.startswith("model."):
            return f"type {setting.name}={classes}"
    return "change the size of the model's last layer"


def _drawn(recipe: Recipe) -> Any:
    with seeded_draws(recipe.seed):
        return recipe.model()


def initialize(network: nn.Module, recipe: Recipe, images: ImageSet, device: torch.device) -> None:
    """Move the network to the device and run the recipe's initialization, if it has one."""
    network.to(device)
    if recipe.initialize is not None:
        like = upcast(first_parameter(network))
        normalize = Normalize(recipe.data, images.shape, like, contiguous=False)
        first = normalize(images.pixels(slice(INITIAL_IMAGES)).to(device))
        try:
            with torch.no_grad(), seeded_draws(recipe.seed):
                recipe.initialize(network, first)
        except Exception as error:
            if not is_users(error, SHAPE_ERRORS):
                raise  # of the launcher's own
            what = f"{type(error).__name__}: {error}{user_location(error)}"
            raise UserError(
                f"{code_name(recipe.initialize)} fails: {what}",
                expected=f"a function of the network and of images {tuple(first.shape)}",
                instead="correct that line, or type initialize=none",
            ) from error


@dataclass(frozen=True)
class PlacedNetwork:
    """A network on its device, in a memory format; `notes` are lines for the user.

    `trial_images` are those on which it was tried: two, or as many as it needs in a pass.
    """

    network: nn.Module
    memory_format: MemoryFormat
    notes: tuple[str, ...] = ()
    trial_images: int = 2


def place_network(
    network: nn.Module, recipe: Recipe, plan: Plan, accelerator: Accelerator, data: ImageSet
) -> PlacedNetwork:
    """Move the network to the device, in the recipe's precision and memory format.

    Raises `UserError` for SyncBatchNorm on a CPU, and where a pass in training mode fails.
    """
    if recipe.sync_batch_norm:
        network = _with_sync_batch_norm(network, accelerator)
    network = _in_pure_precision(network.to(accelerator.device), recipe)
    placed, first = _choose_memory_format(network, recipe, plan, accelerator, data)
    notes = [*placed.notes]
    if hidden := layers_in_lists(network):
        notes.append(
            f"layers in {some(list(hidden))} of {short_name(recipe.model)} are neither trained nor "
            "saved: write nn.ModuleList([...]) for [...], or nn.ModuleDict, if they are to be"
        )
    if not _may_overflow(network, accelerator):
        # Also where there is one pass, of which nothing is said: what counts its passes has then
        # seen as many before a training on any number of ranks.
        own = describe_own_gradients(network, recipe, first, accelerator)
        notes += [own] if plan.num_micro_batches > 1 else []
    notes.append(describe_second_pass(network, recipe, first, accelerator))
    return replace(placed, notes=tuple(filter(None, notes)))


def _may_overflow(network: nn.Module, accelerator: Accelerator) -> bool:
    """Whether gradients of a louder loss have no room in half precision."""
    is_half = any(parameter.dtype == torch.float16 for parameter in network.parameters())
    return is_half or accelerator.scaler is not None


def _with_sync_batch_norm(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    if accelerator.device.type == "cpu":
        raise UserError(
            "sync_batch_norm=true on a CPU",
            expected="GPUs: torch synchronizes BatchNorm only there",
            instead="type sync_batch_norm=false",
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]


def _in_pure_precision(network: nn.Module, recipe: Recipe) -> nn.Module:
    """All but BatchNorm, whose statistics need float32, in the recipe's pure half precision."""
    if recipe.precision in _PURE:
        network.to(_PURE[recipe.precision])
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.float()
    return network


def _choose_memory_format(
    network: nn.Module, recipe: Recipe, plan: Plan, accelerator: Accelerator, data: ImageSet
) -> tuple[PlacedNetwork, TrainingPass]:
    """Put the network into the recipe's format, or for auto into channels_last if it takes it.

    A format is tried on two images, forward and backward in training mode; all ranks choose alike.
    A network that takes them in no format, as where it divides those of a pass into groups, is
    tried on as many as the passes of the training have. Returns what they showed as well.
    """
    wanted = recipe.memory_format
    formats: tuple[MemoryFormat, ...] = ("channels_last", "contiguous")
    if wanted != "auto":
        formats = (wanted,)
    note, refused_two = "", None
    is_refused = recipe.unused_parameters == "refuse"
    for sizes in ((), plan.pass_sizes):
        for memory_format in formats:
            _set_format(network, _FORMATS[memory_format])
            several = [first_images(network, recipe, data, memory_format, size) for size in sizes]
            images = two_images(network, recipe, data, memory_format)
            made = _try_passes(network, recipe, several or [images], accelerator)
            if not count_over_ranks(accelerator, made.error is not None):
                if count_over_ranks(accelerator, bool(made.unused)) and is_refused:
                    # It may divide them among its layers. All are the same: a layer that gets
                    # images by what they show may have none in some steps, so it has none here.
                    size = min(plan.pass_sizes[0], MOST_ALIKE)
                    images = two_images(network, recipe, data, memory_format, size)
                    made = _refuse_unused(network, recipe, images, made, accelerator)
                notes = (note,) if note else ()
                return PlacedNetwork(network, memory_format, notes, len(made.images)), made
            refusal = made.error or RuntimeError("it fails on another rank")
            note = note or ("" if sizes else _contiguous_note(recipe, refusal))
        if not sizes:
            refused_two, note = refusal, ""
    assert refused_two is not None
    if wanted == "channels_last":
        raise UserError(
            f"memory_format=channels_last, which {short_name(recipe.model)} refuses: {refused_two}"
            f"{user_location(refused_two)}",
            expected="a model that takes it, forward and backward",
            instead="write x.flatten(1) for x.view(x.size(0), -1), or type memory_format=auto",
        )
    name = code_name(recipe.model)
    mode = f" in training mode, nor does it take those of a pass ({plan.describe_batch()})"
    raise refused_images(name, images, refused_two, mode) from refused_two


def _set_format(network: nn.Module, memory_format: torch.memory_format) -> None:
    """As `network.to`, which refuses tensors of five dimensions, such as a Conv3d's weights."""
    for tensor in (*network.parameters(), *network.buffers()):
        if not is_lazy(tensor) and tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=memory_format)


def _try_passes(
    network: nn.Module, recipe: Recipe, several: list[Tensor], accelerator: Accelerator
) -> TrainingPass:
    """Try each of several numbers of images; returns what the first shows.

    Raises `UserError` where it takes those, but not all of the others.
    """
    first, *others = (try_training_pass(network, recipe, each, accelerator) for each in several)
    for images, made in zip(several[1:], others, strict=True):
        if made.error is not None and first.error is None:
            sizes = ", ".join(str(len(each)) for each in several)
            raise UserError(
                f"{code_name(recipe.model)} fails in training mode on {count(len(images), 'image')}"
                f", as a pass of the training has (of {sizes}): {made.error}"
                f"{user_location(made.error)}",
                expected="a network that takes the images of each pass, that of the last batch "
                "of an epoch too",
                instead="type another data.batch_size",
            )
    return first


def _refuse_unused(
    network: nn.Module,
    recipe: Recipe,
    images: Tensor,
    made: TrainingPass,
    accelerator: Accelerator,
) -> TrainingPass:
    """Refuse the unused parameters of a pass, unless one over these images has all gradients."""
    again = try_training_pass(network, recipe, images, accelerator)
    if count_over_ranks(accelerator, bool(again.unused or again.error)):
        shown = some(list(made.unused)) if made.unused else "those named on another rank"
        raise unused_parameters(recipe, shown)
    return again


def unused_parameters(recipe: Recipe, names: str, moment: str = "") -> UserError:
    """What is wrong with a network that does not use the parameters of these names."""
    when = f" {moment}" if moment else ""
    return UserError(
        f"parameters of {code_name(recipe.model)} that its scores{when} do not depend on: {names}",
        expected="a gradient for each parameter in each step, for which several ranks wait",
        instead="leave them out, call requires_grad_(False) on them, or type "
        "unused_parameters=allow",
    )


def _contiguous_note(recipe: Recipe, error: Exception) -> str:
    """Why a network trains in the contiguous format, and what to write to be faster."""
    line = user_line(error)
    name = short_name(recipe.model)
    if line is None or ".view(" not in (line.line or ""):
        return f"{name} refuses channels_last, the faster format{user_location(error)}: {error}"
    return (
        f"{line.filename}, line {line.lineno}: `{line.line}` refuses channels_last, "
        "the faster format; write x.flatten(1) or x.reshape(...) there"
    )
