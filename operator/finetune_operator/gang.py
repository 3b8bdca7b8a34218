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
from collections.abc import Mapping
from dataclasses import dataclass
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


class Gang:
    """Launchers that live and end together."""

    def __init__(self, launchers: list[Launcher], grace_seconds: float) -> None:
        self._launchers = launchers
        self._grace_seconds = grace_seconds
        self._processes: list[asyncio.subprocess.Process] = []
        self._timers: list[asyncio.TimerHandle] = []
        self._stops = 0

    async def run(self) -> Ending:
        """Start all and wait until all have ended; OSError when one cannot be started (then none is left)."""
        try:
            for launcher in self._launchers:
                self._processes.append(await _start(launcher))
            return await self._wait()
        finally:
            for timer in self._timers:
                timer.cancel()
            self._kill()

    def stop(self) -> None:
        """Asked once, the gang checkpoints and ends; asked again, it ends at once. For a signal handler of the event loop."""
        self._stops += 1
        self._send(signal.SIGTERM)
        self._later(END_SECONDS if self._stops > 1 else self._grace_seconds + SAVE_MARGIN_SECONDS, self._kill)

    async def _wait(self) -> Ending:
        waiting = {asyncio.create_task(process.wait()): node for node, process in enumerate(self._processes)}
        first: tuple[int, int] | None = None
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                code, node = _exit_code(task.result()), waiting.pop(task)
                if code and first is None:
                    first = code, node
                    self._end_the_others(code)
        code, node = first or (0, 0)
        return Ending(code, node, asked=self._stops > 0)

    def _end_the_others(self, code: int) -> None:
        """One node's launcher has failed: nothing that the others compute counts. Where it was preempted, they are saving too."""
        self._send(signal.SIGTERM)
        if code == exit_for(Reason.PREEMPTED).code:
            self._later(self._grace_seconds + SAVE_MARGIN_SECONDS, self._kill)
            return
        self._later(END_SECONDS, self._send, signal.SIGTERM)
        self._later(2 * END_SECONDS, self._kill)

    def _later(self, seconds: float, action: object, *arguments: object) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, action, *arguments))  # type: ignore[arg-type]

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.returncode is None:
                process.send_signal(number)

    def _kill(self) -> None:
        for process in self._processes:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


async def _start(launcher: Launcher) -> asyncio.subprocess.Process:
    with launcher.log.open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *launcher.command,
            env=dict(launcher.environment),
            cwd=launcher.folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


_LIBC = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """In the new process: SIGTERM when its parent ends, however that happens. Linux only; elsewhere the call does not exist."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _exit_code(returncode: int) -> int:
    """A shell's code: a process that a signal ended gives 128 and the signal."""
    return 128 - returncode if returncode < 0 else returncode
