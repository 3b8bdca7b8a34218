"""Training on real ranks: the same losses on every layout, the schedule, and runs that must not go on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from factories import make_rows, make_tiny_model
from finetune_trainer.contract import ConfigurationError, NumericError
from gang import Gang
from small_runs import Job, expect_gradients_in_place, expect_gradients_of_autograd, explode, lose_the_gradient, train

TOLERANCE = 1e-5
LORA: dict[str, Any] = {}
FULL: dict[str, Any] = {"tunerType": "full", "loraDropout": None}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensorModelParallelSize": 2}),
    "tp2-sp": (2, {"tensorModelParallelSize": 2, "sequenceParallel": True}),
    "pp2": (2, {"tensorModelParallelSize": 1, "pipelineModelParallelSize": 2}),
    "dp2": (2, {"tensorModelParallelSize": 1}),
    "dp2-overlap": (2, {"tensorModelParallelSize": 1, "overlapGradReduce": True, "overlapParamGather": True}),
    "dp2-whole-optimizer": (2, {"tensorModelParallelSize": 1, "useDistributedOptimizer": False}),
    "tp2-pp2": (4, {"tensorModelParallelSize": 2, "pipelineModelParallelSize": 2, "sequenceParallel": True}),
    "tp2-dp2": (4, {"tensorModelParallelSize": 2, "sequenceParallel": True}),
    "pp2-dp2": (4, {"tensorModelParallelSize": 1, "pipelineModelParallelSize": 2}),
}


@pytest.fixture(scope="package")
def gangs(gang1: Gang, gang2: Gang, gang4: Gang) -> dict[int, Gang]:
    return {1: gang1, 2: gang2, 4: gang4}


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: make_tiny_model(family, folder / family) for family in ("llama", "qwen3")}


@pytest.fixture(scope="package")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows"), 40)


@pytest.fixture(scope="package")
def expected(models: dict[str, Path], rows: Path, gang1: Gang, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses on one rank. llama has its own output layer, qwen3's is tied to the embedding."""
    jobs = {
        "lora": Job(models["llama"], rows, tmp_path_factory.mktemp("lora"), tuning=LORA),
        "full": Job(models["qwen3"], rows, tmp_path_factory.mktemp("full"), tuning=FULL),
    }
    return {name: gang1.run(train, job)[0].losses for name, job in jobs.items()}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_losses_are_the_same_on_every_layout(
    name: str, tuner: str, gangs: dict[int, Gang], models: dict[str, Path], rows: Path, expected: dict[str, list[float]], tmp_path: Path
) -> None:
    size, parallelism = LAYOUTS[name]
    job = Job(models["llama" if tuner == "lora" else "qwen3"], rows, tmp_path, parallelism=parallelism, tuning=LORA if tuner == "lora" else FULL)
    outcomes = gangs[size].run(train, job)
    assert expected[tuner][-1] < expected[tuner][0] - 0.1, "it learns"
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(expected[tuner], abs=TOLERANCE)
        assert outcome.norms == pytest.approx(outcomes[0].norms, rel=1e-6)


def test_frozen_parameters_are_in_no_buffer(gang1: Gang, models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    lora = gang1.run(train, Job(models["llama"], rows, tmp_path / "a", tuning={"loraRank": 2, "targetModules": ["linear_proj"]}, training={"trainIters": 1}))[0]
    assert lora.buffered == pytest.approx(4 * 2 * (64 + 64), abs=1024), "four layers, two factors, and Megatron-core's padding"


def test_the_learning_rate_warms_up_and_decays_as_megatrons(gang1: Gang, models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    training = {"lr": 1e-2, "minLr": 1e-3, "lrWarmupFraction": 0.25, "trainIters": 8, "lrDecayStyle": "cosine"}
    rates = gang1.run(train, Job(models["llama"], rows, tmp_path, training=training))[0].rates
    decayed = [1e-3 + 0.9e-2 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx([0.0, 0.5e-2, *decayed])


def test_a_warm_up_as_long_as_the_run_is_refused(gang1: Gang, models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"training.lrWarmupIters is 6, a warm-up of 6 steps; it must be shorter than the 6 steps"):
        gang1.run(train, Job(models["llama"], rows, tmp_path, training={"lrWarmupIters": 6}))


def test_all_tokens_of_the_batch_are_counted_once(gang1: Gang, gang2: Gang, models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    alone = gang1.run(train, Job(models["llama"], rows, tmp_path / "a", training={"trainIters": 2}))[0]
    for name in ("tp2-sp", "pp2", "dp2"):
        assert gang2.run(train, Job(models["llama"], rows, tmp_path / name, parallelism=LAYOUTS[name][1], training={"trainIters": 2}))[1].tokens == alone.tokens


def test_a_first_gradient_of_zero_stops_the_run(gang1: Gang, models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="step 1: the first gradient is exactly zero, so nothing would be learned"):
        gang1.run(train, Job(models["llama"], rows, tmp_path), lose_the_gradient)


def test_a_loss_that_is_not_a_number_stops_the_run_at_its_step(gang2: Gang, models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="step 5: the loss is nan"):
        gang2.run(train, Job(models["llama"], rows, tmp_path, parallelism={"tensorModelParallelSize": 1}), explode)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(dtype: str, gang2: Gang, models: dict[str, Path], rows: Path, expected: dict[str, list[float]], tmp_path: Path) -> None:
    outcome = gang2.run(train, Job(models["llama"], rows, tmp_path, parallelism={"tensorModelParallelSize": 2, "sequenceParallel": True}, dtype=dtype))[0]
    assert outcome.losses == pytest.approx(expected["lora"], abs=0.05)
    assert not [note for note in outcome.notes if "changed nothing" in note]


def test_sgd_trains_on_a_shared_optimizer(gang1: Gang, gang2: Gang, models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    training = {"optimizer": "sgd", "lr": 1e-1}
    alone = gang1.run(train, Job(models["llama"], rows, tmp_path / "a", training=training))[0]
    shared = gang2.run(train, Job(models["llama"], rows, tmp_path / "b", training=training, parallelism={"tensorModelParallelSize": 1}))[0]
    assert shared.losses == pytest.approx(alone.losses, abs=TOLERANCE)


def test_adapters_add_their_gradients_in_place_but_where_megatron_waits_for_each(models: dict[str, Path], rows: Path, gang2: Gang, tmp_path: Path) -> None:
    gang2.run(train, Job(models["llama"], rows, tmp_path / "plain", parallelism=LAYOUTS["dp2"][1]), expect_gradients_in_place)
    gang2.run(train, Job(models["llama"], rows, tmp_path / "overlap", parallelism=LAYOUTS["dp2-overlap"][1]), expect_gradients_of_autograd)
