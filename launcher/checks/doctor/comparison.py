"""From the facts of all ranks to a verdict for each question, with outliers by name.

Pure: from values alone, so it is the same for one rank and for a thousand.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median

from launcher.checks.doctor.facts import Facts
from launcher.checks.doctor.links import Link
from launcher.checks.doctor.report import Report, in_bits, listed, short
from launcher.checks.verdicts import Verdict
from launcher.utils.text import count, sizes

SLOW = 0.7  # fraction of the median of its peers below which a rank is an outlier
_SLOW_LINK = 0.3  # fraction of the interface's speed; protocols and other users take some
_SKEW = 1.0  # seconds between two clocks that are too much
_NEAR = 5e-3  # seconds to another node; more means that it is far away
_LITTLE = 2**30  # bytes of disk or memory that are too few
_LITTLE_SHARED = 2**29  # of /dev/shm, where NCCL needs it
_FEW_FILES = 1024  # open files
_REFUSED = ("Python", "torch", "torchvision", "accelerate", "launcher")  # if versions differ
_MISSING = "killed, stopped, not started or cut off: look for it on its machine"


def verdicts(report: Report) -> list[Verdict]:
    """The verdicts of all questions."""
    return [verdict for question in _QUESTIONS for verdict in question(report)]


# Questions about the ranks


def _launch(report: Report) -> Iterator[Verdict]:
    world = report.world
    mistakes = {
        mistake: facts.name
        for facts in reversed(list(report.facts.values()))
        for mistake in facts.mistakes
    }
    for mistake, name in mistakes.items():
        yield Verdict("launch", f"{mistake.what} ({name})", "wrong", mistake.instead)
    missing = [rank for rank in range(world.size) if rank not in report.facts]
    if report.apart:
        yield from _why_apart(report)
    elif missing:
        names = listed(map(report.name, missing))
        yield Verdict("launch", f"no answer from {names}", "wrong", _MISSING)
    if report.lost:
        names = listed(map(report.name, report.lost))
        yield Verdict("launch", f"no answer any more from {names}", "wrong", _MISSING)
    if not (mistakes or missing or report.lost):
        what = f"{count(world.size, 'rank')} on {count(len(report.firsts), 'node')}"
        yield Verdict("launch", f"{what}, started by {world.launcher.value}")
    for question, why in _unanswered(report):
        instead = "see what it waits for there, or give it longer by --limit"
        yield Verdict(question, why, "wrong", instead)


def _why_apart(report: Report) -> Iterator[Verdict]:
    """Say why the ranks did not meet, unless another line does."""
    first = report.facts[0]
    if "torch" in first.unanswered or (first.port and first.port.state == "taken"):
        return
    own = first.place.address if first.place else "its address"
    instead = f"set MASTER_ADDR to an address of rank 0 ({own}) that every machine can reach"
    yield Verdict("launch", report.apart, "wrong", instead)


def _unanswered(report: Report) -> Iterator[tuple[str, str]]:
    """The questions without an answer, with the ranks that gave none."""
    found: dict[tuple[str, str], list[str]] = {}
    for facts in report.facts.values():
        for question, why in facts.unanswered.items():
            found.setdefault((question, why), []).append(facts.name)
    for (question, why), names in found.items():
        yield question, f"{why} ({listed(names)})"


def _versions(report: Report) -> Iterator[Verdict]:
    usual: dict[str, str] = {}
    differing, standing = [], "good"
    for name in dict.fromkeys(n for facts in report.facts.values() for n in facts.versions):
        held = {facts.name: facts.versions.get(name, "?") for facts in report.facts.values()}
        usual[name] = Counter(held.values()).most_common(1)[0][0]
        others: dict[str, list[str]] = {}
        for rank, version in held.items():
            if version != usual[name]:
                others.setdefault(version, []).append(rank)
        differing += [f"{name} {version} on {listed(r)}" for version, r in others.items()]
        if others and (name in _REFUSED or standing == "wrong"):
            standing = "wrong"
        elif others:
            standing = "notice"
    text = ", ".join(f"{name} {version}" for name, version in usual.items())
    if differing:
        text += f"; but {'; '.join(differing)}"
    instead = "a run is refused where they differ: install the same on every machine"
    if standing == "wrong":
        yield Verdict("versions", text, "wrong", instead)
    elif standing == "notice":
        yield Verdict("versions", text, "notice", "install the same on every machine")
    else:
        yield Verdict("versions", text)


def _gpus(report: Report) -> Iterator[Verdict]:
    held = {facts.name: facts.gpus for facts in report.firsts if facts.gpus is not None}
    if not held:
        return
    named = {name: _models([gpu.name for gpu in gpus]) for name, gpus in held.items()}
    usual = Counter(named.values()).most_common(1)[0][0]
    text = f"{usual}{' on every node' if len(held) > 1 else ''}"
    others = [f"{models} for {name}" for name, models in named.items() if models != usual]
    clocked = [gpu for gpus in held.values() for gpu in gpus if gpu.clock]
    if clocked:
        clocks = [gpu.clock for gpu in clocked]
        most = max(gpu.most_clock for gpu in clocked)
        text += f"; clocks now {min(clocks)} to {max(clocks)} MHz, at most {most}"
    if others:
        yield Verdict("GPUs", f"{text}; but {listed(others)}", "notice", "ask for equal nodes")
    else:
        yield Verdict("GPUs", text)
    for name, gpus in held.items():
        for number, gpu in enumerate(gpus):
            if gpu.ecc_errors:
                what = f"{count(gpu.ecc_errors, 'memory error')} (ECC) of GPU {number} for {name}"
                yield Verdict("GPUs", what, "wrong", "give the node back and report the fault")
            if gpu.throttled:
                what = f"GPU {number} for {name} is slowed down by {gpu.throttled}"
                yield Verdict("GPUs", what, "notice", "have the cooling and the power checked")


def _models(names: Sequence[str]) -> str:
    counted = Counter(names)
    return ", ".join(f"{number} x {name}" for name, number in counted.items()) or "none: CPUs"


def _cores(report: Report) -> Iterator[Verdict]:
    held = [facts for facts in report.facts.values() if facts.cores]
    many, few = [], []
    for facts in held:
        cores = facts.cores
        assert cores
        share = max(1, cores.granted // facts.local_size)
        if cores.threads * facts.local_size > max(cores.granted, facts.local_size):
            many.append((facts, share))
        elif cores.threads < share and (cores.threads == 1 or 2 * cores.threads <= share):
            few.append((facts, share))
    for found, what in ((many, "too many"), (few, "few")):
        if found:
            facts, share = found[0]
            names = listed(f"{_cores_of(f)}" for f, _ in found)
            instead = f"type export OMP_NUM_THREADS={share} before the launch"
            yield Verdict("cores", f"{what} threads: {names}", "notice", instead)
    if held and not many and not few:
        texts = Counter(_cores_of(facts, with_name=False) for facts in held)
        yield Verdict("cores", listed(texts))


def _cores_of(facts: Facts, with_name: bool = True) -> str:
    cores = facts.cores
    assert cores
    quota = f" (a quota of {cores.quota:g})" if cores.quota is not None else ""
    text = (
        f"{count(cores.usable, 'core')}{quota} for {count(facts.local_size, 'process')} of "
        f"{count(cores.threads, 'thread')}"
    )
    return f"{text} ({facts.name})" if with_name else text


def _memory(report: Report) -> Iterator[Verdict]:
    held = [facts for facts in report.firsts if facts.memory]
    if not held:
        return
    memories = [facts.memory for facts in held if facts.memory]
    text = (
        f"{sizes(min(m.available for m in memories))} free of "
        f"{sizes(min(m.granted for m in memories))}, /dev/shm "
        f"{sizes(min(m.shared for m in memories))}, "
        f"{min(m.open_files for m in memories):,} open files"
    )
    yield Verdict("memory", text if len(held) == 1 else f"at least {text} on every node")
    little = [
        f"{sizes(min(m.available, m.limit or m.available))} free ({facts.name})"
        for facts in held
        if (m := facts.memory) and min(m.available, m.limit or m.available) < _LITTLE
    ]
    if little:
        yield Verdict("memory", listed(little), "notice", "ask for more, or end what takes it")
    shared = [f.name for f in held if f.gpus and f.memory and f.memory.shared < _LITTLE_SHARED]
    if shared and report.world.size > 1:
        instead = "start the container with --ipc=host or --shm-size=1g: NCCL needs it"
        yield Verdict("memory", f"a small /dev/shm ({listed(shared)})", "notice", instead)
    files = [f.name for f in held if f.memory and f.memory.open_files < _FEW_FILES]
    if files:
        few = f"fewer than {_FEW_FILES:,} open files ({listed(files)})"
        yield Verdict("memory", few, "notice", "type ulimit -n 4096 before the launch")


# Questions about folders


def _disk(report: Report) -> Iterator[Verdict]:
    for facts in report.firsts:
        if (disk := facts.disk) is None:
            continue
        where = f"{disk.folder} ({facts.name})"
        room = f"{sizes(disk.free)} of {sizes(disk.total)} free"
        refused = f"{where} cannot be written: {disk.fault}; {room}"
        if disk.fault and facts.rank == 0:
            instead = "make room or name another folder with --runs: nothing could be saved"
            yield Verdict("disk", refused, "wrong", instead)
        elif disk.fault:
            instead = "a run could not go on there if this machine became machine 0"
            yield Verdict("disk", refused, "notice", instead)
        elif disk.free < _LITTLE:
            yield Verdict("disk", f"{where} has {room}", "notice", "make room for checkpoints")
        elif facts.rank == 0:
            speed = f"written at {sizes(disk.speed)}/s, a new file replaces an old one"
            yield Verdict("disk", f"{where} has {room}, {speed}")
    blind = [rank for rank, found in report.findings.items() if found.sees_mark is False]
    if blind:
        names = listed(map(report.name, sorted(blind)))
        what = f"{names} and rank 0 see different folders of runs"
        instead = "share the folder; else --resume needs the same machine as machine 0"
        yield Verdict("disk", what, "notice", instead)
    elif any(found.sees_mark for found in report.findings.values()):
        yield Verdict("disk", "all nodes see the same folder of runs")


def _cache(report: Report) -> Iterator[Verdict]:
    held = {facts.name: facts.cache for facts in report.facts.values() if facts.cache}
    faulty = [f"{cache.fault} ({name})" for name, cache in held.items() if cache.fault]
    shared = [
        f"{cache.folder}: {cache.shared} ({name})" for name, cache in held.items() if cache.shared
    ]
    instead = "export TORCHINDUCTOR_CACHE_DIR=FOLDER, to a local folder of your own"
    if faulty:
        yield Verdict("cache", f"of torch.compile: {listed(faulty)}", "notice", instead)
    if shared:
        yield Verdict("cache", f"of torch.compile: {listed(shared)}", "notice", instead)
    if held and not faulty and not shared:
        least = min(held.values(), key=lambda cache: cache.free)
        yield Verdict("cache", f"of torch.compile: {least.folder}, {sizes(least.free)} free")


# Questions about the network


def _clocks(report: Report) -> Iterator[Verdict]:
    if len(report.firsts) < 2:
        return
    offsets = report.offsets
    far = [
        f"{report.name(rank)} is {abs(o.seconds):.2f} s {'ahead of' if o.seconds > 0 else 'behind'}"
        f" rank 0 (± {o.bound:.3f} s)"
        for rank, o in offsets.items()
        if abs(o.seconds) - o.bound > _SKEW
    ]
    if far:
        instead = "synchronize the clocks (chrony): logs and time limits go by them"
        yield Verdict("clocks", listed(far), "notice", instead)
    elif offsets:
        most = max(offsets.values(), key=lambda o: abs(o.seconds))
        yield Verdict(
            "clocks",
            f"at most {abs(most.seconds) * 1e3:.1f} ms apart (± {most.bound * 1e3:.1f} ms)",
        )


def _network(report: Report) -> Iterator[Verdict]:
    port = report.facts[0].port
    if port is not None and port.state == "taken":
        owner = port.owner or "a process"
        what = f"port {port.number}, at which the ranks meet, is taken by {owner}"
        alone = report.world.size == 1
        instead = "end it, or choose another by --main_process_port, --master-port or MASTER_PORT"
        yield Verdict("port", what, "notice" if alone else "wrong", instead)
    elif port is not None:
        yield Verdict("port", f"port {port.number}: {port.state}")
    several = len({facts.host for facts in report.firsts}) > 1
    bad = False
    for facts in report.firsts:
        place = facts.place
        if place is None:
            continue
        if several and place.is_loopback:
            device = place.towards_first or "eth0"
            reason = place.fault or f"{place.origin} resolves to {place.address}"
            what = f"{reason}: other machines cannot reach it ({facts.name})"
            instead = f"type export GLOO_SOCKET_IFNAME={device} NCCL_SOCKET_IFNAME={device} there"
            works = report.group and not _faulty(report)  # which depends on who connects to whom
            yield Verdict("host name", what, "notice" if works else "wrong", instead)
            bad = True
        elif place.fault:
            instead = "enter it in /etc/hosts; several machines would need GLOO_SOCKET_IFNAME"
            yield Verdict("host name", f"{place.fault} ({facts.name})", "notice", instead)
            bad = True
    if not bad and (place := report.facts[0].place):
        speed = f", {place.speed / 1e3:g} Gb/s" if place.speed else ""
        yield Verdict(
            "host name", f"{place.address} of {place.interface}{speed}, by {place.origin}"
        )


def _links(report: Report) -> Iterator[Verdict]:
    links = [
        (rank, int(other), link)
        for rank, found in report.findings.items()
        for other, link in found.links.items()
        if int(other) not in report.lost  # which another line names already
    ]
    faults = [
        f"from {report.name(rank)} to {report.name(other)}: {link.fault}"
        for rank, other, link in links
        if link.fault
    ]
    if faults:
        instead = "look for a firewall between them: ranks connect at ports that the system chooses"
        yield Verdict("links", f"no connection {listed(faults)}", "wrong", instead)
    good = [item for item in links if not item[2].fault]
    if not good:
        return
    if slow := _slow_links(report, good):  # perhaps the reason for a late answer
        instead = "look at cable, switch and driver there, or whether others use the network"
        yield Verdict("links", listed(slow), "notice", instead)
        return
    latencies = sorted((link.latency, rank, other) for rank, other, link in good)
    most, rank, other = latencies[-1]
    if most > _NEAR:
        what = f"{most * 1e3:.1f} ms between {report.name(rank)} and {report.name(other)}"
        yield Verdict("links", what, "notice", "ask for nodes that are close to each other")
        return
    text = f"{latencies[0][0] * 1e3:.2f} to {most * 1e3:.2f} ms"
    if measured := [link.bandwidth for _, _, link in good if link.bandwidth]:
        text += f", {in_bits(min(measured))} or more"
    pairs = {(rank, other) for rank, other, _ in good}
    ways = "both ways" if all((other, rank) in pairs for rank, other in pairs) else "one way"
    yield Verdict("links", f"{text} between nodes, {ways}")


def _slow_links(report: Report, links: Sequence[tuple[int, int, Link]]) -> list[str]:
    """Links slower than their peers, or than the card's nominal speed; from where to where."""
    measured = [item for item in links if item[2].bandwidth]
    usual = median(link.bandwidth for _, _, link in measured) if measured else 0.0
    slow = []
    for rank, other, link in measured:
        promised = min(_promised(report, rank), _promised(report, other))
        is_outlier = len(measured) > 2 and link.bandwidth < SLOW * usual
        if is_outlier or link.bandwidth < _SLOW_LINK * promised:
            speed = in_bits(link.bandwidth) + (f" of {in_bits(promised)}" if promised else "")
            slow.append(f"{speed} from {report.name(other)} to {report.name(rank)}")
    return slow


def _promised(report: Report, rank: int) -> float:
    """The nominal speed of the interface in bytes per second; 0: not known."""
    facts = report.facts.get(rank)
    return facts.place.speed * 1e6 / 8 if facts and facts.place else 0.0


def _all_reduce(report: Report) -> Iterator[Verdict]:
    if report.world.size == 1:
        return
    if not report.group:
        if not report.apart:
            yield Verdict("all-reduce", "it needs two ranks that reach each other", "not asked")
        return
    lost = [rank for rank in report.group if rank not in report.collectives]
    faults = _faulty(report)
    if lost:
        names = listed(map(report.name, lost))
        yield Verdict("all-reduce", f"no answer any more from {names}", "wrong", _MISSING)
    elif faults:
        instead = "see the lines above, or ask the network's administrators about these machines"
        yield Verdict("all-reduce", f"not over in time: {listed(faults)}", "wrong", instead)
    if lost or faults:
        return
    found = report.collectives[0]
    size = len(report.group)
    parts = [f"{sizes(int(n))} in {short(s * 1e3)} ms" for n, s in found.seconds.items()]
    largest, took = max((int(n), s) for n, s in found.seconds.items())
    speed = 2 * (size - 1) / size * largest / took  # a ring sends so much through each link
    text = f"{found.backend}, {count(size, 'rank')}: {', '.join(parts)}; {in_bits(speed)} per link"
    promised = min((_promised(report, facts.rank) for facts in report.firsts), default=0.0)
    if len(report.firsts) > 1 and promised:
        text += f", of {in_bits(promised)}"
        if largest >= 10**6 and speed < _SLOW_LINK * promised and found.backend == "gloo":
            instead = "the lines about links and cores may say why"
            yield Verdict("all-reduce", text, "notice", instead)
            return
    yield Verdict("all-reduce", text)


def _faulty(report: Report) -> list[str]:
    """The messages of the ranks whose all-reduce did not end."""
    return [f"{report.name(r)}: {c.fault}" for r, c in report.collectives.items() if c.fault]


# Questions about computing


def _products(report: Report) -> Iterator[Verdict]:
    products = {rank: found.product for rank, found in report.findings.items()}
    faults = [f"{p.fault} ({report.name(rank)})" for rank, p in products.items() if p.fault]
    if faults:
        yield Verdict("product", listed(faults), "wrong", "do not train on it: report the fault")
    for device in dict.fromkeys(p.device for p in products.values() if p.device):
        peers = {rank: p.speed for rank, p in products.items() if p.device == device}
        usual = median(peers.values())
        slow = [
            f"{report.name(rank)} computes at {speed / usual:.0%} of the speed of its peers"
            for rank, speed in peers.items()
            if speed < SLOW * usual
        ]
        text = f"{usual / 1e9:,.0f} GFLOP/s in float32 on {device}"
        if slow:
            instead = "look for other work there, a quota or heat: all ranks wait for the slowest"
            yield Verdict("product", f"{text}; {listed(slow)}", "notice", instead)
        else:
            yield Verdict("product", f"{text}, and correct")


def _tracking(report: Report) -> Iterator[Verdict]:
    if report.tracking is None:
        return
    mode, notice = report.tracking.mode, report.tracking.notice
    if notice:
        reason = notice.removeprefix("W&B keeps the run offline: ")
        instead = "a run with --wandb off does not ask for it"
        yield Verdict("W&B", f"{mode}: {reason}", "notice", instead)
    else:
        yield Verdict("W&B", f"a run is kept {mode}" if mode != "off" else "off")


_QUESTIONS: tuple[Callable[[Report], Iterator[Verdict]], ...] = (
    *(_launch, _versions, _gpus, _cores, _memory, _clocks, _disk, _cache),
    *(_network, _links, _all_reduce, _products, _tracking),
)
