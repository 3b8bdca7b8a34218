"""Training on GPUs: the same losses on every layout, with every kind of recompute, packed or not, and in bfloat16 nearly so.

float32: 5e-5. The layouts add the same numbers in another order (1e-7 each), and Adam's first steps divide a gradient by its own size, so that
differences of small gradients come through. bfloat16: 2e-2, of losses near 6; 2^-8 of a logit and six steps of updates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from factories import make_rows
from finetune_trainer.data import load_tokenizer, open_rows
from gang import Gang
from gpu_runs import PackedJob, train
from small_runs import Job, Outcome, raise_loss_scale

SAME = 5e-5
NEAR = 2e-2
FULL: dict[str, Any] = {"tunerType": "full", "loraDropout": None}
TUNERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("llama", {}, {}),
    "full": ("qwen3", FULL, {"lr": 1e-3}),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensorModelParallelSize": 2},
    "tp2-sp": {"tensorModelParallelSize": 2, "sequenceParallel": True},
    "pp2": {"tensorModelParallelSize": 1, "pipelineModelParallelSize": 2},
    "dp2": {"tensorModelParallelSize": 1},
    "dp2-overlap": {"tensorModelParallelSize": 1, "overlapGradReduce": True, "overlapParamGather": True},
}
OF_FOUR: dict[str, dict[str, Any]] = {
    "tp2-sp-pp2": {"tensorModelParallelSize": 2, "pipelineModelParallelSize": 2, "sequenceParallel": True},
    "tp2-sp-dp2": {"tensorModelParallelSize": 2, "sequenceParallel": True},
    "pp2-dp2": {"tensorModelParallelSize": 1, "pipelineModelParallelSize": 2},
    "dp4": {"tensorModelParallelSize": 1},
}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "selective": {"recomputeGranularity": "selective"},
    "full": {"recomputeGranularity": "full", "recomputeMethod": "uniform", "recomputeNumLayers": 1},
}
FROM_8192 = functools.partial(raise_loss_scale, scale=8192.0)
Models = dict[tuple[str, str], Path]
Note = Callable[..., None]


def job_of(tuner: str, models: Models, rows: Path, output: Path, dtype: str = "float32", **sections: Any) -> Job:
    family, tuning, training = TUNERS[tuner]
    training = {"recomputeGranularity": "none", **training, **sections.pop("training", {})}
    return Job(models[family, dtype], rows, output, tuning=tuning, training=training, dtype=dtype, **sections)


@pytest.fixture(scope="module")
def expected(models: Models, rows: Path, gpu1: Gang, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Outcome]:
    """By tuner and data type: one GPU, nothing recomputed."""
    return {
        (tuner, dtype): gpu1.run(train, job_of(tuner, models, rows, tmp_path_factory.mktemp(tuner), dtype))[0]
        for tuner in TUNERS
        for dtype in ("float32", "bfloat16")
    }


def check(outcomes: list[Outcome], expected: Outcome, tolerance: float, note: Note) -> None:
    assert expected.losses[-1] < expected.losses[0] - 0.1, "it learns"
    note(largest_difference=max(abs(a - b) for outcome in outcomes for a, b in zip(outcome.losses, expected.losses, strict=True)))
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(expected.losses, abs=tolerance)
        assert outcome.norms == pytest.approx(expected.norms, rel=10 * tolerance)
        assert outcome.tokens == expected.tokens


@pytest.mark.gpu2
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tuner", TUNERS)
def test_two_gpus_train_as_one(tuner: str, layout: str, models: Models, rows: Path, gpu2: Gang, expected: Any, tmp_path: Path, note: Note) -> None:
    job = job_of(tuner, models, rows, tmp_path, parallelism=LAYOUTS[layout])
    check(gpu2.run(train, job), expected[tuner, "float32"], SAME, note)


@pytest.mark.gpu2
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "dp2"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_bfloat16_on_two_gpus_is_near(tuner: str, layout: str, models: Models, rows: Path, gpu2: Gang, expected: Any, tmp_path: Path, note: Note) -> None:
    job = job_of(tuner, models, rows, tmp_path, "bfloat16", parallelism=LAYOUTS[layout])
    outcomes = gpu2.run(train, job)
    note(largest_difference=max(abs(a - b) for a, b in zip(outcomes[0].losses, expected[tuner, "bfloat16"].losses, strict=True)))
    assert outcomes[0].losses == pytest.approx(expected[tuner, "bfloat16"].losses, abs=NEAR)


@pytest.mark.gpu4
@pytest.mark.parametrize("layout", OF_FOUR)
@pytest.mark.parametrize("tuner", TUNERS)
def test_four_gpus_train_as_one(tuner: str, layout: str, models: Models, rows: Path, gpu4: Gang, expected: Any, tmp_path: Path, note: Note) -> None:
    check(gpu4.run(train, job_of(tuner, models, rows, tmp_path, parallelism=OF_FOUR[layout])), expected[tuner, "float32"], SAME, note)


@pytest.mark.one_gpu
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("tuner", TUNERS)
def test_recompute_changes_no_loss(tuner: str, recompute: str, models: Models, rows: Path, gpu1: Gang, expected: Any, tmp_path: Path, note: Note) -> None:
    check(gpu1.run(train, job_of(tuner, models, rows, tmp_path, training=RECOMPUTE[recompute])), expected[tuner, "float32"], SAME, note)


@pytest.mark.gpu2
def test_the_reference_jobs_layout_recomputes_in_bfloat16(models: Models, rows: Path, gpu2: Gang, expected: Any, tmp_path: Path, note: Note) -> None:
    job = job_of("lora", models, rows, tmp_path, "bfloat16", parallelism=LAYOUTS["tp2-sp"], training=RECOMPUTE["full"])
    assert gpu2.run(train, job)[0].losses == pytest.approx(expected["lora", "bfloat16"].losses, abs=NEAR)


@pytest.mark.one_gpu
def test_bfloat16_follows_float32(models: Models, rows: Path, gpu1: Gang, expected: Any, tmp_path: Path) -> None:
    exact = job_of("lora", models, rows, tmp_path)
    losses = gpu1.run(train, replace(exact, model=models["llama", "bfloat16"]))[0].losses  # the same weights, computed in float32
    assert expected["lora", "bfloat16"].losses == pytest.approx(losses, abs=NEAR)


@pytest.mark.one_gpu
@pytest.mark.parametrize("tuner", TUNERS)
def test_float16_follows_float32(tuner: str, models: Models, rows: Path, gpu1: Gang, expected: Any, tmp_path: Path, note: Note) -> None:
    """The weights of float32 rounded to float16; its loss scale is part of the loss's own kernel."""
    exact = job_of(tuner, models, rows, tmp_path)
    outcome = gpu1.run(train, replace(exact, dtype="float16"))[0]
    note(largest_difference=max(abs(a - b) for a, b in zip(outcome.losses, expected[tuner, "float32"].losses, strict=True)))
    assert outcome.losses == pytest.approx(expected[tuner, "float32"].losses, abs=NEAR)
    assert outcome.norms == pytest.approx(expected[tuner, "float32"].norms, rel=NEAR)
    assert not [sentence for sentence in outcome.notes if "changed nothing" in sentence]


@pytest.mark.one_gpu
def test_a_run_learns_though_its_first_steps_overflow_float16(models: Models, rows: Path, gpu1: Gang, tmp_path: Path, note: Note) -> None:
    """With a loss scale to begin with that is too large."""
    outcome = gpu1.run(train, replace(job_of("full", models, rows, tmp_path), dtype="float16"), FROM_8192)[0]
    overflows = [sentence for sentence in outcome.notes if "changed nothing: its gradients exceeded float16's range" in sentence]
    note(overflows=overflows, losses=outcome.losses)
    assert 1 <= len(overflows) <= 4
    assert outcome.norms[: len(overflows)] == [0.0] * len(overflows)
    assert all(norm > 0 for norm in outcome.norms[len(overflows) :])
    assert outcome.losses[-1] < outcome.losses[0] - 0.5


@pytest.mark.one_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packing_changes_no_loss(dtype: str, models: Models, gpu1: Gang, tmp_path: Path, note: Note) -> None:
    """One step over all rows, as sixteen rows and as the few that they are packed into."""
    data = make_rows(tmp_path, 16)
    packed = PackedJob(models["qwen2", dtype], data, tmp_path / "packed", dtype=dtype, packing=True)
    num_bins = len(open_rows(packed.config.data, load_tokenizer(packed.model)).rows)
    assert 1 < num_bins < 16
    once = {"trainIters": 1, "microBatchSize": 1}
    alone = PackedJob(models["qwen2", dtype], data, tmp_path / "alone", dtype=dtype, training={**once, "globalBatchSize": 16})
    (expected,) = gpu1.run(train, alone)
    (found,) = gpu1.run(train, replace(packed, training={**once, "globalBatchSize": num_bins}))
    tolerance = {"float32": 1e-5, "bfloat16": 2e-3}[dtype]
    note(difference=abs(found.losses[0] - expected.losses[0]))
    assert found.tokens == expected.tokens
    assert found.losses == pytest.approx(expected.losses, abs=tolerance)
    assert found.norms == pytest.approx(expected.norms, rel=10 * tolerance)
