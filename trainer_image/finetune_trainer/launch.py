"""The launcher of one node: starts the ranks, ends them as one, and keeps the failure of the rank that failed first.

The environment is torchrun's, PET_* included. Each rank leaves a failure as a small JSON file in a folder that the launcher
names; out of these the launcher picks the cause, says it once, and exits with that rank's code. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from finetune_trainer import report
from finetune_trainer.contract import ConfigurationError, EngineError, FailureReport, Reason, RunConfig, RunReport, exit_for, exit_of
from finetune_trainer.model_folder import check_model_folder, find_local_folder

RANK_PROGRAM = (sys.executable, "-P", "-m", "finetune_trainer")
FAILURE_FOLDER = "FINETUNE_FAILURE_FOLDER"
LINGER_SECONDS = 1.0
"""Time that the other ranks have to leave their own failures once one has died."""
CONSEQUENCES = (Reason.DISTRIBUTED, Reason.HANG, Reason.PREEMPTED)
"""Reasons that may only be what another rank's end looks like from outside."""
PR_SET_PDEATHSIG = 1
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}
"""A run in float32 means float32: transformer-engine's float32 products take TF32 otherwise, whose 10 bits part from transformers' logits by 5e-4."""

QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Where the user has not said otherwise, the libraries of the ranks keep still: the report is the only mouth."""


@dataclass(frozen=True)
class Node:
    """What the environment says about this node and its gang."""

    num_processes: int
    num_nodes: int
    rank: int
    master_address: str
    master_port: int


@dataclass(frozen=True)
class Failure:
    """Why one rank failed, as it or the launcher says; ``trace`` is the traceback of an Internal failure."""

    report: FailureReport
    time: float
    trace: str = ""


@dataclass
class Rank:
    """One process of this node."""

    rank: int
    process: subprocess.Popen[bytes]
    killed: bool = False
    """Whether the launcher ended it, so that its exit code says nothing."""
    ended: float | None = None


@dataclass
class Watch:
    """What has happened to the ranks so far."""

    ranks: Sequence[Rank]
    grace_seconds: float
    stop_requested: bool = False
    deadline: float | None = None
    events: queue.SimpleQueue[Rank | int] = field(default_factory=queue.SimpleQueue)
    """A rank that has ended, or the number of a signal that has come."""


def launch(config: RunConfig | Path, environment: Mapping[str, str] | None = None, program: Sequence[str] = RANK_PROGRAM) -> int:
    """Run one node's ranks to their end; the exit code is 0, or the one of the rank that failed first. Says the reason on stderr."""
    environment = os.environ if environment is None else environment
    try:
        node = read_node(environment)
        loaded = config if isinstance(config, RunConfig) else RunConfig.load(config)
        check_inputs(loaded)
    except EngineError as error:
        say(str(error))
        return exit_for(error.reason).code
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="finetune-") as name:
        folder = Path(name)
        path = folder / "run.json"
        path.write_text(loaded.dump(), encoding="utf-8")
        failure = _run([*program, str(path)], rank_environments(node, environment, folder), loaded, folder)
    if node.rank == 0:
        with suppress(OSError):  # rank 0 may have had no time to remove it, or no folder that can be written
            report.remove_address(loaded)
    if failure is None:
        return 0
    _tell(failure)
    _leave_failure_report(loaded, node, failure, started)
    return failure.report.exit_code


def say(text: str) -> None:
    """One message of the `megatron` command."""
    print(f"megatron: {text}", file=sys.stderr, flush=True)


def check_inputs(config: RunConfig) -> None:
    """Refuse a model folder or data file that is not there, before a process is started or another node awaited.

    Raises ModelError, DataError or ConfigurationError: the sentences of the ranks, which look again.
    """
    from finetune_trainer.data.sources import find_source  # here, so that --help need not wait for numpy

    folder = find_local_folder(config.model.source)
    if folder is not None:
        check_model_folder(folder)
    for entry in config.data.dataset:
        find_source(entry)


def _run(command: Sequence[str], environments: Sequence[Mapping[str, str]], config: RunConfig, folder: Path) -> Failure | None:
    ranks: list[Rank] = []
    watch = Watch(ranks, config.run.grace_seconds)
    with _signals(watch):
        try:
            for environment in environments:
                ranks.append(_start(command, environment))
            _follow(watch)
        finally:
            _end(ranks)
    return choose_failure(ranks, read_failures(folder), config, stop_requested=watch.stop_requested)


# The environment


def read_node(environment: Mapping[str, str]) -> Node:
    """Read NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, or their PET_ forms; raises ConfigurationError naming the variable."""
    num_nodes = _read_number(environment, "NNODES", 1, least=1)
    rank = _read_number(environment, "NODE_RANK", 0, least=0)
    if rank >= num_nodes:
        raise ConfigurationError(f"NODE_RANK is {rank}; it must be below NNODES ({num_nodes})")
    address = _find(environment, "MASTER_ADDR")
    if address is None and num_nodes > 1:
        raise ConfigurationError(f"MASTER_ADDR is not set; with NNODES {num_nodes} it must name the host of node 0")
    port = _read_number(environment, "MASTER_PORT", _free_port() if num_nodes == 1 else 29500, least=1)
    return Node(_read_num_processes(environment), num_nodes, rank, address or "127.0.0.1", port)


def is_first_node() -> bool:
    """Whether this is the node that writes what the gang writes once; raises ConfigurationError for a wrong environment."""
    return read_node(os.environ).rank == 0


def _find(environment: Mapping[str, str], name: str) -> str | None:
    return environment.get(name) or environment.get(f"PET_{name}") or None


def _read_number(environment: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    text = _find(environment, name)
    if text is None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ConfigurationError(f"{name} is {text!r}; it must be a whole number, at least {least}")
    return int(text)


def _read_num_processes(environment: Mapping[str, str]) -> int:
    if _find(environment, "NPROC_PER_NODE") not in ("auto", "gpu"):
        return _read_number(environment, "NPROC_PER_NODE", 1, least=1)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, sum(1 for device in visible.split(",") if device.strip()))
    return max(1, sum(1 for device in Path("/dev").glob("nvidia[0-9]*")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def rank_environments(node: Node, environment: Mapping[str, str], folder: Path) -> list[dict[str, str]]:
    """The environment of each rank of this node; what the user has set about threads and logging stands."""
    defaults = {"OMP_NUM_THREADS": str(max(1, available_cores() // node.num_processes)), **EXACT, **QUIET}
    gang = {
        "WORLD_SIZE": node.num_nodes * node.num_processes,
        "LOCAL_WORLD_SIZE": node.num_processes,
        "NODE_RANK": node.rank,
        "GROUP_RANK": node.rank,
        "MASTER_ADDR": node.master_address,
        "MASTER_PORT": node.master_port,
        FAILURE_FOLDER: folder,
    }
    common = {**defaults, **environment, **{name: str(value) for name, value in gang.items()}}
    return [{**common, "RANK": str(node.rank * node.num_processes + local), "LOCAL_RANK": str(local)} for local in range(node.num_processes)]


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the container's quota where there is one."""
    cores = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text(encoding="utf-8").split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def current_rank() -> int:
    """The rank of this process, which the launcher has set; 0 without one."""
    return _read_number(os.environ, "RANK", 0, least=0)


# The ranks' lives


def _start(command: Sequence[str], environment: Mapping[str, str]) -> Rank:
    # A session of its own: Ctrl-C in a terminal reaches the launcher alone, and what a rank leaves behind can be ended with it.
    process = subprocess.Popen(command, env=dict(environment), start_new_session=True, preexec_fn=_ParentDeath(os.getpid()))
    return Rank(int(environment["RANK"]), process)


class _ParentDeath:
    """Run between fork and exec of a rank: the kernel kills it when the launcher dies, even by SIGKILL."""

    def __init__(self, parent: int) -> None:
        self.parent = parent
        self.libc = ctypes.CDLL(None, use_errno=True)

    def __call__(self) -> None:
        die_with_parent(self.parent, self.libc)


def die_with_parent(parent: int, libc: ctypes.CDLL | None = None) -> None:
    """Have the kernel kill this process when ``parent`` is gone."""
    (libc or ctypes.CDLL(None)).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


@contextmanager
def _signals(watch: Watch) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into events while the ranks live; only the main thread can, elsewhere they keep their meaning."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        watch.events.put(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _follow(watch: Watch) -> None:
    """Return when every rank has ended, or when those that have not are to be killed."""
    for rank in watch.ranks:
        threading.Thread(target=_await, args=(rank, watch.events), daemon=True).start()
    running = len(watch.ranks)
    while running:
        try:
            event = watch.events.get(timeout=None if watch.deadline is None else max(0.0, watch.deadline - time.monotonic()))
        except queue.Empty:
            return
        if isinstance(event, Rank):
            running -= 1
            _note_end(watch, event)
        elif watch.stop_requested:
            return  # asked a second time: at once
        else:
            _request_stop(watch)


def _await(rank: Rank, events: queue.SimpleQueue[Rank | int]) -> None:
    rank.process.wait()
    rank.ended = time.time()
    events.put(rank)


def _note_end(watch: Watch, rank: Rank) -> None:
    code = rank.process.returncode
    preempted = watch.stop_requested and code == exit_for(Reason.PREEMPTED).code
    if code != 0 and not preempted:
        soon = time.monotonic() + LINGER_SECONDS
        watch.deadline = soon if watch.deadline is None else min(watch.deadline, soon)


def _request_stop(watch: Watch) -> None:
    watch.stop_requested = True
    deadline = time.monotonic() + watch.grace_seconds
    watch.deadline = deadline if watch.deadline is None else min(watch.deadline, deadline)
    for rank in watch.ranks:
        rank.process.send_signal(signal.SIGTERM)


def _end(ranks: Sequence[Rank]) -> None:
    """Kill what still runs, with the processes that ranks have started, and reap it."""
    for rank in ranks:
        rank.killed = rank.process.poll() is None
        try:
            os.killpg(rank.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # nothing is left of its session
    for rank in ranks:
        rank.process.wait()


# Whose failure it is


def failure_folder() -> Path | None:
    """Where this rank's launcher wants failures; None when a rank was started without our launcher."""
    name = os.environ.get(FAILURE_FOLDER)
    return Path(name) if name else None


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


def choose_failure(ranks: Sequence[Rank], left: Mapping[int, Failure], config: RunConfig, *, stop_requested: bool) -> Failure | None:
    """The failure that the node ends with: the first that is not only the consequence of another; None when all ranks succeeded."""
    failed = [rank for rank in ranks if rank.process.returncode != 0]
    if not failed:
        return None
    stopped = [rank for rank in failed if stop_requested and rank.process.returncode == -signal.SIGTERM]
    found = [left.get(rank.rank) or describe_end(rank) for rank in failed if rank not in stopped and (rank.rank in left or not rank.killed)]
    own = [failure for failure in found if failure.report.reason not in CONSEQUENCES]
    if own or not stop_requested:
        return _first(own or found)
    preempted = [failure for failure in found if failure.report.reason is Reason.PREEMPTED]
    if preempted:
        return _first(preempted)
    return _stopped_outside_training(stopped[0], config) if stopped else _killed_late(failed[0].rank, config)


def _first(failures: Iterable[Failure]) -> Failure:
    return min(failures, key=lambda failure: failure.time)


def describe_end(rank: Rank) -> Failure:
    """The failure of a rank that could leave none: a signal by its name, or its exit code."""
    code = rank.process.returncode
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the kernel does so when memory runs out" if -code == signal.SIGKILL else ""
        return _failure(Reason.INTERNAL, f"rank {rank.rank} was killed by signal {name}{hint}", rank.rank, 128 - code, rank.ended)
    return _failure(exit_of(code).reason, f"rank {rank.rank} ended with exit code {code} and left no reason", rank.rank, code, rank.ended)


def _stopped_outside_training(rank: Rank, config: RunConfig) -> Failure:
    message = f"the run was asked to stop when no training was under way; {_onward(config)}"
    return _failure(Reason.PREEMPTED, message, rank.rank, exit_for(Reason.PREEMPTED).code, rank.ended)


def _killed_late(rank: int, config: RunConfig) -> Failure:
    message = f"the run was asked to stop and was killed before it had ended by itself (graceSeconds is {config.run.grace_seconds:g}); {_onward(config)}"
    return _failure(Reason.PREEMPTED, message, rank, exit_for(Reason.PREEMPTED).code, None)


def _onward(config: RunConfig) -> str:
    """What a run does that is started again."""
    if config.checkpoints.no_save_optim:
        return "noSaveOptim leaves the optimizer's state out of checkpoints, so it begins anew"
    return "with resume auto it goes on from its newest checkpoint, if it has one"


def _failure(reason: Reason, message: str, rank: int, code: int, ended: float | None) -> Failure:
    return Failure(FailureReport(reason=reason, message=message, rank=rank, node=socket.gethostname(), exit_code=code), ended or time.time())


def _tell(failure: Failure) -> None:
    if failure.trace:
        print(failure.trace.rstrip(), file=sys.stderr, flush=True)
    else:
        say(failure.report.message.rstrip())


def _leave_failure_report(config: RunConfig, node: Node, failure: Failure, started: datetime) -> None:
    """Put the failure into report.json (node 0) and the termination message: rank 0 may have died without, or have seen a consequence only."""
    found = report.read_report(config)
    if found is not None and (found.start_time < started or found.attempt != config.run.attempt):
        found = None  # of another launch
    if found is not None and found.failure == failure.report:
        return
    now = datetime.now(UTC)
    whole = (found or RunReport(**report.describe_run(config, config.identity()), succeeded=False, start_time=started, completion_time=now)).model_copy(
        update={"succeeded": False, "failure": failure.report, "completion_time": now}
    )
    try:
        if node.rank == 0:
            report.leave_report(whole, config)
        else:
            report.leave_termination_message(whole, config)
    except OSError as error:
        say(f"the report could not be written: {error}")
