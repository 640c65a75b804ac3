"""Where the network looked: Grad-CAM (Selvaraju et al., 2017) over the worst mistakes of a run.

Only `launcher report --gradcam` imports this: it needs torch, and runs the recipe's code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate

from launcher.checkpoint.outcomes import WORST, Outcomes
from launcher.checkpoint.run_files import RunFiles
from launcher.errors import UserError
from launcher.results.export import evaluated_images
from launcher.results.load import TrainedRun, load_run

STRONGEST = 0.75  # opacity of the colour where the map is highest
COLOUR = (255.0, 70.0, 0.0)


@dataclass(frozen=True)
class Looks:
    """Pictures overlaid with the maps of one layer, in the order of the worst mistakes."""

    layer: str
    pictures: NDArray[Any]  # uint8 (k, h, w, 3)


def of_mistakes(files: RunFiles) -> Looks | None:
    """Grad-CAM of each of the worst mistakes, for its predicted class; None where there are none.

    Raises `UserError` for a network without a convolution, or one that is not there.
    """
    best = files.best
    if best is None or not len(best.mistakes):
        return None
    run = load_run(files.path)
    places = best.mistakes[:WORST]
    pixels = _pixels(files, run, best, places)
    answers = torch.from_numpy(best.predicted[places].astype("int64"))
    layer, maps = looked_at(run.model, run.normalize(pixels), answers)
    return Looks(layer, overlaid(pixels.numpy(), maps.numpy()))


def looked_at(network: nn.Module, images: Tensor, classes: Tensor) -> tuple[str, Tensor]:
    """The name of the last convolution whose output has several pixels, and its maps from 0
    to 1 `(n, h, w)` for these classes.
    """
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            outputs.append((name, output))
            return output.clone()  # what follows may change it in place

        return hook

    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    handles = [module.register_forward_hook(keep(name)) for name, module in layers]
    try:
        with torch.enable_grad():
            scores = network(images.detach().requires_grad_())
            own = scores.gather(1, classes.to(scores.device)[:, None]).sum()
            found = [(n, o) for n, o in outputs if o.ndim == 4 and o.shape[2] * o.shape[3] > 1]
            if not found:
                raise UserError(
                    f"--gradcam of {type(network).__name__}",
                    expected="a network with a convolution whose output has several pixels",
                    instead="leave out --gradcam",
                )
            name, output = found[-1]
            (gradient,) = torch.autograd.grad(own, output)
    finally:
        for handle in handles:
            handle.remove()
    weighted = gradient.mean((2, 3), keepdim=True) * output
    maps = weighted.sum(1, keepdim=True).relu().detach().float()
    size = (images.shape[2], images.shape[3])
    maps = interpolate(maps, size, mode="bilinear", align_corners=False)[:, 0]
    highest = maps.amax((1, 2), keepdim=True)
    return name, torch.where(highest > 0, maps / highest, maps).cpu()


def overlaid(pixels: NDArray[Any], maps: NDArray[Any]) -> NDArray[Any]:
    """Grey pictures of `(k, h, w, c)`, in colour where the maps are high."""
    depth = 3 if pixels.shape[-1] == 3 else 1
    grey = pixels[..., :depth].mean(axis=-1, keepdims=True)
    share = STRONGEST * maps[..., None]
    return (grey * (1 - share) + numpy.array(COLOUR) * share).round().astype(numpy.uint8)


def _pixels(files: RunFiles, run: TrainedRun, best: Outcomes, places: NDArray[Any]) -> Tensor:
    """Pictures in the network's size: those that the run kept, unless they were scaled down."""
    kept = {place: number for number, place in enumerate(best.pictured.tolist())}
    if best.pictures.shape[1:] == run.image_shape and all(p in kept for p in places.tolist()):
        return torch.from_numpy(best.pictures[[kept[place] for place in places.tolist()]])
    images, _ = evaluated_images(files, run, None)
    return images.pixels(places.tolist())
