"""Pods, as the API server tells of them: a list, and a watch from there on, begun again wherever it was broken off (client-go's Reflector).

Jobs are watched by kopf; why pods are not is told in docs/decisions/0012-pods-without-kopf.md.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import aiohttp
from kubernetes.aio import config

from finetune_operator.connection import Answer, ApiError, Connection, Priority

SHORT_SECONDS = 1.0
"""A watch that ends sooner and has told nothing, or is refused, is begun again after twice the pause of the last."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 30.0
BUSY = (429, 500, 502, 503, 504)
"""Answers that say nothing about a resource version."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reflector:
    """Tells what there is of one kind, and what happens to it."""

    connection: Connection
    params: dict[str, str]
    """Selectors."""
    hear: Callable[[str | None, dict[str, Any]], None]
    """Called with each object, and ADDED, MODIFIED or DELETED; None where it was listed."""
    listed: Callable[[], None]
    """Called after a list: what has gone since the last one was not told."""

    async def list(self, path: str) -> str:
        """Tell all that is there; the resource version of that. Raises ApiError, aiohttp.ClientError, TimeoutError."""
        version = ""
        async for page in self.connection.pages(path, self.params, priority=Priority.CHILDREN):
            version = page["metadata"]["resourceVersion"]
            for raw in page["items"] or ():
                self.hear(None, raw)
        self.listed()
        return version

    async def follow(self, path: str, version: str) -> None:
        """Tell all that happens after a resource version, until cancelled. What goes wrong with requests is logged, and tried again."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            begun, told, asked = math.inf, False, 0.0
            try:
                version = version or await self.list(path)
                begun = time.monotonic()
                async with aclosing(self.connection.watch(path, {**self.params, "resourceVersion": version})) as events:
                    async for event in events:
                        version, told = self._take(path, event), True
                well = told or time.monotonic() - begun >= SHORT_SECONDS
            except ApiError as error:
                well, asked = told, error.pause
                version = version if error.status in BUSY else ""
                logger.warning("%s is %s: %s", path, "watched again" if version else "listed again", error)
            except (aiohttp.ClientError, config.ConfigException, OSError, TimeoutError) as error:
                well = told or time.monotonic() - begun >= SHORT_SECONDS
                logger.info("the watch of %s was broken off: %s", path, str(error) or type(error).__name__)
            pause = FIRST_PAUSE_SECONDS if well else min(2 * pause, LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(max(pause, min(asked, LONGEST_PAUSE_SECONDS)))

    def _take(self, path: str, event: dict[str, Any]) -> str:
        """Hand one event on; the resource version after it. Raises ApiError where the watch cannot go on from there (410: that is too long ago)."""
        try:
            kind, raw = event["type"], event["object"]
            version: str = "" if kind == "ERROR" else raw["metadata"]["resourceVersion"]
        except (KeyError, TypeError) as error:
            raise ApiError("WATCH", path, Answer(200, {"message": f"an event cannot be read: {str(event)[:200]}"})) from error
        if kind == "ERROR":
            raise ApiError("WATCH", path, Answer(200, raw))
        if kind != "BOOKMARK":
            self.hear(kind, raw)
        return version
