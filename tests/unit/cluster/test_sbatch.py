"""The sbatch script: its options, and that no text of the user's can break out of it."""

import os
import random
import subprocess
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from launcher.cluster.job import BatchJob, Sweep
from launcher.cluster.sbatch import render

JOB = BatchJob(recipe="recipes/simplecnn.py", name="first")
JOBS = 1000
BATCH = 50  # scripts that one bash runs, to save the starts
HOSTILE = (
    *(" ", "\n", "\t", "'", '"', "`touch HIT`", "$(touch HIT)", "${HOME}", "$$", ";", "&", "|"),
    *(
        "touch HIT",
        "\\",
        "\\\n",
        "#",
        "#SBATCH --wrap=x\n",
        "!",
        "*",
        "~",
        "%j",
        "{",
        "}",
        "(",
        ")",
    ),
    *("<", ">HIT", "--help", "-", "=", ",", "EOF\n", "esac", "é", "名", "\u2028", "\x1b[0m", "\r"),
    *("a", "0.1", "\udcff"),  # the last: a byte that is no UTF-8, as Python keeps it
)


def directives(script: str) -> list[str]:
    return [line for line in script.splitlines() if line.startswith("#SBATCH")]


def test_a_job_on_gpus() -> None:
    job = replace(JOB, nodes=2, gpus=8, cpus=4, time=timedelta(days=1, hours=4, minutes=5))
    assert directives(render(job)) == [
        "#SBATCH --job-name=first",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --time=1-04:05:00",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR1@60",
        "#SBATCH --output=/dev/null",
    ]
    assert "ACCELERATE_USE_CPU" not in render(job)
    assert "export OMP_NUM_THREADS=4" in render(job)


def test_a_job_on_cpus() -> None:
    script = render(replace(JOB, gpus=0, processes=3, save_before=timedelta(seconds=20)))
    assert "#SBATCH --ntasks-per-node=3" in script
    assert "#SBATCH --signal=B:USR1@10" in script
    assert "gpus-per-node" not in script
    assert "export ACCELERATE_USE_CPU=true" in script


def test_a_sweep_is_an_array() -> None:
    script = render(replace(JOB, sweep=Sweep("optimizer.lr", ("0.01", "0.1", "1"))))
    assert "#SBATCH --array=0-2" in script
    assert "--array" not in render(JOB)


def test_the_sites_lines_come_first_and_the_jobs_options_win() -> None:
    site = "# ours\n#SBATCH --partition=gpu\n#SBATCH --nodes=9\nmodule load cuda\n"
    lines = render(JOB, site).splitlines()
    assert lines[:3] == ["#!/bin/bash", "#SBATCH --partition=gpu", "#SBATCH --nodes=9"]
    assert lines.index("#SBATCH --nodes=1") < lines.index("module load cuda")
    assert "# ours" not in lines
    first_command = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])


def hostile_job(chance: random.Random) -> BatchJob:
    """A job whose every text is hostile."""

    def text() -> str:
        return "".join(chance.choices(HOSTILE, k=chance.randint(0, 8)))

    sweep = Sweep("model.name", ("a" + text(), "b" + text())) if chance.random() < 0.3 else None
    return BatchJob(
        recipe="r" + text().replace("=", ""),
        name=f"{chance.choice('aZ9')}{''.join(chance.choices('a-._Z', k=chance.randint(0, 9)))}",
        runs="runs/" + text().replace("/", ""),
        overrides=tuple(f"x{i}={text()}" for i in range(chance.randint(0, 3))),
        options=tuple(f"--project={text()}" for _ in range(chance.randint(0, 2))),
        sweep=sweep,
        gpus=chance.randint(0, 2),
    )


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A folder in which scripts run with programs that only write down how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("srun", "scontrol", "sbatch", "python"):
        (programs / name).write_text('#!/bin/bash\nprintf "%s\\0" "${0##*/}" "$@" >>"$SAID"\n')
        (programs / name).chmod(0o755)
    return tmp_path


def play(stage: Path, scripts: list[bytes], index: int) -> list[list[str]]:
    """Run scripts in one folder each; the words that srun and scontrol were given."""
    lines = []
    for number, script in enumerate(scripts):
        folder = stage / f"{index}-{number}"
        folder.mkdir()
        (folder / "script").write_bytes(script)
        lines.append(f"(cd {folder}; bash -n script && SAID=$PWD/said bash script); echo $?")
    environ = {"PATH": f"{stage / 'bin'}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
    environ |= {"SLURM_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": str(index), "HOME": str(stage)}
    done = subprocess.run(
        ("bash",), input="\n".join(lines), env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["0"] * len(scripts)
    said = [(stage / f"{index}-{n}" / "said").read_bytes() for n in range(len(scripts))]
    return [os.fsdecode(words).split("\0")[:-1] for words in said]


@pytest.mark.slow
def test_a_thousand_hostile_jobs_start_what_they_should_and_nothing_else(stage: Path) -> None:
    chance = random.Random(5)
    jobs = [hostile_job(chance) for _ in range(JOBS)]
    scripts = [render(job).encode(errors="surrogateescape") for job in jobs]
    for index in (0, 1):
        chosen = [n for n, job in enumerate(jobs) if index == 0 or job.sweep]
        found = []
        for start in range(0, len(chosen), BATCH):
            (stage / f"part{index}-{start}").mkdir()
            part = [scripts[n] for n in chosen[start : start + BATCH]]
            (stage / f"part{index}-{start}" / "bin").symlink_to(stage / "bin")
            found += play(stage / f"part{index}-{start}", part, index)
        for n, words in zip(chosen, found, strict=True):
            behind = words[words.index("-m") :]
            assert behind == ["-m", "launcher", *jobs[n].arguments(index)], scripts[n]
            assert words[0] == "srun"
    assert not list(stage.rglob("HIT*"))
    for folder in stage.glob("part*/*-*"):  # and nothing was written but the log and the words
        assert sorted(path.name for path in folder.iterdir()) == ["runs", "said", "script"]


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (75, "RUNNING", True),
        (75, "COMPLETING", False),  # cancelled by its user, or requeued by hand
        (75, "PENDING", False),
        (0, "RUNNING", False),
        (1, "RUNNING", False),
        (143, "RUNNING", False),
    ],
)
def test_only_a_saved_stop_of_a_running_job_goes_back_into_the_queue(
    code: int, state: str, requeued: bool, stage: Path
) -> None:
    (stage / "bin" / "srun").write_text(f"#!/bin/bash\nexit {code}\n")
    with (stage / "bin" / "scontrol").open("a") as file:
        file.write(f"echo JobState={state}\n")
    environ = {"PATH": f"{stage / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run(
        ("bash",), input=render(JOB), env=environ | {"SAID": "said"}, cwd=stage, text=True
    )
    assert done.returncode == code
    said = (stage / "said").read_text() if (stage / "said").exists() else ""
    assert ("scontrol\0requeue\x0017\0" in said) == requeued


def test_signals_reach_srun_and_its_own_exit_code_decides(stage: Path) -> None:
    (stage / "bin" / "srun").write_text(
        "#!/bin/bash\ntrap 'echo got >>got; [ $(wc -l <got) = 2 ] && exit 75' USR1\n"
        "echo ready >ready\nwhile :; do sleep 0.05; done\n"
    )
    environ = {"PATH": f"{stage / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    (stage / "script").write_text(render(JOB, "set -e\n"))
    code = (
        "SAID=said bash script & script=$!; until [ -e ready ]; do sleep 0.05; done;"
        "kill -USR1 $script; until [ -e got ]; do sleep 0.05; done;"
        "kill -TERM $script; wait $script"
    )
    done = subprocess.run(("bash", "-c", code), env=environ, cwd=stage, timeout=30)
    assert done.returncode == 75
    assert "scontrol\0show" in (stage / "said").read_text()


def test_a_task_of_an_array_puts_itself_alone_back_into_the_queue(stage: Path) -> None:
    """The last one has the array's number for its own, and a requeue of that is one of all."""
    (stage / "bin" / "srun").write_text("#!/bin/bash\nexit 75\n")
    with (stage / "bin" / "scontrol").open("a") as file:
        file.write("echo JobState=RUNNING\n")
    environ = {"PATH": f"{stage / 'bin'}:{os.environ['PATH']}", "SAID": "said"}
    environ |= {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1"}
    script = render(replace(JOB, sweep=Sweep("lr", ("1", "2"))), "set -euo pipefail\n")
    done = subprocess.run(("bash",), input=script, env=environ, cwd=stage, text=True)
    assert done.returncode == 75
    said = (stage / "said").read_text().replace("\0", " ")
    assert said == "scontrol show job 17_1 scontrol requeue 17_1 "


def test_what_the_sites_commands_say_is_in_the_log(stage: Path) -> None:
    site = "echo we say >&2\nset -e\nno-such-module load cuda\n"
    environ = {"PATH": f"{stage / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run(("bash",), input=render(JOB, site), env=environ, cwd=stage, text=True)
    assert done.returncode == 127
    log = (stage / "runs" / "jobs" / "first-17-1.log").read_text()
    assert "we say\n" in log
    assert "no-such-module: command not found" in log


def test_the_sites_commands_may_use_names_of_their_own(stage: Path) -> None:
    site = "".join(f"{name}=x\n" for name in ("words", "run", "job", "jobs", "attempt", "code"))
    (stage / "bin" / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@" >given\n')
    environ = {"PATH": f"{stage / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run(("bash",), input=render(JOB, site), env=environ, cwd=stage, text=True)
    assert done.returncode == 0
    words = (stage / "given").read_text().splitlines()
    assert words[words.index("launcher") + 1] == "train"
    assert "--name=first" in words
