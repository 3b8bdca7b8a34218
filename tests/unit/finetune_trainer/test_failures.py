"""Which of several failures is the cause of the others."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from finetune_trainer.contract import FailureReport, Reason, RunConfig, exit_for
from finetune_trainer.failures import End, Failure, choose_failure, choose_first, describe_end, leave_failure, make_failure, read_failures, weigh

CONFIG = RunConfig.model_validate({"model": {"source": "/m"}, "data": {"dataset": ["/d"]}, "run": {"outputDir": "/o"}})


def failure(reason: Reason, rank: int | None = 0, time: float = 0.0) -> Failure:
    return Failure(FailureReport(reason=reason, message=reason.value, rank=rank, node="n", exit_code=exit_for(reason).code), time)


def test_a_cause_weighs_less_than_what_it_looks_like_from_outside() -> None:
    inward = [
        failure(Reason.NUMERIC, time=5.0),
        failure(Reason.PREEMPTED, time=4.0),
        failure(Reason.DISTRIBUTED, rank=None, time=3.0),
        failure(Reason.HANG, time=2.0),
        failure(Reason.DISTRIBUTED, time=1.0),
    ]
    assert [weigh(each.report) for each in inward] == [0, 1, 2, 3, 4]
    for index, each in enumerate(inward):
        assert choose_first(inward[index:]) is each


def test_of_equal_failures_the_first_counts() -> None:
    first, second = failure(Reason.DATA, time=1.0), failure(Reason.MODEL, time=2.0)
    assert choose_first([second, first]) is first


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason not in (Reason.DISTRIBUTED, Reason.HANG, Reason.PREEMPTED)])
def test_a_reason_that_no_other_rank_can_cause_is_the_ranks_own(reason: Reason) -> None:
    assert weigh(failure(reason).report) == 0


def test_what_the_launcher_has_killed_says_nothing() -> None:
    assert choose_failure([End(0, 0, False, 1.0), End(1, -signal.SIGKILL, True, 1.0)], {}, CONFIG, stop_requested=False) is None


def test_a_rank_that_was_killed_after_it_left_a_failure_counts() -> None:
    left = failure(Reason.HANG, rank=1)
    assert choose_failure([End(1, -signal.SIGKILL, True, 1.0)], {1: left}, CONFIG, stop_requested=False) is left


def test_connections_that_a_stop_broke_are_no_failure() -> None:
    found = choose_failure([End(0, 20, False, 1.0)], {0: failure(Reason.DISTRIBUTED)}, CONFIG, stop_requested=True)
    assert found is not None
    assert (found.report.reason, found.report.exit_code) == (Reason.PREEMPTED, 143)
    assert found.report.message.startswith("the run was asked to stop when no training was under way")


def test_words_of_a_watchdog_count_only_for_a_process_that_aborted() -> None:
    words = "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5)\nterminate called\n"
    hang = describe_end(End(3, -signal.SIGABRT, False, 1.0, words)).report
    assert (hang.reason, hang.exit_code, hang.rank) == (Reason.HANG, 21, 3)
    assert hang.message == "a collective did not end within parallelism.ddpTimeout: WorkNCCL(SeqNum=5)"
    assert describe_end(End(3, -signal.SIGSEGV, False, 1.0, words)).report.reason is Reason.INTERNAL


def test_a_failure_of_the_node_itself_has_no_rank_and_its_reasons_exit_code() -> None:
    found = make_failure(Reason.MODEL, "no model").report
    assert (found.rank, found.exit_code) == (None, 12)


def test_failures_left_by_ranks_are_read_back_equal(tmp_path: Path) -> None:
    left = Failure(FailureReport(reason=Reason.DATA, message="x", rank=3, node="n", exit_code=11), 5.5, "trace")
    leave_failure(tmp_path, left)
    assert read_failures(tmp_path) == {3: left}
