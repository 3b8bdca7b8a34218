"""The FineTuneJob: its Kubernetes half, written here, around the run options, which `finetune_trainer.contract` declares.

Absent run options stay None: the engine chooses them. Rules that cross fields and need nothing but the job stand at the end
of the model they concern; what needs the model's config.json is the trainer's to refuse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Field, ValidationError, WithJsonSchema, model_validator

from finetune_operator import names, problems
from finetune_operator.problems import FieldError, InvalidJob, Problem
from finetune_trainer.contract import (
    CheckpointsConfig,
    Contract,
    DataConfig,
    ModelConfig,
    Natural,
    OutputConfig,
    ParallelismConfig,
    Positive,
    TrainingConfig,
    TuningConfig,
)

_QUANTITY = re.compile(r"\+?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][-+]?[0-9]+)?")


def _check_quantity(value: Any) -> str | int:
    if isinstance(value, float):
        raise ValueError(f"{value} is not a whole number; put it in quotes")
    if isinstance(value, bool) or not isinstance(value, str | int) or not _QUANTITY.fullmatch(str(value)):
        raise ValueError(f"{json.dumps(value)} is not a Kubernetes quantity such as 500m, 8 or 64Gi")
    return value


Text = Annotated[str, Field(max_length=4096)]
Label = Annotated[str, Field(min_length=1, max_length=316)]
Quantity = Annotated[
    Any,
    AfterValidator(_check_quantity),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 64}], "x-kubernetes-int-or-string": True}),
]
ClaimName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]


class SecretKeyRef(Contract):
    """One key of a Secret in the job's namespace."""

    name: ClaimName = Field(description="Name of the Secret.")
    key: Label = Field(description="Key in the Secret.")


class JobModel(ModelConfig):
    """The model to start from."""

    token_secret_ref: SecretKeyRef | None = Field(
        None, description="Secret with the token for gated models (HF_TOKEN). Without a cluster the user's own login is used."
    )


class Accelerator(Contract):
    """What each process computes on."""

    type: Literal["GPU", "CPU"] = Field("GPU", description="GPU or CPU.")
    resource_name: Label | None = Field(None, description="Kubernetes resource, one per process. Absent: nvidia.com/gpu with GPU; refused with CPU.")

    @model_validator(mode="after")
    def _resource_needs_gpu(self) -> Self:
        if self.type == "CPU" and self.resource_name is not None:
            raise FieldError("resourceName", f"{self.resource_name} is set; it needs type GPU (found CPU)")
        return self


class ResourceRequirements(Contract):
    """Kubernetes' ResourceRequirements of the trainer's container."""

    requests: dict[Label, Quantity] = Field({}, max_length=64, description="What is reserved.")
    limits: dict[Label, Quantity] = Field({}, max_length=64, description="What may be used.")


class EnvVar(Contract):
    """Kubernetes' EnvVar."""

    name: Label = Field(description="Name; those that the gang sets (RANK, MASTER_ADDR, PET_*, ...) are refused.")
    value: Annotated[str, Field(max_length=65536)] | None = Field(None, description="Value.")
    value_from: dict[str, Any] | None = Field(None, description="Kubernetes' EnvVarSource.")

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
    toleration_seconds: int | None = Field(None, description="How long NoExecute is tolerated. Absent: for ever.")


class PodTemplate(Contract):
    """Kubernetes' PodTemplateSpec, laid over the operator's by strategic-merge rules; the API server checks its fields."""

    metadata: dict[str, Any] | None = Field(None, description="Labels and annotations of the pods.")
    spec: dict[str, Any] | None = Field(None, description="PodSpec; the trainer's container is `trainer`.")


class Nodes(Contract):
    """The machines of the gang: one pod each."""

    count: Annotated[int, Field(ge=1, le=4096)] = Field(1, description="Nodes.")
    processes_per_node: Annotated[int, Field(ge=1, le=64)] = Field(1, description="Processes on each node: its GPUs where GPUs are used.")
    accelerator: Accelerator = Field(Accelerator(), description="What each process computes on.")
    image: Text | None = Field(None, description="Trainer image. Absent: the operator's setting.")
    resources: ResourceRequirements = Field(ResourceRequirements(), description="Of each node's container, beside the accelerators.")
    shared_memory: Quantity | None = Field(None, description="Size of /dev/shm. Absent: the operator's setting.")
    env: list[EnvVar] = Field([], max_length=256, description="More environment variables.")
    node_selector: dict[Label, Text] = Field({}, max_length=64, description="Labels that a node must have.")
    tolerations: list[Toleration] = Field([], max_length=64, description="Taints that are tolerated.")
    pod_template: PodTemplate | None = Field(None, description="A PodTemplateSpec laid over ours.")

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

    metadata: dict[str, Any] | None = Field(None, description="Labels and annotations of the claim.")
    spec: dict[str, Any] = Field(description="PersistentVolumeClaimSpec; ReadWriteMany where nodes.count is above 1.")


class WorkVolume(Contract):
    """Where results go: an existing claim, or one made from a template."""

    claim_name: ClaimName | None = Field(None, description="Name of an existing PersistentVolumeClaim in the job's namespace.")
    volume_claim_template: ClaimTemplate | None = Field(None, description="A claim to make.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.claim_name is None) == (self.volume_claim_template is None):
            found = "neither" if self.claim_name is None else "both"
            raise FieldError("", f"exactly one of claimName and volumeClaimTemplate is needed (found {found})")
        return self


class RetentionPolicy(Contract):
    """What becomes of claims that were made for a job."""

    when_deleted: Literal["Retain", "Delete"] = Field("Retain", description="When the job is deleted.")


class Volumes(Contract):
    """Storage of a job in a cluster."""

    cache: ExistingClaim | None = Field(None, description="Models and data sets from hubs, shared between jobs. Absent: fetched anew by each pod.")
    work: WorkVolume | None = Field(None, description="Checkpoints and results. Required in a cluster unless the operator's settings give one.")
    persistent_volume_claim_retention_policy: RetentionPolicy = Field(RetentionPolicy(), description="Of claims made from a template.")


class RunPolicy(Contract):
    """How long and how often a gang is tried."""

    backoff_limit: Natural = Field(3, description="Counted restarts before the job has failed.")
    active_deadline_seconds: Positive | None = Field(None, description="Longest time that the job may be active. Absent: no limit.")
    node_lost_seconds: Positive = Field(300, description="A node that is gone for so long is lost.")
    progress_deadline_seconds: Positive = Field(1800, description="A heartbeat that is silent for so long is a hang; more than parallelism.ddpTimeout.")
    clean_pod_policy: Literal["None", "Running", "All"] = Field("None", description="Which pods are deleted when the job has ended.")


class Spec(Contract):
    """What is asked for."""

    suspend: bool = Field(False, description="Stop the gang after a checkpoint, or do not start it.")
    model: JobModel = Field(description="The model to start from.")
    data: DataConfig = Field(description="What to train on.")
    tuning: TuningConfig = Field(TuningConfig(), description="Which weights are trained.")
    parallelism: ParallelismConfig = Field(ParallelismConfig(), description="How the model is cut over processes.")
    training: TrainingConfig = Field(TrainingConfig(), description="How it is trained.")
    checkpoints: CheckpointsConfig = Field(CheckpointsConfig(), description="When training state is kept.")
    output: OutputConfig = Field(OutputConfig(), description="What is left when the run has ended.")
    nodes: Nodes = Field(Nodes(), description="The machines of the gang.")
    volumes: Volumes = Field(Volumes(), description="Storage of a job in a cluster.")
    run_policy: RunPolicy = Field(RunPolicy(), description="How long and how often a gang is tried.")

    @model_validator(mode="after")
    def _rules_across_fields(self) -> Self:
        for rule in RULES:
            rule(self)
        return self


class ObjectMeta(Contract):
    """Kubernetes' ObjectMeta; name and namespace matter here, the rest is the API server's."""

    name: Text | None = Field(None, description=f"Name of the job: {names.NAME_RULE}.")
    namespace: Text | None = Field(None, description="Namespace. Absent: default, or kubectl's.")
    labels: dict[Label, Text] | None = None
    annotations: dict[Label, str] | None = None
    generate_name: Text | None = None
    uid: Text | None = None
    resource_version: str | None = None
    generation: int | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    deletion_grace_period_seconds: int | None = None
    finalizers: list[str] | None = None
    owner_references: list[dict[str, Any]] | None = None
    managed_fields: list[dict[str, Any]] | None = None
    self_link: str | None = None

    @model_validator(mode="after")
    def _names_are_names(self) -> Self:
        if self.name is None:
            raise FieldError("name", "a name is required")
        if not names.is_job_name(self.name):
            raise FieldError("name", f"{self.name!r} cannot be a job's name; {names.NAME_RULE}")
        if self.namespace is not None and not names.is_namespace(self.namespace):
            raise FieldError("namespace", f"{self.namespace!r} is not a namespace; lower-case letters, digits and `-`, at most 63")
        return self


class FineTuneJob(Contract):
    """One fine-tuning job, as a user writes it."""

    api_version: Literal["finetune.mcore.dev/v1alpha1"]
    kind: Literal["FineTuneJob"]
    metadata: ObjectMeta
    spec: Spec
    status: dict[str, Any] | None = Field(None, description="Written by the operator; a job that is read back may carry it.")

    @property
    def name(self) -> str:
        return self.metadata.name or ""

    @property
    def namespace(self) -> str:
        return self.metadata.namespace or "default"


def _world_is_divisible(spec: Spec) -> None:
    sizes, world = spec.parallelism, spec.nodes.world_size
    tensor, pipeline = sizes.tensor_model_parallel_size or 1, sizes.pipeline_model_parallel_size or 1
    dense = tensor * pipeline * (sizes.context_parallel_size or 1)
    expert = (sizes.expert_tensor_parallel_size or 1) * (sizes.expert_model_parallel_size or 1) * pipeline
    processes = f"nodes.count × nodes.processesPerNode is {world}"
    if world % dense:
        raise FieldError(
            "parallelism", f"{processes}; it must be a multiple of tensorModelParallelSize × pipelineModelParallelSize × contextParallelSize ({dense})"
        )
    if world % expert:
        raise FieldError(
            "parallelism", f"{processes}; it must be a multiple of expertTensorParallelSize × expertModelParallelSize × pipelineModelParallelSize ({expert})"
        )


def _batches_are_whole(spec: Spec) -> None:
    sizes, training = spec.parallelism, spec.training
    written = (sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size, sizes.context_parallel_size)
    if training.micro_batch_size is None or None in written:
        return
    data_parallel = spec.nodes.world_size
    for size in written:
        data_parallel //= size or 1
    step = training.micro_batch_size * data_parallel
    if training.global_batch_size % step:
        raise FieldError(
            "training.globalBatchSize",
            f"it is {training.global_batch_size}; it must be a multiple of microBatchSize × data-parallel size ({training.micro_batch_size} × {data_parallel})",
        )


def _probabilities_match(spec: Spec) -> None:
    data = spec.data
    if data.interleave_prob is not None and len(data.interleave_prob) != len(data.dataset):
        raise FieldError("data.interleaveProb", f"it has {len(data.interleave_prob)} values; it must have one for each of the {len(data.dataset)} data sets")


def _hang_is_longer_than_a_collective(spec: Spec) -> None:
    deadline, timeout = spec.run_policy.progress_deadline_seconds, spec.parallelism.ddp_timeout
    if deadline <= timeout:
        raise FieldError("runPolicy.progressDeadlineSeconds", f"it is {deadline}; it must be more than parallelism.ddpTimeout ({timeout})")


def _template_is_shared(spec: Spec) -> None:
    template = spec.volumes.work.volume_claim_template if spec.volumes.work else None
    if template and spec.nodes.count > 1 and "ReadWriteMany" not in (template.spec.get("accessModes") or []):
        found = template.spec.get("accessModes")
        raise FieldError(
            "volumes.work.volumeClaimTemplate.spec.accessModes", f"it must have ReadWriteMany, because nodes.count is {spec.nodes.count} (found {found})"
        )


RULES: tuple[Callable[[Spec], None], ...] = (
    _world_is_divisible,
    _batches_are_whole,
    _probabilities_match,
    _hang_is_longer_than_a_collective,
    _template_is_shared,
)


def parse(value: Any) -> FineTuneJob:
    """A FineTuneJob out of the JSON value of a document; raises InvalidJob with every problem found.

    Types are strict and names camelCase, as the API server has them: `"8"` is not a number, and a field that is null is absent.
    """
    if not isinstance(value, dict):
        raise InvalidJob(Problem("", f"a FineTuneJob is a mapping that begins with apiVersion: {names.API_VERSION} and kind: {names.KIND}"))
    for key, right in (("apiVersion", names.API_VERSION), ("kind", names.KIND)):
        if value.get(key) != right:
            raise InvalidJob(Problem(key, f"it must be {right} (found {value.get(key, 'nothing')})"))
    known = {**value, "spec": _without_nulls(value["spec"], Spec)} if "spec" in value else value
    try:
        return FineTuneJob.model_validate_json(json.dumps(known), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        raise InvalidJob(*problems.read(error)) from error


def _without_nulls(value: Any, model: type[Contract] | None) -> Any:
    """A value without the fields of its models that are null; what has no model (`podTemplate.spec`) stays as it is."""
    if isinstance(value, list):
        return [_without_nulls(item, model) for item in value]
    if model is None or not isinstance(value, dict):
        return value
    models = {field.alias: _model_in(field.annotation) for field in model.model_fields.values()}
    return {key: _without_nulls(item, models.get(key)) for key, item in value.items() if item is not None or key not in models}


def _model_in(annotation: Any) -> type[Contract] | None:
    """The model that a field's type has in it: `Volumes | None`, `list[EnvVar]`."""
    if isinstance(annotation, type) and issubclass(annotation, Contract):
        return annotation
    return next((found for found in map(_model_in, get_args(annotation)) if found), None)
