"""The two products of an adapter, as functions with gradients of their own, so that the large tensors beside them are read and written as rarely as can be.

``B`` is added onto the output of the base in place; the gradient through ``A`` is added onto the one that the base has found for the same input, in place too; dropout leaves no copy of its
input behind, only one bit for each number (on a GPU). In place is safe here: no linear layer keeps its own output for its gradient (autograd would raise an error for one that does), and each makes the gradient of its
input anew and for ``Lower`` alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune_trainer.memory import MAX_KERNEL_RANK


class Lower(torch.autograd.Function):
    """Hidden [..., in], A [rank, in] -> hidden as it is, and ``scale * dropout(hidden) A^T`` [..., rank].

    What goes on with hidden must take the first output: its gradient comes back through here.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, factor: Tensor, dropout: float, scale: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # nothing may go on with the first output
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(hidden)  # else the frozen base would make a gradient that nobody wants
        flat = hidden.flatten(0, -2)
        kept = None
        if dropout == 0:
            ctx.scale = scale
            low = torch.mm(flat, factor.t()).mul_(scale)
        elif _has_kernels(hidden, factor.shape[0]):
            from finetune_trainer import low_rank_kernels

            threshold = low_rank_kernels.threshold(dropout)
            ctx.scale = scale / low_rank_kernels.share_kept(threshold)
            low, kept = low_rank_kernels.lower(flat, factor, threshold, ctx.scale)
        else:
            ctx.scale = scale / (1 - dropout)
            kept = torch.empty_like(flat, dtype=torch.bool).bernoulli_(1 - dropout)
            low = torch.mm(flat * kept, factor.t()).mul_(ctx.scale)
        ctx.save_for_backward(hidden, factor, kept)
        return hidden, low.view(*hidden.shape[:-1], factor.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        onto, gradient = gradients
        hidden, factor, kept = ctx.saved_tensors
        flat, of_low = hidden.flatten(0, -2), gradient.flatten(0, -2) * ctx.scale
        of_factor = _find_factor_gradient(flat, kept, of_low)
        if not ctx.needs_input_grad[0]:
            return None, of_factor, None, None
        target = torch.empty_like(flat) if onto is None else onto.contiguous().flatten(0, -2)
        _add_product(target, of_low, factor, kept, onto=onto is not None)
        return target.view_as(hidden), of_factor, None, None


class Raise(torch.autograd.Function):
    """Output [..., out] of the base, which is overwritten, low [..., rank], B [out, rank] -> ``output + low B^T``."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, low: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(low, factor)
        _add_product(output.view(-1, output.shape[-1]), low.flatten(0, -2), factor.t(), None, onto=True)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (gradient,) = gradients
        low, factor = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        return gradient, torch.mm(flat, factor).view_as(low), torch.mm(flat.t(), low.flatten(0, -2))


def _has_kernels(hidden: Tensor, rank: int) -> bool:
    return hidden.is_cuda and rank <= MAX_KERNEL_RANK


def _find_factor_gradient(hidden: Tensor, kept: Tensor | None, of_low: Tensor) -> Tensor:
    if kept is None:
        return torch.mm(of_low.t(), hidden)
    if _has_kernels(hidden, of_low.shape[1]):
        from finetune_trainer import low_rank_kernels

        return low_rank_kernels.find_factor_gradient(hidden, kept, of_low)
    return torch.mm(of_low.t(), hidden * kept)


def _add_product(target: Tensor, left: Tensor, right: Tensor, kept: Tensor | None, *, onto: bool) -> None:
    """``left right``, where kept, onto target or in its place."""
    if _has_kernels(target, left.shape[1]):
        from finetune_trainer import low_rank_kernels

        low_rank_kernels.add_product(target, left, right, kept, onto=onto)
        torch.autograd.graph.increment_version(target)  # a kernel of ours writes behind autograd's back
    elif kept is None:
        torch.addmm(target, left, right, beta=float(onto), out=target)
    else:
        change = torch.mm(left, right).mul_(kept)
        target.add_(change) if onto else target.copy_(change)
