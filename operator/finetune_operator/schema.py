"""The FineTuneJob: its Kubernetes half, of `workload`, around the run options, which `finetune_trainer.contract` declares.

Absent run options stay None: the engine chooses them. Rules that cross fields and need nothing but the job stand at the end
of the model they concern; what needs the model's config.json is the trainer's to refuse.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from finetune_operator import names, problems
from finetune_operator.problems import FieldError, InvalidJob, Problem
from finetune_operator.workload import Label, Nodes, RunPolicy, SecretKeyRef, Text, Volumes
from finetune_trainer.contract import (
    CheckpointsConfig,
    Contract,
    DataConfig,
    ModelConfig,
    OutputConfig,
    ParallelismConfig,
    TrainingConfig,
    TuningConfig,
)


class JobModel(ModelConfig):
    """The model to start from."""

    token_secret_ref: SecretKeyRef | None = Field(
        None,
        description="Secret with the token for gated models and data sets; pods get it as HF_TOKEN. Absent: only what is public can be read. Without a cluster the user's own login is used.",
    )


class Spec(Contract):
    """What is asked for. Needed are model.source, data.dataset and, in a cluster, volumes.work; where the rest is silent the trainer chooses or a default holds, and `status.resolved` says what it is.

    All of it stays as it was made, except suspend, runPolicy and, where the job is suspended before or after the change, nodes.nodeSelector and nodes.tolerations.
    """

    suspend: bool = Field(False, description="true: stop the gang after a checkpoint, or do not start it. false again: it continues from there.")
    model: JobModel = Field(description="The model to start from, as `{source: Qwen/Qwen2.5-7B-Instruct}`.")
    data: DataConfig = Field(description='What to train on, as `{dataset: ["org/rows#500", ./more.jsonl]}`, and how rows are cut, mixed and packed.')
    tuning: TuningConfig = Field(TuningConfig(), description="Which weights are trained: low-rank adapters (LoRA), or all.")
    parallelism: ParallelismConfig = Field(
        ParallelismConfig(),
        description="How the model is cut over the nodes.count × nodes.processesPerNode processes. A size that is absent is chosen to fit the accelerators' memory.",
    )
    training: TrainingConfig = Field(TrainingConfig(), description="How it is trained: batches, length of the run, learning rate, optimizer, recomputation.")
    checkpoints: CheckpointsConfig = Field(CheckpointsConfig(), description="When training state is kept, and whether a run continues from it.")
    output: OutputConfig = Field(OutputConfig(), description="What is exported when training has ended, and how it is proven.")
    nodes: Nodes = Field(Nodes(), description="The machines of the gang: how many, with what, and what their pods are like.")
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


def _adapter_needs_lora(spec: Spec) -> None:
    if spec.tuning.tuner_type == "full" and "peft" in (spec.output.formats or ()):
        raise FieldError("output.formats", "it has peft, which needs tuning.tunerType lora (found full)")


def _rates_are_at_most_the_highest(spec: Spec) -> None:
    training = spec.training
    for name in ("min_lr", "lr_warmup_init"):
        rate = getattr(training, name)
        if rate is not None and training.lr is not None and rate > training.lr:
            raise FieldError(f"training.{to_camel(name)}", f"it is {rate:g}; it must be at most lr ({training.lr:g})")


def _warmup_ends(spec: Spec) -> None:
    training = spec.training
    if training.lr_warmup_fraction is not None:
        if training.lr_warmup_fraction >= 1:
            raise FieldError("training.lrWarmupFraction", f"it is {training.lr_warmup_fraction:g}; it must be less than 1, so that the rate can decay")
    elif training.lr_decay_iters is not None and training.lr_warmup_iters >= training.lr_decay_iters:
        raise FieldError("training.lrWarmupIters", f"it is {training.lr_warmup_iters}; it must be less than lrDecayIters ({training.lr_decay_iters})")


def _recomputation_is_of_its_kind(spec: Spec) -> None:
    training, kind = spec.training, spec.training.recompute_granularity
    for name, needed in (("recompute_num_layers", "full"), ("recompute_modules", "selective")):
        if getattr(training, name) is not None and kind not in (None, needed):
            raise FieldError(f"training.{to_camel(name)}", f"it is set; it needs recomputeGranularity {needed} (found {kind})")


def _gathering_has_its_parts(spec: Spec) -> None:
    sizes = spec.parallelism
    if sizes.overlap_param_gather and not (sizes.overlap_grad_reduce and sizes.use_distributed_optimizer):
        raise FieldError("parallelism.overlapParamGather", "it is true; it needs overlapGradReduce and useDistributedOptimizer")


def _accelerators_are_given_once(spec: Spec) -> None:
    resource = spec.nodes.accelerator.resource
    for part in ("requests", "limits"):
        if resource is not None and resource in getattr(spec.nodes.resources, part):
            raise FieldError(f"nodes.resources.{part}", f"it has {resource}, which processesPerNode gives ({spec.nodes.processes_per_node}): leave it out")


RULES: tuple[Callable[[Spec], None], ...] = (
    _world_is_divisible,
    _batches_are_whole,
    _probabilities_match,
    _hang_is_longer_than_a_collective,
    _template_is_shared,
    _adapter_needs_lora,
    _rates_are_at_most_the_highest,
    _warmup_ends,
    _recomputation_is_of_its_kind,
    _gathering_has_its_parts,
    _accelerators_are_given_once,
)
"""What `cel.py` says to the API server, with the values that were found."""


def parse(value: Any) -> FineTuneJob:
    """A FineTuneJob out of the JSON value of a document; raises InvalidJob with every problem found.

    Types are strict and names camelCase, as the API server has them: `"8"` is not a number, and a field that is null is absent.
    """
    if not isinstance(value, dict):
        raise InvalidJob(Problem("", f"a FineTuneJob is a mapping that begins with apiVersion: {names.API_VERSION} and kind: {names.KIND}"))
    for key, right in (("apiVersion", names.API_VERSION), ("kind", names.KIND)):
        if value.get(key) != right:
            raise InvalidJob(Problem(key, f"it must be {right} (found {value.get(key, 'nothing')})"))
    return parse_json(json.dumps({**value, "spec": _without_nulls(value["spec"], Spec)} if "spec" in value else value))


def parse_json(text: str | bytes) -> FineTuneJob:
    """As `parse`, out of JSON as the API server has it: of this kind, without nulls, which it takes away."""
    try:
        return FineTuneJob.model_validate_json(text, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        raise InvalidJob(*problems.read(error)) from error


def _without_nulls(value: Any, model: type[Contract] | None) -> Any:
    """A value without the fields of its models that are null; what has no model (`podTemplate.spec`) stays as it is."""
    if isinstance(value, list):
        return [_without_nulls(item, model) for item in value]
    if model is None or not isinstance(value, dict):
        return value
    models = _models_of(model)
    return {key: _without_nulls(item, models.get(key)) for key, item in value.items() if item is not None or key not in models}


@cache
def _models_of(model: type[Contract]) -> dict[str | None, type[Contract] | None]:
    """The model in each field, by its name in the API."""
    return {field.alias: model_in(field.annotation) for field in model.model_fields.values()}


def model_in(annotation: Any) -> type[Contract] | None:
    """The model that a field's type has in it: `Volumes | None`, `list[EnvVar]`."""
    if isinstance(annotation, type) and issubclass(annotation, Contract):
        return annotation
    return next((found for found in map(model_in, get_args(annotation)) if found), None)
