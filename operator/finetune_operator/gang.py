"""The launchers of a run on this machine, started and ended as one.

A launcher (`megatron launch`) owns the ranks of its node. The first SIGTERM asks it to checkpoint and end, the second to end
at once. Each launcher has a session of its own, so that Ctrl-C in a terminal reaches the gang through here only; should this
process die, the kernel sends them SIGTERM.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune_trainer.contract import Reason, exit_for

SAVE_MARGIN_SECONDS = 15.0
END_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Launcher:
    """One node's launcher: what is run, with which environment, and the file that gets its output."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path
    log: Path


@dataclass(frozen=True)
class Ending:
    """How a gang ended: the exit code that decides, of the node that failed first, and whether it was asked to stop."""

    code: int
    node: int
    asked: bool


@dataclass(frozen=True)
class _Node:
    """One launcher that was started.

    Popen and a thread that waits, not asyncio's subprocess: there `send_signal` polls, and a process that ends at that moment is reaped
    before its watcher sees it, which then reports 255 (https://github.com/python/cpython/issues/87744, mended in Python 3.13). Popen's own lock
    keeps the code.
    """

    process: subprocess.Popen[bytes]
    code: asyncio.Future[int]
    thread: threading.Thread


class Gang:
    """Launchers that live and end together."""

    def __init__(self, launchers: list[Launcher], grace_seconds: float) -> None:
        self._launchers = launchers
        self._grace_seconds = grace_seconds
        self._nodes: list[_Node] = []
        self._timers: list[asyncio.TimerHandle] = []
        self._stops = 0
        self._is_asked = False
        """Whether the launchers have had the first SIGTERM."""

    async def run(self) -> Ending:
        """Start all and wait until all have ended; OSError when one cannot be started (then none is left)."""
        try:
            for launcher in self._launchers:
                self._nodes.append(_start(launcher))
            return await self._wait()
        finally:
            for timer in self._timers:
                timer.cancel()
            self._kill()
            for node in self._nodes:
                node.thread.join()

    def stop(self) -> None:
        """Asked once, the gang checkpoints and ends; asked again, it ends at once. For a signal handler of the event loop."""
        self._stops += 1
        self._ask() if self._stops == 1 else self._send(signal.SIGTERM)
        self._later(END_SECONDS if self._stops > 1 else self._grace_seconds + SAVE_MARGIN_SECONDS, self._kill)

    async def _wait(self) -> Ending:
        waiting = {node.code: index for index, node in enumerate(self._nodes)}
        first: tuple[int, int] | None = None
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                code, index = future.result(), waiting.pop(future)
                if code and first is None:
                    first = code, index
                    self._end_the_others(code)
        code, index = first or (0, 0)
        return Ending(code, index, asked=self._stops > 0)

    def _end_the_others(self, code: int) -> None:
        """One node's launcher has failed: nothing that the others compute counts. Where it was preempted, they are saving too."""
        if code == exit_for(Reason.PREEMPTED).code:
            self._ask()
            self._later(self._grace_seconds + SAVE_MARGIN_SECONDS, self._kill)
            return
        self._send(signal.SIGTERM)
        self._later(END_SECONDS, self._send, signal.SIGTERM)
        self._later(2 * END_SECONDS, self._kill)

    def _ask(self) -> None:
        """Have every launcher save and end; a second SIGTERM would have it end at once."""
        if not self._is_asked:
            self._is_asked = True
            self._send(signal.SIGTERM)

    def _later(self, seconds: float, action: Callable[..., None], *arguments: signal.Signals) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, action, *arguments))

    def _send(self, number: signal.Signals) -> None:
        for node in self._nodes:
            node.process.send_signal(number)

    def _kill(self) -> None:
        for node in self._nodes:
            node.process.kill()


def _start(launcher: Launcher) -> _Node:
    with launcher.log.open("ab") as log:
        process = subprocess.Popen(
            launcher.command,
            env=dict(launcher.environment),
            cwd=launcher.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=partial(_die_with_parent, os.getpid()),
        )
    loop = asyncio.get_running_loop()
    code: asyncio.Future[int] = loop.create_future()

    def wait() -> None:
        ended = _exit_code(process.wait())
        loop.call_soon_threadsafe(lambda: None if code.done() else code.set_result(ended))

    thread = threading.Thread(target=wait, name=f"waits for {launcher.log.stem}", daemon=True)
    thread.start()
    return _Node(process, code, thread)


_LIBC = ctypes.CDLL(None)


def _die_with_parent(parent: int) -> None:
    """In the new process: SIGTERM when its parent ends, however that happens. Linux only; elsewhere the call does not exist."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def _exit_code(returncode: int) -> int:
    """A shell's code: a process that a signal ended gives 128 and the signal."""
    return 128 - returncode if returncode < 0 else returncode
