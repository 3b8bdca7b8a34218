"""Plan -> the Kubernetes objects of one gang: a headless Service, a claim where a template is given, one pod for each node. Pure.

Nothing is copied from the job's own labels and annotations. Owner references do not block the owner's deletion: that would need the right to set finalizers
on jobs, for nothing but the order of a foreground deletion.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from finetune_operator import confinement, names, overlay
from finetune_operator.plan import NodePlan, Plan, Variable
from finetune_operator.problems import InvalidJob, Problem
from finetune_operator.settings import Settings

Json = dict[str, Any]

MAX_ANNOTATIONS = 256 * 1024
"""Bytes of all annotations of an object, keys and values: Kubernetes' limit."""
SCRATCH = "/tmp"
RUN_VOLUME, WORK_VOLUME, CACHE_VOLUME, MEMORY_VOLUME, SCRATCH_VOLUME = "run", "work", "cache", "shared-memory", "tmp"
PROGRESS_PORT, MASTER_PORT = "progress", "master"
SHUTDOWN_SECONDS = 15
"""What the launcher needs beyond the ranks' grace period: to stop them and to write why."""


@dataclass(frozen=True)
class Owner:
    """The FineTuneJob that the objects belong to."""

    name: str
    uid: str
    namespace: str

    def reference(self) -> Json:
        """The owner reference of its children."""
        reference = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": self.name, "uid": self.uid}
        return {**reference, "controller": True, "blockOwnerDeletion": False}


def objects(plan: Plan, owner: Owner, settings: Settings) -> tuple[Json, ...]:
    """Every object of a gang, in the order in which they are made."""
    claim = work_claim(plan, owner)
    return (service(plan, owner), *((claim,) if claim else ()), *pods(plan, owner, settings))


def service(plan: Plan, owner: Owner) -> Json:
    """The headless Service that gives the pods of every gang the same host names; also before they are ready, because they find each other first."""
    ports = [(PROGRESS_PORT, plan.config.run.progress_port), (MASTER_PORT, plan.master_port)]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**_metadata(names.service(owner.name), owner), "ownerReferences": [owner.reference()]},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": names.selector(owner.name, owner.uid),
            "ports": [{"name": name, "port": port, "targetPort": port, "protocol": "TCP"} for name, port in ports],
        },
    }


def work_claim(plan: Plan, owner: Owner) -> Json | None:
    """The claim made from the job's template; None where the job names an existing one. One that is retained has no owner, so that it outlives the job."""
    volumes = plan.job.spec.volumes
    template = volumes.work.volume_claim_template if volumes.work else None
    if template is None:
        return None
    metadata = _metadata(names.claim(owner.name), owner)
    given = overlay.metadata(template.metadata or {}, "spec.volumes.work.volumeClaimTemplate.metadata")
    metadata = overlay.merge_metadata(given, metadata)
    if volumes.persistent_volume_claim_retention_policy.when_deleted == "Delete":
        metadata["ownerReferences"] = [owner.reference()]
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": template.spec}


def pods(plan: Plan, owner: Owner, settings: Settings) -> tuple[Json, ...]:
    """All pods of a gang; raises InvalidJob naming the field."""
    return tuple(pod(plan, node.index, owner, settings) for node in plan.nodes)


def pod(plan: Plan, node_rank: int, owner: Owner, settings: Settings) -> Json:
    """The pod of one node of a gang, with the job's pod template laid over it; raises InvalidJob naming the field."""
    node, attempt = plan.nodes[node_rank], plan.config.run.attempt
    metadata = _metadata(names.pod(owner.name, attempt, node_rank), owner)
    metadata["labels"] |= {**names.selector(owner.name, owner.uid), names.ATTEMPT_LABEL: str(attempt), names.NODE_LABEL: str(node_rank)}
    metadata |= {"annotations": {names.RUN_CONFIG_ANNOTATION: _run_config(plan)}, "ownerReferences": [owner.reference()]}
    made: Json = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": _pod_spec(plan, node, owner, settings)}
    template = plan.job.spec.nodes.pod_template
    if template is not None:
        made = overlay.lay(template.metadata or {}, template.spec or {}, made, kept_mounts=frozenset((_split(settings.run_file)[0],)))
        _check_annotations(made["metadata"]["annotations"], "spec.nodes.podTemplate.metadata.annotations")
        if not settings.allow_privileged_templates:
            made["spec"] = confinement.confine(made["spec"], template.spec or {})
    return made


def _metadata(name: str, owner: Owner) -> Json:
    return {"name": name, "namespace": owner.namespace, "labels": names.child_labels(owner.name)}


def _run_config(plan: Plan) -> str:
    """RunConfig as it travels in the annotation; raises InvalidJob naming the longest field where it is too long."""
    annotation = {names.RUN_CONFIG_ANNOTATION: plan.run_config}
    if _size(annotation) > MAX_ANNOTATIONS:
        data = json.loads(plan.run_config)["data"]
        _check_annotations(annotation, "spec.data." + max(data, key=lambda name: len(json.dumps(data[name]))))
    return plan.run_config


def _check_annotations(annotations: dict[str, str], field: str) -> None:
    size = _size(annotations)
    if size > MAX_ANNOTATIONS:
        raise InvalidJob(
            Problem(field, f"the run's configuration travels in the pods' annotations, which hold {MAX_ANNOTATIONS:,} bytes (found {size:,}); make it shorter")
        )


def _size(annotations: dict[str, str]) -> int:
    return sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items())


def _pod_spec(plan: Plan, node: NodePlan, owner: Owner, settings: Settings) -> Json:
    nodes = plan.job.spec.nodes
    spec: Json = {
        "hostname": node.host,
        "subdomain": names.service(owner.name),
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": plan.config.run.grace_seconds + SHUTDOWN_SECONDS,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _pod_security(settings),
        "containers": [_container(plan, node, settings)],
        "volumes": _volumes(plan, settings),
    }
    if len(plan.nodes) > 1:
        spec["affinity"] = {"podAntiAffinity": _spread(owner)}
    if nodes.node_selector:
        spec["nodeSelector"] = dict(nodes.node_selector)
    if nodes.tolerations:
        spec["tolerations"] = [toleration.model_dump(exclude_none=True) for toleration in nodes.tolerations]
    return spec


def _spread(owner: Owner) -> Json:
    """One machine each by preference; a pod template can demand it."""
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {names.JOB_LABEL: owner.name}}}
    return {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}


def _pod_security(settings: Settings) -> Json:
    """What the Pod Security Standard `restricted` asks of a pod; the group owns the volumes, so that they can be written to."""
    return {
        "runAsNonRoot": True,
        "runAsUser": settings.trainer_user,
        "runAsGroup": settings.trainer_group,
        "fsGroup": settings.trainer_group,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container(plan: Plan, node: NodePlan, settings: Settings) -> Json:
    image = plan.job.spec.nodes.image or settings.trainer_image
    if image is None:
        raise InvalidJob(Problem("spec.nodes.image", "it is required, because the operator's settings name no trainer image"))
    ports = [(PROGRESS_PORT, plan.config.run.progress_port), *([(MASTER_PORT, plan.master_port)] if node.index == 0 else [])]
    container: Json = {
        "name": names.TRAINER_CONTAINER,
        "image": image,
        "command": list(plan.command),
        "env": [_variable(variable) for variable in _environment(node)],
        "ports": [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports],
        "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
        "terminationMessagePath": settings.termination_message_path,
        "terminationMessagePolicy": "File",
        "volumeMounts": _mounts(settings),
    }
    resources = _resources(plan)
    return {**container, "resources": resources} if resources else container


def _environment(node: NodePlan) -> list[Variable]:
    """Folders that programs write to by habit, on a volume because the image is read-only, and a name for a user that the image may not know; what the plan says wins."""
    folders = {"HOME": "", "XDG_CACHE_HOME": "/.cache", "MPLCONFIGDIR": "/matplotlib"}
    own = [Variable("USER", names.TRAINER_CONTAINER), *(Variable(name, f"{SCRATCH}{folder}") for name, folder in folders.items())]
    return list({variable.name: variable for variable in (*own, *node.environment)}.values())


def _variable(variable: Variable) -> Json:
    if variable.value_from is not None:
        return {"name": variable.name, "valueFrom": variable.value_from}
    return {"name": variable.name, "value": variable.value or ""}


def _resources(plan: Plan) -> Json:
    """The user's, and as many accelerators as processes; Kubernetes wants those requested and limited alike."""
    given = plan.job.spec.nodes.resources
    accelerators = {plan.accelerator: plan.processes_per_node} if plan.accelerator else {}
    parts = {"requests": {**given.requests, **accelerators}, "limits": {**given.limits, **accelerators}}
    return {part: {name: str(amount) for name, amount in amounts.items()} for part, amounts in parts.items() if amounts}


@cache
def _split(run_file: str) -> tuple[str, str]:
    """Folder and name of RunConfig's file. Remembered: the settings have one, and it takes longer to take a path apart than to make all mounts."""
    path = PurePosixPath(run_file)
    return str(path.parent), path.name


def _mounts(settings: Settings) -> list[Json]:
    mounts = {
        RUN_VOLUME: _split(settings.run_file)[0],
        WORK_VOLUME: settings.work_mount,
        CACHE_VOLUME: settings.cache_mount,
        MEMORY_VOLUME: "/dev/shm",
        SCRATCH_VOLUME: SCRATCH,
    }
    return [{"name": name, "mountPath": path} | ({"readOnly": True} if name == RUN_VOLUME else {}) for name, path in mounts.items()]


def _volumes(plan: Plan, settings: Settings) -> list[Json]:
    volumes, memory = plan.job.spec.volumes, plan.job.spec.nodes.shared_memory
    annotation = {"fieldPath": f"metadata.annotations['{names.RUN_CONFIG_ANNOTATION}']"}
    sources: dict[str, Json] = {
        RUN_VOLUME: {"downwardAPI": {"items": [{"path": _split(settings.run_file)[1], "fieldRef": annotation}]}},
        WORK_VOLUME: _claimed(_work_claim_name(plan, settings)),
        CACHE_VOLUME: _claimed(volumes.cache.claim_name) if volumes.cache else {"emptyDir": {}},
        MEMORY_VOLUME: {"emptyDir": {"medium": "Memory", "sizeLimit": str(memory if memory is not None else settings.shared_memory)}},
        SCRATCH_VOLUME: {"emptyDir": {}},
    }
    return [{"name": name, **source} for name, source in sources.items()]


def _claimed(name: str | None) -> Json:
    return {"persistentVolumeClaim": {"claimName": name}}


def _work_claim_name(plan: Plan, settings: Settings) -> str | None:
    work = plan.job.spec.volumes.work
    if work is None:
        return settings.work_claim
    return work.claim_name or names.claim(plan.job.name)
