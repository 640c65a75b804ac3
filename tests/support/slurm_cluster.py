"""A real Slurm on this machine, from the packages: a controller and two node daemons on loopback.

Each node has 4 CPUs and, by name only, 2 GPUs (plain files). Jobs in the partition `urgent`
pre-empt those in `main`.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0  # seconds on a busy machine
_DAEMONS = ("munged", "slurmctld", "slurmd", "srun")
_CONFIGURATION = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge.sock
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=10
JobRequeue=1
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} {node}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} {node}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL State=UP PriorityTier=10
"""
_NODE = "CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=1000 Gres=gpu:2"


class Slurm:
    """The running cluster, and how to use it from a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """That of a user of the cluster, with this Python first."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        own = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}
        here = {"PYTHONPATH": str(ROOT), "HF_HOME": str(self.folder), "WANDB_MODE": "offline"}
        return {**os.environ, **own, **here}

    def start(self) -> None:
        """Write the configuration and start the daemons."""
        host = socket.gethostname().partition(".")[0]
        text = _CONFIGURATION.format(host=host, folder=self.folder, ports=_ports(3), node=_NODE)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "state").mkdir()
        for name in ("gpu0", "gpu1", "munge.seed"):
            (self.folder / name).touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        files = {"socket": "sock", "key-file": "key", "pid-file": "pid"}
        files |= {"log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={self.folder}/munge.{end}" for name, end in files.items()]
        self._daemon("munged", "--foreground", "--force", *options)
        self._until(lambda: (self.folder / "munge.sock").exists(), "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in ("node1", "node2"):
            self._daemon("slurmd", "-D", "-N", node)
        self._until(lambda: self.say("sinfo", "-h", "-o", "%T %D") == "idle 2", "two idle nodes")

    def _daemon(self, *words: str) -> None:
        with (self.folder / f"{words[0]}.out").open("ab") as out:
            process = subprocess.Popen(words, env=self.environment, stdout=out, stderr=out)
        self._daemons.append(process)

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        self.say("scancel", "--user=root")
        self._until(lambda: not self.say("squeue", "-h"), "the end of all jobs")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            daemon.wait(timeout=30)

    def say(self, *words: str) -> str:
        """What a command prints."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip()

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < until, f"waited for {what}; logs in {self.folder}"
            time.sleep(0.2)

    def state(self, job: str) -> str:
        """The job's state in one word."""
        shown = self.say("scontrol", "show", "job", job)
        return shown.partition("JobState=")[2].split(maxsplit=1)[0]

    def wait_for(self, text: str, log: Path) -> None:
        """Until a log contains `text`."""
        self._until(lambda: log.is_file() and text in log.read_text(), f"{text!r} in {log}")

    def wait_for_end(self, job: str) -> str:
        """The state in which a job ends, and still is two seconds later.

        One that goes back into the queue may have failed for a moment.
        """
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

        def has_ended() -> bool:
            return self.state(job) in ends

        def stays_ended() -> bool:
            if has_ended():
                time.sleep(2)
            return has_ended()

        self._until(stays_ended, f"the end of job {job}")
        return self.state(job)


def _ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Slurm, where its daemons are installed and may be started."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in _DAEMONS if not shutil.which(name, path=path)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"no {', '.join(missing)}" if missing else "Slurm's daemons need root here")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the path of a socket has a limit
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
    shutil.rmtree(folder, ignore_errors=True)
