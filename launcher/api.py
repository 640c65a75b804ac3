"""Training from a script or a notebook: what `launcher.train` is."""

import os
from dataclasses import replace
from itertools import count
from os import PathLike
from pathlib import Path
from threading import Lock

from launcher.cluster import slurm_env
from launcher.config.loader import LoadedRecipe, load
from launcher.config.options import RunOptions
from launcher.config.overrides import override
from launcher.config.recipe import Recipe
from launcher.config.serialize import short_name
from launcher.distributed import signals
from launcher.distributed.accelerator import reset_accelerator
from launcher.distributed.environment import refuse_unusable
from launcher.errors import UserError
from launcher.run.events import RunResult
from launcher.run.train import train_loaded

# Of this process: the ranks' common store keeps what an earlier training has left in it.
_NUMBERS = count()
# Accelerate's state, torch's generator and signal handlers are the process's own.
_IN_TRAINING = Lock()


def train(
    recipe: str | Path | Recipe,
    *overrides: str,
    name: str | Path | None = None,
    runs: str | Path = "runs",
    resume: bool = False,
    wandb: str | None = None,
    max_steps: int | None = None,
) -> RunResult:
    """Train a recipe from a script or a notebook, as the command line does.

    `recipe` is the path of a recipe file or a `Recipe`; `overrides` are settings of the form
    `name=value`; the other arguments are the options of the same name. A signal, such as Ctrl-C,
    saves and stops: `result.stopped`; in another thread than the main one, signals are left to the
    program. Raises `UserError` for what cannot be trained, before anything is written, and
    `TrainingError` where training fails.
    """
    if isinstance(recipe, Recipe):
        loaded = LoadedRecipe(recipe, short_name(recipe.model).rpartition(".")[2].lower(), "", "")
    elif isinstance(recipe, str | PathLike):
        loaded = load(Path(recipe))
    else:
        raise UserError(
            f"train({getattr(recipe, '__name__', type(recipe).__name__)}, ...)",
            expected="a Recipe, or the path of a recipe file",
            instead="write train(Recipe(model=..., data=..., optimizer=..., epochs=...), ...)",
        )
    loaded = replace(loaded, recipe=override(loaded.recipe, overrides))
    if isinstance(runs, str | PathLike):
        runs = Path(runs)
    options = RunOptions(
        runs=runs,
        name=str(name) if isinstance(name, Path) else name,
        resume=resume,
        wandb=wandb,
        max_steps=max_steps,
        report=False,
    )
    refuse_unusable(os.environ)
    if not _IN_TRAINING.acquire(blocking=False):
        raise UserError(
            "a second training at the same time in one process",
            expected="one, since they would share random numbers and devices",
            instead="wait for the end of the first one, or start a process for each",
        )
    try:
        return _train(loaded, options)
    finally:
        _IN_TRAINING.release()


def _train(loaded: LoadedRecipe, options: RunOptions) -> RunResult:
    world = replace(slurm_env.world_of_this_process(), run=next(_NUMBERS))
    with signals.listening(ends_process=False):
        if world.is_launched:
            signals.watch_launcher()
        try:
            return train_loaded(loaded, options, world)
        finally:
            reset_accelerator()
