"""Pods, as the API server tells of them: a list, and a watch from there on, begun again wherever it was broken off (client-go's Reflector).

Jobs are watched by kopf; why pods are not is told in docs/decisions/0012-pods-without-kopf.md.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import aiohttp

from finetune_operator.connection import Answer, ApiError, Connection

SHORT_SECONDS = 1.0
"""A watch that ends sooner and has told nothing is begun again after twice the pause of the last."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reflector:
    """Tells what there is of one kind, and what happens to it."""

    connection: Connection
    params: dict[str, str]
    """Selectors."""
    hear: Callable[[str | None, dict[str, Any]], None]
    """Called with each object, and ADDED, MODIFIED or DELETED; None where it was listed: what has gone since the last list is not told."""

    async def list(self, path: str) -> str:
        """Tell all that is there; the resource version of that. Raises ApiError, aiohttp.ClientError, TimeoutError."""
        version = ""
        async for page in self.connection.pages(path, self.params):
            version = page["metadata"]["resourceVersion"]
            for raw in page["items"] or ():
                self.hear(None, raw)
        return version

    async def follow(self, path: str, version: str) -> None:
        """Tell all that happens after a resource version, until cancelled. What goes wrong with requests is logged, and tried again."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            begun, known = time.monotonic(), version
            try:
                version = version or await self.list(path)
                async with aclosing(self.connection.watch(path, {**self.params, "resourceVersion": version})) as events:
                    async for event in events:
                        version = self._take(path, event)
            except ApiError as error:
                logger.info("%s is listed again: %s", path, error)
                version = ""
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                logger.info("the watch of %s was broken off: %s", path, str(error) or type(error).__name__)
            short = time.monotonic() - begun < SHORT_SECONDS and version in (known, "")
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS) if short else FIRST_PAUSE_SECONDS
            await asyncio.sleep(pause)

    def _take(self, path: str, event: dict[str, Any]) -> str:
        """Hand one event on; the resource version after it. Raises ApiError where the watch cannot go on from there (410: that is too long ago)."""
        kind, raw = event["type"], event["object"]
        if kind == "ERROR":
            raise ApiError("WATCH", path, Answer(raw.get("code", 500), raw))
        if kind != "BOOKMARK":
            self.hear(kind, raw)
        version: str = raw["metadata"]["resourceVersion"]
        return version
