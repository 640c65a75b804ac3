"""`launcher compare`: what differs, the figures beside each other, and whether they do."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.run_files import RunFiles
from launcher.cli import main
from launcher.results.compare import compared, grouped
from launcher.results.statistics import two_sided
from launcher.utils.json_text import differing, flatten
from tests.support.parsed import Parsed
from tests.unit.results.test_runs import write_run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def repeats(
    name: str, best: tuple[float, ...], first_seed: int = 0, **settings: Any
) -> list[RunFiles]:
    return [
        RunFiles(write_run(f"{name}-{n}", (0.1, value), seed=first_seed + n, **settings))
        for n, value in enumerate(best)
    ]


def test_settings_code_and_environment_that_differ_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = write_run("one", optimizer={"lr": 0.1}, data={"augment": [{"call": "a:flip"}]})
    two = write_run("two", (0.8,), optimizer={"lr": 0.2}, data={"augment": []})
    (one / "recipe.py").write_text("a = 1\nb = 2\n")
    (two / "recipe.py").write_text("a = 1\nb = 3\n")
    rows = [{"epoch": n, "test/accuracy": 0.8, "ranks": n} for n in (1, 2)]
    (two / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    about = json.loads((two / "run.json").read_text()) | {"data_digest": "beef"}
    (two / "run.json").write_text(json.dumps(about))
    assert main(["compare", "one", "runs/two"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["optimizer.lr", "0.1", "0.2"] in lines
    assert ["data.augment.0.call", "a:flip", "-"] in lines
    assert ["images", "(digest)", "-", "beef"] in lines
    assert ["ranks", "-", "1,", "2"] in lines
    assert ["-b", "=", "2"] in lines
    assert ["+b", "=", "3"] in lines
    chosen = ["test", "accuracy,", "best", "epoch", "(chosen", "on", "the", "test", "images)"]
    assert [*chosen, "70.00%", "80.00%"] in lines
    assert ["test", "accuracy,", "last", "epoch", "60.00%", "80.00%"] in lines
    assert not any("training" in line for line in lines), "which was not measured"
    assert not any("seed" in line for line in lines)
    assert main(["compare", "one", "two", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["settings"]["optimizer.lr"] == [0.1, 0.2]
    assert whole["environment"] == {
        "images (digest)": [None, "beef"],
        "epochs trained": [3, 2],
        "ranks": [None, "1, 2"],
    }
    assert whole["source"][0][-2:] == ["-b = 2", "+b = 3"]


def test_equal_runs_differ_in_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    write_run("one")
    write_run("two")
    assert main(["compare", "one", "two"]) == 0
    output = capsys.readouterr().out
    assert "settings: no difference" in output
    assert "environment: no difference" in output
    assert "(2 runs)" not in output  # the same seed, or a copy, is no second measurement
    assert len(grouped([RunFiles(Path("runs", name)) for name in ("one", "two")])) == 2


def test_repeats_are_one_group_with_mean_and_deviation(capsys: pytest.CaptureFixture[str]) -> None:
    repeats("slow", (0.90, 0.92, 0.94), lr=0.1)
    repeats("fast", (0.95, 0.97, 1.0), lr=0.2)
    names = [f"{name}-{n}" for name in ("slow", "fast") for n in range(3)]
    assert main(["compare", *names]) == 0
    output = capsys.readouterr().out
    assert "92.00% +- 2.00% (n=3)" in output
    assert "they differ (+5.33%, paired t=16.00, p=0.00388, d=2.35, n=3 and 3)" in output


def test_a_secret_in_a_setting_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    write_run("one", url="https://user:hunter2secret@host/x")
    write_run("two", url="https://user:other2secret@host/x")
    for words in ([], ["--json"]):
        assert main(["compare", "one", "two", *words]) == 0
        assert "2secret" not in capsys.readouterr().out


def test_tests_agree_with_published_values() -> None:
    # From Student's table: the two-sided 5 % and 1 % points.
    for t, freedom, p in ((12.706, 1, 0.05), (2.228, 10, 0.05), (3.169, 10, 0.01), (2.0, 60, 0.05)):
        assert two_sided(t, freedom) == pytest.approx(p, abs=2e-4)
    assert two_sided(0.0, 5) == pytest.approx(1.0)
    assert two_sided(1e6, 5) == pytest.approx(0.0, abs=1e-9)


def test_welch_where_the_seeds_are_others() -> None:
    # Welch (1947) as in scipy.stats.ttest_ind([.90,.91,.93], [.94,.95,.99,.96], equal_var=False)
    first = repeats("a", (0.90, 0.91, 0.93), lr=0.1)
    second = repeats("b", (0.94, 0.95, 0.99, 0.96), first_seed=7, lr=0.2)
    one, two = grouped([*first, *second])
    test = compared(one, two)
    assert test is not None
    assert test.kind == "Welch's"
    mean = [sum(g) / len(g) for g in ((0.90, 0.91, 0.93), (0.94, 0.95, 0.99, 0.96))]
    error = math.sqrt(0.000233333 / 3 + 0.000466667 / 4)
    assert test.t == pytest.approx((mean[1] - mean[0]) / error, rel=1e-4)
    assert test.freedom == pytest.approx(5.0, rel=1e-3)
    assert 0.01 < test.p < 0.03


def test_paired_where_the_seeds_are_the_same() -> None:
    first = repeats("a", (0.90, 0.92, 0.94), lr=0.1)
    second = repeats("b", (0.91, 0.94, 0.95), lr=0.2)
    test = compared(*grouped([*reversed(first), *second]))
    assert test is not None
    assert test.kind == "paired"
    assert test.freedom == 2
    # gaps of 1, 2 and 1 %: 4/3 over (1/sqrt(3))/sqrt(3)
    assert test.t == pytest.approx(4.0)
    assert test.p == pytest.approx(0.0572, abs=1e-3)


def test_one_run_of_each_is_no_test() -> None:
    one, two = grouped([*repeats("a", (0.9,), lr=1), *repeats("b", (0.8,), lr=2)])
    assert compared(one, two) is None


def test_nested_settings_have_dotted_names() -> None:
    assert flatten({"a": {"b": 1, "c": [{"d": 2}, {"d": 3}]}, "e": [1, 2]}) == {
        "a.b": 1,
        "a.c.0.d": 2,
        "a.c.1.d": 3,
        "e": [1, 2],
    }
    assert differing([{"a": 1, "b": 2}, {"a": 1, "c": 3}]) == {"b": [2, None], "c": [None, 3]}


def page_of(*runs: str) -> Parsed:
    assert main(["compare", *runs, "--html", "out/page.html"]) == 0
    return Parsed(Path("out/page.html").read_text(encoding="utf-8"))


def test_a_page_has_all_of_it_and_the_curves(capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = repeats("slow", (0.90, 0.92), lr=0.1), repeats("fast", (0.95, 0.97), lr=0.2)
    for run in slow:
        (run.path / "recipe.py").write_text("a = 1\nb = 2\n")
    for run in fast:
        (run.path / "recipe.py").write_text("a = 1\nb = 3\n")
    page = page_of("slow-0", "slow-1", "fast-0", "fast-1")
    output = capsys.readouterr().out
    assert output.count("+b = 3") == 1, "of two repeats, once"
    for words in (
        "slow-0 ... slow-1 (2 runs) fast-0 ... fast-1 (2 runs)",
        "91.00% ± 1.41% (n=2)",
        "lr 0.1 0.1 0.2 0.2",
        "Environment No difference.",
        "Code slow-0 ... slow-1 (2 runs) and fast-0 ... fast-1 (2 runs) --- runs/slow-0/recipe.py",
        "-b = 2 +b = 3",
    ):
        assert words in page.words, words
    assert page.words.count("+b = 3") == 1
    (sentence,) = [
        line for line in output.splitlines() if line.startswith("test accuracy, last epoch of")
    ]
    assert sentence.removeprefix("t") in page.words
    charts = {chart["title"]: chart["lines"] for chart in page.data["charts"]}
    assert list(charts) == ["Loss of the test images", "Accuracy of the test images"]
    lines = charts["Accuracy of the test images"]
    assert [(line["name"], line["group"], line["values"]) for line in lines] == [
        ("slow-0", 0, [0.1, 0.90]),
        ("slow-1", 0, [0.1, 0.92]),
        ("fast-0", 1, [0.1, 0.95]),
        ("fast-1", 1, [0.1, 0.97]),
    ]
    assert sorted(os.listdir("out")) == ["page.html", "plotly.min.js"]


def test_hostile_names_and_secrets_on_a_page() -> None:
    write_run("<script>alert(1)<", url="https://user:hunter2secret@host/x", own="<img src=x>")
    (write_run("two", lr=1) / "recipe.py").write_text("</code><script>alert(2)</script>\n")
    page = page_of("<script>alert(1)<", "two")
    assert [tag for tag, _ in page.elements].count("script") == len(page.scripts) + 1 == 3
    assert not any(tag == "img" for tag, _ in page.elements)
    assert "hunter2" not in Path("out/page.html").read_text()
    assert "+</code><script>alert(2)</script>" in page.words


def test_runs_without_an_epoch_are_a_page_without_curves() -> None:
    write_run("one", ())
    write_run("two", (), lr=1)
    page = page_of("one", "two")
    assert page.data["charts"] == []
    assert "Curves" not in page.words


def test_a_page_replaces_nothing_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    write_run("one")
    write_run("two")
    Path("mine.html").write_text("mine")
    assert main(["compare", "one", "two", "--html", "mine.html"]) == 2
    assert "type --html comparison.html" in capsys.readouterr().err
    assert Path("mine.html").read_text() == "mine"


def test_one_run_is_no_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "one"]) == 2
    assert "at least two runs" in capsys.readouterr().err


def test_a_run_is_not_compared_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    write_run("one")
    assert main(["compare", "one", "runs/one"]) == 2
    assert "a run is named twice" in capsys.readouterr().err


def validated(name: str, accuracies: tuple[float, ...], tested: float, **config: Any) -> RunFiles:
    """A run that has chosen by validation images."""
    path = write_run(name, **config)
    about = json.loads((path / "run.json").read_text()) | {"evaluated_on": "val"}
    (path / "run.json").write_text(json.dumps(about))
    rows = [{"epoch": n, "val/accuracy": a} for n, a in enumerate(accuracies, start=1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = {"best": {"test/accuracy": tested}, "last": {"test/accuracy": tested - 0.01}}
    (path / "test.json").write_text(json.dumps(figures))
    return RunFiles(path)


def test_what_validation_images_chose_is_compared_on_the_test_images() -> None:
    first = [validated(f"a-{n}", (0.9, 0.8), 0.7 + n / 100, seed=n, lr=1) for n in range(2)]
    second = [validated(f"b-{n}", (0.9, 0.8), 0.8 + n / 90, seed=n, lr=2) for n in range(2)]
    one, two = grouped([*first, *second])
    assert one.figures["validation accuracy, best epoch"] == (0.9, 0.9)
    assert one.figures["test accuracy, best epoch"] == (0.7, 0.71)
    test = compared(one, two)
    assert test is not None
    assert test.figure == "test accuracy, best epoch"
    chosen_on_test = repeats("c", (0.90, 0.92), lr=3)
    (three,) = grouped(chosen_on_test)
    other = compared(one, three)
    assert other is not None
    assert other.figure == "test accuracy, last epoch"


def test_what_has_another_length_or_beginning_is_no_repeat(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of equal settings all the same: cut by --max-steps, begun with weights, or not ended."""
    about = {"steps": "3 epochs x 4 steps, stopping after 5"}, {"weights": "from other.pt"}
    for name, more in (("whole", {}), ("cut", about[0]), ("tuned", about[1])):
        path = write_run(name) / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    write_run("stopped", (0.5,), exit_code=75)
    names = ["whole", "cut", "tuned", "stopped"]
    assert main(["compare", *names, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [group["runs"] for group in found["groups"]] == [[name] for name in names]
    assert found["environment"]["state"] == ["done", "done", "done", "stopped"]
    assert found["environment"]["epochs trained"] == [3, 3, 3, 1]
    assert found["environment"]["weights"][2] == "from other.pt"


def test_a_test_counts_the_runs_that_have_the_figure(capsys: pytest.CaptureFixture[str]) -> None:
    repeats("slow", (0.90, 0.92, 0.94), lr=0.1)
    repeats("fast", (0.95, 0.97, 1.0), lr=0.2)
    Path("runs/fast-2/metrics.jsonl").unlink()
    assert main(["compare", *(f"{name}-{n}" for name in ("slow", "fast") for n in range(3))]) == 0
    assert "n=3 and 2)" in capsys.readouterr().out


def test_seeds_that_are_no_numbers_pair_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """As in a damaged config.json."""
    for name, rate in (("a", 0.1), ("b", 0.2)):
        for seed in ([1], "x"):
            write_run(f"{name}{len(str(seed))}", lr=rate, seed=seed)
    assert main(["compare", "a1", "a3", "b1", "b3"]) == 0
    assert "Welch's" in capsys.readouterr().out
