"""A queue of keys: one worker per key at a time, tried again after failures with exponential back-off, and again when time may have changed something."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass, field

from finetune_operator import metrics

Key = tuple[str, str]
"""Namespace and name of a job."""

FIRST_RETRY_SECONDS = 0.2
LONGEST_RETRY_SECONDS = 60.0
COMPLAIN_AFTER = 5
"""Failures in a row: after 6 s."""

logger = logging.getLogger(__name__)


@dataclass
class _Entry:
    """What is known of one key while it has work, waits for a time, or has failed."""

    waiting_since: float | None = None
    """Since when there is work that no worker has taken; monotonic."""
    begun: float | None = None
    """Since when its worker is at it; monotonic."""
    failures: int = 0
    timer: asyncio.TimerHandle | None = None


@dataclass
class Queue:
    """Calls ``work`` for every key that was added; returns from it say after how many seconds to come again (None: only when added)."""

    work: Callable[[Key], Awaitable[float | None]]
    complain: Callable[[Key, Exception], Awaitable[None]] | None = None
    """Called once when a key has failed so often in a row that somebody should know; may raise what is ordinary."""
    ordinary: tuple[type[Exception], ...] = (OSError, TimeoutError)
    """What may go wrong without anybody's fault: logged without where."""
    entries: dict[Key, _Entry] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    closed: bool = False

    def add(self, key: Key) -> None:
        """Something about a key has changed; at once, or when its worker is done."""
        if self.closed:
            return
        entry = self.entries.setdefault(key, _Entry())
        if entry.waiting_since is None:
            entry.waiting_since = time.monotonic()
        _cancel(entry)
        if entry.begun is None:
            self._start(key, entry)

    def oldest_seconds(self) -> float:
        """How long the oldest work has waited that no worker has begun; 0 when none waits. News of a key whose worker is at it waits for that, rightly."""
        waiting = (entry.waiting_since for entry in self.entries.values() if entry.begun is None and entry.waiting_since is not None)
        return _age(min(waiting, default=None))

    def longest_seconds(self) -> float:
        """How long the slowest worker has been at it; 0 when none is."""
        return _age(min((entry.begun for entry in self.entries.values() if entry.begun is not None), default=None))

    def depth(self) -> int:
        """Keys whose work waits or is being done."""
        return sum(entry.begun is not None or entry.waiting_since is not None for entry in self.entries.values())

    async def close(self) -> None:
        """End every worker where it stands; nothing is begun any more."""
        self.closed = True
        for entry in self.entries.values():
            _cancel(entry)
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def _start(self, key: Key, entry: _Entry) -> None:
        entry.begun = time.monotonic()
        # Context(): kopf's handler, which adds most keys, has a context that holds the whole object for as long as the work lasts
        task = asyncio.create_task(self._work(key, entry), context=Context())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _work(self, key: Key, entry: _Entry) -> None:
        again: float | None = None
        while entry.waiting_since is not None:
            entry.waiting_since, entry.begun = None, time.monotonic()
            again = await self._try(key, entry)
            if entry.failures:
                break
        entry.begun = None
        if again is not None:
            entry.timer = asyncio.get_running_loop().call_later(again, self.add, key)
        elif not entry.failures:
            del self.entries[key]

    async def _try(self, key: Key, entry: _Entry) -> float | None:
        try:
            with metrics.RECONCILE_SECONDS.time():
                again = await self.work(key)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one job must not end the work on the others
            entry.failures += 1
            again = min(FIRST_RETRY_SECONDS * 2 ** (entry.failures - 1), LONGEST_RETRY_SECONDS)
            metrics.reconciles("error").inc()
            self._log(key, error, "again in %.1f s", again)
            if entry.failures == COMPLAIN_AFTER:
                await self._complain(key, error)
        else:
            entry.failures = 0
            metrics.reconciles("success").inc()
        return again

    async def _complain(self, key: Key, error: Exception) -> None:
        if self.complain is None:
            return
        try:
            await self.complain(key, error)
        except Exception as other:  # noqa: BLE001 - as above
            self._log(key, other, "nobody could be told")

    def _log(self, key: Key, error: Exception, then: str, *values: float) -> None:
        where = None if isinstance(error, self.ordinary) else error
        logger.warning(f"%s/%s: %s; {then}", *key, str(error) or type(error).__name__, *values, exc_info=where)


def _age(since: float | None) -> float:
    return 0.0 if since is None else time.monotonic() - since


def _cancel(entry: _Entry) -> None:
    if entry.timer is not None:
        entry.timer.cancel()
        entry.timer = None
