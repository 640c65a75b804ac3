"""The events of a run that a logger is given; to add one, name its class in `make_loggers`."""

from launcher.config.plan import Plan
from launcher.training.metrics import Best, EpochReport, FinalReport, StepReport


class Logger:
    """Is given what a run measures, on rank 0. A subclass overrides the events that it needs.

    `name`, `mode` and `where` are its row in the header, and `notice` a line below it.
    """

    name = mode = where = notice = ""

    def step(self, report: StepReport, plan: Plan) -> None:
        """The training since the last report."""

    def epoch(self, report: EpochReport, plan: Plan, best: Best | None) -> None:
        """An epoch is complete; `best` is the best so far, this one perhaps."""

    def tested(self, report: FinalReport) -> None:
        """The test images at the end of a run that has chosen by validation images."""

    def finish(self, exit_code: int) -> None:
        """The end of the run."""
