"""Values with which a recipe would train nonsense are refused, each with its line."""

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer, SparseAdam
from torch.optim.lr_scheduler import StepLR

from launcher import ChainedOptimizer, Muon, cosine, cutmix, cutout, ema, linear
from launcher.config.slots import NamedParameters, Score
from launcher.training.preflight import preflight
from tests.support.helpers import Tiny, context_of, refused, tiny_recipe


def nothing(network: nn.Module) -> None:
    """An average that forgets its return."""


def not_finite(score: Score, images: Tensor) -> Tensor:
    return score(images) * math.nan


def rising(fraction: float) -> float:
    return 1 / (fraction - 0.5)


CALLS: list[float] = []


def counting(fraction: float) -> float:
    CALLS.append(fraction)
    return 1 / len(CALLS)


def takes_an_optimizer(optimizer: Optimizer) -> StepLR:
    return StepLR(optimizer, 3)


def of_numpy(fraction: float) -> numpy.float32:
    return numpy.float32(1 - fraction)


def forgetful(fraction: float) -> None:
    pass


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"average": nothing}, "nothing returns NoneType"),
        ({"average": partial(ema, decay=2.0)}, "average.decay=2.0"),
        ({"average": partial(ema, decay=1.0)}, "average.decay=1.0; expected"),  # never moves
        (
            {"data": {"mix": cutmix}, "loss": partial(cross_entropy, ignore_index=2)},
            "cross_entropy fails: RuntimeError: ignore_index is not supported",
        ),
        ({"views": not_finite}, "finite scores where the model's are"),
        ({"schedule": rising}, "rising, which for the fraction 0.01 of the training returns -2.04"),
        (
            {"schedule": forgetful},
            "forgetful, which for the fraction 0.01 of the training returns None",
        ),
        (
            {"schedule": counting},
            "counting, which for the fraction 0.01 of the training returns 0.01 and then 0.00990",
        ),
        ({"schedule": takes_an_optimizer}, "takes_an_optimizer, which for the fraction"),
        ({"schedule": partial(cosine, warmup=1.5)}, "warmup=1.5"),
        ({"schedule": partial(cosine, end=10.0)}, "end=10.0, which is no fraction in [0, 1]"),
        ({"schedule": partial(linear, warmup=-0.1)}, "warmup=-0.1"),
        ({"schedule": partial(linear, until=2.0)}, "until=2.0"),
        ({"data": {"augment": (partial(cutout, size=-1),)}}, "size=-1"),
        ({"data": {"augment": (partial(cutout, fill=300),)}}, "fill=300"),
        ({"epochs": 10**23}, "epochs=100000000000000000000000"),
    ],
)
def test_it_is_refused(changes: dict[str, Any], said: str) -> None:
    with refused(said):
        preflight(context_of(tiny_recipe(**changes)))


def gives_none(*arguments: Any) -> None: ...


def gives_two(*arguments: Any) -> tuple[int, int]:
    return 1, 2


def gives_one_by_one(*arguments: Any) -> Iterator[int]:
    yield 1


async def gives_later(*arguments: Any) -> int:
    return 1


def fails(*arguments: Any, train: bool = True) -> float:
    return 1 / 0


FAILS = fails.__code__.co_firstlineno + 1


def in_slot(name: str, function: Any) -> dict[str, Any]:
    if name in ("augment", "mix", "source"):
        return {"data": {name: (function,) if name == "augment" else function}}
    return {name: function}


SLOTS = ("model", "optimizer", "loss", "schedule", "average", "augment", "mix", "views")


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize(("function", "kind"), [(gives_none, "None"), (gives_two, "tuple")])
def test_what_is_returned_in_its_place_is_refused(slot: str, function: Any, kind: str) -> None:
    line = function.__code__.co_firstlineno
    shown = "returns (1, 2)" if (slot, kind) == ("schedule", "tuple") else kind
    with refused(function.__name__, shown, f"({__file__}, line {line})"):
        preflight(context_of(tiny_recipe(**in_slot(slot, function))))


@pytest.mark.parametrize("slot", [*SLOTS, "source", "initialize"])
@pytest.mark.parametrize("function", [gives_one_by_one, partial(gives_later)])
def test_generators_and_coroutines_are_refused(slot: str, function: Any) -> None:
    code = getattr(function, "func", function).__code__
    with refused(f"{slot}={code.co_name}, a function with", f"line {code.co_firstlineno})"):
        tiny_recipe(**in_slot(slot, function))


@pytest.mark.parametrize("slot", [*SLOTS, "source", "initialize"])
def test_what_fails_is_refused_with_its_line(slot: str) -> None:
    changes = in_slot(slot, fails)
    with refused("fails", "division by zero", f"({__file__}, line {FAILS})"):
        preflight(context_of(tiny_recipe(**changes)))


def returning(value: object) -> Any:
    """A function that returns what no slot of a recipe takes."""

    def function(*arguments: object) -> object:
        return value

    return function


@pytest.mark.parametrize("value", [None, 3, (), (torch.ones(1),), "ab", {"a": 1}])
@pytest.mark.parametrize("slot", ["augment", "mix", "views"])
def test_what_returns_no_images_is_a_line(slot: str, value: object) -> None:
    function = returning(value)
    changes = {
        "augment": {"data": {"augment": (function,)}},
        "mix": {"data": {"mix": function}},
        "views": {"views": function},
    }
    with refused("for two images"):
        preflight(context_of(tiny_recipe(**changes[slot])))


class Marked(SGD):
    """An optimizer with a setting in its groups that torch does not know."""

    def __init__(self, params: Any, lr: float, mark: object = None) -> None:
        super().__init__(params, lr)
        self.param_groups[0]["mark"] = mark


@pytest.mark.parametrize("mark", [PurePosixPath("x"), math.sqrt, Marked])
def test_an_optimizer_that_no_checkpoint_can_hold_is_refused(mark: object) -> None:
    ctx = context_of(tiny_recipe(optimizer=partial(Marked, lr=0.1, mark=mark)))
    with refused("Marked, whose groups hold", "which a checkpoint can hold"):
        preflight(ctx)


def test_numbers_of_numpy_in_a_group_are_numbers(tmp_path: Path) -> None:
    optimizer = partial(Marked, lr=numpy.float64(0.1), mark=numpy.int64(3))
    state = context_of(tiny_recipe(optimizer=optimizer)).state
    torch.save(state.optimizer.state_dict(), tmp_path / "optimizer.pt")
    (group,) = torch.load(tmp_path / "optimizer.pt", weights_only=True)["param_groups"]
    assert (group["lr"], group["mark"]) == (0.1, 3)


class Demanding(SGD):
    """An optimizer whose step wants something that the launcher does not give."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        raise NotImplementedError("a second gradient")


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (
            partial(SparseAdam, lr=0.1),
            "SparseAdam, whose step fails: RuntimeError: S",
        ),
        (partial(Adam, lr=0.1, capturable=True), "adam:Adam, whose step fails: AssertionError: If"),
        (partial(Demanding, lr=0.1), "NotImplementedError: a second gradient (" + __file__),
    ],
)
def test_an_optimizer_whose_step_fails_is_refused(optimizer: Any, said: str) -> None:
    ctx = context_of(tiny_recipe(optimizer=optimizer))
    with refused(said, "one gradient per step"):
        preflight(ctx)


def test_the_step_that_is_tried_changes_nothing() -> None:
    ctx = context_of(tiny_recipe(optimizer=partial(SGD, lr=0.1, weight_decay=0.5, momentum=0.9)))
    before = [parameter.clone() for parameter in ctx.state.network.parameters()]
    preflight(ctx)
    assert all(map(torch.equal, before, ctx.state.network.parameters()))
    assert not ctx.state.optimizer.state
    assert all(parameter.grad is None for parameter in ctx.state.network.parameters())


def never(fraction: float) -> float:
    return 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": partial(SGD, lr=0.0)},
        {"optimizer": partial(SGD, lr=1e-320)},  # 0 in float32
        {"schedule": never},
    ],
)
def test_a_rate_of_zero_in_all_of_the_training_is_refused(changes: dict[str, Any]) -> None:
    with refused("a learning rate of 0 in all of the training"):
        preflight(context_of(tiny_recipe(**changes)))


def test_a_rate_of_zero_in_a_part_of_the_training_is_not() -> None:
    preflight(context_of(tiny_recipe(schedule=partial(linear, until=0.5))))


def initialize(network: nn.Module, images: Tensor) -> None:
    raise LookupError("no layer")


def of_the_network_only(network: nn.Module) -> None:
    pass


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (initialize, "initialize fails: LookupError: no layer"),
        (of_the_network_only, "only fails: TypeError: of_the_network_only() takes 1 positional"),
    ],
)
def test_an_initialization_that_fails_is_a_line(function: Any, said: str) -> None:
    with refused(said, "type initialize=none"):
        context_of(tiny_recipe(initialize=function))


def absent(images: Tensor, draws: object) -> Tensor:
    settings: dict[str, Tensor] = {}
    return settings["padding"]


class Unbuilt(Tiny):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width // 0)


class Unnamed(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        return getattr(self, "no_such_layer")(images)  # noqa: B009


def no_network() -> None:
    """A function that forgets its return."""


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Unbuilt, "Unbuilt cannot be built: ZeroDivisionError: "),
        (partial(Tiny, width=-1), "Tiny cannot be built: RuntimeError: "),
        (Unnamed, "AttributeError: 'Unnamed' object has no attribute 'no_such_layer' ("),
        (no_network, "no_network makes NoneType"),
    ],
)
def test_a_model_that_cannot_be_built_or_called_is_a_line(model: Any, said: str) -> None:
    with refused(said):
        context_of(tiny_recipe(model=model))


def test_what_the_users_code_raises_is_a_line_with_its_place() -> None:
    line = absent.__code__.co_firstlineno + 2
    with refused("absent fails: KeyError: 'padding'", f"{__file__}, line {line})"):
        preflight(context_of(tiny_recipe(data={"augment": (absent,)})))


def test_a_number_of_numpy_is_one() -> None:
    ctx = context_of(tiny_recipe(schedule=of_numpy))
    preflight(ctx)
    ctx.state.set_learning_rates(0.5, ctx.recipe.schedule)
    assert type(ctx.state.learning_rate) is float
    assert ctx.state.learning_rate == 0.5e-3


# What no checkpoint holds: a resumed run would go on another way, and nobody would know


class Counting(SGD):
    """Counts its steps, keeps momenta or weights in attributes: in a number, a list or a dict."""

    def __init__(self, params: Any, lr: float, kind: str) -> None:
        super().__init__(params, lr)
        self.kind, self.steps, self.mapped = kind, 0, dict[Tensor, Tensor]()
        self.momenta = [torch.zeros_like(p) for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        if self.kind == "steps":
            self.steps += 1
        elif self.kind == "momenta":
            for momentum, parameter in zip(self.momenta, parameters, strict=True):
                momentum += parameter.grad
        elif self.kind == "mapped":
            self.mapped.update({p: p.detach().clone() for p in parameters})
        super().step(closure)


def several(params: NamedParameters) -> ChainedOptimizer:
    named = list(params)
    matrices = [pair for pair in named if pair[1].ndim == 2]
    others = [pair for pair in named if pair[1].ndim != 2]
    return ChainedOptimizer(Muon(matrices, lr=0.1), Adam(others, lr=0.1))


@pytest.mark.parametrize("kind", ["steps", "momenta", "mapped"])
def test_an_optimizer_with_a_state_of_its_own_is_refused(kind: str) -> None:
    with refused(
        f"Counting, whose step changes {kind}, which no", f"write self.state[parameter]['{kind}']"
    ):
        preflight(context_of(tiny_recipe(optimizer=partial(Counting, lr=0.1, kind=kind))))


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(Counting, lr=0.1, kind="none"),
        partial(Adam, lr=torch.tensor(0.1), amsgrad=True),
        several,
    ],
)
def test_an_optimizer_whose_state_is_saved_is_not(optimizer: Any) -> None:
    preflight(context_of(tiny_recipe(optimizer=optimizer)))


class Complex(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1, dtype=torch.complex64))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.factor.abs()


def test_an_optimizer_of_complex_parameters_is_not() -> None:
    preflight(context_of(tiny_recipe(model=Complex)))


class Unprepared(SGD):
    def __init__(self, params: Any, lr: float) -> None:
        self.param_groups = SGD(params, lr).param_groups
        self.defaults = {"lr": lr}


def test_an_optimizer_without_torchs_own_init_is_refused() -> None:
    with refused(
        "Unprepared, whose state cannot be read", "call super().__init__(params, defaults)"
    ):
        context_of(tiny_recipe(optimizer=partial(Unprepared, lr=0.1)))


def frozen() -> nn.Module:
    return Tiny().requires_grad_(False)


def test_a_network_of_which_all_is_frozen_is_refused() -> None:
    with refused("frozen, which has no parameter to train", "leave out requires_grad_(False)"):
        context_of(tiny_recipe(model=frozen))


class Unfilled(Tiny):
    """Begins with what is no number, where it is trained, frozen or a buffer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        value = torch.full((1,), math.nan if kind == "trained" else math.inf)
        self.extra = nn.Parameter(value, requires_grad=kind == "trained")
        self.is_used = kind == "trained"

    def forward(self, images: Tensor) -> Tensor:
        scores = super().forward(images)
        return scores + self.extra if self.is_used else scores.minimum(self.extra)


def test_weights_that_are_not_finite_are_refused_before_training() -> None:
    """The first step said that the loss is nan, and to lower the learning rate."""
    with refused("Unfilled that are not finite before the first step: extra", "nn.init.normal_"):
        preflight(context_of(tiny_recipe(model=partial(Unfilled, kind="trained"))))
    preflight(context_of(tiny_recipe(model=partial(Unfilled, kind="frozen"))))


class Drawing(Tiny):
    """Stochastic depth as many write it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, images: Tensor) -> Tensor:
        draws: dict[str, Callable[[], float]] = {
            "Python": random.random,
            "numpy": numpy.random.random,
            "torch": lambda: float(torch.rand(())),
        }
        skips = self.training and draws[self.kind]() < 0.5
        return super().forward(images) * (2 if skips else 1)


@pytest.mark.parametrize("kind", ["Python", "numpy"])
def test_a_network_that_draws_what_nobody_seeds_is_refused(kind: str) -> None:
    with refused(f"Drawing draws from the global generator of {kind};", "write torch.rand(())"):
        context_of(tiny_recipe(model=partial(Drawing, kind=kind)))
    context_of(tiny_recipe(model=partial(Drawing, kind="torch")))


def drawn_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets) * (1 + random.random() * 1e-6)


def test_a_loss_that_draws_what_nobody_seeds_is_refused() -> None:
    with refused("drawn_loss draws from the global generator of Python", "use torch.rand(())"):
        preflight(context_of(tiny_recipe(loss=drawn_loss)))


class Remembering(Tiny):
    """Keeps a mean of its images, and says how it is kept."""

    mean: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.steps = kind, 0
        self.register_buffer("mean", torch.zeros(()), persistent=kind == "saved")

    def forward(self, images: Tensor) -> Tensor:
        if self.training and self.kind in ("saved", "lost"):
            self.mean = self.mean * 0.9 + images.mean() + 1
        elif self.training and self.kind == "counted":
            self.steps += 1
        return super().forward(images - self.mean)

    def get_extra_state(self) -> Any:
        return {"steps": self.steps}

    def set_extra_state(self, state: Any) -> None:
        self.steps = state["steps"]


class Keeping(Tiny):
    """Keeps something in an attribute: what lasts, or what is computed anew in each pass."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.history = kind, list[float]()
        self.mean, self.seen, self.height = torch.zeros(()), torch.zeros(()), 0
        self.of_torch, self.of_numpy = torch.Generator(), numpy.random.default_rng(0)

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "history":
            self.history.append(1.0)
        elif self.kind == "mean":
            self.mean = 0.9 * self.mean + 0.1 * images.mean().detach()
        elif self.kind == "of_torch":
            torch.rand(1, generator=self.of_torch)
        elif self.kind == "of_numpy":
            self.of_numpy.random()
        self.seen, self.height = images, images.shape[2]
        return super().forward(images)


@pytest.mark.parametrize("kind", ["history", "mean", "of_torch", "of_numpy", "nothing"])
def test_what_lasts_in_an_attribute_is_named_in_a_note(kind: str) -> None:
    notes = context_of(tiny_recipe(model=partial(Keeping, kind=kind))).notes
    said = [f"a pass changes {kind} of Keeping, which no checkpoint holds: keep in buffers"]
    assert [note.partition(" (")[0] for note in notes] == said * (kind != "nothing")


class Squeezing(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).squeeze()


def test_a_network_that_squeezes_one_image_is_refused() -> None:
    """It failed in the last step of an epoch, or in an evaluation, if that had one image."""
    with refused("Squeezing turns 1 image into an output of shape (10,)", "write flatten(1)"):
        preflight(context_of(tiny_recipe(model=Squeezing)))


class Plain(Remembering):
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


def test_a_buffer_that_training_changes_and_nobody_saves_is_refused() -> None:
    with refused("Plain changes in training its buffer mean, which", "leave out persistent=False"):
        context_of(tiny_recipe(model=partial(Plain, kind="lost")))


def test_numbers_that_training_changes_are_named_in_a_note() -> None:
    notes = {
        kind: context_of(tiny_recipe(model=partial(Plain, kind=kind))).notes
        for kind in ("saved", "constant", "counted")
    }
    (said,) = notes.pop("counted")
    assert said.startswith("a pass changes steps of Plain, which no checkpoint holds: keep in")
    assert notes == {"saved": (), "constant": ()}


def test_a_state_that_is_no_tensor_is_refused() -> None:
    """It was met after the first epoch, when the weights were to be written."""
    with refused("Remembering, whose state holds _extra_state", "register_buffer"):
        context_of(tiny_recipe(model=partial(Remembering, kind="saved")))


class Drawn(SGD):
    def __init__(self, params: Any, lr: float, kind: str) -> None:
        super().__init__(params, lr)
        self.kind = kind

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        drawn = torch.rand(()) if self.kind == "torch" else numpy.random.random()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(float(drawn))


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_an_optimizer_whose_step_draws_is_refused(kind: str) -> None:
    """Each rank drew other numbers, and had weights of its own from then on."""
    with refused(f"Drawn draws from the global generator of {kind}", "torch.Generator()"):
        preflight(context_of(tiny_recipe(optimizer=partial(Drawn, lr=0.1, kind=kind))))


class Wrapping(SGD):
    """An optimizer around another one, whose momenta are in no checkpoint."""

    def __init__(self, params: Any, lr: float) -> None:
        named = list(params)
        super().__init__(named, lr)
        self.inner = SGD(named, lr, momentum=0.9)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


class Sharing(Optimizer):
    """One that shares its groups with another one, until a state is loaded into it."""

    def __init__(self, params: Any, lr: float) -> None:
        self.inner = SGD(params, lr)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


class Attached(SGD):
    """Its momenta are attributes of the parameters."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.sum_of_gradients = getattr(parameter, "sum_of_gradients", 0) + parameter.grad
            parameter.data -= self.param_groups[0]["lr"] * parameter.sum_of_gradients


@pytest.mark.parametrize("kind", [Wrapping, Sharing, Attached])
def test_an_optimizer_that_goes_on_otherwise_from_a_saved_state_is_refused(kind: Any) -> None:
    with refused(f"{kind.__name__}, which goes on otherwise from a saved state", "super().step()"):
        preflight(context_of(tiny_recipe(optimizer=partial(kind, lr=0.1))))


class Rateless(Optimizer):
    def __init__(self, params: Any, lr: float | None = None) -> None:
        super().__init__(params, {} if lr == 0 else {"lr": lr})


class Exchanging(SGD):
    def eval(self) -> None: ...


class Decaying(SGD):
    """As Keras' had it: the schedule, here a constant one, sets the rate anew in each step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 0.99


class Uninitialized(SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        del self.defaults


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (Rateless, "Rateless, of which a group has no lr"),
        (partial(Rateless, lr=0), "Rateless, of which a group has no lr"),
        (partial(Exchanging, lr=0.1), "Exchanging, whose train() and eval() exchange the weights"),
        (partial(Uninitialized, lr=0.1), "Uninitialized, whose state cannot be read"),
        (partial(Decaying, lr=0.1), "Decaying, whose step changes the rate of a group itself"),
    ],
)
def test_an_optimizer_that_lacks_what_it_is_asked_for_is_refused(optimizer: Any, said: str) -> None:
    with refused(said):
        preflight(context_of(tiny_recipe(optimizer=optimizer)))
