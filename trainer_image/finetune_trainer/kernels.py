"""Triton kernels for GPUs: what would otherwise be several passes over a large tensor, or a function that is compiled when it first runs.

Each has the same result as a few lines of torch beside its caller (``loss.py``, ``swiglu.py``), which a CPU takes. Arithmetic is float32, whatever the tensors are. Shapes
that change from batch to batch (rows) are arguments of a launch and never compiled in, so a new length costs nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune_trainer.kernel_launch import Kernel

STATISTICS_BLOCK = 4096
GRADIENT_BLOCK = 4096
SWIGLU_BLOCK = 2048
WARPS = 8

LOWEST = tl.constexpr(-1e30)
"""Below every logit; finite, so that differences of it are numbers."""


def softmax_statistics(logits: Tensor, labels: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Logarithm of the sum of exponentials over the first ``columns`` of logits [rows, width], and the label's logit (0 where it is another rank's): float32 [rows] each.

    Column 0 is token ``first``.
    """
    rows = logits.shape[0]
    sums, targets = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows:
        _softmax_statistics.launch((rows,), logits, labels, sums, targets, first, columns, logits.stride(0), STATISTICS_BLOCK)
    return sums, targets


def write_softmax_gradient(logits: Tensor, labels: Tensor, sums: Tensor, first: int, columns: int, scale: Tensor | None) -> None:
    """Overwrite logits [rows, width] by the loss's gradient, times ``scale`` [1]; ``sums`` [rows] are over every rank's columns. Padding gets 0."""
    rows, width = logits.shape
    if rows:
        grid = (rows, triton.cdiv(width, GRADIENT_BLOCK))
        factor = sums if scale is None else scale
        _softmax_gradient.launch(grid, logits, labels, sums, factor, first, columns, width, logits.stride(0), scale is not None, GRADIENT_BLOCK)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of gate_up [tokens, 2 ffn] -> [tokens, ffn]."""
    tokens, width = gate_up.shape
    output = torch.empty(tokens, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        _swiglu.launch((tokens, triton.cdiv(width // 2, SWIGLU_BLOCK)), gate_up, output, width // 2, SWIGLU_BLOCK)
    return output


def swiglu_gradient(gate_up: Tensor, gradient: Tensor) -> Tensor:
    """The gradient [tokens, 2 ffn] of gate_up, from that [tokens, ffn] of the output."""
    tokens, width = gate_up.shape
    output = torch.empty_like(gate_up)
    if tokens:
        _swiglu_gradient.launch((tokens, triton.cdiv(width // 2, SWIGLU_BLOCK)), gate_up, gradient, output, width // 2, SWIGLU_BLOCK)
    return output


@Kernel.of("first", "columns", warps=WARPS)
def _softmax_statistics(logits, labels, sums, targets, first, columns, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    logits += row * stride
    highest = tl.full((), LOWEST, tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, columns, BLOCK):
        values = tl.load(logits + start + offsets, mask=start + offsets < columns, other=LOWEST).to(tl.float32)
        higher = tl.maximum(highest, tl.max(values, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher), 0)
        highest = higher
    tl.store(sums + row, highest + tl.log(total))
    label = tl.load(labels + row) - first
    is_here = (label >= 0) & (label < columns)
    tl.store(targets + row, tl.load(logits + label, mask=is_here, other=0.0).to(tl.float32))


@Kernel.of("first", "columns", warps=WARPS)
def _softmax_gradient(logits, labels, sums, factor, first, columns, width, stride, SCALED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * stride
    values = tl.load(logits + column, mask=column < columns, other=LOWEST).to(tl.float32)
    gradient = tl.exp(values - tl.load(sums + row))
    gradient -= tl.where(column == tl.load(labels + row) - first, 1.0, 0.0)
    gradient = tl.where(column < columns, gradient, 0.0)
    if SCALED:
        gradient *= tl.load(factor)
    tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < width)


@Kernel.of(warps=WARPS)
def _swiglu(gate_up, output, ffn, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ffn
    gate = tl.load(gate_up + row * 2 * ffn + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * ffn + ffn + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * ffn + column, (gate * tl.sigmoid(gate) * up).to(output.dtype.element_ty), mask=inside)


@Kernel.of(warps=WARPS)
def _swiglu_gradient(gate_up, gradient, output, ffn, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ffn
    gate = tl.load(gate_up + row * 2 * ffn + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * ffn + ffn + column, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(gradient + row * ffn + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_gate = above * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(output + row * 2 * ffn + column, of_gate.to(output.dtype.element_ty), mask=inside)
    tl.store(output + row * 2 * ffn + ffn + column, (above * gate * sigmoid).to(output.dtype.element_ty), mask=inside)
