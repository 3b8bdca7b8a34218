"""What the operator makes of a job: the objects of its first gang, exactly, and no request more than they need."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator import names
from finetune_trainer.contract import RunConfig
from kube_processes import until
from operator_jobs import Team
from operator_process import IMAGE, START_SECONDS, Operator

Json = dict[str, Any]
READS_OF_A_START = 6
"""What is served, what there is, and the comparison that follows a list."""
TEMPLATE = {"volumeClaimTemplate": {"spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}}}
CHILD_LABELS = {"app.kubernetes.io/name": "finetune-trainer", "app.kubernetes.io/managed-by": "finetune-operator", "finetune.mcore.dev/job-name": "job"}


def owner(job: Json) -> list[Json]:
    reference = {"apiVersion": "finetune.mcore.dev/v1alpha1", "kind": "FineTuneJob", "name": "job", "uid": job["metadata"]["uid"]}
    return [{**reference, "controller": True, "blockOwnerDeletion": False}]


def trainer(pod: Json) -> Json:
    (container,) = (each for each in pod["spec"]["containers"] if each["name"] == "trainer")
    found: Json = container
    return found


def environment(pod: Json) -> dict[str, str]:
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in trainer(pod)["env"]}


def run_config(pod: Json) -> RunConfig:
    return RunConfig.model_validate_json(pod["metadata"]["annotations"]["finetune.mcore.dev/run-config"])


@pytest.mark.usefixtures("operator")
def test_service_has_no_address_and_names_pods_before_they_are_ready(team: Team) -> None:
    job = team.create()
    team.until_attempt(1)
    (service,) = team.all("services")
    assert (service["metadata"]["name"], service["metadata"]["labels"]) == ("job", CHILD_LABELS)
    assert service["metadata"]["ownerReferences"] == owner(job)
    spec = service["spec"]
    assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)
    assert spec["selector"] == {"finetune.mcore.dev/job-name": "job", "finetune.mcore.dev/job-uid": job["metadata"]["uid"][:8]}
    assert {port["name"]: port["port"] for port in spec["ports"]} == {"progress": team.trainers.port, "master": 29500}


@pytest.mark.usefixtures("operator")
def test_pods_of_a_gang_are_named_labelled_owned_and_addressed(team: Team) -> None:
    job = team.create()
    pods = team.until_attempt(1)
    assert [pod["metadata"]["name"] for pod in pods] == ["job-1-0", "job-1-1"]
    for rank, pod in enumerate(pods):
        own = {"finetune.mcore.dev/job-uid": job["metadata"]["uid"][:8], "finetune.mcore.dev/attempt": "1", "finetune.mcore.dev/node-rank": str(rank)}
        assert pod["metadata"]["labels"] == {**CHILD_LABELS, **own}
        assert pod["metadata"]["ownerReferences"] == owner(job)
        assert "finalizers" not in pod["metadata"]
        assert (pod["spec"]["hostname"], pod["spec"]["subdomain"], pod["spec"]["restartPolicy"]) == (f"job-{rank}", "job", "Never")


def has_compared(operator: Operator) -> bool:
    """Whether the reads of its start are over."""
    return operator.metric("rest_client_requests_total", method="GET") >= READS_OF_A_START


@pytest.mark.usefixtures("operator")
def test_environment_of_a_pod_is_pytorchs_and_torchruns(team: Team) -> None:
    team.create(nodes={"count": 2, "processesPerNode": 3})
    for rank, pod in enumerate(team.until_attempt(1)):
        gang = {"NNODES": "2", "NODE_RANK": str(rank), "NPROC_PER_NODE": "3", "MASTER_ADDR": "job-0.job", "MASTER_PORT": "29500"}
        torchrun = {f"PET_{name}": value for name, value in gang.items()}
        folders = {"HOME": "/tmp", "XDG_CACHE_HOME": "/tmp/.cache"}
        others = {"USER": "trainer", "MPLCONFIGDIR": "/tmp/matplotlib", "PYTHONUNBUFFERED": "1", "HF_HOME": "/cache/huggingface"}
        assert environment(pod) == {**gang, **torchrun, **folders, **others, "RANK": str(rank), "WORLD_SIZE": "6"}


@pytest.mark.usefixtures("operator")
def test_run_config_of_a_pod_says_which_run_of_which_job_it_is(team: Team) -> None:
    job = team.create(training={"lr": 1e-4}, data={"dataset": ["./rows.jsonl#5"]})
    uid = job["metadata"]["uid"]
    first, second = (run_config(pod) for pod in team.until_attempt(1))
    assert first == second
    assert (first.run.name, first.run.namespace, first.run.uid, first.run.attempt) == ("job", team.namespace, uid, 1)
    assert str(first.run.output_dir) == f"/work/{team.namespace}/job/{uid[:8]}"
    assert (first.run.progress_host, first.run.progress_port) == ("0.0.0.0", team.trainers.port)
    assert (first.training.lr, first.data.dataset, first.model.source) == (1e-4, ["/work/rows.jsonl#5"], "org/model")


@pytest.mark.usefixtures("operator")
def test_container_runs_the_launcher_on_the_run_file_and_leaves_its_last_words(team: Team) -> None:
    team.create()
    master, other = team.until_attempt(1)
    container = trainer(master)
    assert (container["image"], container["command"]) == (IMAGE, ["megatron", "launch", "/run/finetune/run.json"])
    assert "args" not in container
    assert (container["terminationMessagePath"], container["terminationMessagePolicy"]) == ("/dev/termination-log", "File")
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {"progress": team.trainers.port, "master": 29500}
    assert {port["name"] for port in trainer(other)["ports"]} == {"progress"}
    mounts = {mount["name"]: (mount["mountPath"], mount.get("readOnly", False)) for mount in container["volumeMounts"]}
    assert mounts == {
        "run": ("/run/finetune", True),
        "work": ("/work", False),
        "cache": ("/cache", False),
        "shared-memory": ("/dev/shm", False),
        "tmp": ("/tmp", False),
    }


@pytest.mark.usefixtures("operator")
def test_volumes_are_the_run_file_the_claims_and_memory_of_the_size_that_was_asked_for(team: Team) -> None:
    team.create(nodes={"sharedMemory": "3Gi"}, volumes={"cache": {"claimName": "hub"}})
    volumes = {volume["name"]: volume for volume in team.until_attempt(1)[0]["spec"]["volumes"]}
    assert volumes["work"]["persistentVolumeClaim"] == {"claimName": "results"}
    assert volumes["cache"]["persistentVolumeClaim"] == {"claimName": "hub"}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "3Gi"}
    (item,) = volumes["run"]["downwardAPI"]["items"]
    assert (item["path"], item["fieldRef"]["fieldPath"]) == ("run.json", f"metadata.annotations['{names.RUN_CONFIG_ANNOTATION}']")
    assert set(volumes) == {"run", "work", "cache", "shared-memory", "tmp"}


@pytest.mark.usefixtures("operator")
def test_pods_hold_no_token_and_are_restricted(team: Team) -> None:
    """The API server itself judges: the namespace enforces the Pod Security Standard `restricted`."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/enforce-version": "latest"}
    team.api.patch(f"/api/v1/namespaces/{team.namespace}", {"metadata": {"labels": labels}})
    team.create()
    for pod in team.until_attempt(1):
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert not any("projected" in volume for volume in pod["spec"]["volumes"])
        security = pod["spec"]["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"], security["fsGroup"]) == (True, 65532, 65532)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        expected = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert trainer(pod)["securityContext"] == expected


@pytest.mark.usefixtures("operator")
def test_where_pods_run_and_what_they_get_is_the_users(team: Team) -> None:
    toleration = {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}
    nodes: Json = {"accelerator": {"type": "GPU"}, "processesPerNode": 2, "nodeSelector": {"gpu": "h100"}, "tolerations": [toleration]}
    nodes |= {"resources": {"requests": {"cpu": "8", "memory": "64Gi"}}, "image": "registry.example/own:2"}
    nodes |= {"env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}
    team.create(nodes=nodes, model={"tokenSecretRef": {"name": "hub", "key": "token"}})
    for pod in team.until_attempt(1):
        container = trainer(pod)
        assert container["image"] == "registry.example/own:2"
        assert container["resources"] == {"requests": {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "2"}, "limits": {"nvidia.com/gpu": "2"}}
        assert pod["spec"]["nodeSelector"] == {"gpu": "h100"}
        assert toleration in pod["spec"]["tolerations"]
        variables = environment(pod)
        assert variables["NCCL_DEBUG"] == "INFO"
        assert variables["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
        spread = pod["spec"]["affinity"]["podAntiAffinity"]
        assert [term["podAffinityTerm"]["topologyKey"] for term in spread["preferredDuringSchedulingIgnoredDuringExecution"]] == ["kubernetes.io/hostname"]
        assert "requiredDuringSchedulingIgnoredDuringExecution" not in spread


@pytest.mark.usefixtures("operator")
def test_pod_template_is_laid_over_the_pods_but_the_gangs_names_stay(team: Team) -> None:
    sidecar = {"name": "logs", "image": "registry.example/logs:1"}
    own = {"name": "trainer", "env": [{"name": "RANK", "value": "7"}, {"name": "OMP_NUM_THREADS", "value": "2"}]}
    template = {
        "metadata": {"labels": {"team": "a", names.JOB_LABEL: "other", names.UID_LABEL: "other"}},
        "spec": {"hostname": "mine", "containers": [own, sidecar]},
    }
    job = team.create(nodes={"podTemplate": template})
    master = team.until_attempt(1)[0]
    labels = master["metadata"]["labels"]
    assert (labels["team"], labels[names.JOB_LABEL], labels[names.UID_LABEL]) == ("a", "job", job["metadata"]["uid"][:8])
    assert [container["name"] for container in master["spec"]["containers"]] == ["trainer", "logs"]
    assert (environment(master)["RANK"], environment(master)["OMP_NUM_THREADS"], master["spec"]["hostname"]) == ("0", "2", "job-0")


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("when_deleted", ["Retain", "Delete"])
def test_claim_of_a_template_is_owned_only_if_it_goes_with_the_job(team: Team, when_deleted: str) -> None:
    job = team.create(volumes={"work": {**TEMPLATE, "claimName": None}, "persistentVolumeClaimRetentionPolicy": {"whenDeleted": when_deleted}})
    pods = team.until_attempt(1)
    (claim,) = team.all("persistentvolumeclaims")
    assert (claim["metadata"]["name"], claim["metadata"]["labels"]) == ("job-work", CHILD_LABELS)
    assert claim["metadata"].get("ownerReferences") == (owner(job) if when_deleted == "Delete" else None)
    assert (claim["spec"]["accessModes"], claim["spec"]["resources"]) == (["ReadWriteMany"], {"requests": {"storage": "1Gi"}})
    for pod in pods:
        assert {"name": "work", "persistentVolumeClaim": {"claimName": "job-work"}} in pod["spec"]["volumes"]


@pytest.mark.usefixtures("operator")
def test_status_of_a_job_whose_pods_were_made_says_what_it_waits_for(team: Team) -> None:
    team.create()
    team.until_attempt(1)
    status = team.status()
    assert (status["phase"], status["attempt"], status["observedGeneration"]) == ("Pending", 1, 1)
    assert status["pods"] == {"desired": 2, "running": 0, "succeeded": 0, "failed": 0}
    assert team.states() == {"Initialized": "False", "Running": "False", "Ready": "False", "Reconciling": "True"}
    assert team.condition("Reconciling")["message"] == "waiting for 2 pods to run"
    assert {condition["observedGeneration"] for condition in status["conditions"]} == {1}
    assert "startTime" in status
    assert not {"completionTime", "failure", "progress", "restarts"} & set(status)


def test_a_job_costs_four_writes_until_its_pods_run_and_keeps_no_state_of_the_operator(team: Team, operator: Operator) -> None:
    until(lambda: has_compared(operator), START_SECONDS, "the operator has compared with the cluster")
    before = operator.writes()
    reads = operator.metric("rest_client_requests_total", method="GET")
    made = team.create()
    pods = team.until_attempt(1)
    for pod in pods:  # what a scheduler says of pods that have to wait is no reason to write either
        condition = {"type": "PodScheduled", "status": "True", "lastTransitionTime": None}
        team.set_pod(pod, phase="Pending", conditions=[condition])
    team.create("next")
    team.until_attempt(1, "next")
    team.until(lambda: operator.writes() - before >= 8, "the operator has counted the last write too")
    assert operator.writes() - before == 8
    assert operator.metric("rest_client_requests_total", method="GET") == reads
    job = team.job()
    assert job["metadata"]["generation"] == made["metadata"]["generation"]
    assert not {"finalizers", "annotations", "labels"} & set(job["metadata"])
    managers = [(entry["manager"], entry.get("subresource")) for entry in job["metadata"]["managedFields"]]
    assert managers.count(("finetune-operator", "status")) == 1
    assert job["spec"] == made["spec"]
