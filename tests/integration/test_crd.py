"""The CustomResourceDefinition on a real API server: what it takes, what it refuses and in which words, what it fills in and explains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bad_specs import BAD_NAMES, BAD_SPECS, BadSpec
from finetune_operator import job_file, names
from jobs import job_value
from kube_api import ApiError, ApiServer
from kube_processes import until

ROOT = Path(__file__).parents[2]
DEFINITION = ROOT / "crds" / "finetune.mcore.dev_finetunejobs.yaml"
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
NAMESPACE = "definitions"
JOBS = f"/apis/{names.API_VERSION}/namespaces/{NAMESPACE}/{names.PLURAL}"
TWO_NODES = {"nodes": {"count": 2, "nodeSelector": {"gpu": "h100"}}, "volumes": {"work": {"claimName": "results"}}}


@pytest.fixture(scope="module", name="crd")
def served(api: ApiServer) -> ApiServer:
    """The API server with the definition applied."""
    api.kubectl("apply", "--server-side", "--force-conflicts", "-f", DEFINITION)
    api.kubectl("wait", "--for=condition=Established", "--timeout=60s", f"crd/{names.PLURAL}.{names.GROUP}")
    api.create_namespace(NAMESPACE)
    until(lambda: api.find(JOBS), 30, "FineTuneJobs are served")
    return api


def create(api: ApiServer, name: str = "tiny", dry_run: bool = True, **sections: Any) -> Any:
    """Make a job as kubectl does: fields that the schema does not know are refused."""
    value = job_value(**sections)
    value["metadata"]["name"] = name
    return api.post(JOBS, value, fieldValidation="Strict", **({"dryRun": "All"} if dry_run else {}))


def refusal(api: ApiServer, **sections: Any) -> str:
    with pytest.raises(ApiError) as error:
        create(api, **sections)
    assert error.value.status in (400, 422)
    return error.value.message


def test_definition_is_small_enough_for_client_side_apply() -> None:
    assert len(DEFINITION.read_bytes()) < 256 * 1024


def test_definition_has_no_warnings(crd: ApiServer) -> None:
    found = crd.kubectl("apply", "--server-side", "--dry-run=server", "-f", DEFINITION)
    assert found.stderr == ""
    conditions = crd.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{names.PLURAL}.{names.GROUP}")["status"]["conditions"]
    assert {condition["type"]: condition["status"] for condition in conditions} == {"NamesAccepted": "True", "Established": "True"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_accepted(crd: ApiServer, example: Path) -> None:
    value = {**job_file.load(example).document.value}
    value["metadata"] = {**value["metadata"], "namespace": NAMESPACE}
    assert "created (server dry run)" in crd.kubectl("create", "--dry-run=server", "-f", "-", input=yaml.safe_dump(value)).stdout


@pytest.mark.parametrize("bad", BAD_SPECS.values(), ids=BAD_SPECS)
def test_bad_spec_is_refused_with_its_field(crd: ApiServer, bad: BadSpec) -> None:
    message = refusal(crd, **bad.sections)
    assert bad.field in message
    assert bad.says in message


@pytest.mark.parametrize("name", BAD_NAMES)
def test_name_that_cannot_be_a_service_is_refused(crd: ApiServer, name: str) -> None:
    message = refusal(crd, name=name)
    assert names.NAME_RULE in message
    assert "metadata.name" in message


def test_longest_name_is_accepted(crd: ApiServer) -> None:
    assert create(crd, name="a" * names.MAX_NAME_LENGTH)["metadata"]["name"] == "a" * names.MAX_NAME_LENGTH


ACCEPTED: dict[str, dict[str, Any]] = {
    "sizes that divide": {"nodes": {"count": 2, "processesPerNode": 4}, "parallelism": {"tensorModelParallelSize": 2, "pipelineModelParallelSize": 2}},
    "batch whose sizes are open": {"training": {"microBatchSize": 3}, "parallelism": {"tensorModelParallelSize": 1}},
    "null is absent": {"training": {"lr": None}, "nodes": None},
    "template for many nodes": {
        "nodes": {"count": 2},
        "volumes": {"work": {"volumeClaimTemplate": {"spec": {"accessModes": ["ReadWriteMany"], "storageClassName": "nfs"}}}},
    },
    "quantities": {"nodes": {"sharedMemory": 1073741824, "resources": {"requests": {"cpu": "500m", "memory": "1.5Gi"}}}},
    "variable from a secret": {"nodes": {"env": [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]}},
    "other accelerators": {"nodes": {"accelerator": {"resourceName": "amd.com/gpu"}, "resources": {"limits": {"nvidia.com/gpu": "1"}}}},
}


@pytest.mark.parametrize("sections", ACCEPTED.values(), ids=ACCEPTED)
def test_good_spec_is_accepted(crd: ApiServer, sections: dict[str, Any]) -> None:
    create(crd, **sections)


def test_kubernetes_own_objects_are_kept_whole(crd: ApiServer) -> None:
    template = {
        "metadata": {"labels": {"a": "b"}},
        "spec": {"priorityClassName": "high", "containers": [{"name": "trainer", "envFrom": [{"secretRef": {"name": "a"}}]}]},
    }
    claim = {"spec": {"accessModes": ["ReadWriteMany"], "storageClassName": "nfs", "resources": {"requests": {"storage": "1Gi"}}}}
    made = create(crd, nodes={"podTemplate": template}, volumes={"work": {"volumeClaimTemplate": claim}})
    assert made["spec"]["nodes"]["podTemplate"] == template
    assert made["spec"]["volumes"]["work"]["volumeClaimTemplate"] == claim


def test_defaults_are_filled_in_and_choices_of_the_engine_are_not(crd: ApiServer) -> None:
    spec = create(crd)["spec"]
    assert (spec["suspend"], spec["tuning"], spec["checkpoints"]["resume"]) == (False, {"tunerType": "lora"}, "auto")
    assert spec["nodes"] == {
        "count": 1,
        "processesPerNode": 1,
        "accelerator": {"type": "GPU"},
        "resources": {"requests": {}, "limits": {}},
        "env": [],
        "nodeSelector": {},
        "tolerations": [],
    }
    assert spec["volumes"] == {"persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Retain"}}
    assert spec["runPolicy"] == {"backoffLimit": 3, "nodeLostSeconds": 300, "progressDeadlineSeconds": 1800, "cleanPodPolicy": "None"}
    assert spec["output"] == {"verification": "Adapter", "maxShardSize": 5_000_000_000}
    assert not {"microBatchSize", "recomputeGranularity", "lr", "minLr", "attentionBackend", "numTrainEpochs"} & spec["training"].keys()
    assert not {"tensorModelParallelSize", "pipelineModelParallelSize"} & spec["parallelism"].keys()
    assert "torchDtype" not in spec["model"]


def test_a_status_has_no_defaults(crd: ApiServer) -> None:
    create(crd, name="told", dry_run=False)
    written = {"phase": "Running", "attempt": 1, "progress": {"stage": "training", "steps": "3/9", "loss": 1.25, "remaining": "31s"}}
    crd.patch(f"{JOBS}/told/status", {"status": written})
    assert crd.get(f"{JOBS}/told")["status"] == written
    head, row = crd.kubectl("-n", NAMESPACE, "get", "ftj", "told").stdout.splitlines()
    assert head.split() == ["NAME", "PHASE", "STEPS", "LOSS", "REMAINING", "ATTEMPT", "AGE"]
    assert row.split()[:6] == ["told", "Running", "3/9", "1.25", "31s", "1"]
    condition = {"type": "Ready", "status": "True", "reason": "Training", "message": "all pods run", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    crd.patch(f"{JOBS}/told/status", {"status": {"conditions": [condition]}})
    wide = crd.kubectl("-n", NAMESPACE, "get", "finetune", "-o", "wide").stdout.splitlines()
    assert wide[0].split()[-3:] == ["MODEL", "NODES", "MESSAGE"]
    assert "org/model" in wide[1]
    assert "all pods run" in wide[1]


@pytest.mark.parametrize(
    ("status", "field"),
    [({"phase": "Training"}, "status.phase"), ({"conditions": [{"type": "Ready"}]}, "status.conditions[0]"), ({"attempt": "1"}, "status.attempt")],
    ids=["phase", "condition", "attempt"],
)
def test_wrong_status_is_refused(crd: ApiServer, status: dict[str, Any], field: str) -> None:
    create(crd, name=(name := f"wrong-{field.split('.')[1].split('[')[0]}"), dry_run=False)
    with pytest.raises(ApiError, match="Invalid|Unsupported|Required") as error:
        crd.patch(f"{JOBS}/{name}/status", {"status": status})
    assert field in error.value.message


@pytest.fixture(scope="module", name="job")
def made_job(crd: ApiServer) -> str:
    return f"{JOBS}/{create(crd, name='still', dry_run=False, **TWO_NODES)['metadata']['name']}"


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model": {"source": "org/other"}}, "spec.model"),
    "an option added": ({"training": {"lr": 1e-4}}, "spec.training"),
    "a section added": ({"volumes": {"cache": {"claimName": "cache"}}}, "spec.volumes"),
    "a section taken away": ({"volumes": {"work": None}}, "spec.volumes"),
    "more nodes": ({"nodes": {"count": 4}}, "spec.nodes.count"),
    "an image": ({"nodes": {"image": "a:1"}}, "spec.nodes.image"),
    "a pod template": ({"nodes": {"podTemplate": {"spec": {"priorityClassName": "high"}}}}, "spec.nodes.podTemplate"),
    "a variable": ({"nodes": {"env": [{"name": "A"}]}}, "spec.nodes.env"),
    "a node selector taken away": ({"nodes": {"nodeSelector": None}}, "spec.nodes.nodeSelector"),
    "a toleration": ({"nodes": {"tolerations": [{"operator": "Exists"}]}}, "spec.nodes.tolerations"),
    "a model while it is suspended": ({"suspend": True, "model": {"source": "org/other"}}, "spec.model"),
}


@pytest.mark.parametrize(("change", "field"), CHANGES.values(), ids=CHANGES)
def test_what_may_not_change_is_refused(crd: ApiServer, job: str, change: dict[str, Any], field: str) -> None:
    with pytest.raises(ApiError) as error:
        crd.patch(job, {"spec": change}, dryRun="All")
    assert error.value.status == 422
    assert f"{field}: " in error.value.message
    assert "can be changed only while the job is suspended" in error.value.message or "cannot be changed" in error.value.message


def test_a_change_inside_the_pod_template_is_seen(crd: ApiServer) -> None:
    create(crd, name="templated", dry_run=False, nodes={"podTemplate": {"spec": {"priorityClassName": "high", "containers": [{"name": "trainer"}]}}})
    with pytest.raises(ApiError, match=r"spec\.nodes\.podTemplate: .*nodes\.podTemplate cannot be changed"):
        crd.patch(f"{JOBS}/templated", {"spec": {"nodes": {"podTemplate": {"spec": {"containers": [{"name": "trainer", "image": "other"}]}}}}})
    with pytest.raises(ApiError, match=r"spec\.nodes\.podTemplate: .*nodes\.podTemplate cannot be changed"):
        crd.patch(f"{JOBS}/templated", {"spec": {"nodes": {"podTemplate": None}}})


ALLOWED: dict[str, dict[str, Any]] = {
    "suspend": {"suspend": True},
    "run policy": {"runPolicy": {"backoffLimit": 9, "activeDeadlineSeconds": 60}},
    "node selector and suspend": {"suspend": True, "nodes": {"nodeSelector": {"gpu": "a100"}, "tolerations": [{"operator": "Exists"}]}},
    "nothing": {"nodes": {"count": 2}},
}


@pytest.mark.parametrize("change", ALLOWED.values(), ids=ALLOWED)
def test_what_may_change_is_accepted(crd: ApiServer, job: str, change: dict[str, Any]) -> None:
    crd.patch(job, {"spec": change}, dryRun="All")


def test_placement_may_change_when_a_job_is_resumed(crd: ApiServer) -> None:
    create(crd, name="resumed", dry_run=False, suspend=True)
    crd.patch(f"{JOBS}/resumed", {"spec": {"suspend": False, "nodes": {"nodeSelector": {"gpu": "a100"}}}})
    assert crd.get(f"{JOBS}/resumed")["spec"]["nodes"]["nodeSelector"] == {"gpu": "a100"}


def test_rules_hold_for_changes_too(crd: ApiServer, job: str) -> None:
    with pytest.raises(ApiError, match="progressDeadlineSeconds must be more than"):
        crd.patch(job, {"spec": {"runPolicy": {"progressDeadlineSeconds": 60}}}, dryRun="All")


def test_the_same_file_may_be_applied_again(crd: ApiServer) -> None:
    text = yaml.safe_dump({**job_value(), "metadata": {"name": "again", "namespace": NAMESPACE}})
    for _ in range(2):
        crd.kubectl("apply", "-f", "-", input=text)
    assert crd.get(f"{JOBS}/again")["metadata"]["generation"] == 1


EXPLAINED = {
    "ftj": "fine-tunes a Hugging Face model on Megatron-core",
    "ftj.spec": "parallelism",
    "ftj.spec.training.lr": "Absent: 1e-4 with lora",
    "ftj.spec.parallelism.ddpTimeout": "In seconds",
    "ftj.spec.nodes.podTemplate.spec": "the trainer's container is `trainer`",
    "ftj.spec.runPolicy.progressDeadlineSeconds": "more than parallelism.ddpTimeout",
    "ftj.status.restarts.counted": "backoffLimit",
}


@pytest.mark.parametrize(("path", "text"), EXPLAINED.items(), ids=EXPLAINED)
def test_kubectl_explain_teaches(crd: ApiServer, path: str, text: str) -> None:
    assert text in " ".join(crd.kubectl("explain", path).stdout.split())
