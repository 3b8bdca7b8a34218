"""What is made of a trainer's words, whatever they are."""

from __future__ import annotations

import json
import math
from datetime import datetime

import pytest

from finetune_operator.reported import UNREAD, finish_progress, finite, read_failure, read_result, round_progress
from finetune_operator.status import JobProgress
from finetune_trainer.contract import Artifact, Reason
from situations import at, heard, report, told_failure, told_success

NOT_REPORTS = [
    "",
    "Segmentation fault",
    "[1, 2]",
    "null",
    '"succeeded"',
    told_success()[:-1],
    "[" * 4000,
    '{"succeeded": true, "failure": {"reason": "Data", "message": "\\ud800"}}',
    "9" * 4096,
]


@pytest.mark.parametrize("message", NOT_REPORTS)
def test_words_that_are_no_report_are_no_failure_and_no_result(message: str) -> None:
    assert read_failure(message) is None
    result = read_result(message)
    assert (result.artifacts, result.verification, result.resolved, result.message) == ([], None, None, UNREAD)


@pytest.mark.parametrize("reason", list(Reason))
def test_every_failure_of_a_trainer_is_read(reason: Reason) -> None:
    failure = read_failure(told_failure(reason, "why", 17, rank=5))
    assert failure is not None
    assert (failure.reason, failure.message, failure.rank, failure.exit_code) == (reason, "why", 5, 17)


@pytest.mark.parametrize("failure", ["Data", {}, {"reason": "NodeLost"}, {"reason": None}, {"reason": ["Data"]}, [], 1])
def test_failure_outside_the_closed_list_is_not_believed(failure: object) -> None:
    assert read_failure(json.dumps({"failure": failure})) is None


def test_fields_of_a_failure_that_do_not_fit_are_left_out() -> None:
    failure = read_failure(json.dumps({"failure": {"reason": "Data", "message": 5, "rank": -1, "exitCode": True}}))
    assert failure is not None
    assert (failure.message, failure.rank, failure.exit_code) == ("", None, None)


def test_result_is_read() -> None:
    result = read_result(told_success())
    assert [(each.format, each.path) for each in result.artifacts] == [("peft", "/work/default/tiny/u/peft")]
    assert result.verification is not None
    assert (result.verification.passed, result.resolved) == (True, {"training.lr": 1e-4})
    assert result.message == "peft at /work/default/tiny/u/peft; verified: Adapter"


def test_result_whose_path_was_cut_is_left_out() -> None:
    long = report(artifacts=[Artifact(format="peft", path="/work/" + "x" * 4000, sha256="ab" * 32)]).summary()
    assert len(long.encode()) <= 4096
    result = read_result(long)
    assert (result.artifacts, result.message) == ([], "node 0's report names no result")


def test_parts_of_a_result_that_do_not_fit_are_left_out() -> None:
    value = {"succeeded": True, "artifacts": [{"format": "floppy"}, 7], "verification": {"level": "Adapter"}, "resolved": [1]}
    result = read_result(json.dumps(value))
    assert (result.artifacts, result.verification, result.resolved) == ([], None, None)


def test_numbers_have_four_digits_and_times_whole_seconds() -> None:
    progress, left_out = round_progress(heard(when=10.75, loss=1.234567, learning_rate=8.00004e-5, tokens_per_second=55123.4, eta_seconds=31.26))
    assert (progress.loss, progress.learning_rate, progress.tokens_per_second, progress.eta_seconds) == (1.235, 8e-5, 55120.0, 31.26)
    assert (progress.last_heartbeat_time, left_out) == (at(10), [])


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_named_and_left_out(odd: float) -> None:
    progress, left_out = round_progress(heard(loss=odd, tokens_per_second=odd))
    assert (progress.loss, progress.tokens_per_second, left_out) == (None, None, ["loss", "tokensPerSecond"])


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00"])
def test_a_heartbeat_at_the_end_of_the_calendar_is_left_out(time: str) -> None:
    progress, _ = round_progress(heard(last_heartbeat_time=datetime.fromisoformat(time), percent=300))
    assert (progress.last_heartbeat_time, progress.percent) == (None, 100)


def test_numbers_that_kubernetes_json_does_not_have_are_text() -> None:
    big = 2**63
    assert finite({"a": [big, -big - 1, big - 1, -big, True], "b": {"c": 10**30}}) == {
        "a": [str(big), str(-big - 1), big - 1, -big, True],
        "b": {"c": str(10**30)},
    }
    result = read_result(json.dumps({"succeeded": True, "resolved": {"training.seed": 2**70}}))
    assert result.resolved == {"training.seed": str(2**70)}


def test_loss_that_json_made_null_is_named() -> None:
    assert round_progress(heard(loss=None))[1] == ["loss"]
    assert round_progress(heard(loss=None, learning_rate=None))[1] == []


def test_progress_of_a_run_that_succeeded_is_whole() -> None:
    last = finish_progress(JobProgress(stage="saving", step=19, total_steps=20, steps="19/20", percent=95, loss=0.5, eta_seconds=3.0, remaining="3s"))
    assert last == JobProgress(stage="finished", step=20, total_steps=20, steps="20/20", percent=100, loss=0.5, eta_seconds=0.0, remaining="0s")
    assert finish_progress(None) is None
