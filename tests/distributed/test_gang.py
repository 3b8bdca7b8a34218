"""The gang itself: results by rank, errors with their traceback, hung and dead workers replaced."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass

import pytest

from finetune_trainer.contract import ModelError
from gang import Gang, RankFailedError


@dataclass(frozen=True)
class Seen:
    rank: int
    world_size: int
    total: float


def add_up(value: float) -> Seen:
    import torch
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    total = torch.tensor(value * (rank + 1))
    torch.distributed.all_reduce(total)
    return Seen(rank, torch.distributed.get_world_size(), total.item())


def refuse(on_rank: int) -> int:
    if int(os.environ["RANK"]) == on_rank:
        raise ModelError(f"rank {on_rank} refuses")
    return os.getpid()


def refuse_while_others_wait() -> None:
    if os.environ["RANK"] == "0":
        raise ModelError("rank 0 refuses")
    threading.Event().wait()


def wait_for_ever() -> None:
    threading.Event().wait()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def process() -> int:
    return os.getpid()


def what_cannot_be_sent() -> object:
    return threading.Lock()


def test_each_rank_returns_its_result_and_collectives_work_call_after_call(gang2: Gang) -> None:
    assert gang2.run(add_up, 1.0) == [Seen(0, 2, 3.0), Seen(1, 2, 3.0)]
    assert gang2.run(add_up, 2.0) == [Seen(0, 2, 6.0), Seen(1, 2, 6.0)]


def test_an_error_of_a_rank_is_raised_with_its_traceback_and_the_workers_live_on(gang2: Gang) -> None:
    before = gang2.run(process)
    with pytest.raises(ModelError, match="rank 1 refuses") as raised:
        gang2.run(refuse, 1)
    assert "in refuse" in raised.value.__notes__[0]
    assert gang2.run(process) == before


def test_a_result_that_cannot_be_sent_is_an_error(gang1: Gang) -> None:
    with pytest.raises(TypeError, match="pickle"):
        gang1.run(what_cannot_be_sent)


def test_workers_left_waiting_for_a_failed_rank_are_replaced() -> None:
    gang = Gang(2, preload=(), grace_seconds=0.2)
    try:
        with pytest.raises(ModelError, match="rank 0 refuses"):
            gang.run(refuse_while_others_wait)
        assert len(set(gang.run(process))) == 2
    finally:
        gang.close()


def test_a_hung_or_dead_worker_is_told_and_replaced() -> None:
    gang = Gang(1, preload=())
    try:
        with pytest.raises(RankFailedError, match=r"wait_for_ever: ranks \[0\] of 1 gave no answer in 0.5 s"):
            gang.run(wait_for_ever, deadline_seconds=0.5)
        with pytest.raises(RankFailedError, match="rank 0 died without an answer"):
            gang.run(die)
        assert len(gang.run(process)) == 1
    finally:
        gang.close()


class Unreadable:
    """Can be sent, and not received."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return int, ("not a number",)


def describe(value: object) -> str:
    return f"{type(value).__name__} {value}"


def test_tensors_are_sent_by_value(gang1: Gang) -> None:
    import torch

    assert gang1.run(describe, torch.arange(3)) == ["Tensor tensor([0, 1, 2])"]


def test_arguments_that_cannot_be_received_fail_the_test(gang1: Gang) -> None:
    with pytest.raises(ValueError, match="not a number"):
        gang1.run(describe, Unreadable())
