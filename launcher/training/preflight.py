"""Try a recipe's own functions before the training, and before anything is written.

Augmentations, mixing, loss and views are tried on two images; network and loss at each resolution
of the training. The loss must be a mean: where the micro-batches do not add up to the whole batch,
N processes would not equal one.
"""

import io
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from numbers import Real
from typing import Any, cast

import numpy
import torch
from psutil import virtual_memory
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.optim import Optimizer

from launcher.config.plan import Plan
from launcher.config.recipe import Recipe
from launcher.config.schedules import schedulers_in
from launcher.config.serialize import code_name, short_name
from launcher.config.slots import DRAWS_PER_AUGMENTATION, Draws, Schedule
from launcher.data.augment import as_augmentation, resized
from launcher.data.batches import cut_when_read
from launcher.errors import UserError
from launcher.training.accumulation import is_out_of_memory
from launcher.training.losses import BatchLoss, example_labels
from launcher.training.network import are_equal, restored_afterwards, upcast
from launcher.training.optimizer_setup import goes_on, is_of_torch, try_step
from launcher.training.state import TrainContext, evaluating
from launcher.utils.text import count, some
from launcher.utils.user_code import global_states, is_users, place_of, user_location

MORE_IMAGES = 6  # that are augmented on trial
_V2 = "or a class of torchvision.transforms.v2 without brackets"
_FAULTS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


def preflight(ctx: TrainContext) -> TrainContext:
    """Try what the recipe does with images; raises `UserError` that names the function.

    Returns the context with a note of what has been seen, if anything.
    """
    _refuse_not_finite(ctx)
    _try_saving(ctx.state.optimizer)
    _try_step(ctx)  # outside of what follows, which holds a copy of the parameters
    with restored_afterwards(ctx.state.eval_model, ctx.accelerator.device):
        note = _try_functions(ctx)
    return replace(ctx, notes=tuple(dict.fromkeys((*ctx.notes, *filter(None, [note])))))


def _try_functions(ctx: TrainContext) -> str:
    recipe, network = ctx.recipe, ctx.state.eval_model
    two = ctx.data.train.pixels(slice(1)).repeat(2, 1, 1, 1)
    pictures = ctx.normalize(two)
    _try_augmentations(recipe, two.permute(0, 3, 1, 2))
    if not any(schedulers_in(recipe.schedule)):
        _try_schedule(cast(Schedule, recipe.schedule))
    if recipe.data.mix:
        with _no_global_draws(recipe.data.mix, "the generator that it is given"):
            made = _tried(recipe.data.mix, pictures, pictures, numpy.random.default_rng(0))
        is_pair = isinstance(made, tuple) and len(made) == 2
        mixed, share = made if is_pair else (None, None)
        fits = isinstance(share, Real) and 0 <= float(share) <= 1
        _refuse_unless(fits, recipe.data.mix, made, "a weight in [0, 1] beside the images")
        fits = torch.is_tensor(mixed) and mixed.shape == pictures.shape
        _refuse_unless(fits, recipe.data.mix, made, "images of the same shape beside the weight")
        _try_partners(recipe.data.mix, torch.cat([pictures[:1], -pictures[:1]]))
    with evaluating(network), ctx.accelerator.autocast():
        several = torch.cat([pictures[:1], pictures[:1] / 2])
        given = several.clone()
        logits = network.forward(given)  # not through a compiled call
        if recipe.views or ctx.loss.takes_images:
            _refuse_changed(given, several, recipe)
        note = _describe_neighbours(ctx, logits[:1], _try_last_image(ctx, pictures[:1]))
        if recipe.views:
            viewed = _tried(recipe.views, network.forward, pictures.clone())
            fits = torch.is_tensor(viewed) and viewed.shape == logits.shape
            _refuse_unless(fits, recipe.views, viewed, "a score for each class")
            is_bad = logits.isfinite().all() and not viewed.isfinite().all()
            _refuse_unless(not is_bad, recipe.views, viewed, "finite scores where the model's are")
        _try_loss(ctx.loss, upcast(logits[:1]), pictures[:1], ctx.plan.num_micro_batches)
        if recipe.data.mix:
            shares = torch.full_like(logits, 1 / logits.shape[1])
            _tried(ctx.loss, upcast(logits), upcast(shares), pictures, name=ctx.loss.function)
        _try_one_image(ctx.plan, network, pictures[:1])
    _try_resolutions(ctx, two)
    _refuse_no_rate(ctx)
    return note


def _try_resolutions(ctx: TrainContext, two: Tensor) -> None:
    """Network, mixing and loss on images of each one that the training has, the smallest first."""
    recipe, network = ctx.recipe, ctx.state.eval_model
    if recipe.data.train_resolution:
        with _no_global_draws(recipe.data.train_resolution, "the progress that it is given"):
            recipe.data.train_resolution(0.0)
    for size in sorted(set(ctx.plan.resolutions) - {two.shape[1]}):
        smaller = resized(two, size)
        pictures = ctx.normalize(smaller)
        if cut_when_read(ctx.data.train, recipe.data):  # the others follow it
            _try_augmentations(recipe, smaller.permute(0, 3, 1, 2))
        if recipe.data.mix:
            _tried(recipe.data.mix, pictures, pictures, numpy.random.default_rng(0))
        with evaluating(network), ctx.accelerator.autocast():
            logits = upcast(_scores(ctx, pictures))
            labels = logits[:1].argmax(1)
            targets = one_hot(labels, logits.shape[1]).to(logits) if recipe.data.mix else labels
            _tried(ctx.loss, logits[:1], targets, pictures[:1], name=ctx.loss.function)
            _try_one_image(ctx.plan, network, pictures[:1])


def _scores(ctx: TrainContext, pictures: Tensor) -> Tensor:
    """`(2, classes)`; raises `UserError` where the network takes no images of this resolution."""
    expected = (2, len(ctx.data.train.classes))
    try:
        scores = ctx.state.eval_model.forward(pictures)
        found = f"makes {tuple(scores.shape)} of two of them"
    except Exception as error:
        if not is_users(error, _FAULTS):
            raise  # of the launcher's own
        scores, found = None, f"fails: {error}{user_location(error)}"
    if not isinstance(scores, Tensor) or scores.shape != expected:
        size = pictures.shape[2]
        raise UserError(
            f"training images of {size} x {size} pixels, at which {code_name(ctx.recipe.model)} "
            f"{found}",
            expected=f"{expected} of two images, at each resolution of data.train_resolution",
            instead="write nn.AdaptiveAvgPool2d(1) before its last layers, or type "
            "data.train_resolution=none",
        )
    return scores


def _try_saving(optimizer: Optimizer) -> None:
    """Refuse what no checkpoint can give back without running code that is in it."""
    saved = io.BytesIO()
    try:
        torch.save(optimizer.state_dict(), saved)
        torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError):  # whose words are about pickle
        kinds = {type(v).__name__ for group in optimizer.param_groups for v in group.values()}
        odd = ", ".join(sorted(kinds - {"int", "float", "bool", "NoneType", "str", "list"}))
        raise UserError(
            f"{type(optimizer).__name__}, whose groups hold {odd}",
            expected="numbers, texts and tensors, which a checkpoint can hold",
            instead="write numbers and texts into the groups, in the recipe file",
        ) from None


def _try_step(ctx: TrainContext) -> None:
    """Refuse an optimizer whose step cannot be made here, as for other gradients or devices.

    It may need more memory than the training: where there is no more, nothing is known of it.
    """
    recipe, network = ctx.recipe, ctx.state.network
    try:
        with _no_global_draws(
            recipe.optimizer,
            "torch.Generator().manual_seed(step), with a step that self.state keeps",
        ):
            lost = try_step(recipe, network)
        # torch's own keep all that lasts in their state, and to see it costs as much as ten steps.
        is_known = bool(lost) or is_of_torch(ctx.state.optimizer)
        is_whole = is_known or not _has_room(ctx) or goes_on(recipe, network)
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            return
        if not is_users(error, (*_FAULTS, AssertionError, NotImplementedError)):
            raise  # of the launcher's own
        what = f"{type(error).__name__}: {error}{user_location(error)}"
        raise UserError(
            f"{code_name(recipe.optimizer)}, whose step fails: {what}",
            expected="an optimizer that takes one gradient per step, with settings for this device",
            instead="write optimizer=partial(AdamW, lr=0.001), for example, in the recipe file, or "
            "leave out the setting that it names",
        ) from error
    if lost:
        raise UserError(
            f"{code_name(recipe.optimizer)}, whose step changes {some(lost)}, which no checkpoint "
            "holds",
            expected="what lasts from step to step in `state` or in the groups, as a resumed run "
            "needs it",
            instead=f"write self.state[parameter]['{lost[0]}'], or group['{lost[0]}'], for "
            f"self.{lost[0]}",
        )
    if not is_whole:
        raise UserError(
            f"{code_name(recipe.optimizer)}, which goes on otherwise from a saved state",
            expected="in its own `state` and groups what lasts from step to step, as a resumed run "
            "needs it",
            instead="write self.state[parameter][...] for what is kept elsewhere; in place of an "
            "optimizer within another one, derive from its class and call super().step()",
        )


def _has_room(ctx: TrainContext) -> bool:
    """Whether two optimizers and a saved state fit: some twelve times what the parameters take."""
    needed = 12 * sum(parameter.nbytes for parameter in ctx.state.network.parameters())
    device = ctx.accelerator.device
    if device.type == "cuda":
        return needed < torch.cuda.mem_get_info(device)[0]
    return needed * ctx.accelerator.num_processes < virtual_memory().available  # all try it at once


def _refuse_no_rate(ctx: TrainContext) -> None:
    """A rate that is zero in all groups, all of the time, trains nothing."""
    points = [point / 100 for point in range(1, 100)]
    rates = (
        ctx.state.scheduled_options(index, point, ctx.recipe.schedule)["lr"]
        for point in points
        for index in range(len(ctx.state.group_options))
    )
    if not any(float(torch.tensor(rate, dtype=torch.float32)) for rate in rates):
        raise UserError(
            "a learning rate of 0 in all of the training",
            expected="a rate above 0 in at least one step, so that the network changes",
            instead="type optimizer.lr=0.001, for example, or another schedule",
        )


def _refuse_not_finite(ctx: TrainContext) -> None:
    """Refuse weights that are not finite before the first step: the training ends in it."""
    state = ctx.state
    if math.isfinite(float(state.largest_parameter())):
        return
    named = {**dict(state.network.named_parameters()), **dict(state.eval_model.named_parameters())}
    odd = [n for n, p in named.items() if p.requires_grad and not p.isfinite().all()]
    raise UserError(
        f"parameters of {code_name(ctx.recipe.model)} that are not finite before the first step: "
        f"{some(odd)}",
        expected="numbers, from which a training can begin",
        instead="write nn.init.normal_(parameter, std=0.02) for torch.empty(...), for example, or "
        "correct what sets them (initialize, or the weights of --init-from)",
    )


def _refuse_changed(given: Tensor, images: Tensor, recipe: Recipe) -> None:
    """Refuse a network that writes into its images where they are seen once more after it."""
    if not are_equal(given, images):
        what = "views" if recipe.views else "the loss"
        raise UserError(
            f"{code_name(recipe.model)} changes the images that it is given, which {what} of the "
            "recipe take as they were",
            expected="a network that leaves them alone",
            instead="write x = x * 2 for x *= 2 or x.mul_(2), and nn.ReLU() for "
            "nn.ReLU(inplace=True) as its first layer",
        )


def _describe_neighbours(ctx: TrainContext, together: Tensor, alone: Tensor) -> str:
    """What the scores `(1, classes)` of an image beside another one and alone show; else empty."""
    is_exact = ctx.accelerator.mixed_precision == "no" and together.dtype.itemsize >= 4
    is_exact = is_exact and not together.is_cuda  # a GPU takes other kernels, with TF32 as well
    together, alone = together.double(), alone.double()
    rounding = (1e-3 if is_exact else 5e-2) * max(1.0, float(alone.abs().max()))
    if not (together - alone).abs().max() > rounding:  # what is no number is none
        return ""
    return (
        f"{short_name(ctx.recipe.model)} gives an image other scores beside others than alone, in "
        "evaluation too: what is measured depends on the batches, which are others on other "
        "numbers of ranks"
    )


def _try_last_image(ctx: TrainContext, picture: Tensor) -> Tensor:
    """One image may be all that is left, of an epoch or of what is evaluated, or all there is."""
    expected = (1, len(ctx.data.train.classes))
    scores = None
    try:
        scores = ctx.state.eval_model.forward(picture.clone())
        shape = tuple(scores.shape)
        found = f"turns 1 image into an output of shape {shape}"
    except Exception as error:
        if not is_users(error, _FAULTS):
            raise  # of the launcher's own
        shape, found = (), f"fails on 1 image: {error}{user_location(error)}"
    if scores is None or shape != expected:
        raise UserError(
            f"{code_name(ctx.recipe.model)} {found}",
            expected=f"an output of shape {expected}, as of any number of images",
            instead="write flatten(1) for squeeze(), which drops the dimension of the batch",
        )
    return scores


def _try_one_image(plan: Plan, network: nn.Module, picture: Tensor) -> None:
    """BatchNorm of single values refuses one image, which may be all that the last batch leaves.

    And so may a network of one's own.
    """
    last = plan.step_images(plan.steps_per_epoch)
    if last < 2 * plan.num_micro_batches:
        try:
            deepcopy(network).train().forward(picture.clone())
        except Exception as error:
            if not is_users(error, _FAULTS):
                raise  # of the launcher's own
            raise UserError(
                f"a last batch of {count(last, 'image')} over "
                f"{count(plan.num_micro_batches, 'micro-batch')}: {error}{user_location(error)}",
                expected="two images for each, which BatchNorm needs, or more",
                instead="type another data.batch_size",
            ) from error


def _try_augmentations(recipe: Recipe, images: Tensor) -> None:
    """Each on `(2, c, h, w)`: on one image with the smallest draws, on the other the largest.

    And on some more with draws between, each of which has to become the same once again and alone,
    but for what rounding may do.
    """
    extremes = torch.tensor([[0.0], [1 - 2**-24]]).repeat(1, DRAWS_PER_AUGMENTATION)
    between = torch.rand(
        MORE_IMAGES, DRAWS_PER_AUGMENTATION, generator=torch.Generator().manual_seed(0)
    )
    table = torch.cat([extremes, between]).to(images.device)
    images = torch.cat([images[:1], 255 - images[:1]]).repeat(len(table) // 2, 1, 1, 1)

    def draws(rows: slice) -> Draws:
        return Draws(table[rows], table[rows], epoch=1)

    for augmentation in recipe.data.augment:
        with _no_global_draws(augmentation, f"draws.fresh, the numbers of each image, {_V2}"):
            function = as_augmentation(augmentation)
            result = _tried(function, images[:2].clone(), draws(slice(2)), name=augmentation)
            fits = torch.is_tensor(result) and result.shape == images[:2].shape
            fits = fits and result.dtype == images.dtype
            _refuse_unless(fits, augmentation, result, "images of the same shape and type")
            places = [slice(row, row + 1) for row in range(len(images))]
            together, *alone = (
                _tried(function, images[place].clone(), draws(place), name=augmentation)
                for place in (slice(None), *places)
            )
        _refuse_neighbours(augmentation, together, torch.cat(alone), rounding=1)


def _try_partners(mix: Callable[..., Any], pictures: Tensor) -> None:
    """Mix two images together, and the second one alone."""
    partners = pictures.flip(-1) / 2
    both, share = mix(pictures.clone(), partners.clone(), numpy.random.default_rng(0))
    one, again = mix(pictures[1:].clone(), partners[1:].clone(), numpy.random.default_rng(0))
    _refuse_neighbours(mix, both[1:], one, rounding=1e-2)
    _refuse_neighbours(mix, torch.tensor(float(share)), torch.tensor(float(again)), rounding=0)


def _refuse_neighbours(
    function: Callable[..., Any], together: Tensor, alone: Tensor, rounding: float
) -> None:
    """Refuse images that become others beside others, as each rank and each pass has its own."""
    if (together.double() - alone.double()).abs().max() > rounding:
        raise UserError(
            f"{code_name(function)}, by which an image becomes another one alone, or once more, "
            f"than beside others{place_of(function)}",
            expected="the same image again, on any number of ranks and after a resume",
            instead="compute each image from itself, its own row of draws.fresh (in a mixing, its "
            "partner) and nothing that is kept from call to call",
        )


def _try_schedule(schedule: Schedule) -> None:
    """At a hundred points of the training."""
    for point in range(1, 100):
        try:
            value, again = schedule(point / 100), schedule(point / 100)
            found = f"returns {value!r}{place_of(schedule)}"
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            fits = is_number and 0 <= float(value) < math.inf
            if fits and again != value:
                fits, found = False, f"returns {value!r} and then {again!r}{place_of(schedule)}"
        except Exception as error:  # TypeError, as of one that takes an optimizer
            if not is_users(error, _FAULTS):
                raise  # of the launcher's own
            fits, found = False, f"fails: {type(error).__name__}: {error}{user_location(error)}"
        if not fits:
            raise UserError(
                f"schedule={code_name(schedule)}, which for the fraction {point / 100} of the "
                f"training {found}",
                expected="a function of one float in [0, 1] that returns a finite number of at "
                "least 0, by which the rate is multiplied",
                instead="compare it with launcher/config/schedules.py, or write a class of "
                "torch.optim.lr_scheduler with its settings in partial(...)",
            )


def _try_loss(loss: BatchLoss, logits: Tensor, picture: Tensor, num_micro_batches: int) -> None:
    """Compare the loss of a batch with those of its images: the scores `(1, classes)` for each."""
    name, labels = loss.function, example_labels(logits.shape[1], logits.device)
    size = len(labels)
    # Other scores and another image for each label, so that it is seen what mixes them up.
    rolled = torch.stack([logits[0].roll(row // 2) for row in range(size)])
    shades = torch.linspace(0.5, 1, size).to(picture)
    pictures = picture * shades[:, None, None, None]
    is_random = False

    def value(scores: Tensor, labels: Tensor, rows: slice = slice(None)) -> Any:
        with torch.random.fork_rng([picture.device] if picture.is_cuda else []):
            torch.manual_seed(0)
            before = global_states()["torch"]
            made = _tried(loss, scores, labels, pictures[rows], name=name)
            nonlocal is_random
            is_random = is_random or global_states()["torch"] != before
            return made

    buffers = [b.clone() for b in name.buffers()] if isinstance(name, nn.Module) else []
    with _no_global_draws(name, "torch.rand(())", ("numpy", "Python")):
        whole = value(rolled, labels)
    _refuse_unless(torch.is_tensor(whole) and whole.ndim == 0, name, whole, "one number")
    if buffers and not all(map(torch.equal, buffers, name.buffers())):
        raise UserError(
            f"{code_name(name)} changes its own buffers",
            expected="a loss without a state, which no checkpoint holds and no other rank sees",
            instead="compute what it needs from the batch alone, or call eval() on a teacher in it",
        )
    if not whole.isfinite():
        return  # training stops at it, or skips it, as the recipe says
    # On a GPU a teacher's layers may be computed in another way when they are called again.
    rounding = 1e-3 if picture.is_cuda else 0.0
    if not torch.isclose(whole, again := value(rolled, labels), rtol=rounding, atol=0.0):
        raise UserError(
            f"{code_name(name)}, which is {float(whole):.6g} and, called again, {float(again):.6g}",
            expected="the same loss of the same scores, as a resumed run needs it",
            instead="leave out what it keeps or counts from call to call",
        )
    _try_gradient(logits, lambda scores: value(scores, labels), name)
    if loss.takes_one_hot:
        right = one_hot(labels, logits.shape[1]).to(logits)
        _refuse_exchanged(name, value(right, labels), value(torch.zeros_like(right), labels))
    rows = [slice(row, row + 1) for row in range(size)]
    each = torch.stack([value(rolled[row], labels[row], row) for row in rows])
    weights = loss.class_weights
    if weights is None:
        mean = float(each.mean())
    else:
        _refuse_zero_weights(weights, num_micro_batches)
        of_labels = weights[labels]
        mean = float((each * of_labels)[of_labels > 0].sum() / of_labels.sum())
    is_sum = mean != 0 and math.isclose(whole, mean * size, rel_tol=1e-3)
    _refuse_unless(not is_sum, name, whole, "the mean over the images, not the sum")
    # As class weights in cross_entropy: it divides by their sum, another one in each micro-batch.
    # A loss that draws is another one for each image alone, as dropout is.
    if (
        num_micro_batches > 1
        and not is_random
        and not math.isclose(whole, mean, rel_tol=1e-3, abs_tol=1e-6)
    ):
        raise UserError(
            f"{code_name(name)}, which is not the mean over {num_micro_batches} micro-batches",
            expected="the mean of the losses of single images, which ranks and passes can add up",
            instead="with class weights, multiply them into cross_entropy(..., reduction='none') "
            "and return the mean",
        )


@contextmanager
def _no_global_draws(
    function: Callable[..., Any], instead: str, names: Sequence[str] = ("torch", "numpy", "Python")
) -> Iterator[None]:
    """Refuse a function that draws from a global generator, whose state no checkpoint holds.

    Ranks and resumed runs would see other images than 1 rank that was never interrupted. A loss may
    draw from that of torch, which is seeded for each step.
    """
    before = global_states()
    yield
    now = global_states()
    used = [name for name in names if now[name] != before[name]]
    if used:
        raise UserError(
            f"{code_name(function)} draws from the global generator of {' and '.join(used)}",
            expected="the same numbers after a resume, and of images on any number of ranks",
            instead=f"use {instead}",
        )


def _refuse_exchanged(function: Any, of_right: Tensor, of_equal: Tensor) -> None:
    """Of scores and one-hot labels, each may be taken for the other."""
    if of_right > of_equal:
        raise UserError(
            f"{code_name(function)}, which is larger for right scores ({float(of_right):.4g}) than "
            f"for equal ones ({float(of_equal):.4g})",
            expected="a loss of scores and targets, in this order, lower for better scores",
            instead="write cross_entropy(logits, targets), for example, in the recipe file",
        )


def _refuse_zero_weights(weights: Tensor, num_micro_batches: int) -> None:
    """A micro-batch of images of weight 0 has the loss 0/0."""
    if num_micro_batches > 1 and not (weights > 0).all():
        raise UserError(
            f"class weights of {float(weights.min()):g} over {num_micro_batches} micro-batches",
            expected="positive weights, or 1 rank without accumulation",
            instead="give those classes a small weight, such as 1e-6",
        )


def _try_gradient(logits: Tensor, loss: Callable[[Tensor], Tensor], name: Any) -> None:
    """Refuse a loss that is constant, or cut off from the scores: nothing would be trained."""
    size = len(example_labels(logits.shape[1], logits.device))
    scores = logits.detach().repeat(size, 1).requires_grad_()
    with torch.enable_grad():
        value = loss(scores)
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, scores, allow_unused=True)
    if gradient is None or not gradient.any():  # one that is not finite is met in training
        raise UserError(
            f"{code_name(name)} has no gradient for the scores",
            expected="a loss that depends on them",
            instead="leave out detach(), item(), argmax() and torch.no_grad() in it",
        )


def _tried(function: Callable[..., Any], *arguments: Any, name: Any = None) -> Any:
    """Call a function of the recipe; what its code raises is a line with its place in it."""
    try:
        return function(*arguments)
    except Exception as error:
        if not is_users(error, _FAULTS):
            raise  # of the launcher's own
        what = f"fails: {type(error).__name__}: {error}{user_location(error)}"
        raise _unfit(name or function, what, "code that takes what it gets here") from error


def _refuse_unless(holds: bool, function: Callable[..., Any], made: Any, expected: str) -> None:
    if not holds:
        is_tensor = torch.is_tensor(made)
        what = f"{made.dtype} {tuple(made.shape)}" if is_tensor else type(made).__name__
        raise _unfit(function, f"returns {what} for two images{place_of(function)}", expected)


def _unfit(function: Callable[..., Any], what: str, expected: str) -> UserError:
    return UserError(
        f"{code_name(function)} {what}",
        expected=expected,
        instead="compare it with launcher/data/augment.py or launcher/training/tta.py, "
        "or for a loss with cross_entropy of torch.nn.functional",
    )
