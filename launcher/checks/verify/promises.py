"""The launcher's promises for every recipe, as questions that runs answer."""

import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from launcher.checks.verdicts import Deadline, TimeUpError, Verdict
from launcher.checks.verify.differences import (
    EXACT,
    Deviation,
    OwnLayers,
    deviation_of,
    first_different_bit,
    first_mixing_layer,
    first_other_images,
    largest_difference,
    layer_name,
    own_layers,
    same_state,
    unsteady_functions,
)
from launcher.checks.verify.trial import Kill, Phase, Trial, save_interval
from launcher.checks.verify.trials import TrialError, Trials
from launcher.config.recipe import Recipe
from launcher.config.serialize import code_name, short_name
from launcher.data.images import Data, ImageSet
from launcher.errors import NotExportableError, UserError
from launcher.training.model import build_network
from launcher.training.network import takes_hooks
from launcher.training.trial_passes import two_images
from launcher.utils.text import count

PART_OF_LIMIT, PART_TO_COMPILE = 0.3, 0.2  # fraction of the time for the steps alone
ROUNDED = 1e-5  # where float64 cannot be used
_PHASES: tuple[Phase, ...] = ("forward", "backward", "update")
MOST_NAMED = 3  # attributes
_COMPILER = "clang++" if sys.platform == "darwin" else "g++"
_OF_DRAWS = "compute it from images, draws.fresh and draws.fixed alone"
_IN_BUFFERS = "keep in buffers (register_buffer) what lasts from step to step"
_NO_DRAWS = "write F.dropout(x, p, self.training), so that an evaluation draws none"
_SYNC = "type sync_batch_norm=true, which torch has for GPUs"
_NO_END = "type --limit SECONDS for more time; if that does not help, the run hangs there"

# Exports a recipe's network with the weights of a file to a folder; says how near it is to itself
# on some images, or raises `NotExportableError`, or `UserError` where it is not near.
Export = Callable[[Recipe, Path, ImageSet, Path], str]


class Promises:
    """The questions about one recipe."""

    def __init__(self, recipe: Recipe, trials: Trials, deadline: Deadline, export: Export) -> None:
        self._recipe, self._trials, self._deadline = recipe, trials, deadline
        self._export = export
        self._size = trials.settings.ranks
        self._data: Data | None = None
        self._layers = OwnLayers((), (), {})
        self._drawing_in_evaluation: tuple[str, ...] = ()
        self._ranks_differ = False
        self._unsteady: list[str] | None = None
        self._own = Trial("own", self._size)
        self._one = Trial("one", 1, double=True)
        self._many = Trial("many", self._size, double=True)

    def questions(self) -> Mapping[str, Callable[[], Iterator[Verdict]]]:
        """In the order in which they are asked; the first decides whether the others are."""
        asked = {
            "recipe": self.recipe,
            "ranks": self.ranks,
            "resume": self.resume,
            "other ranks": self.other_ranks,
            "repeat": self.repeat,
            "evaluation": self.evaluation,
            "export": self.export,
            "compile": self.compile,
        }
        return {name: self._failing_well(name, question) for name, question in asked.items()}

    def recipe(self) -> Iterator[Verdict]:
        """Does it train at all, on all ranks?"""
        part = PART_TO_COMPILE if self._recipe.compile else PART_OF_LIMIT
        seconds = part * self._deadline.left
        data = self._data = self._trials.prepare(self._recipe, seconds)
        network = build_network(self._recipe, data.train)
        if not takes_hooks(network):
            raise UserError(
                f"{code_name(self._recipe.model)}, which torch.jit has compiled",
                expected="a network of plain modules, whose layers and images can be watched",
                instead="leave out torch.jit.script(...) or torch.jit.trace(...)",
            )
        images = two_images(network, self._recipe, data.train, "contiguous")
        self._layers = own_layers(network.train(), images)
        self._drawing_in_evaluation = own_layers(network.eval(), images).random
        self._trials.run(self._own)
        trained = (
            f"{count(self._trials.steps, 'step')} in {count(3, 'epoch')} on "
            f"{count(len(data.train), 'image')} of {data.name}, {self._trials.place}"
        )
        own, taken = self._recipe.precision, self._trials.precision
        if own is not None and taken != own:
            why = "needs a GPU" if own.endswith("fp16") else "is slow here"
            trained += f", in {taken}, since {own} {why}"
        if data.fallback:
            yield Verdict("recipe", f"{trained}: {data.fallback}", "notice")
        else:
            yield Verdict("recipe", trained)

    def ranks(self) -> Iterator[Verdict]:
        """N ranks equal one: in float64, where rounding cannot explain a difference."""
        name, many = "ranks", f"{self._size} ranks"
        if refusal := self._refuses_double():
            what = f"tested in float64, in which training fails ({refusal})"
            yield Verdict(name, f"{what}; {self._in_own_precision()}", "not asked")
            return
        one, other = self._trials.run(self._one), self._trials.run(self._many)
        if step := first_other_images(one, other):
            what = f"{many} see other images than 1 in step {step}"
            yield self._of_functions(name, what) or Verdict(name, what, "wrong", _OF_DRAWS)
            return
        deviation = self._deviation(self._one, self._many)
        if deviation.is_rounding:
            agreement = f"{self._agreement(deviation)} ({self._in_own_precision()})"
            yield Verdict(name, f"{many} train as 1 does: {agreement}")
            return
        apart = f"{deviation.weights:.1e} in the weights"
        if self._layers:
            steady = self._steady(self._one), self._steady(self._many)
            one, other = map(self._trials.run, steady)
            without = self._deviation(*steady)
            if without.is_rounding:
                yield self._of_own_layers(name, apart, without)
                return
            apart = f"{without.weights:.1e} in the weights even {self._layers.describe_remedy()}"
            deviation = without
        self._ranks_differ = True
        layer = first_mixing_layer(one, other)
        cause = f", first in step {deviation.step}" if deviation.step else ""
        instead = "check the loss and the layers: each image must be computed by itself"
        if drawing := self._drawing_in_evaluation:
            cause += f"; random numbers are drawn in {self._names(drawing)}"
            instead = _NO_DRAWS
        elif layer:
            cause += f": the output of {layer} for an image depends on the others of the batch"
            instead = "compute each image by itself in that layer"
        yield Verdict(name, f"{many} train otherwise than 1: {apart}{cause}", "wrong", instead)

    def resume(self) -> Iterator[Verdict]:
        """A run that is killed and resumed ends with the bits of one that was not."""
        steps = self._trials.steps
        step = random.randint(min(save_interval(steps) + 1, steps), steps)
        kill = Kill(step, random.choice(_PHASES), random.randrange(self._size))
        killed = Trial("killed", self._size, kill=kill)
        self._trials.run(killed)
        resumed = replace(killed, kill=None, resumes=True)
        seen, own = self._trials.run(resumed), self._trials.run(self._own)
        begin = min(seen[0].steps) - 1
        killed_in = f"rank {kill.rank} killed in step {step} ({kill.phase})"
        if not begin:
            raise TrialError(f"no checkpoint was written before it: {killed_in}")
        where = f"{killed_in}, resumed after step {begin}"
        parting = first_different_bit(own, seen)
        if parting is None and self._same_end(self._own, resumed):
            yield Verdict("resume", f"{where}: weights, optimizer and losses bit for bit the same")
            return
        what = f"{where}: {parting.describe() if parting else 'the end differs'}"
        yield self._of_state("resume", what) or Verdict("resume", what, "wrong", _IN_BUFFERS)

    def other_ranks(self) -> Iterator[Verdict]:
        """A run that is resumed on another number of ranks gives the same weights."""
        name = "other ranks"
        if self._refuses_double():
            yield Verdict(name, "tested in float64, as above", "not asked")
            return
        found = [
            self._rescaled(self._many, 1, "fewer"),
            self._rescaled(self._one, self._size, "more"),
        ]
        deviations = [deviation for _, deviation in found]
        largest = max(deviations, key=lambda deviation: deviation.weights)
        where = " and ".join(where for where, _ in found)
        if self._steady(self._many) != self._many:
            where += f", {self._layers.describe_remedy()}"
        if all(deviation.is_rounding for deviation in deviations):
            yield Verdict(name, f"begun on {where}: {self._agreement(largest)}")
            return
        where, apart = next(one for one in found if not one[1].is_rounding)
        what = f"begun on {where}: {apart.weights:.1e} in the weights, first in step {apart.step}"
        instead = "correct what the line `ranks` names" if self._ranks_differ else _IN_BUFFERS
        yield self._of_state(name, what) or Verdict(name, what, "wrong", instead)

    def _rescaled(self, begun: Trial, ranks: int, name: str) -> tuple[str, Deviation]:
        """The deviation between a run and one that was resumed from its middle on other ranks."""
        begun = self._steady(begun)
        self._trials.run(begun)
        resumed = replace(begun, name=name, ranks=ranks, resumes=True)
        resumed = replace(resumed, synchronized=ranks > 1 and bool(self._layers.batch_norms))
        step = self._trials.copy(begun, resumed)
        self._trials.run(resumed)
        where = f"{begun.ranks}, resumed on {ranks} after step {step}"
        return where, self._deviation(begun, resumed)

    def repeat(self) -> Iterator[Verdict]:
        """Two equal runs in new processes have the same bits."""
        name = "repeat"
        again = Trial("again", self._size, is_new=True)
        own, other = self._trials.run(self._own), self._trials.run(again)
        opened = other[0].own_images
        if opened != self._trials.fingerprint:
            source = short_name(self._recipe.data.source)
            yield Verdict(
                name,
                f"{source} gives other images, or another order, each time it is opened: other "
                "machines, and a resumed run, would train on other images",
                "wrong",
                "sort what it lists, as in sorted(folder.iterdir()), and draw from a generator "
                "with a seed of its own",
            )
            return
        if own[0].begins_with != other[0].begins_with:
            instead = "draw from torch's generator, which the seed of the recipe sets"
            yield Verdict(name, "the network begins with other weights", "wrong", instead)
            return
        parting = first_different_bit(own, other)
        if parting is None and self._same_end(self._own, again):
            runs = f"two runs of {self._trials.steps} steps on {self._size} ranks"
            yield Verdict(name, f"{runs}: bit for bit the same")
            return
        what = f"two equal runs: {parting.describe() if parting else 'they end differently'}"
        instead = "look there for a clock, a generator without a seed, or the order of a set"
        yield self._of_state(name, what) or Verdict(name, what, "wrong", instead)

    def evaluation(self) -> Iterator[Verdict]:
        """N ranks evaluate to the same counts as one."""
        name, double = "evaluation", not self._refuses_double()
        one = self._one if double else replace(self._one, name="alone", double=False)
        self._trials.run(one)
        weights = str(self._trials.final_weights(one))
        seen = self._trials.run(
            Trial("evaluated", self._size, double=double, init_from=weights, max_steps=1)
        )
        alone, many = self._trials.evaluations(one)[-1], seen[0].evaluated
        assert many is not None
        images, loss = alone["test/images"], alone["test/loss"]
        loss = float("nan") if loss is None else loss
        correct = round(alone["test/accuracy"] * images)
        apart = abs(many.loss - loss)
        counted = f"{images} images, {correct} correct, loss {loss:.6f}"
        others = round(many.accuracy * many.images)
        if (many.images, others) == (images, correct) and apart <= (EXACT if double else ROUNDED):
            yield Verdict(name, f"{self._size} ranks count as 1: {counted}, apart {apart:.1e}")
            return
        what = f"1 rank counts {counted}; {self._size} ranks {many.images} images, {others} correct"
        instead = "look for layers whose output depends on the other images of an evaluation"
        if drawing := self._drawing_in_evaluation:
            what += f"; random numbers are drawn in {self._names(drawing)}"
            instead = _NO_DRAWS
        what = f"{what}, loss {many.loss:.6f}"
        yield self._of_state(name, what) or Verdict(name, what, "wrong", instead)

    def compile(self) -> Iterator[Verdict]:
        """The compiled network trains like the eager one."""
        name, mode = "compile", self._recipe.compile
        if not mode:
            yield Verdict(name, "the recipe does not compile", "not asked")
        elif self._refuses_double():
            yield Verdict(name, "tested in float64, as above", "not asked")
        elif not shutil.which(_compiler()):
            missing = f"torch.compile needs a C++ compiler, and there is no {_compiler()}"
            instead = f"install {_COMPILER}, type export CXX=COMPILER, or type compile=false"
            yield Verdict(name, missing, "not asked", instead)
        else:
            taken = self._trials.compile_mode(mode)
            setting = "compile=true" if taken is True else f"compile={taken}"
            if mode not in (True, taken):
                setting += f" (for {mode}, of GPUs)"
            yield self._compiled(name, setting)

    def _compiled(self, name: str, setting: str) -> Verdict:
        eager = self._steady(self._one)  # compiled random layers draw other numbers
        compiled = replace(eager, name="compiled", compiled=True)
        self._trials.run(eager)
        self._trials.run(compiled)
        deviation = self._deviation(eager, compiled)
        if deviation.is_rounding:
            return Verdict(name, f"{setting} trains as eager does: {self._agreement(deviation)}")
        apart = f"{deviation.weights:.1e} in the weights, first in step {deviation.step}"
        return Verdict(name, f"{setting}: {apart}", "wrong", "type compile=false")

    def export(self) -> Iterator[Verdict]:
        """The exported network gives the outputs of the trained one."""
        assert self._data is not None
        self._trials.run(self._own)
        weights, test = self._trials.final_weights(self._own), self._data.test
        folder = self._trials.settings.folder / "exported"
        folder.mkdir()
        try:
            with self._trials.doing("exporting"):
                proof = self._export(self._recipe, weights, test, folder)
        except NotExportableError as error:
            yield Verdict("export", error.given, "notice", error.instead)
        except UserError as error:
            instead = _NO_DRAWS if self._drawing_in_evaluation else error.instead
            yield Verdict("export", error.given, "wrong", instead)
        else:
            yield Verdict("export", f"as torch.export: {proof}")

    # Used by several questions

    def _failing_well(
        self, name: str, question: Callable[[], Iterator[Verdict]]
    ) -> Callable[[], Iterator[Verdict]]:
        """Answer a question whose runs fail, or do not end in time, with the reason."""

        def ask() -> Iterator[Verdict]:
            try:
                yield from question()
            except UserError as error:
                refused = f"{error.given}; expected {error.expected}"
                yield Verdict(name, refused, "wrong", error.instead)
            except TrialError as error:
                yield Verdict(name, f"a run fails: {' '.join(str(error).split())}", "wrong")
            except TimeUpError:
                where = self._trials.unfinished or "comparing"
                what = f"did not end within the {self._deadline.seconds:g} s: {where}"
                yield Verdict(name, what, "wrong", _NO_END)

        return ask

    def _refuses_double(self) -> str:
        """Why there is no run in float64; empty where there is one."""
        try:
            self._trials.run(self._one)
        except (UserError, TrialError) as error:
            return str(error)
        return ""

    def _deviation(self, one: Trial, two: Trial) -> Deviation:
        mine, others = self._trials.weights(one), self._trials.weights(two)
        of_each = [
            largest_difference(path, others[name])
            for name, path in mine.items()
            if name in others and name != "buffers.safetensors"
        ]
        seen = self._trials.run(one)[0], self._trials.run(two)[0]
        return deviation_of(*seen, max(of_each))

    def _agreement(self, deviation: Deviation) -> str:
        apart = f"weights to {deviation.weights:.1e} in float64 after {self._trials.steps} steps"
        return apart if deviation.weights <= EXACT else f"{apart}, grown from rounding"

    def _in_own_precision(self) -> str:
        """The difference between N ranks and one in the recipe's own precision, in words."""
        alone = Trial("alone", 1)
        self._trials.run(alone)
        apart = self._deviation(self._own, alone).weights
        return f"{self._trials.precision or 'fp32'}: {apart:.1e}"

    def _steady(self, made: Trial) -> Trial:
        """The same run without the layers that differ between ranks, if there are some."""
        layers = self._layers
        synchronized = bool(layers.batch_norms) and made.ranks > 1
        if not synchronized and not layers.random:
            return made
        name = f"{made.name}-steady"
        return replace(made, name=name, synchronized=synchronized, steady=layers.random)

    def _same_end(self, one: Trial, two: Trial) -> bool:
        same = same_state(self._trials.state(one), self._trials.state(two))
        return same and self._trials.evaluations(one) == self._trials.evaluations(two)

    def _names(self, layers: tuple[str, ...]) -> str:
        return ", ".join(layer_name(layer, self._layers.kinds) for layer in layers)

    def _of_own_layers(self, question: str, apart: str, without: Deviation) -> Verdict:
        layers = self._layers
        reasons, instead = [], ""
        if layers.batch_norms:
            reasons.append("each rank normalizes by its own images, as always with DDP")
            instead = _SYNC
        if layers.random:
            reasons.append("each rank draws its own random numbers, as it should")
        text = (
            f"{self._size} ranks differ from 1 by {layers.describe()} alone ({apart}): "
            f"{', and '.join(reasons)}; {layers.describe_remedy()}, {self._agreement(without)}"
        )
        return Verdict(question, text, "notice", instead)

    def _of_state(self, question: str, what: str) -> Verdict | None:
        """A function or a layer that keeps state which no checkpoint holds."""
        if verdict := self._of_functions(question, what):
            return verdict
        changed = self._trials.run(self._own)[0].changed
        if not changed:
            return None
        shown = ", ".join(changed[:MOST_NAMED])
        what = f"{what}; training changes {shown}, which no checkpoint holds"
        instead = f"write self.register_buffer({changed[0].rpartition('.')[2]!r}, ...) there"
        return Verdict(question, what, "wrong", instead)

    def _of_functions(self, question: str, what: str) -> Verdict | None:
        """An augmentation or mixing that is not deterministic."""
        assert self._data is not None
        if self._unsteady is None:
            self._unsteady = unsteady_functions(self._recipe, self._data.train)
        if not self._unsteady:
            return None
        return Verdict(question, f"{what}: {'; '.join(self._unsteady)}", "wrong", _OF_DRAWS)


def _compiler() -> str:
    """The C++ compiler that inductor calls on a CPU."""
    return os.environ.get("CXX", _COMPILER)
