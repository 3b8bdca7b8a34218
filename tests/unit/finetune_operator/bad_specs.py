"""Specs that are refused, each by two judges: the API server (types, bounds and CEL of the CRD) and the operator's own schema. One table for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BadSpec:
    """``sections`` of a spec that are wrong; ``field``: the API server begins its sentence with it; ``says``: what stands in that sentence."""

    sections: dict[str, Any]
    field: str
    says: str
    name: str = ""
    """The field's name as the operator's own sentence has it; empty: the last part of ``field``."""

    @property
    def leaf(self) -> str:
        return self.name or self.field.rsplit(".", 1)[-1].split("[")[0]


TEMPLATE_RWO = {"work": {"volumeClaimTemplate": {"spec": {"accessModes": ["ReadWriteOnce"]}}}}
FOUR = {"count": 2, "processesPerNode": 2}
ALL_ONE = {"tensorModelParallelSize": 1, "pipelineModelParallelSize": 1, "contextParallelSize": 1}

BAD_SPECS: dict[str, BadSpec] = {
    # types, choices, bounds
    "no source": BadSpec({"model": {}}, "spec.model.source", "Required value"),
    "no data set": BadSpec({"data": {"dataset": []}}, "spec.data.dataset", "should have at least 1 items"),
    "unknown section": BadSpec({"modle": {}}, "spec.modle", "unknown field"),
    "unknown option": BadSpec({"training": {"learningRate": 1}}, "spec.training.learningRate", "unknown field"),
    "option in snake case": BadSpec({"training": {"global_batch_size": 8}}, "spec.training.global_batch_size", "unknown field"),
    "text for a number": BadSpec({"training": {"microBatchSize": "8"}}, "spec.training.microBatchSize", "must be of type integer"),
    "number for a text": BadSpec({"model": {"source": 7}}, "spec.model.source", "must be of type string"),
    "text for a boolean": BadSpec({"suspend": "yes"}, "spec.suspend", "must be of type boolean"),
    "rate of 0": BadSpec({"training": {"lr": 0}}, "spec.training.lr", "should be greater than 0"),
    "negative rate": BadSpec({"training": {"minLr": -1}}, "spec.training.minLr", "should be greater than or equal to 0"),
    "momentum of 1": BadSpec({"training": {"sgdMomentum": 1}}, "spec.training.sgdMomentum", "should be less than 1"),
    "no nodes": BadSpec({"nodes": {"count": 0}}, "spec.nodes.count", "should be greater than or equal to 1"),
    "too many processes": BadSpec({"nodes": {"processesPerNode": 65}}, "spec.nodes.processesPerNode", "should be less than or equal to 64"),
    "unknown tuner": BadSpec({"tuning": {"tunerType": "longlora"}}, "spec.tuning.tunerType", "Unsupported value"),
    "unknown format": BadSpec({"output": {"formats": ["gguf"]}}, "spec.output.formats[0]", "Unsupported value"),
    "unknown verification": BadSpec({"output": {"verification": "adapter"}}, "spec.output.verification", "Unsupported value"),
    "unknown clean-up": BadSpec({"runPolicy": {"cleanPodPolicy": "Never"}}, "spec.runPolicy.cleanPodPolicy", "Unsupported value"),
    "negative back-off": BadSpec({"runPolicy": {"backoffLimit": -1}}, "spec.runPolicy.backoffLimit", "should be greater than or equal to 0"),
    "unit that Kubernetes lacks": BadSpec({"nodes": {"sharedMemory": "16GB"}}, "spec.nodes.sharedMemory", "should match"),
    "negative quantity": BadSpec(
        {"nodes": {"resources": {"requests": {"cpu": -1}}}}, "spec.nodes.resources.requests.cpu", "should be greater than or equal to 0"
    ),
    "claim with a capital": BadSpec({"volumes": {"work": {"claimName": "Results"}}}, "spec.volumes.work.claimName", "should match"),
    "resource without a name": BadSpec({"nodes": {"resources": {"limits": {"": 1}}}}, "spec.nodes.resources.limits", "a key has 1 to 316 characters"),
    # environment
    "variable of the gang": BadSpec({"nodes": {"env": [{"name": "RANK", "value": "1"}]}}, "spec.nodes.env[0].name", "the gang itself sets"),
    "variable of torchrun": BadSpec({"nodes": {"env": [{"name": "PET_RDZV_BACKEND", "value": "c10d"}]}}, "spec.nodes.env[0].name", "the gang itself sets"),
    "variable twice": BadSpec({"nodes": {"env": [{"name": "A"}, {"name": "A"}]}}, "spec.nodes.env[1]", "Duplicate value"),
    "variable with a blank": BadSpec({"nodes": {"env": [{"name": "a b"}]}}, "spec.nodes.env[0].name", "should match"),
    "variable with two values": BadSpec({"nodes": {"env": [{"name": "A", "value": "1", "valueFrom": {}}]}}, "spec.nodes.env[0].valueFrom", "both set"),
    # rules within a section
    "rank of an adapter that is not there": BadSpec({"tuning": {"tunerType": "full", "loraRank": 8}}, "spec.tuning.loraRank", "needs tunerType lora"),
    "alpha of an adapter that is not there": BadSpec({"tuning": {"tunerType": "full", "loraAlpha": 8}}, "spec.tuning.loraAlpha", "needs tunerType lora"),
    "dropout of an adapter that is not there": BadSpec({"tuning": {"tunerType": "full", "loraDropout": 0}}, "spec.tuning.loraDropout", "needs tunerType lora"),
    "targets of an adapter that is not there": BadSpec(
        {"tuning": {"tunerType": "full", "targetModules": ["all-linear"]}}, "spec.tuning.targetModules", "needs tunerType lora"
    ),
    "scale of an adapter that is not there": BadSpec({"tuning": {"tunerType": "full", "useRslora": False}}, "spec.tuning.useRslora", "needs tunerType lora"),
    "recompute method alone": BadSpec({"training": {"recomputeMethod": "uniform"}}, "spec.training.recomputeMethod", "needs recomputeGranularity full"),
    "recompute method of selective": BadSpec(
        {"training": {"recomputeMethod": "block", "recomputeGranularity": "selective"}}, "spec.training.recomputeMethod", "needs recomputeGranularity full"
    ),
    "layers of selective": BadSpec(
        {"training": {"recomputeNumLayers": 1, "recomputeGranularity": "selective"}}, "spec.training.recomputeNumLayers", "needs recomputeGranularity full"
    ),
    "modules of full": BadSpec(
        {"training": {"recomputeModules": ["mlp"], "recomputeGranularity": "full"}}, "spec.training.recomputeModules", "needs recomputeGranularity selective"
    ),
    "lowest rate above the highest": BadSpec({"training": {"lr": 1e-5, "minLr": 1e-4}}, "spec.training.minLr", "must be at most lr"),
    "first rate above the highest": BadSpec({"training": {"lr": 1e-5, "lrWarmupInit": 1e-4}}, "spec.training.lrWarmupInit", "must be at most lr"),
    "warm-up all along": BadSpec({"training": {"lrWarmupFraction": 1}}, "spec.training.lrWarmupFraction", "must be less than 1"),
    "warm-up beyond the decay": BadSpec(
        {"training": {"lrWarmupIters": 10, "lrDecayIters": 10}}, "spec.training.lrWarmupIters", "must be less than lrDecayIters"
    ),
    "gathering without reducing": BadSpec({"parallelism": {"overlapParamGather": True}}, "spec.parallelism.overlapParamGather", "needs overlapGradReduce"),
    "accelerator of a CPU": BadSpec(
        {"nodes": {"accelerator": {"type": "CPU", "resourceName": "x.y/z"}}}, "spec.nodes.accelerator.resourceName", "needs type GPU"
    ),
    "accelerators twice": BadSpec(
        {"nodes": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}, "spec.nodes.resources", "processesPerNode gives", "nvidia.com/gpu"
    ),
    "no work volume": BadSpec({"volumes": {"work": {}}}, "spec.volumes.work", "exactly one of claimName and volumeClaimTemplate"),
    "two work volumes": BadSpec(
        {"volumes": {"work": {"claimName": "a", "volumeClaimTemplate": {"spec": {}}}}}, "spec.volumes.work", "exactly one of claimName and volumeClaimTemplate"
    ),
    "template for the cache": BadSpec(
        {"volumes": {"cache": {"claimName": "a", "volumeClaimTemplate": {}}}}, "spec.volumes.cache.volumeClaimTemplate", "unknown field"
    ),
    "too few probabilities": BadSpec({"data": {"dataset": ["a", "b"], "interleaveProb": [1.0]}}, "spec.data.interleaveProb", "one value for each data set"),
    # rules across sections
    "tensor size": BadSpec(
        {"nodes": {"count": 3}, "parallelism": {"tensorModelParallelSize": 2}},
        "spec.parallelism",
        "multiple of tensorModelParallelSize",
        "tensorModelParallelSize",
    ),
    "product of sizes": BadSpec(
        {"nodes": FOUR, "parallelism": {"tensorModelParallelSize": 2, "pipelineModelParallelSize": 2, "contextParallelSize": 2}},
        "spec.parallelism",
        "multiple of tensorModelParallelSize",
        "contextParallelSize",
    ),
    "sizes whose product overflows": BadSpec(
        {"parallelism": dict.fromkeys(("tensorModelParallelSize", "pipelineModelParallelSize", "contextParallelSize"), 2**31 - 1)},
        "spec.parallelism",
        "multiple of tensorModelParallelSize",
        "tensorModelParallelSize",
    ),
    "expert sizes": BadSpec(
        {"nodes": {"count": 2}, "parallelism": {"expertModelParallelSize": 4}},
        "spec.parallelism",
        "multiple of expertTensorParallelSize",
        "expertModelParallelSize",
    ),
    "batch": BadSpec(
        {"nodes": FOUR, "parallelism": ALL_ONE, "training": {"globalBatchSize": 16, "microBatchSize": 3}},
        "spec.training.globalBatchSize",
        "multiple of microBatchSize × data-parallel size",
    ),
    "deadline of a hang": BadSpec(
        {"runPolicy": {"progressDeadlineSeconds": 600}}, "spec.runPolicy.progressDeadlineSeconds", "more than parallelism.ddpTimeout"
    ),
    "claim for one node": BadSpec(
        {"nodes": {"count": 2}, "volumes": TEMPLATE_RWO}, "spec.volumes.work.volumeClaimTemplate.spec.accessModes", "must have ReadWriteMany"
    ),
    "claim that does not say": BadSpec(
        {"nodes": {"count": 2}, "volumes": {"work": {"volumeClaimTemplate": {"spec": {}}}}},
        "spec.volumes.work.volumeClaimTemplate.spec.accessModes",
        "ReadWriteMany",
    ),
    "adapter of a full tuning": BadSpec(
        {"tuning": {"tunerType": "full"}, "output": {"formats": ["peft"]}}, "spec.output.formats", "needs tuning.tunerType lora"
    ),
}

BAD_NAMES = ("7b-sft", "a.b", "a" * 53)
"""Kubernetes itself would take these as names of objects."""
