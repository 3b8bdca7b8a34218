"""Frozen means free, and memory is what memory.py says: counted, and measured on a model that is large enough to tell."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs
from factories import make_rows, make_tiny_model
from finetune_trainer.memory import Machine, estimate_memory, read_facts
from frozen import count_kept, count_saved
from gang import Gang
from gpu_runs import forget_attention_backend
from small_models import Layout
from small_runs import Job

GIB = 2**30
HIDDEN, FFN, LENGTH = 256, 512, 1024
LARGE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "head_dim": 128,
    "max_shard_size": "5GB",
}
Models = dict[tuple[str, str], Path]
Note = Callable[..., None]


def count_kept_anew(job: Job) -> Any:
    forget_attention_backend()
    return count_kept(job)


def count_saved_anew(layout: Layout, length: int) -> float:
    forget_attention_backend()
    return count_saved(layout, length)


@pytest.mark.one_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_weights_have_no_gradient_main_weight_or_optimizer_state(dtype: str, models: Models, rows: Path, gpu1: Gang, tmp_path: Path, note: Note) -> None:
    (kept,) = gpu1.run(count_kept_anew, Job(models["qwen2", dtype], rows, tmp_path / "run", training={"trainIters": 2}, dtype=dtype))
    note(frozen=kept.frozen, trained=kept.trained, main=kept.main, moments=kept.moments, buffered=kept.buffered)
    assert kept.with_gradient == []
    assert kept.main == kept.trained
    assert kept.moments == 2 * kept.trained
    assert kept.trained <= kept.buffered <= kept.trained + 1024, "Megatron-core pads its buffers"


@pytest.mark.one_gpu
def test_a_frozen_layer_saves_no_input(gpu1: Gang, tmp_path: Path, note: Note) -> None:
    shape = {"hidden_size": HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": FFN, "torch_dtype": "bfloat16"}
    folders = {layers: make_tiny_model("llama", tmp_path / f"{layers}", num_hidden_layers=layers, **shape) for layers in (2, 4)}

    def saved_by_a_layer(**tuning: Any) -> float:
        two, four = (gpu1.run(count_saved_anew, Layout(folders[layers], tuning=tuning, torch_dtype="bfloat16"), LENGTH)[0] for layers in (2, 4))
        return float(four - two) / 2

    lora = {"loraRank": 1, "loraAlpha": 1, "loraDropout": 0}
    every, only_qkv, full = saved_by_a_layer(**lora, targetModules=["all-linear"]), saved_by_a_layer(**lora, targetModules=["linear_qkv"]), saved_by_a_layer()
    dropped = saved_by_a_layer(**lora | {"loraDropout": 0.05}, targetModules=["all-linear"])
    query, key_value = 4 * 128, 2 * 128
    formula = 4 * HIDDEN + 2 * (query + key_value) + 3 * FFN
    formula_dropped = formula + (2 * HIDDEN + query + FFN) / 16  # a bit each
    figures = {"all-linear": every, "linear_qkv": only_qkv, "full": full, "formula": formula, "dropout": dropped, "formula, dropout": formula_dropped}
    note(saved_numbers_per_token_and_layer=figures)
    assert every - only_qkv > 0.9 * (HIDDEN + FFN), "the input of linear_fc1 is behind its norm, that of linear_fc2 is the activation: adapters alone need them"
    assert full - only_qkv > 0.9 * (HIDDEN + FFN)
    assert every == pytest.approx(formula, rel=0.05), "memory.py"
    assert dropped == pytest.approx(formula_dropped, rel=0.05), "memory.py"


@dataclass(frozen=True)
class Used:
    """Bytes on this GPU."""

    weights: int
    after: int
    peak: int
    trained: int


def measure(job: Job) -> Used:
    """Memory of two steps: of the weights before anything is set up for training, in the end, at most."""
    from finetune_trainer import lora

    attach = lora.attach
    before: list[int] = []

    def attach_and_look(chunks: Any, tuning: Any, seed: int) -> None:
        before.append(torch.cuda.memory_allocated())
        attach(chunks, tuning, seed)

    used: list[Used] = []

    def afterwards(chunks: Any, ranks: Any) -> None:
        trained = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad)
        gc.collect()
        used.append(Used(before[0], torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), trained))

    forget_attention_backend()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    lora.attach = attach_and_look
    try:
        small_runs.train(job, afterwards=afterwards)
    finally:
        lora.attach = attach
    return used[0]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 million parameters, 2 GiB of state for all of them."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("large") / "model", torch_dtype="bfloat16", **LARGE)


@pytest.mark.one_gpu
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_run_takes_the_memory_of_its_formula(tuner: str, recompute: str, large: Path, gpu1: Gang, tmp_path: Path, note: Note) -> None:
    tuning = {"loraRank": 64} if tuner == "lora" else {"tunerType": "full", "loraDropout": None}
    training = {"trainIters": 2, "globalBatchSize": 64, "microBatchSize": 64, "recomputeGranularity": recompute, "lr": 1e-5}
    layout = {"tensorModelParallelSize": 1, "pipelineModelParallelSize": 1}
    job = Job(
        large,
        make_rows(tmp_path, 128),
        tmp_path / "run",
        tuning=tuning,
        training=training,
        parallelism=layout,
        checkpoints={"noSaveOptim": True},
        dtype="bfloat16",
    )
    (used,) = gpu1.run(measure, job)
    state = used.after - used.weights
    per_trained = 18 if tuner == "lora" else 16
    row_tokens = mean_tokens(job)
    facts = read_facts(json.loads((large / "config.json").read_text()))
    config = with_lora(job)
    estimate = estimate_memory(config, facts, Machine("cuda", 1, 80.0), row_tokens)
    note(
        weights_gib=used.weights / GIB,
        state_gib=state / GIB,
        state_by_formula_gib=per_trained * used.trained / GIB,
        peak_gib=used.peak / GIB,
        peak_by_formula_gib=estimate,
        tokens=64 * row_tokens,
    )
    assert used.peak / GIB == pytest.approx(estimate, rel=0.1), "memory.py"
    assert state <= per_trained * used.trained + 0.2 * GIB, "weights, gradients, main weights and two moments of what is trained; workspaces"
    if tuner == "lora":
        assert state < 0.5 * used.weights, "nothing for the frozen weights"


def mean_tokens(job: Job) -> int:
    from finetune_trainer.data import load_tokenizer, open_rows

    lengths = [len(row) for row in open_rows(job.config.data, load_tokenizer(job.model)).rows]
    return sum(lengths) // len(lengths)


def with_lora(job: Job) -> Any:
    """What the resolver fills in."""
    config = job.config
    if config.tuning.tuner_type == "full":
        return config
    return config.model_copy(update={"tuning": config.tuning.model_copy(update={"lora_alpha": 32.0, "target_modules": ["all-linear"]})})
