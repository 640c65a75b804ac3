"""Hides secrets in everything a run writes: config, logs, reports and checkpoints.

A secret is the value of an environment variable whose name says so (such as `API_KEY`), the user
and password of an address (before its @), and a query parameter whose name says so.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 8  # characters; hiding a shorter value would garble ordinary text

_SECRET_PARTS = "key|token|secret|password|passwd|passphrase|signature|credential"
_SECRET_WORDS = "auth|oauth|pass|pat|pwd|sig"  # whole words only: not PATH, not design
_NAME = re.compile(rf"{_SECRET_PARTS}|(?<![^\W_])(?:{_SECRET_WORDS})\d*$", re.IGNORECASE)
_LOGIN = re.compile(r"(\w[\w+.-]*://)[^\s/'\"]+@")  # a password may have an @ of its own
_PARAMETER = re.compile(
    rf"([?&](?:[^=&\s]*(?:{_SECRET_PARTS})[^=&\s]*|(?:[^=&\s]*[^=&a-z\s])?(?:{_SECRET_WORDS}))=)"
    r"[^&\s'\"]+",
    re.IGNORECASE,
)
_FOLDER = "PWD"  # the present folder, not a password


def redacted(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with its secrets hidden."""
    for secret in _secrets(environ):
        text = text.replace(secret, HIDDEN)
    return _PARAMETER.sub(rf"\1{HIDDEN}", _LOGIN.sub(rf"\1{HIDDEN}@", text))


def cleaned(value: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """A JSON value with the secrets in its strings hidden."""
    if isinstance(value, str):
        return redacted(value, environ)
    if isinstance(value, Mapping):
        return {key: cleaned(item, environ) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(item, environ) for item in value]
    return value


def _secrets(environ: Mapping[str, str]) -> list[str]:
    """Longest first: a secret may be part of another one."""
    named = (v for name, v in environ.items() if _NAME.search(name) and name != _FOLDER)
    found = (value for value in named if len(value) >= SHORTEST)
    return sorted(found, key=len, reverse=True)
