"""Whose turn it is among requests that wait."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from api_server import FIRST, connected
from finetune_operator import connection as connections
from finetune_operator.connection import Order, Priority, Turns


def test_requests_go_by_priority_then_by_the_age_of_their_job_then_as_they_came() -> None:
    went: list[str] = []

    async def request(turns: Turns, name: str, order: Order) -> None:
        async with turns.turn(order):
            went.append(name)
            await asyncio.sleep(0)

    async def main() -> None:
        turns = Turns(1)
        waiting = [
            ("first", (Priority.EVENTS, "")),
            ("event", (Priority.EVENTS, "")),
            ("young status", (Priority.STATUS, "2026-11-21 b")),
            ("old status", (Priority.STATUS, "2026-11-21 a")),
            ("young child", (Priority.CHILDREN, "2026-11-22 a")),
            ("old child", (Priority.CHILDREN, "2026-11-21 b")),
            ("old child's sister", (Priority.CHILDREN, "2026-11-21 b")),
        ]
        await asyncio.gather(*(request(turns, name, order) for name, order in waiting))
        assert turns.free == 1

    asyncio.run(main())
    assert went == ["first", "old child", "old child's sister", "young child", "old status", "young status", "event"]


def test_no_more_than_the_turns_are_taken_at_once() -> None:
    taken = most = 0

    async def request(turns: Turns) -> None:
        nonlocal taken, most
        async with turns.turn((Priority.CHILDREN, "")):
            taken += 1
            most = max(most, taken)
            await asyncio.sleep(0)
            taken -= 1

    async def main() -> None:
        turns = Turns(3)
        await asyncio.gather(*(request(turns) for _ in range(20)))
        assert turns.free == 3

    asyncio.run(main())
    assert most == 3


def test_a_request_that_is_cancelled_while_it_waits_leaves_its_turn_to_the_next() -> None:
    async def main() -> None:
        turns = Turns(1)
        gate = asyncio.Event()

        async def request() -> None:
            async with turns.turn((Priority.CHILDREN, "")):
                await gate.wait()

        first, second, third = (asyncio.create_task(request()) for _ in range(3))
        await asyncio.sleep(0)
        second.cancel()
        gate.set()
        await asyncio.gather(first, third)
        assert second.cancelled() or second.cancelling()
        assert turns.free == 1

    asyncio.run(main())


def throttling(times: int, retry_after: str) -> tuple[list[str], web.Application]:
    """An API server that is asked too much so many times; and what it is asked."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        if len(asked) <= times:
            return web.json_response({"message": "too many requests"}, status=429, headers={"Retry-After": retry_after})
        return web.json_response({"kind": "Pod"})

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    return asked, application


def test_a_request_that_was_one_too_many_is_sent_again_when_the_api_server_wants_it_and_keeps_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LONGEST_PAUSE_SECONDS", 0.01)
    asked, application = throttling(2, "7")

    async def main() -> tuple[int, int]:
        async with connected(application, in_flight=1) as connection:
            first = asyncio.create_task(connection.send("GET", "/first", order=FIRST))
            await asyncio.sleep(0)
            second = await connection.send("GET", "/second", order=FIRST)
            return (await first).status, second.status

    assert asyncio.run(main()) == (200, 200)
    assert asked == ["/first", "/first", "/first", "/second"]


@pytest.mark.parametrize(("retry_after", "asks"), [("1", 4), ("soon", 1)])
def test_an_api_server_that_stays_busy_is_left_to_the_back_off(monkeypatch: pytest.MonkeyPatch, retry_after: str, asks: int) -> None:
    monkeypatch.setattr(connections, "LONGEST_PAUSE_SECONDS", 0.001)
    asked, application = throttling(100, retry_after)

    async def main() -> int:
        async with connected(application) as connection:
            return (await connection.send("GET", "/pod", order=FIRST)).status

    assert asyncio.run(main()) == 429
    assert len(asked) == asks
