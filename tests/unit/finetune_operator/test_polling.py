"""What rank 0 answers, and when it was heard."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_operator.polling import Conversation, note_answer, read_progress
from finetune_trainer.contract import Progress

HEARTBEAT = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC)
NOW = HEARTBEAT + timedelta(hours=1)


def told(**fields: Any) -> bytes:
    progress = Progress(stage="training", last_heartbeat_time=HEARTBEAT).at(3, 20)
    return json.dumps({**progress.model_dump(mode="json", by_alias=True), **fields}).encode()


def test_a_younger_trainers_answer_is_read_as_far_as_it_is_known() -> None:
    progress = read_progress(told(gpuTemperature=[70, 71], recent=[{"step": 3, "odd": True}]))
    assert (progress.stage, progress.steps, progress.last_heartbeat_time, progress.recent) == ("training", "3/20", HEARTBEAT, [])


NO_PROGRESS = {
    "no JSON": (b"<html>", "unexpected character"),
    "a list": (b"[]", "valid dictionary or instance of Progress"),
    "nothing": (b"{}", "lastHeartbeatTime"),
    "no number": (told(step="many"), "step\n"),
}


@pytest.mark.parametrize(("content", "message"), NO_PROGRESS.values(), ids=NO_PROGRESS.keys())
def test_an_answer_that_is_no_progress_is_an_error(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_progress(content)


def test_a_heartbeat_was_heard_when_it_changed_whatever_the_trainers_clock_says() -> None:
    async def main() -> Conversation:
        task = asyncio.create_task(asyncio.sleep(0))
        return Conversation(1, "10.0.0.1", NOW, task)

    conversation = asyncio.run(main())
    first = read_progress(told())
    note_answer(conversation, first, NOW)
    assert conversation.heartbeat_seen == NOW
    note_answer(conversation, read_progress(told(step=4)), NOW + timedelta(seconds=5))
    assert (conversation.heartbeat_seen, conversation.progress) == (NOW, first.model_copy(update={"step": 4}))
    beat = first.model_copy(update={"last_heartbeat_time": HEARTBEAT + timedelta(seconds=1)})
    note_answer(conversation, beat, NOW + timedelta(seconds=10))
    assert conversation.heartbeat_seen == NOW + timedelta(seconds=10)
