"""A gang that ends is started anew whole, or not: which ends count, which are for ever, and that no two gangs of a job live at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from finetune_trainer.contract import EXITS, Consequence, Exit, Reason
from kube_api import ApiServer
from operator_jobs import Team, ago, progress, told_failure
from operator_process import Operator

Json = dict[str, Any]
PERMANENT = [row for row in EXITS if row.consequence is Consequence.PERMANENT]
CONDITION = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "Eviction API: evicting", "lastTransitionTime": None}
ENDS_SOON = {"nodes": {"podTemplate": {"spec": {"terminationGracePeriodSeconds": 1}}}}

pytestmark = pytest.mark.usefixtures("operator")


def run_first_gang(team: Team, **sections: Any) -> list[Json]:
    """A job whose first gang trains; its pods."""
    team.create(**sections)
    pods = team.until_attempt(1)
    team.run(pods, progress())
    team.until_condition("Initialized")
    return pods


def restarts(team: Team) -> tuple[int, int, dict[str, int]]:
    """How many in all, how many counted, and why."""
    found = team.status()["restarts"]
    return found["total"], found["counted"], {each["reason"]: each["count"] for each in found["reasons"]}


@pytest.mark.parametrize(
    ("exit_code", "reason", "message"),
    [
        (1, "Internal", "pod job-1-1 ended with exit code 1 and left no report"),
        (20, "Distributed", "pod job-1-1 ended with exit code 20 and left no report"),
        (21, "Hang", "pod job-1-1 ended with exit code 21 and left no report"),
        (137, "PodFailed", "pod job-1-1 failed with exit code 137"),
    ],
)
def test_first_failed_pod_restarts_the_whole_gang(team: Team, exit_code: int, reason: str, message: str) -> None:
    pods = run_first_gang(team)
    team.end(pods[1], exit_code)
    team.until_attempt(2)
    assert team.names() == ["job-2-0", "job-2-1"]
    assert restarts(team) == (1, 1, {reason: 1})
    status = team.status()
    assert (status["failure"]["reason"], status["failure"]["message"], status["failure"]["exitCode"]) == (reason, message, exit_code)
    assert "progress" not in status
    assert team.states()["Restarting"] == "False"
    team.run(team.gang(2), progress(step=3))
    team.until(lambda: team.status()["phase"] == "Running", "the second gang trains")


def test_new_gang_has_the_jobs_service_and_claim_and_its_own_attempt(team: Team) -> None:
    pods = run_first_gang(team)
    service = team.find("services", "job")
    team.end(pods[0], 1)
    second = team.until_attempt(2)
    assert service is not None
    assert team.find("services", "job") == service
    assert [pod["spec"]["hostname"] for pod in second] == ["job-0", "job-1"]
    configs = [pod["metadata"]["annotations"]["finetune.mcore.dev/run-config"] for pod in (*pods, *second)]
    assert ['"attempt":1' in config for config in configs] == [True, True, False, False]
    assert ['"attempt":2' in config for config in configs] == [False, False, True, True]


def test_deleted_pod_restarts_the_gang(team: Team) -> None:
    pods = run_first_gang(team)
    team.delete_pod(pods[1])
    team.until_attempt(2)
    assert restarts(team) == (1, 1, {"PodDeleted": 1})
    assert team.status()["failure"]["message"] in ("pod job-1-1 was deleted", "pod job-1-1 is gone")


def test_pod_deleted_before_it_ran_restarts_the_gang(team: Team) -> None:
    team.create()
    team.delete_pod(team.until_attempt(1)[0])
    team.until_attempt(2)
    assert restarts(team) == (1, 1, {"PodDeleted": 1})


def test_evicted_pod_restarts_the_gang_uncounted(team: Team) -> None:
    pods = run_first_gang(team, runPolicy={"backoffLimit": 0})
    team.end(pods[1], 143, conditions=[CONDITION])
    team.until_attempt(2)
    assert restarts(team) == (1, 0, {"Evicted": 1})


def test_preempted_trainer_restarts_uncounted_and_ever_slower(team: Team) -> None:
    pods = run_first_gang(team, runPolicy={"backoffLimit": 0})
    for attempt in (2, 3, 4):
        for pod in pods:
            team.end(pod, 143, told_failure(Reason.PREEMPTED, "stopped by SIGTERM"), seconds_ago=-10)  # as below
        pods = team.until_attempt(attempt)
    assert restarts(team) == (3, 0, {"Preempted": 3})


def test_cause_counts_and_not_what_it_brought_about(team: Team) -> None:
    """Node 0 tells of a lost connection; a moment later node 1, which broke it, ends with what a restart does not mend."""
    pods = run_first_gang(team, runPolicy={"backoffLimit": 0})
    team.end(
        pods[0], 20, told_failure(Reason.DISTRIBUTED, "connection reset by peer", rank=0), seconds_ago=-10
    )  # a clock ahead: the operator waits its longest
    team.end(pods[1], 15, told_failure(Reason.OUT_OF_MEMORY, "rank 1 ran out of GPU memory", rank=1))
    condition = team.until_condition("Failed")
    assert (condition["reason"], condition["message"]) == ("OutOfMemory", "rank 1 ran out of GPU memory")
    assert (team.status()["failure"]["rank"], team.status()["failure"]["exitCode"]) == (1, 15)


def test_cause_that_never_shows_is_not_waited_for_for_ever(team: Team) -> None:
    pods = run_first_gang(team)
    team.end(pods[0], 20, told_failure(Reason.DISTRIBUTED, "connection reset by peer", rank=0))
    team.until_attempt(2)
    assert team.status()["failure"]["message"] == "connection reset by peer"
    assert restarts(team) == (1, 1, {"Distributed": 1})


@pytest.mark.parametrize("row", PERMANENT, ids=lambda row: row.reason.value)
def test_what_a_restart_does_not_mend_fails_at_once_in_the_trainers_words(team: Team, row: Exit) -> None:
    pods = run_first_gang(team)
    team.end(pods[1], row.code, told_failure(row.reason, f"the field was wrong: {row.reason}"))
    condition = team.until_condition("Failed")
    assert (condition["reason"], condition["message"]) == (row.reason.value, f"the field was wrong: {row.reason}")
    status = team.status()
    assert (status["phase"], status["attempt"], "restarts" in status) == ("Failed", 1, False)
    assert (status["failure"]["rank"], status["failure"]["exitCode"], status["failure"]["reason"]) == (3, row.code, row.reason.value)
    assert team.states() == {"Initialized": "True", "Running": "False", "Ready": "False", "Failed": "True", "Stalled": "True"}
    assert "completionTime" in status


def test_host_memory_kill_is_named_and_not_tried_again(team: Team) -> None:
    pods = run_first_gang(team)
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled", "startedAt": ago(9), "finishedAt": ago(0)}}
    trainer = {"name": "trainer", "ready": False, "restartCount": 0, "image": "i", "imageID": "", "state": killed}
    team.set_pod(pods[0], phase="Failed", containerStatuses=[trainer])
    condition = team.until_condition("Failed")
    assert condition["reason"] == "OutOfMemory"
    assert "nodes.resources.limits.memory" in condition["message"]


def test_backoff_limit_ends_the_job(team: Team) -> None:
    pods = run_first_gang(team, runPolicy={"backoffLimit": 2})
    for attempt in (2, 3):
        team.end(pods[0], 1)
        pods = team.until_attempt(attempt)
    team.end(pods[0], 1, told_failure(Reason.INTERNAL, "KeyError: 'x'"))
    condition = team.until_condition("Failed")
    assert condition["reason"] == "BackoffLimitExceeded"
    assert condition["message"].startswith("2 counted restarts of 2 (runPolicy.backoffLimit) are used up; the last gang ended: Internal: KeyError: 'x'")
    assert (team.status()["attempt"], restarts(team)) == (3, (2, 2, {"Internal": 2}))
    assert team.status()["failure"]["reason"] == "Internal"


def test_next_gang_is_made_only_when_the_last_pod_of_the_old_one_is_gone(team: Team, operator: Operator) -> None:
    pods = run_first_gang(team)
    team.hold(pods[0])
    team.end(pods[1], 1)
    team.until(lambda: team.names() == ["job-1-0"], "only the held pod is left")
    condition = team.until_condition("Restarting")
    assert condition["reason"] == "Internal"
    before = operator.metric("controller_runtime_reconcile_total")
    team.api.patch(team.path("pods", "job-1-0"), {"metadata": {"annotations": {"look": "again"}}})
    team.set_spec(runPolicy={"backoffLimit": 5})
    team.until(lambda: operator.metric("controller_runtime_reconcile_total") >= before + 2, "it was decided again, twice")
    assert team.names() == ["job-1-0"]
    assert (team.status()["attempt"], team.status()["phase"]) == (1, "Restarting")
    team.release(pods[0])
    team.until_attempt(2)
    assert team.names() == ["job-2-0", "job-2-1"]
    assert restarts(team) == (1, 1, {"Internal": 1})


@pytest.fixture
def node(api: ApiServer, team: Team) -> Iterator[str]:
    """A node that is ready, as far as anybody can say."""
    name = f"node-{team.namespace}"
    api.post("/api/v1/nodes", {"metadata": {"name": name}})
    set_ready(api, name, "True", 0)
    yield name
    api.delete(f"/api/v1/nodes/{name}")


def set_ready(api: ApiServer, name: str, value: str, seconds_ago: float) -> None:
    ready = {"type": "Ready", "status": value, "reason": "Test", "lastHeartbeatTime": ago(0), "lastTransitionTime": ago(seconds_ago)}
    api.patch(f"/api/v1/nodes/{name}/status", {"status": {"conditions": [ready]}})


def be_silent(team: Team, pod: Json) -> None:
    """What the node controller writes on the pods of a node that is not heard."""
    team.set_pod(pod, conditions=[{"type": "Ready", "status": "False", "lastTransitionTime": ago(100)}])


def test_pod_on_a_node_that_is_lost_is_removed_by_force(team: Team, node: str) -> None:
    """Its kubelet cannot end it: a deleted pod that is bound to a node stays until its kubelet or force takes it away."""
    team.create(runPolicy={"nodeLostSeconds": 60}, **ENDS_SOON)
    pods = team.until_attempt(1)
    team.bind(pods[1], node)
    team.run(pods, progress())
    team.until_condition("Initialized")
    set_ready(team.api, node, "Unknown", 120)
    be_silent(team, pods[1])
    team.until_attempt(2)
    assert restarts(team) == (1, 1, {"NodeLost": 1})
    assert team.status()["failure"]["node"] == node
    assert team.status()["failure"]["message"] == f"node {node} of pod job-1-1 was not ready for 60 s (runPolicy.nodeLostSeconds)"
    assert team.names() == ["job-2-0", "job-2-1"]


def test_pod_on_a_node_that_is_silent_for_a_shorter_time_is_left_alone_until_it_is_lost(team: Team, node: str) -> None:
    team.create(runPolicy={"nodeLostSeconds": 6}, **ENDS_SOON)
    pods = team.until_attempt(1)
    team.bind(pods[1], node)
    team.run(pods, progress())
    team.until_condition("Initialized")
    set_ready(team.api, node, "False", 0)
    be_silent(team, pods[1])
    team.until_attempt(2)
    lost = team.status()["restarts"]
    assert lost["reasons"] == [{"reason": "NodeLost", "count": 1}]
    since = team.api.get(f"/api/v1/nodes/{node}")["status"]["conditions"][0]["lastTransitionTime"]
    assert team.condition("Restarting")["lastTransitionTime"] > since


def test_pod_that_is_silent_on_a_node_that_is_ready_goes_on(team: Team, node: str, operator: Operator) -> None:
    team.create(runPolicy={"nodeLostSeconds": 1})
    pods = team.until_attempt(1)
    team.bind(pods[1], node)
    address = team.run(pods, progress())
    team.until_condition("Initialized")
    looked = operator.metric("rest_client_requests_total", method="GET")
    be_silent(team, pods[1])
    team.until(lambda: operator.metric("rest_client_requests_total", method="GET") > looked, "the node was looked at")
    team.say(address, progress(step=7))
    team.until(lambda: team.status()["progress"]["step"] == 7, "progress is still written")
    assert (team.status()["attempt"], team.status()["phase"]) == (1, "Running")


def test_pod_whose_node_is_gone_counts_as_lost(team: Team) -> None:
    team.create(**ENDS_SOON)
    pods = team.until_attempt(1)
    team.bind(pods[0], "node-that-never-was")
    team.run(pods, progress())
    be_silent(team, pods[0])
    team.until_attempt(2)
    assert restarts(team) == (1, 1, {"NodeLost": 1})


def test_trainer_that_shows_no_progress_hangs(team: Team) -> None:
    team.create(parallelism={"ddpTimeout": 1}, runPolicy={"progressDeadlineSeconds": 4})
    team.run(team.until_attempt(1), progress("training", 4, heartbeat_age=-3600))  # its clock is ahead
    team.until_attempt(2)
    assert restarts(team) == (1, 1, {"Hang": 1})
    message = team.status()["failure"]["message"]
    assert message.startswith("the trainer has shown no progress since ")
    assert message.endswith("for 4 s (runPolicy.progressDeadlineSeconds); it was at stage training, step 4/20")


def test_trainer_that_no_longer_answers_hangs_when_its_last_heartbeat_is_too_old(team: Team) -> None:
    team.create(parallelism={"ddpTimeout": 1}, runPolicy={"progressDeadlineSeconds": 4})
    address = team.run(team.until_attempt(1), progress("training", 4))
    team.until_condition("Initialized")
    team.say(address, "")
    team.until_attempt(2)
    assert restarts(team) == (1, 1, {"Hang": 1})


def test_trainer_that_was_never_heard_is_named_and_not_called_silent(team: Team, operator: Operator) -> None:
    team.create(parallelism={"ddpTimeout": 1}, runPolicy={"progressDeadlineSeconds": 2})
    address = team.run(team.until_attempt(1))
    team.until_condition("Running")
    team.until(lambda: team.condition("Ready")["reason"] == "Unanswered", "it is said that nobody answers")
    assert team.condition("Ready")["message"].startswith(f"2 pods run; rank 0 at {address}:")
    asked = operator.metric("finetune_progress_polls_total", result="error")
    team.until(lambda: operator.metric("finetune_progress_polls_total", result="error") >= asked + 15, "it was asked for 3 s")
    assert team.status()["attempt"] == 1
    team.set_spec(runPolicy={"progressDeadlineSeconds": 600})
    team.say(address, progress("training", 4, heartbeat_age=3600))  # its clock is behind
    team.until_condition("Ready")
    assert team.status()["attempt"] == 1
