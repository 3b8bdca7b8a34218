"""Events that cannot be posted, and those after them."""

from __future__ import annotations

import asyncio
import logging

import aiohttp
import pytest
from aiohttp import web
from kubernetes.aio import client, config
from prometheus_client import REGISTRY

from api_server import connected
from finetune_operator.lifecycle import Event
from finetune_operator.store import JobRecord
from finetune_operator.telling import Teller

JOB = JobRecord(key=("team", "job"), uid="u", age="", generation=1, resource_version=1, deleted=False, spec=b"{}", written=b"{}")
PATH = "/api/v1/namespaces/team/events"


def post(trouble: Exception | None, status: int = 201) -> list[str]:
    """Messages that an API server is sent, of which it answers the first so, and before which reading the token raises so."""
    heard: list[str] = []
    done = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        heard.append((await request.json())["message"])
        if heard[-1] == "second":
            done.set()
        return web.json_response({"message": "no"}, status=status if heard[-1] == "first" else 201)

    async def refresh(_: client.Configuration) -> None:
        nonlocal trouble
        if trouble is not None:
            error, trouble = trouble, None
            raise error

    async def scenario() -> None:
        application = web.Application()
        application.router.add_post(PATH, answer)
        async with connected(application) as connection:
            connection.configuration.refresh_api_key_hook = refresh
            teller = Teller(connection)
            for message in ("first", "second"):
                teller.tell(JOB, Event("Normal", "Started", message))
            task = asyncio.create_task(teller.run())
            waiting = asyncio.create_task(done.wait())
            await asyncio.wait((task, waiting), timeout=30, return_when=asyncio.FIRST_COMPLETED)
            for each in (task, waiting):
                each.cancel()
            await asyncio.gather(task, waiting, return_exceptions=True)

    asyncio.run(scenario())
    return heard


def dropped() -> float:
    return REGISTRY.get_sample_value("finetune_events_dropped_total") or 0.0


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (OSError("the token cannot be read"), "the token cannot be read"),
        (config.ConfigException("Token file exists but empty."), "Token file exists but empty."),
        (aiohttp.ClientConnectionError("cannot connect"), "cannot connect"),
        (TimeoutError(), "TimeoutError"),
    ],
    ids=["no token", "an empty token", "no connection", "no answer"],
)
def test_an_event_that_cannot_be_posted_is_logged_and_the_next_is_told(trouble: Exception, words: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = dropped()
    assert post(trouble) == ["second"]
    assert f"an Event could not be posted: {words}" in caplog.text
    assert dropped() == before + 1


@pytest.mark.parametrize(("status", "count"), [(403, 1), (409, 0)], ids=["refused", "told before"])
def test_an_event_that_is_refused_does_not_keep_the_next(status: int, count: int) -> None:
    before = dropped()
    assert post(None, status) == ["first", "second"]
    assert dropped() == before + count
