"""Families: facts read from config.json in both spellings, rows that cover a model's tensors exactly, refusals in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from factories import tiny_hf_config
from finetune_trainer.contract import ModelError
from finetune_trainer.families import FAMILIES, RopeScaling, find
from finetune_trainer.pieces import Layout
from finetune_trainer.rules import Cut
from finetune_trainer.shards import Share


def transformers_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what transformers saves; a tied output layer is not saved."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key != "torch_dtype"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    return shapes


def megatron_shape(name: str, config: dict[str, Any]) -> tuple[int, ...]:
    """The whole shape of a Megatron-core parameter, from config.json alone."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    attention = head_dim * config["num_attention_heads"]
    qkv = attention + 2 * head_dim * config["num_key_value_heads"]
    ends = {
        "embeddings.weight": (512, hidden),
        "output_layer.weight": (512, hidden),
        "linear_qkv.weight": (qkv, hidden),
        "linear_qkv.bias": (qkv,),
        "linear_proj.weight": (hidden, attention),
        "linear_fc1.weight": (2 * ffn, hidden),
        "linear_fc2.weight": (hidden, ffn),
        "q_layernorm.weight": (head_dim,),
        "k_layernorm.weight": (head_dim,),
        "layer_norm_weight": (hidden,),
        "final_layernorm.weight": (hidden,),
    }
    return next(shape for end, shape in ends.items() if name.endswith(end))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_cover_exactly_the_tensors_of_the_model(name: str, tied: bool) -> None:
    config = tiny_hf_config(name, tie_word_embeddings=tied)
    architecture = find(config).architecture(config)
    layout = Layout.of(find(config), architecture, Share(0, 1))
    pieces = [piece for mcore in layout.rows for piece in layout.weight(mcore, torch.empty(megatron_shape(mcore, config), device="meta"))]
    assert {piece.name: piece.shape for piece in pieces} == transformers_shapes(config)
    assert len({piece.name for piece in pieces}) == len(pieces)
    assert [piece.name for piece in pieces] == layout.names()


@pytest.mark.parametrize("name", FAMILIES)
def test_shares_of_two_ranks_make_the_whole_tensors(name: str) -> None:
    config = tiny_hf_config(name)
    architecture = find(config).architecture(config)
    layouts = [Layout.of(find(config), architecture, Share(rank, 2)) for rank in range(2)]
    for mcore, rule in layouts[0].rows.items():
        shape = list(megatron_shape(mcore, config))
        if rule.cut is not Cut.WHOLE:
            shape[0 if rule.cut is Cut.ROWS else 1] //= 2
        for first, second in zip(*(layout.weight(mcore, torch.empty(shape, device="meta")) for layout in layouts), strict=True):
            held = sum(piece.part().numel() for piece in (first, second))
            assert held == torch.empty(first.shape, device="meta").numel() * (2 if rule.cut is Cut.WHOLE else 1)
            assert first.shape == second.shape


def test_adapter_pieces_have_the_names_of_peft() -> None:
    config = tiny_hf_config("llama")
    layout = Layout.of(find(config), find(config).architecture(config), Share(1, 2))
    row_parallel = {piece.name: piece for piece in layout.adapter("decoder.layers.2.mlp.linear_fc2", torch.empty(8, 64), torch.empty(64, 8))}
    assert list(row_parallel) == ["base_model.model.model.layers.2.mlp.down_proj.lora_A.weight", "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"]
    first, second = row_parallel.values()
    assert (first.shape, first.slices, second.shape, second.slices) == ((8, 128), (slice(0, 8), slice(64, 128)), (64, 8), (slice(0, 64), slice(0, 8)))
    column_parallel = {
        piece.name.split(".")[-3] + "." + piece.name.split(".")[-2]: piece
        for piece in layout.adapter("decoder.layers.2.self_attention.linear_qkv", torch.empty(8, 64), torch.empty(64, 8))
    }
    assert list(column_parallel) == ["q_proj.lora_A", "k_proj.lora_A", "v_proj.lora_A", "q_proj.lora_B", "k_proj.lora_B", "v_proj.lora_B"]
    assert {column_parallel[f"{name}_proj.lora_A"].place.data_ptr() for name in "qkv"} == {column_parallel["q_proj.lora_A"].place.data_ptr()}
    assert (column_parallel["k_proj.lora_B"].shape, column_parallel["k_proj.lora_B"].slices) == ((32, 8), (slice(16, 32), slice(0, 8)))


def test_both_spellings_of_rope_are_read() -> None:
    numbers = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    hub = find({"model_type": "llama"}).architecture(tiny_hf_config("llama", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **numbers}))
    config = tiny_hf_config("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **numbers})
    del config["rope_theta"], config["rope_scaling"]
    assert hub.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert hub.rotary_base == 5e5
    assert FAMILIES["llama"].architecture(config) == hub


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}, {"type": "default"}])
def test_no_scaling_is_no_scaling(scaling: dict[str, Any] | None) -> None:
    assert FAMILIES["llama"].architecture(tiny_hf_config("llama", rope_scaling=scaling)).rope_scaling is None


def test_linear_scaling_in_its_old_spelling_is_read() -> None:
    assert FAMILIES["llama"].architecture(tiny_hf_config("llama", rope_scaling={"type": "linear", "factor": 4})).rope_scaling == RopeScaling("linear", 4.0)


def test_facts_that_config_json_leaves_out_are_the_family_s() -> None:
    config = tiny_hf_config("llama")
    del config["head_dim"], config["num_key_value_heads"], config["tie_word_embeddings"]
    facts = FAMILIES["llama"].architecture(config)
    assert (facts.head_dim, facts.num_query_groups, facts.tied_embeddings, facts.add_qkv_bias) == (16, 4, False, False)
    qwen3 = tiny_hf_config("qwen3")
    del qwen3["head_dim"]
    assert (FAMILIES["qwen3"].architecture(qwen3).head_dim, FAMILIES["qwen3"].architecture(qwen3).qk_layernorm) == (128, True)
    assert FAMILIES["qwen2"].architecture(tiny_hf_config("qwen2")).add_qkv_bias


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu is supported"),
    "attention bias": ("llama", {"attention_bias": True}, "attention_bias is True; a bias in all attention projections is not supported"),
    "feed-forward bias": ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    "sliding window": ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True; sliding-window attention is not supported"),
    "layer types": ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "only full_attention is supported"),
    "quantized": ("qwen2", {"quantization_config": {"bits": 4}}, "quantized weights cannot be trained"),
    "yarn": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "rope scaling of type 'yarn' is not supported; supported are default, linear and llama3",
    ),
    "partial rotary": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
    "missing": ("llama", {"intermediate_size": None}, "intermediate_size must be a positive integer"),
    "no number": ("llama", {"hidden_size": "64"}, "hidden_size must be a positive integer (found '64')"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fact_that_the_engine_does_not_model_is_refused(case: str) -> None:
    family, fields, message = REFUSED[case]
    with pytest.raises(ModelError) as caught:
        FAMILIES[family].architecture(tiny_hf_config(family, **fields))
    assert str(caught.value).startswith("config.json: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "hint"), [("gpt2", "supported are llama, qwen2, qwen3"), ("qwen3_moe", "did you mean 'qwen3'?"), (None, "model_type None")]
)
def test_unknown_family_is_refused_by_name(model_type: str | None, hint: str) -> None:
    with pytest.raises(ModelError, match="is not supported") as caught:
        find({"model_type": model_type})
    assert hint in str(caught.value)


def test_rotary_frequencies_of_old_files_may_be_dropped() -> None:
    assert FAMILIES["llama"].is_droppable("model.layers.31.self_attn.rotary_emb.inv_freq")
    assert not FAMILIES["llama"].is_droppable("model.layers.31.self_attn.q_proj.weight")
    assert not FAMILIES["llama"].is_droppable("model.layers.x.self_attn.rotary_emb.inv_freq")
