"""Plan -> Kubernetes objects."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_operator import manifests
from finetune_operator.manifests import Owner
from finetune_operator.plan import Identity, Plan, cluster_place, make_plan
from finetune_operator.problems import InvalidJob
from finetune_operator.settings import Settings
from finetune_trainer.contract import RunConfig
from jobs import make_job

SETTINGS = Settings(work_claim="results", trainer_image="trainer:1")
IDENTITY = Identity("0f8e7d6c-1111-2222-3333-444444444444", attempt=2)
OWNER = Owner("tiny", IDENTITY.uid, "default")
REFERENCE = {
    "apiVersion": "finetune.mcore.dev/v1alpha1",
    "kind": "FineTuneJob",
    "name": "tiny",
    "uid": IDENTITY.uid,
    "controller": True,
    "blockOwnerDeletion": False,
}
LABELS = {"app.kubernetes.io/name": "finetune-trainer", "app.kubernetes.io/managed-by": "finetune-operator", "finetune.mcore.dev/job-name": "tiny"}
CLAIM = {"accessModes": ["ReadWriteMany"], "storageClassName": "nfs", "resources": {"requests": {"storage": "1Gi"}}}


def plan_of(settings: Settings = SETTINGS, **sections: Any) -> Plan:
    return make_plan(make_job(**sections), settings, cluster_place(settings), IDENTITY)


def pod(node: int = 0, settings: Settings = SETTINGS, **sections: Any) -> dict[str, Any]:
    return manifests.pod(plan_of(settings, **sections), node, OWNER, settings)


def container(**sections: Any) -> dict[str, Any]:
    return pod(**sections)["spec"]["containers"][0]


def volumes(**sections: Any) -> dict[str, dict[str, Any]]:
    return {volume.pop("name"): volume for volume in pod(**sections)["spec"]["volumes"]}


def refusal(**sections: Any) -> str:
    with pytest.raises(InvalidJob) as error:
        pod(**sections)
    return str(error.value)


def test_service_resolves_the_pods_of_every_gang_before_they_are_ready() -> None:
    assert manifests.service(plan_of(), OWNER) == {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "tiny", "namespace": "default", "labels": LABELS, "ownerReferences": [REFERENCE]},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"finetune.mcore.dev/job-name": "tiny", "finetune.mcore.dev/job-uid": "0f8e7d6c"},
            "ports": [
                {"name": "progress", "port": 8080, "targetPort": 8080, "protocol": "TCP"},
                {"name": "master", "port": 29500, "targetPort": 29500, "protocol": "TCP"},
            ],
        },
    }


def test_pods_have_their_own_names_and_the_same_host_names_in_every_gang() -> None:
    made = manifests.pods(plan_of(nodes={"count": 2}), OWNER, SETTINGS)
    assert [each["metadata"]["name"] for each in made] == ["tiny-2-0", "tiny-2-1"]
    assert [(each["spec"]["hostname"], each["spec"]["subdomain"]) for each in made] == [("tiny-0", "tiny"), ("tiny-1", "tiny")]
    assert made[1]["metadata"]["labels"] == {
        **LABELS,
        "finetune.mcore.dev/job-uid": "0f8e7d6c",
        "finetune.mcore.dev/attempt": "2",
        "finetune.mcore.dev/node-rank": "1",
    }
    assert made[1]["metadata"]["ownerReferences"] == [REFERENCE]


def test_the_jobs_own_labels_are_not_copied() -> None:
    job = make_job()
    labelled = job.model_copy(update={"metadata": job.metadata.model_copy(update={"labels": {"kueue.x-k8s.io/queue-name": "q"}})})
    plan = make_plan(labelled, SETTINGS, cluster_place(SETTINGS), IDENTITY)
    assert all("kueue" not in json.dumps(each) for each in manifests.objects(plan, OWNER, SETTINGS))


def test_run_config_travels_in_the_pod() -> None:
    made = pod(data={"dataset": ["org/rows"], "system": "你好 {x}"})
    text = made["metadata"]["annotations"]["finetune.mcore.dev/run-config"]
    assert RunConfig.model_validate_json(text) == plan_of(data={"dataset": ["org/rows"], "system": "你好 {x}"}).config
    assert "你好" in text
    assert "\n" not in text
    item = {"path": "run.json", "fieldRef": {"fieldPath": "metadata.annotations['finetune.mcore.dev/run-config']"}}
    assert {"name": "run", "downwardAPI": {"items": [item]}} in made["spec"]["volumes"]
    assert {"name": "run", "mountPath": "/run/finetune", "readOnly": True} in made["spec"]["containers"][0]["volumeMounts"]
    assert made["spec"]["containers"][0]["command"] == ["megatron", "launch", "/run/finetune/run.json"]


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"dataset": ["a"], "system": "好" * 65536, "maxLength": 1} | {"dataset": ["x" * 4096] * 20}, "spec.data.system"),
        ({"dataset": ["x" * 4096] * 65}, "spec.data.dataset"),
    ],
    ids=["system", "dataset"],
)
def test_run_config_that_annotations_cannot_hold_is_refused_with_its_longest_field(data: dict[str, Any], field: str) -> None:
    assert refusal(data=data).startswith(f"{field}: the run's configuration travels in the pods' annotations, which hold 262,144 bytes (found ")


def test_environment_is_the_plans_with_folders_that_can_be_written_to() -> None:
    made = {
        variable["name"]: variable.get("value")
        for variable in container(nodes={"count": 2, "env": [{"name": "HOME", "value": "/work/me"}, {"name": "EMPTY"}]})["env"]
    }
    planned = {variable.name: variable.value or "" for variable in plan_of(nodes={"count": 2, "env": [{"name": "EMPTY"}]}).nodes[0].environment}
    assert made == {
        **planned,
        "USER": "trainer",
        "HOME": "/work/me",
        "XDG_CACHE_HOME": "/tmp/.cache",
        "MPLCONFIGDIR": "/tmp/matplotlib",
    }


def test_a_variable_from_elsewhere_stays_so() -> None:
    source = {"secretKeyRef": {"name": "a", "key": "b"}}
    assert {"name": "KEY", "valueFrom": source} in container(nodes={"env": [{"name": "KEY", "valueFrom": source}]})["env"]


def test_pod_is_one_that_the_restricted_standard_admits() -> None:
    spec = pod()["spec"]
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert spec["containers"][0]["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"], spec["restartPolicy"]) == (False, False, "Never")


def test_a_pod_may_end_later_than_its_ranks() -> None:
    assert pod(settings=Settings(work_claim="w", trainer_image="t", grace_seconds=60))["spec"]["terminationGracePeriodSeconds"] == 75


def test_accelerators_are_added_to_the_users_resources() -> None:
    given = {"requests": {"cpu": 8, "memory": "64Gi"}}
    assert container(nodes={"processesPerNode": 4, "resources": given})["resources"] == {
        "requests": {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "4"},
        "limits": {"nvidia.com/gpu": "4"},
    }
    assert container(nodes={"accelerator": {"resourceName": "amd.com/gpu"}})["resources"]["limits"] == {"amd.com/gpu": "1"}
    assert "resources" not in container(nodes={"accelerator": {"type": "CPU"}})


def test_placement() -> None:
    spec = pod(nodes={"nodeSelector": {"gpu": "h100"}, "tolerations": [{"key": "gpu", "operator": "Exists", "tolerationSeconds": 60}]})["spec"]
    assert (spec["nodeSelector"], spec["tolerations"]) == ({"gpu": "h100"}, [{"key": "gpu", "operator": "Exists", "tolerationSeconds": 60}])
    assert not {"nodeSelector", "tolerations", "affinity"} & pod()["spec"].keys()


def test_pods_are_spread_by_preference() -> None:
    affinity = pod(nodes={"count": 2})["spec"]["affinity"]
    (term,) = affinity["podAntiAffinity"].pop("preferredDuringSchedulingIgnoredDuringExecution")
    assert affinity == {"podAntiAffinity": {}}
    assert term["podAffinityTerm"] == {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"finetune.mcore.dev/job-name": "tiny"}}}


def test_volumes() -> None:
    assert volumes()["work"] == {"persistentVolumeClaim": {"claimName": "results"}}
    assert volumes()["cache"] == {"emptyDir": {}}
    assert volumes()["shared-memory"] == {"emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}
    given = volumes(volumes={"cache": {"claimName": "hf"}, "work": {"claimName": "mine"}}, nodes={"sharedMemory": 1024})
    assert (given["cache"], given["work"]) == ({"persistentVolumeClaim": {"claimName": "hf"}}, {"persistentVolumeClaim": {"claimName": "mine"}})
    assert given["shared-memory"]["emptyDir"]["sizeLimit"] == "1024"
    assert {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]} == {
        "run": "/run/finetune",
        "work": "/work",
        "cache": "/cache",
        "shared-memory": "/dev/shm",
        "tmp": "/tmp",
    }


def test_only_node_0_listens_for_the_gang() -> None:
    assert [[port["name"] for port in pod(node, nodes={"count": 2})["spec"]["containers"][0]["ports"]] for node in (0, 1)] == [
        ["progress", "master"],
        ["progress"],
    ]


def test_image_of_the_job_wins_over_the_setting() -> None:
    assert container(nodes={"image": "mine:2"})["image"] == "mine:2"
    assert container()["image"] == "trainer:1"


def test_job_without_an_image_is_refused_with_its_field() -> None:
    assert refusal(settings=Settings(work_claim="results")) == "spec.nodes.image: it is required, because the operator's settings name no trainer image"


def test_an_existing_claim_is_not_made() -> None:
    assert manifests.work_claim(plan_of(), OWNER) is None
    assert manifests.work_claim(plan_of(volumes={"work": {"claimName": "mine"}}), OWNER) is None


def test_a_retained_claim_outlives_its_job() -> None:
    template = {"metadata": {"labels": {"team": "a", "finetune.mcore.dev/job-name": "other"}, "annotations": {"note": "x"}}, "spec": CLAIM}
    plan = plan_of(volumes={"work": {"volumeClaimTemplate": template}})
    assert manifests.work_claim(plan, OWNER) == {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "tiny-work", "namespace": "default", "labels": {"team": "a", **LABELS}, "annotations": {"note": "x"}},
        "spec": CLAIM,
    }
    assert {"name": "work", "persistentVolumeClaim": {"claimName": "tiny-work"}} in manifests.pod(plan, 0, OWNER, SETTINGS)["spec"]["volumes"]


def test_a_claim_that_is_deleted_with_its_job_has_an_owner() -> None:
    given = {"work": {"volumeClaimTemplate": {"spec": CLAIM}}, "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete"}}
    claim = manifests.work_claim(plan_of(volumes=given), OWNER)
    assert claim is not None
    assert claim["metadata"]["ownerReferences"] == [REFERENCE]


def test_claim_template_with_a_name_is_refused_with_its_field() -> None:
    with pytest.raises(InvalidJob) as error:
        manifests.work_claim(plan_of(volumes={"work": {"volumeClaimTemplate": {"metadata": {"name": "x"}, "spec": CLAIM}}}), OWNER)
    assert str(error.value) == "spec.volumes.work.volumeClaimTemplate.metadata.name: a template gives labels and annotations only"


def test_objects_come_in_the_order_in_which_they_are_made() -> None:
    plan = plan_of(nodes={"count": 2}, volumes={"work": {"volumeClaimTemplate": {"spec": CLAIM}}})
    assert [each["kind"] for each in manifests.objects(plan, OWNER, SETTINGS)] == ["Service", "PersistentVolumeClaim", "Pod", "Pod"]
