"""From a recipe to a training that has passed its preflight; nothing is written yet.

`training_of` is what each rank of a run calls: `prepare` opens the images, counts the steps and
builds the network, and the network, in its place on the device, is tried.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from launcher.checkpoint import checkpoint, run_dir
from launcher.checkpoint.resume import initial_weights
from launcher.checkpoint.weights import load_initial_weights
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.config.plan import Plan, make_plan
from launcher.config.recipe import Recipe
from launcher.config.serialize import short_name
from launcher.config.slots import Precision
from launcher.data import cache, tiers
from launcher.data.images import Data
from launcher.distributed.accelerator import (
    choose_precision,
    create_accelerator,
    device_name,
    reset_accelerator,
    set_threads,
)
from launcher.distributed.process_group import RankGroup
from launcher.training.accumulation import choose_passes
from launcher.training.compiling import choose_compiling, is_to_be_tried
from launcher.training.loop import forget_passes
from launcher.training.model import build_network, initialize
from launcher.training.network import count_parameters, first_parameter, shapes
from launcher.training.preflight import preflight
from launcher.training.smoke import smoke_version
from launcher.training.state import TrainContext, make_context
from launcher.utils.json_text import flatten
from launcher.utils.text import count, of_uncertain


@dataclass(frozen=True)
class Training:
    """What is ready to be trained, and what it is in words."""

    ctx: TrainContext
    loaded: LoadedRecipe
    facts: dict[str, str]


def training_of(loaded: LoadedRecipe, options: RunOptions, group: RankGroup) -> Training:
    """From the recipe to a training that has passed its preflight; nothing is written yet."""
    prepared = prepare_on_all_ranks(loaded, options, group)
    loaded, data = prepared.loaded, prepared.data
    # What a resumed run is compared with is the precision that it had, whoever chose it.
    recipe = replace(loaded.recipe, precision=cast(Precision, prepared.precision))
    accelerator = create_accelerator(prepared.precision, group.world, recipe.deterministic)
    if options.init_from is None:
        initialize(prepared.network, recipe, data.train, accelerator.device)
    ctx = make_context(prepared.network, recipe, prepared.plan, accelerator, data)
    ctx = preflight(ctx)
    facts = prepared.facts
    is_tried = not prepared.compile_is_kept and is_to_be_tried(ctx)
    if recipe.accumulate == "auto":
        with torch.compiler.set_stance("force_eager" if is_tried else "default"):
            ctx = choose_passes(ctx)
        facts["batch"] = ctx.plan.describe_batch()
        ctx = preflight(ctx)  # of the smaller passes
    if is_tried:
        ctx, facts["compile"] = choose_compiling(ctx)
    if is_tried or recipe.accumulate == "auto":
        forget_passes(ctx)
    facts |= {
        "memory": ctx.recipe.memory_format,
        "devices": f"{ctx.plan.world_size} x {device_name(accelerator)}",
        **options.host_facts,
    }
    if data.fallback:
        facts["fallback"] = fallback_warning(data)
    return Training(ctx, replace(loaded, recipe=ctx.recipe), facts)


@contextmanager
def dry_context(
    recipe: Recipe, plan: Plan, network: nn.Module, data: Data
) -> Iterator[TrainContext]:
    """A training that has passed the preflight of a run, on a machine that may be far from its own.

    So in fp32, and without what only a GPU or several ranks have. Raises `UserError` as a run does.
    """
    recipe = replace(recipe, precision="fp32", compile=False, sync_batch_norm=False)
    try:
        accelerator = create_accelerator("fp32")
        if recipe.initialize is not None:
            initialize(network, recipe, data.train, accelerator.device)
        ctx = make_context(network, recipe, plan, accelerator, data)
        yield preflight(ctx)
    finally:
        reset_accelerator()


@dataclass(frozen=True)
class Prepared:
    """What each rank can make without the others."""

    loaded: LoadedRecipe
    data: Data
    plan: Plan
    network: nn.Module
    precision: str
    facts: dict[str, str]
    compile_is_kept: bool  # what compile=true means was settled when the run began


def prepare_on_all_ranks(loaded: LoadedRecipe, options: RunOptions, group: RankGroup) -> Prepared:
    """Prepare here, and go on when all ranks have; a `UserError` of one ends all."""
    set_threads(group.world)  # before the first images are read, by as many threads
    with group.sync_errors():
        group.refuse_differences(shared_facts(loaded, options))
        wanted = loaded.recipe.precision
        if options.smoke:
            loaded = replace(loaded, recipe=smoke_version(loaded.recipe, group))
        prepared = prepare(loaded, options, group)
        if prepared.loaded.recipe.precision != wanted:
            said = f"fp32 (this processor is slow in {wanted or group.world.mixed_precision})"
            prepared.facts["precision"] = said
    group.init_process_group()
    return prepared


def shared_facts(loaded: LoadedRecipe, options: RunOptions) -> dict[str, str]:
    """What must be the same on every rank, in words, with its name."""
    settings = flatten(loaded.config)
    del settings["data.root"]  # where the images lie on this machine, not what they are
    settings |= {
        "--max-steps": options.max_steps,
        "--log-every": options.log_every,
        "--checkpoint-every": options.checkpoint_every,
        "--resume": options.resume,
        "--profile": options.profile,
        "--skip": options.skip,
    }
    return {
        **{name: str(value) for name, value in settings.items()},
        "the recipe file (SHA-256)": loaded.digest[:12],
        **{f"{name} (SHA-256)": digest for name, digest in loaded.neighbours.items()},
        **run_dir.versions(),
    }


def prepare(loaded: LoadedRecipe, options: RunOptions, group: RankGroup) -> Prepared:
    """Open the images, count the steps, build the network."""
    kept = kept_choices(loaded, options, group)
    recipe = replace(loaded.recipe, **kept)
    loaded = replace(loaded, recipe=recipe)
    world, has_gpu = group.world, torch.cuda.is_available()
    precision, origin = choose_precision(recipe.precision, has_gpu, world.mixed_precision)
    data = cache.load(recipe.data, group, recipe.seed)
    # Which each node has opened for itself.
    group.refuse_differences({"images of": data.name, "digest": data.digest}, "images")
    plan = plan_for(loaded, data, options, world.size)
    network = build_network(recipe, data.train)
    group.refuse_differences(
        {f"{name} of the network": shape for name, shape in shapes(network).items()},
        "network",
        expected="a network of the same parameters and buffers on all ranks",
        instead="let its code depend on no rank, process, host or time",
    )
    said = f"{precision} ({origin})"
    own = first_parameter(network).dtype
    if own != torch.float32 and not precision.startswith("pure_"):
        said += f", weights in {str(own).removeprefix('torch.')}"
    facts = describe(loaded, data, plan, network) | {"precision": said}
    facts |= begin_with_given(network, loaded, options)
    if "compile" in kept:
        said = "compiled" if kept["compile"] else "eager"
        facts["compile"] = f"{said}, as when the run began"
    return Prepared(loaded, data, plan, network, precision, facts, "compile" in kept)


def kept_choices(loaded: LoadedRecipe, options: RunOptions, group: RankGroup) -> dict[str, Any]:
    """What accumulate=auto and compile=true had become when the run began that is resumed."""
    is_open = {"accumulate": loaded.recipe.accumulate == "auto"}
    is_open |= {"compile": loaded.recipe.compile is True}
    if not options.resume or not any(is_open.values()):
        return {}

    def read() -> dict[str, Any]:
        folder = run_dir.find(options.runs, options.name, loaded.name)
        found = checkpoint.newest(folder.checkpoints)[0] if folder else None
        if folder is None:
            return {}
        config = checkpoint.read_state(found).config if found else folder.config()
        passes, compiles = config.get("accumulate"), config.get("compile")
        kept = {"accumulate": passes} if type(passes) is int else {}
        is_kept = isinstance(compiles, bool) or compiles == "force"
        is_kept = is_kept and "compile" not in options.resume_changed
        return kept | ({"compile": compiles} if is_kept else {})

    text = group.broadcast("choices", json.dumps(read()) if group.world.is_main else None)
    return {name: value for name, value in json.loads(text).items() if is_open[name]}


def begin_with_given(
    network: nn.Module, loaded: LoadedRecipe, options: RunOptions
) -> dict[str, str]:
    """Put the weights of --init-from into a network; returns which, in words."""
    weights = given_weights(loaded, options)
    if weights is None:
        return {}
    skipped = load_initial_weights(network, weights, options.skip)
    without = f", without {', '.join(skipped)}" if skipped else ""
    return {"weights": f"from {weights}{without}"}


def given_weights(loaded: LoadedRecipe, options: RunOptions) -> Path | None:
    """What to begin with; nothing where a checkpoint takes its place."""
    if options.init_from is None:
        return None
    if options.resume:
        folder = run_dir.find(options.runs, options.name, loaded.name)
        if folder is not None and checkpoint.newest(folder.checkpoints)[0] is not None:
            return None
    return initial_weights(options.runs, options.init_from)


def plan_for(loaded: LoadedRecipe, data: Data, options: RunOptions, world_size: int) -> Plan:
    """The plan of a recipe for these images on that many ranks."""
    save = options.checkpoint_every
    if save.steps or save.minutes:  # also after the last epoch, so that more can follow
        save = replace(save, epochs=loaded.recipe.epochs)
    return make_plan(
        loaded.recipe,
        world_size=world_size,
        train_images=len(data.train),
        evaluated_images=len(data.evaluated),
        max_steps=options.max_steps,
        log_every=options.log_every,
        save=save,
        image_size=data.train.shape[:2],
    )


def describe(loaded: LoadedRecipe, data: Data, plan: Plan, network: nn.Module) -> dict[str, str]:
    """What is trained, in words: for the header, `--dry-run` and `run.json`."""
    note = loaded.note.strip().splitlines()[:1]
    name = short_name(loaded.recipe.model)
    numbers = [f"{len(split):,} {name}" for name, split in data.splits.items()]
    sizes = f"{', '.join(numbers[:-1])} and {numbers[-1]} images"
    height, width, _ = data.train.shape
    sizes += f" of {height} x {width} pixels"
    if plan.resolutions:
        least, most = min(plan.resolutions), max(plan.resolutions)
        sizes += f", trained at {least}" + f" to {most}" * (least < most) + " pixels"
    where = tiers.describe(data)
    kept = f"; {where}" if where else ""
    early = f", stopping after {plan.last_step:,}" if plan.last_step < plan.steps else ""
    views, uncertain = loaded.recipe.views, loaded.recipe.uncertain
    facts = {
        "recipe": ": ".join([loaded.name, *note]),
        "model": f"{name}, {count_parameters(network):,} parameters",
        "data": f"{data.name}, {sizes}, {count(len(data.train.classes), 'class')}" + kept,
        "batch": plan.describe_batch(),
        "steps": f"{count(plan.epochs, 'epoch')} x {count(plan.steps_per_epoch, 'step')}{early}",
    }
    if views and uncertain:
        facts["views"] = f"{short_name(views)}, only{of_uncertain(uncertain)}"
    return facts


def fallback_warning(data: Data) -> str:
    """What no reader of this run may miss; empty where the right images are used."""
    return f"NOT THE REAL DATA: {data.fallback}; using {data.name}" if data.fallback else ""
