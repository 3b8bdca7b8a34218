"""The Kubernetes half of a spec: nodes and what their pods are like, volumes, how long and how often a gang is tried."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, WithJsonSchema, model_validator

from finetune_operator import names
from finetune_operator.problems import FieldError
from finetune_trainer.contract import Contract, Natural, Positive

_QUANTITY = re.compile(r"\+?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][-+]?[0-9]+)?")
_LIST_BY_NAME: dict[str, JsonValue] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}


def _check_quantity(value: Any) -> str | int:
    if isinstance(value, float):
        raise ValueError(f"{value} is not a whole number; put it in quotes")
    if isinstance(value, bool) or not isinstance(value, str | int) or len(str(value)) > 64 or not _QUANTITY.fullmatch(str(value)):
        raise ValueError(f"{json.dumps(value)} is not a Kubernetes quantity such as 500m, 8 or 64Gi")
    return value


DEFAULT_RESOURCE = "nvidia.com/gpu"
Text = Annotated[str, Field(max_length=4096)]
Label = Annotated[str, Field(min_length=1, max_length=316)]
Quantity = Annotated[
    Any,
    AfterValidator(_check_quantity),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": True,
            "pattern": f"^({_QUANTITY.pattern})$",
            "minimum": 0,
            "maxLength": 64,
        }
    ),
]
ClaimSpec = Annotated[
    dict[str, Any],
    WithJsonSchema({"type": "object", "properties": {"accessModes": {"type": "array", "maxItems": 8, "items": {"type": "string", "maxLength": 64}}}}),
]
ClaimName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]


class SecretKeyRef(Contract):
    """One key of a Secret in the job's namespace."""

    name: ClaimName = Field(description="Name of the Secret, as `hf-token`.")
    key: Label = Field(description="Key in the Secret, as `token`.")


class Accelerator(Contract):
    """What each process computes on."""

    type: Literal["GPU", "CPU"] = Field("GPU", description="GPU: one resource of resourceName for each process. CPU: none; give nodes.resources the cores.")
    resource_name: Label | None = Field(
        None,
        description="Kubernetes resource of one accelerator, as `nvidia.com/gpu` or `nvidia.com/mig-3g.40gb`. Absent: nvidia.com/gpu with GPU; refused with CPU.",
    )

    @model_validator(mode="after")
    def _resource_needs_gpu(self) -> Self:
        if self.type == "CPU" and self.resource_name is not None:
            raise FieldError("resourceName", f"{self.resource_name} is set; it needs type GPU (found CPU)")
        return self

    @property
    def resource(self) -> str | None:
        """The Kubernetes resource of one process; None: it computes on the CPU."""
        return (self.resource_name or DEFAULT_RESOURCE) if self.type == "GPU" else None


class ResourceRequirements(Contract):
    """Kubernetes' ResourceRequirements of the trainer's container."""

    requests: dict[Label, Quantity] = Field(
        {}, max_length=64, description='What is reserved on a node, as `{cpu: "8", memory: 64Gi}`; the accelerators are added.'
    )
    limits: dict[Label, Quantity] = Field({}, max_length=64, description="What may be used at most; more memory than that ends the pod.")


class EnvVar(Contract):
    """Kubernetes' EnvVar."""

    name: Label = Field(
        description="Name, as `NCCL_DEBUG`; those that the gang sets (RANK, MASTER_ADDR, PET_*, ...) are refused.",
        json_schema_extra={"pattern": f"^{names.ENVIRONMENT_NAME.pattern}$"},
    )
    value: Annotated[str, Field(max_length=32768)] | None = Field(None, description="Value. Absent, and valueFrom absent too: the empty text.")
    value_from: dict[str, Any] | None = Field(
        None, description="Kubernetes' EnvVarSource, as `{secretKeyRef: {name: wandb, key: api-key}}`. In a cluster only."
    )

    @model_validator(mode="after")
    def _is_free(self) -> Self:
        if not names.is_environment_name(self.name):
            raise FieldError("name", f"{self.name!r} is not a name of an environment variable")
        if names.is_gang_environment(self.name):
            raise FieldError("name", f"{self.name} is set by the gang itself and cannot be given")
        if self.value is not None and self.value_from is not None:
            raise FieldError("valueFrom", "value is set too; give one of them")
        return self


class Toleration(Contract):
    """Kubernetes' Toleration."""

    key: Text | None = Field(None, description="Taint's key; absent with Exists: all.")
    operator: Literal["Exists", "Equal"] | None = Field(None, description="Absent: Equal.")
    value: Text | None = Field(None, description="Taint's value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(None, description="Absent: all effects.")
    toleration_seconds: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None, description="How long NoExecute is tolerated, in seconds. Absent: for ever."
    )


class PodTemplate(Contract):
    """Kubernetes' PodTemplateSpec, laid over the operator's by strategic-merge rules; the API server checks its fields when the pods are made."""

    metadata: dict[str, Any] | None = Field(None, description="Labels and annotations of the pods; nothing else.")
    spec: dict[str, Any] | None = Field(
        None,
        description="PodSpec; the trainer's container is `trainer`, as in `{priorityClassName: research, containers: [{name: trainer, envFrom: [...]}]}`. Containers, ports and volume mounts "
        "are merged by name, port and path; volumes and variables of a name are replaced, and so are tolerations and all other lists; null or `$patch: delete` takes away. "
        "What the gang needs stays: its variables, command, host names, labels, restartPolicy and run file. Host namespaces and folders, privileges, root and a service-account token are refused "
        "unless the operator's setting allowPrivilegedTemplates is true.",
    )


class Nodes(Contract):
    """The machines of the gang: one pod each."""

    count: Annotated[int, Field(ge=1, le=4096)] = Field(
        1, description="Nodes, one pod on each; they are spread over the cluster's machines where there is room."
    )
    processes_per_node: Annotated[int, Field(ge=1, le=64)] = Field(1, description="Processes on each node: its GPUs where GPUs are used.")
    accelerator: Accelerator = Field(Accelerator(), description="What each process computes on.")
    image: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        None, description="Trainer image, as `registry.example/trainer:1.0`. Absent: the operator's setting."
    )
    resources: ResourceRequirements = Field(
        ResourceRequirements(),
        description='CPU, memory and the like of each pod, as `{requests: {cpu: "8", memory: 64Gi}}`. The accelerators are added: leave them out.',
    )
    shared_memory: Quantity | None = Field(
        None, description="Most that /dev/shm may hold, as `16Gi`; what is in it counts as memory of the pod. Absent: the operator's setting."
    )
    env: list[EnvVar] = Field([], max_length=128, description="More environment variables of the trainer, each name once.", json_schema_extra=_LIST_BY_NAME)
    node_selector: dict[Label, Text] = Field(
        {}, max_length=64, description="Labels that a machine must have, as `{gpu: h100}`. May be changed while the job is suspended."
    )
    tolerations: list[Toleration] = Field([], max_length=64, description="Taints of machines that are tolerated. May be changed while the job is suspended.")
    pod_template: PodTemplate | None = Field(
        None, description="A PodTemplateSpec laid over the operator's, for what has no field here: affinity, priorityClassName, volumes, sidecars."
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        seen: set[str] = set()
        for index, variable in enumerate(self.env):
            if variable.name in seen:
                raise FieldError(f"env[{index}].name", f"{variable.name} is given twice")
            seen.add(variable.name)
        return self

    @property
    def world_size(self) -> int:
        """Processes of the whole gang."""
        return self.count * self.processes_per_node


class ExistingClaim(Contract):
    """An existing PersistentVolumeClaim."""

    claim_name: ClaimName = Field(description="Name of an existing PersistentVolumeClaim in the job's namespace.")


class ClaimTemplate(Contract):
    """A claim that the operator makes."""

    metadata: dict[str, Any] | None = Field(None, description="Labels and annotations of the claim; nothing else.")
    spec: ClaimSpec = Field(
        description="PersistentVolumeClaimSpec, as `{accessModes: [ReadWriteMany], storageClassName: nfs, resources: {requests: {storage: 100Gi}}}`; ReadWriteMany where nodes.count is above 1."
    )


class WorkVolume(Contract):
    """Where results go: an existing claim, or one made from a template."""

    claim_name: ClaimName | None = Field(None, description="Name of an existing PersistentVolumeClaim in the job's namespace.")
    volume_claim_template: ClaimTemplate | None = Field(
        None, description="A claim that the operator makes, named `<job>-work`; a later job of the same name uses it again, as it is."
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.claim_name is None) == (self.volume_claim_template is None):
            found = "neither" if self.claim_name is None else "both"
            raise FieldError("", f"exactly one of claimName and volumeClaimTemplate is needed (found {found})")
        return self


class RetentionPolicy(Contract):
    """What becomes of claims that were made for a job."""

    when_deleted: Literal["Retain", "Delete"] = Field(
        "Retain", description="When the job is deleted. Retain: the claim stays, with the results in it. Delete: it goes too."
    )


class Volumes(Contract):
    """Storage of a job in a cluster."""

    cache: ExistingClaim | None = Field(
        None, description="Models and data sets from hubs, shared between jobs; mounted at /cache. Absent: fetched anew by each pod."
    )
    work: WorkVolume | None = Field(
        None,
        description="Checkpoints and results; mounted at /work, `./` in a source or dataset. Required in a cluster unless the operator's settings give one.",
    )
    persistent_volume_claim_retention_policy: RetentionPolicy = Field(
        RetentionPolicy(), description="What becomes of a claim that was made from volumeClaimTemplate; not of one that an earlier job has left."
    )


class RunPolicy(Contract):
    """How long and how often a gang is tried."""

    backoff_limit: Natural = Field(3, description="Restarts before the job has failed; those after preemption and eviction are not counted. 0: none.")
    active_deadline_seconds: Positive | None = Field(
        None, description="Longest time that the job may be active, in seconds from its first gang, or its first since it was resumed. Absent: no limit."
    )
    node_lost_seconds: Positive = Field(
        300, description="A machine that is not heard for so many seconds is lost: its pod is removed by force and the gang starts anew."
    )
    progress_deadline_seconds: Positive = Field(
        1800,
        description="A trainer whose heartbeat is silent for so many seconds hangs; so does a node that has not ended so many seconds after node 0 ended well. "
        "The gang starts anew. It must be more than parallelism.ddpTimeout.",
    )
    clean_pod_policy: Literal["None", "Running", "All"] = Field(
        "None", description="Which pods are deleted when the job has ended: None keeps them all for their logs, Running those that ended, All none."
    )
