"""The activation of a gated MLP, ``silu(gate) * up``: keeps its input alone for the backward pass, and is compiled by nobody at run time.

Megatron-core's own is a function that torch.compile compiles when it first runs (half a minute), and again for other sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SwiGLU(torch.nn.Module):
    """Takes the place of an activation in Megatron-core's MLP: hidden [sequence, batch, 2 ffn], gate first -> [sequence, batch, ffn]."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        output: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
        return output

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Nothing to keep: it has no weights."""
        return {}


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        flat = gate_up.flatten(0, -2)
        return _forward(flat).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return _backward(gate_up.flatten(0, -2), gradients[0].contiguous().flatten(0, -2)).view_as(gate_up)


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _forward(gate_up: Tensor) -> Tensor:
    if _has_kernels(gate_up):
        from finetune_trainer import kernels

        return kernels.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def _backward(gate_up: Tensor, gradient: Tensor) -> Tensor:
    if _has_kernels(gate_up):
        from finetune_trainer import kernels

        return kernels.swiglu_gradient(gate_up, gradient)
    gate, up = gate_up.chunk(2, dim=-1)
    output = torch.empty_like(gate_up)
    of_gate, of_up = output.chunk(2, dim=-1)
    torch.mul(gradient, torch.nn.functional.silu(gate), out=of_up)
    of_gate.copy_(torch.ops.aten.silu_backward(gradient * up, gate))
    return output
