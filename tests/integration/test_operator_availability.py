"""Replicas of the operator, and an API server that goes and comes back: who acts, who waits, and that nothing is written that nobody needs.

On an API server of its own, which writes down who has asked it for what.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from finetune_operator import names
from kube_api import ApiServer, start_api_server
from kube_processes import until
from operator_jobs import Team, progress
from operator_process import SHORT_LEASE, START_SECONDS, SYSTEM_NAMESPACE, Operator, Trainers, install

AUDIT = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "rules": [{"level": "Metadata"}]}
OPERATOR = f"system:serviceaccount:{SYSTEM_NAMESPACE}:finetune-operator"
WRITES = frozenset(("create", "update", "patch", "delete", "deletecollection"))
LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{SYSTEM_NAMESPACE}/leases/finetune-operator"
QUIET_SECONDS = 60.0

Start = Callable[..., Operator]


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the API server writes down each request."""
    return tmp_path_factory.mktemp("audit") / "requests.jsonl"


@pytest.fixture(scope="module")
def api(audit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server that this module may restart."""
    policy = audit.parent / "policy.json"
    policy.write_text(json.dumps(AUDIT))
    flags = [f"--audit-policy-file={policy}", f"--audit-log-path={audit}", "--audit-log-mode=blocking"]
    with start_api_server(tmp_path_factory.mktemp("api"), apiserver_flags=flags) as server:
        yield server


@pytest.fixture(scope="module")
def operator_kubeconfig(api: ApiServer) -> Path:
    return install(api)


@pytest.fixture
def replica(operator_kubeconfig: Path, trainers: Trainers, tmp_path: Path) -> Iterator[Start]:
    """Starts a replica by its name, with settings; it is ended with the test."""
    started: list[Operator] = []

    def start(name: str = "operator-0", kubeconfig: Path = operator_kubeconfig, **settings: Any) -> Operator:
        made = Operator(tmp_path, kubeconfig, name, progressPort=trainers.port, **settings).start()
        started.append(made)
        return made

    yield start
    for made in started:
        if made.runs:
            made.terminate()


def written(audit: Path, user: str | None = OPERATOR, since: int = 0) -> Counter[str]:
    """What was written since a line of the record, Leases apart, by resource: `patch finetunejobs/status`."""
    found: Counter[str] = Counter()
    for line in audit.read_text().splitlines()[since:]:
        event = json.loads(line)
        what = event.get("objectRef", {})
        if event["verb"] in WRITES and what.get("resource") != "leases" and user in (None, event["user"]["username"]):
            found[f"{event['verb']} {what['resource']}{'/' + what['subresource'] if 'subresource' in what else ''}"] += 1
    return found


def requests_so_far(audit: Path) -> int:
    return len(audit.read_text().splitlines())


def holder(team: Team) -> str:
    return str((team.api.find(LEASE) or {"spec": {}})["spec"].get("holderIdentity") or "")


def until_up(team: Team, replica: Operator) -> None:
    team.until(lambda: replica.is_up() and replica.probe("/readyz")[0] == 200, f"{replica.name} is ready", START_SECONDS)


def test_a_job_costs_exactly_four_writes_until_its_pods_run(team: Team, replica: Start, audit: Path) -> None:
    replica().until_leading()
    since = requests_so_far(audit)
    team.create()
    team.until_attempt(1)
    team.create("one-node", nodes={"count": 1})
    team.until_attempt(1, "one-node")
    expected = {"create services": 2, "create pods": 3, "patch finetunejobs/status": 2}
    team.until(lambda: written(audit, since=since).total() >= sum(expected.values()), "the record has the last write too")
    assert written(audit, since=since) == expected


def test_gang_that_restarts_costs_its_pods_two_status_writes_and_an_event(team: Team, replica: Start, audit: Path) -> None:
    replica(progressWriteSeconds=600).until_leading()
    team.create()
    pods = team.until_attempt(1)
    team.run(pods, progress())
    team.until_condition("Initialized")
    team.until(lambda: [event["reason"] for event in team.events()] == ["Started"], "the Event")
    since = requests_so_far(audit)
    team.end(pods[0], 1)
    team.until_attempt(2)
    # The Service stands, and is asked for once more by the attempt to make it.
    expected = {"patch finetunejobs/status": 2, "delete pods": 2, "create services": 1, "create pods": 2, "create events": 1}
    team.until(lambda: written(audit, since=since).total() >= sum(expected.values()), "the record has the last write too")
    assert written(audit, since=since) == expected


def test_progress_is_written_once_in_a_while_and_at_the_end(team: Team, replica: Start) -> None:
    operator = replica(progressWriteSeconds=600).until_leading()
    team.create()
    pods = team.until_attempt(1)
    address = team.run(pods, progress(step=1))
    team.until(lambda: team.status().get("progress", {}).get("step") == 1, "the first progress")
    version = team.job()["metadata"]["resourceVersion"]
    asked = operator.metric("finetune_progress_polls_total", result="success")
    team.say(address, progress(step=15))
    team.until(lambda: operator.metric("finetune_progress_polls_total", result="success") >= asked + 5, "it was asked five times")
    assert team.job()["metadata"]["resourceVersion"] == version
    team.succeed(pods)
    team.until_condition("Succeeded")
    assert team.status()["progress"]["steps"] == "20/20"


def test_standby_waits_ready_without_a_write_and_takes_over_when_the_leader_is_killed(team: Team, replica: Start) -> None:
    leader = replica("operator-a", **SHORT_LEASE).until_leading()
    team.create("before")
    team.run(team.until_attempt(1, "before"), progress())
    standby = replica("operator-b", **SHORT_LEASE)
    until_up(team, standby)
    assert [(each.probe("/healthz")[0], each.probe("/readyz")[0]) for each in (leader, standby)] == [(200, 200), (200, 200)]
    assert (leader.metric("finetune_operator_leader"), standby.metric("finetune_operator_leader")) == (1, 0)
    team.until_condition("Initialized", "before")
    assert standby.writes() == 0
    leader.kill()
    team.create("after")
    team.until_attempt(1, "after", START_SECONDS)
    assert (holder(team), standby.metric("finetune_operator_leader")) == ("operator-b", 1)
    before = team.gang(1, "before")
    team.succeed(before)
    team.until_condition("Succeeded", "before")
    assert team.status("before")["attempt"] == 1


def test_leader_that_is_asked_to_end_releases_the_lease_at_once(team: Team, replica: Start) -> None:
    """The Lease would hold for an hour."""
    times = {"leaseDurationSeconds": 3600, "renewDeadlineSeconds": 10}
    leader, standby = replica("operator-a", **times).until_leading(), replica("operator-b", **times)
    until_up(team, standby)
    assert leader.terminate() == 0
    team.create()
    team.until_attempt(1, seconds=START_SECONDS)
    assert holder(team) == "operator-b"
    assert standby.terminate() == 0
    assert holder(team) == ""


def test_replica_that_waits_ends_when_it_is_asked_to(team: Team, replica: Start) -> None:
    replica("operator-a").until_leading()
    standby = replica("operator-b")
    until_up(team, standby)
    assert standby.terminate() == 0
    assert holder(team) == "operator-a"


def test_leader_whose_lease_another_has_taken_ends(team: Team, replica: Start) -> None:
    leader = replica(**SHORT_LEASE).until_leading()
    team.api.patch(LEASE, {"spec": {"holderIdentity": "somebody-else", "leaseDurationSeconds": 3600}})
    team.until(lambda: not leader.runs, "it has ended", START_SECONDS)
    assert "could not renew the Lease" in leader.log.read_text()
    team.api.delete(LEASE)


def test_api_server_that_is_restarted_is_asked_again(team: Team, replica: Start) -> None:
    operator = replica().until_leading()
    team.create("running")
    pods = team.until_attempt(1, "running")
    team.run(pods, progress())
    team.until_condition("Initialized", "running")
    team.create("restarting")
    team.hold(team.until_attempt(1, "restarting")[0])
    team.api.restart_apiserver()
    team.create("new")
    team.until_attempt(1, "new", START_SECONDS)
    team.end(team.gang(1, "restarting")[1], 1)
    team.until_condition("Restarting", "restarting", seconds=START_SECONDS)
    team.release(team.gang(1, "restarting")[0])
    team.until_attempt(2, "restarting", START_SECONDS)
    team.succeed(pods)
    team.until_condition("Succeeded", "running", seconds=START_SECONDS)
    assert operator.runs


def test_pods_and_jobs_that_went_while_nobody_watched_are_missed(team: Team, replica: Start) -> None:
    """Two ways of not being told: the operator is away, and its watch begins anew after the API server has restarted."""
    operator = replica(resyncSeconds=2).until_leading()
    for name in ("robbed", "removed"):
        team.create(name)
        team.run(team.until_attempt(1, name), progress())
        team.until_condition("Initialized", name)
    operator.kill()
    team.delete_pod(team.gang(1, "robbed")[0])
    team.remove("removed")
    team.api.restart_apiserver()
    team.api.delete(LEASE)
    again = replica(resyncSeconds=2).until_leading()
    team.until_attempt(2, "robbed", START_SECONDS)
    assert team.status("robbed")["restarts"]["reasons"] == [{"reason": "PodDeleted", "count": 1}]
    team.until(lambda: again.samples("finetune_jobs") == {(("namespace", team.namespace), ("phase", "Pending")): 1}, "one job is known")


def test_job_needs_an_image_where_the_settings_name_none(team: Team, replica: Start) -> None:
    replica(trainerImage=None).until_leading()
    team.create("without")
    team.create("with", nodes={"image": "registry.example/own:1"})
    message = "spec.nodes.image: it is required, because the operator's settings name no trainer image"
    assert team.until_condition("InvalidSpec", "without")["message"] == message
    assert [pod["spec"]["containers"][0]["image"] for pod in team.until_attempt(1, "with")] == ["registry.example/own:1"] * 2


def test_work_claim_of_the_settings_serves_jobs_that_name_none(team: Team, replica: Start) -> None:
    replica(workClaim="shared").until_leading()
    team.create(volumes={"work": None})
    for pod in team.until_attempt(1):
        assert {"name": "work", "persistentVolumeClaim": {"claimName": "shared"}} in pod["spec"]["volumes"]


def test_operator_of_some_namespaces_serves_no_other(team: Team, api: ApiServer, trainers: Trainers, replica: Start) -> None:
    other = Team(api, api.create_namespace(f"{team.namespace}-other"), trainers)
    other.create()
    operator = replica(watchNamespaces=[team.namespace]).until_leading()
    team.create()
    pods = team.until_attempt(1)
    team.run(pods, progress())
    team.until_condition("Initialized")
    team.end(pods[0], 1)
    team.until_attempt(2)
    assert (other.status(), other.names("pods")) == ({}, [])
    assert {dict(labels)["namespace"] for labels in operator.samples("finetune_jobs")} == {team.namespace}
    other.remove()


def test_namespace_without_rights_is_left_out_until_it_has_them(team: Team, api: ApiServer, trainers: Trainers, replica: Start) -> None:
    """The operator ends when there is more to serve than it has found, and what starts it anew is a kubelet."""
    other = Team(api, api.create_namespace(f"{team.namespace}-closed"), trainers)
    kubeconfig = api.user_kubeconfig("limited-operator")
    for place in (SYSTEM_NAMESPACE, team.namespace):
        allow(api, place, "limited-operator")
    settings = {"watchNamespaces": [other.namespace, team.namespace], "resyncSeconds": 1}
    operator = replica(kubeconfig=kubeconfig, **settings).until_leading()
    other.create()
    team.create()
    team.until_attempt(1)
    text = operator.log.read_text()
    assert text.count(f"namespace {other.namespace} cannot be served for now") == 1
    assert operator.runs
    allow(api, other.namespace, "limited-operator")
    team.until(lambda: not operator.runs, "it has ended", START_SECONDS)
    assert f"namespace {other.namespace} can be served now" in operator.log.read_text()
    assert holder(team) == ""
    replica(kubeconfig=kubeconfig, **settings).until_leading()
    other.until_attempt(1)
    assert team.status()["attempt"] == 1
    other.remove()


def allow(api: ApiServer, namespace: str, user: str) -> None:
    """Everything in a namespace."""
    subject = {"kind": "User", "name": user, "apiGroup": "rbac.authorization.k8s.io"}
    role = {"kind": "ClusterRole", "name": "cluster-admin", "apiGroup": "rbac.authorization.k8s.io"}
    body = {"metadata": {"name": user}, "subjects": [subject], "roleRef": role}
    api.post(f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings", body)


def test_definition_that_is_missing_is_waited_for_and_one_that_goes_ends_the_operator(team: Team, api: ApiServer, replica: Start) -> None:
    definition = f"crd/{names.PLURAL}.{names.GROUP}"
    api.kubectl("delete", definition)
    operator = replica(resyncSeconds=1)
    team.until(lambda: operator.log.exists() and "apply the CustomResourceDefinition" in operator.log.read_text(), "it waits", START_SECONDS)
    assert operator.probe("/readyz") == (503, "the watches have not begun")
    install(api)
    operator.until_leading()
    team.create()
    team.until_attempt(1)
    assert operator.log.read_text().count("apply the CustomResourceDefinition") == 1
    api.kubectl("delete", definition)
    try:
        until(lambda: not operator.runs, START_SECONDS, "it has ended")
    finally:
        install(api)
    replica().until_leading()
    team.create("again")
    team.until_attempt(1, "again")


def test_a_quiet_minute_makes_no_write(team: Team, replica: Start, audit: Path) -> None:
    """The one test that lets time pass: jobs that wait, that run with a heartbeat, that are suspended and that have ended."""
    operator = replica(progressWriteSeconds=15, resyncSeconds=10).until_leading()
    team.create("waiting")
    team.create("suspended", suspend=True)
    team.create("running")
    team.create("succeeded")
    team.create("failed", model={"source": "s3://bucket/model"})
    team.until_attempt(1, "waiting")
    team.run(team.until_attempt(1, "running"), progress(step=5))
    team.succeed(team.until_attempt(1, "succeeded"))
    team.until_condition("Suspended", "suspended")
    team.until_condition("Initialized", "running")
    for name, kind in (("succeeded", "Succeeded"), ("failed", "Failed")):
        team.until_condition(kind, name)
    jobs = team.names(names.PLURAL)
    team.until(lambda: sum(len(team.events(name)) for name in jobs) == 4, "Suspended, Started, Succeeded and InvalidSpec are told")
    team.until(lambda: all_is_of(team, "pods") and all_is_of(team, "services"), "what other tests have left is collected", START_SECONDS)
    since, asked = requests_so_far(audit), operator.metric("finetune_progress_polls_total", result="success")
    counted = counted_writes(operator, team.api)
    threading.Event().wait(QUIET_SECONDS)
    assert written(audit, since=since) == {}
    assert counted_writes(operator, team.api) == counted
    assert operator.metric("finetune_progress_polls_total", result="success") > asked


def all_is_of(team: Team, plural: str) -> bool:
    return {item["metadata"]["namespace"] for item in team.api.get(f"/api/v1/{plural}", labelSelector=names.JOB_LABEL)["items"]} == {team.namespace}


def counted_writes(operator: Operator, api: ApiServer) -> tuple[float, float]:
    """Writes as the operator counts them, and as the API server does: by anybody, of what the operator may write."""
    families = text_string_to_metric_families(api.get("/metrics"))
    samples = (sample for family in families if family.name == "apiserver_request" for sample in family.samples)
    kinds, verbs = ("pods", "services", "persistentvolumeclaims", names.PLURAL), ("POST", "PUT", "PATCH", "APPLY", "DELETE")
    return operator.writes(), sum(sample.value for sample in samples if sample.labels["resource"] in kinds and sample.labels["verb"] in verbs)
