"""Causal core attention on torch's scaled_dot_product_attention, for Megatron-core's local layers.

Megatron-core's own ``DotProductAttention`` keeps every score in memory and refuses packed sequences.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from finetune_trainer import megatron_cpu

megatron_cpu.install()

from megatron.core import tensor_parallel  # noqa: E402  (after the redirection)


class SdpaAttention(torch.nn.Module):
    """Grouped-query attention of this rank's heads; takes the arguments of Megatron-core's core attentions.

    Always causal: ``attention_mask`` is not looked at. Packed sequences (``qkv_format`` thd) attend within themselves.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout
        # With sequence parallelism the whole layer already draws from the tensor-parallel random state.
        self.forks_random_state = not config.sequence_parallel

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend; query [sequence, batch, heads, dim] -> [sequence, batch, heads * dim], or packed [tokens, heads, dim] -> [tokens, heads * dim]."""
        with self._random_state():
            if packed_seq_params is None:
                out = self._attend(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)))
                return out.permute(2, 0, 1, 3).flatten(2)
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            rows = zip(*(tensor.transpose(0, 1)[None].split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
            return torch.cat([self._attend(*row)[0] for row in rows], dim=1).transpose(0, 1).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Query [batch, heads, sequence, dim], key and value [batch, groups, sequence, dim] -> [batch, heads, sequence, dim]."""
        dropout = self.dropout if self.training else 0.0
        grouped = key.shape[1] != query.shape[1]
        return scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped)

    def _random_state(self) -> contextlib.AbstractContextManager[None]:
        if self.training and self.dropout > 0 and self.forks_random_state:
            fork: contextlib.AbstractContextManager[None] = tensor_parallel.get_cuda_rng_tracker().fork()
            return fork
        return contextlib.nullcontext()
