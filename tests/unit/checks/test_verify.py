"""The parts of `launcher verify` that need no ranks; whole recipes are tested in integration."""

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from launcher import Draws, Synthetic, cli, cutmix, flip
from launcher.checks.verdicts import Deadline, TimeUpError, Verdict
from launcher.checks.verify import command as verify
from launcher.checks.verify import slices
from launcher.checks.verify.differences import (
    Deviation,
    OwnLayers,
    deviation_of,
    first_different_bit,
    first_mixing_layer,
    first_other_images,
    largest_difference,
    own_layers,
    same_state,
    unsteady_functions,
)
from launcher.checks.verify.promises import Promises
from launcher.checks.verify.slices import Sizes, choose_sizes
from launcher.checks.verify.trial import (
    Kill,
    Sighting,
    StepTrace,
    Trial,
    Watcher,
    compile_mode,
    keep_steady,
)
from launcher.checks.verify.trials import (
    LEAST_STEPS,
    MOST_STEPS,
    Effort,
    Settings,
    TrialError,
    Trials,
    effort_in_time,
)
from launcher.cli import main
from launcher.config.plan import make_plan
from launcher.config.recipe import Recipe
from launcher.data import local_copy, sources
from launcher.errors import NotExportableError, UserError
from launcher.results import export
from launcher.training.loop import fit
from launcher.training.metrics import Evaluation, StepReport
from tests.support.helpers import RECIPES, Tiny, complaint, context_of, refused, tiny_recipe

SIMPLECNN = str(RECIPES / "simplecnn.py")


# The command


def never(*_: object) -> Any:
    raise AssertionError("nothing is loaded for words that are wrong")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "no recipe is named"),
        ([SIMPLECNN, "--rnks", "2"], "unrecognized arguments"),
        ([SIMPLECNN, "--ranks", "1"], "--ranks 1, which are fewer than 2"),
        ([SIMPLECNN, "--steps", "3"], "--steps 3, which are fewer than 6"),
        ([SIMPLECNN, "--limit", "0"], "no number of seconds"),
        ([SIMPLECNN, "--limit", "1e-320"], "no number of seconds"),
    ],
)
def test_wrong_words_are_refused(words: list[str], part: str, tmp_path: Path) -> None:
    with refused(part):
        verify.main(words, never, never, tmp_path)


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}
SRUN = {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"} | {
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "a",
}


@pytest.mark.parametrize(
    ("places", "rank"),
    [(TORCHRUN | {"MASTER_PORT": "1"}, ("RANK", "LOCAL_RANK")), (SRUN, ("SLURM_PROCID",))],
    ids=["torchrun", "srun"],
)
def test_several_processes_are_refused_by_one_of_them(
    places: dict[str, str],
    rank: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "TO_SPEAK", 0.0)
    for name, value in (places | dict.fromkeys(rank, "0")).items():
        monkeypatch.setenv(name, value)
    said = complaint(capsys, "verify", SIMPLECNN)
    assert "verify behind accelerate launch, torchrun or srun" in said
    assert said.endswith("type launcher verify RECIPE --ranks 2")
    for name in rank:
        monkeypatch.setenv(name, "1")
    assert main(["verify", SIMPLECNN]) == 2
    assert capsys.readouterr().err == ""


def test_a_recipe_that_cannot_be_loaded_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", SIMPLECNN, "optimizer.lrr=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "did you mean optimizer.lr?" in line


# The images


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("steps", [6, 20])
def test_neither_batches_nor_evaluation_are_even(ranks: int, accumulate: int, steps: int) -> None:
    recipe = tiny_recipe(data={"batch_size": 512}, accumulate=accumulate, epochs=slices.EPOCHS)
    sizes = choose_sizes(recipe, ranks, steps)
    recipe = replace(recipe, data=replace(recipe.data, batch_size=sizes.batch))
    plan = make_plan(
        recipe, world_size=ranks, train_images=sizes.train, evaluated_images=sizes.test
    )
    parts = ranks * accumulate
    last = plan.step_images(plan.steps_per_epoch)
    assert last < sizes.batch
    assert last >= 2 * parts  # BatchNorm
    assert sizes.batch % parts and last % parts and sizes.test % ranks  # noqa: PT018
    assert steps <= plan.steps < steps + slices.EPOCHS


def test_a_small_batch_stays_as_it_is() -> None:
    assert choose_sizes(tiny_recipe(data={"batch_size": 4}), 2, 9) == Sizes(12, 17, 4)
    assert choose_sizes(tiny_recipe(data={"batch_size": 40}), 2, 6, each=3) == Sizes(12, 7, 7)


def test_what_is_taken_has_all_classes_and_survives_its_file(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    taken = slices.take(slices.own_images(recipe, Sizes(50, 20, 10)), Sizes(50, 20, 10))
    assert (len(taken.train), len(taken.test)) == (50, 20)
    assert len(set(taken.train.labels.tolist())) > 7
    assert len({image.sum().item() for image in taken.train.tensor}) > 40  # each once
    slices.save(taken, tmp_path / "images.pt")
    read = sources.load(slices.sliced(recipe.data, tmp_path / "images.pt", 10))
    assert slices.fingerprint(read) == slices.fingerprint(taken)
    turned = replace(taken, train=replace(taken.train, images=taken.train.tensor.flip(0)))
    assert slices.fingerprint(turned) != slices.fingerprint(taken)


@pytest.mark.parametrize(
    "files", [{"tier": "disk"}, {"on_broken": "skip"}, {"local_copy": True}], ids=str
)
def test_what_is_taken_needs_nothing_that_only_files_have(
    files: dict[str, Any], tmp_path: Path
) -> None:
    recipe = tiny_recipe()
    taken = slices.take(slices.own_images(recipe, Sizes(50, 20, 10)), Sizes(50, 20, 10))
    slices.save(taken, tmp_path / "images.pt")
    wanted = slices.sliced(replace(recipe.data, **files), tmp_path / "images.pt", 10)
    read = sources.load(local_copy.on_this_node(wanted))
    assert slices.fingerprint(read) == slices.fingerprint(taken)


def test_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10, FakeData

    def download(*_: object) -> None:
        raise AssertionError("downloaded")

    monkeypatch.setattr(CIFAR10, "download", download)
    recipe = tiny_recipe(data={"source": CIFAR10, "root": str(tmp_path)})
    found = slices.own_images(recipe, Sizes(50, 20, 10))
    assert found.fallback is not None
    assert "is not downloaded here" in found.fallback
    assert len(found.train) == 100
    recipe = tiny_recipe(data={"source": FakeData, "root": str(tmp_path)})
    with refused("FakeData"):
        slices.own_images(recipe, Sizes(50, 20, 10))


# What is seen of a run


def watched(recipe: Recipe, trial: Trial) -> Sighting:
    """A training in this process, of a rank alone."""
    watcher = Watcher(trial, 0)
    ctx = watcher.watch(context_of(recipe, log_every=1))
    losses = [event.loss for event in fit(ctx) if isinstance(event, StepReport)]
    watcher.end(tuple(losses))
    return watcher.seen


OWN = Trial("own", 1)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.untouched, self.seen = 0, 1, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen + 1
        return x


def with_counting() -> nn.Module:
    return nn.Sequential(Counting(), Tiny())


def test_equal_runs_look_equal() -> None:
    one, two = (watched(tiny_recipe(model=partial(Tiny, dropout=0.5)), OWN) for _ in "12")
    assert first_different_bit([one], [two]) is None
    assert len(one.steps) == 20
    first = one.steps[1]
    assert len(first.images) == 10
    assert [name for name, _ in first.layers][-1] == ""
    assert first.loss > 0
    assert one.changed == ()


def test_attributes_that_training_changes_are_named() -> None:
    assert watched(tiny_recipe(model=with_counting), OWN).changed == ("0.calls", "0.seen")


def test_the_first_difference_is_named() -> None:
    one = watched(tiny_recipe(), OWN)

    def parting(change: Any) -> str:
        two = watched(tiny_recipe(), OWN)
        change(two.steps[7])
        found = first_different_bit([one], [two])
        assert found is not None
        return found.describe()

    def set_layer(step: Any) -> None:
        step.layers[2] = ("layers.2", 0)

    assert parting(lambda step: step.images.reverse()) == "step 7 sees other images"
    assert parting(set_layer) == "they differ from step 7 on, in layers.2 (Linear)"
    assert parting(lambda s: setattr(s, "loss", 1.0)) == "they differ from step 7 on, in the loss"
    update = "they differ from step 7 on, in the optimizer's update"
    assert parting(lambda s: setattr(s, "weights", 1)) == update


def test_images_are_compared_as_sets_and_losses_up_to_rounding() -> None:
    one, two = watched(tiny_recipe(), OWN), watched(tiny_recipe(), OWN)
    two.steps[3].images.reverse()
    two.steps[3].loss += 1e-12
    assert first_other_images([one], [two]) is None
    assert deviation_of(one, two, 1e-9).is_rounding
    assert not deviation_of(one, two, 1e-7).is_rounding  # weights alone, in the last step
    two.steps[5].images[0] += 1
    two.steps[6].loss += 1e-6
    assert first_other_images([one], [two]) == 5
    assert deviation_of(one, two, 1e-9).step == 6


def test_what_grows_step_by_step_is_rounding_and_what_is_there_at_once_is_a_fault() -> None:
    one = watched(tiny_recipe(), OWN)

    def apart(*differences: float) -> Deviation:
        two = deepcopy(one)
        for step, difference in enumerate(differences, 1):
            two.steps[step].loss += difference
        return deviation_of(one, two, 1e-5)

    assert apart(*(1e-16 * 4**step for step in range(18))).is_rounding
    assert not apart(*(1e-16 * 4**step for step in range(5))).is_rounding
    assert apart(1e-9).step == 1
    assert apart(1e-16, 1e-15, 1e-8).step == 3
    assert apart(float("nan")).step == 1


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def flat_network(middle: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), middle(), nn.Linear(3 * 32 * 32, 10)).double()


@pytest.mark.parametrize(("middle", "named"), [(Centred, "1 (Centred)"), (nn.Identity, "")])
def test_a_layer_that_mixes_images_is_named(middle: type[nn.Module], named: str) -> None:
    model = partial(flat_network, middle)
    one, other = (
        watched(tiny_recipe(model=model, data={"batch_size": size}), Trial("d", 1, double=True))
        for size in (5, 10)
    )
    assert first_mixing_layer([one], [other]) == named


def test_steady_layers_stay_as_in_an_evaluation() -> None:
    network = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)))
    keep_steady(network, ("0", "1"))
    network.train()
    assert not network.get_submodule("0").training
    assert not network.get_submodule("1").training
    assert network.get_submodule("1.0").training  # a child is a layer of its own
    assert network.get_submodule("1.1").training


# Differences


def test_a_rank_is_killed_only_once_there_is_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[list[str]] = []
    monkeypatch.setattr(os, "kill", lambda *_: there.append([p.name for p in tmp_path.iterdir()]))
    killed = Trial("killed", 1, kill=Kill(6, "forward", 0))
    ctx = Watcher(killed, 0, checkpoints=tmp_path).watch(context_of(tiny_recipe()))
    ctx.state.current_step = 6
    Timer(0.2, (tmp_path / "step-000000005").mkdir).start()
    with ctx.phase("forward"):
        pass
    assert there == [["step-000000005"]]


def test_a_resume_from_the_beginning_proves_nothing(tmp_path: Path) -> None:
    class Killed(MadeTrials):
        def run(self, wanted: Trial) -> list[Sighting]:
            return [Sighting({1: StepTrace(), 2: StepTrace()})]

    trials = Killed(Settings((SIMPLECNN,), never, 2, 6, tmp_path), nullcontext)
    trials.steps = 6
    promises = Promises(tiny_recipe(), trials, Deadline(9), never)
    (verdict,) = promises.questions()["resume"]()
    assert verdict.standing == "wrong"
    assert "no checkpoint was written before it" in verdict.answer


def test_states_are_compared_bit_for_bit() -> None:
    state = {"step": torch.tensor(1.0), "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    assert same_state(state, {**state})
    for other in (
        {**state, "step": torch.tensor(1.0).double()},
        {**state, "step": torch.tensor(1.0 + 2**-20)},
        {**state, "groups": [{"lr": 0.1}]},
        {**state, "groups": []},
        {**state, "more": 1},
    ):
        assert not same_state(state, other)


def test_large_weights_may_differ_by_more(tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    for path, change in zip(paths, (0.0, 1.0), strict=True):
        save_file({"w": torch.tensor([1e6 + change, 1.0]), "n": torch.tensor([3])}, path)
    assert largest_difference(*paths) == pytest.approx(1e-6, rel=1e-3)


class DropsInForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Flatten(), nn.Linear(3 * 32 * 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.dropout(self.first(x), 0.5, self.training))


def test_layers_of_each_rank_are_found() -> None:
    images = torch.zeros(2, 3, 32, 32)
    network: nn.Module = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), DropsInForward())
    found = own_layers(network.train(), images)
    assert (found.batch_norms, found.random) == (("0",), ("1", "2"))
    described = "BatchNorm (1 layer) and the random numbers of Dropout and DropsInForward"
    assert found.describe() == described
    assert found.describe_remedy() == "with BatchNorm synchronized and without random numbers"
    assert own_layers(network.eval(), images).random == ()
    assert not own_layers(nn.Flatten(), images)
    assert not OwnLayers((), (), {})


calls = 0


def counted(images: Tensor, draws: Draws) -> Tensor:
    global calls
    calls += 1
    return images.roll(calls // 4, -1)


def drawn(images: Tensor, draws: Draws) -> Tensor:
    return images.roll(int(torch.rand(()) * 9), -1)


def test_functions_that_follow_from_more_than_their_draws_are_named() -> None:
    augment = (flip, counted, drawn)
    recipe = tiny_recipe(data={"augment": augment, "mix": cutmix})
    data = sources.load(recipe.data)
    state, count = unsteady_functions(recipe, data.train)[::-1]
    assert state.startswith("drawn (")
    assert state.endswith("draws from a global generator")
    assert count.startswith("counted (")
    assert count.endswith("keeps a state between calls")


# The export, which the command line hands in


def exported(tmp_path: Path, export: Any) -> Verdict:
    """The answer where a run of the recipe has been made."""
    settings = Settings((SIMPLECNN,), never, 2, 6, tmp_path)
    promises = Promises(tiny_recipe(), MadeTrials(settings, nullcontext), Deadline(9), export)
    (_, (answer,)) = (tuple(promises.questions()[name]()) for name in ("recipe", "export"))
    return answer


class MadeTrials(Trials):
    """Trials that are over."""

    place, precision = "here", None

    def prepare(self, recipe: Recipe, seconds: float) -> Any:
        return sources.load(recipe.data)

    def run(self, wanted: Trial) -> list[Sighting]:
        return [Sighting()]

    def weights(self, made: Trial) -> dict[str, Path]:
        torch.manual_seed(5)
        path = self.settings.folder / "final.safetensors"
        save_file(Tiny().state_dict(), path)
        return {"final": path}


def test_a_loss_of_zero_is_a_number(tmp_path: Path) -> None:
    """As a loss with a margin has it, where all images are classified with enough of one."""
    counted = Evaluation(0.0, ((3, 0), (1, 2)), in_top5=6)

    class Zero(MadeTrials):
        def run(self, wanted: Trial) -> list[Sighting]:
            return [Sighting(evaluated=counted)]

        def evaluations(self, made: Trial) -> list[dict[str, Any]]:
            return [{**counted.metrics("test"), "test/images": 6}]

    trials = Zero(Settings((SIMPLECNN,), never, 2, 6, tmp_path), nullcontext)
    promises = Promises(tiny_recipe(), trials, Deadline(9), never)
    (verdict,) = promises.questions()["evaluation"]()
    assert verdict.standing == "good"
    assert "6 images, 5 correct, loss 0.000000" in verdict.answer


def test_the_exported_network_is_compared_with_the_trained_one(tmp_path: Path) -> None:
    answer = exported(tmp_path, export.proved)
    assert answer.standing == "good"
    assert "as torch.export: on 20 images, outputs within " in answer.answer


def test_a_network_that_cannot_be_exported_is_a_notice_and_another_one_is_wrong(
    tmp_path: Path,
) -> None:
    def refusing(*_: object) -> str:
        raise NotExportableError("Tiny, which cannot", expected="another", instead="write it")

    def differing(*_: object) -> str:
        raise UserError("the export is not the network", expected="it", instead="wait")

    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    notice = exported(tmp_path / "one", refusing)
    assert notice == Verdict("export", "Tiny, which cannot", "notice", "write it")
    assert exported(tmp_path / "two", differing).standing == "wrong"


# What fits into the time


def test_a_cpu_takes_bf16_for_fp16_and_one_way_to_compile() -> None:
    recipe = tiny_recipe(precision="pure_fp16")
    data = sources.load(recipe.data)
    settings = Settings((SIMPLECNN,), never, 2, None, Path())
    effort = effort_in_time(recipe, data, settings, 100.0, on_cpu=True)
    assert effort == Effort(slices.MOST_EACH, MOST_STEPS, "pure_bf16")
    slow = effort_in_time(recipe, data, settings, 1e-9, on_cpu=True)
    assert (slow.each, slow.steps) == (slices.LEAST_EACH, LEAST_STEPS)
    assert [compile_mode(mode, on_cpu=True) for mode in (True, "max-autotune")] == ["force"] * 2
    assert compile_mode("max-autotune", on_cpu=False) == "max-autotune"
    assert compile_mode(False, on_cpu=True) is False


@pytest.mark.skipif(sys.platform == "darwin", reason="torch calls clang++ there")
def test_a_compiler_that_torch_does_not_call_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clang++").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    trials = MadeTrials(Settings((SIMPLECNN,), never, 2, 6, tmp_path), nullcontext)
    promises = Promises(tiny_recipe(compile=True), trials, Deadline(9), never)
    (verdict,) = promises.questions()["compile"]()
    assert verdict.standing == "not asked"
    assert verdict.instead == "install g++, type export CXX=COMPILER, or type compile=false"


# Questions whose runs fail


class FailingTrials(Trials):
    """Trials of which each fails, as if its ranks had."""

    def prepare(self, recipe: Recipe, seconds: float) -> Any:
        raise TrialError("the ranks ended with\nSIGSEGV")


def questions(tmp_path: Path) -> Iterator[Verdict]:
    settings = Settings((SIMPLECNN,), never, 2, 6, tmp_path)
    promises = Promises(tiny_recipe(), FailingTrials(settings, nullcontext), Deadline(9), never)
    return iter(promises.questions()["recipe"]())


class EndlessTrials(Trials):
    """Trials of which none ends."""

    def prepare(self, recipe: Recipe, seconds: float) -> Any:
        with self.doing("opening the images"):
            raise TimeUpError


def test_a_question_in_which_the_time_ends_is_wrong_and_says_where(tmp_path: Path) -> None:
    settings = Settings((SIMPLECNN,), never, 2, 6, tmp_path)
    trials = EndlessTrials(settings, nullcontext)
    promises = Promises(tiny_recipe(), trials, Deadline(9), never)
    (verdict,) = promises.questions()["recipe"]()
    assert verdict.standing == "wrong"
    assert verdict.answer == "did not end within the 9 s: opening the images"


def test_a_run_that_fails_is_an_answer(tmp_path: Path) -> None:
    (verdict,) = questions(tmp_path)
    assert verdict == Verdict("recipe", "a run fails: the ranks ended with SIGSEGV", "wrong")


def test_a_set_that_is_small_gives_what_it_has() -> None:
    recipe = tiny_recipe(data={"source": partial(Synthetic, count=7)})
    taken = slices.take(slices.own_images(recipe, Sizes(50, 20, 10)), Sizes(50, 20, 10))
    assert (len(taken.train), len(taken.test)) == (7, 1)


class InPairs(nn.Module):
    """Takes batches of at least four images in training."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) < 4:
            raise ValueError("too few images")
        return self.fc(images.mean((2, 3)))


def test_a_network_that_takes_no_small_pass_is_answered_in_one_line() -> None:
    """It was a traceback."""
    recipe = tiny_recipe(model=InPairs)
    settings = Settings((SIMPLECNN,), never, 2, None, Path())
    with refused("InPairs fails in training mode on two images: too few images"):
        effort_in_time(recipe, sources.load(recipe.data), settings, 100.0, on_cpu=True)
