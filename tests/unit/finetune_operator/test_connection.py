"""Whose turn it is among requests that wait."""

from __future__ import annotations

import asyncio

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
            ("first", (Priority.EVENTS, 0)),
            ("event", (Priority.EVENTS, 0)),
            ("young status", (Priority.STATUS, 9)),
            ("old status", (Priority.STATUS, 1)),
            ("young child", (Priority.CHILDREN, 9)),
            ("old child", (Priority.CHILDREN, 1)),
            ("old child's sister", (Priority.CHILDREN, 1)),
        ]
        await asyncio.gather(*(request(turns, name, order) for name, order in waiting))
        assert turns.free == 1

    asyncio.run(main())
    assert went == ["first", "old child", "old child's sister", "young child", "old status", "young status", "event"]


def test_no_more_than_the_turns_are_taken_at_once() -> None:
    taken = most = 0

    async def request(turns: Turns) -> None:
        nonlocal taken, most
        async with turns.turn((Priority.CHILDREN, 0)):
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
            async with turns.turn((Priority.CHILDREN, 0)):
                await gate.wait()

        first, second, third = (asyncio.create_task(request()) for _ in range(3))
        await asyncio.sleep(0)
        second.cancel()
        gate.set()
        await asyncio.gather(first, third)
        assert second.cancelled() or second.cancelling()
        assert turns.free == 1

    asyncio.run(main())
