"""The weights of a network in a file: written, read, compared with the network, and put into it.

`load_initial_weights` takes files of others as well: state dicts of torch, torchvision and timm.
"""

import hashlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from launcher.errors import UserError
from launcher.utils import atomic_write
from launcher.utils.text import count, is_named

Tensors = dict[str, Tensor]
UNREADABLE = (OSError, SafetensorError, RuntimeError, EOFError, KeyError, ValueError)
MOST_SKIPPED_PARTS = 3  # that a message tells to skip: with more, it is another model
# What DistributedDataParallel and torch.compile put before the names.
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")


def save_weights(network: nn.Module, path: Path) -> None:
    """Write weights and buffers as safetensors under `path`, replacing what was there at once."""
    atomic_write.replace(path, save(on_host(network.state_dict())))


def digest_of_file(path: Path) -> str:
    """Its SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(network: nn.Module, path: Path) -> bool:
    """Put saved weights into a network; raises `UserError` unless they fit it.

    Returns whether they have the types of the network's own, so that no number was rounded.
    """
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    own = network.state_dict()
    if not _resizes(network, own, saved):
        _refuse_differing(path, own, saved)
        network.load_state_dict(_with_versions(saved, network))
    return all(saved[name].dtype == tensor.dtype for name, tensor in own.items())


def _resizes(network: nn.Module, own: Tensors, saved: Tensors) -> bool:
    """Load what differs in the shapes of buffers alone, if the network resizes them for it.

    As an observer of a quantization does, which has found its channels in the first pass.
    """
    differing = {name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape}
    buffers = {name for name, _ in network.named_buffers()}
    if not differing or own.keys() != saved.keys() or differing - buffers:
        return False
    try:
        network.load_state_dict(_with_versions(saved, network))
    except RuntimeError:  # a size mismatch
        return False
    return all(value.shape == saved[name].shape for name, value in network.state_dict().items())


def _with_versions(tensors: Tensors, network: nn.Module) -> Tensors:
    """With what modules may ask of a state_dict and no file keeps: the version of their format.

    What is loaded has passed for a state of this very network, so the versions are its own.
    """
    dressed = OrderedDict(tensors)
    dressed._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    return dressed


def load_initial_weights(network: nn.Module, path: Path, skip: Sequence[str] = ()) -> list[str]:
    """Put weights of the launcher, torchvision or timm into a network; returns what is skipped.

    Names that are in `skip`, or lie below one of these, keep what the network began with. Raises
    `UserError` unless the others fit, and for a word of `skip` that names nothing.
    """
    own, saved = network.state_dict(), _read_weights(path)
    names = {**own, **saved}
    if unknown := [word for word in skip if not any(is_named(name, [word]) for name in names)]:
        parts = sorted({name.split(".")[0] for name in names})
        raise UserError(
            f"--skip {unknown[0]}, which names nothing in {path} or the model",
            expected="names of parameters, or their beginnings up to a dot",
            instead=f"type --skip {','.join(parts[-1:])}, for example; there are "
            + ", ".join(parts),
        )
    skipped = sorted(name for name in names if is_named(name, skip))
    kept = {name: tensor for name, tensor in saved.items() if name not in skipped}
    missing = {name: tensor for name, tensor in own.items() if name in skipped}
    _refuse_differing(path, own, {**kept, **missing}, "type --skip {}, or ")
    network.load_state_dict(_with_versions(kept, network), strict=False)
    return skipped


def _read_weights(path: Path) -> Tensors:
    """The tensors of a file, under the names that the network gave them before it was wrapped."""
    try:
        if path.suffix in (".pth", ".pt"):
            saved = torch.load(path, map_location="cpu", weights_only=True)
        else:
            saved = load_file(path)
    except pickle.UnpicklingError:  # whose message tells the reader to switch the check off
        raise _unreadable(path, "torch.load(FILE, weights_only=True) refuses it") from None
    except UNREADABLE as error:
        raise _unreadable(path, error) from None
    for key in ("state_dict", "model"):
        if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping):
            saved = saved[key]
    if not isinstance(saved, Mapping) or not all(
        isinstance(name, str) and torch.is_tensor(value) for name, value in saved.items()
    ):
        raise _unreadable(path, f"it holds a {type(saved).__name__} that is no state_dict()")
    return {_WRAPPERS.sub("", name): tensor for name, tensor in saved.items()}


def _unreadable(path: Path, error: object) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"weights in {path} that cannot be read ({reason})",
        expected="a file in the safetensors format, or .pth or .pt with nothing but tensors",
        instead="name a run, or the final.safetensors of one, or write the file with "
        "torch.save(model.state_dict(), FILE)",
    )


def _refuse_differing(
    path: Path, own: Mapping[str, Tensor], saved: Mapping[str, Tensor], skipping: str = ""
) -> None:
    """Raise `UserError` for other names or shapes; `skipping` says how these could be left out."""
    differing = [n for n in {**own, **saved} if _shape(own, n) != _shape(saved, n)]
    if differing:
        name = differing[0]
        parts = dict.fromkeys(name.rpartition(".")[0] or name for name in differing)
        short = skipping.format(",".join(parts)) if len(parts) <= MOST_SKIPPED_PARTS else ""
        raise UserError(
            f"{path} has {name} {_shape(saved, name)}, the model {_shape(own, name)}"
            f" ({count(len(differing), 'such difference')})",
            expected="weights of the same model",
            instead=f"{short}name a run of this model, or change the model's settings to fit",
        )


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    """`(16, 3, 3, 3)`, or `nothing`."""
    return str(tuple(tensors[name].shape)) if name in tensors else "nothing"


def on_host(tensors: Mapping[str, Tensor]) -> Tensors:
    """Copies in the ordinary memory layout: safetensors refuses strided and shared tensors."""
    return {name: copy_to_host(value).contiguous() for name, value in tensors.items()}


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy in the tensor's own memory layout, also of what lies on the host already."""
    return tensor.detach().to("cpu", copy=True)
