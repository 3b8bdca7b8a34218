"""What a reflector tells of an API server that lists, tells, breaks off and forgets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from api_server import connected
from finetune_operator import connection as connections
from finetune_operator import reflector as reflectors
from finetune_operator.connection import ApiError
from finetune_operator.reflector import Reflector

PATH = "/api/v1/pods"
SELECTOR = {"labelSelector": "ours"}
Told = tuple[str | None, str]
LISTED: Told = (None, "")
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def pod(name: str, version: int = 0) -> dict[str, Any]:
    return {"metadata": {"name": name, "resourceVersion": str(version)}}


def page(version: int, *names: str, onward: str = "") -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response({"metadata": {"resourceVersion": str(version), "continue": onward}, "items": [pod(name) for name in names]})

    return answer


def refusal(status: int, **headers: str) -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response({"kind": "Status", "code": status, "message": "no"}, status=status, headers=headers)

    return answer


def watch(*events: tuple[str, dict[str, Any]], cut: int | None = None, broken: bool = False) -> Answer:
    """A watch that tells events in two pieces, divided somewhere, and ends, or is broken off."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        content = b"".join(json.dumps({"type": kind, "object": raw}).encode() + b"\n" for kind, raw in events)
        for piece in (content[:cut], content[cut:] if cut else b""):
            await response.write(piece)
            await asyncio.sleep(0)
        if broken and request.transport is not None:
            request.transport.abort()
        return response

    return answer


def lines(content: bytes) -> Answer:
    """A watch that tells this."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(content)
        return response

    return answer


def follow(answers: list[Answer], version: str = "") -> tuple[list[Told], list[dict[str, str]]]:
    """What is told of a server that answers so, one request after the other, and what it was asked, to the request after those. `LISTED` was told after a list."""
    told: list[Told] = []
    asked: list[dict[str, str]] = []
    waiting = iter(answers)
    done = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append({name: value for name, value in request.query.items() if value and name in ("labelSelector", "resourceVersion", "watch", "continue")})
        following = next(waiting, None)
        if following is not None:
            return await following(request)
        done.set()
        return await watch()(request)

    async def scenario() -> None:
        application = web.Application()
        application.router.add_get(PATH, answer)
        async with connected(application) as connection:
            reflector = Reflector(connection, SELECTOR, lambda kind, raw: told.append((kind, raw["metadata"]["name"])), lambda: told.append(LISTED))
            task = asyncio.create_task(reflector.follow(PATH, version))
            async with asyncio.timeout(30):
                await done.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())
    return told, asked[: len(answers) + 1]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflectors, "FIRST_PAUSE_SECONDS", 0.0)


def watched(version: int) -> dict[str, str]:
    return {**SELECTOR, "watch": "true", "resourceVersion": str(version)}


def test_what_is_there_is_told_first_then_what_happens_after_that_version() -> None:
    told, asked = follow([page(5, "a", onward="more"), page(5, "b"), watch(("ADDED", pod("c", 6)), ("DELETED", pod("a", 7)))])
    assert told == [(None, "a"), (None, "b"), LISTED, ("ADDED", "c"), ("DELETED", "a")]
    assert asked == [SELECTOR, {**SELECTOR, "continue": "more"}, watched(5), watched(7)]


@pytest.mark.parametrize("cut", [1, 40, 75, 90])
def test_events_are_told_whole_wherever_what_comes_is_divided(cut: int) -> None:
    told, asked = follow([watch(("ADDED", pod("c", 6)), ("MODIFIED", pod("c", 7)), cut=cut)], "5")
    assert told == [("ADDED", "c"), ("MODIFIED", "c")]
    assert asked == [watched(5), watched(7)]


def test_bookmarks_are_not_told_but_a_watch_goes_on_from_them() -> None:
    assert follow([watch(("BOOKMARK", pod("", 9)))], "5") == ([], [watched(5), watched(9)])


def test_a_watch_that_is_broken_off_goes_on_where_it_was() -> None:
    told, asked = follow([watch(("ADDED", pod("c", 6)), broken=True)], "5")
    assert told == [("ADDED", "c")]
    assert asked == [watched(5), watched(6)]


@pytest.mark.parametrize(
    "forgotten",
    [
        refusal(410),
        refusal(403),
        watch(("ERROR", {"kind": "Status", "code": 410, "message": "too old resource version"})),
        watch(("ERROR", {"kind": "Status", "code": 500, "message": "unable to decode"})),
        lines(b"<html>\n"),
        lines(b'{"type": "ADDED"}\n'),
    ],
    ids=["410", "403", "410 as an event", "another error as an event", "no JSON", "no object"],
)
def test_what_cannot_be_told_from_a_version_on_is_listed_again(forgotten: Answer) -> None:
    told, asked = follow([forgotten, page(12, "a"), watch(("ADDED", pod("b", 13)))], "5")
    assert told == [(None, "a"), LISTED, ("ADDED", "b")]
    assert asked == [watched(5), SELECTOR, watched(12), watched(13)]


def test_a_list_of_nothing_is_one_too() -> None:
    assert follow([page(5)]) == ([LISTED], [SELECTOR, watched(5)])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_not_asked_for_a_list(status: int) -> None:
    told, asked = follow([refusal(status), watch(("ADDED", pod("a", 6)))], "5")
    assert told == [("ADDED", "a")]
    assert asked == [watched(5), watched(5), watched(6)]


def test_an_empty_line_is_no_event() -> None:
    assert follow([lines(b"\n" + json.dumps({"type": "ADDED", "object": pod("a", 6)}).encode() + b"\n\n")], "5") == ([("ADDED", "a")], [watched(5), watched(6)])


def test_a_watch_that_is_silent_is_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SILENCE_SECONDS", 2.0)

    async def silent(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(json.dumps({"type": "ADDED", "object": pod("a", 6)}).encode() + b"\n")
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 20)
        return response

    assert follow([silent], "5") == ([("ADDED", "a")], [watched(5), watched(6)])


def test_a_list_that_is_refused_is_asked_for_again() -> None:
    told, asked = follow([refusal(403), page(5, "a")])
    assert told == [(None, "a"), LISTED]
    assert asked == [SELECTOR, SELECTOR, watched(5)]


def test_one_list_alone_says_why_it_was_refused() -> None:
    async def scenario() -> None:
        application = web.Application()
        application.router.add_get(PATH, refusal(403))
        async with connected(application) as connection:
            await Reflector(connection, SELECTOR, lambda *_: None, lambda: None).list(PATH)

    with pytest.raises(ApiError, match=r"GET /api/v1/pods: 403 no"):
        asyncio.run(scenario())


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Those that were made, in no time."""
    made: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds:
            made.append(seconds)
        await sleep(0)

    monkeypatch.setattr(reflectors, "FIRST_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(reflectors, "LONGEST_PAUSE_SECONDS", 5.0)
    monkeypatch.setattr(asyncio, "sleep", note)
    return made


def test_pauses_grow_only_while_nothing_is_told(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflectors, "SHORT_SECONDS", math.inf)
    follow([refusal(410), refusal(500), refusal(500), page(5), watch(("ADDED", pod("a", 6))), watch()], "4")
    assert pauses[:5] == [2.0, 4.0, 5.0, 1.0, 2.0]


def test_pauses_grow_however_long_a_list_takes(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflectors, "SHORT_SECONDS", 0.0)
    follow([page(5), refusal(410), page(5), refusal(410)])
    assert pauses[:2] == [2.0, 4.0]


def test_a_server_is_left_alone_as_long_as_it_asks(pauses: list[float]) -> None:
    follow([refusal(429, **{"Retry-After": "4"}), refusal(429, **{"Retry-After": "600"}), refusal(429)], "5")
    assert pauses[:3] == [4.0, 5.0, 5.0]
