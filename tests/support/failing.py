"""A recipe that fails as FAIL says, on the rank FAIL_RANK, in its training passes FAIL_PASS."""

import math
import os
import signal
from dataclasses import replace

import torch
from torch import Tensor

from launcher.errors import UserError
from tests.support.resumable import Network
from tests.support.resumable import recipe as resumable

PASSES = {int(number) for number in os.environ.get("FAIL_PASS", "40").split(",")}
IS_HERE = os.environ.get("RANK", "0") == os.environ.get("FAIL_RANK", "1")


class Failing(Network):
    """Counts its forward passes in training."""

    passes = 0

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if self.training and IS_HERE and len(images) > 2:  # before training, two are tried
            Failing.passes += 1
            if Failing.passes in PASSES:
                if os.environ.get("FAIL") == "gradient":  # of a root at 0; the loss is as without
                    return logits + (logits - logits).abs().sum().sqrt()
                if os.environ.get("FAIL") == "skip":
                    *_, bias = self.parameters()
                    return logits.detach() + bias
                return logits * fail()
        return logits


def fail() -> float:
    match os.environ.get("FAIL"):
        case "raise":
            raise ArithmeticError("a fault of the recipe")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "nan":
            return math.nan
        case "unsteady":
            return float(torch.ones(1).put_(torch.tensor(0), torch.tensor(1.0)))
    return 1.0


if os.environ.get("FAIL") == "refuse" and IS_HERE:
    raise UserError("a disk without the images", expected="images", instead="mount it")

recipe = replace(resumable, model=Failing)
