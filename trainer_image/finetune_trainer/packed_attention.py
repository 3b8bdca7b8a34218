"""Core attention of packed rows by transformer-engine, without most of what its module does for each call.

Its ``DotProductAttention`` looks for a backend, for the layout of the tensors in memory, for fp8 and for random states of a dropout that is zero, every time: half of what a call costs on the host. On short rows
the host is what the forward pass waits for.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor

from finetune_trainer import megatron_cpu

megatron_cpu.install()

from megatron.core.extensions.transformer_engine import TEDotProductAttention  # noqa: E402  (after the redirection)
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention  # noqa: E402
from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend  # noqa: E402

ANY_LENGTH = FusedAttnBackend["F16_arbitrary_seqlen"]


class PackedAttention(TEDotProductAttention):
    """Takes the place of Megatron-core's TEDotProductAttention, with the same results.

    The first call in training, or in evaluation, goes through transformer-engine's choice of a backend. Where that is cuDNN's for any length, the next ones go to it straight.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.can_go_straight = self.config.context_parallel_size == 1 and self.config.attention_dropout == 0 and self.config.window_size is None
        self.takes_cudnn: dict[bool, bool] = {}
        """By whether the module is in training."""
        if self.config.attention_dropout == 0:
            # cuDNN's call takes a place in a random sequence even so: of torch's own generator now, which moves on alike on all tensor-parallel ranks.
            self.fused_attention.attention_dropout_ctx = contextlib.nullcontext

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Query [tokens, heads, dim], key and value [tokens, groups, dim] -> [tokens, heads * dim]; what is not packed and causal goes to the base class."""
        is_packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        is_causal = attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        may_go_straight = self.can_go_straight and is_packed and is_causal and attention_bias is None
        if may_go_straight and self.takes_cudnn.get(self.training):
            return self._go_straight(query, key, value, packed_seq_params)
        output: Tensor = super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        if may_go_straight:
            chosen = dot_product_attention._attention_backends
            self.takes_cudnn[self.training] = chosen["use_fused_attention"] and chosen["fused_attention_backend"] == ANY_LENGTH
        return output

    def _go_straight(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        output: Tensor = self.fused_attention(
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            qkv_layout="thd_thd_thd",
            cu_seqlens_q=packed.cu_seqlens_q,
            cu_seqlens_kv=packed.cu_seqlens_kv,
            cu_seqlens_q_padded=packed.cu_seqlens_q_padded,
            cu_seqlens_kv_padded=packed.cu_seqlens_kv_padded,
            max_seqlen_q=packed.max_seqlen_q,
            max_seqlen_kv=packed.max_seqlen_kv,
            attn_mask_type="padding_causal",
            window_size=(-1, 0),
            fused_attention_backend=ANY_LENGTH,
        )
        return output
