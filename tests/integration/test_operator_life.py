"""The happy life of a job as its user sees it: status, printer columns, Events, metrics, results, and what is left when it is deleted."""

from __future__ import annotations

import pytest

from finetune_operator import names
from finetune_trainer.contract import Reason
from operator_jobs import ARTIFACT, Team, progress, told_failure, told_success
from operator_process import Operator

TEMPLATE = {"claimName": None, "volumeClaimTemplate": {"spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}}}
TRAINING = progress(
    "training", 5, loss=1.23456, learning_rate=8e-5, tokens_per_second=5512.34, eta_seconds=31.0, remaining="31s", resolved={"training.lr": 1e-4}
)


def printed(team: Team, *arguments: str) -> dict[str, str]:
    """`kubectl get ftj` of the only job, by column; columns are as wide as their longest word."""
    heading, line = team.api.kubectl("-n", team.namespace, "get", "ftj", *arguments).stdout.splitlines()
    starts = [heading.index(word) for word in heading.split()]
    return {word: line[start:end].strip() for word, start, end in zip(heading.split(), starts, [*starts[1:], None], strict=True)}


def test_job_goes_from_pending_over_initializing_and_running_to_succeeded(team: Team, operator: Operator) -> None:
    team.create()
    pods = team.until_attempt(1)
    assert team.states() == {"Initialized": "False", "Running": "False", "Ready": "False", "Reconciling": "True"}
    address = team.run(pods, progress("loading"))
    team.until_condition("Running")
    team.until(lambda: team.status().get("progress", {}).get("stage") == "loading", "progress of loading")
    assert team.states() == {"Initialized": "False", "Running": "True", "Ready": "True"}
    assert team.status()["phase"] == "Initializing"
    team.say(address, TRAINING)
    team.until_condition("Initialized")
    team.until(lambda: team.status()["progress"]["step"] == 5, "step 5")
    assert team.states() == {"Initialized": "True", "Running": "True", "Ready": "True"}
    status = team.status()
    assert (status["phase"], status["attempt"], status["pods"]) == ("Running", 1, {"desired": 2, "running": 2, "succeeded": 0, "failed": 0})
    team.succeed(pods)
    team.until_condition("Succeeded")
    assert team.states() == {"Initialized": "True", "Running": "False", "Ready": "True", "Succeeded": "True"}
    assert team.status()["phase"] == "Succeeded"
    assert operator.runs


@pytest.mark.usefixtures("operator")
def test_progress_is_rounded_and_what_the_trainer_chose_is_kept(team: Team) -> None:
    team.create()
    team.run(team.until_attempt(1), TRAINING)
    status = team.until(lambda: (status := team.status()).get("progress") and status, "progress")
    heartbeat = status["progress"].pop("lastHeartbeatTime")
    assert heartbeat.endswith("Z")
    figures = {"loss": 1.235, "learningRate": 8e-5, "tokensPerSecond": 5512, "etaSeconds": 31, "remaining": "31s"}
    assert status["progress"] == {"stage": "training", "step": 5, "totalSteps": 20, "steps": "5/20", "percent": 25, **figures}
    assert status["resolved"] == {"training.lr": 1e-4}


@pytest.mark.usefixtures("operator")
def test_columns_of_kubectl_get_show_progress(team: Team) -> None:
    team.create()
    team.run(team.until_attempt(1), TRAINING)
    team.until(lambda: team.status().get("progress"), "progress")
    shown = printed(team)
    del shown["AGE"]
    assert shown == {"NAME": "job", "PHASE": "Running", "STEPS": "5/20", "LOSS": "1.235", "REMAINING": "31s", "ATTEMPT": "1"}
    wide = printed(team, "-o", "wide")
    assert (wide["MODEL"], wide["NODES"], wide["MESSAGE"]) == ("org/model", "2", "2 pods run")


@pytest.mark.usefixtures("operator")
def test_number_that_is_not_finite_is_left_out_and_named_until_it_is_finite_again(team: Team) -> None:
    """JSON has null for it."""
    team.create()
    address = team.run(team.until_attempt(1), TRAINING.replace('"loss":1.23456', '"loss":null'))
    condition = team.until_condition("StatusIncomplete")
    assert "loss" in condition["message"]
    assert "loss" not in team.status()["progress"]
    team.say(address, TRAINING)
    team.until(lambda: not team.condition("StatusIncomplete"), "the status is complete")
    assert team.status()["progress"]["loss"] == 1.235


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("answer", ["", "<html>", '{"stage": 7}', "x" * 100_000], ids=["nothing", "a page", "another schema", "too much"])
def test_answer_that_is_no_progress_does_not_disturb_a_running_job(team: Team, operator: Operator, answer: str) -> None:
    team.create()
    failed = operator.metric("finetune_progress_polls_total", result="error")
    address = team.run(team.until_attempt(1), answer)
    team.until_condition("Running")
    team.until(lambda: operator.metric("finetune_progress_polls_total", result="error") >= failed + 2, "it was asked")
    assert "progress" not in team.status()
    team.say(address, TRAINING)
    team.until_condition("Initialized")


@pytest.mark.usefixtures("operator")
def test_result_comes_out_of_the_termination_message_of_node_0(team: Team) -> None:
    team.create()
    pods = team.until_attempt(1)
    team.run(pods, TRAINING)
    team.until_condition("Initialized")
    team.succeed(pods)
    condition = team.until_condition("Succeeded")
    status = team.status()
    assert status["artifacts"] == [ARTIFACT.model_dump(mode="json")]
    assert {key: status["verification"][key] for key in ("level", "passed", "maxLogitDifference")} == {
        "level": "Adapter",
        "passed": True,
        "maxLogitDifference": 1.1e-6,
    }
    assert condition["message"] == f"peft at {ARTIFACT.path}; verified: Adapter"
    assert status["completionTime"] >= status["startTime"]
    assert (status["progress"]["stage"], status["progress"]["steps"], status["progress"]["percent"]) == ("finished", "20/20", 100)
    assert status["pods"] == {"desired": 2, "running": 0, "succeeded": 2, "failed": 0}


@pytest.mark.usefixtures("operator")
def test_result_of_a_run_that_was_never_asked_is_known_from_its_report(team: Team) -> None:
    team.create()
    team.succeed(team.until_attempt(1))
    team.until_condition("Succeeded")
    status = team.status()
    assert (status["resolved"], "progress" in status, len(status["artifacts"])) == ({"training.lr": 1e-4}, False, 1)


@pytest.mark.usefixtures("operator")
def test_success_without_a_report_says_so(team: Team) -> None:
    team.create()
    team.succeed(team.until_attempt(1), message="bye")
    condition = team.until_condition("Succeeded")
    assert condition["message"].startswith("node 0 left no report that can be read")
    assert "artifacts" not in team.status()


@pytest.mark.usefixtures("operator")
def test_job_has_not_succeeded_while_one_pod_still_runs(team: Team) -> None:
    team.create()
    pods = team.until_attempt(1)
    team.run(pods, TRAINING)
    team.until_condition("Initialized")
    team.end(pods[0], 0, told_success())
    team.until(lambda: team.status()["pods"]["succeeded"] == 1, "one pod has succeeded")
    assert team.states()["Running"] == "True"
    team.end(pods[1], 0)
    team.until_condition("Succeeded")


@pytest.mark.usefixtures("operator")
def test_one_event_is_told_for_each_transition(team: Team) -> None:
    team.create()
    first = team.until_attempt(1)
    team.run(first, TRAINING)
    team.until_condition("Initialized")
    team.end(first[1], 20, told_failure(Reason.DISTRIBUTED, "connection reset by peer"), seconds_ago=5)
    second = team.until_attempt(2)
    team.run(second, TRAINING)
    team.until_condition("Running")
    team.succeed(second)
    team.until_condition("Succeeded")
    team.until(lambda: len(team.events()) >= 4, "four Events")
    told = [(event["type"], event["reason"], event["message"], event["source"]["component"]) for event in team.events()]
    assert told == [
        ("Normal", "Started", "all pods of gang 1 run", "finetune-operator"),
        ("Warning", "Restarting", "gang 1 ended: Distributed: connection reset by peer", "finetune-operator"),
        ("Normal", "Started", "all pods of gang 2 run", "finetune-operator"),
        ("Normal", "Succeeded", f"peft at {ARTIFACT.path}; verified: Adapter", "finetune-operator"),
    ]
    assert {event["involvedObject"]["uid"] for event in team.events()} == {team.job()["metadata"]["uid"]}


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize(("policy", "left"), [("None", ["job-1-0", "job-1-1"]), ("Running", ["job-1-0"]), ("All", [])])
def test_clean_pod_policy_decides_which_pods_of_a_success_stay(team: Team, policy: str, left: list[str]) -> None:
    """Node 1's trainer has ended well, but a sidecar keeps its pod running."""
    team.create(runPolicy={"cleanPodPolicy": policy})
    pods = team.until_attempt(1)
    team.run(pods, TRAINING)
    team.end(pods[1], 0, phase="Running")
    team.end(pods[0], 0, told_success())
    team.until_condition("Succeeded")
    team.until(lambda: team.names() == left, f"pods left: {left}")


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize(("policy", "left"), [("None", ["job-1-0"]), ("Running", ["job-1-0"]), ("All", [])])
def test_pods_of_a_failure_never_go_on_computing(team: Team, policy: str, left: list[str]) -> None:
    team.create(runPolicy={"cleanPodPolicy": policy})
    pods = team.until_attempt(1)
    team.run(pods, TRAINING)
    team.end(pods[0], 10, told_failure(Reason.CONFIGURATION, "training.lr is 0"))
    team.until_condition("Failed")
    team.until(lambda: team.names() == left, f"pods left: {left}")


@pytest.mark.usefixtures("operator")
def test_waiting_pod_says_why_in_the_status(team: Team) -> None:
    team.create()
    pods = team.until_attempt(1)
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "not found"}}
    team.set_pod(pods[1], containerStatuses=[{"name": "trainer", "ready": False, "restartCount": 0, "image": "", "imageID": "", "state": waiting}])
    team.until(lambda: "ImagePullBackOff" in team.condition("Ready")["message"], "the reason")
    assert team.condition("Ready")["message"] == "pod job-1-1: ImagePullBackOff: registry.example/trainer:1"


def test_metrics_count_jobs_by_phase_and_forget_a_deleted_job(team: Team, operator: Operator) -> None:
    team.create("run")
    team.create("wait")
    team.create("bad", model={"source": "s3://bucket/model"})
    here = {"namespace": team.namespace}
    team.run(team.until_attempt(1, "run"), TRAINING)
    team.until(lambda: operator.metric("finetune_job_step", **here, name="run") == 5, "the step as a metric")
    team.until_attempt(1, "wait")
    team.until_condition("Failed", "bad")
    phases = {phase: operator.metric("finetune_jobs", **here, phase=phase) for phase in ("Running", "Pending", "Failed")}
    assert phases == {"Running": 1, "Pending": 1, "Failed": 1}
    figures = {name: operator.metric(f"finetune_job_{name}", **here, name="run") for name in ("total_steps", "loss", "tokens_per_second", "eta_seconds")}
    assert figures == {"total_steps": 20, "loss": 1.235, "tokens_per_second": 5512, "eta_seconds": 31}
    assert operator.metric("finetune_jobs_finished_total", **here, result="failed", reason="InvalidSpec") == 1
    assert operator.metric("controller_runtime_reconcile_total", result="success") > 0
    assert operator.metric("finetune_operator_leader") == 1
    assert operator.metric("finetune_operator_build_info") == 1
    for name in ("run", "wait", "bad"):
        team.remove(name)
    team.until(lambda: not any(("namespace", team.namespace) in labels for labels in operator.samples("finetune_jobs")), "the jobs are forgotten")
    assert not any(("namespace", team.namespace) in labels for labels in operator.samples("finetune_job_step"))


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("propagation", ["Background", "Foreground"])
@pytest.mark.parametrize(("when_deleted", "claims"), [("Retain", ["job-work"]), ("Delete", [])])
def test_deletion_of_a_job_leaves_nothing_but_a_retained_claim(team: Team, propagation: str, when_deleted: str, claims: list[str]) -> None:
    team.create(volumes={"work": TEMPLATE, "persistentVolumeClaimRetentionPolicy": {"whenDeleted": when_deleted}})
    team.run(team.until_attempt(1), TRAINING)
    team.until_condition("Initialized")
    team.remove(propagation=propagation)

    def left() -> dict[str, list[str]]:
        return {plural: team.names(plural) for plural in (names.PLURAL, "pods", "services", "persistentvolumeclaims")}

    team.until(lambda: left() == {names.PLURAL: [], "pods": [], "services": [], "persistentvolumeclaims": claims}, "all else is gone")
