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

logger = logging.getLogger(__name__)


@dataclass
class _Entry:
    """What is known of one key while it has work, waits for a time, or has failed."""

    waiting_since: float | None = None
    """Since when there is work that no worker has taken; monotonic."""
    running: bool = False
    failures: int = 0
    timer: asyncio.TimerHandle | None = None


@dataclass
class Queue:
    """Calls ``work`` for every key that was added; returns from it say after how many seconds to come again (None: only when added)."""

    work: Callable[[Key], Awaitable[float | None]]
    retriable: tuple[type[Exception], ...] = (Exception,)
    entries: dict[Key, _Entry] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def add(self, key: Key) -> None:
        """Something about a key has changed; at once, or when its worker is done."""
        entry = self.entries.setdefault(key, _Entry())
        if entry.waiting_since is None:
            entry.waiting_since = time.monotonic()
        _cancel(entry)
        if not entry.running:
            self._start(key, entry)

    def oldest_seconds(self) -> float:
        """How long the oldest work has waited for its worker; 0 when none waits."""
        now = time.monotonic()
        return max((now - entry.waiting_since for entry in self.entries.values() if entry.waiting_since is not None), default=0.0)

    def depth(self) -> int:
        """Keys whose work waits or is being done."""
        return sum(entry.running or entry.waiting_since is not None for entry in self.entries.values())

    async def close(self) -> None:
        """End every worker where it stands."""
        for entry in self.entries.values():
            _cancel(entry)
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def _start(self, key: Key, entry: _Entry) -> None:
        entry.running = True
        # Context(): kopf's handler, which adds most keys, has a context that holds the whole object for as long as the work lasts
        task = asyncio.create_task(self._work(key, entry), context=Context())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _work(self, key: Key, entry: _Entry) -> None:
        again: float | None = None
        while entry.waiting_since is not None:
            entry.waiting_since = None
            again = await self._try(key, entry)
            if entry.failures:
                break
        entry.running = False
        if again is not None:
            entry.timer = asyncio.get_running_loop().call_later(again, self.add, key)
        elif not entry.failures:
            del self.entries[key]

    async def _try(self, key: Key, entry: _Entry) -> float | None:
        try:
            with metrics.RECONCILE_SECONDS.time():
                again = await self.work(key)
        except self.retriable as error:
            entry.failures += 1
            again = min(FIRST_RETRY_SECONDS * 2 ** (entry.failures - 1), LONGEST_RETRY_SECONDS)
            metrics.RECONCILES.labels("error").inc()
            logger.warning(
                "%s/%s: %s; again in %.1f s", *key, str(error) or type(error).__name__, again, exc_info=not isinstance(error, OSError | TimeoutError)
            )
        else:
            entry.failures = 0
            metrics.RECONCILES.labels("success").inc()
        return again


def _cancel(entry: _Entry) -> None:
    if entry.timer is not None:
        entry.timer.cancel()
        entry.timer = None
