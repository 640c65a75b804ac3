"""The step that gpu.py captures as a CUDA graph: called as it stands, it is the launcher's step."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch.optim import SGD, Adam, Optimizer

from benchmarks.competitors import Launched
from benchmarks.graphs import OneGraph, tensors_of
from launcher import NamedParameters, cosine
from launcher.data.sources import load
from tests.support.world_worker import BATCH, IMAGES, Small64, plain


@pytest.mark.parametrize("optimizer", [partial(Adam, lr=0.01), partial(SGD, lr=0.1, momentum=0.9)])
def test_its_losses_and_weights_are_the_launchers(
    optimizer: Callable[[NamedParameters], Optimizer],
) -> None:
    recipe = replace(plain, model=Small64, optimizer=optimizer, schedule=cosine, epochs=3)
    data, accelerator = load(recipe.data), Accelerator(cpu=True)
    launched, graph = Launched(recipe, data, accelerator), OneGraph(recipe, data, accelerator)
    for _ in range(2):
        expected = [report.loss for report in launched.reports(data.train, log_every=1)]
        assert [float(loss) for loss in graph.losses(data.train)] == expected
        pairs = zip(tensors_of(launched.ctx), tensors_of(graph.ctx), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert expected[-1] < expected[0]
    assert sorted(shape[0] for shape in graph.steps) == [IMAGES % BATCH, BATCH]
