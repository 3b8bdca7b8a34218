"""Training on real ranks: the same losses on every layout, the schedule, and runs that must not go on."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from factories import make_rows, make_tiny_model
from finetune_trainer.contract import ConfigurationError, NumericError, Preempted
from gang import Gang
from small_runs import Job, expect_gradients_in_place, expect_gradients_of_autograd, explode, lose_finite_gradients, lose_the_gradient, raise_loss_scale, train

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


@pytest.fixture
def float16(models: dict[str, Path], rows: Path, tmp_path: Path) -> Job:
    """A run whose gradients exceed float16's range twice, when it begins with a loss scale of 5,400: they do so from about 1,900 on."""
    return Job(models["qwen3"], rows, tmp_path / "float16", tuning=FULL, dtype="float16", parallelism={"tensorModelParallelSize": 1})


FROM_5400 = functools.partial(raise_loss_scale, scale=5400.0)


def test_a_step_that_overflows_changes_nothing_and_halves_the_loss_scale(float16: Job, gang2: Gang, tmp_path: Path) -> None:
    still = gang2.run(train, replace(float16, output=tmp_path / "still", training={"lr": 1e-12}))[0]
    for found in gang2.run(train, float16, FROM_5400):
        assert found.notes[-2:] == [
            "step 1 changed nothing: its gradients exceeded float16's range; the loss scale is 2700 now",
            "step 2 changed nothing: its gradients exceeded float16's range; the loss scale is 1350 now",
        ]
        assert found.losses[:3] == pytest.approx(still.losses[:3], abs=1e-6)
        assert found.rates[0] == found.rates[2] > found.rates[3]
        assert found.norms[:2] == [0.0, 0.0]
        assert found.norms[2] == pytest.approx(still.norms[2], rel=1e-2)
        assert found.losses[-1] < still.losses[-1] - 0.5


def test_a_run_goes_on_with_its_loss_scale_and_the_updates_that_it_has_made(float16: Job, gang2: Gang, tmp_path: Path) -> None:
    straight = gang2.run(train, replace(float16, output=tmp_path / "straight"), FROM_5400)[0]
    for stopped_at in (1, 4):
        job = replace(float16, output=tmp_path / str(stopped_at))
        with pytest.raises(Preempted):
            gang2.run(train, replace(job, stop_at=stopped_at), FROM_5400)
        found = gang2.run(train, job)[0]
        assert (found.resumed_from, found.rates) == (stopped_at, straight.rates)
        assert found.losses == pytest.approx(straight.losses, abs=1e-6)


def test_a_run_that_never_changed_a_weight_fails(float16: Job, gang2: Gang) -> None:
    with pytest.raises(NumericError, match=r"none of the 6 steps changed a weight: the gradients of each exceeded float16's range"):
        gang2.run(train, float16, functools.partial(raise_loss_scale, scale=2.0**18))


def test_a_gradient_that_is_infinite_without_a_loss_scale_stops_the_run(float16: Job, gang2: Gang) -> None:
    with pytest.raises(NumericError, match="step 1: the gradient is not finite, without any loss scale"):
        gang2.run(train, float16, lose_finite_gradients)


def test_sgd_trains_on_a_shared_optimizer(gang1: Gang, gang2: Gang, models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    training = {"optimizer": "sgd", "lr": 1e-1}
    alone = gang1.run(train, Job(models["llama"], rows, tmp_path / "a", training=training))[0]
    shared = gang2.run(train, Job(models["llama"], rows, tmp_path / "b", training=training, parallelism={"tensorModelParallelSize": 1}))[0]
    assert shared.losses == pytest.approx(alone.losses, abs=TOLERANCE)


def test_adapters_add_their_gradients_in_place_but_where_megatron_waits_for_each(models: dict[str, Path], rows: Path, gang2: Gang, tmp_path: Path) -> None:
    gang2.run(train, Job(models["llama"], rows, tmp_path / "plain", parallelism=LAYOUTS["dp2"][1]), expect_gradients_in_place)
    gang2.run(train, Job(models["llama"], rows, tmp_path / "overlap", parallelism=LAYOUTS["dp2-overlap"][1]), expect_gradients_of_autograd)
