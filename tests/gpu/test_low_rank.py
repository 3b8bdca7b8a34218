"""Adapters on a GPU: the kernels with dropout compute what torch does with the same numbers dropped, and a recomputed pass drops the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import small_models
from finetune_trainer import lora, low_rank
from finetune_trainer.low_rank import Lower, Raise, share_kept
from gang import Gang
from gpu_runs import forget_attention_backend, train
from small_models import Layout
from small_runs import Job

TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7}
"""Of the largest number: float32 sums, rounded once; bfloat16's low is rounded before B sees it."""
TOKENS, COLUMNS, WIDTH, DROPOUT, SCALE = 5000, 1000, 700, 0.3, 2.0
Models = dict[tuple[str, str], Path]
Note = Callable[..., None]


def unpack(kept: torch.Tensor) -> torch.Tensor:
    """The bits that the kernels have kept, as a mask [tokens, columns]."""
    return ((kept[:, :, None].int() >> torch.arange(8, device=kept.device)) & 1).flatten(1)[:, :COLUMNS]


def compare_with_torch(dtype: str, rank: int, dropout: float, in_place: bool, wide: bool = False) -> dict[str, float]:
    """Differences of outputs and gradients to the formula in float64; ``in_place`` has the factors' gradients added to float32 ones, ``wide`` has small gradients treated like large ones."""
    from finetune_trainer import low_rank_kernels

    with (
        mock.patch.object(low_rank, "WIDE_BYTES", 0 if wide else low_rank.WIDE_BYTES),
        mock.patch.object(low_rank_kernels, "find_gradients", wraps=low_rank_kernels.find_gradients) as reading_once,
    ):
        differences = find_differences(dtype, rank, dropout, in_place)
    assert reading_once.called is wide
    return differences


def find_differences(dtype: str, rank: int, dropout: float, in_place: bool) -> dict[str, float]:
    """See ``compare_with_torch``."""
    generator = torch.Generator("cuda").manual_seed(3)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(getattr(torch, dtype))

    hidden, base, factor_a, factor_b, above = made(TOKENS, 1, COLUMNS), made(WIDTH, COLUMNS), made(rank, COLUMNS), made(WIDTH, rank), made(TOKENS, 1, WIDTH)
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, factor_a, factor_b)]
    sums = [torch.ones(factor.shape, device="cuda") if in_place else None for factor in ours[1:]]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor):
        through, low = Lower.apply(ours[0], ours[1], dropout, sums[0])
    output = Raise.apply(torch.nn.functional.linear(through, base), low, ours[2], SCALE / share_kept(dropout), sums[1])
    output.backward(above)
    kept = torch.ones(TOKENS, COLUMNS, device="cuda")
    if dropout:
        (packed,) = [tensor for tensor in saved if tensor.dtype in (torch.uint8, torch.bool)]
        kept = unpack(packed) if packed.dtype is torch.uint8 else packed
        assert kept.double().mean().item() == pytest.approx(1 - dropout, abs=0.002)
    theirs = [tensor.double().requires_grad_() for tensor in (hidden, factor_a, factor_b)]
    expected = theirs[0] @ base.double().t() + SCALE / share_kept(dropout) * ((theirs[0] * kept.double()[:, None]) @ theirs[1].t()) @ theirs[2].t()
    expected.backward(above.double())
    found = [ours[0].grad, *(factor.grad if total is None else total - 1 for factor, total in zip(ours[1:], sums, strict=True))]
    pairs = {"output": (output, expected), **{f"gradient {n}": (a, b.grad) for n, a, b in zip(("hidden", "A", "B"), found, theirs, strict=True)}}
    return {name: float((mine.double() - exact).abs().max() / exact.abs().max()) for name, (mine, exact) in pairs.items()}


@pytest.mark.one_gpu
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("rank", [8, 64, 96])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_products_and_gradients_are_those_of_the_formula(dtype: str, rank: int, dropout: float, in_place: bool, gpu1: Gang, note: Note) -> None:
    (differences,) = gpu1.run(compare_with_torch, dtype, rank, dropout, in_place)
    note(**differences)
    assert {name: value for name, value in differences.items() if not value <= TOLERANCE[dtype]} == {}


@pytest.mark.one_gpu
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("rank", [8, 16])
def test_gradients_of_a_wide_layer_are_those_of_the_formula(rank: int, in_place: bool, gpu1: Gang, note: Note) -> None:
    (differences,) = gpu1.run(compare_with_torch, "bfloat16", rank, DROPOUT, in_place, wide=True)
    note(**differences)
    assert {name: value for name, value in differences.items() if not value <= TOLERANCE["bfloat16"]} == {}


@pytest.mark.one_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recompute_drops_the_same(dtype: str, models: Models, rows: Path, gpu1: Gang, tmp_path: Path) -> None:
    def losses(name: str, **training: Any) -> list[float]:
        job = Job(models["llama", dtype], rows, tmp_path / name, tuning={"loraDropout": 0.3}, training=training, dtype=dtype)
        (outcome,) = gpu1.run(train, job)
        return list(outcome.losses)

    kept = losses("kept", recomputeGranularity="none")
    full = losses("full", recomputeGranularity="full", recomputeMethod="uniform", recomputeNumLayers=1)
    assert full == pytest.approx(kept, abs={"float32": 5e-5, "bfloat16": 2e-2}[dtype])
    assert kept[-1] < kept[0] - 0.1


def drop_ones(layout: Layout, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What an A of one row for each of the first columns leaves of ones, in two passes; under sequence parallelism in the random state of a pass of the whole model."""
    from megatron.core import tensor_parallel

    forget_attention_backend()
    built = small_models.build(layout)
    lora.attach(built.chunks, layout.config.tuning, seed=7)
    torch.manual_seed(5)
    layer = dict(lora.adapters(built.chunks))[name].train()
    columns, device = layer.lora_A.weight.shape[1], layer.lora_A.weight.device
    layer.lora_A.weight = torch.nn.Parameter(torch.eye(64, columns, device=device))
    ones = torch.ones(200, 1, columns, device=device)
    with tensor_parallel.get_cuda_rng_tracker().fork() if built.chunks[0].config.sequence_parallel else contextlib.nullcontext():
        first, second = (layer._lower(ones, layer.dropout)[1].detach().cpu() for _ in range(2))
    return first, second


@pytest.mark.gpu2
@pytest.mark.parametrize(
    ("sequence_parallel", "name", "alike"),
    [(False, "mlp.linear_fc1", True), (False, "mlp.linear_fc2", False), (True, "mlp.linear_fc1", False), (True, "mlp.linear_fc2", False)],
)
def test_dropout_is_alike_where_ranks_hold_the_same_input(sequence_parallel: bool, name: str, alike: bool, models: Models, gpu2: Gang) -> None:
    tuning = {"tunerType": "lora", "loraRank": 64, "loraAlpha": 64, "loraDropout": 0.5, "targetModules": ["all-linear"], "useRslora": False}
    layout = Layout(models["llama", "float32"], {"tensorModelParallelSize": 2, "sequenceParallel": sequence_parallel}, tuning=tuning)
    first, second = gpu2.run(drop_ones, layout, f"decoder.layers.0.{name}")
    assert torch.equal(first[0], second[0]) is alike
    assert not torch.equal(first[0], first[1])
    assert sorted(first[0].unique().tolist()) == pytest.approx([0.0, 1.0])
