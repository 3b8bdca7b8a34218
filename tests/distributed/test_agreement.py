"""What one rank finds out becomes known to all."""

from __future__ import annotations

import os
import time

import pytest

from finetune_trainer.contract import DataError, DistributedError
from gang import Gang

TIMEOUT_SECONDS = 5.0


def open_group() -> int:
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank()


def fail_on_one(kind: str) -> str:
    from finetune_trainer.agreement import together

    rank = open_group()

    def act() -> int:
        if rank == 1:
            raise DataError("rows.jsonl:3: no messages") if kind == "user" else ZeroDivisionError("oops")
        return rank

    try:
        together(act)
    except Exception as error:  # noqa: BLE001 whatever it is, the test looks at it
        return f"{type(error).__name__}: {error}"
    return "went on"


def results() -> tuple[int, int, list[str]]:
    from finetune_trainer.agreement import from_every, from_first, together

    rank = open_group()
    return together(lambda: rank), from_first(os.getpid), from_every(f"rank {rank}")


def fail_on_first() -> None:
    from finetune_trainer.agreement import from_first

    open_group()
    from_first(lambda: (_ for _ in ()).throw(DataError("only rank 0 can know")))


def take_longer_than_the_timeout(fails: bool) -> object:
    """Rank 0 works until its group's timeout has passed twice, and what comes afterwards goes through that group."""
    from datetime import timedelta

    import torch.distributed

    from finetune_trainer.agreement import from_every, from_first_however_long

    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))

    def work() -> str:
        time.sleep(2 * TIMEOUT_SECONDS)
        if fails:
            raise DataError("only rank 0 can know")
        return "done"

    try:
        found = from_first_however_long(work)
    except DataError as error:
        found = str(error)
    return found, from_every(torch.distributed.get_rank())


@pytest.mark.parametrize(("fails", "found"), [(False, "done"), (True, "only rank 0 can know")])
def test_work_of_the_first_may_take_longer_than_the_timeout_of_collectives(gang2: Gang, fails: bool, found: str) -> None:
    assert gang2.run(take_longer_than_the_timeout, fails) == [(found, [0, 1])] * 2


def test_an_error_of_one_rank_stops_every_rank_with_the_same_words(gang2: Gang) -> None:
    assert gang2.run(fail_on_one, "user") == ["DataError: rows.jsonl:3: no messages"] * 2


def test_an_error_that_is_nobodys_stays_with_its_rank_and_is_a_consequence_for_others(gang2: Gang) -> None:
    assert gang2.run(fail_on_one, "bug") == [f"{DistributedError.__name__}: rank 1 stopped: ZeroDivisionError: oops", "ZeroDivisionError: oops"]


def test_results_are_each_ranks_own_the_firsts_or_everyones(gang2: Gang) -> None:
    (own0, first0, every0), (own1, first1, every1) = gang2.run(results)
    assert (own0, own1, first0) == (0, 1, first1)
    assert every0 == every1 == ["rank 0", "rank 1"]


def test_what_rank_0_finds_stops_all(gang2: Gang) -> None:
    with pytest.raises(DataError, match="only rank 0 can know"):
        gang2.run(fail_on_first)
