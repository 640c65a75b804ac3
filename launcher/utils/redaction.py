"""Hides secrets in everything a run writes: config, logs, reports and checkpoints.

A secret is the value of an environment variable whose name says so (such as `API_KEY`), the user
and password of an address (before its @), and a query parameter whose name says so. The value of a
variable is hidden in each form in which an output may show it: on one line, escaped, or in a URL.
"""

import json
import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "***"
SHORTEST = 8  # characters; hiding a shorter value would garble ordinary text

_SECRET_PARTS = (
    "key|token|secret|password|passwd|passphrase|passcode|sshpass|signature|credential|authorization"
    "|bearer|jwt|cookie|webhook|auth_config|connection_?string"
)
# Whole words only: not PATH, not design.
_SECRET_WORDS = "auth|oauth|pass|pat|pwd|sig|creds?|dsn|sas|otp"
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
    named = (value for name, value in environ.items() if _is_secret(name))
    found = {form for value in named for form in _forms(value) if len(form) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


@cache
def _is_secret(name: str) -> bool:
    return name != _FOLDER and _NAME.search(name) is not None


@cache
def _forms(secret: str) -> frozenset[str]:
    """As it is, at the edges stripped, on one line; each in Python, JSON, a shell and a URL."""
    forms: set[str] = set()
    for text in (secret, secret.strip(), " ".join(secret.split())):
        forms |= {text, repr(text)[1:-1], text.replace("'", "'\"'\"'")}
        forms |= {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
        as_bytes = text.encode(errors="surrogateescape")  # as the environment had them
        forms |= {quote(as_bytes), quote(as_bytes, safe=""), quote_plus(as_bytes)}
    return frozenset(forms)
