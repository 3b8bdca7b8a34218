"""Jobs that the API server takes and that cannot be carried out; and names that somebody else has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from finetune_operator import names
from kube_api import ApiError
from operator_jobs import Team, progress
from operator_process import Operator

Json = dict[str, Any]
TEMPLATE: Json = {"claimName": None, "volumeClaimTemplate": {"spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}}}
TRAINER: Json = {"name": "trainer"}


def pod_template(**spec: Any) -> Json:
    return {"nodes": {"podTemplate": {"spec": spec}}}


BAD: dict[str, tuple[Json, str]] = {
    "no work volume": ({"volumes": {"work": None}}, "spec.volumes.work: it is required in a cluster"),
    "object storage": ({"model": {"source": "s3://bucket/model"}}, "spec.model.source: s3://bucket/model: object storage is not supported yet"),
    "ModelScope": ({"model": {"source": "ms://org/model"}}, "spec.model.source: ms://org/model: ModelScope is not supported yet"),
    "a claim as the model": ({"model": {"source": "pvc://claim/model"}}, "spec.model.source: pvc://claim/model: a PersistentVolumeClaim is not supported yet"),
    "unknown scheme": ({"model": {"source": "gopher://model"}}, "spec.model.source: gopher://model: this scheme is unknown"),
    "path above the work volume": ({"model": {"source": "../model"}}, "spec.model.source: ../model: a path must begin with / or ./, which is the work volume"),
    "unsupported data": ({"data": {"dataset": ["org/rows", "s3://rows"]}}, "spec.data.dataset[1]: s3://rows: object storage is not supported yet"),
    "container renamed": (
        pod_template(containers=[{"name": "trainer", "$patch": "delete"}, {"name": "mine", "image": "i"}]),
        "spec.nodes.podTemplate.spec.containers: the container trainer must stay",
    ),
    "container without a name": (pod_template(containers=[{"image": "i"}]), "spec.nodes.podTemplate.spec.containers[0].name: it is required"),
    "container twice": (pod_template(containers=[TRAINER, TRAINER]), "spec.nodes.podTemplate.spec.containers[1].name: trainer is given twice"),
    "containers are no list": (pod_template(containers={"trainer": {}}), "spec.nodes.podTemplate.spec.containers: it must be a list"),
    "template with a name": (
        {"nodes": {"podTemplate": {"metadata": {"name": "mine"}}}},
        "spec.nodes.podTemplate.metadata.name: a template gives labels and annotations only",
    ),
    "label that is a number": (
        {"nodes": {"podTemplate": {"metadata": {"labels": {"tier": 1}}}}},
        "spec.nodes.podTemplate.metadata.labels.tier: it must be a string; put it in quotes",
    ),
    "unknown directive": (pod_template(**{"$setElementOrder/containers": []}), "spec.nodes.podTemplate.spec.$setElementOrder/containers"),
    "sidecar without an image": (pod_template(containers=[{"name": "side"}]), "the API server refuses Pod job-1-0: "),
    "unknown policy": (pod_template(dnsPolicy="Sometimes"), 'spec.dnsPolicy: Unsupported value: "Sometimes"'),
    "field of another type": (pod_template(priority="high"), "the API server refuses Pod job-1-0: "),
    "mount without a volume": (pod_template(containers=[{**TRAINER, "volumeMounts": [{"name": "none", "mountPath": "/none"}]}]), 'Not found: "none"'),
    "a folder of the node": (
        pod_template(volumes=[{"name": "work", "hostPath": {"path": "/"}}]),
        "spec.nodes.podTemplate.spec.volumes[0].hostPath: a pod template may not ask for this",
    ),
    "limit below the request": (
        {"nodes": {"resources": {"requests": {"cpu": "8"}, "limits": {"cpu": "4"}}}},
        "spec.containers[0].resources.requests",
    ),
    "label that is none": ({"nodes": {"nodeSelector": {"not a label": "x"}}}, "spec.nodeSelector"),
    "claim without storage": (
        {"volumes": {"work": {"claimName": None, "volumeClaimTemplate": {"spec": {"accessModes": ["ReadWriteMany"]}}}}},
        "spec.resources[storage]: Required value",
    ),
    "claim with a name of its own": (
        {"volumes": {"work": {"claimName": None, "volumeClaimTemplate": {**TEMPLATE["volumeClaimTemplate"], "metadata": {"name": "mine"}}}}},
        "spec.volumes.work.volumeClaimTemplate.metadata.name: a template gives labels and annotations only",
    ),
}
"""By what is wrong: sections of the spec, and what the message says."""


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize(("sections", "message"), BAD.values(), ids=BAD.keys())
def test_spec_that_cannot_be_carried_out_is_named_and_no_pod_is_made(team: Team, sections: Json, message: str) -> None:
    team.create(**sections)
    condition = team.until_condition("InvalidSpec")
    assert condition["reason"] == "InvalidSpec"
    assert message in condition["message"]
    status = team.status()
    assert (status["phase"], status.get("attempt", 0), status["failure"]["reason"]) == ("Failed", 0, "InvalidSpec")
    assert team.states() == {"InvalidSpec": "True", "Failed": "True", "Ready": "False", "Stalled": "True"}
    assert team.names("pods") == []
    team.until(lambda: [event["reason"] for event in team.events()] == ["InvalidSpec"], "one Event")


@pytest.mark.usefixtures("operator")
def test_template_that_the_api_server_refuses_is_found_before_anything_is_made(team: Team) -> None:
    team.create(volumes={"work": TEMPLATE}, **pod_template(dnsPolicy="Sometimes"))
    team.until_condition("InvalidSpec")
    assert (team.names("services"), team.names("persistentvolumeclaims")) == ([], [])


@pytest.mark.usefixtures("operator")
def test_quota_holds_a_job_until_there_is_room(team: Team) -> None:
    """Not the job's fault, so it is tried again."""
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    team.api.post(team.path("resourcequotas"), quota)
    team.until(lambda: is_refused(team, 403), "the quota is in force")
    team.create()
    team.until(lambda: team.condition("Reconciling").get("reason") == "CreationRefused", "it is refused")
    assert "exceeded quota: none" in team.condition("Ready")["message"]
    assert (team.names(), team.status()["phase"]) == ([], "Pending")
    team.api.delete(team.path("resourcequotas", "none"))
    team.until_attempt(1)
    assert team.states()["Reconciling"] == "True"
    assert team.condition("Reconciling")["reason"] == "WaitingForPods"


FOREIGN: dict[str, tuple[str, Json, Json]] = {
    "Service": ("services", {"metadata": {"name": "job"}, "spec": {"clusterIP": "None", "selector": {"app": "mine"}}}, {}),
    "Pod": ("pods", {"metadata": {"name": "job-1-1"}, "spec": {"containers": [{"name": "mine", "image": "i"}]}}, {}),
    "PersistentVolumeClaim": (
        "persistentvolumeclaims",
        {"metadata": {"name": "job-work"}, "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}}},
        {"volumes": {"work": TEMPLATE}},
    ),
}


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize(("plural", "body", "sections"), FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_object_of_a_childs_name_is_left_alone_and_the_job_goes_on_when_it_is_gone(team: Team, plural: str, body: Json, sections: Json) -> None:
    foreign = team.api.post(team.path(plural), body)
    name = foreign["metadata"]["name"]
    team.create(**sections)
    condition = team.until_condition("NameConflict")
    assert f"{name} exists and does not belong to this job" in condition["message"]
    assert team.states()["Stalled"] == "True"
    assert team.status().get("attempt", 0) == 0
    found = team.find(plural, name)
    assert found is not None
    assert (found["metadata"]["uid"], found["spec"], found["metadata"].get("ownerReferences")) == (foreign["metadata"]["uid"], foreign["spec"], None)
    team.api.delete(team.path(plural, name))
    team.until_attempt(1)
    assert team.names() == ["job-1-0", "job-1-1"]
    assert team.states()["NameConflict"] == "False"
    assert "Stalled" not in team.states()
    assert [event["reason"] for event in team.events()].count("NameConflict") == 1


@pytest.mark.usefixtures("operator")
def test_pod_with_our_labels_that_another_made_is_neither_counted_nor_deleted(team: Team) -> None:
    labels = {names.JOB_LABEL: "job", names.ATTEMPT_LABEL: "1", names.NODE_LABEL: "0"}
    team.api.post(team.path("pods"), {"metadata": {"name": "stray", "labels": labels}, "spec": {"containers": [{"name": "mine", "image": "i"}]}})
    team.create(runPolicy={"cleanPodPolicy": "All"})
    team.until(lambda: team.status().get("attempt") == 1, "its own gang is made")
    assert team.names() == ["job-1-0", "job-1-1", "stray"]
    for name in ("job-1-0", "job-1-1"):
        pod = team.find("pods", name)
        assert pod is not None
        team.end(pod, 0)
    team.until_condition("Succeeded")
    team.until(lambda: team.names() == ["stray"], "its own pods are cleaned up")


@pytest.mark.usefixtures("operator")
def test_retained_claim_of_an_earlier_job_is_used_again(team: Team) -> None:
    team.create(volumes={"work": TEMPLATE})
    team.until_attempt(1)
    claim = team.find("persistentvolumeclaims", "job-work")
    assert claim is not None
    team.remove(propagation="Foreground")
    team.until(lambda: team.names(names.PLURAL) == team.names() == [], "the first job is gone")
    team.create(volumes={"work": TEMPLATE})
    pods = team.until_attempt(1)
    found = team.find("persistentvolumeclaims", "job-work")
    assert found is not None
    assert found["metadata"]["uid"] == claim["metadata"]["uid"]
    assert {"name": "work", "persistentVolumeClaim": {"claimName": "job-work"}} in pods[0]["spec"]["volumes"]
    assert "NameConflict" not in team.states()


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("held", [False, True], ids=["pods end at once", "a pod takes its time"])
def test_job_made_again_at_once_under_the_same_name_has_its_own_pods_only(team: Team, held: bool) -> None:
    team.create()
    old = team.until_attempt(1)
    team.run(old, progress(step=9))
    team.until_condition("Initialized")
    if held:
        team.hold(old[0])
    team.remove()
    made = team.create()
    if held:
        team.until(lambda: team.condition("Reconciling").get("reason") == "WaitingForOldPods", "it waits for the old pods")
        assert "of an earlier job of this name is still there" in team.condition("Ready")["message"]
        assert "NameConflict" not in team.states()
        team.release(old[0])
    pods = team.until_attempt(1)
    assert [pod["metadata"]["name"] for pod in pods] == ["job-1-0", "job-1-1"]
    assert {pod["metadata"]["ownerReferences"][0]["uid"] for pod in pods} == {made["metadata"]["uid"]}
    (service,) = team.all("services")
    assert service["metadata"]["ownerReferences"][0]["uid"] == made["metadata"]["uid"]
    assert "progress" not in team.status()
    team.succeed(pods)
    team.until_condition("Succeeded")


@pytest.mark.usefixtures("operator")
def test_pods_of_an_earlier_job_are_waited_for_also_where_no_name_is_theirs(team: Team) -> None:
    """Those of its second gang, which the first one of the new job would run beside."""
    team.create()
    pods = team.until_attempt(1)
    team.run(pods, progress())
    team.end(pods[0], 1)
    old = team.until_attempt(2)
    team.hold(old[1])
    team.remove()
    made = team.create()
    team.until(lambda: team.condition("Reconciling").get("reason") == "WaitingForOldPods", "it waits for the old pod")
    team.until(lambda: team.names() == ["job-2-1"], "the other one is gone")
    words = "Pod job-2-1 of an earlier job of this name is still there"
    team.until(lambda: team.condition("Ready")["message"] == words, "it waits for the one that is held")
    team.release(old[1])
    new = team.until_attempt(1)
    uid = made["metadata"]["uid"][:8]
    (service,) = team.all("services")
    assert service["spec"]["selector"] == {names.JOB_LABEL: "job", names.UID_LABEL: uid}
    assert [pod["metadata"]["labels"][names.UID_LABEL] for pod in new] == [uid, uid]
    assert [pod["metadata"]["labels"][names.UID_LABEL] for pod in old] != [uid, uid]


POLICY: Json = {
    "failurePolicy": "Fail",
    "matchConstraints": {"resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}]},
    "validations": [{"expression": "false", "message": "no pods today", "reason": "Invalid"}],
}


@pytest.fixture
def policy(team: Team) -> Iterator[str]:
    """A ValidatingAdmissionPolicy that lets no pod into the team's namespace; its path."""
    name, group = f"none-of-{team.namespace}", "/apis/admissionregistration.k8s.io/v1"
    selector = {"matchLabels": {"kubernetes.io/metadata.name": team.namespace}}
    binding = {"policyName": name, "validationActions": ["Deny"], "matchResources": {"namespaceSelector": selector}}
    for plural, kind, spec in (("policies", "Policy", POLICY), ("policybindings", "PolicyBinding", binding)):
        body = {"kind": f"ValidatingAdmission{kind}", "apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": name}, "spec": spec}
        team.api.post(f"{group}/validatingadmission{plural}", body)
    team.until(lambda: is_refused(team, 422), "the policy is in force")
    path = f"{group}/validatingadmissionpolicybindings/{name}"
    yield path
    if team.api.find(path) is not None:
        team.api.delete(path)
    team.api.delete(f"{group}/validatingadmissionpolicies/{name}")


def is_refused(team: Team, status: int) -> bool:
    """Whether a pod that is only tried is refused, with this code."""
    try:
        team.api.post(team.path("pods"), {"metadata": {"name": "tried"}, "spec": {"containers": [{"name": "mine", "image": "i"}]}}, dryRun="All")
    except ApiError as error:
        if error.status != status:
            raise
        return True
    return False


@pytest.mark.usefixtures("operator")
def test_policy_that_calls_pods_invalid_holds_a_job_until_it_is_gone(team: Team, policy: str) -> None:
    team.create()
    team.until(lambda: team.condition("Reconciling").get("reason") == "CreationRefused", "it is refused")
    assert "no pods today" in team.condition("Ready")["message"]
    assert (team.names(), team.status()["phase"]) == ([], "Pending")
    team.api.delete(policy)
    team.until_attempt(1)
    assert "Failed" not in team.states()


@pytest.mark.usefixtures("operator")
def test_status_that_somebody_has_spoiled_is_written_anew(team: Team, operator: Operator) -> None:
    team.create()
    team.until_attempt(1)
    team.api.patch(f"{team.path(names.PLURAL, 'job')}/status", {"status": {"phase": "Failed", "pods": {"desired": 7}}})
    team.until(lambda: team.status()["phase"] == "Pending", "the phase is written anew")
    assert team.status()["pods"]["desired"] == 2
    assert operator.runs
