"""The facts of a machine: of this one, and of control groups and drivers written into files."""

import os
import socket
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.checks.doctor import machine
from launcher.checks.doctor.facts import Cores, Facts, Gpu, Memory, Mistake, Place, Port, read_facts
from launcher.distributed.world import ALONE, World


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_facts_travel_as_json_and_unknown_fields_are_passed_over() -> None:
    facts = Facts(
        rank=3,
        host="gpu1",
        versions={"torch": "2.14.1"},
        cores=Cores(4, 2.5, 2),
        memory=Memory(1, 2),
        gpus=(Gpu("A100"),),
        place=Place("gpu1", "10.0.0.1"),
        mistakes=(Mistake("one", "two"),),
    )
    assert read_facts(asdict(facts)) == facts
    newer = {**asdict(facts), "colour": "red", "cores": {**asdict(Cores(4, 2.5, 2)), "heat": 3}}
    assert read_facts(newer) == facts
    assert read_facts({"rank": 1}).cores is None


def test_the_limits_of_control_groups_of_version_2(tmp_path: Path) -> None:
    own = write(tmp_path / "own", "0::/job/task\n")
    write(tmp_path / "job" / "cpu.max", "250000 100000\n")
    write(tmp_path / "job" / "task" / "cpu.max", "max 100000\n")
    write(tmp_path / "job" / "task" / "memory.max", "max\n")
    write(tmp_path / "job" / "memory.max", "1000000\n")
    assert machine.cpu_quota(tmp_path, own) == 2.5
    assert machine.memory_limit(tmp_path, own) == 1_000_000


def test_the_limits_of_control_groups_of_version_1(tmp_path: Path) -> None:
    own = write(tmp_path / "own", "4:cpu,cpuacct:/docker/a\n3:memory:/docker/a\n2:pids:/\n")
    write(tmp_path / "cpu" / "cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cpu" / "cpu.cfs_period_us", "100000\n")
    write(tmp_path / "memory" / "memory.limit_in_bytes", f"{2**63 - 4096}\n")
    assert machine.cpu_quota(tmp_path, own) is None
    assert machine.memory_limit(tmp_path, own) is None
    write(tmp_path / "cpu,cpuacct" / "docker" / "a" / "cpu.cfs_quota_us", "150000\n")
    write(tmp_path / "cpu" / "docker" / "a" / "cpu.cfs_quota_us", "150000\n")
    write(tmp_path / "cpu" / "docker" / "a" / "cpu.cfs_period_us", "100000\n")
    assert machine.cpu_quota(tmp_path, own) == 1.5


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert machine.cpu_quota(tmp_path, tmp_path / "none") is None


def test_a_quota_grants_whole_cores() -> None:
    assert Cores(64, 2.5).granted == 2
    assert Cores(2, 8.0).granted == 2
    assert Cores(64, 0.25).granted == 1
    assert Memory(100, 50, 70).granted == 70


def test_cores_and_threads_are_those_of_a_run() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        cores = machine.cores(World(threads=before + 1), {"OMP_NUM_THREADS": "1"})
    finally:
        torch.set_num_threads(before)
    assert (cores.threads, cores.chosen) == (before + 1, "1")
    assert cores.usable == len(os.sched_getaffinity(0))


def test_memory_has_numbers() -> None:
    memory = machine.memory()
    assert memory.total >= memory.available > 0
    assert memory.open_files > 0


def test_versions_need_no_import(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.versions()
    assert found["torch"][0].isdigit()
    assert found["launcher"] == "0.1.0"
    assert set(machine.versions_of_torch()) == {"torch", "CUDA", "NCCL"}


def test_a_disk_is_written_and_left_as_it_was(tmp_path: Path) -> None:
    disk = machine.disk(tmp_path / "runs" / "deeper")
    assert disk.folder == str(tmp_path)
    assert disk.fault == ""
    assert disk.speed > 0
    assert 0 < disk.free <= disk.total
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file_has_a_fault() -> None:
    disk = machine.disk(Path("/proc/self"))
    assert disk.fault
    assert disk.speed == 0.0


def test_runs_that_are_a_file_have_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "runs"
    file.touch()
    disk = machine.disk(file)
    assert disk.fault == f"{file}, but {file} is no folder in which one can write"
    assert disk.speed == 0.0


def test_a_mark_is_seen_where_the_folder_is_the_same(tmp_path: Path) -> None:
    mark = machine.leave_mark(str(tmp_path), "one")
    assert mark
    assert machine.sees(mark, 0)
    assert not machine.sees(str(tmp_path / "other"), 0.1)
    assert not machine.sees(str(tmp_path / "none" / "other"), 0)
    assert machine.leave_mark("/proc/self", "two") is None
    later = tmp_path / "later"
    threading.Timer(0.2, later.touch).start()
    assert machine.sees(str(later), 5)


def test_the_compile_cache_is_where_torch_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    assert machine.compile_cache({}).folder == default_cache_dir()
    named = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    cache = machine.compile_cache(named)
    assert (cache.fault, cache.shared) == ("", "")
    assert cache.free > 0
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert machine.compile_cache(named).shared == "other users may write into it"
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    assert machine.compile_cache(named).shared == f"it belongs to user {os.geteuid()}"


def test_a_user_without_a_name_has_a_compile_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_242_424)
    assert machine.compile_cache({}).folder.endswith("torchinductor_uid_4242424")


def test_the_place_follows_from_the_host_name() -> None:
    place = machine.place(ALONE, {})
    assert place.host == socket.gethostname()
    assert place.host in place.origin + place.fault


def test_the_place_follows_from_the_interface_that_is_named() -> None:
    place = machine.place(World(size=2, address="127.0.0.1"), {"GLOO_SOCKET_IFNAME": "lo"})
    assert (place.address, place.interface, place.fault) == ("127.0.0.1", "lo", "")
    assert place.towards_first == "lo"
    assert place.is_loopback
    missing = machine.place(ALONE, {"GLOO_SOCKET_IFNAME": "eth77"})
    assert "no such interface" in missing.fault


def test_the_speed_of_an_interface(tmp_path: Path) -> None:
    write(tmp_path / "eth0" / "speed", "25000\n")
    write(tmp_path / "wlan0" / "speed", "-1\n")
    found = [machine.interface_speed(name, tmp_path) for name in ("eth0", "wlan0", "none")]
    assert found == [25_000, 0, 0]


def test_a_name_that_does_not_resolve_is_an_error() -> None:
    machine.resolve("127.0.0.1")
    with pytest.raises(OSError, match=r"'a\.\.b' does not resolve"):
        machine.resolve("a..b")


def test_a_taken_port_and_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        found = machine.port(World(port=number))
        assert (found.number, found.state) == (number, "taken")
        assert f"process {os.getpid()} (" in found.owner
    assert machine.port(World(port=number)).state == "free"
    agent = World(port=number, agent_hosts_store=True)
    assert machine.port(agent) == Port(number, "served by the launcher's agent")


def fake_driver(has_ecc: bool) -> SimpleNamespace:
    """In place of pynvml, which answers on machines with a GPU only."""

    class NVMLError(Exception):
        pass

    def errors(*words: object) -> int:
        if not has_ecc:
            raise NVMLError
        return 3

    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
        NVML_VOLATILE_ECC=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda handle, kind: 345,
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: 1980,
        nvmlDeviceGetTotalEccErrors=errors,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x40 if has_ecc else 0x80,
        nvmlClocksThrottleReasonHwThermalSlowdown=0x40,
        nvmlClocksThrottleReasonSwThermalSlowdown=0x20,
        nvmlClocksThrottleReasonHwPowerBrakeSlowdown=0x80,
    )


def test_what_a_driver_says_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_driver(True))
    gpu = machine.ask_driver("uuid", Gpu("H100", 80))
    assert gpu == Gpu("H100", 80, 345, 1980, 3, "heat")
    monkeypatch.setitem(sys.modules, "pynvml", fake_driver(False))
    gpu = machine.ask_driver("uuid", Gpu("L4", 24))
    assert gpu == Gpu("L4", 24, 345, 1980, 0, "a power brake")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.ask_driver("uuid", Gpu("L4", 24)) == Gpu("L4", 24)


def test_the_driver_by_its_file(tmp_path: Path) -> None:
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.133.20  Sun Apr  6\nGCC version:\n"
    assert machine.driver(write(tmp_path / "version", text)) == "570.133.20"
    open_one = text.replace("x86_64 Kernel Module ", "Open Kernel Module for x86_64 ")
    assert machine.driver(write(tmp_path / "version", open_one)) == "570.133.20"
    assert machine.driver(tmp_path / "none") == "none"


def test_without_a_gpu_there_is_none() -> None:
    assert machine.gpus() == ()
