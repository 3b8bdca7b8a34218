"""Llama 2, Llama 3.x and what is built like them (SmolLM2, ...)."""

from __future__ import annotations

from finetune_trainer.families.architecture import Family, read_architecture
from finetune_trainer.rules import QKV, Copy, Cut, GateUp, Vocab

_HF = "model.layers.*."
_MCORE = "decoder.layers.*."

WEIGHTS = (
    Vocab("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Cut.ROWS),
    Copy(_MCORE + "self_attention.linear_qkv.layer_norm_weight", (_HF + "input_layernorm.weight",), Cut.WHOLE),
    QKV(
        _MCORE + "self_attention.linear_qkv.weight",
        (_HF + "self_attn.q_proj.weight", _HF + "self_attn.k_proj.weight", _HF + "self_attn.v_proj.weight"),
        Cut.ROWS,
    ),
    Copy(_MCORE + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), Cut.COLUMNS),
    Copy(_MCORE + "mlp.linear_fc1.layer_norm_weight", (_HF + "post_attention_layernorm.weight",), Cut.WHOLE),
    GateUp(_MCORE + "mlp.linear_fc1.weight", (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), Cut.ROWS),
    Copy(_MCORE + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), Cut.COLUMNS),
    Copy("decoder.final_layernorm.weight", ("model.norm.weight",), Cut.WHOLE),
    Vocab("output_layer.weight", ("lm_head.weight",), Cut.ROWS, untied_only=True),
)

# Checkpoints written before transformers 4.32 hold the rotary frequencies, which follow from config.json.
DROPPABLE = (_HF + "self_attn.rotary_emb.inv_freq",)

FAMILY = Family(model_type="llama", architecture=read_architecture, weights=WEIGHTS, droppable=DROPPABLE)
