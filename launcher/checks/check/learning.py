"""Whether the network learns: its first loss, and whether it can learn 32 images by heart."""

import math
from dataclasses import replace

import torch
from torch import nn

from launcher.checks.verdicts import Verdict
from launcher.config.plan import make_plan
from launcher.data.images import Data, ImageSet
from launcher.errors import NotFiniteError
from launcher.training.loop import fit
from launcher.training.metrics import EpochReport, StepReport
from launcher.training.model import initialize
from launcher.training.network import restored_afterwards, upcast
from launcher.training.state import TrainContext, make_context
from launcher.utils.terminal import COLUMNS, plot
from launcher.utils.text import spread

NAME = "learning"
IMAGES, STEPS = 32, 100  # of --overfit
FIRST = 64  # images for the first loss
_LEARNT = 0.1  # fraction of the first loss
_HIGH = 2.0  # times log(classes)


def first_loss(ctx: TrainContext) -> Verdict:
    """The loss before training; for equal scores of n classes it is log(n)."""
    network, train = ctx.state.network, ctx.data.train
    most = FIRST if ctx.trial_images == 2 else ctx.trial_images  # which the network takes
    chosen = torch.arange(0, len(train), max(1, len(train) // most))[:most]
    images = ctx.normalize(train.pixels(chosen))
    network.train()
    with restored_afterwards(network, ctx.accelerator.device), torch.no_grad():
        loss = float(ctx.loss(upcast(network(images)), train.labels[chosen], images))
    even = math.log(len(train.classes))
    answer = f"the first loss is {loss:.3f}; equal scores for all classes give {even:.3f}"
    figures = {"first_loss": loss, "even": even}
    if not math.isfinite(loss):
        advice = "look for a division by zero, a logarithm of zero or weights that are not finite"
        return Verdict(NAME, answer, "wrong", advice, figures=figures)
    if loss > _HIGH * even:
        advice = "its first scores are large: smaller first weights, or a norm before the last "
        advice += "layer, save the steps that unlearn them"
        return Verdict(NAME, answer, "notice", advice, figures=figures)
    return Verdict(NAME, answer, figures=figures)


def overfit(ctx: TrainContext, network: nn.Module) -> Verdict:
    """Train a new network on one batch of 32 images for 100 steps, the whole schedule over them.

    The images are as they are, neither augmented nor mixed.
    """
    few = _few(ctx.data.train)
    recipe = replace(
        ctx.recipe,
        data=replace(
            ctx.recipe.data, batch_size=len(few), augment=(), mix=None, train_resolution=None
        ),
        epochs=STEPS,
        accumulate=1,
        average=None,
        views=None,
        uncertain=None,
        patience=None,
    )
    plan = make_plan(
        recipe, world_size=1, train_images=len(few), evaluated_images=len(few), log_every=1
    )
    data = Data(few, few, ctx.data.name)
    if recipe.initialize is not None:
        initialize(network, recipe, ctx.data.train, ctx.accelerator.device)
    own = make_context(network, recipe, plan, ctx.accelerator, data)
    losses, right = [], 0.0
    try:
        for event in fit(own):
            if isinstance(event, StepReport):
                losses.append(event.loss)
            elif isinstance(event, EpochReport):
                right = event.evaluation.accuracy
    except NotFiniteError as error:
        return Verdict("overfit", str(error), "wrong")
    answer = f"the loss of {len(few)} images went from {losses[0]:.3f} to {losses[-1]:.3g} in "
    answer += f"{len(losses)} steps, and {right:.0%} of them are classified rightly"
    lines = plot(spread([max(0.0, loss) for loss in losses], COLUMNS), "1", f"step {len(losses)}")
    figures = {"first": losses[0], "last": losses[-1], "accuracy": right}
    if losses[-1] <= _LEARNT * losses[0] or right == 1:  # with smoothed labels no loss is zero
        return Verdict("overfit", answer, lines=lines, figures=figures)
    return Verdict(
        "overfit",
        answer,
        "wrong",
        "try optimizer.lr ten times smaller and larger; if neither helps, look for a gradient that "
        "is cut, labels that do not belong to their images, or far too much dropout",
        lines,
        figures,
    )


def _few(train: ImageSet) -> ImageSet:
    """Some images of each class, equally many where possible."""
    order = torch.argsort(train.labels.cpu(), stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(IMAGES, len(order))).long()]
    return ImageSet(train.pixels(chosen), train.labels[chosen], train.classes)
