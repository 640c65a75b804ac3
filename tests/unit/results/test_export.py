"""`launcher export`: each form answers as the trained network does, or is refused."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher import load_run
from launcher.checkpoint.run_files import RunFiles, find
from launcher.checkpoint.weights import save_weights
from launcher.cli import main
from launcher.data import sources
from launcher.errors import EXIT_INTERRUPTED
from launcher.results import export
from launcher.results.card import model_card
from launcher.results.export import prove
from tests.integration.test_readme import offline
from tests.support.helpers import RECIPES, alike, complaint, refused
from tests.support.hub_server import HubServer

RECIPE = RECIPES / "pictures64.py"
FEW = ("data.fallback.count=60", "data.batch_size=20", "epochs=1", "data.root=nowhere")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one called `own`; its network has BatchNorm."""
    folder = tmp_path_factory.mktemp("export")
    source = RECIPE.read_text().replace("nn.Conv2d(10, 20", "nn.BatchNorm2d(10), nn.Conv2d(10, 20")
    (folder / "mine.py").write_text(source)
    words = [str(folder / "mine.py"), *FEW, "--wandb", "off", "--runs", str(folder / "runs")]
    assert main([*words, "--name", "own"]) == 0
    return folder / "runs"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def exported(runs: Path, *words: str, folder: str = "out") -> Path:
    assert main(["export", "own", folder, "--runs", str(runs), *words]) == 0
    return Path(folder)


def expected(runs: Path, pixels: Tensor) -> Tensor:
    run = load_run(runs / "own")
    with torch.no_grad():
        scores: Tensor = run.model(run.normalize(pixels))
    return scores


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (7, 64, 64, 3), dtype=torch.uint8)


def test_a_torch_program_takes_any_number_of_images(
    runs: Path, pixels: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported(runs) / "model.pt2"
    assert "proved on all 12 test images" in capsys.readouterr().out
    extra = {"about.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["about.json"])["classes"] == list(load_run(runs / "own").classes)
    normalized = load_run(runs / "own").normalize(pixels)
    torch.testing.assert_close(module(normalized), expected(runs, pixels))
    torch.testing.assert_close(module(normalized[:1]), expected(runs, pixels)[:1])


def test_pixels_in_and_probabilities_out(runs: Path, pixels: Tensor) -> None:
    module = torch.export.load(exported(runs, "--from-pixels") / "model.pt2").module()
    shares = module(pixels.permute(0, 3, 1, 2))
    torch.testing.assert_close(shares, expected(runs, pixels).softmax(1))


@pytest.mark.parametrize("from_pixels", [alike(False), pytest.param(True, marks=pytest.mark.slow)])
def test_onnx_runs_without_torch(runs: Path, pixels: Tensor, from_pixels: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    words = ["--from-pixels"] if from_pixels else []
    path = exported(runs, "--to", "onnx", *words) / "model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.get_modelmeta().custom_metadata_map["classes"]
    assert json.loads(found) == list(load_run(runs / "own").classes)
    given = load_run(runs / "own").normalize(pixels)
    wanted = expected(runs, pixels)
    if from_pixels:
        given, wanted = pixels.permute(0, 3, 1, 2).contiguous(), wanted.softmax(1)
    (scores,) = session.run(None, {"images": given.numpy()})
    numpy.testing.assert_allclose(scores, wanted.numpy(), atol=1e-5)


def test_weights_come_with_what_is_needed_to_use_them(runs: Path) -> None:
    folder = exported(runs, "--to", "safetensors")
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "recipe.py",
    }
    weights, own = load_file(folder / "model.safetensors"), load_file(runs / "own/best.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in own.items())
    about = json.loads((folder / "config.json").read_text())
    assert about["input"]["shape"] == ["n", 3, 64, 64]


def test_a_folder_for_the_hub_has_a_card(runs: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported(runs, "--to", "hub") / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    (result,) = card.data.eval_results
    rows = (runs / "own/metrics.jsonl").read_text().splitlines()
    assert result.metric_value == pytest.approx(json.loads(rows[-1])["test/accuracy"], abs=1e-4)
    assert "proved on all 12 test images" in card.text
    assert card.text.count("ccuracy") == 1, "no other than that of the test images"
    assert "one** training run" in card.text


def quoted_on_a_card(run: Path, weights: str) -> float | None:
    """In the metadata, which is the same as in the text."""
    from huggingface_hub import ModelCard, ModelCardData

    card = ModelCard(model_card(RunFiles(run), weights, "on others; accuracy 12.34%"))
    assert isinstance(card.data, ModelCardData)
    if card.data.eval_results is None:
        assert "no figure of test images" in card.text
        return None
    (result,) = card.data.eval_results
    assert f"Accuracy {result.metric_value:.2%} on 60 test images" in card.text
    return float(result.metric_value)


def test_a_card_quotes_the_test_images_and_not_those_of_the_proof(
    runs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "own", run)  # whose best and last epoch is the first
    about = json.loads((run / "run.json").read_text())

    def written(name: str, content: dict[str, Any]) -> None:
        (run / name).write_text(json.dumps(content) + "\n")

    written("metrics.jsonl", {"epoch": 1, "test/accuracy": 0.25, "test/images": 60})
    assert quoted_on_a_card(run, "best") == quoted_on_a_card(run, "final") == 0.25
    written("metrics.jsonl", {"epoch": 1, "val/accuracy": 0.75, "val/images": 30})
    written("run.json", {**about, "evaluated_on": "val"})
    assert quoted_on_a_card(run, "best") is None
    figures = {"test/accuracy": 0.5, "test/images": 60}
    written("test.json", {"best": figures, "last": {**figures, "test/accuracy": 0.0}})
    assert quoted_on_a_card(run, "best") == 0.5
    assert quoted_on_a_card(run, "final") == 0.0


def leftovers() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_changed_weights_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "own/best.safetensors"
    before = path.read_bytes()
    weights = load_file(path)
    next(v for n, v in weights.items() if n.endswith("weight")).mul_(1.5)
    save_file(weights, path)
    try:
        assert main(["export", "own", "out", "--runs", str(runs)]) == 2
    finally:
        path.write_bytes(before)
    assert "other weights than those that it evaluated" in capsys.readouterr().err
    assert leftovers() == []


def test_nothing_is_left_where_the_time_of_a_job_ends(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(export, "about", ended)
    assert main(["export", "own", "out", "--runs", str(runs)]) == EXIT_INTERRUPTED
    assert leftovers() == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_folder_that_cannot_be_written_is_one_line(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the disk is full, on which torch's own writer ends the process, or it is taken."""

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    def taken(*arguments: Any) -> dict[str, Any]:
        Path("out/other").mkdir(parents=True)
        return {}

    words = ("export", "own", "out", "--runs", str(runs))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        assert "out, which cannot be written (No space left" in complaint(capsys, *words)
    assert leftovers() == []
    monkeypatch.setattr(export, "about", taken)
    assert "name another folder" in complaint(capsys, *words)
    assert leftovers() == ["out"]


@pytest.mark.parametrize("form", export.FORMS)
def test_an_exporter_that_is_wrong_is_refused(
    form: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """BatchNorm left in training mode, and a weight that is changed on the way."""
    if form in ("torch", "onnx"):
        monkeypatch.setattr(export.Deployed, "eval", lambda self: self.train())
    else:

        def wrong(network: Any, path: Path) -> None:
            save_weights(network, path)
            weights = load_file(path)
            next(v for n, v in weights.items() if n.endswith("weight"))[0] += 0.5
            save_file(weights, path)

        monkeypatch.setattr(export, "save_weights", wrong)
    assert main(["export", "own", "out", "--to", form, "--runs", str(runs)]) == 2
    errors = capsys.readouterr().err
    assert "the export is not the trained network" in errors or "cannot be exported" in errors
    assert leftovers() == []


def test_a_run_whose_images_are_gone_is_proved_by_those_that_it_kept(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "open_on_disk", lambda *_: None)
    exported(runs)
    assert "proved on 12 images" in capsys.readouterr().out
    (runs / "own/best.npz").rename(runs / "own/kept")
    (runs / "own/last.npz").rename(runs / "own/kept-last")
    try:
        assert main(["export", "own", "other", "--runs", str(runs)]) == 2
    finally:
        (runs / "own/kept").rename(runs / "own/best.npz")
        (runs / "own/kept-last").rename(runs / "own/last.npz")
    assert "type --data FOLDER" in capsys.readouterr().err


def test_a_network_that_depends_on_more_than_the_images_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = RECIPE.read_text().replace(
        "return self.layers(images)", "return self.layers(images) * (len(images) > 3 or 1)"
    )
    source = source.replace("len(images) > 3", "float(images.sum()) != 0.123 and len(images) > 3")
    (tmp_path / "odd.py").write_text(source)
    words = [str(tmp_path / "odd.py"), *FEW, "--wandb", "off", "--runs", "runs"]
    assert main([*words, "--name", "odd"]) == 0
    capsys.readouterr()
    assert main(["export", "odd", "out"]) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1, errors  # torch printed the operations before it
    assert "cannot be exported as torch" in errors or "is not the trained network" in errors
    assert not Path("out").exists()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_what_torch_jit_has_compiled_is_exported_as_weights_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was told to write x.flatten(1)."""
    source = (
        RECIPE.read_text()
        + """
import torch
from dataclasses import replace


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 5)))


recipe = replace(recipe, model=scripted)
"""
    )
    (tmp_path / "scripted.py").write_text(source)
    words = [str(tmp_path / "scripted.py"), *FEW, "--wandb", "off", "--runs", "runs"]
    assert main([*words, "--name", "scripted"]) == 0
    for form in ("torch", "onnx"):
        pytest.importorskip("onnx")
        capsys.readouterr()
        assert main(["export", "scripted", "out", "--to", form]) == 2
        errors = capsys.readouterr().err
        assert f"exported as {form}: torch.jit has compiled it" in errors
        assert "--to safetensors" in errors
    assert main(["export", "scripted", "out", "--to", "safetensors"]) == 0


def test_a_network_that_draws_in_evaluation_is_not_told_to_try_another_form(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing = "return self.layers(images) + nn.init.torch.rand(())"
    source = RECIPE.read_text().replace("return self.layers(images)", drawing)
    (tmp_path / "odd.py").write_text(source)
    words = [str(tmp_path / "odd.py"), *FEW, "--wandb", "off", "--runs", "runs"]
    assert main([*words, "--name", "odd"]) == 0
    capsys.readouterr()
    assert main(["export", "odd", "out", "--to", "safetensors"]) == 2
    assert "scores of the same images differ from call to call" in capsys.readouterr().err


def test_the_reason_why_onnx_has_no_room_for_a_network_is_named(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was torch's first line: `Failed to convert the exported program`."""
    pytest.importorskip("onnx")
    source = RECIPE.read_text().replace(
        "return self.layers(images)",
        "return self.layers(images) @ nn.init.torch.matrix_exp(self.layers[-1].weight[:, :5])",
    )
    (tmp_path / "odd.py").write_text(source)
    words = [str(tmp_path / "odd.py"), *FEW, "--wandb", "off", "--runs", "runs"]
    assert main([*words, "--name", "odd"]) == 0
    capsys.readouterr()
    assert main(["export", "odd", "out", "--to", "onnx"]) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1, errors
    assert "No ONNX function found for <OpOverload(op='aten.linalg_matrix_exp'" in errors
    assert "type --to torch" in errors
    assert main(["export", "odd", "out", "--to", "torch"]) == 0


def test_a_proof_sees_a_small_gap(runs: Path) -> None:
    run, files = load_run(runs / "own"), find("own", runs)
    test, whole = export.evaluated_images(files, run, None)
    assert whole

    def right(images: Tensor) -> Tensor:
        return run.model(images)

    assert prove(run, right, test, from_pixels=False).gap == 0
    with refused("up to 0.1"):
        prove(run, lambda images: right(images) + 0.1, test, from_pixels=False)
    with refused("or no numbers"):
        prove(run, lambda images: right(images) * torch.nan, test, from_pixels=False)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["own"], "no run or no folder is named"),
        (["own", "taken"], "taken, which exists already"),
        (["own", "file/out"], "file is no folder"),
        (["other", "out"], "there is own"),
        (["own", "out", "--to", "tflite"], "invalid choice: 'tflite'"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], part: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").mkdir()
    Path("file").touch()
    assert part in complaint(capsys, "export", *words, "--runs", str(runs))


# The Hub

TOKEN = "hf_planted0token0of0the0test"


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch, status: int = 200, token: str = TOKEN) -> Iterator[Any]:
    """A Hub on loopback, and somebody who is logged in there."""
    from huggingface_hub import constants

    server = HubServer(status)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # what HF_ENDPOINT sets in a new process
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server speaks Git LFS only
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "no-token-is-stored")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", token)
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of huggingface_hub's code
def test_a_push_brings_the_proved_folder_to_the_hub(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub(monkeypatch) as server:
        folder = exported(runs, "--to", "hub", "--push", "someone/pictures")
        assert f"pushed to {server.url}/someone/pictures" in capsys.readouterr().out
    got = server.repository
    assert got.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(got.files) == {"README.md", "config.json", "model.safetensors", "recipe.py"}
    assert got.created.get("private") or got.created["visibility"] == "private"
    assert got.tokens == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in content for content in got.files.values())


def test_nothing_is_pushed_by_itself(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub(monkeypatch) as server:
        exported(runs, "--to", "hub")
    assert server.repository.tokens == set(), "asked for nothing"


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
def test_a_push_that_is_refused_is_one_line_and_keeps_the_folder(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["own", "out", "--to", "hub", "--push", "someone/pictures", "--runs", str(runs)]
    with hub(monkeypatch, status=403):
        error = complaint(capsys, "export", *words)
    assert "someone/pictures, which was not taken (HfHubHTTPError" in error
    assert "hf upload someone/pictures out" in error
    assert TOKEN not in error
    assert (Path("out") / "README.md").is_file()


@pytest.mark.parametrize(
    ("words", "token", "part"),
    [
        (["--to", "hub", "--push", "a/b"], "", "no token of the Hugging Face Hub"),
        (["--to", "hub", "--push", "a/b/c"], TOKEN, "type --push OWNER/NAME"),
        (["--push", "a/b"], TOKEN, "--push needs --to hub"),
    ],
)
def test_a_push_that_cannot_begin_is_one_line_before_the_export(
    words: list[str],
    token: str,
    part: str,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with hub(monkeypatch, token=token) as server:
        error = complaint(capsys, "export", "own", "out", *words, "--runs", str(runs))
    assert part in error
    assert not os.path.exists("out")
    assert server.repository.tokens == set()


# The recipes of this repository


@pytest.mark.slow
@pytest.mark.parametrize("form", [alike("torch"), "onnx"])
@pytest.mark.parametrize(
    "recipe", ["simplecnn", "pictures64", "resnet18", "speedrun94", alike("speedrun96")]
)
def test_the_recipes_can_be_exported(
    recipe: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = offline((RECIPES / f"{recipe}.py").read_text())
    Path(f"{recipe}.py").write_text(text.replace("count=300", "count=100"))
    short = ["data.batch_size=20", "--max-steps", "2", "data.root=nowhere", "--wandb", "off"]
    more = {"resnet18": ["compile=false"]}
    for name in ("speedrun94", "speedrun96"):
        more[name] = ["compile=false", "precision=pure_bf16"]
    words = [f"{recipe}.py", *short, *more.get(recipe, []), "--name", "own", "--no-report"]
    assert main(words) == 0
    assert main(["export", "own", "out", "--to", form, "--from-pixels"]) == 0
    assert "proved on all" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["safetensors", "hub"])
def test_pixels_go_into_a_program_and_not_into_weights(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("export", "first", "out", "--from-pixels", "--to", form)
    assert "--from-pixels goes with --to torch or onnx" in complaint(capsys, *words)
