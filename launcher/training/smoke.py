"""The smoke test of a recipe: a few batches of embedded images, and does the loss fall?"""

from dataclasses import replace

from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.config.plan import NEVER
from launcher.data import sources
from launcher.errors import TrainingError

LARGEST_BATCH = 64  # images: a smoke test is about the code, not about the settings
MOST_PASSES = 4  # of a step
LEAST_FALL = 0.01  # of the loss: without learning, chance may still lower it a little


def smoke_version(
    loaded: LoadedRecipe, options: RunOptions, world_size: int
) -> tuple[LoadedRecipe, RunOptions]:
    """One epoch of a few batches of embedded images; W&B off, nothing written."""
    data, accumulate = loaded.recipe.data, min(loaded.recipe.accumulate, MOST_PASSES)
    smallest = world_size * accumulate
    images = replace(
        data,
        source=sources.smoke_source(data),
        batch_size=max(min(data.batch_size, LARGEST_BATCH), smallest),
        fallback=None,
    )
    recipe = replace(loaded.recipe, data=images, epochs=1, accumulate=accumulate, compile=False)
    return replace(loaded, recipe=recipe), replace(
        options, wandb="off", log_every=1, checkpoint_every=NEVER, resume=False, max_steps=None
    )


def check_smoke(losses: tuple[float, ...]) -> None:
    """Raise `TrainingError` unless the second half of the losses is clearly lower."""
    if len(losses) < 2:
        raise TrainingError("smoke test: one step shows nothing; start fewer processes")
    half = len(losses) // 2
    first, second = sum(losses[:half]) / half, sum(losses[half:]) / (len(losses) - half)
    if not second < first * (1 - LEAST_FALL):
        raise TrainingError(f"smoke test: the loss did not fall: {first:.4f}, then {second:.4f}")
