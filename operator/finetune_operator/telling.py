"""Tells Kubernetes Events about jobs, off the hot path: behind every other request, and dropped when too many wait."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from datetime import UTC, datetime
from typing import Any

import aiohttp
from kubernetes.aio import config

from finetune_operator import metrics, names
from finetune_operator.connection import METADATA_ONLY, Connection, Priority
from finetune_operator.lifecycle import Event
from finetune_operator.store import JobRecord

MOST_WAITING = 1000
LONGEST_NOTE = 1024
"""Characters of an Event's message: Kubernetes refuses longer ones."""

logger = logging.getLogger(__name__)


class Teller:
    """A bounded queue of Events and the task that posts them."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.waiting: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue(MOST_WAITING)

    def tell(self, job: JobRecord, event: Event) -> None:
        """Post an Event some time soon. Its name is made of what it says, so that a second teller of the same is refused by the API server."""
        try:
            self.waiting.put_nowait((job.key[0], event_object(job, event, datetime.now(UTC))))
        except asyncio.QueueFull:
            metrics.EVENTS_DROPPED.inc()

    async def run(self) -> None:
        """Post what waits, for ever; an Event that cannot be posted is dropped."""
        while True:
            namespace, body = await self.waiting.get()
            try:
                answer = await self.connection.send("POST", f"/api/v1/namespaces/{namespace}/events", body, order=(Priority.EVENTS, ""), accept=METADATA_ONLY)
            except (aiohttp.ClientError, config.ConfigException, OSError, TimeoutError) as error:
                metrics.EVENTS_DROPPED.inc()
                logger.info("an Event could not be posted: %s", str(error) or type(error).__name__)
                continue
            if not answer.ok and answer.status != 409:
                metrics.EVENTS_DROPPED.inc()
                logger.debug("an Event was refused: %s", answer.message)


def event_object(job: JobRecord, event: Event, now: datetime) -> dict[str, Any]:
    """The Event as Kubernetes wants it."""
    namespace, name = job.key
    time = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    identity = hashlib.sha256(f"{job.uid}/{job.status.attempt}/{event.reason}/{event.message}".encode()).hexdigest()[:16]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{name}.{identity}", "namespace": namespace},
        "involvedObject": {"apiVersion": names.API_VERSION, "kind": names.KIND, "namespace": namespace, "name": name, "uid": job.uid},
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:LONGEST_NOTE],
        "count": 1,
        "firstTimestamp": time,
        "lastTimestamp": time,
        "source": {"component": names.OPERATOR},
        "reportingComponent": names.OPERATOR,
        "reportingInstance": names.OPERATOR,
        "action": event.reason,
    }
