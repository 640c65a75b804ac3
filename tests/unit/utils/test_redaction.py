"""A secret is hidden however an output writes it, and ordinary words stay."""

import io
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
import torch
from rich.console import Console as RichConsole
from torch.optim import SGD

from launcher.checkpoint.checkpoint import capture
from launcher.checkpoint.resume import ResumePoint
from launcher.checkpoint.run_dir import RunDir
from launcher.cli import main
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.errors import UserError
from launcher.loggers import wandb
from launcher.loggers.console import Console, LiveConsole
from launcher.run.train import make_loggers
from launcher.utils.redaction import cleaned, redacted
from tests.support.helpers import context_of, tiny_recipe

SECRET = " ab\tc/d'é+\"\n12345678\n"
FORMS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "repr": repr,
    "JSON": json.dumps,
    "JSON of UTF-8": partial(json.dumps, ensure_ascii=False),
    "URL": quote,
    "part of a URL": partial(quote, safe=""),
    "form": quote_plus,
    "shell": shlex.quote,
    "error line": lambda text: str(UserError(text, expected="x", instead="y")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", [SECRET, SECRET.strip(), " ".join(SECRET.split())])
def test_a_secret_is_hidden_in_each_form(text: str, form: str) -> None:
    shown = redacted(f"before {FORMS[form](text)} after", {"MY_TOKEN": SECRET})
    assert "12345678" not in shown
    assert shown.startswith("before ")
    assert shown.endswith(" after")


@pytest.mark.parametrize(
    "name",
    [
        *("AUTHORIZATION", "HTTP_AUTHORIZATION", "BEARER", "CI_JOB_JWT_V2", "AWS_CREDS", "CRED"),
        *("SESSION_COOKIE", "SLACK_WEBHOOK_URL", "SSHPASS", "SENTRY_DSN", "DOCKER_AUTH_CONFIG"),
        *("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS", "PASSCODE", "LOGIN_OTP"),
    ],
)
def test_names_that_common_tools_use_say_that_it_is_a_secret(name: str) -> None:
    assert redacted("see planted-1", {name: "planted-1"}) == "see ***"
    assert redacted(f"https://h/x?{name.lower()}=planted-1&a=2", {}).endswith("=***&a=2")


@pytest.mark.parametrize("name", ["SACRED_TEXT", "CREDITS", "AUTHOR", "SASSY", "ADSN_X", "TOPIC"])
def test_other_names_are_no_secrets(name: str) -> None:
    assert redacted("see planted-1", {name: "planted-1"}) == "see planted-1"


def test_bytes_of_the_environment_that_are_no_text_are_hidden_too() -> None:
    secret = b"planted-\xff\xfe".decode(errors="surrogateescape")
    assert cleaned([secret, repr(secret), "%FF%FE"], {"A_KEY": secret}) == [
        "***",
        "'***'",
        "%FF%FE",
    ]


def test_the_console_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "planted-12345")
    plain, live = io.StringIO(), io.StringIO()
    for console in (Console(plain), LiveConsole(RichConsole(file=live, width=200))):
        console.say("say planted-12345")
        console.header("title", {"row": "planted-12345"}, "warning planted-12345")
        console.closing({"row": "planted-12345"})
    for stream in (plain, live):
        assert stream.getvalue().count("***") >= 4
        assert "planted" not in stream.getvalue()


class Named(SGD):
    """An optimizer with text in its groups."""

    def __init__(self, params: Any, lr: float, note: str = "") -> None:
        super().__init__(params, lr)
        self.param_groups[0]["note"] = note


def test_a_checkpoint_of_an_optimizer_holds_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_TOKEN", "planted-12345")
    note = "https://me:planted-login@host planted-12345"
    recipe = tiny_recipe(optimizer=partial(Named, lr=0.1, note=note))
    torch.save(capture(context_of(recipe), {}).optimizer, tmp_path / "optimizer.pt")
    assert b"planted" not in (tmp_path / "optimizer.pt").read_bytes()
    assert (
        torch.load(tmp_path / "optimizer.pt")["param_groups"][0]["note"] == "https://***@host ***"
    )


def test_wandb_gets_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MY_TOKEN", "WANDB_TAGS", "WANDB_NOTES", "WANDB_NAME"):
        monkeypatch.setenv(name, "planted-12345")
    shown: list[Any] = []
    monkeypatch.setattr(wandb, "start", lambda mode, run, data: shown.append(run))
    ctx = context_of(tiny_recipe())
    ctx = replace(ctx, data=replace(ctx.data, fallback="planted-12345"))
    loaded = LoadedRecipe(ctx.recipe, "tiny", "", "")
    options = RunOptions(project="of planted-12345")
    make_loggers(ctx, ResumePoint(RunDir(tmp_path)), loaded, options, ())
    assert shown[0].project == "of ***"
    assert "planted" not in str(shown)
    assert "planted" not in wandb._one_line(ValueError("planted-12345"))


def test_what_a_recipe_exits_with_shows_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_TOKEN", "planted-12345")
    (tmp_path / "mine.py").write_text("raise SystemExit('planted-12345')")
    main([str(tmp_path / "mine.py")])
    assert "planted" not in capsys.readouterr().err
