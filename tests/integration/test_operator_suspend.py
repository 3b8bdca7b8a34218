"""Suspending, resuming, changing a suspended job, and the deadline of an active one."""

from __future__ import annotations

from typing import Any

import pytest

from kube_api import ApiError
from operator_jobs import Team, progress
from operator_process import Operator

pytestmark = pytest.mark.usefixtures("operator")


def run_first_gang(team: Team, **sections: Any) -> list[dict[str, Any]]:
    team.create(**sections)
    pods = team.until_attempt(1)
    team.run(pods, progress(step=4))
    team.until_condition("Initialized")
    return pods


def test_job_that_is_suspended_from_the_start_has_no_children_until_it_is_resumed(team: Team) -> None:
    team.create(suspend=True)
    team.until_condition("Suspended")
    status = team.status()
    assert (status["phase"], status.get("attempt", 0), "startTime" in status) == ("Suspended", 0, False)
    assert team.states() == {"Suspended": "True", "Ready": "True"}
    assert (team.names("pods"), team.names("services")) == ([], [])
    team.set_spec(suspend=False)
    team.until_attempt(1)
    assert team.names() == ["job-1-0", "job-1-1"]
    assert team.states()["Suspended"] == "False"
    assert "startTime" in team.status()
    team.until(lambda: [event["reason"] for event in team.events()] == ["Suspended", "Resumed"], "both Events")


def test_suspended_gang_ends_and_the_next_one_is_no_restart(team: Team) -> None:
    pods = run_first_gang(team, runPolicy={"backoffLimit": 0})
    team.set_spec(suspend=True)
    team.until_condition("Suspended")
    team.until(lambda: team.names() == [], "the pods end")
    team.until(lambda: team.states()["Ready"] == "True", "kstatus: what was asked for is there")
    status = team.status()
    assert (status["phase"], status["attempt"], status["pods"]["running"], status["progress"]["step"]) == ("Suspended", 1, 0, 4)
    assert not {"restarts", "failure", "startTime"} & set(status)
    assert status["observedGeneration"] == 2
    team.set_spec(suspend=False)
    second = team.until_attempt(2)
    assert [pod["metadata"]["name"] for pod in second] == ["job-2-0", "job-2-1"]
    assert {pod["metadata"]["uid"] for pod in second}.isdisjoint(pod["metadata"]["uid"] for pod in pods)
    assert "restarts" not in team.status()
    assert team.states()["Suspended"] == "False"
    team.run(second, progress(step=4))
    team.until(lambda: team.status()["phase"] == "Running", "it goes on")
    team.succeed(second)
    team.until_condition("Succeeded")


def test_pods_that_write_a_checkpoint_are_waited_for_when_a_job_is_resumed_at_once(team: Team, operator: Operator) -> None:
    pods = run_first_gang(team)
    team.hold(pods[1])
    team.set_spec(suspend=True)
    team.until_condition("Suspended")
    team.until(lambda: team.names() == ["job-1-1"], "one pod still writes")
    assert team.condition("Reconciling")["reason"] == "WaitingForOldPods"
    before = operator.metric("controller_runtime_reconcile_total")
    team.set_spec(suspend=False)
    team.until(lambda: team.status()["observedGeneration"] == 3, "the resume is seen")
    team.until(lambda: operator.metric("controller_runtime_reconcile_total") > before, "it was decided")
    assert team.names() == ["job-1-1"]
    team.release(pods[1])
    team.until_attempt(2)
    assert team.names() == ["job-2-0", "job-2-1"]


def test_exit_code_of_a_suspended_trainer_is_no_failure(team: Team) -> None:
    pods = run_first_gang(team)
    for pod in pods:
        team.hold(pod)
    team.set_spec(suspend=True)
    team.until_condition("Suspended")
    for pod in pods:
        team.end(pod, 143)
        team.release(pod)
    team.until(lambda: team.names() == [], "the pods end")
    team.set_spec(suspend=False)
    team.until_attempt(2)
    assert not {"restarts", "failure"} & set(team.status())


def test_where_pods_run_may_be_changed_while_suspended_and_reaches_the_next_gang(team: Team) -> None:
    run_first_gang(team)
    with pytest.raises(ApiError, match="nodeSelector"):
        team.set_spec(nodes={"nodeSelector": {"zone": "b"}})
    team.set_spec(suspend=True)
    team.until(lambda: team.names() == [], "the pods end")
    team.set_spec(nodes={"nodeSelector": {"zone": "b"}})
    team.set_spec(suspend=False)
    for pod in team.until_attempt(2):
        assert pod["spec"]["nodeSelector"] == {"zone": "b"}


def test_job_whose_deadline_has_passed_fails_and_its_pods_end(team: Team) -> None:
    team.create(runPolicy={"activeDeadlineSeconds": 3})
    team.until_attempt(1)
    condition = team.until_condition("Failed")
    assert (condition["reason"], condition["message"]) == ("DeadlineExceeded", "the job was active for 3 s (runPolicy.activeDeadlineSeconds)")
    team.until(lambda: team.names() == [], "the pods end")
    assert (team.status()["failure"]["reason"], team.status()["attempt"]) == ("DeadlineExceeded", 1)


def test_time_while_suspended_does_not_count_for_the_deadline(team: Team) -> None:
    run_first_gang(team, runPolicy={"activeDeadlineSeconds": 3600})
    started = team.status()["startTime"]
    team.set_spec(suspend=True)
    team.until(lambda: team.names() == [], "the pods end")
    team.until(lambda: team.states()["Ready"] == "True", "suspended")
    resumed = team.condition("Suspended")["lastTransitionTime"]
    team.set_spec(suspend=False)
    team.until_attempt(2)
    assert team.status()["startTime"] >= resumed >= started


def test_deadline_may_be_shortened_while_the_job_runs(team: Team) -> None:
    run_first_gang(team)
    team.set_spec(runPolicy={"activeDeadlineSeconds": 1})
    assert team.until_condition("Failed")["reason"] == "DeadlineExceeded"
