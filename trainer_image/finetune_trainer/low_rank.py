"""The two products of an adapter, as functions with gradients of their own, so that the large tensors beside them are read and written as rarely as can be.

``B`` is added onto the output of the base in place; the gradient through ``A`` is added onto the one that the base has found for the same input, in place too; dropout leaves no copy of its
input behind, only one bit for each number (on a GPU). In place is safe here: no linear layer keeps its own output for its gradient (autograd would raise an error for one that does), and each makes the gradient of its
input anew and for ``Lower`` alone.

The gradient of a factor is added to a float32 tensor that the caller names (Megatron's ``main_grad``) as it is made, never rounded to the factor's type; where none is named autograd gets it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune_trainer.memory import MAX_KERNEL_RANK

LEVELS = 2**16
"""Dropout's probability is a multiple of 1 / LEVELS: the kernels draw 16 bits for a number."""
WIDE_BYTES, WIDE_RANK, WIDE_ITEMSIZE = 2**29, 16, 2
"""A gradient of so many bytes, as the MLP's first layer has on long rows, is read once for both gradients of B's product; up to this rank, to which the kernel pads smaller ones, and in numbers of this size."""


def threshold(dropout: float) -> int:
    """A number is dropped where its 16 random bits are below this; at least one value of them keeps it."""
    return min(round(dropout * LEVELS), LEVELS - 1)


def share_kept(dropout: float) -> float:
    """The probability with which a number is kept."""
    return 1 - threshold(dropout) / LEVELS


class Lower(torch.autograd.Function):
    """Hidden [..., in], A [rank, in] -> hidden as it is, and ``dropped(hidden) A^T`` [..., rank], where what is kept of hidden is not scaled up.

    What goes on with hidden must take the first output: its gradient comes back through here. A's gradient is added to ``sums`` [rank, in], if given.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, factor: Tensor, dropout: float, sums: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # nothing may go on with the first output
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(hidden)  # else the frozen base would make a gradient that nobody wants
        flat = hidden.flatten(0, -2)
        kept = None
        if dropout == 0:
            low = torch.mm(flat, factor.t())
        elif _has_kernels(hidden, factor.shape[0]):
            from finetune_trainer import low_rank_kernels

            low, kept = low_rank_kernels.lower(flat, factor, threshold(dropout))
        else:
            kept = torch.empty_like(flat, dtype=torch.bool).bernoulli_(share_kept(dropout))
            low = torch.mm(flat * kept, factor.t())
        ctx.sums = sums
        ctx.save_for_backward(hidden, factor, kept)
        return hidden, low.view(*hidden.shape[:-1], factor.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        onto, gradient = gradients
        hidden, factor, kept = ctx.saved_tensors
        flat, of_low = hidden.flatten(0, -2), gradient.flatten(0, -2)
        of_factor = _find_factor_gradient(flat, kept, of_low, ctx.sums)
        if not ctx.needs_input_grad[0]:
            return None, of_factor, None, None
        target = torch.empty_like(flat) if onto is None else onto.contiguous().flatten(0, -2)
        _add_product(target, of_low, factor, kept, onto=onto is not None)
        return target.view_as(hidden), of_factor, None, None


class Raise(torch.autograd.Function):
    """Output [..., out] of the base, which is overwritten, low [..., rank], B [out, rank] -> ``output + scale * low B^T``. B's gradient is added to ``sums`` [out, rank], if given."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, low: Tensor, factor: Tensor, scale: float, sums: Tensor | None) -> Tensor:
        ctx.scale, ctx.sums = scale, sums
        ctx.save_for_backward(low, factor)
        _add_product(output.view(-1, output.shape[-1]), low.flatten(0, -2), factor.t(), None, scale, onto=True)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        (gradient,) = gradients
        low, factor = ctx.saved_tensors
        of_low, of_factor = _find_gradients(gradient.flatten(0, -2), low.flatten(0, -2), factor, ctx.scale, ctx.sums)
        return gradient, of_low.view(low.shape), of_factor, None, None


def _has_kernels(hidden: Tensor, rank: int) -> bool:
    return hidden.is_cuda and rank <= MAX_KERNEL_RANK


def _is_wide(gradient: Tensor, rank: int) -> bool:
    """Whether a kernel that reads it once is faster than two of cuBLAS."""
    return _has_kernels(gradient, rank) and rank <= WIDE_RANK and gradient.itemsize == WIDE_ITEMSIZE and gradient.nbytes >= WIDE_BYTES


def _find_gradients(gradient: Tensor, low: Tensor, factor: Tensor, scale: float, sums: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of low, and of B where it was not added to ``sums``."""
    if not _is_wide(gradient, factor.shape[1]):
        of_low = gradient.new_empty(low.shape)
        torch.addmm(of_low, gradient, factor, beta=0, alpha=scale, out=of_low)
        return of_low, _sum_product(gradient.t(), low, scale, sums)
    from finetune_trainer import low_rank_kernels

    found = torch.zeros(factor.shape, device=gradient.device) if sums is None else sums
    of_low = low_rank_kernels.find_gradients(gradient, low, factor, scale, found)
    return of_low, found.to(factor.dtype) if sums is None else None


def _find_factor_gradient(hidden: Tensor, kept: Tensor | None, of_low: Tensor, sums: Tensor | None) -> Tensor | None:
    if kept is None:
        return _sum_product(of_low.t(), hidden, 1.0, sums)
    if not _has_kernels(hidden, of_low.shape[1]):
        return _sum_product(of_low.t(), hidden * kept, 1.0, sums)
    from finetune_trainer import low_rank_kernels

    found = torch.zeros(of_low.shape[1], hidden.shape[1], device=hidden.device) if sums is None else sums
    low_rank_kernels.add_factor_gradient(found, hidden, kept, of_low)
    return found.to(hidden.dtype) if sums is None else None


def _sum_product(left: Tensor, right: Tensor, scale: float, sums: Tensor | None) -> Tensor | None:
    """``scale * left right``, or nothing when it was added to ``sums``."""
    if sums is None:
        return torch.mm(left, right).mul_(scale)
    if sums.dtype is left.dtype:
        torch.addmm(sums, left, right, alpha=scale, out=sums)
    elif sums.is_cuda:
        torch.addmm(sums, left, right, out_dtype=sums.dtype, alpha=scale, out=sums)
    else:
        sums.addmm_(left.to(sums.dtype), right.to(sums.dtype), alpha=scale)
    return None


def _add_product(target: Tensor, left: Tensor, right: Tensor, kept: Tensor | None, scale: float = 1.0, *, onto: bool) -> None:
    """``scale * left right``, where kept, onto target or in its place."""
    if _has_kernels(target, left.shape[1]):
        from finetune_trainer import low_rank_kernels

        low_rank_kernels.add_product(target, left, right, kept, scale, onto=onto)
        torch.autograd.graph.increment_version(target)  # a kernel of ours writes behind autograd's back
    elif kept is None:
        torch.addmm(target, left, right, beta=float(onto), alpha=scale, out=target)
    else:
        change = torch.mm(left, right).mul_(kept)
        target.add_(change, alpha=scale) if onto else torch.mul(change, scale, out=target)
