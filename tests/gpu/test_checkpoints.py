"""Checkpoints and results made on GPUs: resumed on another layout, on other layers and on a CPU; loaded by transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import Preempted
from gang import Gang
from gpu_runs import Verified, export_megatron, train, train_and_verify
from small_runs import Job, Outcome

SAME = 5e-5
FULL: dict[str, Any] = {"tunerType": "full", "loraDropout": None}
TUNINGS: dict[str, dict[str, Any]] = {"lora": {}, "full": FULL}
RATES: dict[str, float] = {"lora": 5e-3, "full": 1e-3}
TP2 = {"tensorModelParallelSize": 2, "sequenceParallel": True}
PP2 = {"tensorModelParallelSize": 1, "pipelineModelParallelSize": 2}
DP2 = {"tensorModelParallelSize": 1}
LAYERS: dict[str, dict[str, Any]] = {"transformer-engine": {}, "local": {"attentionBackend": "local"}}
Models = dict[tuple[str, str], Path]
Note = Callable[..., None]


def job_of(tuner: str, models: Models, rows: Path, output: Path, **sections: Any) -> Job:
    training = {"lr": RATES[tuner], "recomputeGranularity": "none", **sections.pop("training", {})}
    return Job(models["qwen3", "float32"], rows, output, tuning=TUNINGS[tuner], training=training, **sections)


def stop_after_three_steps(gang: Gang, job: Job) -> None:
    with pytest.raises(Preempted, match="has saved step 3 of 6"):
        gang.run(train, replace(job, stop_at=3))


@pytest.fixture(scope="module")
def uninterrupted(models: Models, rows: Path, gpu1: Gang, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return {tuner: gpu1.run(train, job_of(tuner, models, rows, tmp_path_factory.mktemp(tuner)))[0] for tuner in TUNINGS}


def check_resumed(outcomes: list[Outcome], expected: Outcome, note: Note) -> None:
    note(largest_difference=max(abs(a - b) for a, b in zip(outcomes[0].losses, expected.losses, strict=True)))
    for outcome in outcomes:
        assert outcome.resumed_from == 3
        assert outcome.losses == pytest.approx(expected.losses, abs=SAME)


@pytest.mark.gpu2
@pytest.mark.parametrize(("before", "after"), [(TP2, DP2), (DP2, PP2), (PP2, TP2)], ids=["tp2-to-dp2", "dp2-to-pp2", "pp2-to-tp2"])
@pytest.mark.parametrize("tuner", TUNINGS)
def test_a_run_goes_on_on_another_layout(
    tuner: str, before: Any, after: Any, models: Models, rows: Path, gpu2: Gang, uninterrupted: Any, tmp_path: Path, note: Note
) -> None:
    stop_after_three_steps(gpu2, job_of(tuner, models, rows, tmp_path, parallelism=before))
    check_resumed(gpu2.run(train, job_of(tuner, models, rows, tmp_path, parallelism=after)), uninterrupted[tuner], note)


@pytest.mark.one_gpu
@pytest.mark.parametrize(("before", "after"), [("transformer-engine", "local"), ("local", "transformer-engine")])
@pytest.mark.parametrize("tuner", TUNINGS)
def test_a_run_goes_on_on_other_layers(
    tuner: str, before: str, after: str, models: Models, rows: Path, gpu1: Gang, uninterrupted: Any, tmp_path: Path, note: Note
) -> None:
    stop_after_three_steps(gpu1, job_of(tuner, models, rows, tmp_path, training=LAYERS[before]))
    check_resumed(gpu1.run(train, job_of(tuner, models, rows, tmp_path, training=LAYERS[after])), uninterrupted[tuner], note)


@pytest.mark.one_gpu
@pytest.mark.parametrize("tuner", TUNINGS)
def test_a_run_goes_on_and_exports_on_a_cpu(
    tuner: str, models: Models, rows: Path, gpu1: Gang, cpu1: Gang, uninterrupted: Any, tmp_path: Path, note: Note
) -> None:
    job = job_of(tuner, models, rows, tmp_path / "run")
    stop_after_three_steps(gpu1, job)
    formats = ["huggingface", "peft"] if tuner == "lora" else ["huggingface"]
    (found,) = cpu1.run(train_and_verify, job, tmp_path / "results", formats, "Logits")
    check_resumed([found.outcome], uninterrupted[tuner], note)
    assert found.verification.passed, found.verification.message


@pytest.mark.one_gpu
@pytest.mark.parametrize(("before", "after"), [("transformer-engine", "local"), ("local", "transformer-engine")])
@pytest.mark.parametrize("tuner", TUNINGS)
def test_the_megatron_format_of_one_kind_of_layers_is_read_by_the_other(
    tuner: str, before: str, after: str, models: Models, rows: Path, gpu1: Gang, cpu1: Gang, tmp_path: Path
) -> None:
    written, read = (job_of(tuner, models, rows, tmp_path / "run", training={"trainIters": 3, **LAYERS[layers]}) for layers in (before, after))
    assert gpu1.run(export_megatron, written, tmp_path / "megatron", write=True) == [[]]
    assert gpu1.run(export_megatron, read, tmp_path / "megatron", write=False) == [[]]
    if tuner == "full":  # merging is arithmetic: a CPU's products of adapters differ from a GPU's in the last bit
        assert cpu1.run(export_megatron, read, tmp_path / "megatron", write=False) == [[]]


RESULTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama-float32-pp2": ("llama", "float32", PP2, {}),
    "qwen2-bfloat16-tp2-sp": ("qwen2", "bfloat16", TP2, {}),
    "qwen3-bfloat16-dp2-flash": ("qwen3", "bfloat16", DP2, {"attentionBackend": "flash"}),
}


def check_verified(results: list[Verified], note: Note) -> None:
    for result in results:
        assert result.verification.passed, result.verification.message
        note(largest_logit_difference=result.verification.max_logit_difference)


@pytest.mark.gpu2
@pytest.mark.parametrize("name", RESULTS)
def test_results_of_two_gpus_are_what_transformers_and_peft_load(name: str, models: Models, rows: Path, gpu2: Gang, tmp_path: Path, note: Note) -> None:
    family, dtype, parallelism, training = RESULTS[name]
    job = Job(models[family, dtype], rows, tmp_path / "run", parallelism=parallelism, training=training, dtype=dtype)
    check_verified(gpu2.run(train_and_verify, job, tmp_path, ["peft", "huggingface", "megatron"], "Logits"), note)


@pytest.mark.one_gpu
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_results_of_one_gpu_are_what_transformers_and_peft_load(family: str, models: Models, rows: Path, gpu1: Gang, tmp_path: Path, note: Note) -> None:
    job = Job(models[family, "bfloat16"], rows, tmp_path / "run", dtype="bfloat16")
    check_verified(gpu1.run(train_and_verify, job, tmp_path, ["peft", "huggingface", "megatron"], "Logits"), note)


@pytest.mark.one_gpu
def test_a_fully_trained_model_is_what_transformers_loads(models: Models, rows: Path, gpu1: Gang, tmp_path: Path, note: Note) -> None:
    job = Job(models["qwen3", "float32"], rows, tmp_path / "run", tuning=FULL, training={"lr": 1e-3})
    check_verified(gpu1.run(train_and_verify, job, tmp_path, ["huggingface", "megatron"], "Logits"), note)
