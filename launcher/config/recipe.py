"""The recipe: what to train, in frozen dataclasses whose slots are callables.

`functools.partial` fills in a callable's settings. The machine stays out of a recipe: the same
file means the same experiment on a laptop and on 64 GPUs.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from launcher.config import annotations
from launcher.config.claims import Claim
from launcher.config.schedules import constant, refuse_measuring
from launcher.config.slots import (
    Augmentation,
    CompileMode,
    Loss,
    Mixing,
    NamedParameters,
    Precision,
    Resolution,
    Schedule,
    Source,
    TorchSchedule,
    Views,
)
from launcher.errors import UserError
from launcher.utils.user_code import function_of, place_of

_UNFINISHED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
NO_SETTING = {"is_setting": False}  # of a field that changes nothing in a run
MOST_EPOCHS = 1_000_000  # more is a slip of the finger
# What to write for a value of another type.
_EXAMPLES = {
    "model": "SimpleCNN",
    "data.source": "CIFAR10",
    "data.mean": "(0.5, 0.5, 0.5)",
    "data.std": "(0.5, 0.5, 0.5)",
    "data.augment": "(flip,)",
    "data.mix": "mixup",
    "data.fallback": "Synthetic",
    "optimizer": "partial(AdamW, lr=0.001)",
    "schedule": "cosine",
    "loss": "cross_entropy",
    "clip_norm": "1.0",
    "average": "ema",
    "views": "mirrored",
}
# Transforms of torchvision: what is expected in their place, and what to write.
_OUT_OF_PLACE = {
    **dict.fromkeys(
        ("CutMix", "MixUp"),
        (
            "a function of images, their partners and a generator",
            "write mix=cutmix, mix=mixup or mix=partial(mixup, alpha=0.2), of launcher",
        ),
    ),
    **dict.fromkeys(
        ("Compose", "RandomApply", "RandomChoice", "RandomOrder"),
        (
            "augmentations that are not built yet, one behind the other",
            "write its parts as augment=(RandomHorizontalFlip, partial(ColorJitter, hue=0.1)), or "
            "a class of it whose __init__ builds them",
        ),
    ),
    **dict.fromkeys(
        ("ToTensor", "PILToTensor", "ToImage", "ToPILImage", "ConvertImageDtype"),
        ("augmentations of images, which are tensors already", "leave it out"),
    ),
    "Normalize": (
        "augmentations of images that are not normalized yet",
        "leave it out, and write mean= and std= in Images(...)",
    ),
}


@dataclass(frozen=True)
class Images:
    """The images of an experiment and what happens to them before the model sees them.

    `source` is a class like torchvision's data sets: called with `root`, `train` (or `split`) and
    `download`, it has `data` (uint8), `targets` (or `labels`) and usually `classes`. `batch_size`
    is the number of images of one optimizer step over all processes. `mean` and `std` are one
    number per channel, for pixels in [0, 1]. `fallback` is a source for when the first is neither
    on disk nor reachable; without one that is an error.

    `validation` holds training images out, by the recipe's seed and class by class: a fraction of
    them, a number, or a fold such as 2/5; or it names the source's own validation split. After each
    epoch those are evaluated, and the test images only at the end of the run.

    `tier` says where the images are during the training: in the memory of the device; in the
    host's, from where each batch is copied; or encoded on disk, from where each batch is decoded.
    auto is the first of them in which they fit. `prefetch` is how many steps are read ahead of the
    training where they are not on the device; by default what fits into 64 MB, 2 to 16 steps.

    `train_resolution` is that of the training images, in pixels a side, from the progress of the
    training (0 in the first epoch, 1 in the last): square, and at most that of the source's images,
    at which is evaluated. By default they are as they come.

    `sampling` balanced visits all classes equally often, in epochs of as many images. `on_broken`
    says what follows a picture of a folder that cannot be read: stop, or skip, by which all are
    tried before the training and the broken ones left out. `local_copy` copies a pack to TMPDIR,
    once per node, before the training reads it.
    """

    source: Source
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    root: str = "data"
    augment: tuple[Augmentation, ...] = ()
    mix: Mixing | None = None
    train_resolution: Resolution | None = None
    fallback: Source | None = None
    validation: int | float | str | None = None
    tier: Literal["auto", "device", "host", "disk"] = "auto"
    prefetch: int | None = None
    sampling: Literal["uniform", "balanced"] = "uniform"
    on_broken: Literal["stop", "skip"] = "stop"
    local_copy: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no machine could train."""
        _refuse_unfinished(self, "data.")
        if not isinstance(self.augment, tuple):
            raise UserError(
                f"data.augment={getattr(self.augment, '__name__', self.augment)}",
                expected="a tuple of augmentations",
                instead="write augment=(flip,), with the comma, in the recipe file",
            )
        _refuse_no_part(self.validation)
        _refuse_ill_typed(self, "data.")
        _refuse_torchvisions((*self.augment, self.mix))
        _at_least("data.batch_size", self.batch_size, 1)
        if self.prefetch is not None:
            _at_least("data.prefetch", self.prefetch, 1)
        if "\0" in str(self.root):
            raise UserError(
                f"data.root={str(self.root)!r}",
                expected="a folder, whose name has no NUL in it",
                instead="type data.root=data, for example",
            )
        if not all(0 <= mean <= 1 for mean in self.mean):
            raise UserError(
                f"data.mean={self.mean}",
                expected="a number in [0, 1] per channel",
                instead="divide the mean of the bytes (0 to 255) by 255",
            )
        if not all(0 < std <= 1 for std in self.std):
            raise UserError(
                f"data.std={self.std}",
                expected="a positive number of at most 1 per channel",
                instead="divide the standard deviation of the bytes (0 to 255) by 255",
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment.

    `model` builds the network; `initialize`, if any, then changes it by the first 5,000 normalized
    training images `(n, c, h, w)`. `optimizer` takes pairs of names and parameters. `schedule` maps
    the fraction of the training, in [0, 1], to a multiplier of the learning rate; or it is a class
    of `torch.optim.lr_scheduler`, which counts epochs (OneCycleLR and CyclicLR: steps), and whose
    length is filled in where it is missing. `loss` takes logits and targets, and the images where
    its third argument is called so, and returns the mean over the batch; with `data.mix` the
    targets are class probabilities in training, and labels in an evaluation as ever. `sum_loss`
    differentiates the sum over the batch instead: gradients that half precision can hold, to which
    clipping and the optimizer's rate must fit. `accumulate` splits the global batch into that many
    forward passes; auto is the smallest number that fits into memory. `average` keeps an average of
    the weights, which is then what is evaluated and saved. `views` is test-time augmentation: after
    the last epoch, a second figure beside the plain test accuracy; `uncertain` limits it to that
    part of the images whose first prediction is the least certain. `on_nan` says what follows a
    loss or gradient that is not finite: stop (the last checkpoint stays); skip that update, for
    which the gradient's norm is read in every step; or roll back to the last checkpoint and leave
    that one update out. `patience` ends the training after so many epochs without a validation
    accuracy above the best one so far by more than `min_delta`.

    `precision` bf16 and fp16 are autocast; pure_bf16 and pure_fp16 keep weights and activations in
    half precision, all but BatchNorm's; None leaves it to Accelerate's config. `memory_format` auto
    is channels_last, the faster one, where the network takes it. `compile` is true or one of
    torch.compile's modes; on a CPU, true times a few steps of both before the training and keeps
    the faster, and force compiles all the same. `unused_parameters` says whether the network may
    have some on which its scores do not depend, always or in some steps: to allow it costs several
    ranks a search in each step. `deterministic` keeps to torch's deterministic algorithms, so that
    a run on GPUs repeats bit by bit: it is slower, and an operation that has none is refused. On
    CPUs a run repeats without it. `claims` are what it reaches: `launcher repeat RECIPE --claims`
    measures it again.
    """

    model: Callable[[], nn.Module]
    data: Images
    optimizer: Callable[[NamedParameters], Optimizer]
    epochs: int
    initialize: Callable[[nn.Module, Tensor], None] | None = None
    schedule: Schedule | TorchSchedule = constant
    loss: Loss = cross_entropy
    sum_loss: bool = False
    accumulate: int | Literal["auto"] = 1
    clip_norm: float | None = None
    average: Callable[[nn.Module], AveragedModel] | None = None
    views: Views | None = None
    uncertain: float | None = None
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    patience: int | None = None
    min_delta: float = 0.0
    precision: Precision | None = None
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    compile: bool | CompileMode = False
    sync_batch_norm: bool = False
    unused_parameters: Literal["refuse", "allow"] = "refuse"
    deterministic: bool = False
    seed: int = 0
    claims: tuple[Claim, ...] = field(default=(), metadata=NO_SETTING)

    @property
    def passes(self) -> int:
        """`accumulate`, or 1 where it is still to be found."""
        return 1 if self.accumulate == "auto" else self.accumulate

    def __post_init__(self) -> None:
        """Refuse values that no machine could train."""
        _refuse_unfinished(self)
        _refuse_ill_typed(self)
        _at_least("epochs", self.epochs, 1)
        if self.epochs > MOST_EPOCHS:
            raise UserError(
                f"epochs={self.epochs}",
                expected=f"at most {MOST_EPOCHS:,} passes over the training images",
                instead="type epochs=10, for example",
            )
        _at_least("accumulate", self.passes, 1)
        _at_least("seed", self.seed, 0)
        refuse_measuring(self.schedule)
        if self.seed >= 2**64:
            raise UserError(
                f"seed={self.seed}",
                expected="a whole number below 2**64, which torch can take",
                instead="type seed=0, for example",
            )
        if self.clip_norm is not None and not self.clip_norm > 0:  # nan is not
            raise UserError(
                f"clip_norm={self.clip_norm}",
                expected="a positive number or none",
                instead="type clip_norm=1.0, for example",
            )
        _refuse_patience(self)
        _refuse_uncertain(self)
        claims: object = self.claims
        if not isinstance(claims, tuple) or not all(isinstance(c, Claim) for c in claims):
            raise UserError(
                f"claims={self.claims}",
                expected="a tuple of claims",
                instead='write claims=(Claim("test/accuracy", 0.95, runs=3),), with the comma',
            )
        if self.average is not None and self.precision in ("pure_bf16", "pure_fp16"):
            raise UserError(
                f"average with precision={self.precision}",
                expected="fp32 weights: half precision rounds the small steps of an average away",
                instead=f"type precision={self.precision.removeprefix('pure_')} or average=none",
            )


def _refuse_unfinished(part: Any, prefix: str = "") -> None:
    """Refuse generators and coroutines: called, they return before a line of theirs has run."""
    for name, value in vars(part).items():
        for item in value if isinstance(value, tuple | list) else (value,):
            function = function_of(item)
            code = getattr(function, "__code__", None)
            if code and code.co_flags & _UNFINISHED:
                raise UserError(
                    f"{prefix}{name}={function.__name__}, a function with yield or async"
                    f"{place_of(function)}",
                    expected="a function that returns what it makes",
                    instead="write def without async, and return instead of yield, there",
                )


def _refuse_ill_typed(part: Any, prefix: str = "") -> None:
    """Refuse a misspelt word, a fraction or a text as an override of it would be refused."""
    for own, hint in annotations.ill_typed(part):
        if not own.metadata.get("is_setting", True):
            continue
        name, value = prefix + own.name, getattr(part, own.name)
        given, expected = f"{name}={value!r}", f"a value of type {annotations.describe(hint)}"
        if annotations.is_callable_type(hint) and not isinstance(value, tuple):
            expected = "a class or a function, which every process calls for itself"
            if not isinstance(value, str | int | float | None):
                given = f"{name}, a {type(value).__name__} that is built already"
        example = _EXAMPLES.get(name)
        raise UserError(
            given,
            expected=expected,
            instead=f"write {own.name}={example}, for example, in the recipe file"
            if example
            else "correct it in the recipe file",
        )


def _refuse_torchvisions(slots: Iterable[Any]) -> None:
    """Refuse transforms of torchvision that have no place here, with what has."""
    for slot in slots:
        function = function_of(slot)
        kind = function if isinstance(function, type) else type(function)
        name = kind.__name__
        if kind.__module__.startswith("torchvision.") and name in _OUT_OF_PLACE:
            expected, instead = _OUT_OF_PLACE[name]
            raise UserError(
                f"{name} of torchvision in the recipe", expected=expected, instead=instead
            )


def parse_fold(text: str) -> tuple[int, int] | None:
    """`2/5` as (2, 5), the second of five folds; None for other texts."""
    fold, _, folds = text.partition("/")
    return (int(fold), int(folds)) if fold.isdecimal() and folds.isdecimal() else None


def _refuse_no_part(validation: float | str | None) -> None:
    """Refuse what is no number, fraction or fold of the training images, nor a name."""
    if isinstance(validation, str):
        fold = parse_fold(validation)
        fits = 1 <= fold[0] <= fold[1] >= 2 if fold else validation.isidentifier()
        fits = fits and validation not in ("train", "test")
    elif isinstance(validation, int):
        fits = validation >= 1 and not isinstance(validation, bool)
    else:
        fits = validation is None or (isinstance(validation, Real) and 0 < validation < 1)
    if not fits:
        raise UserError(
            f"data.validation={validation}",
            expected="a number of images, a fraction of the training images in (0, 1), a fold "
            "such as 2/5, or the name of the source's own validation split",
            instead="type data.validation=0.1, for example",
        )


def _refuse_patience(recipe: Recipe) -> None:
    if recipe.patience is not None:
        _at_least("patience", recipe.patience, 1)
        if recipe.data.validation is None:
            raise UserError(
                f"patience={recipe.patience} without validation images",
                expected="images by which to decide, which are not those of the result",
                instead="type data.validation=0.1 as well, or patience=none",
            )
    if not 0 <= recipe.min_delta < 1:
        raise UserError(
            f"min_delta={recipe.min_delta}",
            expected="a difference of accuracies, at least 0 and below 1",
            instead="type min_delta=0.001, for example",
        )


def _refuse_uncertain(recipe: Recipe) -> None:
    if recipe.uncertain is None:
        return
    if not 0 < recipe.uncertain < 1:
        raise UserError(
            f"uncertain={recipe.uncertain}",
            expected="a fraction of the images, above 0 and below 1, or none",
            instead="type uncertain=0.25, for example",
        )
    if recipe.views is None:
        raise UserError(
            f"uncertain={recipe.uncertain} without views",
            expected="views, which are scored for the most uncertain images",
            instead="type uncertain=none, or write views=mirrored in the recipe file",
        )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(
            f"{name}={value}",
            expected=f"a whole number of at least {least}",
            instead=f"type {name}={max(least, 1)}, for example",
        )
