"""What belongs to one run of a recipe and not to the experiment."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.config import annotations
from launcher.config.plan import EVERY_EPOCH, SaveInterval
from launcher.distributed.process_group import PATIENT, Timeouts
from launcher.errors import UserError

WANDB_MODES = ("online", "offline", "off")
MOST_BYTES = 200  # of a run's name: file systems take 255, and W&B adds to it


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of the command line; `host_facts` say where it runs, for the header."""

    runs: Path = Path("runs")
    name: str | None = None
    max_steps: int | None = None
    smoke: bool = False
    wandb: str | None = None
    wandb_model: bool = False  # whether W&B gets the weights
    project: str | None = None  # in W&B; None: the user's own default, else "launcher"
    group: str | None = None  # in W&B
    log_every: int | None = None
    resume: bool = False
    resume_changed: tuple[str, ...] = ()
    checkpoint_every: SaveInterval = EVERY_EPOCH
    timeouts: Timeouts = PATIENT
    init_from: str | None = None
    skip: tuple[str, ...] = ()  # names of weights that init_from leaves out
    profile: bool = False
    report: bool = True
    host_facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def makes_report(self) -> bool:
        """Whether a page is written at the end: not of what is no training."""
        return self.report and not self.smoke and not self.profile

    def __post_init__(self) -> None:
        """Refuse a name that cannot be a folder's, and a run without a step."""
        for own, hint in annotations.ill_typed(self):
            raise UserError(
                f"{own.name}={getattr(self, own.name)!r}",
                expected=f"a value of type {annotations.describe(hint)}",
                instead=f"write another value for {own.name}, or leave it out",
            )
        if self.wandb not in (None, *WANDB_MODES):
            raise UserError(
                f"wandb={self.wandb!r}",
                expected=" or ".join(map(repr, WANDB_MODES)),
                instead="write wandb='off', or leave it out",
            )
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(
                f"max_steps={self.max_steps}",
                expected="at least 1",
                instead="leave it out to train all steps",
            )
        name = self.name
        if name is None:
            return
        plain = name.isprintable() and name == Path(name).name and not name.startswith(".")
        if not plain or not name.strip() or len(name.encode()) > MOST_BYTES:
            raise UserError(
                f"--name {name!r}",
                expected=f"a plain name of at most {MOST_BYTES} bytes, without slashes, control "
                "characters or a leading dot",
                instead="type --name my-run --runs FOLDER",
            )
