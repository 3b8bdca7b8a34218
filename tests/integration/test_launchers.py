"""The launchers of two nodes, with real processes: when one node fails, all end, with the reason of the rank that failed first.

The ranks are small programs: what a rank does is the launcher's input. How long an end took is printed and kept as a property of the test.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from finetune_trainer.contract import Reason, RunConfig, RunReport
from finetune_trainer.ports import find_free_port

MASTER = "127.0.0.2"
DEADLINE_SECONDS = 300
"""Of what is still alive: an end is noticed at once."""
HOST = socket.gethostname()
KILLED = "was killed by signal SIGKILL; the kernel does so when memory runs out"
LAUNCH = """
import os, sys
from pathlib import Path
from finetune_trainer import launch, watch
read = watch.Line.read
def read_and_note(line):
    messages = read(line)
    if any(message.kind == "hello" for message in messages):
        Path(os.environ["TEST_FOLDER"], "greeted-" + os.environ["NODE_RANK"]).touch()
    return messages
watch.Line.read = read_and_note
sys.exit(launch.launch(Path(sys.argv[1]), os.environ, sys.argv[2:]))
"""
"""A launcher that leaves a file when another has greeted it: node 1's when both know each other."""
PRELUDE = """
import json, os, signal, sys, threading, time
from pathlib import Path
rank, node, test = int(os.environ["RANK"]), int(os.environ["NODE_RANK"]), Path(os.environ["TEST_FOLDER"])
folder = Path(os.environ["FINETUNE_FAILURE_FOLDER"])
def fail(reason, message, code):
    body = {"report": {"reason": reason, "message": message, "rank": rank, "node": f"host-{node}", "exitCode": code}, "time": time.time(), "trace": ""}
    (folder / f".{rank}").write_text(json.dumps(body))
    (folder / f".{rank}").rename(folder / f"failure-{rank}.json")
    os._exit(code)
def say(word):
    os.write(1, f"{word} {rank} {os.getpid()}\\n".encode())
def wait():
    threading.Event().wait()
def wait_for(name):
    while not (test / name).exists():
        threading.Event().wait(0.02)
"""
WAIT = 'say("ready")\nwait()'


class Started:
    """A launcher that runs, and what it says: ``PID`` of each rank that is ready."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        """None is the end."""
        self._errors: list[str] = []
        self.ended = 0.0
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._errors.append(line)
        self.process.wait()
        self.ended = time.monotonic()

    def hear(self, word: str) -> int:
        """The process id of the next rank that says ``word``; fails at once when the launcher and its ranks end without."""
        try:
            line = self._lines.get(timeout=DEADLINE_SECONDS)
        except queue.Empty:
            pytest.fail(f"nobody has said {word!r} for {DEADLINE_SECONDS} s; standard error:\n{''.join(self._errors)}")
        if line is None:
            self._lines.put(None)
            code, errors = self.end()
            pytest.fail(f"the launcher ended with {code} before a rank said {word!r}; standard error:\n{errors}")
        said, _, pid = line.split()
        assert said == word
        return int(pid)

    def end(self) -> tuple[int, str]:
        """Exit code and standard error."""
        code = self.process.wait(timeout=DEADLINE_SECONDS)
        for thread in self._threads:
            thread.join(DEADLINE_SECONDS)
        return code, "".join(self._errors)


Start = Callable[..., Started]
Took = Callable[..., None]


def write_config(folder: Path, node: int, sections: Mapping[str, Mapping[str, object]]) -> Path:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").touch()
    (folder / "rows.jsonl").touch()
    written = {
        "model": {"source": str(folder / "model")},
        "data": {"dataset": [str(folder / "rows.jsonl")]},
        "run": {"outputDir": str(folder / "out"), "terminationMessagePath": str(folder / f"termination-{node}")},
    }
    config = RunConfig.model_validate({name: {**written.get(name, {}), **sections.get(name, {})} for name in {*written, *sections}})  # type: ignore[dict-item]
    path = folder / f"run-{node}.json"
    path.write_text(config.dump())
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the launcher of one of two nodes; what a failed test leaves is ended."""
    started: list[Started] = []
    port = find_free_port(2)

    def start(node: int, body: str = WAIT, processes: int = 1, environment: Mapping[str, str] | None = None, **sections: Mapping[str, object]) -> Started:
        program = tmp_path / f"rank-{node}.py"
        program.write_text(PRELUDE + textwrap.dedent(body))
        place = {"NNODES": "2", "NODE_RANK": str(node), "NPROC_PER_NODE": str(processes), "MASTER_ADDR": MASTER, "MASTER_PORT": str(port)}
        paths = os.pathsep.join(path for path in sys.path if path)
        known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TEST_FOLDER": str(tmp_path), **place, **(environment or {})}
        started.append(Started([sys.executable, "-c", LAUNCH, str(write_config(tmp_path, node, sections)), sys.executable, str(program)], known))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


@pytest.fixture
def took(record_property: Callable[[str, object], None]) -> Took:
    """Says how long after something launchers ended."""

    def took(what: str, since: float, *launchers: Started) -> None:
        seconds = [round(launcher.ended - since, 2) for launcher in launchers]
        record_property(what, seconds)
        print(f"{what}: launchers ended after {seconds} s")

    return took


def await_watch(folder: Path, *launchers: Started) -> None:
    """Return when the launchers of both nodes know each other: node 1 has been greeted in answer to its own greeting."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (folder / "greeted-1").exists():
        for launcher in launchers:
            assert launcher.process.poll() is None, "ended with {} before the launchers knew each other; standard error:\n{}".format(*launcher.end())
        assert time.monotonic() < deadline, "the launchers do not know each other"
        threading.Event().wait(0.05)


def report(folder: Path) -> RunReport:
    return RunReport.model_validate_json((folder / "out" / "report.json").read_bytes())


def termination(folder: Path, node: int) -> dict[str, object]:
    failure: dict[str, object] = json.loads((folder / f"termination-{node}").read_text())["failure"]
    return failure


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["node-0-first", "node-0-later"])
def test_a_rank_that_is_killed_ends_both_nodes_with_its_name_and_reason(order: tuple[int, int], start: Start, took: Took, tmp_path: Path) -> None:
    nodes, ranks = {}, {}
    for node in order:
        nodes[node] = start(node, processes=2)
        ranks[node] = [nodes[node].hear("ready") for _ in range(2)]
    await_watch(tmp_path, *nodes.values())
    began = time.monotonic()
    os.kill(ranks[1][0], signal.SIGKILL)
    ends = [nodes[node].end() for node in (0, 1)]
    took("a rank of node 1 killed", began, nodes[0], nodes[1])
    failure = report(tmp_path).failure
    assert failure is not None
    assert failure.rank in (2, 3)
    assert ends == [(137, f"megatron: {HOST}, rank {failure.rank}: rank {failure.rank} {KILLED}\n"), (137, f"megatron: rank {failure.rank} {KILLED}\n")]
    assert (failure.reason, failure.node) == (Reason.INTERNAL, HOST)
    assert termination(tmp_path, 0) == termination(tmp_path, 1)


def test_a_rank_of_node_0_that_fails_ends_node_1_with_its_reason(start: Start, took: Took, tmp_path: Path) -> None:
    other = start(1)
    other.hear("ready")
    began = time.monotonic()
    first = start(0, 'fail("Data", "rows.jsonl:7: role order", 11)')
    assert (first.end(), other.end()) == ((11, "megatron: rows.jsonl:7: role order\n"), (11, "megatron: host-0, rank 0: rows.jsonl:7: role order\n"))
    took("node 0 started and failed", began, first, other)


def test_a_launcher_that_is_killed_is_a_node_that_is_gone(start: Start, took: Took, tmp_path: Path) -> None:
    nodes = [start(0), start(1)]
    for node in nodes:
        node.hear("ready")
    await_watch(tmp_path, *nodes)
    began = time.monotonic()
    nodes[1].process.kill()
    assert nodes[0].end() == (20, f"megatron: node 1 ({HOST}) is gone: its launcher has ended without a word, or cannot be reached any more\n")
    took("launcher of node 1 killed", began, nodes[0])
    failure = report(tmp_path).failure
    assert failure is not None
    assert (failure.reason, failure.node, failure.rank) == (Reason.DISTRIBUTED, HOST, None)


def test_a_launcher_that_falls_silent_is_a_node_that_is_gone(start: Start, took: Took, tmp_path: Path) -> None:
    """As when its host loses power: no connection is closed."""
    nodes = [start(0), start(1)]
    for node in nodes:
        node.hear("ready")
    await_watch(tmp_path, *nodes)
    began = time.monotonic()
    nodes[1].process.send_signal(signal.SIGSTOP)
    assert nodes[0].end() == (20, f"megatron: node 1 ({HOST}) is gone: its launcher has ended without a word, or cannot be reached any more\n")
    took("launcher of node 1 silent", began, nodes[0])


def test_node_0_that_is_killed_is_told_by_the_other(start: Start, took: Took, tmp_path: Path) -> None:
    nodes = [start(0), start(1)]
    for node in nodes:
        node.hear("ready")
    await_watch(tmp_path, *nodes)
    began = time.monotonic()
    nodes[0].process.kill()
    assert nodes[1].end() == (20, f"megatron: node 0 ({MASTER}) is gone: its launcher has ended without a word, or cannot be reached any more\n")
    took("launcher of node 0 killed", began, nodes[1])
    assert termination(tmp_path, 1)["reason"] == "Distributed"


def test_a_connection_that_a_gone_node_broke_is_told_as_that_nodes_end(start: Start, tmp_path: Path) -> None:
    first = start(0, 'say("ready")\nwait_for("gone")\nfail("Distributed", "the connection between the ranks broke", 20)')
    other = start(1)
    first.hear("ready")
    other.hear("ready")
    await_watch(tmp_path, first, other)
    other.process.kill()
    (tmp_path / "gone").touch()
    code, errors = first.end()
    assert (code, errors.startswith(f"megatron: node 1 ({HOST}) is gone")) == (20, True)


def test_a_cause_on_one_node_beats_what_it_looked_like_on_the_other_before(start: Start, took: Took, tmp_path: Path) -> None:
    body = """
    say("ready")
    wait_for("go")
    if node == 0:
        (test / "broken").touch()
        fail("Distributed", "the connection between the ranks broke", 20)
    wait_for("broken")
    fail("Numeric", "step 3: the loss is nan", 14)
    """
    nodes = [start(0, body), start(1, body)]
    for node in nodes:
        node.hear("ready")
    await_watch(tmp_path, *nodes)
    began = time.monotonic()
    (tmp_path / "go").touch()
    assert [node.end() for node in nodes] == [(14, "megatron: host-1, rank 1: step 3: the loss is nan\n"), (14, "megatron: step 3: the loss is nan\n")]
    took("a consequence, then its cause", began, *nodes)


def test_a_node_that_refuses_its_inputs_ends_the_other(start: Start, tmp_path: Path) -> None:
    first = start(0)
    first.hear("ready")
    other = start(1, model={"source": "/no/model"})
    assert other.end() == (12, "megatron: model.source: there is no folder /no/model\n")
    assert first.end() == (12, "megatron: model.source: there is no folder /no/model\n")
    assert termination(tmp_path, 1) == termination(tmp_path, 0)


CHECKPOINTING = """
# Not a handler that sets an event: one that comes while wait() holds the event's lock would wait for that lock for ever.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
say("ready")
signal.sigwait({signal.SIGTERM})
(test / f"checkpoint-{rank}").touch()
fail("Preempted", "saved step 3", 143)
"""


@pytest.mark.parametrize("asked", [0, 1])
def test_a_node_that_is_asked_to_stop_has_the_other_save_too(asked: int, start: Start, took: Took, tmp_path: Path) -> None:
    nodes = [start(0, CHECKPOINTING, processes=2), start(1, CHECKPOINTING, processes=2)]
    for node in nodes:
        node.hear("ready")
        node.hear("ready")
    await_watch(tmp_path, *nodes)
    began = time.monotonic()
    nodes[asked].process.send_signal(signal.SIGTERM)
    assert [node.end() for node in nodes] == [(143, "megatron: saved step 3\n")] * 2
    took(f"node {asked} asked to stop", began, *nodes)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{rank}" for rank in range(4)]


def test_ranks_that_still_save_are_not_killed_when_another_has_saved_at_a_stop_of_the_other_node(start: Start, tmp_path: Path) -> None:
    """Ranks agree on a stop among themselves: they may end before their launcher hears of it."""
    body = """
    say("ready")
    if rank == 0:
        fail("Preempted", "saved step 3", 143)
    threading.Event().wait(2 * float(os.environ["LINGER"]))
    (test / "manifest").touch()
    fail("Preempted", "saved step 3", 143)
    """
    other = start(1)
    other.hear("ready")
    assert start(0, body, processes=2, environment={"LINGER": "1.0"}).end() == (143, "megatron: saved step 3\n")
    assert (tmp_path / "manifest").exists()
    assert other.end()[0] == 143


HANGING = """
import torch
from datetime import timedelta
from torch import distributed
from finetune_trainer import __main__ as program
try:
    distributed.init_process_group("gloo")
    distributed.barrier()
    say("ready")
    wait_for("go")
    if rank == int(os.environ["LOCAL_WORLD_SIZE"]):
        wait()
    options = distributed.AllreduceOptions()
    options.timeout = timedelta(seconds=4)  # of this collective alone: ranks may take any time to come
    distributed.group.WORLD.allreduce([torch.ones(1)], options).wait()
except Exception as error:
    failure = program.describe(error, rank)
    program.leave(failure, None, "")
    program.end(failure.report.exit_code)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_rank_that_hangs_ends_both_nodes_as_a_hang(processes: int, start: Start, took: Took, tmp_path: Path) -> None:
    """The first rank that gives up closes its connections: of that the others must not make a connection that broke by itself."""
    nodes = [start(node, HANGING, processes) for node in (0, 1)]
    pids = [node.hear("ready") for node in nodes for _ in range(processes)]
    await_watch(tmp_path, *nodes)
    began = time.monotonic()
    (tmp_path / "go").touch()
    ends = [node.end() for node in nodes]
    took("a rank hangs in a collective of 4 s", began, *nodes)
    assert [code for code, _ in ends] == [21, 21]
    assert all("a collective did not end within parallelism.ddpTimeout: " in errors for _, errors in ends)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            "what():  [PG ID 0 PG GUID 0 Rank 0] Process group watchdog thread terminated with exception: [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE) ran for 10003 milliseconds before timing out.",
            21,
            "a collective did not end within parallelism.ddpTimeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE) ran for 10003 milliseconds before timing out.",
        ),
        (
            "what():  NCCL error: remote process exited or there was a network error, NCCL version 2.27.5",
            20,
            "the connection between the ranks broke: NCCL error: remote process exited or there was a network error, NCCL version 2.27.5",
        ),
        ("free(): invalid pointer", 134, "rank 0 was killed by signal SIGABRT"),
    ],
    ids=["timeout", "broken", "own"],
)
def test_what_nccls_watchdog_wrote_before_it_aborted_a_rank_is_its_reason(start: Start, words: str, code: int, message: str) -> None:
    other = start(1)
    other.hear("ready")
    first = start(0, f"os.write(2, {words!r}.encode() + b'\\n')\nos.abort()")
    assert first.end() == (code, f"{words}\nmegatron: {message}\n")
    assert other.end() == (code, f"megatron: {HOST}, rank 0: {message}\n")


def test_a_run_that_succeeds_ends_without_a_word_and_without_waiting(start: Start, took: Took, tmp_path: Path) -> None:
    body = 'say("ready")\nwait_for("done")'
    nodes = [start(0, body), start(1, body)]
    for node in nodes:
        node.hear("ready")
    began = time.monotonic()
    (tmp_path / "done").touch()
    assert [node.end() for node in nodes] == [(0, ""), (0, "")]
    took("success", began, *nodes)


def test_a_run_whose_port_is_taken_goes_on_without_the_watch(start: Start, tmp_path: Path) -> None:
    port = find_free_port(2)
    with socket.create_server((MASTER, port + 1)) as taken:
        environment = {"MASTER_PORT": str(port)}
        body = 'say("ready")\nwait_for("done")'
        nodes = [start(0, body, environment=environment), start(1, body, environment=environment)]
        for node in nodes:
            node.hear("ready")
        connection, _ = taken.accept()  # of node 1; a stranger's port is no launcher's
        connection.close()
        (tmp_path / "done").touch()
        ends = [node.end() for node in nodes]
    assert ends[1] == (0, "")
    assert ends[0][0] == 0
    assert ends[0][1].startswith(f"megatron: node 0 cannot listen on port {port + 1}, the one after MASTER_PORT, for the other nodes' launchers (")
