"""The model families that the engine knows, one file of facts and rules each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_trainer.contract import ModelError, nearest
from finetune_trainer.families import llama, qwen2, qwen3
from finetune_trainer.families.architecture import Architecture, Family, RopeScaling

__all__ = ["FAMILIES", "Architecture", "Family", "RopeScaling", "find"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY)}


def find(config: Mapping[str, Any]) -> Family:
    """The family of a config.json by its ``model_type``; raises ModelError naming the supported ones."""
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[str(model_type)]
    raise ModelError(
        f"config.json: model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}{nearest(str(model_type), sorted(FAMILIES))}"
    )
