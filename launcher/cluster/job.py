"""A training as a batch system starts it; scripts and manifests are made from this value."""

import re
from dataclasses import dataclass
from datetime import timedelta

from launcher.errors import UserError
from launcher.utils.text import run_of_seed

JOBS_FOLDER = "jobs"  # beside the run folders: records of the jobs, and their logs
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SETTING = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL | re.ASCII)


@dataclass(frozen=True)
class Sweep:
    """One run for each value of one setting."""

    setting: str
    values: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse an invalid setting, and equal or empty values."""
        shown = f"--sweep {self.setting}={','.join(self.values)}"
        example = "type --sweep optimizer.lr=0.01,0.03,0.1, for example"
        if not _SETTING.fullmatch(f"{self.setting}="):
            raise UserError(shown, expected="the name of a setting", instead=example)
        if not all(self.values) or len(set(self.values)) != len(self.values) or not self.values:
            raise UserError(shown, expected="values that differ, and none empty", instead=example)


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """One training (or one per value of `sweep`) on `nodes` machines with `gpus` each.

    One process per GPU; with `gpus=0`, `processes` of them per machine on its CPUs, each with
    `cpus` cores. `runs` is the folder of the run folders, `overrides` are settings of the recipe
    (`name=value`), `options` the launcher's own (`--wandb=off`). `save_before` is how long before
    the end of `time` a run saves and stops, so that the next attempt can go on.

    All text but the names may hold any character: scripts and manifests have to quote it.
    """

    recipe: str
    name: str
    nodes: int = 1
    gpus: int = 1
    processes: int = 1
    cpus: int = 2
    time: timedelta = timedelta(hours=1)
    save_before: timedelta = timedelta(minutes=2)
    runs: str = "runs"
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    sweep: Sweep | None = None

    def __post_init__(self) -> None:
        """Refuse values that no batch system could start."""
        _check_name(self.name)
        for option, least in (("nodes", 1), ("gpus", 0), ("processes", 1), ("cpus", 1)):
            _at_least(option, getattr(self, option), least)
        _check_times(self.time, self.save_before)
        if self.gpus and self.processes not in (1, self.gpus):
            raise UserError(
                f"--processes {self.processes} with --gpus {self.gpus}",
                expected="one process per GPU",
                instead="leave --processes out, or type --gpus 0 for a job on CPUs",
            )
        if self.recipe.startswith("-") or "=" in self.recipe or not self.recipe:
            raise UserError(
                f"the recipe {self.recipe!r}",
                expected="a recipe file, without = and a leading dash in its path",
                instead="name it first, or write ./ in front of it",
            )
        if not self.runs:
            raise UserError("--runs ''", expected="a folder", instead="type --runs runs")
        for word in self.overrides:
            if not _SETTING.fullmatch(word):
                raise UserError(
                    f"{word!r} after the recipe",
                    expected="settings as name=value",
                    instead="see launcher submit --help for the options",
                )
            if self.sweep and word.partition("=")[0] == self.sweep.setting:
                raise UserError(
                    f"{word}, of which each run of the sweep has its own value",
                    expected="other settings, which all runs have in common",
                    instead="leave it out",
                )

    @property
    def processes_per_node(self) -> int:
        """One per GPU, or as many as asked for on CPUs."""
        return self.gpus or self.processes

    @property
    def run_names(self) -> tuple[str, ...]:
        """The name of each run: the job's; of a sweep, followed by the number of the value.

        Of a sweep over seeds, by the seed: as `launcher repeat` calls them.
        """
        if self.sweep is None:
            return (self.name,)
        if self.sweep.setting == "seed":
            return tuple(run_of_seed(self.name, seed) for seed in self.sweep.values)
        return tuple(f"{self.name}-{index}" for index in range(len(self.sweep.values)))

    def arguments(self, index: int = 0) -> tuple[str, ...]:
        """What follows `python -m launcher` for one run; the same for each attempt of it."""
        swept = (f"{self.sweep.setting}={self.sweep.values[index]}",) if self.sweep else ()
        save_before = f"--save-before={int(self.save_before.total_seconds())}"
        run = (f"--runs={self.runs}", f"--name={self.run_names[index]}", "--resume")
        return ("train", self.recipe, *self.overrides, *swept, *self.options, save_before, *run)


def safe_name(text: str) -> str:
    """A similar name that folders and batch systems accept: `my recipe` -> `my-recipe`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:40] or "run"


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name == JOBS_FOLDER:
        raise UserError(
            f"--name {name!r}",
            expected="at most 63 letters, digits, dots, hyphens and underscores, a letter or "
            f"digit first, and not {JOBS_FOLDER!r}",
            instead=f"type --name {safe_name(name) if name != JOBS_FOLDER else 'my-run'}",
        )


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(
            f"--{option} {value}",
            expected=f"a whole number of at least {least}",
            instead=f"type --{option} {max(least, 1)}, for example",
        )


def _check_times(time: timedelta, save_before: timedelta) -> None:
    """Leave time for training in each attempt, even if Slurm's signal comes a minute early."""
    if save_before < timedelta(seconds=1) or time < 2 * save_before + timedelta(minutes=1):
        raise UserError(
            f"--time {time} with --save-before {int(save_before.total_seconds())} seconds",
            expected="--time of at least a minute and twice --save-before, which is at least 1",
            instead="type --time 4:00:00, for example, or a smaller --save-before",
        )
