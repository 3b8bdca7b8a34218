"""Frozen weights cost their own bytes and nothing else; the same on GPUs in tests/gpu/test_memory.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from factories import make_rows, make_tiny_model
from frozen import count_kept, count_saved
from gang import Gang
from small_models import Layout
from small_runs import Job

HIDDEN, FFN, LENGTH = 64, 128, 512


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_weights_have_no_gradient_main_weight_or_optimizer_state(dtype: str, gang1: Gang, tmp_path: Path) -> None:
    model = make_tiny_model("qwen2", tmp_path / "model", torch_dtype=dtype)
    (kept,) = gang1.run(count_kept, Job(model, make_rows(tmp_path, 20), tmp_path / "run", training={"trainIters": 2}, dtype=dtype))
    assert kept.with_gradient == []
    assert kept.frozen > 5 * kept.trained
    assert kept.main == kept.trained
    assert kept.moments == 2 * kept.trained
    assert kept.trained <= kept.buffered <= kept.trained + 1024, "Megatron-core pads its buffers"


def saved_by_a_layer(gang: Gang, folders: dict[int, Path], **sections: Any) -> float:
    """Per token, by the difference between four layers and two."""
    two, four = (gang.run(count_saved, Layout(folders[layers], **sections), LENGTH)[0] for layers in (2, 4))
    return (four - two) / 2


def test_a_frozen_layer_saves_no_input(gang1: Gang, tmp_path: Path) -> None:
    folders = {layers: make_tiny_model("llama", tmp_path / f"{layers}", num_hidden_layers=layers) for layers in (2, 4)}
    lora = {"loraRank": 1, "loraAlpha": 1, "loraDropout": 0}
    every = saved_by_a_layer(gang1, folders, tuning={**lora, "targetModules": ["all-linear"]})
    only_qkv = saved_by_a_layer(gang1, folders, tuning={**lora, "targetModules": ["linear_qkv"]})
    full = saved_by_a_layer(gang1, folders)
    assert every - only_qkv > 0.9 * (HIDDEN + FFN), "the input of linear_fc1 is behind its norm, that of linear_fc2 is the activation: adapters alone need them"
    assert full - only_qkv > 0.9 * (HIDDEN + FFN)
