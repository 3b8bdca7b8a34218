"""Whose failure it is: what a rank leaves when it fails, and which of several failures is the cause of the others. Nothing here imports torch."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer import report
from finetune_trainer.contract import FailureReport, Reason, RunConfig, exit_for, exit_of

TIMED_OUT = re.compile(r"Watchdog caught collective operation timeout: (?P<what>[^\n]*)")
BROKEN = re.compile(r"(?P<what>NCCL error: [^\n]*)")
"""What torch writes before NCCL's watchdog, a thread that no exception of Python can leave, ends its process with SIGABRT."""


@dataclass(frozen=True)
class Failure:
    """Why one rank failed, as it or the launcher says; ``trace`` is the traceback of an Internal failure."""

    report: FailureReport
    time: float
    trace: str = ""


@dataclass(frozen=True)
class End:
    """How one rank's process ended."""

    rank: int
    code: int
    """Below 0: minus the number of the signal that ended it."""
    killed: bool
    """Whether the launcher ended it, so that its code says nothing."""
    time: float | None
    words: str = ""
    """The last that it wrote to standard error."""


def leave_failure(folder: Path, failure: Failure) -> None:
    """Write a rank's failure for its launcher. Raises OSError."""
    body = {"report": failure.report.model_dump(mode="json"), "time": failure.time, "trace": failure.trace}
    report.write_atomically(folder / f"failure-{failure.report.rank}.json", json.dumps(body).encode())


def read_failures(folder: Path) -> dict[int, Failure]:
    """What the ranks have left, by rank."""
    failures = {}
    for path in folder.glob("failure-*.json"):
        body = json.loads(path.read_bytes())
        failure = Failure(FailureReport.model_validate(body["report"]), body["time"], body["trace"])
        assert failure.report.rank is not None
        failures[failure.report.rank] = failure
    return failures


def weigh(failure: FailureReport) -> int:
    """0 for a failure that is its rank's own; the higher, the likelier it is only what another's end looks like from outside.

    A node that is gone (Distributed, of no rank) explains timeouts and broken connections; a collective that timed out explains broken
    connections, because the first rank that gives up closes its own.
    """
    if failure.reason is Reason.DISTRIBUTED:
        return 2 if failure.rank is None else 4
    return {Reason.PREEMPTED: 1, Reason.HANG: 3}.get(failure.reason, 0)


def choose_first(failures: Iterable[Failure]) -> Failure:
    """The cause: of the least weight, and of these the first."""
    return min(failures, key=lambda failure: (weigh(failure.report), failure.time))


def choose_failure(ends: Sequence[End], left: Mapping[int, Failure], config: RunConfig, *, stop_requested: bool) -> Failure | None:
    """The failure that the node ends with; None when no rank has failed that the launcher has not ended itself."""
    failed = [end for end in ends if end.code != 0]
    stopped = [end for end in failed if stop_requested and end.code == -signal.SIGTERM]
    found = [left.get(end.rank) or describe_end(end) for end in failed if end not in stopped and (end.rank in left or not end.killed)]
    own = [failure for failure in found if weigh(failure.report) == 0]
    if own or not stop_requested or not failed:
        return choose_first(own or found) if found else None
    preempted = [failure for failure in found if failure.report.reason is Reason.PREEMPTED]
    if preempted:
        return choose_first(preempted)
    late = [end for end in failed if end.killed]
    return _killed_late(late[0], config) if late and not stopped else _stopped_outside_training((stopped or failed)[0], config)


def describe_end(end: End) -> Failure:
    """The failure of a rank that could leave none: a signal by its name and what it wrote last, or its exit code."""
    if end.code >= 0:
        return make_failure(exit_of(end.code).reason, f"rank {end.rank} ended with exit code {end.code} and left no reason", end, code=end.code)
    if end.code == -signal.SIGABRT and (timeout := TIMED_OUT.search(end.words)):
        return make_failure(Reason.HANG, f"a collective did not end within parallelism.ddpTimeout: {timeout['what'].strip()}", end)
    if end.code == -signal.SIGABRT and (broken := BROKEN.search(end.words)):
        return make_failure(Reason.DISTRIBUTED, f"the connection between the ranks broke: {broken['what'].strip()}", end)
    name = signal.Signals(-end.code).name
    hint = "; the kernel does so when memory runs out" if -end.code == signal.SIGKILL else ""
    return make_failure(Reason.INTERNAL, f"rank {end.rank} was killed by signal {name}{hint}", end, code=128 - end.code)


def make_failure(reason: Reason, message: str, end: End | None = None, *, code: int | None = None) -> Failure:
    """A failure on this node, of a rank or of the node itself; its exit code is the reason's where none is given."""
    rank, ended = (None, None) if end is None else (end.rank, end.time)
    whole = FailureReport(reason=reason, message=message, rank=rank, node=socket.gethostname(), exit_code=exit_for(reason).code if code is None else code)
    return Failure(whole, ended or time.time())


def _stopped_outside_training(end: End, config: RunConfig) -> Failure:
    return make_failure(Reason.PREEMPTED, f"the run was asked to stop when no training was under way; {_onward(config)}", end)


def _killed_late(end: End, config: RunConfig) -> Failure:
    message = f"the run was asked to stop and was killed before it had ended by itself (graceSeconds is {config.run.grace_seconds:g}); {_onward(config)}"
    return make_failure(Reason.PREEMPTED, message, end)


def _onward(config: RunConfig) -> str:
    """What a run does that is started again."""
    if config.checkpoints.no_save_optim:
        return "noSaveOptim leaves the optimizer's state out of checkpoints, so it begins anew"
    return "with resume auto it goes on from its newest checkpoint, if it has one"
