"""BatchNorm over all ranks, on any device: torch's SyncBatchNorm is for GPUs alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional


def synchronize_batch_norm() -> None:
    """From now on, BatchNorm of this process normalizes by the images of all ranks in training."""
    functional.batch_norm = _over_ranks(functional.batch_norm)  # every BatchNorm layer calls it


def _over_ranks(alone: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def batch_norm(
        images: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return alone(images, running_mean, running_var, weight, bias, training, momentum, eps)
        mean, variance, count = _moments(images)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean), momentum)
                unbiased = variance * count / (count - 1)
                running_var.lerp_(unbiased.to(running_var), momentum)
        shape = (1, -1, *(1 for _ in images.shape[2:]))
        made = (images - mean.view(shape)) * (variance + eps).rsqrt().view(shape)
        if weight is not None:
            made = made * weight.view(shape)
        return made if bias is None else made + bias.view(shape)

    return batch_norm


def _moments(images: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and variance of each channel over all ranks, and the number of values."""
    dimensions = [0, *range(2, images.ndim)]
    own = images.new_tensor([images.numel() / images.shape[1]])
    count = float(_Sum.apply(own))
    mean = _Sum.apply(images.sum(dimensions)) / count
    centred = images - mean.view(1, -1, *(1 for _ in images.shape[2:]))
    squares = _Sum.apply(centred.square().sum(dimensions))
    return mean, squares / count, count


class _Sum(torch.autograd.Function):
    """The sum over the ranks, with a gradient that is summed over them as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        distributed.all_reduce(total)
        return total
