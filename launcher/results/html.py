"""What all pages have in common: rendering from a template, and where a page may be written."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from launcher.errors import UserError
from launcher.utils import atomic_write

SCRIPT = "plotly.min.js"
GENERATOR = "launcher report"  # marks pages that may be replaced
_TEMPLATES = Path(__file__).parent / "templates"
_OWN_TEXTS = {"style": "report.css", "program": "report.js"}


def render(template: str, **values: Any) -> bytes:
    """Render a template; Jinja2 escapes all text, except the launcher's own style and script."""
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"percent": percent}
    environment.trim_blocks = environment.lstrip_blocks = True
    own = {
        name: Markup((_TEMPLATES / file).read_text(encoding="utf-8"))
        for name, file in _OWN_TEXTS.items()
    }
    values = {"generator": GENERATOR, "script": "", "reload_seconds": 0, **own, **values}
    text = environment.get_template(template).render(values)
    return text.encode(errors="replace")  # names of files may be no UTF-8


def percent(share: float | None) -> str:
    """`61.5 %` with a no-break space; a share just below 1 is not rounded to 100 %."""
    if share is None or share != share:
        return "unknown"
    if 0.9995 <= share < 1:
        return ">\xa099.9\xa0%"
    return "<\xa00.1\xa0%" if 0 < share < 0.0005 else f"{share:.1%}".replace("%", "\xa0%")


# Where a page goes


def write(path: Path, content: bytes, *, instead: str) -> None:
    """Write a page; raises `UserError` where it cannot, or where it would replace another file."""
    refuse_taken(path, instead=instead)
    try:
        atomic_write.replace(path, content, is_kept=False)
    except OSError as error:
        raise _unwritable(path, error, instead) from None


def refuse_taken(path: Path, *, instead: str) -> None:
    """Raise `UserError` where a page would replace something else."""
    try:
        is_free = not path.parent.is_symlink() and _is_own(path)
    except OSError as error:
        raise _unwritable(path, error, instead) from None
    if not is_free:
        raise UserError(
            f"{path}, which is not a page of launcher report, or lies behind a link",
            expected="a path that does not exist yet, or an earlier report",
            instead=instead,
        )


def write_script(folder: Path, *, instead: str) -> None:
    """Write Plotly's script beside the pages that use it."""
    from plotly.offline import get_plotlyjs

    script, path = get_plotlyjs().encode(), folder / SCRIPT
    try:
        if not path.is_file() or path.stat().st_size != len(script):
            atomic_write.replace(path, script, is_kept=False)
    except OSError as error:
        raise _unwritable(path, error, instead) from None


def _unwritable(path: Path, error: OSError, instead: str) -> UserError:
    return UserError(
        f"{path}, which cannot be written ({error.strerror})",
        expected="a folder that can be written, and room for it",
        instead=instead,
    )


def _is_own(path: Path) -> bool:
    """Whether the path is free or holds a page of the launcher."""
    if not path.exists():
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(1000)
