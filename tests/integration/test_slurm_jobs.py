"""On a real Slurm: jobs that are interrupted in any way come back and end with the same weights."""

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.checkpoint.run_files import RunFiles
from tests.support.processes import RESUMABLE, Run, fingerprint
from tests.support.slurm_cluster import Slurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(400)]
EPOCHS = 8
ON_TWO_NODES = ("--nodes", "2", "--cpus", "1")
ON_GPUS = ("--gpus", "2", *ON_TWO_NODES)  # which are there by name only: the ranks train on CPUs
ON_CPUS = ("--gpus", "0", "--processes", "2", *ON_TWO_NODES)
OPTIONS = ("--wandb", "off", "--checkpoint-every", "1000")  # saved at the stop, and only then
_WAIT = "time.sleep(float(os.environ['SLEEP'])) or self.layers(images)"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of an uninterrupted run of four ranks, without Slurm."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(4, folder, "--name", "whole", f"epochs={EPOCHS}")
    assert run.end() == 0, run.text()
    return fingerprint(folder / "runs" / "whole")


class Job:
    """A job that `launcher submit` has put into the queue, from a folder of its own."""

    def __init__(self, slurm: Slurm, folder: Path, name: str, sleep: float, *words: str) -> None:
        self.slurm, self.folder, self.name = slurm, folder, name
        recipe = folder / "a recipe.py"  # the same, but each forward pass takes a while
        text = RESUMABLE.read_text().replace("self.layers(images)", _WAIT)
        recipe.write_text(text.replace("from functools", "import os\nimport time\nfrom functools"))
        words = (recipe.name, "--name", name, *OPTIONS, *words)
        shown = submit(slurm, folder, *words, SLEEP=str(sleep))
        self.number = re.findall(r"^job (\d+): run", shown)[0]

    def log(self, attempt: int) -> Path:
        return self.folder / "runs" / "jobs" / f"{self.name}-{self.number}-{attempt}.log"

    def check(self, whole: str, stopped: str) -> int:
        """Attempts that stopped and saved, and a last one that ended as it should; how many."""
        state = self.slurm.wait_for_end(self.number)
        attempts = len(list(self.folder.glob("runs/jobs/*.log")))
        texts = [self.log(attempt).read_text() for attempt in range(1, attempts + 1)]
        assert state == "COMPLETED", "\n".join(texts)
        for text in texts[:-1]:
            assert re.search(rf"stopped +by {stopped}; the same command with --resume", text), text
        for text in texts[1:]:
            assert "resumed after step" in text, text
        assert "Traceback" not in "".join(texts)
        assert fingerprint(self.folder / "runs" / self.name) == whole
        return attempts


def submit(slurm: Slurm, folder: Path, *words: str, **environment: str) -> str:
    done = subprocess.run(
        (sys.executable, "-m", "launcher", "submit", *words),
        cwd=folder,
        env=slurm.environment | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def job(slurm: Slurm, tmp_path: Path) -> Job:
    """On two nodes with two GPUs each, in its third epoch."""
    words = (f"epochs={EPOCHS}", "--time", "10", *ON_GPUS)
    started = Job(slurm, tmp_path, "cut", 0.1, *words)
    slurm.wait_for(f"epoch 2/{EPOCHS}", started.log(1))
    return started


def test_a_job_goes_on_requeued_by_hand_warned_of_its_time_limit_and_preempted(
    job: Job, slurm: Slurm, whole: str
) -> None:
    assert "= 4 ranks x" in job.log(1).read_text()
    slurm.say("scontrol", "requeue", job.number)
    slurm.wait_for(f"epoch 4/{EPOCHS}", job.log(2))
    slurm.say("scancel", "--batch", "--signal=USR1", job.number)
    slurm.wait_for(f"epoch 6/{EPOCHS}", job.log(3))
    assert "stopped     by SIGUSR1" in job.log(2).read_text()
    words = ("-p", "urgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    urgent = slurm.say("sbatch", "--parsable", *words)
    assert slurm.wait_for_end(urgent) == "COMPLETED"
    assert not (job.folder / "runs" / job.name / "final.safetensors").exists()
    assert job.check(whole, "SIG(TERM|USR1)") == 4


@pytest.mark.thorough  # the warning is the one above, and the time limit that of the next
def test_a_job_of_two_minutes_goes_on_in_another_two(
    slurm: Slurm, tmp_path: Path, whole: str
) -> None:
    words = (f"epochs={EPOCHS}", "--time", "2", "--save-before", "25", *ON_CPUS)
    job = Job(slurm, tmp_path, "cut", 0.7, *words)
    stopped = r"(the time limit of the job at [-\d]+ [:\d]+|SIGUSR1)"
    assert 2 <= job.check(whole, stopped) <= 5


def test_a_run_stops_by_itself_before_its_time_limit(slurm: Slurm, tmp_path: Path) -> None:
    words = ("epochs=1000", "--name", "own", "--save-before", "20", *OPTIONS)
    done = subprocess.run(
        ("srun", "-N2", "--time=1", "python", "-m", "launcher", str(RESUMABLE), *words),
        cwd=tmp_path,
        env=slurm.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 75, done.stdout + done.stderr
    ends, saves = re.findall(
        r"ends ([-\d]+ [:\d]+); saves and stops by itself \S+ (\S+)", done.stdout
    )[0]
    assert f"stopped     by the time limit of the job at {ends}; the same" in done.stdout
    seconds = [
        3600 * int(h) + 60 * int(m) + int(s) for h, m, s in (ends[-8:].split(":"), saves.split(":"))
    ]
    assert (seconds[0] - seconds[1]) % 86_400 == 20


def test_a_job_that_its_user_cancels_stays_away(job: Job, slurm: Slurm) -> None:
    slurm.say("scancel", job.number)
    assert slurm.wait_for_end(job.number) == "CANCELLED"
    assert "the same command with --resume goes on" in job.log(1).read_text()


def test_a_rank_that_is_killed_ends_the_job_and_is_named(job: Job, slurm: Slurm) -> None:
    (third,) = (
        process
        for process in psutil.process_iter(["cmdline", "cwd", "environ"])
        if f"--name={job.name}" in (process.info["cmdline"] or ())
        and "python" in process.info["cmdline"][0]
        and process.info["cwd"] == str(job.folder)
        and process.info["environ"].get("SLURM_PROCID") == "2"
    )
    third.kill()
    killed = time.monotonic()
    assert slurm.wait_for_end(job.number) == "FAILED"
    assert time.monotonic() - killed < 90
    assert len(re.findall(r"launcher: rank 2 on \S+ does not answer", job.log(1).read_text())) == 1
    assert not job.log(2).exists()


def test_a_sweep_is_one_run_per_value_and_status_shows_them(slurm: Slurm, tmp_path: Path) -> None:
    sweep = ("--gpus", "0", "--cpus", "1", "--sweep", "epochs=1,2")
    job = Job(slurm, tmp_path, "swept", 0, *sweep)
    waiting = submit(slurm, tmp_path, "--status").splitlines()
    assert waiting[0].split()[:5] == ["run", "job", "state", "attempt", "epoch"]
    assert re.match(rf"swept-0 +{job.number}_0 +(PENDING|RUNNING|CONFIGURING)", waiting[1])
    for index in (0, 1):
        assert slurm.wait_for_end(f"{job.number}_{index}") == "COMPLETED"
    after = submit(slurm, tmp_path, "--status").splitlines()
    number = job.number
    assert re.match(rf"swept-0 +{number}_0 +COMPLETED +1 +1/1 +\d+\.\d\d% +epochs=1$", after[1]), (
        after
    )
    assert re.match(rf"swept-1 +{number}_1 +COMPLETED +1 +2/2 +\d+\.\d\d% +epochs=2$", after[2])
    assert len(after) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-N2",), "a job of 2 nodes in which one process was started"),
        (("-N1", "--gpus-per-node=2"), "1 task on a node of which Slurm gave 2 GPUs"),
        (("-N1", "--gpus-per-node=2", "srun"), "1 task on a node of which Slurm gave 2 GPUs"),
        (("-N1", "-n2", "--gpus-per-node=1", "srun"), "2 tasks on a node of which Slurm gave 1"),
    ],
)
def test_wrong_combinations_end_at_once_with_one_line(
    words: tuple[str, ...], said: str, slurm: Slurm, tmp_path: Path
) -> None:
    *options, step = words if words[-1] == "srun" else (*words, "")
    wrap = f"{step} python -m launcher {RESUMABLE}"
    log = tmp_path / "log"
    number = slurm.say("sbatch", "--parsable", *options, f"--output={log}", f"--wrap={wrap}")
    assert slurm.wait_for_end(number) == "FAILED"
    text = log.read_text()
    assert text.count("launcher: ") == text.count(said) == 1, text
    assert not (tmp_path / "runs").exists()


def test_hosts_and_addresses_are_those_that_slurm_knows(slurm: Slurm) -> None:
    from launcher.cluster.slurm_env import first_host

    for nodes in ("node[1-2]", "gpu[007-009,012],cpu1", "a,b", "rack[2,4]n[10-11]"):
        assert slurm.say("scontrol", "show", "hostnames", nodes).split()[0] == first_host(nodes)


def test_the_tasks_of_an_array_search_together(slurm: Slurm, tmp_path: Path) -> None:
    words = "--trials 4 --name own --wandb off --job $SLURM_ARRAY_TASK_ID"
    search = "--search 'optimizer.lr=log:1e-4..1e-1'"
    recipe = f"'{RESUMABLE}' data.validation=0.2 epochs=2"
    command = f"srun python -m launcher tune {recipe} {words} {search}"
    done = subprocess.run(
        ("sbatch", "--parsable", "--array=0-1", "--cpus-per-task=1", "--time=5", "--wrap", command),
        cwd=tmp_path,
        env=slurm.environment | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    number = done.stdout.strip()
    logs = [tmp_path / f"slurm-{number}_{task}.out" for task in (0, 1)]
    for task in (0, 1):
        state = slurm.wait_for_end(f"{number}_{task}")
        assert state == "COMPLETED", "".join(log.read_text() for log in logs)
    tried = [re.findall(r"=== own-trial(\d+)", log.read_text()) for log in logs]
    assert all(tried), "both have searched"
    assert sorted({*tried[0], *tried[1]}) == ["0", "1", "2", "3"]
    assert not {*tried[0]} & {*tried[1]}
    for trial in range(4):
        assert RunFiles(tmp_path / "runs" / f"own-trial{trial}").state in ("done", "stopped")
