"""Logits on GPUs are those of transformers on the same GPU.

float32 (no TF32): the same sums in another order. A sum of n products is off by about sqrt(n) x 2^-24, the widest here has 512, and errors add
up over four layers: 1e-5 of the largest logit is five times what such errors are.

bfloat16: every tensor is rounded to 8 bits after each operation, by both sides and in different orders, so the two differ by about as much as
each differs from float32. Two bounds: 3e-2 of the largest logit (2^-8 = 4e-3 for a rounding, times the root of the roughly 50 that
lie between embedding and logit; 1.8e-2 was measured); and the root mean square distance to the float32 logits of the same weights at most 1.5 times that of
transformers' own bfloat16, which a wrong layout, norm or rotation exceeds many times over.

A prediction may differ only where the two best logits are closer to each other than the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from factories import VOCAB_SIZE
from finetune_trainer.verify import compare
from gang import Gang
from gpu_runs import compute_logits, layers_of, transformers_logits
from small_models import Layout, token_rows

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
EXCESS = 1.5
ROWS = token_rows((5, 64, 131, 300), VOCAB_SIZE)
FAMILIES = ("llama", "qwen2", "qwen3")
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensorModelParallelSize": 2},
    "tp2-sp": {"tensorModelParallelSize": 2, "sequenceParallel": True},
    "pp2": {"pipelineModelParallelSize": 2},
}
OF_FOUR: dict[str, dict[str, Any]] = {
    "tp2-sp-pp2": {"tensorModelParallelSize": 2, "pipelineModelParallelSize": 2, "sequenceParallel": True},
    "pp4": {"tensorModelParallelSize": 1, "pipelineModelParallelSize": 4},
}
Models = dict[tuple[str, str], Path]
Note = Callable[..., None]


@pytest.fixture(scope="module")
def expected(models: Models, gpu1: Gang) -> dict[tuple[str, str, str], list[torch.Tensor]]:
    """By family, data type of the weights and of the computation."""
    kinds = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
    return {(family, weights, dtype): gpu1.run(transformers_logits, models[family, weights], ROWS, dtype)[0] for family in FAMILIES for weights, dtype in kinds}


def distance(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return (torch.cat(found) - torch.cat(exact)).square().mean().sqrt().item()


def check(gang: Gang, models: Models, parallelism: dict[str, Any], expected: dict[Any, list[torch.Tensor]], note: Note) -> None:
    """Every family in both data types, on every rank."""
    kinds = list(models)
    layouts = [Layout(models[kind], parallelism, torch_dtype=kind[1]) for kind in kinds]
    for found in gang.run(compute_logits, layouts, ROWS):
        for (family, dtype), logits in zip(kinds, found, strict=True):
            comparison = compare(logits, expected[family, dtype, dtype], TOLERANCE[dtype])
            figures = {"difference_of_largest_logit": comparison.difference / comparison.largest_logit}
            if dtype == "bfloat16":
                exact = expected[family, "bfloat16", "float32"]
                ours, theirs = distance(logits, exact), distance(expected[family, dtype, dtype], exact)
                figures["error_over_transformers_error"] = ours / theirs
                assert ours <= EXCESS * theirs, f"{family}: {ours / theirs:.2f} times transformers' own error"
            note(**{f"{family} {dtype}": figures})
            assert comparison.agree, f"{family} {dtype}: {comparison.describe()}"


@pytest.mark.one_gpu
def test_layers_are_transformer_engines(models: Models, gpu1: Gang) -> None:
    assert gpu1.run(layers_of, Layout(models["llama", "float32"])) == ["megatron.core.extensions.transformer_engine"]
    local = Layout(models["llama", "float32"], training={"attentionBackend": "local"})
    assert gpu1.run(layers_of, local) == ["megatron.core.tensor_parallel.layers"]


@pytest.mark.one_gpu
def test_one_gpu_gives_the_logits_of_transformers(models: Models, gpu1: Gang, expected: Any, note: Note) -> None:
    check(gpu1, models, {}, expected, note)


@pytest.mark.gpu2
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_give_the_logits_of_transformers(layout: str, models: Models, gpu2: Gang, expected: Any, note: Note) -> None:
    check(gpu2, models, LAYOUTS[layout], expected, note)


@pytest.mark.gpu4
@pytest.mark.parametrize("layout", OF_FOUR)
def test_four_gpus_give_the_logits_of_transformers(layout: str, models: Models, gpu4: Gang, expected: Any, note: Note) -> None:
    check(gpu4, models, OF_FOUR[layout], expected, note)
