"""Machines made of Linux namespaces: each with a network, an address and a host name of its own.

They are joined by a switch in a namespace of its own, so nothing of the real network is touched.
All of them see the same files, like the nodes of a cluster. Needs root.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_COUNT = iter(range(1000))
NETWORKS = os.getuid() == 0 and shutil.which("ip") is not None
needs_networks = pytest.mark.skipif(
    not NETWORKS, reason="needs root and the command ip, to make networks of namespaces"
)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Node:
    """One machine: its name, its address, and how to start a program on it."""

    def __init__(self, place: int, prefix: str) -> None:
        self.name = f"node{place}"
        self.address = f"10.0.0.{place}"
        self._space, self._switch = f"{prefix}-{self.name}", f"{prefix}-switch"
        self._port = f"port{place}"

    def on(self, *command: str) -> tuple[str, ...]:
        """The command that runs `command` on this machine."""
        named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name)
        return ("ip", "netns", "exec", self._space, *named, *command)

    def kill(self) -> None:
        """Lose the machine's processes, all at once and without a word."""
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)

    def pids(self) -> list[int]:
        """The processes that run on this machine."""
        return [int(pid) for pid in _ip("netns", "pids", self._space).split()]

    def cut(self) -> None:
        """Pull the cable out."""
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def mend(self) -> None:
        """Put the cable back."""
        _ip("-n", self._switch, "link", "set", self._port, "up")

    def slow(self, rate: str) -> None:
        """Let no more than this leave the machine: `20mbit`."""
        limit = ("tbf", "rate", rate, "burst", "32kbit", "latency", "50ms")
        add = ("ip", "netns", "exec", self._space, "tc", "qdisc", "add", "dev", "eth0", "root")
        subprocess.run([*add, *limit], check=True)

    def write_hosts(self, hosts: str) -> None:
        """Change the names that the machine knows."""
        Path("/etc/netns", self._space, "hosts").write_text(hosts)

    def _make(self, hosts: str) -> None:
        _ip("netns", "add", self._space)
        folder = Path("/etc/netns", self._space)  # what `ip netns exec` shows as /etc
        folder.mkdir(parents=True)
        self.write_hosts(hosts)
        peer = ("peer", "name", "eth0", "netns", self._space)
        _ip("-n", self._switch, "link", "add", self._port, "type", "veth", *peer)
        _ip("-n", self._switch, "link", "set", self._port, "master", "bridge", "up")
        _ip("-n", self._space, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", self._space, "link", "set", device, "up")

    def _remove(self) -> None:
        self.kill()
        until = time.monotonic() + 10
        while self.pids() and time.monotonic() < until:
            time.sleep(0.05)
        _ip("netns", "delete", self._space)
        shutil.rmtree(Path("/etc/netns", self._space))


@contextmanager
def network(size: int) -> Iterator[list[Node]]:
    """So many machines that reach each other by address and by name."""
    prefix = f"launcher{os.getpid()}x{next(_COUNT)}"
    nodes = [Node(place, prefix) for place in range(1, size + 1)]
    hosts = "127.0.0.1 localhost\n" + "".join(f"{node.address} {node.name}\n" for node in nodes)
    _ip("netns", "add", f"{prefix}-switch")
    made = []
    try:
        _ip("-n", f"{prefix}-switch", "link", "add", "bridge", "type", "bridge")
        _ip("-n", f"{prefix}-switch", "link", "set", "bridge", "up")
        for node in nodes:
            made.append(node)
            node._make(hosts)
        yield nodes
    finally:
        for node in made:
            node._remove()
        _ip("netns", "delete", f"{prefix}-switch")
