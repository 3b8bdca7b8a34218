"""The keyed queue, on a real event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from finetune_operator import queue as queues
from finetune_operator.queue import Key, Queue

A, B = ("team", "a"), ("team", "b")


async def drained(queue: Queue) -> None:
    while queue.tasks:
        await asyncio.gather(*list(queue.tasks))
        await asyncio.sleep(0)


def run(work: Callable[[Key], Awaitable[float | None]], scenario: Callable[[Queue], Awaitable[None]]) -> Queue:
    async def main() -> Queue:
        queue = Queue(work)
        async with asyncio.timeout(10):
            await scenario(queue)
        await queue.close()
        return queue

    return asyncio.run(main())


def test_a_key_that_is_added_while_its_worker_runs_is_worked_on_once_more_and_never_twice_at_once() -> None:
    running: list[Key] = []
    most = 0
    calls = 0

    async def work(key: Key) -> None:
        nonlocal most, calls
        running.append(key)
        most, calls = max(most, len(running)), calls + 1
        await asyncio.sleep(0)
        running.remove(key)

    async def scenario(queue: Queue) -> None:
        queue.add(A)
        await asyncio.sleep(0)
        queue.add(A)
        queue.add(A)
        await drained(queue)

    run(work, scenario)
    assert (most, calls) == (1, 2)


def test_keys_are_worked_on_side_by_side() -> None:
    both = asyncio.Event()
    begun: set[Key] = set()

    async def work(key: Key) -> None:
        begun.add(key)
        if len(begun) == 2:
            both.set()
        await both.wait()

    async def scenario(queue: Queue) -> None:
        queue.add(A)
        queue.add(B)
        await drained(queue)

    run(work, scenario)
    assert begun == {A, B}


def test_a_failure_is_tried_again_and_success_forgets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "FIRST_RETRY_SECONDS", 0.001)
    outcomes = [RuntimeError("first"), RuntimeError("second"), None]
    done = asyncio.Event()

    async def work(key: Key) -> None:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        done.set()

    async def scenario(queue: Queue) -> None:
        queue.add(A)
        await done.wait()
        await drained(queue)
        assert queue.entries == {}

    run(work, scenario)
    assert outcomes == []


def test_back_off_doubles_up_to_its_limit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(queues, "FIRST_RETRY_SECONDS", 0.001)
    monkeypatch.setattr(queues, "LONGEST_RETRY_SECONDS", 0.004)
    waits: list[str] = []
    enough = asyncio.Event()

    async def work(key: Key) -> None:
        waits[:] = [record.message.rsplit(" in ", 1)[1] for record in caplog.records]
        if len(waits) == 5:
            enough.set()
            return
        raise TimeoutError("the API server does not answer")

    async def scenario(queue: Queue) -> None:
        queue.add(A)
        await enough.wait()

    run(work, scenario)
    assert [record.args[-1] for record in caplog.records] == [0.001, 0.002, 0.004, 0.004, 0.004]
    assert "team/a: the API server does not answer" in caplog.text


def test_a_key_comes_again_after_the_seconds_that_its_work_asks_for() -> None:
    answers: list[float | None] = [0.001, 0.001, None]
    done = asyncio.Event()

    async def work(key: Key) -> float | None:
        answer = answers.pop(0)
        if not answers:
            done.set()
        return answer

    async def scenario(queue: Queue) -> None:
        queue.add(A)
        await done.wait()

    run(work, scenario)
    assert answers == []


def test_what_waits_is_counted_and_dated() -> None:
    gate = asyncio.Event()

    async def work(key: Key) -> None:
        await gate.wait()

    async def scenario(queue: Queue) -> None:
        queue.add(A)
        await asyncio.sleep(0.002)
        assert (queue.depth(), queue.oldest_seconds()) == (1, 0.0)
        assert queue.longest_seconds() > 0
        queue.add(A)
        await asyncio.sleep(0.002)
        assert queue.oldest_seconds() == 0.0, "what waits for the worker of its own job does not say that the process is stuck"
        gate.set()
        await drained(queue)
        assert (queue.depth(), queue.oldest_seconds(), queue.longest_seconds()) == (0, 0.0, 0.0)

    run(work, scenario)


def test_a_key_that_fails_again_and_again_is_complained_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "FIRST_RETRY_SECONDS", 0.0001)
    complaints: list[str] = []
    calls = 0
    enough = asyncio.Event()

    async def work(key: Key) -> None:
        nonlocal calls
        calls += 1
        if calls == queues.COMPLAIN_AFTER + 3:
            enough.set()
            return
        raise ValueError(f"failure {calls}")

    async def complain(key: Key, error: Exception) -> None:
        complaints.append(f"{key}: {error}")
        raise OSError("nobody listens")

    async def main() -> None:
        queue = Queue(work, complain)
        async with asyncio.timeout(10):
            queue.add(A)
            await enough.wait()
        await queue.close()

    asyncio.run(main())
    assert complaints == [f"{A}: failure {queues.COMPLAIN_AFTER}"]


@pytest.mark.parametrize(("error", "told"), [(ValueError("a defect"), True), (TimeoutError("no answer"), False)])
def test_where_it_failed_is_logged_of_defects_only(error: Exception, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def work(key: Key) -> None:
        raise error

    async def scenario(queue: Queue) -> None:
        queue.add(A)
        await drained(queue)

    run(work, scenario)
    assert [bool(record.exc_info) for record in caplog.records] == [told]


def test_nothing_is_begun_after_the_end() -> None:
    async def work(key: Key) -> None:
        raise AssertionError("a queue that was closed works")

    async def scenario(queue: Queue) -> None:
        await queue.close()
        queue.add(A)
        assert (queue.depth(), queue.tasks) == (0, set())

    run(work, scenario)
