"""A gang of worker processes that lives for a whole test session, so that many tests share one import of torch and Megatron-core.

``Gang.run`` calls one top-level function in every worker, with the environment that the launcher gives to ranks, and returns one result
per rank. What a rank raises is raised in the test. Workers that hang or are left waiting for a failed rank are killed; the next call
starts new ones. This file is also the workers' program: ``python gang.py FILE_DESCRIPTOR``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import inspect
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from finetune_trainer.ports import find_free_port

PRELOAD = ("torch", "finetune_trainer.parallel", "finetune_trainer.model")
START_DEADLINE_SECONDS = 300.0
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": ""}


class RankFailedError(AssertionError):
    """A worker died, hung, or raised something that cannot be sent to the test."""


@dataclass(frozen=True)
class Task:
    """One call, by names that every process can resolve: pytest's modules cannot be imported by name."""

    module: str
    file: str
    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    environment: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """What a worker sends back: a result, or an exception with the text of its traceback. ``died`` is filled in for a worker that is gone."""

    result: Any = None
    error: BaseException | None = None
    trace: str = ""
    died: bool = False


class Gang:
    """``size`` workers that import ``preload`` when they start, at the first call, and live until ``close``."""

    def __init__(
        self, size: int, preload: tuple[str, ...] = PRELOAD, grace_seconds: float = 5.0, environment: Mapping[str, str] = MappingProxyType(CPU_ONLY)
    ) -> None:
        """``grace_seconds``: how long the other ranks may take to answer once one has failed. ``environment``: of the workers, beside the session's."""
        self.size = size
        self.grace_seconds = grace_seconds
        self.preload = preload
        self.environment = dict(environment)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, deadline_seconds: float = 180.0, **kwargs: Any) -> list[Any]:
        """Call ``function(*args, **kwargs)`` in every worker; the results, by rank.

        Raises what the first failing rank raised (its traceback is a note on the exception), or RankFailedError when a worker died or the deadline passed.
        """
        if not self._processes:
            self._start()
        port = str(find_free_port())
        for rank, connection in enumerate(self._connections):
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": self.size,
                "LOCAL_WORLD_SIZE": self.size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            source = inspect.getsourcefile(function)
            assert source is not None
            task = Task(function.__module__, source, function.__qualname__, args, kwargs, {name: str(value) for name, value in environment.items()})
            connection.send_bytes(pickle.dumps(task))  # not send: multiprocessing would pass a tensor as a handle of shared memory
        answers = self._collect(deadline_seconds)
        if len(answers) < self.size or any(answer.died for answer in answers.values()):
            self.close()
        for rank, answer in answers.items():  # in the order in which the ranks answered
            if answer.error is not None:
                answer.error.add_note(f"rank {rank} of {self.size}:\n{answer.trace}")
                raise answer.error
        if len(answers) < self.size:
            missing = sorted(set(range(self.size)) - set(answers))
            raise RankFailedError(f"{function.__qualname__}: ranks {missing} of {self.size} gave no answer in {deadline_seconds:g} s; the gang was killed")
        return [answers[rank].result for rank in range(self.size)]

    def close(self) -> None:
        """Kill the workers, and the processes that they have started: each worker leads a group of its own."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.wait()
            connection.close()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        for _ in range(self.size):
            ours, theirs = Pipe()
            command = [sys.executable, __file__, str(theirs.fileno()), *self.preload]
            self._processes.append(subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True))
            self._connections.append(ours)
            theirs.close()
        ready = self._collect(START_DEADLINE_SECONDS)
        failures = [answer.trace for answer in ready.values() if answer.error is not None]
        if failures or len(ready) < self.size:
            self.close()
            raise RankFailedError(f"{len(ready) - len(failures)} of {self.size} workers started\n" + "\n".join(failures))

    def _collect(self, deadline_seconds: float) -> dict[int, Answer]:
        """One answer per rank, in order of arrival; fewer when a rank has died, the deadline is over, or a rank failed and others stay silent."""
        end = time.monotonic() + deadline_seconds
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        answers: dict[int, Answer] = {}
        while waiting:
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                answers[rank] = _receive(connection, rank)
                if answers[rank].error is not None:
                    end = min(end, time.monotonic() + self.grace_seconds)
        return answers


def _receive(connection: Connection, rank: int) -> Answer:
    try:
        answer = connection.recv()
    except (EOFError, ConnectionResetError):
        return Answer(error=RankFailedError(f"rank {rank} died without an answer"), died=True)
    assert isinstance(answer, Answer)
    return answer


def _load(task: Task) -> ModuleType:
    """The module of the task's function, under the name it has in the test's process, so that its classes can be pickled."""
    if task.module in sys.modules:
        return sys.modules[task.module]
    if task.module.split(".")[0] in ("finetune_trainer", "finetune_operator"):
        return importlib.import_module(task.module)
    spec = importlib.util.spec_from_file_location(task.module, task.file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    parts = task.module.split(".")
    for end in range(1, len(parts)):  # pickle imports the parents too; pytest makes them up in the same way
        sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    sys.modules[task.module] = module
    spec.loader.exec_module(module)
    return module


def _perform(task: Task) -> Answer:
    """Run one task from the same seed as every other, and leave no process group behind."""
    os.environ.update(task.environment)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
    try:
        try:
            return Answer(getattr(_load(task), task.function)(*task.args, **task.kwargs))
        finally:
            if parallel := sys.modules.get("finetune_trainer.parallel"):
                parallel.shut_down()
                gc.collect()  # a gloo group lives as long as the models in whose cycles it hangs, and wakes its thread a hundred times a second
    except BaseException as error:  # noqa: BLE001 the test gets whatever it is
        return _failure(error)


def _failure(error: BaseException) -> Answer:
    trace = "".join(traceback.format_exception(error))
    with contextlib.suppress(Exception):  # some exceptions cannot be rebuilt from their arguments
        pickle.loads(pickle.dumps(error))
        return Answer(error=error, trace=trace)
    return Answer(error=RankFailedError(str(error)), trace=trace)


def _answer_bytes(answer: Answer) -> bytes:
    try:
        return pickle.dumps(answer)
    except Exception as error:  # noqa: BLE001 a result that cannot be pickled is the test's mistake, and is told to it
        return pickle.dumps(_failure(error))


def _work(connection: Connection, preload: list[str]) -> None:
    """A worker's life: import once, then one task after the other until the test session closes the pipe."""
    tasks: queue.SimpleQueue[Task | Answer] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                received = connection.recv_bytes()
                try:
                    tasks.put(pickle.loads(received))
                except Exception as error:  # noqa: BLE001 arguments that cannot be rebuilt here are the test's mistake, and are told to it
                    tasks.put(_failure(error))
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)  # the session has ended; a task that hangs in a collective must not outlive it

    threading.Thread(target=listen, daemon=True).start()
    try:
        for name in preload:
            importlib.import_module(name)
    except BaseException as error:  # noqa: BLE001 told to the session, which reports it
        connection.send_bytes(_answer_bytes(_failure(error)))
        return
    gc.freeze()  # what was imported stays, and need not be looked at after each task
    connection.send(Answer())
    while True:
        given = tasks.get()
        connection.send_bytes(_answer_bytes(_perform(given) if isinstance(given, Task) else given))


def main() -> None:
    """Run as a worker; the classes it sends must be those of the module ``gang``, as in the session's process."""
    sys.path.insert(0, str(Path(__file__).parent))
    worker: Any = importlib.import_module("gang")
    worker._work(Connection(int(sys.argv[1])), sys.argv[2:])


if __name__ == "__main__":
    main()
