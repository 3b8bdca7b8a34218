"""Adapters: the same function, gradients and checkpoint on every layout; nothing lost behind a frozen embedding."""

from __future__ import annotations

import contextlib
import queue
from pathlib import Path
from typing import Any

import pytest
import torch

from factories import VOCAB_SIZE, make_tiny_model
from finetune_trainer import lora, model
from gang import Gang
from small_models import Built, Layout, build, collect_gradients, counted_square, token_rows

TUNING = {"tunerType": "lora", "loraRank": 4, "loraAlpha": 12, "loraDropout": 0, "targetModules": ["all-linear"], "useRslora": False}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensorModelParallelSize": 2},
    "tp2-sp": {"tensorModelParallelSize": 2, "sequenceParallel": True},
    "pp2": {"pipelineModelParallelSize": 2},
    "tp2-sp-pp2": {"tensorModelParallelSize": 2, "pipelineModelParallelSize": 2, "sequenceParallel": True},
}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recomputeGranularity": "selective", "recomputeModules": ["core_attn", "layernorm", "mlp"]},
    "full": {"recomputeGranularity": "full", "recomputeMethod": "uniform", "recomputeNumLayers": 1},
}
ROWS = token_rows((33, 20, 7, 51), VOCAB_SIZE)


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("lora") / "qwen3")


def build_with_adapters(layout: Layout) -> Built:
    """B is no longer zero, and alike on every layout."""
    built = build(layout)
    lora.attach(built.chunks, layout.config.tuning, seed=7)
    for name, layer in lora.adapters(built.chunks):
        rows = layer.lora_B.weight.shape[0] * (built.ranks.tp.size if layer.parallel_mode == "column" else 1)
        whole = torch.randn(rows, 4, generator=torch.Generator().manual_seed(len(name) + int(name.split(".")[2]))) * 0.1
        with torch.no_grad():
            layer.lora_B.weight.copy_(share(whole, layer.lora_B.weight.shape, name, built.ranks.tp.rank))
    return built


def share(whole: torch.Tensor, shape: torch.Size, name: str, rank: int) -> torch.Tensor:
    """The part of a factor (or its gradient) that tensor-parallel rank ``rank`` of two holds; all of it where it is not cut."""
    if whole.shape == shape:
        return whole
    if "linear_fc1" in name:
        return whole.unflatten(0, (2, -1)).chunk(2, dim=1)[rank].flatten(0, 1)
    return whole.chunk(2, dim=0 if whole.shape[0] != shape[0] else 1)[rank]


def step(layout: Layout) -> tuple[float, dict[str, torch.Tensor], int]:
    built = build_with_adapters(layout)
    return *collect_gradients(built, [ROWS[:2], ROWS[2:]]), built.ranks.tp.rank


@pytest.fixture(scope="package")
def expected(folder: Path, gang1: Gang) -> dict[str, torch.Tensor]:
    """Gradients of every adapter on one rank, without recompute."""
    ((loss, gradients, _),) = gang1.run(step, Layout(folder, tuning=TUNING))
    assert len(gradients) == 4 * 4 * 2, "two factors of four linear layers in each of four layers, and nothing else"
    return {**gradients, "loss": torch.tensor(loss)}


def assert_same_gradients(results: list[tuple[float, dict[str, torch.Tensor], int]], expected: dict[str, torch.Tensor]) -> None:
    seen = set()
    for _, gradients, tp_rank in results:
        for name, gradient in gradients.items():
            mine = share(expected[name], gradient.shape, name, tp_rank)
            assert mine.norm() > 0, name
            assert (gradient - mine).norm() <= 1e-5 * mine.norm(), name
            seen.add(name)
    assert results[-1][0] == pytest.approx(expected["loss"].item(), abs=1e-6)
    assert seen == expected.keys() - {"loss"}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2"])
def test_two_ranks_find_the_gradients_of_one(layout: str, recompute: str, folder: Path, expected: dict[str, torch.Tensor], gang2: Gang) -> None:
    assert_same_gradients(gang2.run(step, Layout(folder, LAYOUTS[layout], RECOMPUTE[recompute], TUNING)), expected)


def test_four_ranks_find_the_gradients_of_one(folder: Path, expected: dict[str, torch.Tensor], gang4: Gang) -> None:
    assert_same_gradients(gang4.run(step, Layout(folder, LAYOUTS["tp2-sp-pp2"], RECOMPUTE["selective"], TUNING)), expected)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_behind_a_frozen_embedding_loses_no_gradient(recompute: str, folder: Path, expected: dict[str, torch.Tensor], gang1: Gang) -> None:
    assert_same_gradients(gang1.run(step, Layout(folder, {}, RECOMPUTE[recompute], TUNING)), expected)


def test_adapters_of_the_feed_forward_alone_learn_in_the_first_layer_under_recompute(folder: Path, gang1: Gang) -> None:
    tuning = {**TUNING, "targetModules": ["linear_fc2"]}
    ((_, gradients, _),) = gang1.run(step, Layout(folder, {}, RECOMPUTE["full"], tuning))
    assert sorted(gradients) == sorted(f"decoder.layers.{index}.mlp.linear_fc2.lora_{part}.weight" for index in range(4) for part in "AB")
    assert all(gradient.norm() > 0 for gradient in gradients.values())


def square_of_norm(layout: Layout) -> float:
    built = build_with_adapters(layout)
    return counted_square(built, collect_gradients(built, [ROWS])[1])


def test_every_gradient_counts_once_in_the_norm(folder: Path, gang1: Gang, gang2: Gang) -> None:
    expected_square = sum(gang1.run(square_of_norm, Layout(folder, tuning=TUNING)))
    for layout in ("tp2", "tp2-sp", "pp2"):
        assert sum(gang2.run(square_of_norm, Layout(folder, LAYOUTS[layout], tuning=TUNING))) == pytest.approx(expected_square, rel=1e-5), layout


def logits_with_adapters_and_merged(layout: Layout) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    built = build_with_adapters(layout)
    adapted = model.logits(built.chunks, ROWS, built.ranks)
    for _, layer in lora.adapters(built.chunks):
        weight = lora.merged_weight(layer)
        with torch.no_grad():
            layer.base.weight.copy_(weight)
            layer.lora_B.weight.zero_()
    return adapted, model.logits(built.chunks, ROWS, built.ranks)


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp"])
def test_merged_weights_give_the_logits_of_the_adapters(layout: str, folder: Path, gang2: Gang) -> None:
    for adapted, merged in gang2.run(logits_with_adapters_and_merged, Layout(folder, LAYOUTS[layout], tuning=TUNING)):
        for row, expected_row in zip(adapted, merged, strict=True):
            assert (row - expected_row).abs().max() <= 5e-6 * expected_row.abs().max()


def initial_state(layout: Layout) -> tuple[dict[str, torch.Tensor], dict[str, bool], int]:
    built = build(layout)
    lora.attach(built.chunks, layout.config.tuning, seed=7)
    factors = {f"{name}.lora_{part}": getattr(layer, f"lora_{part}").weight.detach() for name, layer in lora.adapters(built.chunks) for part in "AB"}
    trained = {name: parameter.requires_grad for chunk in built.chunks for name, parameter in chunk.named_parameters()}
    return factors, trained, built.ranks.tp.rank


def test_adapters_start_alike_on_every_layout_and_the_base_is_frozen(folder: Path, gang1: Gang, gang2: Gang) -> None:
    ((whole, trained, _),) = gang1.run(initial_state, Layout(folder, tuning=TUNING))
    assert all(is_trained == ("lora_" in name) for name, is_trained in trained.items())
    bound = whole["decoder.layers.0.mlp.linear_fc2.lora_A"].shape[1] ** -0.5
    assert 0.9 * bound < whole["decoder.layers.0.mlp.linear_fc2.lora_A"].abs().max() <= bound
    assert not torch.equal(whole["decoder.layers.0.mlp.linear_fc2.lora_A"], whole["decoder.layers.1.mlp.linear_fc2.lora_A"])
    for layout in ("tp2", "pp2"):
        for factors, _, tp_rank in gang2.run(initial_state, Layout(folder, LAYOUTS[layout], tuning=TUNING)):
            for name, factor in factors.items():
                assert torch.equal(factor, share(whole[name], factor.shape, name, tp_rank)), name
                assert name.endswith("A") or not factor.any()


def save(layout: Layout, checkpoint: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()  # its own is a process that outlives this one
    built = build_with_adapters(layout)
    checkpoint.mkdir(exist_ok=True)
    dist_checkpointing.save(built.chunks[0].sharded_state_dict(), str(checkpoint))


def load(layout: Layout, checkpoint: Path) -> list[torch.Tensor]:
    from megatron.core import dist_checkpointing

    built = build(layout)
    if layout.tuning:
        lora.attach(built.chunks, layout.config.tuning, seed=8)
    with torch.no_grad():
        for parameter in built.chunks[0].parameters():
            parameter.fill_(float("nan"))
    state = dist_checkpointing.load(built.chunks[0].sharded_state_dict(), str(checkpoint))
    built.chunks[0].load_state_dict(state, strict=True)
    return model.logits(built.chunks, ROWS, built.ranks)


def adapted_logits(layout: Layout) -> list[torch.Tensor]:
    built = build_with_adapters(layout)
    return model.logits(built.chunks, ROWS, built.ranks)


def test_a_checkpoint_of_adapters_loads_on_another_layout(folder: Path, tmp_path: Path, gang1: Gang, gang2: Gang) -> None:
    (expected_logits,) = gang1.run(adapted_logits, Layout(folder, tuning=TUNING))
    gang2.run(save, Layout(folder, LAYOUTS["tp2-sp"], tuning=TUNING), tmp_path / "tp2")
    for found in [
        *gang1.run(load, Layout(folder, tuning=TUNING), tmp_path / "tp2"),
        *gang2.run(load, Layout(folder, LAYOUTS["pp2"], tuning=TUNING), tmp_path / "tp2"),
    ]:
        for row, expected_row in zip(found, expected_logits, strict=True):
            assert (row - expected_row).abs().max() <= 5e-6 * expected_row.abs().max()


def plain_logits(layout: Layout) -> list[torch.Tensor]:
    built = build(layout)
    return model.logits(built.chunks, ROWS, built.ranks)


def test_the_base_of_a_checkpoint_with_adapters_loads_into_a_model_without(folder: Path, tmp_path: Path, gang1: Gang, gang2: Gang) -> None:
    (expected_logits,) = gang1.run(plain_logits, Layout(folder))
    gang2.run(save, Layout(folder, LAYOUTS["tp2"], tuning=TUNING), tmp_path / "tp2")
    (found,) = gang1.run(load, Layout(folder), tmp_path / "tp2")
    for row, expected_row in zip(found, expected_logits, strict=True):
        assert torch.equal(row, expected_row)


def drop_out(layout: Layout, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What an A of one row for each column leaves of ones, in two passes in training mode; under sequence parallelism in the random state of a pass of the whole model."""
    from megatron.core import tensor_parallel

    built = build_with_adapters(layout)
    layer = dict(lora.adapters(built.chunks))[name].train()
    columns = layer.lora_A.weight.shape[1]
    layer.lora_A.weight = torch.nn.Parameter(torch.eye(columns))
    ones = torch.ones(200, 1, columns)
    with tensor_parallel.get_cuda_rng_tracker().fork() if built.chunks[0].config.sequence_parallel else contextlib.nullcontext():
        return tuple(layer._lower(ones, layer.dropout)[1].detach() for _ in range(2))


@pytest.mark.parametrize(
    ("layout", "name", "alike"),
    [("tp2", "mlp.linear_fc1", True), ("tp2", "mlp.linear_fc2", False), ("tp2-sp", "mlp.linear_fc1", False), ("tp2-sp", "mlp.linear_fc2", False)],
)
def test_dropout_is_alike_where_ranks_hold_the_same_input(layout: str, name: str, alike: bool, folder: Path, gang2: Gang) -> None:
    tuning = {**TUNING, "loraDropout": 0.5}
    first, second = gang2.run(drop_out, Layout(folder, LAYOUTS[layout], tuning=tuning), f"decoder.layers.0.{name}")
    assert torch.equal(first[0], second[0]) is alike
    assert not torch.equal(first[0], first[1])
    assert set(first[0].unique().tolist()) == {0.0, 1.0}
    assert first[0].count_nonzero() == pytest.approx(first[0].numel() / 2, rel=0.1)


def gradients_with_dropout(layout: Layout) -> tuple[float, dict[str, torch.Tensor], int]:
    built = build_with_adapters(layout)
    for chunk in built.chunks:
        chunk.train()
    torch.manual_seed(5)
    return *collect_gradients(built, [ROWS]), 0


def test_recompute_draws_the_same_dropout(folder: Path, gang1: Gang) -> None:
    tuning = {**TUNING, "loraDropout": 0.5}
    ((loss, kept, _),) = gang1.run(gradients_with_dropout, Layout(folder, tuning=tuning))
    ((other_loss, again, _),) = gang1.run(gradients_with_dropout, Layout(folder, {}, RECOMPUTE["full"], tuning))
    assert other_loss == pytest.approx(loss, abs=1e-6)
    for name, gradient in kept.items():
        assert (again[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def scales(layout: Layout) -> set[float]:
    built = build_with_adapters(layout)
    return {layer.scale for _, layer in lora.adapters(built.chunks)}


def test_scale_is_alpha_over_rank_or_over_its_root(folder: Path, gang1: Gang) -> None:
    assert gang1.run(scales, Layout(folder, tuning=TUNING)) == [{3.0}]
    assert gang1.run(scales, Layout(folder, tuning={**TUNING, "useRslora": True})) == [{6.0}]
