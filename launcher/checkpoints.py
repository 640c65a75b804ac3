"""Weights to disk: whole or not at all."""

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import nn


def save_weights(network: nn.Module, path: Path) -> None:
    """Write weights and buffers as safetensors under `path`, replacing what was there at once."""
    # Copies in the ordinary memory layout: safetensors refuses strided and shared tensors.
    tensors = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
