"""The split of a profile in words: shares, milliseconds, and one line of advice."""

from collections.abc import Mapping
from dataclasses import dataclass

# More than this share of an epoch is worth a word: what, from which share on, what to do.
_LIMITS = {
    "data": (0.15, "fewer or simpler augmentations, or more threads per process"),
    "communication": (0.15, "a larger data.batch_size, or fewer processes on a faster link"),
    "update": (0.30, "a larger data.batch_size, so that there are fewer updates"),
    "evaluation": (0.25, "fewer test images"),
    "logging": (0.02, "a larger --log-every, or --wandb off"),
    "checkpoints": (0.02, "a larger --checkpoint-every"),
}
IDLE = 0.6  # a GPU that computes for less of the time is waiting for work


@dataclass(frozen=True)
class Split:
    """Seconds of an epoch by what they are spent on; `step` are those of a step as it runs.

    `busy` is the fraction of the time in which a GPU computed, None without one.
    """

    seconds: Mapping[str, float]
    steps: int
    step: float
    busy: float | None = None

    def shares(self) -> dict[str, float]:
        """Fractions of the epoch, the largest first."""
        total = sum(self.seconds.values())
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        return {name: seconds / total for name, seconds in ordered}

    def rows(self, precision: str) -> dict[str, str]:
        """The closing table."""
        rows = {
            name: f"{share:6.1%}  {self.seconds[name]:9.3f} s an epoch"
            f"  {self.seconds[name] / self.steps * 1e3:9.3f} ms a step"
            for name, share in self.shares().items()
        }
        rows["a step"] = f"{self.step * 1e3:.3f} ms without the clock"
        if self.busy is not None:
            rows["the GPU"] = f"computes for {self.busy:.0%} of the traced steps"
        return rows | {"advice": advice(self.shares(), self.busy, precision)}


def advice(shares: Mapping[str, float], busy: float | None, precision: str) -> str:
    """What to try first: where a share is furthest over its limit, else how to compute faster."""
    over = {name: shares.get(name, 0.0) / limit for name, (limit, _) in _LIMITS.items()}
    worst = max(over, key=lambda name: over[name])
    if over[worst] >= 1:
        return f"{worst} takes {shares[worst]:.0%}: try {_LIMITS[worst][1]}"
    if busy is not None and busy < IDLE:
        return "the GPU waits for the CPU: try a larger data.batch_size, or compile=reduce-overhead"
    compute = shares.get("forward", 0.0) + shares.get("backward", 0.0)
    usual = f"forward and backward take {compute:.0%}, as they should"
    if precision.startswith("fp32"):
        return f"{usual}: try precision=bf16"
    return f"{usual}: only a smaller model or a faster device takes less"
