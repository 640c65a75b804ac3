"""A job as an sbatch script: a pure function from a `BatchJob` to text.

The script starts one task per process and passes USR1 (before the time limit) and TERM (at
pre-emption or a requeue) on to them. Their exit code alone decides what follows: 75 says that the
run stopped with its state saved, so the job goes back into the queue and its next attempt resumes
the run of the same name. All text of the user is quoted for the shell.
"""

import shlex
from datetime import timedelta

from launcher.cluster.job import JOBS_FOLDER, BatchJob
from launcher.errors import EXIT_SAVED

_WAIT = 60  # seconds for the other tasks to end after the first one

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


def render(job: BatchJob, site_lines: str = "") -> str:
    """The script. `site_lines` are `#SBATCH` lines, and commands to run before the training."""
    lines = site_lines.splitlines()
    site_directives = [line for line in lines if line.startswith("#SBATCH")]
    site_commands = [line for line in lines if not line.startswith("#")]
    directives = [f"#SBATCH {option}" for option in _sbatch_options(job)]
    return "\n".join(
        [
            "#!/bin/bash",
            *site_directives,
            *directives,  # after those of the site: the later of two equal options counts
            "",
            _head(job),  # opens the log, which also takes the output of the site's commands
            *site_commands,
            _body(job),  # uses variables of the head
        ]
    )


def _sbatch_options(job: BatchJob) -> list[str]:
    # The launcher knows the end of its time limit where Slurm tells it. This signal is for where
    # Slurm does not; it may come up to 60 s early.
    signal_before = max(1, int(job.save_before.total_seconds()) // 2)
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
        f"--signal=B:USR1@{signal_before}",
        "--output=/dev/null",  # the script writes a log for each attempt
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
        wait=_WAIT,
        saved=EXIT_SAVED,
    )


def _case(job: BatchJob, index: int) -> str:
    arguments = " ".join(map(shlex.quote, job.arguments(index)))
    return f"{index})\n  run={job.run_names[index]}\n  launcher_words=({arguments})\n  ;;"
