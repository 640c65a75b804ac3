"""From a path to a recipe: what loads, and how a file that does not load is explained."""

import os
import random
import sys
from pathlib import Path

import numpy
import pytest
import torch

from launcher import Recipe
from launcher.config import loader, overrides
from launcher.config.imports import changed, neighbours_of
from launcher.config.serialize import code_name, short_name
from launcher.errors import UserError
from launcher.training.network import count_parameters
from tests.support.helpers import RECIPES, ROOT, refused

GOOD = '''\
"""A note about this experiment.

With a second paragraph.
"""

from functools import partial

from torch import nn
from torch.optim import SGD

from launcher import Images, Recipe, Synthetic


class Net(nn.Linear):
    def __init__(self, width: int = 4) -> None:
        super().__init__(width, 10)


recipe = Recipe(
    model=Net,
    data=Images(Synthetic, batch_size=8, mean=(0.5,), std=(0.5,)),
    optimizer=partial(SGD, lr=0.1),
    epochs=1,
)
'''


def written(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def test_a_recipe_comes_with_its_name_its_source_and_its_note(tmp_path: Path) -> None:
    loaded = loader.load(written(tmp_path, GOOD))
    assert isinstance(loaded.recipe, Recipe)
    assert loaded.name == "mine"
    assert loaded.source == GOOD
    assert loaded.note.startswith("A note about this experiment.\n\nWith a second")


def test_a_file_without_a_docstring_has_an_empty_note(tmp_path: Path) -> None:
    text = "from functools" + GOOD.partition("from functools")[2]
    assert loader.load(written(tmp_path, text)).note == ""


def test_a_file_with_umlauts_is_read_as_utf8(tmp_path: Path) -> None:
    loaded = loader.load(written(tmp_path, GOOD.replace("experiment", "Größe")))
    assert "Größe" in loaded.note
    assert "Größe" in loaded.source


def test_a_byte_order_mark_as_windows_writes_it_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert loader.load(path).recipe.epochs == 1


def test_a_path_with_spaces_and_a_relative_path_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, GOOD, "my recipe.py")
    monkeypatch.chdir(tmp_path)
    assert loader.load(Path("my recipe.py")).name == "my recipe"


def test_what_a_recipe_draws_as_it_is_run_is_the_same_each_time(tmp_path: Path) -> None:
    """The weights of a teacher, say: ranks had others than 1 rank, and so had a resumed run."""
    text = (
        f"{GOOD}\nimport random, numpy, torch\n"
        "drawn = [random.random(), numpy.random.random(), torch.rand(1).item()]\n"
        "object.__setattr__(recipe, 'min_delta', sum(drawn) / 3)\n"
    )
    random.seed(1)
    numpy.random.seed(1)
    before = random.getstate(), numpy.random.get_state(legacy=False)["state"]["pos"]
    seen = set()
    for seed in range(3):
        torch.manual_seed(seed)
        seen.add(loader.load(written(tmp_path, text)).recipe.min_delta)
    assert len(seen) == 1
    assert before == (random.getstate(), numpy.random.get_state(legacy=False)["state"]["pos"])


def test_the_recipes_own_classes_can_be_named_and_found_again(tmp_path: Path) -> None:
    loaded = loader.load(written(tmp_path, GOOD))
    assert code_name(loaded.recipe.model) == "recipes.mine:Net"
    assert overrides.override(loaded.recipe, ["model.width=7"]).model().in_features == 7


def test_a_recipe_may_lie_at_the_top_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, GOOD)
    monkeypatch.setattr(Path, "resolve", lambda self: Path("/mine.py"))
    assert loader.load(path).name == "mine"


# Files that do not load


def test_a_missing_file_is_answered_with_the_recipes_beside_it() -> None:
    with refused("simplecn.py", "no such file", f"did you mean {RECIPES / 'simplecnn.py'}?"):
        loader.load(RECIPES / "simplecn.py")
    with refused("something", "no such file", "simplecnn.py", "pictures64.py"):
        loader.load(RECIPES / "something")
    with refused("recipes: a directory", "recipes/simplecnn.py", "recipes/pictures64.py"):
        loader.load(RECIPES)


def test_a_missing_file_elsewhere_is_answered_with_those_in_recipes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(RECIPES.parent)
    with refused("simplecnn.py: no such file", "recipes/simplecnn.py"):
        loader.load(Path("simplecnn.py"))


def test_a_missing_file_far_from_any_recipe_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused("nothing.py: no such file", "check the path"):
        loader.load(Path("nothing.py"))


@pytest.mark.parametrize("name", ["folder", "folder.py"])
def test_a_directory_is_no_recipe(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with refused(name, "directory", "a recipe file"):
        loader.load(tmp_path / name)


def test_what_no_file_can_be_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    for path, found in (
        (tmp_path / "pipe.py", "a pipe or a device"),
        (Path("/dev/zero"), "a pipe or a device"),
        (Path("a\0b.py"), "embedded null byte"),
        (Path("x" * 256), "File name too long"),
    ):
        with refused(found, "a recipe file"):
            loader.load(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with refused("mine.txt", "Python file", ".py"):
        loader.load(written(tmp_path, GOOD, "mine.txt"))


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_bytes(GOOD.replace("experiment", "Größe").encode("latin-1"))
    with refused("mine.py", "utf-8"):
        loader.load(path)


def test_a_syntax_error_is_shown_with_its_line(tmp_path: Path) -> None:
    text = GOOD.replace("epochs=1,", "epochs=1 2,")
    with refused("mine.py", f"line {line_of(text, 'epochs=1 2')}", "valid Python", "that line"):
        loader.load(written(tmp_path, text))


def test_a_null_byte_is_a_syntax_error_too(tmp_path: Path) -> None:
    with refused("mine.py", "null bytes"):
        loader.load(written(tmp_path, GOOD + "\0"))


@pytest.mark.parametrize(
    ("call", "given"),
    [("SGD(lr=0.1)", "params"), ("CIFAR10()", "root"), ("cosine(warmup=0.1)", "fraction")],
)
def test_what_is_called_in_place_of_being_filled_in_is_told_so(
    tmp_path: Path, call: str, given: str
) -> None:
    imports = "from launcher import cosine\nfrom torchvision.datasets import CIFAR10\n"
    name = call.partition("(")[0]
    with refused(f"'{given}'", f"write partial({name}, ...) with the settings alone", given):
        loader.load(written(tmp_path, GOOD + imports + call + "\n"))


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("from launcher import Recip", "ImportError"),
        ("undefined_name", "NameError"),
        ("Recipe(epoch=3)", "TypeError"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("raise SystemExit", "SystemExit"),  # else the run would end with 0 and without a word
    ],
)
def test_an_exception_while_running_is_shown_with_its_line(
    tmp_path: Path, line: str, error: str
) -> None:
    text = GOOD + line + "\n"
    with refused("mine.py", f"line {len(text.splitlines())}:", error, "that line"):
        loader.load(written(tmp_path, text))


def test_the_line_is_the_recipes_even_if_a_library_raised(tmp_path: Path) -> None:
    text = GOOD + "\nimport json\n\ndef read():\n    json.loads('{')\n\nread()\n"
    with refused(f"line {line_of(text, 'json.loads')}:", "JSONDecodeError"):
        loader.load(written(tmp_path, text))


def test_a_value_that_the_recipe_refuses_is_shown_with_the_file(tmp_path: Path) -> None:
    with refused("mine.py: epochs=0", "at least 1", "type epochs=1"):
        loader.load(written(tmp_path, GOOD.replace("epochs=1", "epochs=0")))


@pytest.mark.parametrize(
    ("field", "parts"),
    [
        ("memory_format='channel_last'", ("channels_last", "correct it")),
        ("on_nan='skipp'", ("rollback", "correct it")),
        ("precision='float16'", ("fp16", "correct it")),
        ("compile='max_autotune'", ("max-autotune", "correct it")),
        ("accumulate=2.0", ("int", "correct it")),
        ("clip_norm=True", ("float", "write clip_norm=1.0, for example")),
        ("clip_norm='1.0'", ("clip_norm='1.0'; expected a value of type float | None", "=1.0")),
        ("schedule=0.5", ("a class or a function", "write schedule=cosine")),
        ("schedule='cosine'", ("schedule='cosine'; expected a class", "write schedule=cosine")),
        ("optimizer='adam'", ("optimizer='adam'", "write optimizer=partial(AdamW, lr=0.001)")),
        ("optimizer=SGD(Net().parameters(), lr=0.1)", (", a SGD that is built", "=partial(")),
        ("model=None", ("model=None", "a class or a function", "write model=SimpleCNN")),
        ("data=Synthetic", ("Images", "correct it")),
        ("data.batch_size=8.0", ("int", "correct it")),
        ("data.mean=0.5", ("data.mean=0.5; expected", "write mean=(0.5, 0.5, 0.5)")),
        ("data.source=Synthetic()", ("data.source, a Synthetic that", "write source=CIFAR10")),
        ("data.augment=('flip',)", ("code", "write augment=(flip,), for example")),
    ],
)
def test_a_value_of_another_type_is_refused(
    tmp_path: Path, field: str, parts: tuple[str, ...]
) -> None:
    name, _, value = field.removeprefix("data.").partition("=")
    changed = f"replace(recipe, {name}={value})"
    if field.startswith("data."):
        changed = f"replace(recipe, data=replace(recipe.data, {name}={value}))"
    text = f"{GOOD}\nfrom dataclasses import replace\nrecipe = {changed}\n"
    with refused(f"mine.py: {field.partition('=')[0]}", *parts):
        loader.load(written(tmp_path, text))


@pytest.mark.parametrize(
    ("slot", "instead"),
    [
        ("mix=CutMix", "write mix=cutmix, mix=mixup or mix=partial(mixup, alpha=0.2), of launcher"),
        ("mix=partial(MixUp, alpha=0.2)", "write mix=cutmix"),
        ("mix=CutMix(num_classes=10)", "write mix=cutmix"),
        ("augment=(Compose([RandomHorizontalFlip()]),)", "write its parts as augment=(Random"),
        ("augment=(partial(Compose, [RandomHorizontalFlip()]),)", "write its parts as augment=("),
        ("augment=(v1.ToTensor(),)", "leave it out"),
        ("augment=(v1.ToTensor,)", "leave it out"),
        ("augment=(partial(Normalize, mean=[0.5], std=[0.5]),)", "write mean= and std= in Images"),
    ],
)
def test_transforms_that_have_no_place_are_answered_with_what_has(
    tmp_path: Path, slot: str, instead: str
) -> None:
    text = GOOD.replace("mean=(0.5,)", f"mean=(0.5,), {slot}")
    imports = "from torchvision import transforms as v1\nfrom torchvision.transforms.v2 import *\n"
    with refused("mine.py: ", " of torchvision in the recipe", instead):
        loader.load(written(tmp_path, imports + text))


@pytest.mark.parametrize(
    "line",
    [
        "from accelerate import Accelerator; Accelerator(mixed_precision='bf16')",
        "import torch; torch.distributed.init_process_group('gloo', init_method='file://{}/met', "
        "rank=0, world_size=1)",
    ],
)
def test_an_accelerator_or_a_process_group_of_its_own_is_refused(tmp_path: Path, line: str) -> None:
    text = f"{GOOD}\n{line.format(tmp_path)}\n"
    for _ in range(2):  # nothing of the first time is left
        with refused("mine.py starts an Accelerator or a process group", "precision= in Recipe"):
            loader.load(written(tmp_path, text))
        (tmp_path / "met").unlink(missing_ok=True)
    assert loader.load(written(tmp_path, GOOD)).recipe.epochs == 1


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("torch.set_grad_enabled(False)", "write `with torch.no_grad():`"),
        ("torch.set_default_device('meta')", "leave it out: Accelerate or torchrun says where"),
        ("torch.set_default_dtype(torch.bfloat16)", "write precision='pure_bf16' in Recipe"),
    ],
)
def test_what_a_file_sets_for_the_whole_process_is_refused(
    line: str, advice: str, tmp_path: Path
) -> None:
    """Without gradients it was told that its parameters are unused; the others had tracebacks."""
    with refused(f"mine.py calls {line}", advice):
        loader.load(written(tmp_path, f"import torch\n\n{line}\n{GOOD}"))
    assert torch.is_grad_enabled()
    assert torch.zeros(()).device.type == "cpu"
    assert torch.zeros(()).dtype == torch.float32
    loader.load(written(tmp_path, f"import torch\n\ntorch.set_default_device('cpu')\n{GOOD}"))


def test_numbers_of_numpy_and_a_path_are_taken(tmp_path: Path) -> None:
    text = GOOD.replace("epochs=1", "epochs=numpy.int64(2), clip_norm=numpy.float32(1)")
    text = text.replace("mean=(0.5,)", "mean=[numpy.float32(0.5)], root=Path('data')")
    text = text.replace(
        "from torch import nn", "import numpy\nfrom pathlib import Path\nfrom torch import nn"
    )
    assert loader.load(written(tmp_path, text)).recipe.epochs == 2


def test_a_file_without_a_recipe_is_refused(tmp_path: Path) -> None:
    with refused("mine.py", "no name `recipe`", "recipe = Recipe(...)", "simplecnn.py"):
        loader.load(written(tmp_path, GOOD.replace("recipe = ", "experiment = ")))


@pytest.mark.parametrize(("value", "kind"), [("{}", "dict"), ("Recipe", "type"), ("3", "int")])
def test_a_recipe_of_another_type_is_refused(tmp_path: Path, value: str, kind: str) -> None:
    with refused("mine.py", f"`recipe` is a {kind}", "recipe = Recipe(...)"):
        loader.load(written(tmp_path, f"{GOOD}\nrecipe = {value}\n"))


@pytest.mark.parametrize("slot", ["model=Net", "optimizer=partial(SGD, lr=0.1)"])
def test_a_lambda_in_a_recipe_is_refused(tmp_path: Path, slot: str) -> None:
    name = slot.partition("=")[0]
    with refused("lambda", "with def"):
        loader.load(written(tmp_path, GOOD.replace(slot, f"{name}=lambda *a: None")))


def test_a_network_that_is_built_already_is_refused_in_words_that_help(tmp_path: Path) -> None:
    with refused("Net", "class"):
        loader.load(written(tmp_path, GOOD.replace("model=Net", "model=Net()")))


def test_a_loss_module_in_another_slot_is_refused(tmp_path: Path) -> None:
    with refused("a CrossEntropyLoss that is built already", "write loss=nn.CrossEntropyLoss(...)"):
        text = GOOD.replace("epochs=1", "epochs=1, initialize=nn.CrossEntropyLoss()")
        loader.load(written(tmp_path, text))
    loader.load(written(tmp_path, text.replace("initialize=", "loss=")))


def test_the_fault_of_the_recipes_own_code_keeps_its_cause(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        loader.load(written(tmp_path, GOOD + "1 / 0\n"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# The shipped recipes


def test_simplecnn_is_the_network_of_the_tutorials() -> None:
    loaded = loader.load(RECIPES / "simplecnn.py")
    network = loaded.recipe.model()
    assert count_parameters(network) == 25_578
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert short_name(loaded.recipe.data.source) == "CIFAR10"
    assert loaded.recipe.data.fallback is not None
    assert "accelerate launch -m launcher recipes/simplecnn.py" in loaded.note


def test_pictures64_scores_five_classes_of_pictures_of_64_pixels() -> None:
    loaded = loader.load(RECIPES / "pictures64.py")
    assert loaded.recipe.model()(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    wider = overrides.override(loaded.recipe, ["model.classes=7"])
    assert wider.model()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    loaded = loader.load(path)
    assert loaded.name == path.stem
    assert loaded.note.strip()


def test_a_recipe_imports_its_neighbours_as_a_script_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine").mkdir()
    net = GOOD.partition("class Net")[2].partition("recipe =")[0]
    (tmp_path / "mine" / "own_blocks.py").write_text(f"from torch import nn\n\n\nclass Net{net}")
    text = GOOD.replace(f"class Net{net}", "from own_blocks import Net\n\n")
    (tmp_path / "mine" / "first.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    loaded = loader.load(Path("mine/first.py"))
    assert code_name(loaded.recipe.model) == "own_blocks:Net"


def test_what_a_recipe_imports_from_beside_it_is_known_by_its_digest(tmp_path: Path) -> None:
    """And so are the files that these import; of the launcher a run writes down the version."""
    texts = {
        "mine/net.py": "import os, parts.small\nfrom .unknown import a\n",
        "mine/parts/__init__.py": "",
        "mine/parts/small.py": "from . import large\nfrom ..net import Net\n",
        "mine/parts/large.py": f"import shared, net\nfrom {'.' * 99} import a\n",
        "mine/parts/unused.py": "",
        "mine/broken.py": "import (",
        "shared.py": "import torch\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    source = "from net import Net\nfrom launcher import Recipe\nimport broken, mine.parts.large\n"
    found = neighbours_of(source, tmp_path / "mine")
    target = (tmp_path / "mine" / "net.py").rename(tmp_path / "elsewhere.py")
    (tmp_path / "mine" / "net.py").symlink_to(target)  # as each machine may have it
    assert neighbours_of(source, tmp_path / "mine") == found
    used = ["net.py", "parts/__init__.py", "parts/small.py", "parts/large.py", "broken.py"]
    assert set(found) == {*used, "../shared.py"}
    (tmp_path / "shared.py").write_text("import numpy\n")
    assert changed(found, neighbours_of(source, tmp_path / "mine")) == ["../shared.py"]
    assert changed(None, found) == []
    assert neighbours_of("from launcher.config import loader", ROOT / "recipes") == {}


def test_neighbours_of_one_name_are_those_of_the_recipes_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the first recipe comes again; what was there before stays what it was."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    net = GOOD.partition("class Net")[2].partition("recipe =")[0]
    imports = "import numpy\nfrom twin_blocks.small import Net\nfrom twin_parts import WIDTH\n\n\n"
    text = GOOD.replace(f"class Net{net}", imports).replace("Net,", "partial(Net, width=WIDTH),")
    for width in (3, 5):
        folder = tmp_path / f"e{width}"
        (folder / "twin_blocks").mkdir(parents=True)
        own = net.replace("width, 10", f"width, {width}")
        (folder / "twin_blocks" / "small.py").write_text(
            f"from torch import nn\n\n\nclass Net{own}"
        )
        (folder / "twin_parts.py").write_text(f"WIDTH = {width}")
        written(folder, text, f"r{width}.py")
    numpy = sys.modules["numpy"]
    for width in (3, 5, 3):
        network = loader.load(tmp_path / f"e{width}" / f"r{width}.py").recipe.model()
        assert network.in_features == width
        assert network.out_features == width
        parts = sys.modules["twin_parts"]
    loader.load(tmp_path / "e3" / "r3.py")
    assert sys.modules["twin_parts"] is parts, "of the same folder"
    assert sys.modules["numpy"] is numpy
