"""A job -> the text of its sbatch script: a pure function.

The script starts one task per process and passes USR1 (before the time limit) and TERM (at
pre-emption or a requeue) on to them. What happens then is decided by their exit code alone: 75 says
that the run stopped with its state saved, so the job goes back into the queue and its next attempt
resumes the run of the same name. Every text of the user's is one quoted word of the shell.
"""

import shlex
from datetime import timedelta

from launcher.cluster.job import JOBS_FOLDER, BatchJob
from launcher.errors import EXIT_SAVED

_AFTER_FIRST = 60  # seconds that the other tasks have when the first has ended

_HEAD = """\
jobs={jobs}
launcher_attempt=$((${{SLURM_RESTART_COUNT:-0}} + 1))
job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
case ${{SLURM_ARRAY_TASK_ID:-0}} in
{cases}
esac
mkdir -p -- "$jobs" && exec >>"$jobs/$run-$job-$launcher_attempt.log" 2>&1 || exit 1
echo "=== attempt $launcher_attempt of job $job on $SLURM_JOB_NODELIST"

srun_options=()"""

_BODY = """\
export OMP_NUM_THREADS={cpus}
{device}again=yes
pass_on() {{
  again=yes
  kill -USR1 "$training" 2>/dev/null || :
}}
trap pass_on USR1 TERM
srun --nodes={nodes} --ntasks-per-node={tasks} --cpus-per-task={cpus} --wait={wait} \\
  "${{srun_options[@]}}" python -m launcher "${{launcher_words[@]}}" &
training=$!
while [ "$again" ]; do  # a signal ends wait, but not the training
  again= code=0
  wait "$training" || code=$?  # so, because the site may have said set -e
done

if [ "$code" = {saved} ]; then
  # One task of an array has the number of the whole array for its own.
  own=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
  own=${{own:-$SLURM_JOB_ID}}
  case $(scontrol show job "$own") in
  *JobState=RUNNING*)  # else it was cancelled, or is back in the queue already
    scontrol requeue "$own" && echo "=== saved; waiting for attempt $((launcher_attempt + 1))" ;;
  esac
fi
exit "$code"
"""


def render(job: BatchJob, site: str = "") -> str:
    """The script. `site` is the site's own: `#SBATCH` lines, and commands before the training."""
    lines = site.splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    commands = [line for line in lines if not line.startswith("#")]
    own = [f"#SBATCH {option}" for option in _options(job)]  # later lines win over the site's
    # The log is open before the commands of the site run, so that what they say is in it; what is
    # needed behind them has names that they do not use.
    return "\n".join(["#!/bin/bash", *directives, *own, "", _head(job), *commands, _body(job)])


def _options(job: BatchJob) -> list[str]:
    # The launcher knows the end of its time. If it cannot ask, this warns it; up to 60 s early.
    warning = max(1, int(job.save_before.total_seconds()) // 2)
    return [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.processes_per_node}",
        *([f"--gpus-per-node={job.gpus}"] if job.gpus else []),
        f"--cpus-per-task={job.cpus}",
        f"--time={_time(job.time)}",
        *([f"--array=0-{len(job.sweep.values) - 1}"] if job.sweep else []),
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{warning}",
        "--output=/dev/null",  # the script opens a log for each attempt
    ]


def _time(time: timedelta) -> str:
    """Days, hours, minutes and seconds as Slurm writes them."""
    minutes, seconds = divmod(int(time.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24}-{hours % 24:02}:{minutes:02}:{seconds:02}"


def _head(job: BatchJob) -> str:
    return _HEAD.format(
        jobs=shlex.quote(f"{job.runs}/{JOBS_FOLDER}"),
        cases="\n".join(_case(job, index) for index in range(len(job.run_names))),
    )


def _body(job: BatchJob) -> str:
    return _BODY.format(
        cpus=job.cpus,
        device="" if job.gpus else "export ACCELERATE_USE_CPU=true\n",
        nodes=job.nodes,
        tasks=job.processes_per_node,
        wait=_AFTER_FIRST,
        saved=EXIT_SAVED,
    )


def _case(job: BatchJob, index: int) -> str:
    words = " ".join(shlex.quote(word) for word in job.words(index))
    return f"{index})\n  run={job.run_names[index]}\n  launcher_words=({words})\n  ;;"
