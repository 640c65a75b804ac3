"""No secret in what a run leaves: config, logs, reports and checkpoints pass through here.

A secret is the value of an environment variable with a telling name, whatever stands before the @
of an address, and a telling parameter behind its question mark.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 8  # characters; a shorter value is no secret, and would be found everywhere

_TELLING = "key|token|secret|password|passwd|passphrase|signature|credential"
_TELLING_ALONE = "auth|oauth|pass|pat|pwd|sig"  # as whole words: PATH and design are no secrets
_NAME = re.compile(rf"{_TELLING}|(?<![^\W_])(?:{_TELLING_ALONE})\d*$", re.IGNORECASE)
_LOGIN = re.compile(r"(\w[\w+.-]*://)[^\s/'\"]+@")  # a password may have an @ of its own
_PARAMETER = re.compile(
    rf"([?&](?:[^=&\s]*(?:{_TELLING})[^=&\s]*|(?:[^=&\s]*[^=&a-z\s])?(?:{_TELLING_ALONE}))=)"
    r"[^&\s'\"]+",
    re.IGNORECASE,
)
_FOLDER = "PWD"  # where the shell is, and no password


def redacted(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with its secrets hidden."""
    for secret in _secrets(environ):
        text = text.replace(secret, HIDDEN)
    return _PARAMETER.sub(rf"\1{HIDDEN}", _LOGIN.sub(rf"\1{HIDDEN}@", text))


def cleaned(value: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """A JSON form with the secrets in its texts hidden."""
    if isinstance(value, str):
        return redacted(value, environ)
    if isinstance(value, Mapping):
        return {key: cleaned(item, environ) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(item, environ) for item in value]
    return value


def _secrets(environ: Mapping[str, str]) -> list[str]:
    """The longest first: one may be a part of another."""
    named = (v for name, v in environ.items() if _NAME.search(name) and name != _FOLDER)
    found = (value for value in named if len(value) >= SHORTEST)
    return sorted(found, key=len, reverse=True)
