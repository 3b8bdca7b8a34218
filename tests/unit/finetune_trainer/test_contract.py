"""What the operator and the trainer promise each other."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_trainer import contract
from finetune_trainer.contract import (
    EXITS,
    Artifact,
    ConfigurationError,
    Contract,
    CurvePoint,
    EngineError,
    FailureReport,
    Reason,
    RunConfig,
    RunReport,
    describe_errors,
    exit_for,
    exit_of,
    format_duration,
)

SMALLEST: dict[str, Any] = {"model": {"source": "m"}, "data": {"dataset": ["d"]}, "run": {"outputDir": "/results"}}
MODELS = [item for item in vars(contract).values() if isinstance(item, type) and issubclass(item, Contract) and item is not Contract]
OPTIONS = [model for model in MODELS if model.__name__.endswith("Config") and model is not RunConfig]
NOW = datetime(2026, 1, 2, tzinfo=UTC)


def make(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({section: {**SMALLEST.get(section, {}), **sections.get(section, {})} for section in {**SMALLEST, **sections}})


def problems(value: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(value)
    return describe_errors(caught.value)


# RunConfig


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    config = make(training={"lr": 1e-4, "micro_batch_size": 2}, tuning={"target_modules": ["linear_qkv"]}, data={"system": "Ünïcode\n"})
    file = tmp_path / "run.json"
    file.write_text(config.dump(), encoding="utf-8")
    assert RunConfig.load(file) == config
    assert json.loads(config.dump())["training"]["microBatchSize"] == 2


def test_names_are_read_in_both_cases() -> None:
    assert make(training={"micro_batch_size": 2}) == make(training={"microBatchSize": 2})


def test_an_unknown_field_is_refused_with_the_nearest_name() -> None:
    assert problems({**SMALLEST, "training": {"microBatchSiz": 1}}) == ["training: unknown field 'microBatchSiz'; did you mean 'microBatchSize'?"]
    assert problems({**SMALLEST, "modle": {}}) == ["unknown field 'modle'; did you mean 'model'?"]
    assert problems({**SMALLEST, "tuning": {"xyzzy": 1}}) == ["tuning: unknown field 'xyzzy'"]


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("training", {"lr": 0}, "training.lr: Input should be greater than 0 (found 0)"),
        ("training", {"lr": float("nan")}, "training.lr: Input should be a finite number (found nan)"),
        ("training", {"globalBatchSize": 2.5}, "training.globalBatchSize: Input should be a valid integer, got a number with a fractional part (found 2.5)"),
        ("parallelism", {"tensorModelParallelSize": 0}, "parallelism.tensorModelParallelSize: Input should be greater than or equal to 1 (found 0)"),
        ("data", {"dataset": []}, "data.dataset: List should have at least 1 item after validation, not 0 (found [])"),
        (
            "data",
            {"dataset": ["d"], "modelName": ["a", "b", "c"]},
            "data.modelName: List should have at most 2 items after validation, not 3 (found ['a', 'b', 'c'])",
        ),
        ("tuning", {"tunerType": "dora"}, "tuning.tunerType: Input should be 'lora' or 'full' (found 'dora')"),
        ("tuning", {"tunerType": "full", "loraRank": 8}, "tuning: loraRank is set; it needs tunerType lora (found full)"),
        ("training", {"recomputeMethod": "uniform"}, "training: recomputeMethod is uniform; it needs recomputeGranularity full (found None)"),
        ("model", {}, "model.source: Field required"),
        ("version", "v1", "version: Input should be 'v1alpha1' (found 'v1')"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(section: str, values: Any, message: str) -> None:
    assert problems({**SMALLEST, section: values}) == [message]


def test_a_file_that_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    with pytest.raises(ConfigurationError, match=r"cannot read the run's configuration: .*run\.json"):
        RunConfig.load(file)
    file.write_text("{")
    with pytest.raises(ConfigurationError, match=r"run\.json: Invalid JSON"):
        RunConfig.load(file)
    file.write_text(json.dumps({**SMALLEST, "training": {"lr": -1}}))
    with pytest.raises(ConfigurationError, match=r"run\.json: training\.lr: Input should be greater than 0 \(found -1\)"):
        RunConfig.load(file)


@pytest.mark.parametrize("model", OPTIONS, ids=lambda model: str(model.__name__))
def test_every_option_is_described_and_bounded(model: type[Contract]) -> None:
    properties = model.model_json_schema()["properties"]
    for name, whole in properties.items():
        assert whole.get("description"), name
        branches = [branch for branch in whole.get("anyOf", [whole]) if branch.get("type") != "null"]
        for branch in branches:
            assert branch["type"] != "array" or "maxItems" in branch, f"{name} has no longest list"
            item = branch.get("items", branch)
            assert item["type"] != "string" or "maxLength" in item or "enum" in item, f"{name} has no longest text"
            assert item["type"] not in ("integer", "number") or {"minimum", "exclusiveMinimum"} & set(item), f"{name} has no lower bound"


# Identity


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"source": "other"}},
        {"model": {"revision": "v2"}},
        {"data": {"dataset": ["d#5"]}},
        {"data": {"max_length": 5}},
        {"tuning": {"lora_rank": 4}},
        {"training": {"lr": 1e-3}},
        {"training": {"global_batch_size": 8}},
        {"training": {"seed": 1}},
        {"run": {"uid": "u"}},
    ],
)
def test_identity_changes_with_what_decides_the_result(change: dict[str, dict[str, Any]]) -> None:
    assert make(**change).identity() != make().identity()


@pytest.mark.parametrize(
    "change",
    [
        {"parallelism": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
        {"training": {"micro_batch_size": 4}},
        {"training": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}},
        {"training": {"logging_steps": 1}},
        {"checkpoints": {"resume": "never", "save_steps": 5}},
        {"output": {"formats": ["megatron"]}},
        {"run": {"outputDir": "/elsewhere", "attempt": 2}},
        {"data": {"dataset_num_proc": 8}},
    ],
)
def test_identity_stays_with_what_only_decides_how(change: dict[str, dict[str, Any]]) -> None:
    assert make(**change).identity() == make().identity()


# Exit codes


def test_every_reason_has_one_exit_code_and_every_error_class_a_reason() -> None:
    assert [row.reason for row in EXITS].count(Reason.HANG) == 1
    assert {row.reason for row in EXITS} == set(Reason)
    assert len({row.code for row in EXITS}) == len(EXITS)
    raised = {error.reason for error in EngineError.__subclasses__() if error.__module__ == EngineError.__module__}
    assert set(Reason) - raised == {Reason.HANG, Reason.INTERNAL}


def test_exit_codes_are_the_documented_ones() -> None:
    codes = {row.reason.value: (row.code, row.consequence.value) for row in EXITS}
    permanent = {"Configuration": 10, "Data": 11, "Model": 12, "Verification": 13, "Numeric": 14, "OutOfMemory": 15}
    assert codes == {
        **{reason: (code, "permanent") for reason, code in permanent.items()},
        **{reason: (code, "retry") for reason, code in {"Internal": 1, "Distributed": 20, "Hang": 21}.items()},
        "Preempted": (143, "uncounted"),
    }


def test_a_code_of_no_row_is_internal() -> None:
    assert exit_of(139).reason is Reason.INTERNAL
    assert exit_of(exit_for(Reason.DATA).code).reason is Reason.DATA


# Reports


def report(message: str, **values: Any) -> RunReport:
    failure = FailureReport(reason=Reason.OUT_OF_MEMORY, message=message, rank=3, node="node-1", exit_code=15)
    common = {"name": "n", "namespace": "ns", "uid": "u", "attempt": 1, "identity": "0123456789abcdef", "succeeded": False}
    return RunReport(**common, failure=failure, start_time=NOW, completion_time=NOW, **values)


@pytest.mark.parametrize("message", ["short", "x" * 10_000, "记" * 10_000, '"\\\n' * 3_000], ids=["short", "long", "wide", "escaped"])
def test_the_summary_fits_and_keeps_the_reason(message: str) -> None:
    curve = [CurvePoint(step=step, loss=1.0, learning_rate=1e-4, gradient_norm=1.0, tokens=10, seconds=1.0) for step in range(1000)]
    artifact = Artifact(format="peft", path="/work/" + "p" * 3000, sha256="0" * 64)
    text = report(message, curve=curve, artifacts=[artifact]).summary()
    assert len(text.encode()) <= 4096
    summary = json.loads(text)
    assert summary["failure"]["reason"] == "OutOfMemory"
    assert summary["failure"]["message"][:5] == message[:5]
    assert "curve" not in summary


def test_a_short_summary_is_whole() -> None:
    whole = report("short", rows={"read": 5}, resolved={"training.lr": 1e-4})
    assert json.loads(whole.summary()) == json.loads(whole.model_dump_json(by_alias=True, exclude={"curve", "notes", "versions"}, exclude_none=True))


def test_numbers_that_are_not_json_are_refused() -> None:
    with pytest.raises(ValidationError, match="finite number"):
        CurvePoint(step=1, loss=float("inf"), learning_rate=1e-4, gradient_norm=1.0, tokens=1, seconds=1.0)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (31.2, "31s"), (250, "4m10s"), (3599.6, "1h00m"), (7500, "2h05m")])
def test_durations_are_printed_for_reading(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
