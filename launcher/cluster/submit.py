"""`launcher submit`: a training for Slurm, or manifests for Kubernetes. Imports nothing heavy."""

import argparse
import difflib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from launcher.cluster import kubernetes, sbatch, status
from launcher.cluster.job import JOBS_FOLDER, BatchJob, Sweep, safe_name
from launcher.errors import UserError
from launcher.utils.arguments import Parser, parse_seeds

Check = Callable[[Sequence[str]], None]
SLURM_SITE = Path("deploy") / "slurm_site.sh"
KUBERNETES_SITE = Path("deploy") / "kubernetes.yaml"
_USAGE = "launcher submit RECIPE [name=value ...] [options]"
_DESCRIPTION = """\
Train a recipe as a Slurm job, which comes back by itself after pre-emption and after its time
limit and then resumes:

  launcher submit recipes/simplecnn.py --nodes 2 --gpus 8 --time 4:00:00 epochs=20
  launcher submit recipes/simplecnn.py --sweep optimizer.lr=0.01,0.03,0.1
  launcher submit --status

Or print the manifests of the same job for Kubernetes:

  launcher submit recipes/simplecnn.py --nodes 2 --gpus 8 --kubernetes --dry-run"""
_PASSED_ON = (  # options of the launcher itself
    *("wandb", "project", "group", "checkpoint-every", "log-every", "max-steps", "resume-changed"),
    *("init-from", "skip", "timeout", "join-timeout"),
)
_TIME = re.compile(r"(?:(\d{1,8})-)?(\d{1,8}(?::\d{1,8}){0,2})")
_ANSWER = re.compile(r"^(?:Submitted batch job )?(\d+)(?:;\S+)?[^\S\n]*$", re.MULTILINE | re.ASCII)
_COMMA = re.compile(r",(?![^(\[]*[)\]])")  # outside of the brackets of a tuple


def main(words: Sequence[str], check: Check = lambda words: None) -> int:
    """Run the words behind `launcher submit`; returns the exit code.

    `check` raises `UserError` for the words of a run that could not begin; it runs before a job
    is queued, but not for --dry-run.
    """
    parser = _parser()
    arguments, unknown = parser.parse_known_intermixed_args(words)
    if arguments.help:
        sys.stdout.write(parser.format_help())
    elif unknown:
        raise _unknown_option(unknown[0], parser)
    elif arguments.status:
        status.show(Path(arguments.runs))
    elif not arguments.words:
        parser.error("no recipe is named")
    elif arguments.kubernetes:
        sys.stdout.write(_manifests(arguments))
    else:
        job = _batch_job(arguments)
        script = sbatch.render(job, _site_lines(arguments.site))
        if arguments.dry_run:
            sys.stdout.write(script)
        else:
            for index in range(len(job.run_names)):
                check(job.arguments(index))
            _submit(job, script)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
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
    add("--nodes", type=_number, default=1, metavar="N", help="machines (default: 1)")
    add("--gpus", type=_number, default=1, metavar="N", help="GPUs of each machine; 0: CPUs only")
    add("--processes", type=_number, default=1, metavar="N", help="with --gpus 0: on each machine")
    add("--cpus", type=_number, default=2, metavar="N", help="cores per process (default: 2)")
    add("--time", type=parse_time, help="of one attempt: 30 (minutes), 4:00:00, 1-0 (default: 1 h)")
    before = "save and stop so long before the end of that time (default: 120)"
    add("--save-before", type=_number, default=120, metavar="SECONDS", help=before)
    add("--sweep", type=_sweep, metavar="NAME=A,B", help="one run per value, in a job array")
    seeds = "one run per seed, in a job array; then launcher repeat --table sums them up"
    add("--seeds", type=parse_seeds, metavar="A-B,C", help=seeds)
    add("--name", help="of the job and of its run (default: the recipe's and the time)")
    add("--runs", default="runs", metavar="DIR", help="where run folders go (default: runs)")
    files = f"this site's own lines (default: {SLURM_SITE}, or {KUBERNETES_SITE})"
    add("--site", type=Path, metavar="FILE", help=files)
    kinds, manifests = ("job", "jobset"), "print manifests of a Job (the default) or a JobSet"
    add("--kubernetes", nargs="?", const="job", choices=kinds, metavar="KIND", help=manifests)
    for option in _PASSED_ON:
        add(f"--{option}", help="as for launcher RECIPE")
    return parser


def _batch_job(arguments: argparse.Namespace) -> BatchJob:
    recipe, *overrides = arguments.words
    sweep = arguments.sweep
    name = arguments.name or f"{safe_name(Path(recipe).stem)}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    if arguments.seeds:
        if sweep:
            raise UserError(
                "--seeds with --sweep",
                expected="one setting that differs from run to run",
                instead="submit it once for each value, with --seeds",
            )
        sweep = Sweep("seed", tuple(map(str, arguments.seeds)))
        arguments.group = arguments.group or name
    options = {option: getattr(arguments, option.replace("-", "_")) for option in _PASSED_ON}
    return BatchJob(
        recipe=recipe,
        name=name,
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        processes=arguments.processes,
        cpus=arguments.cpus,
        time=timedelta(hours=1) if arguments.time is None else arguments.time,
        save_before=timedelta(seconds=arguments.save_before),
        runs=arguments.runs,
        overrides=tuple(overrides),
        options=tuple(
            f"--{option}={value}" for option, value in options.items() if value is not None
        ),
        sweep=sweep,
    )


def _manifests(arguments: argparse.Namespace) -> str:
    """The input of `kubectl apply -f -`; kubectl has the address of the cluster and the login."""
    if not arguments.dry_run or arguments.time:
        raise UserError(
            f"--kubernetes {'with --time' if arguments.time else 'without --dry-run'}",
            expected="--dry-run, which prints the manifests, and no --time: the job has no limit",
            instead="type --kubernetes --dry-run | kubectl apply -f -",
        )
    job = _batch_job(arguments)
    site = kubernetes.read_site(arguments.site or KUBERNETES_SITE)
    return kubernetes.render(job, site, arguments.kubernetes)


def _unknown_option(word: str, parser: argparse.ArgumentParser) -> UserError:
    valid = [text for action in parser._actions for text in action.option_strings]
    option = word.partition("=")[0]
    near = difflib.get_close_matches(option, valid, n=1, cutoff=0.75)
    if "." in option:
        instead = f"type {word.removeprefix('--')}"
    elif near:
        instead = f"did you mean {near[0]}?"
    else:
        instead = f"write #SBATCH {option}=... into deploy/slurm_site.sh if it is sbatch's"
    return UserError(
        f"{option} after launcher submit",
        expected="its own options, and settings of the recipe as name=value",
        instead=f"{instead}; see launcher submit --help",
    )


def _number(text: str) -> int:
    if not re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number of at most 9 digits")
    return int(text)


def parse_time(text: str) -> timedelta:
    """A time as in Slurm: minutes, [hours:]minutes:seconds or days-hours[:minutes[:seconds]]."""
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
    return Sweep(setting, tuple(_COMMA.split(values)) if values else ())


def _site_lines(path: Path | None) -> str:
    """The text of the site's file: the named one, else the default one if it exists."""
    if path is None and not SLURM_SITE.exists():
        return ""
    path = path or SLURM_SITE
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = {FileNotFoundError: "no such file", UnicodeDecodeError: "not UTF-8"}
        raise UserError(
            f"--site {path} ({why.get(type(error)) or getattr(error, 'strerror', error)})",
            expected="a file with #SBATCH lines and commands",
            instead=f"name one, or edit {SLURM_SITE}",
        ) from None


def _submit(job: BatchJob, script: str) -> None:
    """Give the script to sbatch, and record the runs."""
    folder = Path(job.runs) / JOBS_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise UserError(
            f"--runs {job.runs} ({getattr(error, 'strerror', error)})",
            expected="a folder that can be written",
            instead="type --runs FOLDER",
        ) from None
    number = _sbatch(script)
    try:
        status.record(job, number)
    except OSError as error:
        raise UserError(
            f"job {number} is queued, but not written down in {folder} ({error.strerror})",
            expected="room for a record, by which --status finds it",
            instead=f"type scancel {number}, and submit it again where there is room",
        ) from None
    for run in job.run_names:
        log = folder / f"{run}-{number}-1.log"
        sys.stdout.write(f"job {number}: run {Path(job.runs) / run}, log {log}\n")


def _sbatch(script: str) -> str:
    """Submit the script; returns the number of the job."""
    try:
        done = subprocess.run(
            ("sbatch", "--parsable"),
            input=script.encode(errors="surrogateescape"),
            capture_output=True,
            env=_environment(),
        )
    except FileNotFoundError:
        raise UserError(
            "launcher submit on a machine without sbatch",
            expected="a machine from which Slurm takes jobs",
            instead="log in there, or add --dry-run to see the script",
        ) from None
    except OSError as error:
        raise UserError(
            f"sbatch cannot be run ({error.strerror})",
            expected="the sbatch of Slurm first on the PATH",
            instead="see which one it is: type command -v sbatch",
        ) from None
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        raise UserError(
            f"sbatch refused the job: {said or f'exit code {done.returncode}, without a word'}",
            expected="a job that this cluster can run",
            instead=f"change the options, or the site's lines in {SLURM_SITE}",
        )
    answer = done.stdout.decode(errors="replace")
    numbers = _ANSWER.findall(answer)  # a site's wrapper of sbatch may print more lines
    if not numbers:
        raise UserError(
            f"sbatch answered {answer.strip()[:200]!r}",
            expected="the number of the job",
            instead="see whether it is queued: type squeue --me",
        )
    return str(numbers[-1])


def _environment() -> dict[str, str]:
    """The environment without the variables of a job in which the user submits this one.

    Otherwise the new job would inherit them. Outside a job, Slurm's variables are the user's own.
    """
    inside = "SLURM_JOB_ID" in os.environ
    return {
        name: value
        for name, value in os.environ.items()
        if not (inside and name.startswith("SLURM_") and name != "SLURM_CONF")
    }
