"""The FineTuneJob: what is accepted, and the sentence for what is not."""

from __future__ import annotations

from typing import Any

import pytest

from bad_specs import BAD_NAMES, BAD_SPECS, BadSpec
from finetune_operator import cel, names, schema
from finetune_operator.problems import InvalidJob
from finetune_operator.schema import RULES, FineTuneJob, Spec
from jobs import job_value, make_job

WITHIN_ONE_SECTION = {
    "_probabilities_match",
    "_rates_are_at_most_the_highest",
    "_warmup_ends",
    "_recomputation_is_of_its_kind",
    "_gathering_has_its_parts",
    "_accelerators_are_given_once",
}


def problems_of(value: Any) -> list[str]:
    with pytest.raises(InvalidJob) as error:
        schema.parse(value)
    return [str(problem) for problem in error.value.problems]


def test_defaults_are_those_of_the_api() -> None:
    spec = make_job().spec
    assert spec.suspend is False
    assert (spec.nodes.count, spec.nodes.processes_per_node, spec.nodes.accelerator.type, spec.nodes.accelerator.resource_name) == (1, 1, "GPU", None)
    policy = spec.run_policy
    assert (policy.backoff_limit, policy.node_lost_seconds, policy.progress_deadline_seconds, policy.clean_pod_policy) == (3, 300, 1800, "None")
    assert policy.active_deadline_seconds is None
    assert spec.volumes.persistent_volume_claim_retention_policy.when_deleted == "Retain"
    assert (spec.tuning.tuner_type, spec.checkpoints.resume, spec.output.verification, spec.training.global_batch_size) == ("lora", "auto", "Adapter", 16)
    assert spec.training.lr is None
    assert spec.tuning.lora_rank is None
    assert spec.parallelism.tensor_model_parallel_size is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"modle": {}}, "spec.modle: unknown field; did you mean 'model'?"),
    ({"training": {"learningRate": 1}}, "spec.training.learningRate: unknown field"),
    ({"training": {"global_batch_size": 8}}, "spec.training.global_batch_size: unknown field; did you mean 'globalBatchSize'?"),
    ({"training": {"microBatchSize": "8"}}, 'spec.training.microBatchSize: it must be a valid integer (found "8")'),
    ({"training": {"lr": -1}}, "spec.training.lr: it must be greater than 0 (found -1)"),
    ({"training": {"recomputeMethod": "uniform"}}, "spec.training: recomputeMethod is uniform; it needs recomputeGranularity full (found None)"),
    ({"tuning": {"tunerType": "full", "loraRank": 8}}, "spec.tuning: loraRank is set; it needs tunerType lora (found full)"),
    ({"model": {}}, "spec.model.source: it is required"),
    ({"nodes": {"accelerator": {"type": "CPU", "resourceName": "x.y/z"}}}, "spec.nodes.accelerator.resourceName: x.y/z is set; it needs type GPU (found CPU)"),
    ({"nodes": {"env": [{"name": "A"}, {"name": "RANK", "value": "1"}]}}, "spec.nodes.env[1].name: RANK is set by the gang itself and cannot be given"),
    (
        {"nodes": {"env": [{"name": "PET_RDZV_BACKEND", "value": "c10d"}]}},
        "spec.nodes.env[0].name: PET_RDZV_BACKEND is set by the gang itself and cannot be given",
    ),
    ({"nodes": {"env": [{"name": "A", "value": 1}]}}, "spec.nodes.env[0].value: it must be a valid string (found 1); put it in quotes"),
    ({"nodes": {"env": [{"name": "A"}, {"name": "A"}]}}, "spec.nodes.env[1].name: A is given twice"),
    ({"nodes": {"env": [{"name": "a b"}]}}, "spec.nodes.env[0].name: 'a b' is not a name of an environment variable"),
    ({"nodes": {"env": [{"name": "A", "value": "1", "valueFrom": {}}]}}, "spec.nodes.env[0].valueFrom: value is set too; give one of them"),
    ({"nodes": {"sharedMemory": "16GB"}}, 'spec.nodes.sharedMemory: "16GB" is not a Kubernetes quantity such as 500m, 8 or 64Gi'),
    ({"nodes": {"resources": {"limits": {"cpu": 0.5}}}}, "spec.nodes.resources.limits.cpu: 0.5 is not a whole number; put it in quotes"),
    ({"nodes": {"count": 0}}, "spec.nodes.count: it must be greater than or equal to 1 (found 0)"),
    ({"volumes": {"work": {}}}, "spec.volumes.work: exactly one of claimName and volumeClaimTemplate is needed (found neither)"),
    (
        {"volumes": {"work": {"claimName": "a", "volumeClaimTemplate": {"spec": {}}}}},
        "spec.volumes.work: exactly one of claimName and volumeClaimTemplate is needed (found both)",
    ),
    ({"volumes": {"cache": {"volumeClaimTemplate": {}}}}, "spec.volumes.cache.volumeClaimTemplate: unknown field"),
    (
        {"nodes": {"count": 2}, "volumes": {"work": {"volumeClaimTemplate": {"spec": {"accessModes": ["ReadWriteOnce"]}}}}},
        "spec.volumes.work.volumeClaimTemplate.spec.accessModes: it must have ReadWriteMany, because nodes.count is 2 (found ['ReadWriteOnce'])",
    ),
    (
        {"nodes": {"count": 3}, "parallelism": {"tensorModelParallelSize": 2}},
        "spec.parallelism: nodes.count × nodes.processesPerNode is 3; it must be a multiple of tensorModelParallelSize × pipelineModelParallelSize × contextParallelSize (2)",
    ),
    (
        {"nodes": {"count": 2}, "parallelism": {"expertModelParallelSize": 4}},
        "spec.parallelism: nodes.count × nodes.processesPerNode is 2; it must be a multiple of expertTensorParallelSize × expertModelParallelSize × pipelineModelParallelSize (4)",
    ),
    (
        {
            "nodes": {"count": 2, "processesPerNode": 2},
            "parallelism": {"tensorModelParallelSize": 2, "pipelineModelParallelSize": 1, "contextParallelSize": 1},
            "training": {"globalBatchSize": 16, "microBatchSize": 3},
        },
        "spec.training.globalBatchSize: it is 16; it must be a multiple of microBatchSize × data-parallel size (3 × 2)",
    ),
    (
        {"data": {"dataset": ["a", "b"], "interleaveProb": [1.0]}},
        "spec.data.interleaveProb: it has 1 values; it must have one for each of the 2 data sets",
    ),
    (
        {"runPolicy": {"progressDeadlineSeconds": 600}},
        "spec.runPolicy.progressDeadlineSeconds: it is 600; it must be more than parallelism.ddpTimeout (600)",
    ),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=[message.split(":")[0] + f"-{index}" for index, (_, message) in enumerate(REFUSED)])
def test_wrong_spec_is_refused_with_its_field(sections: dict[str, Any], message: str) -> None:
    assert message in problems_of(job_value(**sections))


@pytest.mark.parametrize("bad", BAD_SPECS.values(), ids=BAD_SPECS)
def test_what_the_api_server_refuses_is_refused_here_with_the_same_field(bad: BadSpec) -> None:
    assert bad.leaf in "\n".join(problems_of(job_value(**bad.sections)))


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_the_api_server_refuses_are_refused_here(name: str) -> None:
    value = job_value()
    value["metadata"]["name"] = name
    assert names.NAME_RULE in "".join(problems_of(value))


def test_every_rule_of_the_api_server_refuses_something() -> None:
    rules = [rule for model in (Spec, *cel.WITHIN_SECTIONS) if model is not FineTuneJob for rule in cel.of(model)]
    told = {bad.says for bad in BAD_SPECS.values()}
    assert [
        rule.message
        for rule in rules
        if "cannot be changed" not in rule.message and "can be changed only" not in rule.message and not any(says in rule.message for says in told)
    ] == []


def test_as_many_rules_cross_sections_here_as_there() -> None:
    crossing_here = len(RULES) - len(WITHIN_ONE_SECTION)
    assert crossing_here == len(cel.ACROSS_SECTIONS) - 1, "the two rules over sizes are one function here"


def test_a_batch_with_open_sizes_is_the_trainers_to_judge() -> None:
    job = make_job(training={"globalBatchSize": 16, "microBatchSize": 3}, parallelism={"tensorModelParallelSize": 1})
    assert job.spec.training.micro_batch_size == 3


def test_every_wrong_field_is_named_at_once() -> None:
    found = problems_of(job_value(training={"lr": 0, "microBatchSize": 0}, nodes={"count": "2"}))
    assert [problem.split(":")[0] for problem in found] == ["spec.training.microBatchSize", "spec.training.lr", "spec.nodes.count"]


@pytest.mark.parametrize("name", ["7b-sft", "Job", "a_b", "a.b", "job-", "", "a" * 53, "../../etc", "a\n"])
def test_name_that_cannot_be_a_service_is_refused(name: str) -> None:
    value = job_value()
    value["metadata"]["name"] = name
    (problem,) = problems_of(value)
    assert problem.startswith("metadata.name: ")
    assert "it must begin with a lower-case letter" in problem


def test_name_of_52_characters_is_accepted() -> None:
    value = job_value()
    value["metadata"]["name"] = "a" * 52
    assert schema.parse(value).name == "a" * 52


def test_namespace_that_would_leave_the_work_folder_is_refused() -> None:
    value = job_value()
    value["metadata"]["namespace"] = "../../root"
    assert problems_of(value) == ["metadata.namespace: '../../root' is not a namespace; lower-case letters, digits and `-`, at most 63"]


def test_missing_name_is_refused() -> None:
    value = job_value()
    value["metadata"] = {"generateName": "x-"}
    assert problems_of(value) == ["metadata.name: a name is required"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "a FineTuneJob is a mapping that begins with apiVersion: finetune.mcore.dev/v1alpha1 and kind: FineTuneJob"),
        ({"kind": "FineTuneJob"}, "apiVersion: it must be finetune.mcore.dev/v1alpha1 (found nothing)"),
        ({"apiVersion": "finetune.mcore.dev/v1alpha1", "kind": "Job"}, "kind: it must be FineTuneJob (found Job)"),
    ],
)
def test_another_kind_is_refused(value: Any, message: str) -> None:
    assert problems_of(value) == [message]


def test_a_job_that_the_api_server_gives_back_is_accepted() -> None:
    value = job_value()
    value["metadata"] |= {
        "uid": "u",
        "resourceVersion": "1",
        "generation": 2,
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "managedFields": [{"manager": "kubectl"}],
    }
    value["status"] = {"phase": "Running"}
    assert schema.parse(value).status == {"phase": "Running"}
