"""What a model is, read from its config.json: the facts that build it and the rows that load it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune_trainer.contract import ModelError
from finetune_trainer.rules import LAYER, Dims, Rule
from finetune_trainer.shards import padded_vocab_size


@dataclass(frozen=True)
class RopeScaling:
    """How rotary embeddings are stretched. ``linear`` uses ``factor`` alone; ``llama3`` the other three too."""

    kind: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Architecture:
    """A decoder of pre-norm layers: RMSNorm, grouped-query attention with rotary embeddings, gated feed-forward (SwiGLU)."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    activation: Literal["silu"] = "silu"

    def dims(self, tp: int) -> Dims:
        """The sizes of the whole model that layouts depend on; the vocabulary padded for ``tp`` tensor-parallel ranks."""
        return Dims(self.num_query_groups, self.num_attention_heads, self.head_dim, self.vocab_size, padded_vocab_size(self.vocab_size, tp))


@dataclass(frozen=True)
class Family:
    """One model type of Hugging Face: how its config.json is read and how its weights are named and laid out.

    ``droppable``: names (``*`` is any layer) of tensors that old files hold and no model needs.
    """

    model_type: str
    architecture: Callable[[Mapping[str, Any]], Architecture]
    weights: tuple[Rule, ...]
    droppable: tuple[str, ...] = ()

    def is_droppable(self, name: str) -> bool:
        """Whether a tensor of this name is known and needed by nobody."""
        return any(re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) for pattern in self.droppable)

    def rows(self, architecture: Architecture) -> tuple[Rule, ...]:
        """The rule of every parameter of a model, layer by layer, in the order in which Hugging Face names them."""
        rules = [rule for rule in self.weights if not (rule.untied_only and architecture.tied_embeddings)]
        per_layer = [rule for rule in rules if LAYER in rule.mcore]
        before = rules[: rules.index(per_layer[0])]
        after = rules[rules.index(per_layer[-1]) + 1 :]
        layers = [rule.at_layer(layer) for layer in range(architecture.num_layers) for rule in per_layer]
        return (*before, *layers, *after)


def read_architecture(config: Mapping[str, Any], *, head_dim: int | None = None, add_qkv_bias: bool = False, qk_layernorm: bool = False) -> Architecture:
    """Facts of a config.json that all families spell alike; ``head_dim`` is the family's own where the file names none.

    Raises ModelError for a missing key and for whatever the engine does not model and that would change the result.
    """
    _refuse_unmodelled(config)
    heads = _integer(config, "num_attention_heads")
    hidden_size = _integer(config, "hidden_size")
    base, scaling = read_rope(config)
    return Architecture(
        num_layers=_integer(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=_integer(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=_integer(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads,
        head_dim=_integer(config, "head_dim") if config.get("head_dim") is not None else head_dim or hidden_size // heads,
        vocab_size=_integer(config, "vocab_size"),
        max_position_embeddings=_integer(config, "max_position_embeddings"),
        layernorm_epsilon=_number(config, "rms_norm_eps", 1e-6),
        rotary_base=base,
        rope_scaling=scaling,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        add_qkv_bias=add_qkv_bias,
        qk_layernorm=qk_layernorm,
    )


def read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (files on the hub)."""
    parameters = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = _number(parameters, "rope_theta", _number(config, "rope_theta", 10_000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if _number(parameters, "partial_rotary_factor", _number(config, "partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError("config.json: partial_rotary_factor is not 1; rotary embeddings over a part of each head are not supported")
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, RopeScaling("linear", _number(parameters, "factor"))
    if kind == "llama3":
        original = (
            parameters.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or _integer(config, "max_position_embeddings")
        )
        return base, RopeScaling(
            "llama3", _number(parameters, "factor"), _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor"), int(original)
        )
    raise ModelError(f"config.json: rope scaling of type {kind!r} is not supported; supported are default, linear and llama3")


def _refuse_unmodelled(config: Mapping[str, Any]) -> None:
    checks: Sequence[tuple[str, bool, str]] = (
        ("hidden_act", config.get("hidden_act", "silu") not in ("silu", "swish"), "only silu is supported"),
        ("attention_bias", bool(config.get("attention_bias", False)), "a bias in all attention projections is not supported; it must be false"),
        ("mlp_bias", bool(config.get("mlp_bias", False)), "a bias in the feed-forward layers is not supported; it must be false"),
        ("use_sliding_window", bool(config.get("use_sliding_window", False)), "sliding-window attention is not supported; it must be false"),
        ("layer_types", any(kind != "full_attention" for kind in config.get("layer_types") or ()), "only full_attention is supported"),
        (
            "quantization_config",
            config.get("quantization_config") is not None,
            "quantized weights cannot be trained; take the model in bfloat16, float16 or float32",
        ),
    )
    for key, found, sentence in checks:
        if found:
            raise ModelError(f"config.json: {key} is {config[key]!r}; {sentence}")


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {key} must be a positive integer (found {value!r})")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"config.json: {key} must be a number (found {value!r})")
    return float(value)
