"""A process of its own that stamps when jobs and their pods appear: operator_watch.py '{"access": {...}, "namespace": ..., "jobs": ..., "pods": ..., "seconds": ...}'

It watches metadata only, says `watching`, and when every job has its pods (or the time is up) prints one line of JSON: monotonic times by job.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
import uvloop
from operator_access import METADATA_ONLY, Access

from finetune_operator import names


@dataclass
class Seen:
    """When each job, and each of its pods, was told as ADDED."""

    jobs: dict[str, float] = field(default_factory=dict)
    pods: dict[str, dict[str, float]] = field(default_factory=dict)

    def job(self, metadata: dict[str, Any]) -> None:
        self.jobs.setdefault(metadata["name"], time.monotonic())

    def pod(self, metadata: dict[str, Any]) -> None:
        self.pods.setdefault(metadata["labels"][names.JOB_LABEL], {}).setdefault(metadata["name"], time.monotonic())

    def is_complete(self, jobs: int, pods: int) -> bool:
        return len(self.jobs) >= jobs and len(self.pods) >= jobs and all(len(found) >= pods for found in self.pods.values())


async def watch(session: aiohttp.ClientSession, path: str, tell: Callable[[dict[str, Any]], None], news: asyncio.Event) -> None:
    """Tell of every object that is added, until cancelled; raises ConnectionError when the watch ends."""
    parameters = {"watch": "1", "resourceVersion": "0", "timeoutSeconds": "3600"}
    async with session.get(path, params=parameters, headers={"Accept": METADATA_ONLY}, raise_for_status=True) as response:
        async for line in response.content:
            event = orjson.loads(line)
            if event["type"] == "ADDED":
                tell(event["object"]["metadata"])
                news.set()
    raise ConnectionError(f"the watch of {path} has ended")


async def run(access: Access, namespace: str, jobs: int, pods: int, seconds: float) -> Seen:
    """Watch until `jobs` jobs have `pods` pods each, at most so many seconds."""
    seen, news = Seen(), asyncio.Event()
    paths = {f"/apis/{names.API_VERSION}/namespaces/{namespace}/{names.PLURAL}": seen.job, f"/api/v1/namespaces/{namespace}/pods": seen.pod}
    async with access.session(len(paths)) as session:
        watches = [asyncio.create_task(watch(session, path, tell, news)) for path, tell in paths.items()]
        complete = asyncio.create_task(until_complete(seen, news, jobs, pods))
        print("watching", flush=True)
        done, _ = await asyncio.wait([*watches, complete], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in (*watches, complete):
            task.cancel()
        await asyncio.gather(*watches, complete, return_exceptions=True)
        for task in done:
            task.result()
    return seen


async def until_complete(seen: Seen, news: asyncio.Event, jobs: int, pods: int) -> None:
    """Look after each piece of news, but not more often than ten times a second."""
    while not seen.is_complete(jobs, pods):
        await news.wait()
        news.clear()
        await asyncio.sleep(0.1)


def main() -> None:
    wanted = json.loads(sys.argv[1])
    access = Access(**wanted.pop("access"))
    seen = uvloop.run(run(access, **wanted))
    print(json.dumps({"jobs": seen.jobs, "pods": {job: sorted(found.values()) for job, found in seen.pods.items()}, "cpu": sum(os.times()[:2])}), flush=True)


if __name__ == "__main__":
    main()
