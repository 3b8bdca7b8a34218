"""Conditions and phases by themselves: what keeps its time, what goes away, what kstatus reads."""

from __future__ import annotations

import pytest

from finetune_operator import conditions
from finetune_operator.lifecycle import decide
from finetune_operator.observed import Refusal
from finetune_operator.status import Condition, ConditionType, PodCounts, Status
from situations import (
    ALL_RUN,
    FAILED,
    LOADING,
    NEW,
    PENDING,
    PREEMPTED,
    RESTARTING,
    SETTINGS,
    START,
    SUCCEEDED,
    SUSPENDED,
    TRAINING,
    at,
    failed,
    pod,
    running,
    seen,
    succeeded,
)


def get(status: Status, kind: str) -> Condition:
    return next(condition for condition in status.conditions if condition.type == kind)


def held(refusal: Refusal) -> Status:
    return decide(seen(NEW, refusal=refusal), SETTINGS).status


def test_time_of_a_condition_stays_while_its_value_does() -> None:
    status = conditions.set_condition(NEW, ConditionType.READY, False, "WaitingForPods", "one", START)
    status = conditions.set_condition(status, ConditionType.READY, False, "Restarting", "two", at(10))
    assert (get(status, "Ready").reason, get(status, "Ready").message, get(status, "Ready").last_transition_time) == ("Restarting", "two", START)
    status = conditions.set_condition(status, ConditionType.READY, True, "Training", "three", at(20.9))
    assert get(status, "Ready").last_transition_time == at(20)


def test_condition_keeps_its_place() -> None:
    status = NEW
    for kind in (ConditionType.READY, ConditionType.RUNNING, ConditionType.READY):
        status = conditions.set_condition(status, kind, True, "Training", "", START)
    assert [condition.type for condition in status.conditions] == ["Ready", "Running"]


def test_conditions_that_never_were_are_not_lowered() -> None:
    assert conditions.lower(NEW, list(ConditionType), "Failed", "", START) == NEW


def test_every_condition_is_of_the_generation_that_was_decided_for() -> None:
    status = conditions.stamp(TRAINING, 7)
    assert {status.observed_generation, *(condition.observed_generation for condition in status.conditions)} == {7}


def test_message_is_cut_to_what_the_schema_takes() -> None:
    status = conditions.set_condition(NEW, ConditionType.FAILED, True, "Data", "x" * 50000, START)
    assert len(get(status, "Failed").message) == 32768
    assert Status.model_validate_json(status.model_dump_json()) == status


@pytest.mark.parametrize("status", [PENDING, LOADING, TRAINING, RESTARTING, PREEMPTED, SUSPENDED, SUCCEEDED, FAILED])
def test_every_time_is_in_whole_seconds_of_utc(status: Status) -> None:
    times = [status.start_time, status.completion_time, *(condition.last_transition_time for condition in status.conditions)]
    assert all(time is None or (time.microsecond == 0 and str(time.tzinfo) == "UTC") for time in times)


def kstatus(status: Status, generation: int = 1) -> str:
    """What kstatus makes of an object (cli-utils, generic rules), in its order."""
    if status.observed_generation != generation:
        return "InProgress"
    if status.is_true(ConditionType.RECONCILING):
        return "InProgress"
    if status.is_true(ConditionType.STALLED):
        return "Failed"
    return "Current" if status.is_true(ConditionType.READY) else "InProgress"


KSTATUS = [
    ("pending", PENDING, "InProgress"),
    ("loading", LOADING, "Current"),
    ("training", TRAINING, "Current"),
    ("restarting", RESTARTING, "InProgress"),
    ("being suspended", decide(seen(TRAINING, *ALL_RUN, now=50, spec={"suspend": True}), SETTINGS).status, "InProgress"),
    ("suspended", SUSPENDED, "Current"),
    ("being resumed", decide(seen(SUSPENDED, running(0, deletion=at(90)), now=60), SETTINGS).status, "InProgress"),
    ("succeeded", SUCCEEDED, "Current"),
    ("failed", FAILED, "Failed"),
    ("a name conflict", held(Refusal("NameConflict", "Service tiny is not ours")), "Failed"),
    ("a quota", held(Refusal("CreationRefused", "quota")), "InProgress"),
    ("leftovers", held(Refusal("Leftover", "pod tiny-1-0")), "InProgress"),
    ("an invalid spec", held(Refusal("InvalidSpec", "no")), "Failed"),
]


@pytest.mark.parametrize(("status", "expected"), [row[1:] for row in KSTATUS], ids=[row[0] for row in KSTATUS])
def test_kstatus(status: Status, expected: str) -> None:
    assert kstatus(status) == expected


@pytest.mark.parametrize("status", [row[1] for row in KSTATUS], ids=[row[0] for row in KSTATUS])
def test_abnormal_conditions_are_absent_when_all_is_normal(status: Status) -> None:
    found = {condition.type: condition.status for condition in status.conditions}
    assert found.get("Reconciling") in (None, "True")
    assert found.get("Stalled") in (None, "True")
    assert not ("Reconciling" in found and "Stalled" in found)
    assert "Ready" in found


def test_pods_are_counted_by_what_their_trainers_do() -> None:
    pods = (running(0), succeeded(1, phase="Running"), failed(2, 1, phase="Running"), pod(3), failed(4, None))
    assert conditions.count_pods(6, pods) == PodCounts(desired=6, running=1, succeeded=1, failed=2)
    assert conditions.count_pods(6, pods, stopped=True) == PodCounts(desired=6, running=0, succeeded=1, failed=2)


def test_why_pods_wait_is_told_of_the_first_that_says_so() -> None:
    pods = (running(0, message="not this"), pod(1), pod(2, message="Unschedulable: 0/3 nodes are available"))
    assert conditions.waiting_message(3, pods) == "pod tiny-1-2: Unschedulable: 0/3 nodes are available"
    assert conditions.waiting_message(1, ()) == "waiting for 1 pod to run"


def test_a_gang_of_one_pod_is_told_so() -> None:
    status = conditions.running(PENDING, PodCounts(desired=1, running=1), loaded=True, now=START)
    assert get(status, "Ready").message == "the pod runs"
