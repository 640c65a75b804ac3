"""A distributed multi-GPU training launcher: a recipe says what, Accelerate says where.

These names are what a recipe imports, and what a script or a notebook calls. They are loaded on
first use, so that `launcher --help` answers without importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from launcher.api import train
    from launcher.config.claims import Claim
    from launcher.config.recipe import Images, Recipe
    from launcher.config.resolutions import growing
    from launcher.config.schedules import constant, cosine, linear, steps
    from launcher.config.slots import Draws, NamedParameters
    from launcher.data.augment import (
        alternating_flip,
        crop,
        cutmix,
        cutout,
        flip,
        jitter,
        mixup,
        random_resized_crop,
    )
    from launcher.data.image_folder import Folder
    from launcher.data.packed import Packed
    from launcher.data.synthetic import Synthetic
    from launcher.results.load import TrainedRun, load_run
    from launcher.run.events import RunResult
    from launcher.training.optimizers import ChainedOptimizer, Muon, no_decay
    from launcher.training.state import ema
    from launcher.training.tta import mirrored, mirrored_and_shifted

__all__ = [
    "ChainedOptimizer",
    "Claim",
    "Draws",
    "Folder",
    "Images",
    "Muon",
    "NamedParameters",
    "Packed",
    "Recipe",
    "RunResult",
    "Synthetic",
    "TrainedRun",
    "alternating_flip",
    "constant",
    "cosine",
    "crop",
    "cutmix",
    "cutout",
    "ema",
    "flip",
    "growing",
    "jitter",
    "linear",
    "load_run",
    "mirrored",
    "mirrored_and_shifted",
    "mixup",
    "no_decay",
    "random_resized_crop",
    "steps",
    "train",
]

_HOMES = {
    "launcher.api": "train",
    "launcher.run.events": "RunResult",
    "launcher.results.load": "TrainedRun load_run",
    "launcher.data.augment": "alternating_flip crop cutmix cutout flip jitter mixup "
    "random_resized_crop",
    "launcher.data.image_folder": "Folder",
    "launcher.data.packed": "Packed",
    "launcher.training.state": "ema",
    "launcher.training.optimizers": "Muon ChainedOptimizer no_decay",
    "launcher.config.claims": "Claim",
    "launcher.config.recipe": "Images Recipe",
    "launcher.config.resolutions": "growing",
    "launcher.config.slots": "Draws NamedParameters",
    "launcher.config.schedules": "constant cosine linear steps",
    "launcher.data.synthetic": "Synthetic",
    "launcher.training.tta": "mirrored mirrored_and_shifted",
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'launcher' has no attribute {name!r}")
