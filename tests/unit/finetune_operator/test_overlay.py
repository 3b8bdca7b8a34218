"""A user's pod template over a pod of ours: strategic-merge rules, and what the gang keeps."""

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
IDENTITY = Identity("0f8e7d6c-1111-2222-3333-444444444444", attempt=2)
OWNER = Owner("tiny", IDENTITY.uid, "default")


def pod(template: dict[str, Any] | None = None, **nodes: Any) -> dict[str, Any]:
    given = {} if template is None else {"podTemplate": template}
    job = make_job(nodes={"count": 2, "processesPerNode": 1, **nodes, **given})
    return manifests.pod(make_plan(job, SETTINGS, cluster_place(SETTINGS), IDENTITY), 1, OWNER, SETTINGS)


def spec(**fields: Any) -> dict[str, Any]:
    return pod({"spec": fields})["spec"]


def trainer(**fields: Any) -> dict[str, Any]:
    return spec(containers=[{"name": "trainer", **fields}])["containers"][0]


def refused(template: dict[str, Any]) -> str:
    with pytest.raises(InvalidJob) as error:
        pod(template)
    return str(error.value)


def by_name(items: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in items}


@pytest.mark.parametrize("template", [{}, {"spec": {}, "metadata": {}}, {"metadata": {"creationTimestamp": None}}])
def test_empty_template_changes_nothing(template: dict[str, Any]) -> None:
    plain = pod()
    laid = pod(template)
    assert by_name(laid["spec"]["containers"][0].pop("env")) == by_name(plain["spec"]["containers"][0].pop("env"))
    assert laid == plain


def test_maps_are_merged() -> None:
    merged = spec(priorityClassName="high", securityContext={"supplementalGroups": [7]}, nodeSelector={"zone": "a"})
    assert merged["priorityClassName"] == "high"
    assert merged["securityContext"] == {**pod()["spec"]["securityContext"], "supplementalGroups": [7]}
    assert pod({"spec": {"nodeSelector": {"zone": "a"}}}, nodeSelector={"gpu": "h100"})["spec"]["nodeSelector"] == {"gpu": "h100", "zone": "a"}


def test_null_and_delete_take_away() -> None:
    assert "affinity" not in spec(affinity=None)
    assert "affinity" not in spec(affinity={"$patch": "delete"})
    assert "fsGroup" not in spec(securityContext={"fsGroup": None})["securityContext"]


def test_replace_puts_one_map_in_place_of_another() -> None:
    assert spec(affinity={"$patch": "replace", "nodeAffinity": {}})["affinity"] == {"nodeAffinity": {}}


def test_containers_are_merged_by_name_and_new_ones_come_last() -> None:
    containers = spec(containers=[{"name": "side", "image": "busybox"}, {"name": "trainer", "image": "mine:2", "workingDir": "/work"}])["containers"]
    assert [container["name"] for container in containers] == ["trainer", "side"]
    assert (containers[0]["image"], containers[0]["workingDir"], containers[0]["securityContext"]["readOnlyRootFilesystem"]) == ("mine:2", "/work", True)


def test_init_containers_and_pull_secrets_are_added() -> None:
    merged = spec(initContainers=[{"name": "fetch", "image": "busybox"}], imagePullSecrets=[{"name": "registry"}])
    fetch = {"name": "fetch", "image": "busybox", "securityContext": {"allowPrivilegeEscalation": False}}
    assert (merged["initContainers"], merged["imagePullSecrets"]) == ([fetch], [{"name": "registry"}])


def test_a_variable_of_the_same_name_is_replaced_whole() -> None:
    source = {"secretKeyRef": {"name": "a", "key": "b"}}
    assert by_name(trainer(env=[{"name": "HF_HOME", "valueFrom": source}])["env"])["HF_HOME"] == {"name": "HF_HOME", "valueFrom": source}


def test_a_variable_is_taken_away() -> None:
    assert "PYTHONUNBUFFERED" not in by_name(trainer(env=[{"name": "PYTHONUNBUFFERED", "$patch": "delete"}])["env"])


def test_a_volume_of_the_same_name_is_replaced_whole() -> None:
    models = {"name": "cache", "nfs": {"server": "files", "path": "/models"}}
    volumes = by_name(spec(volumes=[models])["volumes"])
    assert volumes["cache"] == models
    assert set(volumes) == {"run", "work", "cache", "shared-memory", "tmp"}


def test_mounts_are_merged_by_path_and_ports_by_number() -> None:
    container = trainer(
        volumeMounts=[{"mountPath": "/work", "subPath": "team-a"}, {"mountPath": "/data", "name": "data"}], ports=[{"containerPort": 8080, "name": "metrics"}]
    )
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/work"] == {"name": "work", "mountPath": "/work", "subPath": "team-a"}
    assert mounts["/data"]["name"] == "data"
    assert container["ports"] == [{"name": "metrics", "containerPort": 8080, "protocol": "TCP"}]


def test_other_lists_are_replaced() -> None:
    given = [{"key": "spot", "operator": "Exists"}]
    assert pod({"spec": {"tolerations": given}}, tolerations=[{"key": "gpu"}])["spec"]["tolerations"] == given


def test_the_gang_keeps_what_it_needs() -> None:
    template = {
        "metadata": {"labels": {"finetune.mcore.dev/attempt": "9", "team": "a"}, "annotations": {"finetune.mcore.dev/run-config": "{}", "note": "x"}},
        "spec": {
            "hostname": "mine",
            "subdomain": None,
            "restartPolicy": "Always",
            "containers": [
                {
                    "name": "trainer",
                    "command": ["sleep"],
                    "args": ["inf"],
                    "terminationMessagePath": "/tmp/x",
                    "restartPolicy": "Always",
                    "restartPolicyRules": [{"action": "Restart", "exitCodes": {"operator": "In", "values": [20]}}],
                    "env": [{"name": "RANK", "value": "7"}, {"name": "PET_RDZV_BACKEND", "value": "c10d"}, {"name": "NODE_RANK", "$patch": "delete"}],
                    "volumeMounts": [{"mountPath": "/run/finetune", "name": "other"}],
                }
            ],
            "volumes": [{"name": "run", "emptyDir": {}}],
        },
    }
    plain, laid = pod(), pod(template)
    assert laid["metadata"]["labels"] == {**plain["metadata"]["labels"], "team": "a"}
    assert laid["metadata"]["annotations"] == {**plain["metadata"]["annotations"], "note": "x"}
    assert {key: laid["spec"][key] for key in ("hostname", "subdomain", "restartPolicy")} == {
        "hostname": "tiny-1",
        "subdomain": "tiny",
        "restartPolicy": "Never",
    }
    ours, theirs = plain["spec"]["containers"][0], laid["spec"]["containers"][0]
    assert theirs.keys() == ours.keys()
    assert (theirs["command"], theirs["terminationMessagePath"], theirs["volumeMounts"]) == (
        ours["command"],
        ours["terminationMessagePath"],
        ours["volumeMounts"],
    )
    assert by_name(theirs["env"]) == by_name(ours["env"])
    assert by_name(laid["spec"]["volumes"]) == by_name(plain["spec"]["volumes"])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"spec": {"containers": [{"name": "trainer", "$patch": "delete"}]}}, "spec.nodes.podTemplate.spec.containers: the container trainer must stay"),
        ({"spec": {"containers": [{"$patch": "replace"}, {"name": "other"}]}}, "spec.nodes.podTemplate.spec.containers: the container trainer must stay"),
        ({"spec": {"containers": None}}, "spec.nodes.podTemplate.spec.containers: the container trainer must stay"),
        ({"spec": {"containers": [{"image": "x"}]}}, "spec.nodes.podTemplate.spec.containers[0].name: it is required"),
        ({"spec": {"containers": {"name": "trainer"}}}, "spec.nodes.podTemplate.spec.containers: it must be a list (found a mapping)"),
        ({"spec": {"containers": ["trainer"]}}, "spec.nodes.podTemplate.spec.containers[0]: it must be a mapping (found 'trainer')"),
        ({"spec": {"volumes": [{"name": "a"}, {"name": "a"}]}}, "spec.nodes.podTemplate.spec.volumes[1].name: a is given twice"),
        ({"spec": {"containers": [{"name": "trainer", "env": [{"value": "1"}]}]}}, "spec.nodes.podTemplate.spec.containers[0].env[0].name: it is required"),
        ({"spec": {"securityContext": 7}}, "spec.nodes.podTemplate.spec.securityContext: it must be a mapping (found 7)"),
        ({"spec": {"hostname": {"a": 1}}}, "spec.nodes.podTemplate.spec.hostname: it must not be a mapping (found a mapping)"),
        ({"spec": {"affinity": {"$patch": "remove"}}}, "spec.nodes.podTemplate.spec.affinity.$patch: it must be delete, replace or merge (found 'remove')"),
        ({"spec": {"$patch": "replace", "containers": ["x"]}}, "spec.nodes.podTemplate.spec.containers[0]: it must be a mapping (found 'x')"),
        (
            {"spec": {"$patch": "replace", "containers": [{"name": "trainer"}], "volumes": "x"}},
            "spec.nodes.podTemplate.spec.volumes: it must be a list (found 'x')",
        ),
        (
            {"spec": {"containers": [{"name": "trainer", "$patch": "replace", "env": "x"}]}},
            "spec.nodes.podTemplate.spec.containers[0].env: it must be a list (found 'x')",
        ),
        (
            {"spec": {"containers": [{"name": "trainer", "$patch": "replace", "volumeMounts": [{"name": "a"}]}]}},
            "spec.nodes.podTemplate.spec.containers[0].volumeMounts[0].mountPath: it is required",
        ),
        (
            {"spec": {"$patch": "replace", "containers": [{"name": "trainer", "env": "x"}]}},
            "spec.nodes.podTemplate.spec.containers[trainer].env: it must be a list (found 'x')",
        ),
        (
            {"spec": {"$patch": "replace", "containers": [{"name": "trainer", "volumeMounts": 7}]}},
            "spec.nodes.podTemplate.spec.containers[trainer].volumeMounts: it must be a list (found 7)",
        ),
        ({"spec": {"$retainKeys": ["a"]}}, "spec.nodes.podTemplate.spec.$retainKeys: this directive is not supported; $patch is"),
        ({"metadata": {"name": "mine"}}, "spec.nodes.podTemplate.metadata.name: a template gives labels and annotations only"),
        ({"metadata": {"labels": {"a": 1}}}, "spec.nodes.podTemplate.metadata.labels.a: it must be a string; put it in quotes (found 1)"),
        ({"metadata": {"annotations": {"a": "x" * 262144}}}, "spec.nodes.podTemplate.metadata.annotations: the run's configuration travels in"),
    ],
)
def test_wrong_template_is_refused_with_its_field(template: dict[str, Any], message: str) -> None:
    assert refused(template).startswith(message)
