"""A network is tried in training mode: its memory format, its outputs, its unused parameters."""

import inspect
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.request import urlopen

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import PerChannelMinMaxObserver
from torch.nn import functional as F
from torch.optim import SGD
from torchvision.models import googlenet, resnet18

from launcher import Images, Recipe, Synthetic, ema, mirrored
from launcher.config.overrides import override
from launcher.data import sources
from launcher.training.loop import fit
from launcher.training.model import build_network
from launcher.training.preflight import preflight
from launcher.training.state import TrainContext
from tests.support.helpers import Tiny, context_of, refused, tiny_recipe

DATA = Images(partial(Synthetic, count=50), 10, mean=(0.5,) * 3, std=(0.5,) * 3)


class Viewing(nn.Module):
    """As most tutorials write it: `view` refuses what comes of channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.max_pool2d(F.relu(self.norm(self.conv(x))), 2), 0.1, self.training)
        x = x.view(x.size(0), -1)
        return self.fc(x)


class Flattening(Viewing):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1))


class ViewingInTraining(Flattening):
    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.fc(x.view(x.size(0), -1) if self.training else x.flatten(1))


class _ViewBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient.view(-1).view(gradient.shape)


class ViewingBackward(Flattening):
    def forward(self, x: Tensor) -> Tensor:
        x = _ViewBackward.apply(self.norm(self.conv(x)))
        return self.fc(F.max_pool2d(x, 2).flatten(1))


class FailingInTraining(Flattening):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x[:, :2])
        return super().forward(x)


def placed(model: Callable[[], nn.Module], memory_format: str = "auto") -> TrainContext:
    recipe = Recipe(model=model, data=DATA, optimizer=partial(SGD, lr=0.1), epochs=1)
    return context_of(replace(recipe, memory_format=memory_format))  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [Viewing, ViewingInTraining, ViewingBackward])
def test_a_network_that_views_trains_in_contiguous_memory(model: type[nn.Module]) -> None:
    ctx = placed(model)
    assert ctx.recipe.memory_format == "contiguous"
    assert next(ctx.state.network.parameters()).is_contiguous()
    images = ctx.normalize(ctx.data.train.tensor[:2])
    assert images.is_contiguous()
    assert len(ctx.notes) == 1


def test_a_network_that_flattens_trains_in_channels_last() -> None:
    ctx = placed(Flattening)
    assert (ctx.recipe.memory_format, ctx.notes) == ("channels_last", ())
    weight = next(ctx.state.network.parameters())
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_line_that_refuses_is_named_with_what_to_write() -> None:
    (note,) = placed(Viewing).notes
    source, first = inspect.getsourcelines(Viewing)
    number = first + next(i for i, line in enumerate(source) if "x.view(" in line)
    assert f"{__file__}, line {number}: `x = x.view(x.size(0), -1)` refuses" in note
    assert "write x.flatten(1)" in note
    assert "\n" not in note


def test_the_trial_leaves_no_trace() -> None:
    random = torch.random.get_rng_state()
    torch.manual_seed(0)
    fresh = Viewing().state_dict()
    network = placed(Viewing).state.network
    assert all(torch.equal(value, fresh[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    torch.manual_seed(0)
    Viewing()
    expected = torch.rand(1)
    torch.manual_seed(0)
    placed(Viewing)
    assert torch.equal(torch.rand(1), expected)
    torch.random.set_rng_state(random)


class Volume(Tiny):
    """With a weight of five dimensions, of which torch's channels_last knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.conv(images[:, None])[:, 0])


def test_a_weight_of_five_dimensions_is_no_reason_to_fail() -> None:
    """It was torch's traceback, `required rank 4 tensor to use channels_last format`."""
    assert placed(Volume).recipe.memory_format == "channels_last"
    assert placed(Volume, "contiguous").recipe.memory_format == "contiguous"


def test_a_format_that_the_network_refuses_is_answered_in_one_line() -> None:
    with refused("memory_format=channels_last", "Viewing", "x.flatten(1)", "memory_format=auto"):
        placed(Viewing, "channels_last")
    assert placed(Viewing, "contiguous").notes == ()
    assert placed(Flattening, "contiguous").recipe.memory_format == "contiguous"


def test_a_network_that_fails_in_training_mode_alone_is_answered_in_one_line() -> None:
    with refused("FailingInTraining fails on images of shape (2, 3, 32, 32) in training mode"):
        placed(FailingInTraining)


class Spare(Tiny):
    """With a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Detached(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).detach()


def test_unused_parameters_are_named_before_training() -> None:
    with refused("Spare", "depend on: spare.weight, spare.bias;", "unused_parameters=allow"):
        context_of(tiny_recipe(model=Spare))
    with refused("layers.2.weight, layers.2.bias, layers.4.weight and 1 more"):
        context_of(tiny_recipe(model=Detached))
    ctx = context_of(override(tiny_recipe(model=Spare, epochs=1), ["unused_parameters=allow"]))
    before = [p.clone() for p in ctx.state.network.parameters()]
    list(fit(ctx))
    same = list(map(torch.equal, before, ctx.state.network.parameters()))
    assert same == [False, False, False, False, True, True]


class Several(Tiny):
    """Its output beside that of an auxiliary head, in training mode only."""

    def forward(self, images: Tensor) -> Any:
        scores = super().forward(images)
        return {"scores": scores, "features": scores} if self.training else scores


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (
            partial(googlenet, num_classes=10, init_weights=False),
            ("a GoogLeNetOutputs in training mode", "aux_logits=False"),
        ),
        (Several, ("a dict in training mode", "self.network(images)['scores']")),
    ],
)
def test_auxiliary_outputs_are_answered_with_what_to_write(model: Any, parts: list[str]) -> None:
    with refused(*parts):
        context_of(tiny_recipe(model=model))


def test_googlenet_trains_as_its_refusal_says() -> None:
    model = partial(googlenet, num_classes=10, init_weights=False, aux_logits=False)
    next(iter(fit(context_of(tiny_recipe(model=model)))))


class TrainsWithoutReturn(Tiny):
    """Keeps a layer frozen, as many write it."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.layers[3].eval()


class EvaluatesWithoutReturn(Tiny):
    def eval(self) -> Any:
        """Forgets to set the mode as well."""


@pytest.mark.parametrize(
    ("model", "mode"), [(TrainsWithoutReturn, "train"), (EvaluatesWithoutReturn, "eval")]
)
def test_a_mode_that_returns_no_network_is_refused(model: Any, mode: str) -> None:
    """`load_run(...).model` was None."""
    with refused(f"{model.__name__}, whose {mode}() returns NoneType", f"return super().{mode}"):
        context_of(tiny_recipe(model=model))


class Shuffling(Tiny):
    """Draws its connections once, and keeps them in no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.order = [*numpy.random.permutation(10), random.random()]


def test_what_a_network_draws_as_it_is_built_follows_from_the_seed() -> None:
    """Ranks had other connections than rank 0, and so had a resumed run and `load_run`."""
    images = sources.load(tiny_recipe().data).train
    one, two, other = (
        build_network(replace(tiny_recipe(model=Shuffling), seed=seed), images)
        for seed in (3, 3, 4)
    )
    assert one.order == two.order != other.order


def test_a_single_class_is_refused() -> None:
    """Its loss is 0, and no image is classified wrongly."""
    with refused("images of the class disk alone", "two classes at least"):
        context_of(tiny_recipe(data={"source": partial(Synthetic, classes=1, count=20)}))


class Listing(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [nn.Linear(10, 10), nn.Linear(10, 10)]
        self.known, self.transforms = [*self.layers], [nn.ReLU(), nn.Identity()]

    def forward(self, images: Tensor) -> Tensor:
        scores = super().forward(images)
        for block in self.blocks:
            scores = block(scores)
        return scores


def test_layers_that_torch_does_not_see_are_named_in_a_note() -> None:
    (note,) = context_of(tiny_recipe(model=Listing)).notes
    assert note.startswith("layers in blocks of Listing are neither trained nor saved: write nn.Mo")


class Setting(Tiny):
    """Writes into a parameter in a pass what it finds in the images, or what is its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.is_set = kind, False
        self.scale = nn.Parameter(torch.ones(3), requires_grad=kind == "once")
        self.register_buffer("empty", None)
        self.empty: Tensor | None

    def forward(self, images: Tensor) -> Tensor:
        found = images.mean((0, 2, 3)).detach()
        if self.kind == "once" and not self.is_set:  # as ActNorm does
            self.scale.data.copy_(found)
            self.is_set = True
        elif self.kind == "always" and self.training:
            self.scale.data.mul_(0.9).add_(found, alpha=0.1)
        elif self.kind == "counted" and self.training:
            self.scale.data += 1
        elif self.kind == "limited":
            self.scale.data.clamp_(max=0.5)
        elif self.kind == "made" and self.training and self.empty is None:
            self.empty = torch.ones(())
        return super().forward(images * self.scale[:, None, None])


@pytest.mark.parametrize("kind", ["once", "always"])
def test_parameters_that_are_set_by_the_images_are_refused(kind: str) -> None:
    """Each rank would have its own, and a resumed run those of rank 0."""
    with refused("Setting, whose forward pass sets its parameter scale by the images", "initial"):
        context_of(tiny_recipe(model=partial(Setting, kind=kind)))


@pytest.mark.parametrize(("kind", "scale"), [("counted", 1.0), ("limited", 1.0), ("made", 1.0)])
def test_what_a_network_does_to_itself_is_undone_after_the_trial(kind: str, scale: float) -> None:
    """It began to count before the training, and lost its memory format by a buffer it makes."""
    ctx = context_of(tiny_recipe(model=partial(Setting, kind=kind)))
    values = dict(ctx.state.network.named_parameters())["scale"].tolist()
    assert values == [scale] * 3
    assert ctx.state.network.get_buffer("empty") is None
    assert ctx.notes == ()


class Stepping(Tiny):
    """Changes with its steps, which it counts where nobody looks, or observes its images."""

    passes = 0

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "counts" and self.training:
            type(self).passes += 1
        elif self.kind == "observes":  # in evaluation, too
            self.get_buffer("seen").add_(images.mean((0, 2, 3)).detach())
        return super().forward(images) / (1 + self.passes)


def test_a_state_that_is_hidden_is_told_in_a_note() -> None:
    (note,) = context_of(tiny_recipe(model=partial(Stepping, kind="counts"))).notes
    assert note.startswith("a second pass of Stepping over the same images makes other scores")


class Observing(Tiny):
    """As one prepared for quantization: its observers find the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.observer = PerChannelMinMaxObserver(ch_axis=1)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.observer(images) if self.training else images)


def observed() -> nn.Module:
    network = Observing()
    network(torch.rand(2, 3, 8, 8))
    return network


def test_buffers_that_are_resized_are_refused_for_an_average() -> None:
    """The first step failed in torch's code. What the refusal says to write helps."""
    context_of(tiny_recipe(model=Observing))
    with refused(
        "an average of tests.unit.training.test_model:Observing, which resizes its buffer"
    ):
        context_of(tiny_recipe(model=Observing, average=ema))
    next(iter(fit(context_of(tiny_recipe(model=observed, average=ema)))))


class Expanded(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(1, 1, 1).expand(3, 32, 32))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * self.get_buffer("mask"))


def test_a_buffer_whose_values_are_one_in_memory_is_taken() -> None:
    """It was refused: a trial could not put it back."""
    ctx = context_of(tiny_recipe(model=Expanded))
    preflight(ctx)
    assert torch.equal(ctx.state.network.get_buffer("mask"), torch.ones(3, 32, 32))
    next(iter(fit(ctx)))


class Echoing(Tiny):
    """Adds a little of its last scores."""

    def forward(self, images: Tensor) -> Tensor:
        scores = super().forward(images)
        before, self.last = getattr(self, "last", torch.zeros(())), 0.05 * scores.detach()
        return scores + before


def test_a_state_that_changes_scores_by_little_is_told_as_well() -> None:
    """Of the same images it keeps the same, by which it was not seen."""
    (note,) = context_of(tiny_recipe(model=Echoing)).notes
    assert note.startswith("a second pass of Echoing over the same images makes other scores")
    assert context_of(tiny_recipe(model=Echoing, accumulate=2)).notes == (note,)


def test_what_a_network_observes_begins_with_the_training() -> None:
    ctx = context_of(tiny_recipe(model=partial(Stepping, kind="observes")))
    preflight(ctx)
    assert not ctx.state.network.get_buffer("seen").any()
    assert ctx.notes == ()


class Caching(Tiny):
    """Makes a mask of the size of its images, where there is none or another one."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.mask.shape != images.shape[2:]:
            self.mask = torch.ones(images.shape[2:])
        return super().forward(images * self.mask)


def test_what_a_network_computes_once_may_be_kept_in_a_buffer() -> None:
    ctx = context_of(tiny_recipe(model=Caching))
    assert ctx.notes == ()
    assert ctx.state.network.get_buffer("mask").shape == (32, 32)


class Keeping(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        self.seen = super().forward(images)
        return self.seen


def test_a_network_that_keeps_what_it_computes_can_be_averaged() -> None:
    """torch copies no tensor that has a graph behind it."""
    assert context_of(tiny_recipe(model=Keeping, average=ema)).state.ema_model is not None


def not_reachable() -> nn.Module:
    return urlopen("http://127.0.0.1:1/weights.pth")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (partial(resnet18, weights="NONE_SUCH"), "resnet18 cannot be built: KeyError: 'NONE_SUCH'"),
        (not_reachable, "not_reachable cannot be built: URLError"),
    ],
)
def test_a_library_that_cannot_build_the_network_is_a_line(model: Any, said: str) -> None:
    with refused(said):
        context_of(tiny_recipe(model=model))


class Holding(Tiny):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)


@pytest.mark.parametrize(
    "value", [torch.zeros(2, dtype=torch.complex128), torch.eye(3).to_sparse()]
)
def test_a_tensor_that_no_file_of_weights_can_hold_is_refused(value: Tensor) -> None:
    """It was met after the first epoch, when the weights were to be written."""
    with refused("Holding, whose state holds value, which is no tensor that a file"):
        context_of(tiny_recipe(model=partial(Holding, value)))


def drawn(network: nn.Module, images: Tensor) -> None:
    numbers = [random.random(), numpy.random.random(), float(torch.rand(()))]
    next(network.parameters())[0] = torch.tensor(numbers)


def test_what_an_initialization_draws_follows_from_the_seed() -> None:
    """Python and numpy drew other numbers in each process."""
    networks = (context_of(tiny_recipe(initialize=drawn, seed=s)).state.network for s in (3, 3, 4))
    one, two, other = (next(network.parameters())[0].tolist() for network in networks)
    assert one == two
    assert not {*one} & {*other}


class Ghost(nn.Module):
    """BatchNorm over each of some groups of a pass, which it has to divide evenly."""

    def __init__(self, groups: int, each: bool = False) -> None:
        super().__init__()
        self.groups, self.each = groups, each
        self.conv = nn.Conv2d(3, 4, 3, 2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(groups if each else 1))
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.training and self.each:  # a group for each BatchNorm, as far as there are images
            parts = x.chunk(self.groups)
            x = torch.cat([norm(part) for norm, part in zip(self.norms, parts, strict=False)])
        elif self.training:
            if len(x) % self.groups:
                raise AssertionError(f"{len(x)} images in {self.groups} groups")
            groups = x.view(self.groups, len(x) // self.groups, *x.shape[1:])
            x = torch.cat([self.norms[0](part) for part in groups])
        else:
            x = self.norms[0](x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("each", [False, True])
def test_a_network_that_needs_more_than_two_images_is_tried_on_a_pass(each: bool) -> None:
    """It was refused, or told that it leaves parameters without a gradient."""
    recipe = tiny_recipe(model=partial(Ghost, 5, each), data={"batch_size": 20}, epochs=1)
    ctx = context_of(recipe)
    preflight(ctx)
    assert ctx.trial_images == 20
    assert ctx.notes == ()
    assert context_of(tiny_recipe(model=Tiny)).trial_images == 2
    list(fit(ctx))


def test_a_pass_that_has_too_few_images_is_named_before_training() -> None:
    """100 images in batches of 30 leave 10."""
    with refused("on 10 images, as a pass of the training has (of 30, 10): 10 images in 3 groups"):
        context_of(tiny_recipe(model=partial(Ghost, 3), data={"batch_size": 30}))
    recipe = tiny_recipe(model=partial(Ghost, 3), data={"batch_size": 30})
    context_of(recipe, max_steps=3)  # which has no such pass
    with refused("fails on images of shape (2, 3, 32, 32) in training mode, nor does it take"):
        context_of(tiny_recipe(model=partial(Ghost, 7)))


class Routed(Tiny):
    """Each image goes through a layer that its first pixel chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(10, 10) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        chosen, scores = (images[:, 0, 0, 0] > 0).long(), super().forward(images)
        made = torch.zeros_like(scores)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                made[chosen == number] = expert(scores[chosen == number])
        return made


def test_layers_that_some_passes_leave_out_are_refused_before_training() -> None:
    """A pass of the training's size may have images for all of them, and another one not."""
    with refused("Routed that its scores do not depend on: experts.", "unused_parameters=allow"):
        context_of(tiny_recipe(model=Routed, data={"batch_size": 50}))


class Hooked(Tiny):
    """Changes its gradients on the way."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        weight: Any = self.get_parameter("layers.2.weight")
        weight.register_hook(change)


@pytest.mark.parametrize(
    ("change", "is_told"),
    [
        (lambda gradient: gradient.clamp(-1, 1), True),
        (lambda gradient: gradient / gradient.norm(), True),
        (lambda gradient: gradient * 0.5, False),
        (lambda gradient: gradient - gradient.mean(), False),
    ],
)
def test_gradients_that_are_no_sum_over_passes_are_told(
    change: Callable[[Tensor], Tensor], is_told: bool
) -> None:
    recipe = tiny_recipe(model=partial(Hooked, change))
    assert context_of(recipe).notes == ()  # of 1 rank in one pass, they are what they are
    notes = context_of(replace(recipe, accumulate=2)).notes
    assert len(notes) == is_told
    if is_told:
        assert notes[0].startswith("the gradients of layers.2.weight do not grow with the loss")


class Writing(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.mul_(2))


def of_images(scores: Tensor, targets: Tensor, images: Tensor) -> Tensor:
    return F.cross_entropy(scores, targets) + images.square().mean()


def test_a_network_that_writes_into_its_images_is_refused_where_they_are_seen_again() -> None:
    """The mirror images of the views were those of images that the first view had changed."""
    preflight(context_of(tiny_recipe(model=Writing)))
    for changes, what in (({"views": mirrored}, "views"), ({"loss": of_images}, "the loss")):
        with refused(f"Writing changes the images that it is given, which {what}", "x = x * 2"):
            preflight(context_of(tiny_recipe(model=Writing, **changes)))


def test_test_images_that_are_those_of_the_training_are_told() -> None:
    data = sources.load(tiny_recipe().data)
    (note,) = context_of(tiny_recipe(), replace(data, test=data.train)).notes
    assert note.startswith("the test images are the training images")
    again = replace(data.train, images=data.train.tensor.clone(), labels=data.train.labels.clone())
    assert context_of(tiny_recipe(), replace(data, test=again)).notes == (note,)
    assert context_of(tiny_recipe(), data).notes == ()


class Late(Tiny):
    """Is set up by its first images, and forgets that the trial was undone."""

    def __init__(self) -> None:
        super().__init__()
        self.is_set = False
        self.register_buffer("shift", torch.zeros(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.training and not self.is_set:
            self.shift, self.is_set = images.mean((0, 2, 3))[:, None, None] + 1, True
        return super().forward(images - self.shift)


def test_what_a_network_takes_from_its_first_images_alone_is_told() -> None:
    """The trial was undone, all but the attribute: it trained without what it had set."""
    (note,) = context_of(tiny_recipe(model=Late)).notes
    assert note.startswith("a second pass of Late over the same images makes other scores")


class Counting(Tiny):
    """Counts its passes where no checkpoint and no trial looks."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += self.training
        return super().forward(images)


def test_as_many_trials_are_made_on_any_number_of_passes() -> None:
    """Else such a network would begin otherwise on 2 ranks than on 1."""
    one, two = (
        context_of(tiny_recipe(model=Counting, accumulate=passes)).state.network.passes
        for passes in (1, 2)
    )
    assert one == two
