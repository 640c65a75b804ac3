"""`launcher submit`: a training goes into the queue of a batch system. Imports nothing heavy."""

import argparse
import difflib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import NoReturn

from launcher.cluster import kubernetes, sbatch, status
from launcher.cluster.job import JOBS_FOLDER, BatchJob, Sweep, safe_name
from launcher.errors import UserError

SITE = Path("deploy") / "slurm_site.sh"
CLUSTER = Path("deploy") / "kubernetes.yaml"
_USAGE = "launcher submit RECIPE [name=value ...] [options]"
_DESCRIPTION = """\
Train a recipe as a Slurm job, which comes back by itself after pre-emption and after its time
limit and then resumes:

  launcher submit recipes/simplecnn.py --nodes 2 --gpus 8 --time 4:00:00 epochs=20
  launcher submit recipes/simplecnn.py --sweep optimizer.lr=0.01,0.03,0.1
  launcher submit --status

Or print the manifests of the same job for Kubernetes:

  launcher submit recipes/simplecnn.py --nodes 2 --gpus 8 --kubernetes --dry-run"""
_TIME = re.compile(r"(?:(\d{1,8})-)?(\d{1,8}(?::\d{1,8}){0,2})")
_BETWEEN_VALUES = re.compile(r",(?![^(\[]*[)\]])")  # not within the brackets of a tuple


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, expected=_USAGE, instead="see launcher submit --help")


def main(words: Sequence[str]) -> int:
    """Run the words behind `launcher submit`; returns the exit code."""
    parser = _parser()
    arguments, unknown = parser.parse_known_intermixed_args(words)
    if arguments.help:
        sys.stdout.write(parser.format_help())
        return 0
    if unknown:
        raise _unknown(unknown[0], parser)
    if arguments.status:
        sys.stdout.write(status.table(Path(arguments.runs), status.queue))
        return 0
    job = _job(arguments, parser)
    if arguments.kubernetes:
        return _print_manifests(job, arguments)
    script = sbatch.render(job, _site(arguments.site))
    if arguments.dry_run:
        sys.stdout.write(script)
        return 0
    return _submit(job, script)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="launcher submit",
        usage=_USAGE,
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument
    add("words", nargs="*", help=argparse.SUPPRESS)
    add("--help", "-h", action="store_true", help="this text")
    add("--status", action="store_true", help="state, attempt, epoch and best figure of each run")
    add("--dry-run", action="store_true", help="print the script instead of submitting it")
    add("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    add("--gpus", type=int, default=1, metavar="N", help="GPUs of each machine; 0: CPUs only")
    add("--processes", type=int, default=1, metavar="N", help="with --gpus 0: on each machine")
    add("--cpus", type=int, default=2, metavar="N", help="cores per process (default: 2)")
    add("--time", type=parse_time, help="of one attempt: 30 (minutes), 4:00:00, 1-0 (default: 1 h)")
    before = "save and stop so long before the end of that time (default: 120)"
    add("--save-before", type=int, default=120, metavar="SECONDS", help=before)
    add("--sweep", type=_sweep, metavar="NAME=A,B", help="one run per value, in a job array")
    add("--name", help="of the job and of its run (default: the recipe's and the time)")
    add("--runs", default="runs", metavar="DIR", help="where run folders go (default: runs)")
    files = f"this site's own lines (default: {SITE}, or {CLUSTER})"
    add("--site", type=Path, metavar="FILE", help=files)
    kinds, manifests = ("job", "jobset"), "print manifests of a Job (the default) or a JobSet"
    add("--kubernetes", nargs="?", const="job", choices=kinds, metavar="KIND", help=manifests)
    for option in _PASSED_ON:
        add(f"--{option}", help="as for launcher RECIPE")
    return parser


_PASSED_ON = (
    *("wandb", "project", "checkpoint-every", "log-every", "max-steps", "resume-changed"),
    *("init-from", "timeout", "join-timeout"),
)


def _job(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> BatchJob:
    if not arguments.words:
        parser.error("no recipe is named")
    recipe, *overrides = arguments.words
    given = {option: getattr(arguments, option.replace("-", "_")) for option in _PASSED_ON}
    return BatchJob(
        recipe=recipe,
        name=arguments.name or f"{safe_name(Path(recipe).stem)}-{datetime.now():%Y%m%d-%H%M%S-%f}",
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        processes=arguments.processes,
        cpus=arguments.cpus,
        time=timedelta(hours=1) if arguments.time is None else arguments.time,
        save_before=timedelta(seconds=arguments.save_before),
        runs=arguments.runs,
        overrides=tuple(overrides),
        options=tuple(f"--{option}={text}" for option, text in given.items() if text is not None),
        sweep=arguments.sweep,
    )


def _print_manifests(job: BatchJob, arguments: argparse.Namespace) -> int:
    """Manifests for `kubectl apply -f -`, which knows the cluster and the user's rights."""
    if not arguments.dry_run or arguments.time:
        raise UserError(
            f"--kubernetes {'with --time' if arguments.time else 'without --dry-run'}",
            expected="manifests to print, of a job that has as long as it needs",
            instead="type --kubernetes --dry-run | kubectl apply -f -",
        )
    site = kubernetes.read_site(arguments.site or CLUSTER)
    sys.stdout.write(kubernetes.render(job, site, arguments.kubernetes))
    return 0


def _unknown(word: str, parser: argparse.ArgumentParser) -> UserError:
    """Name all options, and the nearest first."""
    valid = [text for action in parser._actions for text in action.option_strings]
    option = word.partition("=")[0]
    near = difflib.get_close_matches(option, valid, n=1) if "." not in option else []
    hint = f"type {near[0]}, or" if near else "if it is a setting, type it as name=value, or"
    return UserError(
        f"{option} after launcher submit",
        expected=f"one of {', '.join(valid)}",
        instead=f"{hint} see launcher submit --help",
    )


def parse_time(text: str) -> timedelta:
    """A time as Slurm takes it: minutes, [hours:]minutes:seconds, days-hours[:minutes:seconds]."""
    found = _TIME.fullmatch(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time like 30 (minutes), 4:00:00 or 1-12")
    days, clock = found.groups()
    numbers = [int(number) for number in clock.split(":")]
    if days:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 1:
        hours, minutes, seconds = 0, *numbers, 0
    else:
        hours, minutes, seconds = [0, *numbers][-3:]
    return timedelta(days=int(days or 0), hours=hours, minutes=minutes, seconds=seconds)


def _sweep(text: str) -> Sweep:
    setting, _, values = text.partition("=")
    return Sweep(setting, tuple(_BETWEEN_VALUES.split(values)) if values else ())


def _site(path: Path | None) -> str:
    """The site's own lines: of the file that is named, or else of the usual one if it is there."""
    try:
        return (path or SITE).read_text(encoding="utf-8")
    except FileNotFoundError:
        if path is None:
            return ""
        raise _unreadable(path, "no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path or SITE, getattr(error, "strerror", "not UTF-8")) from None


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(
        f"--site {path} ({why})",
        expected="a file with #SBATCH lines and commands",
        instead=f"name one, or edit {SITE}",
    )


def _submit(job: BatchJob, script: str) -> int:
    """Hand the script to sbatch, and write down what was submitted."""
    folder = Path(job.runs) / JOBS_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--runs {job.runs} ({error.strerror})",
            expected="a folder that can be written",
            instead="type --runs FOLDER",
        ) from None
    number = _sbatch(script)
    status.remember(job, number)
    for run in job.run_names:
        sys.stdout.write(
            f"job {number}: run {Path(job.runs) / run}, log {folder / run}-{number}-1.log\n"
        )
    return 0


def _environment() -> dict[str, str]:
    """Without what describes the job from which the user may submit: it would go for the new one's.

    Outside a job, variables of Slurm are the user's own.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if "SLURM_JOB_ID" not in os.environ or not name.startswith("SLURM_") or name == "SLURM_CONF"
    }


def _sbatch(script: str) -> str:
    """The number of the job."""
    data = script.encode(errors="surrogateescape")
    try:
        done = subprocess.run(
            ("sbatch", "--parsable"), input=data, capture_output=True, env=_environment()
        )
    except FileNotFoundError:
        raise UserError(
            "launcher submit on a machine without sbatch",
            expected="a machine from which Slurm takes jobs",
            instead="log in there, or add --dry-run to see the script",
        ) from None
    if done.returncode:
        raise UserError(
            f"sbatch refused the job: {done.stderr.decode(errors='replace').strip()}",
            expected="a job that this cluster can run",
            instead=f"change the options, or the site's lines in {SITE}",
        )
    return done.stdout.decode().strip().partition(";")[0]
