"""Qwen3 (dense): Llama with a norm on each query and key head, and heads of 128 whatever the hidden size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_trainer.families import llama
from finetune_trainer.families.architecture import Architecture, Family, read_architecture
from finetune_trainer.rules import Copy, Cut

WEIGHTS = (
    *llama.WEIGHTS[:-2],
    Copy("decoder.layers.*.self_attention.q_layernorm.weight", ("model.layers.*.self_attn.q_norm.weight",), Cut.WHOLE),
    Copy("decoder.layers.*.self_attention.k_layernorm.weight", ("model.layers.*.self_attn.k_norm.weight",), Cut.WHOLE),
    *llama.WEIGHTS[-2:],
)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Facts of a Qwen3 config.json."""
    return read_architecture(config, head_dim=128, qk_layernorm=True)


FAMILY = Family(model_type="qwen3", architecture=architecture, weights=WEIGHTS)
