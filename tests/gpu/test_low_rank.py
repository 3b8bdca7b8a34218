"""Adapters on a GPU: the kernels with dropout compute what torch does with the same numbers dropped, and a recomputed pass drops the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.low_rank import Lower, Raise
from gang import Gang
from gpu_runs import train
from small_runs import Job

TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7}
"""Of the largest number: float32 sums, rounded once; bfloat16's low is rounded before B sees it."""
TOKENS, COLUMNS, WIDTH, DROPOUT, SCALE = 5000, 1000, 700, 0.3, 2.0
Note = Callable[..., None]


def unpack(kept: torch.Tensor) -> torch.Tensor:
    """The bits that the kernels have kept, as a mask [tokens, columns]."""
    from finetune_trainer.low_rank_kernels import GROUP

    places = torch.arange(8, device=kept.device).view(8, 1)
    return ((kept.view(len(kept), -1, 1, GROUP).int() >> places) & 1).reshape(len(kept), -1)[:, :COLUMNS]


def compare_with_torch(dtype: str, rank: int, dropout: float) -> dict[str, float]:
    """Differences of outputs and gradients to the formula in float64."""
    from finetune_trainer import low_rank_kernels

    generator = torch.Generator("cuda").manual_seed(3)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(getattr(torch, dtype))

    hidden, base, factor_a, factor_b, above = made(TOKENS, 1, COLUMNS), made(WIDTH, COLUMNS), made(rank, COLUMNS), made(WIDTH, rank), made(TOKENS, 1, WIDTH)
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, factor_a, factor_b)]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor):
        through, low = Lower.apply(ours[0], ours[1], dropout, SCALE)
    output = Raise.apply(torch.nn.functional.linear(through, base), low, ours[2])
    output.backward(above)
    kept, share = torch.ones(TOKENS, COLUMNS, device="cuda"), 1 - dropout
    if dropout:
        (packed,) = [tensor for tensor in saved if tensor.dtype in (torch.uint8, torch.bool)]
        if packed.dtype is torch.uint8:
            kept, share = unpack(packed), low_rank_kernels.share_kept(low_rank_kernels.threshold(dropout))
        else:
            kept = packed
        assert kept.double().mean().item() == pytest.approx(1 - dropout, abs=0.002)
    theirs = [tensor.double().requires_grad_() for tensor in (hidden, factor_a, factor_b)]
    expected = theirs[0] @ base.double().t() + SCALE / share * ((theirs[0] * kept.double()[:, None]) @ theirs[1].t()) @ theirs[2].t()
    expected.backward(above.double())
    pairs = {"output": (output, expected), **{f"gradient {n}": (a.grad, b.grad) for n, a, b in zip(("hidden", "A", "B"), ours, theirs, strict=True)}}
    return {name: float((found.double() - exact).abs().max() / exact.abs().max()) for name, (found, exact) in pairs.items()}


@pytest.mark.one_gpu
@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("rank", [8, 64, 96])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_products_and_gradients_are_those_of_the_formula(dtype: str, rank: int, dropout: float, gpu1: Gang, note: Note) -> None:
    (differences,) = gpu1.run(compare_with_torch, dtype, rank, dropout)
    note(**differences)
    assert {name: value for name, value in differences.items() if not value <= TOLERANCE[dtype]} == {}


@pytest.mark.one_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recompute_drops_the_same(dtype: str, models: dict[tuple[str, str], Path], rows: Path, gpu1: Gang, tmp_path: Path) -> None:
    def losses(name: str, **training: Any) -> list[float]:
        job = Job(models["llama", dtype], rows, tmp_path / name, tuning={"loraDropout": 0.3}, training=training, dtype=dtype)
        (outcome,) = gpu1.run(train, job)
        return list(outcome.losses)

    kept = losses("kept", recomputeGranularity="none")
    full = losses("full", recomputeGranularity="full", recomputeMethod="uniform", recomputeNumLayers=1)
    assert full == pytest.approx(kept, abs={"float32": 5e-5, "bfloat16": 2e-2}[dtype])
    assert kept[-1] < kept[0] - 0.1
