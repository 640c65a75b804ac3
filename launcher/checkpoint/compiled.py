"""What torch.compile has made, beside the checkpoints: for a requeue on a node without its cache.

torch keeps what it has compiled on the machine (TORCHINDUCTOR_CACHE_DIR, else a temporary folder);
its portable artifacts bring that to another one. They are code: whoever may write them decides what
is run. A checksum beside them would not tell who wrote both, and the owner of a copied file is
whoever copied it. So they are signed with a key that only this user can read, in the user's own
cache folder, which no run folder contains: what somebody else has compiled is passed over, in a
line, and compiled anew.
"""

import hmac
import json
import os
import platform
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator

from launcher.distributed.accelerator import device_name
from launcher.utils import atomic_write, json_text

NAME = "compiled.bin"  # a signature, a line of JSON that says for what it was compiled, artifacts
MOST_BYTES = 2**28  # of the file
KEY_BYTES, SIGNATURE_BYTES = 32, 32


class PassedOverError(Exception):
    """Why a file is not used, in one line."""


class CompiledCode:
    """The artifacts of one run folder."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        """`folder` is that of the run; nothing is read or written yet."""
        self._path, self._saved = folder / NAME, 0
        self._made_for = {
            "torch": torch.__version__,
            "device": device_name(accelerator).partition(",")[0],
            "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        }

    def load(self) -> str:
        """Fill torch's cache on this machine; returns a line for the user, if there is a file."""
        try:
            signed = _read_plain(self._path, MOST_BYTES)
        except FileNotFoundError:
            return ""
        except PassedOverError as error:
            return _passed_over(error)
        try:
            body = _verified(signed, _read_key(key_path()))
            line, _, artifacts = body.partition(b"\n")
            _refuse_other_machine(json_text.parse(line), self._made_for)
            if torch.compiler.load_cache_artifacts(artifacts) is None:
                raise PassedOverError("torch cannot read it")
        except FileNotFoundError:
            return _passed_over(PassedOverError("its key is not in this user's cache folder"))
        except Exception as error:  # also of torch, which fills its cache, and of the disk
            return _passed_over(error)
        return f"what was compiled before is taken from {NAME}"

    def save(self, folder: Path) -> None:
        """Write what this process has compiled so far, where it is more than the last time.

        Raises `OSError` where it cannot be written.
        """
        made = torch.compiler.save_cache_artifacts()
        if made is None or len(made[0]) == self._saved:
            return
        artifacts, _ = made
        self._saved = len(artifacts)
        body = json.dumps(self._made_for).encode() + b"\n" + artifacts
        if len(body) + SIGNATURE_BYTES > MOST_BYTES:
            raise OSError(f"it would have {len(body) / 2**20:.0f} MiB")
        atomic_write.replace(folder / NAME, _signature(body, own_key(key_path())) + body)


def _passed_over(error: Exception) -> str:
    kind = "" if isinstance(error, PassedOverError) else f"{type(error).__name__}: "
    return f"{NAME} is passed over, and all is compiled anew: {kind}{error}".splitlines()[0]


def key_path() -> Path:
    """Where the key of this user lies. Raises `OSError` for a user without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(f"no place for a key ({error})") from None
    return folder / "launcher" / "key"


def own_key(path: Path) -> bytes:
    """The key, which is made where there is none. Raises `OSError` where that fails."""
    try:
        return _read_key(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except PassedOverError as error:
        raise OSError(str(error)) from None
    # Linked into its place, so that of several runs that begin together one makes the key.
    temporary = path.with_name(f".key.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return _read_key(path)


def _read_key(path: Path) -> bytes:
    """Raises `PassedOverError` for what others may have written or read."""
    if not path.exists():
        raise FileNotFoundError(path)
    key = _read_plain(path, KEY_BYTES, is_private=True)
    if len(key) != KEY_BYTES:
        raise PassedOverError(f"{path} is no key; remove it, and one is made")
    return key


def _read_plain(path: Path, most: int, *, is_private: bool = False) -> bytes:
    """A file, neither followed where it is a link nor waited for where it is no file."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PassedOverError(f"{path.name} cannot be opened ({error.strerror})") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PassedOverError(f"{path.name} is no plain file")
        if is_private and (status.st_uid != os.geteuid() or status.st_mode & 0o077):
            raise PassedOverError(f"{path} is not this user's alone; type chmod 600 {path}")
        if status.st_size > most:
            raise PassedOverError(f"{path.name} has more than {most:,} bytes")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)


def _signature(body: bytes, key: bytes) -> bytes:
    return hmac.digest(key, body, "sha256")


def _verified(signed: bytes, key: bytes) -> bytes:
    signature, body = signed[:SIGNATURE_BYTES], signed[SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _signature(body, key)):
        raise PassedOverError("it is damaged, or another user's")
    return body


def _refuse_other_machine(theirs: object, ours: Mapping[str, str]) -> None:
    theirs = theirs if isinstance(theirs, dict) else {}
    for name, own in ours.items():
        if theirs.get(name) != own:
            raise PassedOverError(f"it was made for {name} {theirs.get(name)}, and here is {own}")
