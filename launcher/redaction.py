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

_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL", re.IGNORECASE)
_LOGIN = re.compile(r"(\w[\w+.-]*://)[^\s/@'\"]+@")
_PARAMETER = re.compile(
    r"([?&][^=&\s]*(?:key|token|secret|password|signature|credential)[^=&\s]*=)[^&\s'\"]+",
    re.IGNORECASE,
)


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
    found = (v for name, v in environ.items() if _NAME.search(name) and len(v) >= SHORTEST)
    return sorted(found, key=len, reverse=True)
