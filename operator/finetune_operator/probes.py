"""/metrics, /healthz and /readyz of a replica."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

WAITING_SECONDS = 300.0
"""A job for which no worker was found for so long: the process no longer works and is to be started anew."""
WORKING_SECONDS = 3600.0
"""As much is said by a worker that is at one job for so long: in a burst it waits for its turn, for minutes."""

Check = Callable[[], str | None]
"""Why a probe fails; None: it does not."""


@asynccontextmanager
async def serve(port: int, alive: Check, ready: Check) -> AsyncIterator[None]:
    """Serve on all addresses while the block runs; raises OSError when the port is taken."""
    application = web.Application()
    application.router.add_get("/metrics", _metrics)
    application.router.add_get("/healthz", _probe(alive))
    application.router.add_get("/readyz", _probe(ready))
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, port=port).start()
        yield
    finally:
        await runner.cleanup()


async def _metrics(_request: web.Request) -> web.Response:
    return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _probe(check: Check) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(_request: web.Request) -> web.StreamResponse:
        problem = check()
        return web.Response(text=problem or "ok", status=503 if problem else 200)

    return answer
