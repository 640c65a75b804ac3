"""What a recipe says that it reaches: a figure that a command can measure again."""

from dataclasses import dataclass

from launcher.errors import UserError

METRICS = ("test/accuracy", "test/accuracy_tta")


@dataclass(frozen=True)
class Claim:
    """The mean of `metric` after the last epoch, over so many `runs` of different seeds.

    `metric` is test/accuracy or, with test-time augmentation, test/accuracy_tta; `value` and its
    standard deviation `std` are parts of 1. `seconds` is the mean time of training on the
    `hardware`. `settings` are what was changed of the recipe, as on the command line.
    """

    metric: str
    value: float
    std: float | None = None
    runs: int = 1
    hardware: str = ""
    seconds: float | None = None
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be measured again."""
        if self.metric not in METRICS:
            raise UserError(
                f"a claim of {self.metric!r}",
                expected=" or ".join(METRICS),
                instead='write Claim("test/accuracy", 0.95, std=0.001, runs=3), for example',
            )
        if not 0 < self.value <= 1 or self.runs < 1 or not (self.std is None or self.std >= 0):
            raise UserError(
                f"a claim of {self.value} +- {self.std} in {self.runs} runs",
                expected="a fraction from 0 to 1, its standard deviation, and a number of runs",
                instead='write Claim("test/accuracy", 0.95, std=0.001, runs=3), for example',
            )
