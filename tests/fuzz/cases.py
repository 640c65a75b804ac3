"""What people may type: settings and options with any value, recipes with a slip in them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from launcher.config import loader
from launcher.config.settings import walk
from tests.fuzz.damages import KINDS
from tests.fuzz.mutations import mutations
from tests.support.helpers import RECIPES, ROOT

EVERYTHING = ROOT / "tests" / "fuzz" / "everything.py"
FEW = ("epochs=1", "--max-steps", "2", "--wandb", "off", "--name", "case")
# Each with what makes it small.
SMALL = {
    EVERYTHING: FEW,
    RECIPES / "simplecnn.py": ("data.fallback.count=40", "data.batch_size=20", *FEW),
    ROOT / "tests" / "support" / "resumable.py": ("data.source.count=40", *FEW),
}
OPTIONS = (
    *("--runs", "--name", "--max-steps", "--log-every", "--resume-changed", "--checkpoint-every"),
    *("--project", "--init-from", "--skip", "--timeout", "--join-timeout", "--save-before"),
    *("--world-size", "--wandb"),
)
FLAGS = ("--smoke", "--resume", "--profile", "--dry-run", "--help", "--help-all")


@dataclass(frozen=True)
class Case:
    """Words to type; with `source`, a recipe.py of that text stands there, whose slip is named.

    With `damage`, a run stands in runs/case, with one thing wrong in it; "" for a file: nothing.
    """

    words: tuple[str, ...]
    source: str = ""
    slip: str = ""
    damage: tuple[str, str, int] | None = None

    def __str__(self) -> str:
        typed = self.slip or " ".join(map(repr, self.words))
        return f"{typed}, {self.damage}" if self.damage else typed


# No path leads out of the folder of a case, no number is that of a machine which is only slow.
_LETTERS = st.characters(exclude_characters="/~\0", exclude_categories=())
_NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from((2**31, -(2**31), 2**63, 2**64, 10**15, -(10**15), 10**40, 10**400)),
    st.floats(width=32),
    st.sampled_from(
        ("nan", "-inf", "1e999", "-0.0", "1e-320", "1_0", "0x10", "1j", "٣", "½", "1e5")
    ),
)
_ODD = (
    *("", " ", "none", "None", "true", "False", "[]", "()", "{}", "(1,)", "'x'", "...", "=", "-"),
    *("lambda: 0", "__import__('os')", "os.remove", "b'x'", "[" * 3000, "1" * 6000, "x" * 6000),
    *("(" * 90 + ")" * 90, "-" * 3000 + "1", "fp32", "pure_fp16", "bf16", "{1: 2}", "1,", ",,"),
)
_VALUES = st.one_of(
    _NUMBERS.map(str),
    _NUMBERS.map(str),
    st.text(_LETTERS, max_size=12),
    st.lists(_NUMBERS, max_size=4).map(lambda items: ",".join(map(str, items))),
    st.sampled_from(_ODD),
)


@cache
def _names(recipe: Path) -> list[str]:
    return sorted({setting.name for setting in walk(loader.load(recipe).recipe)})


@st.composite
def settings_cases(draw: st.DrawFn) -> Case:
    recipe = draw(st.sampled_from(list(SMALL)))
    name = draw(st.sampled_from(_names(recipe)))
    if draw(st.integers(0, 9)) == 0:  # a slip in the name
        place = draw(st.integers(0, len(name)))
        name = name[:place] + draw(st.text(_LETTERS, max_size=2)) + name[place + 1 :]
    dashes = draw(st.sampled_from(("", "", "--")))
    return Case((str(recipe), *SMALL[recipe], f"{dashes}{name}={draw(_VALUES)}"))


@st.composite
def option_cases(draw: st.DrawFn) -> Case:
    recipe = draw(st.sampled_from(list(SMALL)))
    words = [str(recipe), *SMALL[recipe]]
    for _ in range(draw(st.integers(1, 2))):
        if draw(st.integers(0, 3)) == 0:
            words.append(draw(st.sampled_from(FLAGS)))
            continue
        name = draw(st.sampled_from(OPTIONS))
        if draw(st.integers(0, 14)) == 0:
            name = name[: draw(st.integers(0, len(name)))]
        value = draw(_VALUES)
        if (name, value) != ("--wandb", "online"):
            words += draw(st.sampled_from(([name, value], [f"{name}={value}"])))
    return Case(tuple(words))


@cache
def _slips() -> list[tuple[Path, int]]:
    return [(recipe, n) for recipe in SMALL for n in range(len(_all_mutations(recipe)))]


@cache
def small_source(recipe: Path) -> str:
    """Its text with few images; so that a slip is not hidden behind a setting that is not there."""
    text = recipe.read_text(encoding="utf-8").replace("count=1_230", "count=40")
    if recipe.stem == "simplecnn":
        text = text.replace("        CIFAR10,\n", "        partial(Synthetic, count=40),\n")
        text = text.replace("        fallback=Synthetic,\n", "").replace("=64", "=20")
    return text.replace("epochs=10", "epochs=1").replace("epochs=40", "epochs=1")


@cache
def _all_mutations(recipe: Path) -> list:  # type: ignore[type-arg]
    return list(mutations(small_source(recipe)))


def slip_cases() -> st.SearchStrategy[Case]:
    return st.sampled_from(_slips()).map(lambda slip: _slip_case(*slip))


def _slip_case(recipe: Path, number: int) -> Case:
    made = _all_mutations(recipe)[number]()
    return Case(("recipe.py", *FEW[1:]), made.source, f"{recipe.stem}: {made.change}")


# What a run leaves that others read.
_RUN_FILES = (
    *("run.json", "config.json", "recipe.py", "metrics.jsonl", "details.jsonl", "end.json"),
    *("best.npz", "last.npz", "best.safetensors", "final.safetensors"),
    *(
        f"checkpoints/step-000000002/{name}"
        for name in (
            *("weights.safetensors", "average.safetensors", "optimizer.pt", "state.json"),
            "manifest.json",
        )
    ),
)
# What is asked of a run.
LOOKS = (
    ("runs",),
    ("runs", "--json"),
    ("runs", "--sort", "best"),
    ("report", "case"),
    ("report",),
    ("compare", "case", "case"),
    ("compare", "case", "case", "--json"),
    ("predict", "case", "picture.png"),
    ("predict", "case", "picture.png", "--json"),
    ("export", "case", "out", "--to", "safetensors"),
    ("export", "case", "out", "--to", "hub"),
    (str(EVERYTHING), *FEW, "--resume", "--resume-changed", "epochs", "epochs=2"),
    (str(EVERYTHING), "epochs=1", "--wandb", "off", "--name", "other", "--init-from", "case"),
    ("submit", "--status"),
)
COMMAND_OPTIONS = {
    "check": ("--world-size", "--limit", "--save", "--runs", "--overfit", "--near", "--json"),
    "verify": ("--ranks", "--steps", "--limit", "--json"),
    "doctor": ("--runs", "--limit", "--join-timeout", "--json"),
    "runs": ("--sort", "--filter", "--json"),
    "report": ("--runs", "--output"),
    "compare": ("--runs", "--json"),
    "predict": ("--runs", "--weights", "--csv", "--json"),
    "pack": ("--size", "--root", "--on-broken"),
    "export": ("--to", "--weights", "--runs", "--data", "--from-pixels"),
    "submit": ("--nodes", "--gpus", "--processes", "--cpus", "--time", "--save-before", "--sweep"),
}
# So that none takes long: what is typed after it stands.
SHORT = {
    "check": (str(EVERYTHING), "--limit", "2"),
    "verify": (str(EVERYTHING), "--limit", "0.001"),
    "doctor": ("--limit", "1"),
    "report": ("case",),
    "compare": ("case", "case"),
    "predict": ("case", "picture.png"),
    "pack": (str(EVERYTHING), "out"),
    "export": ("case", "out", "--to", "safetensors"),
    "submit": (str(EVERYTHING), "--dry-run"),
}


@st.composite
def look_cases(draw: st.DrawFn, places: tuple[str, ...]) -> Case:
    made = draw(st.sampled_from(places)), draw(st.sampled_from(KINDS)), draw(st.integers(0, 10**6))
    return Case(draw(st.sampled_from(LOOKS)), damage=made)


@st.composite
def command_cases(draw: st.DrawFn) -> Case:
    command = draw(st.sampled_from(list(COMMAND_OPTIONS)))
    words = [command, *SHORT.get(command, ())]
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(COMMAND_OPTIONS[command]))
        value = draw(_VALUES)
        form = draw(st.integers(0, 3))
        if name != "--limit" or not _is_long(value):
            words += [[name, value], [f"{name}={value}"], [name], [value]][form]
    return Case(tuple(words), damage=("", "", 0))


def _is_long(value: str) -> bool:
    try:
        return float(value) > 3
    except ValueError:
        return False


def drawn(number: int, seed_number: int) -> list[Case]:
    """That many cases, a third of them recipes; the same for the same seed."""
    parts = (
        (settings_cases(), number // 4),
        (option_cases(), number // 8),
        (command_cases(), number // 8),
        (look_cases(_RUN_FILES), number // 6),
    )
    found = [case for part, size in parts for case in _drawn(part, size, seed_number)]
    return found + _drawn(slip_cases(), number - len(found), seed_number)


def _drawn(strategy: st.SearchStrategy[Case], number: int, seed_number: int) -> list[Case]:
    found: list[Case] = []

    @seed(seed_number)
    @settings(
        max_examples=number,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return list(dict.fromkeys(found))
