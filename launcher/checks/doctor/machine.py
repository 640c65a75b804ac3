"""The facts of one machine; each question is answered independently of the others."""

import getpass
import os
import platform
import re
import socket
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.checks.doctor.facts import Cache, Cores, Disk, Gpu, Memory, Place, Port
from launcher.distributed.accelerator import set_threads, usable_cores
from launcher.distributed.world import World
from launcher.errors import UserError
from launcher.utils import atomic_write
from launcher.utils.arguments import nearest_folder, refuse_no_folder

CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60  # bytes: version 1 of cgroups writes a number near 2**63 for "no limit"
_WRITTEN = 4 * 2**20  # bytes of the test file in the folder of runs
_MARK = ".launcher-doctor"
_DEFAULT_PORT = 29500  # that of torchrun and Accelerate


# Software


def versions() -> dict[str, str]:
    """The installed versions, read from files: importing torch takes seconds, or fails."""
    found = {"Python": platform.python_version(), "launcher": __version__}
    for name in ("torch", "torchvision", "accelerate", "wandb"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    found["driver"] = driver()
    return found


def driver(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of NVIDIA's kernel module."""
    with suppress(OSError):
        found = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", path.read_text())
        return found.group(1) if found else "unknown"
    return "none"


def versions_of_torch() -> dict[str, str]:
    """The versions that torch was built with."""
    import torch

    found = {"torch": torch.__version__, "CUDA": torch.version.cuda or "none", "NCCL": "none"}
    with suppress(Exception):  # a build without NCCL
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


# Cores and memory


def cores(world: World, environ: Mapping[str, str] = os.environ) -> Cores:
    """Cores and threads of this process, as a run would set them; imports torch."""
    import torch

    set_threads(world)
    chosen = "" if world.shares_cores else environ.get("OMP_NUM_THREADS", "")
    return Cores(usable_cores(), cpu_quota(), torch.get_num_threads(), chosen)


def memory() -> Memory:
    """Memory, its limit, /dev/shm and open files."""
    import resource

    import psutil

    system = psutil.virtual_memory()
    shared = 0
    with suppress(OSError):
        shared = psutil.disk_usage("/dev/shm").total
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Memory(system.total, system.available, memory_limit(), shared, files)


def cpu_quota(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The quota of cores of this process's control groups; None: no limit."""
    limits = []
    for folder in _groups(root, own, "cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text().split()
            limits.append(int(quota) / int(period))
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (
                (folder / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period")
            )
            limits.append(int(quota) / int(period))
    return min((limit for limit in limits if limit > 0), default=None)


def memory_limit(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """The memory limit of this process's control groups in bytes; None: no limit."""
    limits = []
    for folder in _groups(root, own, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text()))
    return min((limit for limit in limits if 0 < limit < _UNLIMITED), default=None)


def _groups(root: Path, own: Path, controller: str) -> Iterable[Path]:
    """The folders of this process's group and of those above it, in both versions of cgroups.

    In a container the path may be that of the host, of which only the root is to be seen.
    """
    lines: list[str] = []
    with suppress(OSError):
        lines = own.read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        group = top / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


# GPUs


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that this process sees; imports torch."""
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        found.append(ask_driver(str(device.uuid), Gpu(device.name, device.total_memory)))
    return tuple(found)


def ask_driver(uuid: str, gpu: Gpu) -> Gpu:
    """Add clocks, errors and throttling, where nvidia-ml-py is installed and may ask."""
    try:
        import pynvml
    except ImportError:
        return gpu
    try:
        pynvml.nvmlInit()
        try:
            return _with_driver(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"), gpu)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # in a container that does not show it, or on a part of a GPU
        return gpu


def _with_driver(nvml: Any, handle: Any, gpu: Gpu) -> Gpu:
    clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
    most = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
    errors = 0
    with suppress(nvml.NVMLError):  # a GPU without ECC
        errors = nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
    reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    named = {
        "heat": nvml.nvmlClocksThrottleReasonHwThermalSlowdown
        | nvml.nvmlClocksThrottleReasonSwThermalSlowdown,
        "a power brake": nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }
    throttled = " and ".join(name for name, mask in named.items() if reasons & mask)
    return Gpu(gpu.name, gpu.memory, clock, most, errors, throttled)


# Folders


def disk(runs: Path) -> Disk:
    """Write a file as a checkpoint is written; leaves nothing behind.

    A missing folder is not made, since other ranks may be looking at the same moment.
    """
    import psutil

    folder = nearest_folder(runs)
    fault, speed = "", 0.0
    name = f"{_MARK}-{socket.gethostname()}-{os.getpid()}"
    first, second = folder / f"{name}-1", folder / f"{name}-2"
    try:
        refuse_no_folder(runs)
        content = os.urandom(_WRITTEN)
        began = time.perf_counter()
        atomic_write.write_new(first, content)
        speed = len(content) / (time.perf_counter() - began)
        atomic_write.write_new(second, b"second")
        second.replace(first)  # as a new checkpoint's name replaces an old one's
        atomic_write.flush_folder(folder)
        if first.read_bytes() != b"second":
            fault = "a renamed file does not replace another"
    except UserError as error:
        fault = error.given
    except OSError as error:
        fault = error.strerror or str(error)
    finally:
        for path in (first, second):
            with suppress(OSError):
                path.unlink()
    usage = psutil.disk_usage(str(folder))
    return Disk(str(folder), usage.free, usage.total, speed, fault)


def leave_mark(folder: str, mark: str) -> str | None:
    """Write a file for the other nodes to look for; None where the folder cannot be written."""
    path = Path(folder, f"{_MARK}-{mark}")
    try:
        path.touch()
    except OSError:
        return None
    return str(path)


def sees(path: str, seconds: float) -> bool:
    """Whether a file of another node is visible here; waits, as network file systems are slow."""
    until = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if Path(path).name in os.listdir(Path(path).parent):  # which is not cached
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


def compile_cache(environ: Mapping[str, str] = os.environ) -> Cache:
    """Where torch.compile keeps what it has compiled, as torch's cache_dir_utils chooses it."""
    import psutil

    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):  # as in a container whose user has no name
        user = f"uid_{os.getuid()}"
    name = "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user)
    default = Path(tempfile.gettempdir(), name)
    folder = Path(environ.get("TORCHINDUCTOR_CACHE_DIR", default)).absolute()
    there = nearest_folder(folder)
    fault = "" if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written"
    shared = ""
    if folder.is_dir():
        status = folder.stat()
        if status.st_uid != os.getuid():
            shared = f"it belongs to user {status.st_uid}"
        elif status.st_mode & 0o022:
            shared = "other users may write into it"
    return Cache(str(folder), psutil.disk_usage(str(there)).free, fault, shared)


# The network


def place(world: World, environ: Mapping[str, str] = os.environ) -> Place:
    """The address that gloo announces: that of GLOO_SOCKET_IFNAME, else of the host's name."""
    import psutil

    host = socket.gethostname()
    families = (socket.AF_INET, socket.AF_INET6)
    addresses = {
        name: [entry.address for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }
    fault, wanted = "", environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if wanted:
        origin = f"GLOO_SOCKET_IFNAME={wanted}"
        address = next(iter(addresses.get(wanted, ())), "")
        fault = "" if address else f"{origin}, but there is no such interface with an address"
    else:
        origin, address = f"the host name {host}", ""
        try:
            found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None)]
            address = next(filter(_is_own, found), "")
            fault = "" if address else f"{origin} resolves to {found[0]}, which is not this machine"
        except OSError:
            fault = f"{origin} does not resolve"
        address = address or "127.0.0.1"  # as gloo does
    interface = next((name for name, own in addresses.items() if address in own), "")
    towards = _source_address(world.address) if world.size > 1 else ""
    return Place(
        host=host,
        address=address,
        interface=interface,
        speed=interface_speed(interface),
        origin=origin,
        towards_first=next((name for name, own in addresses.items() if towards in own), ""),
        fault=fault,
    )


def resolve(host: str) -> None:
    """Raise `OSError` that says so where the host of rank 0 is not known here."""
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        raise OSError(f"the host name {host!r} does not resolve") from None


def _is_own(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _source_address(target: str) -> str:
    """The local address from which packets to `target` would leave; nothing is sent."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((target, _DEFAULT_PORT))
        return str(probe.getsockname()[0])
    return ""


def interface_speed(interface: str, root: Path = Path("/sys/class/net")) -> int:
    """Mb/s; 0 where the system does not know, as for the loopback."""
    with suppress(OSError, ValueError):
        return max(0, int((root / interface / "speed").read_text()))
    return 0


def port(world: World) -> Port:
    """The state of the port at which this world will meet; alone, of the default port."""

    number = world.port or _DEFAULT_PORT
    if world.agent_hosts_store:
        return Port(number, "served by the launcher's agent")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
            probe.bind(("", number))
    except OSError as error:
        return Port(number, "taken", _owner(number) or error.strerror or "")
    return Port(number)


def _owner(number: int) -> str:
    """The process that listens at a port, as far as this user may know."""
    import psutil

    with suppress(psutil.Error):
        for entry in psutil.net_connections("tcp"):
            if entry.status == psutil.CONN_LISTEN and entry.laddr.port == number:
                if entry.pid is None:
                    return "a process of another user"
                return f"process {entry.pid} ({psutil.Process(entry.pid).name()})"
    return ""
