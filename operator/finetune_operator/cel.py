"""What the API server checks by itself, beyond types and bounds: CEL rules over fields, and over a change of them. Pure.

Each rule says in CEL what a rule of `schema` or of the contract says in Python; the messages are fixed texts, because to put numbers in them costs more than the
API server allows. `optional.orValue(1)` reads a size that is absent; a product that overflows is an error of the rule, with the rule's message.
Every look at a field costs the API server 10 to 20 µs, each time: it makes a map of all fields that the object could have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune_operator import names
from finetune_operator.schema import FineTuneJob, Spec
from finetune_operator.workload import DEFAULT_RESOURCE, Accelerator, EnvVar, Nodes, WorkVolume
from finetune_trainer.contract import Contract, DataConfig, ParallelismConfig, TrainingConfig, TuningConfig


@dataclass(frozen=True)
class Rule:
    """One entry of x-kubernetes-validations."""

    rule: str
    message: str
    field: str | None = None
    """The field that the message is about, relative to the object of the rule (`nodes.count`); None: the object itself."""

    def entry(self) -> dict[str, str]:
        """As the CRD has it."""
        path = {"fieldPath": f".{self.field}"} if self.field else {}
        return {"rule": self.rule, "message": self.message, **path}


WORLD = "self.nodes.count * self.nodes.processesPerNode"


def _product(*sizes: str) -> str:
    return " * ".join(f"self.parallelism.?{size}.orValue(1)" for size in sizes)


TENSOR, PIPELINE, CONTEXT = "tensorModelParallelSize", "pipelineModelParallelSize", "contextParallelSize"
EXPERT_TENSOR, EXPERT = "expertTensorParallelSize", "expertModelParallelSize"
LORA_FIELDS = ("loraRank", "loraAlpha", "loraDropout", "targetModules", "useRslora")
RESERVED = ", ".join(f"'{name}'" for name in sorted(names.GANG_ENVIRONMENT))
RESERVED_PREFIXES = " && ".join(f"!self.name.startsWith('{prefix}')" for prefix in names.GANG_PREFIXES)

RESOURCE = f"self.?accelerator.?resourceName.orValue('{DEFAULT_RESOURCE}')"

DATA_PARALLEL = " / ".join((WORLD, *(f"self.parallelism.{name}" for name in (TENSOR, PIPELINE, CONTEXT))))
ALL_WRITTEN = " && ".join(("has(self.training.microBatchSize)", *(f"has(self.parallelism.{name})" for name in (TENSOR, PIPELINE, CONTEXT))))

ACROSS_SECTIONS = (
    Rule(
        f"{WORLD} % ({_product(TENSOR, PIPELINE, CONTEXT)}) == 0",
        "nodes.count × nodes.processesPerNode must be a multiple of tensorModelParallelSize × pipelineModelParallelSize × contextParallelSize",
        "parallelism",
    ),
    Rule(
        f"{WORLD} % ({_product(EXPERT_TENSOR, EXPERT, PIPELINE)}) == 0",
        "nodes.count × nodes.processesPerNode must be a multiple of expertTensorParallelSize × expertModelParallelSize × pipelineModelParallelSize",
        "parallelism",
    ),
    Rule(
        f"!({ALL_WRITTEN}) || {DATA_PARALLEL} == 0 || self.training.globalBatchSize % (self.training.microBatchSize * ({DATA_PARALLEL})) == 0",
        "globalBatchSize must be a multiple of microBatchSize × data-parallel size, which is nodes.count × nodes.processesPerNode over the tensor, pipeline and context sizes",
        "training.globalBatchSize",
    ),
    Rule(
        "self.runPolicy.progressDeadlineSeconds > self.parallelism.ddpTimeout",
        "runPolicy.progressDeadlineSeconds must be more than parallelism.ddpTimeout",
        "runPolicy.progressDeadlineSeconds",
    ),
    Rule(
        "self.nodes.count == 1 || !has(self.volumes.work) || !has(self.volumes.work.volumeClaimTemplate)"
        " || (has(self.volumes.work.volumeClaimTemplate.spec.accessModes) && 'ReadWriteMany' in self.volumes.work.volumeClaimTemplate.spec.accessModes)",
        "volumeClaimTemplate.spec.accessModes must have ReadWriteMany, because nodes.count is above 1",
        "volumes.work.volumeClaimTemplate.spec.accessModes",
    ),
    Rule(
        "self.tuning.tunerType != 'full' || !has(self.output.formats) || !('peft' in self.output.formats)",
        "output.formats has peft, which needs tuning.tunerType lora",
        "output.formats",
    ),
)
"""Of `spec`; in the order of `schema.RULES`."""


def _at_most_lr(name: str, unless: str) -> Rule:
    return Rule(f"{unless} || !has(self.lr) || self.{name} <= self.lr", f"{name} must be at most lr", name)


WITHIN_SECTIONS: dict[type[Contract], tuple[Rule, ...]] = {
    DataConfig: (
        Rule(
            "!has(self.interleaveProb) || size(self.interleaveProb) == size(self.dataset)",
            "interleaveProb must have one value for each data set of dataset",
            "interleaveProb",
        ),
    ),
    TuningConfig: tuple(Rule(f"self.tunerType != 'full' || !has(self.{name})", f"{name} needs tunerType lora (found full)", name) for name in LORA_FIELDS),
    ParallelismConfig: (
        Rule(
            "!self.?overlapParamGather.orValue(false) || (self.overlapGradReduce && self.useDistributedOptimizer)",
            "overlapParamGather needs overlapGradReduce and useDistributedOptimizer",
            "overlapParamGather",
        ),
    ),
    TrainingConfig: (
        Rule(
            "!has(self.recomputeMethod) || self.?recomputeGranularity.orValue('') == 'full'",
            "recomputeMethod needs recomputeGranularity full",
            "recomputeMethod",
        ),
        Rule(
            "!has(self.recomputeNumLayers) || self.?recomputeGranularity.orValue('full') == 'full'",
            "recomputeNumLayers needs recomputeGranularity full",
            "recomputeNumLayers",
        ),
        Rule(
            "!has(self.recomputeModules) || self.?recomputeGranularity.orValue('selective') == 'selective'",
            "recomputeModules needs recomputeGranularity selective",
            "recomputeModules",
        ),
        _at_most_lr("minLr", "!has(self.minLr)"),
        _at_most_lr("lrWarmupInit", "self.lrWarmupInit == 0.0"),
        Rule(
            "!has(self.lrWarmupFraction) || self.lrWarmupFraction < 1.0", "lrWarmupFraction must be less than 1, so that the rate can decay", "lrWarmupFraction"
        ),
        Rule(
            "has(self.lrWarmupFraction) || !has(self.lrDecayIters) || self.lrWarmupIters < self.lrDecayIters",
            "lrWarmupIters must be less than lrDecayIters",
            "lrWarmupIters",
        ),
    ),
    Accelerator: (Rule("self.type != 'CPU' || !has(self.resourceName)", "resourceName needs type GPU (found CPU)", "resourceName"),),
    EnvVar: (
        Rule(
            f"!(self.name in [{RESERVED}]) && {RESERVED_PREFIXES}",
            "name is one that the gang itself sets (RANK, MASTER_ADDR, PET_*, ...) and cannot be given",
            "name",
        ),
        Rule("!has(self.value) || !has(self.valueFrom)", "value and valueFrom are both set; give one of them", "valueFrom"),
    ),
    Nodes: (
        Rule(
            f"self.?accelerator.?type.orValue('GPU') == 'CPU' || !({RESOURCE} in self.?resources.?requests.orValue({{}}) || {RESOURCE} in self.?resources.?limits.orValue({{}}))",
            "resources has the resource of the accelerators, which processesPerNode gives: leave it out",
            "resources",
        ),
    ),
    WorkVolume: (Rule("has(self.claimName) != has(self.volumeClaimTemplate)", "exactly one of claimName and volumeClaimTemplate is needed"),),
    FineTuneJob: (
        Rule(
            f"self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= {names.MAX_NAME_LENGTH}",
            f"metadata.name: {names.NAME_RULE}",
        ),
    ),
}
"""By the object that they are about."""

MUTABLE = ("suspend", "run_policy")
MUTABLE_WHILE_SUSPENDED = ("node_selector", "tolerations")


def of(model: type[Contract]) -> tuple[Rule, ...]:
    """The rules of one object."""
    if model is Spec:
        return (*ACROSS_SECTIONS, *changes())
    return WITHIN_SECTIONS.get(model, ())


def changes() -> Iterator[Rule]:
    """The rules over a change of `spec`: one for each field that stays, so that the message names it."""
    for name, field in Spec.model_fields.items():
        if name == "nodes":
            yield from _changes_of_nodes()
        elif name not in MUTABLE:
            yield Rule(_unchanged(f"{field.alias}"), f"{field.alias} cannot be changed; {ANEW}", field.alias)


ANEW = "only suspend, runPolicy and, while suspended, nodes.nodeSelector and nodes.tolerations can: make a job of another name"


def _changes_of_nodes() -> Iterator[Rule]:
    for name, field in Nodes.model_fields.items():
        path = f"nodes.{field.alias}"
        if name in MUTABLE_WHILE_SUSPENDED:
            yield Rule(
                f"self.suspend || oldSelf.suspend || {_unchanged(path)}",
                f"{path} can be changed only while the job is suspended: set suspend to true first",
                path,
            )
        else:
            yield Rule(_unchanged(path), f"{path} cannot be changed; {ANEW}", path)


def _unchanged(path: str) -> str:
    """CEL: a field is what it was; that of an optional one which was added or taken away too is seen."""
    return f"has(self.{path}) == has(oldSelf.{path}) && (!has(self.{path}) || self.{path} == oldSelf.{path})"
