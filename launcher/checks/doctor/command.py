"""`launcher doctor`: the machine and the cluster, on all ranks, within a time limit.

Each rank first asks its own machine, and writes the answers where all can read them. Rank 0 goes on
with those that have answered, names the others, and prints. What needs all ranks at once comes
last: where it gets stuck, everything else is known.

Whatever may never end runs in a thread that is left behind: a request to a file server that is
away, a collective of gloo or NCCL. Neither can be interrupted from Python, and a child process
would be no better: it too would be left behind, and would have to import torch once more. So a
process with such a thread ends by `os._exit`.
"""

import os
import socket
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from launcher.checks.doctor import links, machine, products
from launcher.checks.doctor.board import Board
from launcher.checks.doctor.comparison import verdicts
from launcher.checks.doctor.facts import Facts, Mistake, Tracking, read, read_facts
from launcher.checks.doctor.links import Collective, Group, Link, Listener
from launcher.checks.doctor.products import Product
from launcher.checks.doctor.report import Findings, Report, as_values, node_table, read_findings
from launcher.checks.verdicts import (
    WIDTH,
    Deadline,
    add_options,
    as_json,
    closing_line,
    exit_code,
    show,
)
from launcher.distributed.environment import refuse_unusable
from launcher.distributed.store import in_thread, open_store
from launcher.distributed.world import World, check_world
from launcher.errors import EXIT_USER, RankError, UserError
from launcher.utils.arguments import Parser, seconds
from launcher.utils.redaction import redacted
from launcher.utils.terminal import make_console
from launcher.utils.text import count

T = TypeVar("T")
LIMIT = 60.0  # seconds
# When each part ends at the latest, as parts of the limit; all take seconds where all is well.
_LOCAL, _JOIN, _FINDINGS, _COLLECTIVE, _END = 0.45, 0.5, 0.7, 0.92, 0.97
_REDUCING = 12.0  # seconds of all-reduce at most
_MEASURING = 3.0  # seconds for it at least, however late it is
_LEAVING = 2.0  # seconds that rank 0 keeps its store for the others
_CLOCKS = 5.0  # seconds to ask the clocks of all nodes
_TRACKING = 10.0  # seconds for W&B, which takes 6 at most without a network
_MARK = 3.0  # seconds until a network's file system shows a new file to all
_MEMORY_SHARE = 16  # an all-reduce may take 1/16 of the free memory, as gloo makes copies
_USAGE = "launcher doctor [--runs DIR] [--json] [--limit SECONDS]"
_DESCRIPTION = "Examine this machine or, started by torchrun or srun, all machines of a run."


def main(words: list[str], world: World, refuse: Callable[[], None]) -> int:
    """Run the words behind `launcher doctor`, as one rank of a world.

    `refuse` raises `UserError` where the batch system would start something else than was meant.
    """
    # argparse's own --help ends the process by an exception.
    parser = Parser(prog="launcher doctor", usage=_USAGE, description=_DESCRIPTION, add_help=False)
    add = parser.add_argument
    add("--help", "-h", action="store_true", help="this text")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where run folders go")
    add_options(parser, LIMIT)
    join = "part of --limit to wait for all ranks (default and maximum: half of it)"
    add("--join-timeout", type=seconds, default=LIMIT, metavar="SECONDS", help=join)
    arguments = parser.parse_args(words)
    if arguments.help:
        sys.stdout.write(parser.format_help() if world.is_main else "")
        return 0
    deadline = Deadline(arguments.limit)
    patient = Patient(deadline, min(arguments.join_timeout, _JOIN * deadline.seconds))
    own = Own(world, arguments.runs, refuse)
    if world.is_main and not arguments.json:
        _print(
            f"launcher doctor: {count(world.size, 'rank')}, rank 0 on {socket.gethostname()}; "
            f"at most {deadline.seconds:g} s"
        )
    try:
        if world.is_main:
            code = _first_rank(own, patient, _json if arguments.json else _show)
        else:
            code = _other_rank(own, patient)
    except RankError as error:  # of another rank than 0
        sys.stderr.write(redacted(f"launcher: {error}\n"))
        code = error.exit_code
    patient.end(code)
    return code


@dataclass(frozen=True)
class Own:
    """This rank: its place in the world, the folder of runs, and the check of the world."""

    world: World
    runs: Path
    refuse: Callable[[], None]


class Patient:
    """Waits, with a time limit, for work that may never end."""

    def __init__(self, deadline: Deadline, join: float) -> None:
        """`join` is how many of the seconds the ranks may take to meet."""
        self.deadline, self.join = deadline, join
        self.has_left_threads = False

    def end(self, code: int) -> None:
        """End the process where a thread was left behind; torch would wait for it, or abort."""
        if self.has_left_threads:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def left(self, part: float = 1.0) -> float:
        """Seconds until this part of the limit is over."""
        return max(0.0, part * self.deadline.seconds - self.deadline.spent)

    def result(self, future: "Future[T]", seconds: float) -> T:
        """The result of a thread, or its exception; `TimeoutError` where it is left behind."""
        try:
            return future.result(seconds)
        except TimeoutError:
            if future.done():
                raise
            self.has_left_threads = True
            raise TimeoutError(f"no answer within {self.deadline.spent:.0f} s") from None


# The parts of every rank


def ask_machine(own: Own, patient: Patient) -> Facts:
    """Ask this machine all questions at once, each in a thread."""
    world = own.world
    asked: dict[str, Future[Any]] = {
        "memory": in_thread(machine.memory),
        "place": in_thread(lambda: machine.place(world)),
        "cache": in_thread(machine.compile_cache),
    }
    asked["torch"] = torch = in_thread(lambda: _ask_torch(world))
    asked["mistakes"] = in_thread(lambda: _mistakes(own, torch))
    if world.local_rank == 0:
        asked["disk"] = in_thread(lambda: machine.disk(own.runs))
    if world.hosts_store:
        asked["port"] = in_thread(lambda: machine.port(world))
    answers: dict[str, Any] = {"versions": machine.versions()}
    unanswered = {}
    for name, future in asked.items():
        try:
            answers[name] = patient.result(future, patient.left(_LOCAL))
        except Exception as error:  # any: the other questions still have their answers
            unanswered[name] = _in_words(error)
    of_torch = answers.pop("torch", {})
    answers["versions"] |= of_torch.pop("versions", {})
    return Facts(
        rank=world.rank,
        node=world.node,
        local_rank=world.local_rank,
        local_size=world.local_size,
        host=socket.gethostname(),
        unanswered=unanswered,
        **answers,
        **of_torch,
    )


def _ask_torch(world: World) -> dict[str, Any]:
    found = {"versions": machine.versions_of_torch(), "gpus": machine.gpus()}
    return {**found, "cores": machine.cores(world)}


def _mistakes(own: Own, torch: "Future[Any]") -> tuple[Mistake, ...]:
    """The reasons for which a run of this world would be refused."""
    wait([torch])  # Accelerate imports it too
    found = []
    for check in (
        own.refuse,
        lambda: check_world(own.world, own.world.size),
        lambda: refuse_unusable(os.environ),
    ):
        try:
            check()
        except UserError as error:
            found.append(Mistake(f"{error.given}; expected {error.expected}", error.instead))
    return tuple(found)


def _in_words(error: Exception) -> str:
    """The first line of an error, with its class unless it is our own time-out."""
    kind = "" if isinstance(error, TimeoutError) else f"{type(error).__name__}: "
    return f"{kind}{error}".split("\n")[0]


def _tracking() -> Tracking:
    from launcher.loggers import wandb

    return Tracking(*wandb.mode_here())


def _refuse_without_torch(facts: Facts) -> None:
    """Raise `RankError`: a second import beside one that is under way ends the process."""
    if why := facts.unanswered.get("torch"):
        raise RankError(f"{facts.name} cannot import torch: {why}", EXIT_USER)


def _meet(world: World, patient: Patient) -> Board:
    """The board of all ranks; raises `RankError` where this one does not find it."""
    name = f"rank {world.rank}"
    try:
        resolving = in_thread(lambda: machine.resolve(world.address))
        patient.result(resolving, max(1.0, patient.join - patient.deadline.spent))
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        join = float(max(1, round(patient.join - patient.deadline.spent)))
        host = None if world.hosts_store else "rank 0"
        store = open_store(world.address, world.port, join, name, host)
    except (OSError, ImportError) as error:  # TimeoutError is an OSError
        where = f"{name} of {world.size} on {socket.gethostname()}"
        reason = f"does not meet the others at {world.address} port {world.port}: {error}"
        raise RankError(f"{where} {reason}", EXIT_USER) from None
    except RankError as error:
        raise RankError(str(error), EXIT_USER) from None
    return Board(PrefixStore(f"launcher/doctor/{world.attempt}", store))


@dataclass(frozen=True)
class Plan:
    """The ranks that take part; the first of each node and where it listens; rank 0's mark."""

    ranks: list[int]
    firsts: list[int]
    addresses: list[tuple[str, int] | None]
    mark: str | None


def _find(world: World, plan: Plan, patient: Patient) -> Findings:
    """Measure this rank's device, and its links to the other nodes."""
    product, reached, sees_mark = Product(), dict[str, Link](), None
    most = max(_MEASURING, patient.left(_FINDINGS))
    try:
        multiplying = in_thread(lambda: products.multiply(world))
        product = patient.result(multiplying, most)
    except Exception as error:  # as of a GPU that is broken
        product = Product(fault=_in_words(error))
    if world.rank in plan.firsts and len(plan.firsts) > 1:
        trying = in_thread(lambda: links.try_links(plan.firsts.index(world.rank), plan.addresses))
        with suppress(TimeoutError):
            found = patient.result(trying, most)
            reached = {str(plan.firsts[node]): link for node, link in found.items()}
        if plan.mark and not world.is_main:
            looking = in_thread(partial(machine.sees, plan.mark, _MARK))
            with suppress(TimeoutError):
                sees_mark = patient.result(looking, _MARK + 1)
    return Findings(product, reached, sees_mark)


def _reduce(world: World, group: Group, board: Board, patient: Patient) -> Collective:
    reducing = in_thread(lambda: links.all_reduce(world, group, board.store.clone()))
    try:
        return patient.result(reducing, group.seconds + 1)
    except Exception as error:
        patient.has_left_threads = True  # of the process group
        return Collective(fault=_in_words(error))


# Rank 0, which leads, and the others


def _first_rank(own: Own, patient: Patient, shown: "Shown") -> int:
    """Lead the others, print, and return the exit code of all."""
    report, board = _examined(own, patient)
    code = shown(report, patient.deadline)
    if board is not None:
        board.put("code", code)
        if own.world.hosts_store:  # it ends with this process
            board.wait_for_count("left", len(report.facts) - 1, min(_LEAVING, patient.left()))
    return code


def _examined(own: Own, patient: Patient) -> tuple[Report, Board | None]:
    """The whole report, and the board on which the others wait for the exit code."""
    world = own.world
    report = Report(world, {0: ask_machine(own, patient)})
    try:
        _refuse_without_torch(report.facts[0])
    except RankError as error:
        return replace(report, apart=str(error)), None
    # Not at once with torch: imports in two threads get into each other's way.
    tracking = in_thread(_tracking)
    if world.size == 1:
        tracked = _tracked(tracking, patient)
        found = _find(world, Plan([0], [0], [None], None), patient)
        return replace(report, findings={0: found}, tracking=tracked), None
    try:
        board = _meet(world, patient)
    except RankError as error:
        return replace(report, apart=str(error), tracking=_tracked(tracking, patient)), None
    facts, listener = _listen(report.facts[0])
    keys = [f"facts/{rank}" for rank in range(1, world.size)]
    answers = board.collect(keys, patient.join - patient.deadline.spent)
    others = {_rank_of(key): read_facts(answers[key]) for key in answers}
    tracked = _tracked(tracking, patient)  # before anything is measured
    report = _lead(Report(world, {0: facts, **others}, tracking=tracked), board, patient)
    if listener:
        listener.close()
    return report, board


def _lead(report: Report, board: Board, patient: Patient) -> Report:
    """Measure with all ranks that have answered."""
    world, facts = report.world, report.facts
    plan = _plan(facts)
    board.put("plan", asdict(plan))
    offsets = links.ask_clocks(board, plan.firsts[1:], _CLOCKS)
    board.put("begin", "")
    findings = {0: _find(world, plan, patient)}
    keys = [f"findings/{rank}" for rank in plan.ranks[1:]]
    answers = board.collect(keys, patient.left(_FINDINGS) + 1)
    findings |= {_rank_of(key): read_findings(answers[key]) for key in answers}
    _remove(plan.mark)
    group = _group(facts, findings, patient)
    board.put("group", asdict(group))
    collectives = {}
    if group.ranks:
        collectives[0] = _reduce(world, group, board, patient)
        keys = [f"collective/{rank}" for rank in group.ranks[1:]]
        answers = board.collect(keys, patient.left(_COLLECTIVE))
        for key in answers:
            collectives[_rank_of(key)] = read(Collective, answers[key])
    return replace(
        report, offsets=offsets, findings=findings, collectives=collectives, group=group.ranks
    )


def _rank_of(key: str) -> int:
    return int(key.rpartition("/")[2])


def _listen(facts: Facts) -> tuple[Facts, Listener | None]:
    """Let other nodes try to reach this process at its address."""
    if facts.place is None:
        return facts, None
    try:
        listener = Listener(facts.place.address)
    except OSError:
        return facts, None
    return replace(facts, listens=listener.port), listener


def _plan(facts: Mapping[int, Facts]) -> Plan:
    by_node: dict[int, int] = {}
    for rank in sorted(facts):
        by_node.setdefault(facts[rank].node, rank)
    firsts = sorted(by_node.values())
    mark = None
    disk = facts[0].disk
    if disk is not None and len(firsts) > 1:
        marking = in_thread(lambda: machine.leave_mark(disk.folder, uuid.uuid4().hex))
        with suppress(TimeoutError):
            mark = marking.result(_MARK)
    return Plan(sorted(facts), firsts, addresses_of([facts[rank] for rank in firsts]), mark)


def addresses_of(firsts: Sequence[Facts]) -> list[tuple[str, int] | None]:
    """Where the nodes listen; None for an address that is only valid on its own host."""
    several = len({facts.host for facts in firsts}) > 1
    return [
        None
        if facts.place is None or not facts.listens or (several and facts.place.is_loopback)
        else (facts.place.address, facts.listens)
        for facts in firsts
    ]


def _remove(mark: str | None) -> None:
    if mark is not None:
        removing = in_thread(lambda: Path(mark).unlink(missing_ok=True))
        with suppress(OSError):
            removing.result(_MARK)


def _group(facts: Mapping[int, Facts], findings: Mapping[int, Findings], patient: Patient) -> Group:
    """The ranks of the all-reduce: all that answered; none where nodes do not reach each other."""
    ranks = sorted(findings)
    apart = any(link.fault for found in findings.values() for link in found.links.values())
    if len(ranks) < 2 or apart:
        return Group([], 0.0, 0)
    free = (
        min(memory.available, memory.limit or memory.available) // facts[rank].local_size
        for rank in ranks
        if (memory := facts[rank].memory)
    )
    most = min(free, default=0) // _MEMORY_SHARE
    return Group(ranks, min(_REDUCING, patient.left(_COLLECTIVE) - 2), most)


def _tracked(tracking: "Future[Tracking]", patient: Patient) -> Tracking:
    try:
        return patient.result(tracking, min(_TRACKING, patient.left(_END)))
    except TimeoutError:
        return Tracking("offline", f"no answer within {_TRACKING:g} s")
    except Exception as error:
        return Tracking("offline", _in_words(error))


def _other_rank(own: Own, patient: Patient) -> int:
    """Answer rank 0's questions; the exit code is rank 0's."""
    world = own.world
    facts = ask_machine(own, patient)
    _refuse_without_torch(facts)
    board = _meet(world, patient)
    facts, listener = _listen(facts)
    board.put(f"facts/{world.rank}", asdict(facts))
    given = board.get("plan", patient.left())
    if given is not None and world.rank in given["ranks"]:
        _follow(world, Plan(**given), board, patient)
    code = board.get("code", patient.left())
    board.count("left")
    if listener:
        listener.close()
    if code is None:
        said = f"rank 0 did not say what it found within {patient.deadline.seconds:g} s"
        if board.is_lost:
            said = "rank 0, or the key-value store there, does not answer any more"
        where = f"rank {world.rank} of {world.size} on {socket.gethostname()}"
        raise RankError(f"{said} ({where})", EXIT_USER)
    return int(code)


def _follow(world: World, plan: Plan, board: Board, patient: Patient) -> None:
    if world.rank in plan.firsts:
        links.tell_clock(board, world.rank, _CLOCKS + 1)
    if board.get("begin", patient.left()) is not None:
        board.put(f"findings/{world.rank}", asdict(_find(world, plan, patient)))
    given = board.get("group", patient.left())
    if given is not None and world.rank in given["ranks"]:
        measured = _reduce(world, Group(**given), board, patient)
        board.put(f"collective/{world.rank}", asdict(measured))


# What is printed


Shown = Callable[[Report, Deadline], int]


def _show(report: Report, deadline: Deadline) -> int:
    found = verdicts(report)
    console = make_console(WIDTH)
    for line in node_table(report):
        console.print(redacted(line), markup=False, soft_wrap=True)
    for verdict in found:
        show(verdict, console)
    _print(closing_line(deadline))
    return exit_code(found)


def _json(report: Report, deadline: Deadline) -> int:
    found = verdicts(report)
    _print(as_json(as_values(report), found, deadline))
    return exit_code(found)


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
