"""Asks rank 0 of every running gang for its progress. The trainers hold no credentials, so they are asked and tell nobody themselves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

import aiohttp
import orjson

from finetune_operator import metrics
from finetune_operator.queue import Key
from finetune_operator.settings import Settings
from finetune_trainer.contract import Progress

ANSWER_SECONDS = 3.0
LONGEST_ANSWER = 65536
"""Bytes of an answer: a trainer's image is the user's, and may answer anything."""

FIELDS = frozenset(field.alias or name for name, field in Progress.model_fields.items()) - {"recent"}
"""What of an answer is read, as it is spelled in JSON."""

logger = logging.getLogger(__name__)


@dataclass
class Conversation:
    """What one gang's rank 0 has said."""

    attempt: int
    address: str
    since: datetime
    """Since when it is asked."""
    task: asyncio.Task[None]
    progress: Progress | None = None
    heartbeat_seen: datetime | None = None
    """When its heartbeat was heard to change, by this process' clock; the first one too."""
    written: Progress | None = None
    """What of it stands in the job's status."""
    written_at: float | None = None
    """When that was written; monotonic."""


class Poller:
    """One task for each gang that is asked."""

    def __init__(self, settings: Settings, heard: Callable[[Key], None]) -> None:
        self.settings = settings
        self.heard = heard
        """Called when there is progress that may be written."""
        self.conversations: dict[Key, Conversation] = {}

    async def __aenter__(self) -> Self:
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for key in list(self.conversations):
            self.leave(key)
        await self.session.close()

    def follow(self, key: Key, attempt: int, address: str | None, *, spoken: bool) -> None:
        """Ask this address from now on, or nobody; ``spoken``: the status already has progress of this gang, written at an unknown time."""
        known = self.conversations.get(key)
        if known is not None and (known.attempt, known.address) == (attempt, address):
            return
        self.leave(key)
        if address is not None:
            task = asyncio.create_task(self._ask_on(key))
            self.conversations[key] = Conversation(attempt, address, datetime.now(UTC), task, written_at=time.monotonic() if spoken else None)

    def leave(self, key: Key) -> None:
        """Ask no longer."""
        known = self.conversations.pop(key, None)
        if known is not None:
            known.task.cancel()

    def progress(self, key: Key, attempt: int) -> Progress | None:
        """What the gang has last said; None: nothing yet."""
        known = self.conversations.get(key)
        return known.progress if known is not None and known.attempt == attempt else None

    def asked_since(self, key: Key, attempt: int) -> datetime | None:
        """Since when the gang is asked; None: it is not."""
        known = self.conversations.get(key)
        return known.since if known is not None and known.attempt == attempt else None

    def heartbeat_seen(self, key: Key, attempt: int) -> datetime | None:
        """When the heartbeat of what the gang has last said was first heard, by this process' clock; None: nothing yet."""
        known = self.conversations.get(key)
        return known.heartbeat_seen if known is not None and known.attempt == attempt else None

    def is_due(self, key: Key) -> bool:
        """Whether progress may be written now."""
        known = self.conversations.get(key)
        return known is None or known.written_at is None or time.monotonic() - known.written_at >= self.settings.progress_write_seconds

    def note_written(self, key: Key) -> None:
        """The status now has what was last said."""
        known = self.conversations.get(key)
        if known is not None:
            known.written, known.written_at = known.progress, time.monotonic()

    async def _ask_on(self, key: Key) -> None:
        while True:
            conversation = self.conversations[key]
            answer = await self._ask(conversation.address)
            if answer is not None:
                note_answer(conversation, answer, datetime.now(UTC))
                if answer != conversation.written and self.is_due(key):
                    self.heard(key)
            await asyncio.sleep(self.settings.progress_poll_seconds)

    async def _ask(self, address: str) -> Progress | None:
        host = f"[{address}]" if ":" in address else address
        try:
            async with self.session.get(f"http://{host}:{self.settings.progress_port}/progress", allow_redirects=False) as response:
                content = await _read(response)
            progress = read_progress(content)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            metrics.POLLS.labels("error").inc()
            logger.debug("/progress of %s: %s", address, error)
            return None
        metrics.POLLS.labels("success").inc()
        return progress


def note_answer(conversation: Conversation, answer: Progress, now: datetime) -> None:
    """Take in an answer, and when its heartbeat was first heard: the trainer's own clock may be wrong."""
    if conversation.progress is None or conversation.progress.last_heartbeat_time != answer.last_heartbeat_time:
        conversation.heartbeat_seen = now
    conversation.progress = answer


def read_progress(content: bytes) -> Progress:
    """An answer, of a trainer that may be younger than this process: fields that are unknown here, and the points of a curve, are left out.

    Raises ValueError (pydantic's among them).
    """
    found = orjson.loads(content)
    return Progress.model_validate({name: value for name, value in found.items() if name in FIELDS} if isinstance(found, dict) else found)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > LONGEST_ANSWER:
            raise aiohttp.ClientPayloadError(f"an answer of more than {LONGEST_ANSWER} bytes")
    return bytes(content)
