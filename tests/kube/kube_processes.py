"""Processes of a test cluster: each with a log of its own, found again by its pid file, and ended by its id.

The folder of a cluster's state holds `log/<name>.log` and `pid/<name>` ("pid start-time"), so that another process can end what this one started.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

STOP_SECONDS = 3.0  # kube-apiserver takes up to a minute to end on SIGTERM
KILL_SECONDS = 60.0
"""Within which the kernel has ended a killed process, with all its memory, also on a busy machine."""
POLL_SECONDS = 0.05
LOG_TAIL_LINES = 30


class KubeError(Exception):
    """A test cluster, or a part of one, could not be built, started or used; the message says which and what its log said."""


def until(condition: Callable[[], object], seconds: float, what: str) -> object:
    """Call condition until it returns something true, and return that. `what` says what is waited for. Raises KubeError."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise KubeError(f"{what}: not within {seconds:g} s")
        time.sleep(POLL_SECONDS)
    return result


def run(*argv: str | Path, **options: object) -> str:
    """Run a command to its end and return its stdout. Raises KubeError with its stderr."""
    result = subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if result.returncode != 0:
        raise KubeError(f"{' '.join(str(word) for word in argv)}: exit code {result.returncode}: {(result.stderr or result.stdout).strip()}")
    return str(result.stdout)


def start_time(pid: int) -> str | None:
    """When a process started, in ticks since the machine's start: with the pid, its identity. None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def end(pids: Iterable[int], grace_seconds: float = STOP_SECONDS) -> None:
    """Ask processes to end, wait for all of them together, then kill what is left and wait for that."""
    handles: list[int] = []
    for pid in pids:
        with suppress(ProcessLookupError):
            handles.append(os.pidfd_open(pid))
    try:
        left = _signal_and_wait(handles, signal.SIGTERM, grace_seconds) if grace_seconds else handles
        _signal_and_wait(left, signal.SIGKILL, KILL_SECONDS)
    finally:
        for handle in handles:
            os.close(handle)


def _signal_and_wait(handles: Sequence[int], number: signal.Signals, seconds: float) -> list[int]:
    """Returns the handles of the processes that were still there after so many seconds."""
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, number)
    left, deadline = set(handles), time.monotonic() + seconds
    while left and (remaining := deadline - time.monotonic()) > 0:
        for handle, _ in poll.poll(remaining * 1000):
            poll.unregister(handle)
            left.discard(handle)
    return sorted(left)


class Processes:
    """The daemons of one cluster. `prefix` is put before every command (nsenter into the cluster's network).

    With `die_with_parent` the kernel kills a daemon when the thread that started it ends, however that happens: start them from the main thread.
    """

    def __init__(self, state: Path, prefix: Sequence[str] = (), die_with_parent: bool = True) -> None:
        self.logs, self.pid_files = state / "log", state / "pid"
        self._prefix = list(prefix)
        self._die_with_parent = die_with_parent
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, argv: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        """Start a daemon in a session of its own. Its output is added to log/<name>.log."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.pid_files.mkdir(parents=True, exist_ok=True)
        guard = ["setpriv", "--pdeathsig", "KILL"] if self._die_with_parent else []
        command = [*guard, *self._prefix, *(str(word) for word in argv)]
        with self._log(name).open("ab") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **(environment or {})}
            )
        self._children[name] = child
        (self.pid_files / name).write_text(f"{child.pid} {start_time(child.pid)}")

    def pid(self, name: str) -> int | None:
        """The id of a daemon that runs, also one that another process started."""
        try:
            number, _, started = (self.pid_files / name).read_text().partition(" ")
        except FileNotFoundError:
            return None
        return int(number) if start_time(int(number)) == started else None

    def names(self) -> list[str]:
        return sorted(file.name for file in self.pid_files.glob("*"))

    def stop(self, *names: str, grace_seconds: float = STOP_SECONDS) -> None:
        """End daemons, those named or all."""
        chosen = names or tuple(self.names())
        end([pid for name in chosen if (pid := self.pid(name))], grace_seconds)
        for name in chosen:
            if child := self._children.pop(name, None):
                child.wait(KILL_SECONDS)
            (self.pid_files / name).unlink(missing_ok=True)

    def until(self, name: str, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Wait for a condition that daemon `name` brings about. Raises KubeError with the end of its log when it ends or is late."""

        def ready_or_gone() -> object:
            if self.pid(name) is None:
                raise KubeError(f"{name} has ended")
            return condition()

        try:
            until(ready_or_gone, seconds, what)
        except KubeError as error:
            raise KubeError(f"{error}. {self._log(name)} ends with:\n{self.log_tail(name)}") from None

    def log_tail(self, name: str) -> str:
        """The last lines of a daemon's log."""
        return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"
