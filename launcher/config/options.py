"""What belongs to one run of a recipe and not to the experiment."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.config.plan import EVERY_EPOCH, SaveInterval
from launcher.distributed.process_group import PATIENT, Timeouts


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of the command line; `host_facts` say where it runs, for the header."""

    runs: Path = Path("runs")
    name: str | None = None
    max_steps: int | None = None
    smoke: bool = False
    wandb: str | None = None
    project: str | None = None  # in W&B; None: the user's own default, else "launcher"
    log_every: int | None = None
    resume: bool = False
    resume_changed: tuple[str, ...] = ()
    checkpoint_every: SaveInterval = EVERY_EPOCH
    timeouts: Timeouts = PATIENT
    init_from: str | None = None
    skip: tuple[str, ...] = ()  # names of weights that init_from leaves out
    profile: bool = False
    host_facts: Mapping[str, str] = field(default_factory=dict)
