"""The launcher of one node: starts the ranks, ends them as one, and keeps the failure of the rank that failed first.

The environment is torchrun's, PET_* included. Each rank leaves a failure as a small JSON file in a folder that the launcher
names; out of these the launcher picks the cause (``failures.py``), agrees with the launchers of the other nodes on the one that counts
(``watch.py``), says it once, and exits with that rank's code. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from finetune_trainer import report
from finetune_trainer.contract import ConfigurationError, EngineError, Reason, RunConfig, RunReport, exit_for
from finetune_trainer.failures import End, Failure, choose_failure, make_failure, read_failures
from finetune_trainer.model_folder import check_model_folder, find_local_folder
from finetune_trainer.ports import find_free_port
from finetune_trainer.streams import write_line
from finetune_trainer.watch import News, Seat, Watch, open_watch

RANK_PROGRAM = (sys.executable, "-P", "-m", "finetune_trainer")
FAILURE_FOLDER = "FINETUNE_FAILURE_FOLDER"
LINGER_SECONDS = 1.0
"""Time that the other ranks have to leave their own failures once one has died."""
REPEAT_SECONDS = 0.5
"""A signal that comes so soon after the first one is the same request: `timeout`, systemd and a terminal that closes signal a process, and its group too."""
LAST_WORDS_BYTES = 2**14
"""Of a rank's standard error, kept for the reason of one that can leave none."""
FORWARD_SECONDS = 1.0
"""Time that the last words of a rank that has ended may take to come, should a process that it has left hold its standard error."""
DEVICE_FOLDER = Path("/dev")
PR_SET_PDEATHSIG = 1
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}
"""A run in float32 means float32: transformer-engine's float32 products take TF32 otherwise, whose 10 bits part from transformers' logits by 5e-4."""

PROMPT = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0"}
"""A collective that times out ends its process at once: otherwise torch waits another minute for a dump that nobody has asked for."""

UNCOMPILED = {"NVTE_TORCH_COMPILE": "0"}
"""transformer-engine runs its small functions as they are written, as Megatron-core does here (megatron_cpu.py): torch's compiler costs the first steps more than it gains."""

KERNEL_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "torchinductor"}
"""Folders of compiled kernels, below ``mcore-finetune`` in the user's cache."""

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


@dataclass
class Rank:
    """One process of this node."""

    rank: int
    process: subprocess.Popen[bytes]
    killed: bool = False
    """Whether the launcher ended it, so that its exit code says nothing."""
    ended: float | None = None
    words: bytes = b""
    """The last that it wrote to standard error."""
    forwarder: threading.Thread | None = None

    def end(self) -> End:
        """How it ended."""
        return End(self.rank, self.process.returncode, self.killed, self.ended, self.words.decode(errors="replace"))


@dataclass
class Course:
    """What has happened to the ranks so far."""

    grace_seconds: float
    ranks: list[Rank] = field(default_factory=list)
    stop_requested: bool = False
    """Whether the ranks were asked to save and end."""
    signalled: float | None = None
    """When the first signal came to this launcher itself; in a cluster each node gets its own, some time after another has passed its own on."""
    deadline: float | None = None
    events: queue.SimpleQueue[Rank | News | float] = field(default_factory=queue.SimpleQueue)
    """A rank that has ended, what another node's launcher has told, or when a signal has come (``time.monotonic``)."""


def launch(config: RunConfig | Path, environment: Mapping[str, str] | None = None, program: Sequence[str] = RANK_PROGRAM) -> int:
    """Run one node's ranks to their end; the exit code is 0, or the one of the rank of the gang that failed first. Says the reason on stderr."""
    environment = os.environ if environment is None else environment
    try:
        node = read_node(environment)
        loaded = config if isinstance(config, RunConfig) else RunConfig.load(config)
    except EngineError as error:
        say(str(error))
        return exit_for(error.reason).code
    started = datetime.now(UTC)
    course = Course(loaded.run.grace_seconds)
    watch = open_watch(take_seat(node, loaded), course.events.put, say)
    with _signals(course):
        watch.start()
        own = _run(loaded, node, environment, program, course, watch)
        failure = _agree(own, watch)
        watch.close()
    if node.rank == 0:
        with suppress(OSError):  # rank 0 may have had no time to remove it, or no folder that can be written
            report.remove_address(loaded)
    if failure is None:
        return 0
    _tell(failure, own)
    _leave_failure_report(loaded, node, failure, started)
    return failure.report.exit_code


def take_seat(node: Node, config: RunConfig) -> Seat:
    """This launcher's place among those of the gang."""
    run = config.run
    gang = "/".join(map(str, (run.namespace, run.name, run.uid, run.attempt, node.num_nodes, node.master_port)))
    return Seat(gang, node.rank, node.num_nodes, node.master_address, node.master_port)


def say(text: str) -> None:
    """One message of the `megatron` command."""
    write_line(f"megatron: {text}", sys.stderr)


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


def _run(config: RunConfig, node: Node, environment: Mapping[str, str], program: Sequence[str], course: Course, watch: Watch) -> Failure | None:
    """The life of this node's ranks, and how it failed by itself."""
    try:
        check_devices(node, environment)
        check_inputs(config)
    except EngineError as error:
        return make_failure(error.reason, str(error))
    with tempfile.TemporaryDirectory(prefix="finetune-") as name:
        folder = Path(name)
        path = folder / "run.json"
        path.write_text(config.dump(), encoding="utf-8")
        try:
            for one in rank_environments(node, environment, folder):
                course.ranks.append(_start([*program, str(path)], one))
            _follow(course, watch)
        finally:
            _end(course.ranks)
        return choose_failure([rank.end() for rank in course.ranks], read_failures(folder), config, stop_requested=course.stop_requested)


def _agree(own: Failure | None, watch: Watch) -> Failure | None:
    """The failure that the gang ends with; this node's own with its traceback where it is that one."""
    agreed = watch.agree(None if own is None else own.report)
    if own is None or agreed is None:
        return None if agreed is None else Failure(agreed, time.time())
    same = (own.report.rank, own.report.node, own.report.reason) == (agreed.rank, agreed.node, agreed.reason)
    return own if same else Failure(agreed, time.time())


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
    port = find_free_port() if num_nodes == 1 and _find(environment, "MASTER_PORT") is None else _read_number(environment, "MASTER_PORT", 29500, least=1)
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


def check_devices(node: Node, environment: Mapping[str, str]) -> None:
    """Refuse more processes than this node shows GPUs; where it shows none they run on the CPU. Raises ConfigurationError."""
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    present = sum(1 for _ in DEVICE_FOLDER.glob("nvidia[0-9]*"))
    count = present if wanted is None else count_visible(wanted, present)
    if 0 < count < node.num_processes:
        shown = "" if wanted is None else f" (CUDA_VISIBLE_DEVICES is {wanted!r})"
        raise ConfigurationError(
            f"NPROC_PER_NODE is {node.num_processes}; this node shows {count} GPU{'s' if count > 1 else ''}{shown}, so it may be at most {count}; "
            "an empty CUDA_VISIBLE_DEVICES runs the processes on the CPU"
        )


def count_visible(wanted: str, present: int) -> int:
    """How many of the GPUs that are present CUDA_VISIBLE_DEVICES shows: as CUDA reads it, what comes after a wrong index is hidden."""
    if not present:
        return 0
    names = [name.strip() for name in wanted.split(",")]
    wrong = (index for index, name in enumerate(names) if not name.startswith(("GPU-", "MIG-")) and not (name.isdecimal() and int(name) < present))
    return next(wrong, len(names))


def rank_environments(node: Node, environment: Mapping[str, str], folder: Path) -> list[dict[str, str]]:
    """The environment of each rank of this node; what the user has set about threads and logging stands."""
    defaults = {"OMP_NUM_THREADS": str(max(1, available_cores() // node.num_processes)), **EXACT, **PROMPT, **UNCOMPILED, **QUIET, **kernel_caches(environment)}
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


def kernel_caches(environment: Mapping[str, str]) -> dict[str, str]:
    """Where the ranks keep compiled kernels for the next run: beside the models of the Hugging Face cache, which jobs share. Empty where nothing can be written there.

    Processes and nodes may use it at once: what writes there gives a whole file its name.
    """
    models = environment.get("HF_HOME")
    own = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", ""), ".cache")
    folder = Path(os.path.dirname(models.rstrip("/")) if models else own, "mcore-finetune")
    there = next((path for path in (folder, *folder.parents) if os.path.exists(path)), folder)
    if not folder.is_absolute() or not os.path.isdir(there) or not os.access(there, os.W_OK):
        return {}
    return {name: str(folder / part) for name, part in KERNEL_CACHES.items()}


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


def place_on_node() -> tuple[int, int]:
    """The number of this process among those of its node, and how many they are, as the launcher has set them; 0 and 1 without one."""
    return _read_number(os.environ, "LOCAL_RANK", 0, least=0), _read_number(os.environ, "LOCAL_WORLD_SIZE", 1, least=1)


# The ranks' lives


def _start(command: Sequence[str], environment: Mapping[str, str]) -> Rank:
    # A session of its own: Ctrl-C in a terminal reaches the launcher alone, and what a rank leaves behind can be ended with it.
    process = subprocess.Popen(command, env=dict(environment), stderr=subprocess.PIPE, start_new_session=True, preexec_fn=_ParentDeath(os.getpid()))
    rank = Rank(int(environment["RANK"]), process)
    rank.forwarder = threading.Thread(target=_forward, args=(rank,), name=f"stderr of rank {rank.rank}", daemon=True)
    rank.forwarder.start()
    return rank


def _forward(rank: Rank) -> None:
    """Hand a rank's standard error on as it comes, and keep the end of it."""
    assert rank.process.stderr is not None
    with rank.process.stderr as stream:
        while content := os.read(stream.fileno(), 2**16):
            rank.words = (rank.words + content)[-LAST_WORDS_BYTES:]
            with suppress(OSError):  # nobody reads the launcher's own
                os.write(2, content)


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
def _signals(course: Course) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into events while the ranks live; only the main thread can, elsewhere they keep their meaning."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        course.events.put(time.monotonic())

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _follow(course: Course, watch: Watch) -> None:
    """Return when every rank has ended, or when those that have not are to be killed."""
    for rank in course.ranks:
        threading.Thread(target=_await, args=(rank, course.events), daemon=True).start()
    running = len(course.ranks)
    while running:
        try:
            event = course.events.get(timeout=None if course.deadline is None else max(0.0, course.deadline - time.monotonic()))
        except queue.Empty:
            return
        if isinstance(event, Rank):
            running -= 1
            _note_end(course, event)
        elif event is News.END:
            return
        elif event is News.STOP:
            _request_stop(course)
        elif course.signalled is None:
            course.signalled = event
            watch.request_stop()
            _request_stop(course)
        elif event - course.signalled > REPEAT_SECONDS:
            return  # asked a second time: at once


def _await(rank: Rank, events: queue.SimpleQueue[Rank | News | float]) -> None:
    rank.process.wait()
    rank.ended = time.time()
    events.put(rank)


def _note_end(course: Course, rank: Rank) -> None:
    code = rank.process.returncode
    if code == exit_for(Reason.PREEMPTED).code:
        _set_deadline(course, course.grace_seconds)  # the others are saving too, also where another node was asked to stop
    elif code != 0:
        _set_deadline(course, LINGER_SECONDS)


def _request_stop(course: Course) -> None:
    """Ask the ranks, once."""
    if course.stop_requested:
        return
    course.stop_requested = True
    _set_deadline(course, course.grace_seconds)
    for rank in course.ranks:
        rank.process.send_signal(signal.SIGTERM)


def _set_deadline(course: Course, seconds: float) -> None:
    """Kill the ranks that live so long; an earlier deadline stays."""
    deadline = time.monotonic() + seconds
    course.deadline = deadline if course.deadline is None else min(course.deadline, deadline)


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
        if rank.forwarder is not None:
            rank.forwarder.join(FORWARD_SECONDS)


# What is left


def failure_folder() -> Path | None:
    """Where this rank's launcher wants failures; None when a rank was started without our launcher."""
    name = os.environ.get(FAILURE_FOLDER)
    return Path(name) if name else None


def _tell(failure: Failure, own: Failure | None) -> None:
    """Say why, and where, if that was on another node."""
    message = failure.report.message.rstrip()
    if failure.trace:
        write_line(failure.trace.rstrip(), sys.stderr)
    elif failure is own or failure.report.rank is None:
        say(message)
    else:
        say(f"{failure.report.node}, rank {failure.report.rank}: {message}")


def _leave_failure_report(config: RunConfig, node: Node, failure: Failure, started: datetime) -> None:
    """Put the failure into report.json (node 0) and the termination message: rank 0 may have died without, or have seen a consequence only."""
    found = report.read_report(config)
    if found is not None and (found.start_time < started or found.attempt != config.run.attempt):
        found = None  # of another launch
    now = datetime.now(UTC)
    whole = (found or RunReport(**report.describe_run(config, config.identity()), succeeded=False, start_time=started, completion_time=now)).model_copy(
        update={"succeeded": False, "failure": failure.report, "completion_time": now}
    )
    try:
        if node.rank == 0 and (found is None or found.failure != failure.report):
            report.leave_report(whole, config)
        else:
            report.leave_termination_message(whole, config)
    except OSError as error:
        say(f"the report could not be written: {error}")
