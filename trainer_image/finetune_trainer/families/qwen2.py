"""Qwen2 and Qwen2.5: Llama with a bias in the query, key and value projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_trainer.families import llama
from finetune_trainer.families.architecture import Architecture, Family, read_architecture
from finetune_trainer.rules import QKV, Cut

WEIGHTS = (
    *llama.WEIGHTS[:-2],
    QKV(
        "decoder.layers.*.self_attention.linear_qkv.bias",
        ("model.layers.*.self_attn.q_proj.bias", "model.layers.*.self_attn.k_proj.bias", "model.layers.*.self_attn.v_proj.bias"),
        Cut.ROWS,
    ),
    *llama.WEIGHTS[-2:],
)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Facts of a Qwen2 config.json. The bias is the model's own: transformers does not look at ``attention_bias`` either."""
    return read_architecture({**config, "attention_bias": False}, add_qkv_bias=True)


FAMILY = Family(model_type="qwen2", architecture=architecture, weights=WEIGHTS)
