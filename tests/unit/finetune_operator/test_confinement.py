"""What a pod template may not ask for unless an administrator allows it."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator import manifests
from finetune_operator.manifests import Owner
from finetune_operator.plan import Identity, cluster_place, make_plan
from finetune_operator.problems import InvalidJob
from finetune_operator.settings import Settings
from jobs import make_job

SETTINGS = Settings(work_claim="results", trainer_image="trainer:1")
OPEN = Settings(work_claim="results", trainer_image="trainer:1", allow_privileged_templates=True)
IDENTITY = Identity("0f8e7d6c-1111-2222-3333-444444444444")
TOKEN = {"sources": [{"configMap": {"name": "a"}}, {"serviceAccountToken": {"path": "token"}}]}


def spec(settings: Settings = SETTINGS, **template: Any) -> dict[str, Any]:
    job = make_job(nodes={"podTemplate": {"spec": template}})
    made = manifests.pod(make_plan(job, settings, cluster_place(settings), IDENTITY), 0, Owner("tiny", IDENTITY.uid, "default"), settings)
    found: dict[str, Any] = made["spec"]
    return found


def trainer(**fields: Any) -> dict[str, Any]:
    return {"containers": [{"name": "side", "image": "busybox"}, {"name": "trainer", **fields}]}


def security(**context: Any) -> dict[str, Any]:
    return trainer(securityContext=context)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hostNetwork": True}, "hostNetwork"),
    ({"hostPID": True}, "hostPID"),
    ({"hostIPC": True}, "hostIPC"),
    ({"securityContext": {"runAsUser": 0}}, "securityContext.runAsUser"),
    ({"securityContext": {"runAsNonRoot": False}}, "securityContext.runAsNonRoot"),
    ({"securityContext": {"$patch": "replace", "runAsUser": 0}}, "securityContext.runAsUser"),
    ({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "securityContext.seccompProfile.type"),
    ({"volumes": [{"name": "a", "emptyDir": {}}, {"name": "work", "hostPath": {"path": "/"}}]}, "volumes[1].hostPath"),
    ({"volumes": [{"name": "token", "projected": TOKEN}]}, "volumes[0].projected.sources[1].serviceAccountToken"),
    (security(privileged=True), "containers[1].securityContext.privileged"),
    (security(allowPrivilegeEscalation=True), "containers[1].securityContext.allowPrivilegeEscalation"),
    (security(runAsUser=0), "containers[1].securityContext.runAsUser"),
    (security(runAsNonRoot=False), "containers[1].securityContext.runAsNonRoot"),
    (security(capabilities={"add": ["SYS_ADMIN"]}), "containers[1].securityContext.capabilities.add"),
    (security(procMount="Unmasked"), "containers[1].securityContext.procMount"),
    (trainer(ports=[{"containerPort": 9}, {"containerPort": 8080, "hostPort": 8080}]), "containers[1].ports[1].hostPort"),
    ({"containers": [{"name": "side", "image": "a", "securityContext": {"privileged": True}}]}, "containers[0].securityContext.privileged"),
    ({"initContainers": [{"name": "a"}, {"name": "b", "securityContext": {"runAsUser": 0}}]}, "initContainers[1].securityContext.runAsUser"),
]


@pytest.mark.parametrize(("template", "field"), REFUSED, ids=[row[1] for row in REFUSED])
def test_what_is_more_than_a_trainer_needs_is_refused_by_its_field(template: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidJob) as error:
        spec(**template)
    message = "a pod template may not ask for this; an administrator allows it for all jobs by the operator's setting allowPrivilegedTemplates"
    assert str(error.value) == f"spec.nodes.podTemplate.spec.{field}: {message}"


@pytest.mark.parametrize("template", [row[0] for row in REFUSED], ids=[row[1] for row in REFUSED])
def test_an_administrator_can_allow_it(template: dict[str, Any]) -> None:
    assert spec(OPEN, **template)


def test_all_that_is_refused_is_named() -> None:
    with pytest.raises(InvalidJob) as error:
        spec(hostPID=True, hostNetwork=True)
    assert [problem.field.rpartition(".")[2] for problem in error.value.problems] == ["hostNetwork", "hostPID"]


def test_the_service_account_token_stays_away() -> None:
    assert spec(automountServiceAccountToken=True)["automountServiceAccountToken"] is False
    assert spec(automountServiceAccountToken=None)["automountServiceAccountToken"] is False
    assert spec(OPEN, automountServiceAccountToken=True)["automountServiceAccountToken"] is True


@pytest.mark.parametrize("taken", [None, {"$patch": "delete"}, {"$patch": "replace", "fsGroup": 7}, {"runAsNonRoot": None, "allowPrivilegeEscalation": None}])
def test_confinement_that_a_template_takes_away_is_put_back(taken: dict[str, Any] | None) -> None:
    made = spec(securityContext=taken, **trainer(securityContext=taken))
    assert made["securityContext"]["runAsNonRoot"] is True
    assert [container["securityContext"]["allowPrivilegeEscalation"] for container in made["containers"]] == [False, False]


@pytest.mark.parametrize("odd", [7, "x"])
def test_init_containers_that_are_none_are_left_to_the_api_server(odd: Any) -> None:
    assert spec(initContainers=odd)["initContainers"] == odd


def test_a_pod_that_is_replaced_whole_stays_confined() -> None:
    made = spec(**{"$patch": "replace", "containers": [{"name": "trainer", "$patch": "replace", "image": "mine"}]})
    assert (made["securityContext"], made["automountServiceAccountToken"]) == ({"runAsNonRoot": True}, False)
    assert made["containers"][0]["securityContext"] == {"allowPrivilegeEscalation": False}
    with pytest.raises(InvalidJob, match=r"spec\.nodes\.podTemplate\.spec\.containers\[0\]\.securityContext\.privileged: "):
        spec(**{"$patch": "replace", "containers": [{"name": "trainer", "$patch": "replace", "securityContext": {"privileged": True}}]})


@pytest.mark.parametrize("odd", [7, "x", []])
def test_what_is_no_security_context_is_left_to_the_api_server(odd: Any) -> None:
    made = spec(containers=[{"name": "side", "securityContext": odd, "ports": odd}], volumes=[{"name": "a", "projected": odd}])
    assert made["containers"][1]["securityContext"] == odd


def test_what_a_trainer_may_need_is_laid_over_it() -> None:
    context = {"runAsUser": 1000, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "Localhost", "localhostProfile": "a"}}
    made = spec(**security(**context), volumes=[{"name": "data", "nfs": {"server": "files", "path": "/"}}], hostNetwork=False, serviceAccountName="team")
    own = next(container for container in made["containers"] if container["name"] == "trainer")
    assert own["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, **context}
    assert made["volumes"][-1]["nfs"] == {"server": "files", "path": "/"}
