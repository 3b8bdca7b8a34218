"""The output layer and its cross entropy on labelled positions only, the gradient made in the forward pass.

Logits are the largest tensor of a run: no label asks for those of a prompt, and the others are needed once, to make their own gradient ``softmax - one hot`` in their place.
With a frozen output layer that gradient goes through the layer at once, piece by piece, so that only [labelled, hidden] is kept. Where the vocabulary is cut over tensor-parallel
ranks, two numbers for each position are exchanged: the sum of a rank's exponentials, as a logarithm, and the label's logit.

The arithmetic of softmax is float32. Rows that pad the vocabulary are no part of it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from finetune_trainer import megatron_cpu
from finetune_trainer.memory import PIECE_BYTES
from finetune_trainer.shards import padded_vocab_size

megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402  (after the redirection)
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region  # noqa: E402


@dataclass(frozen=True)
class Shard:
    """The columns of the logits that this rank computes: tokens from ``first`` on, ``columns`` of them real, the others padding."""

    first: int
    columns: int
    group: Any
    """Ranks that hold the other columns; None where this one holds all."""


@dataclass(frozen=True)
class Labelled:
    """What is learned in a micro batch."""

    positions: Tensor
    """[labelled] int64: positions in the packed sequence whose next token is learned, ascending."""
    labels: Tensor
    """[labelled] int64: that token."""


def attach(output_layer: Any, vocab_size: int, tp_size: int, tp_rank: int) -> None:
    """Have Megatron-core's output layer compute losses instead of logits while ``labelled`` says so.

    Its ``forward`` is replaced, not the module, so that hooks of the call stay (DistributedDataParallel gathers the weight in one).
    """
    columns = padded_vocab_size(vocab_size, tp_size) // tp_size
    first = tp_rank * columns
    group = parallel_state.get_tensor_model_parallel_group() if tp_size > 1 else None
    shard = Shard(first, max(0, min(columns, vocab_size - first)), group)
    output_layer.labelled = None
    output_layer.forward = functools.partial(_forward, output_layer, output_layer.forward, shard)


@contextlib.contextmanager
def labelled(output_layer: Any, given: Labelled) -> Iterator[None]:
    """While it lasts, the output layer's result is the loss [labelled, 1, 1] float32 of each position."""
    output_layer.labelled = given
    try:
        yield
    finally:
        output_layer.labelled = None


def _forward(
    layer: Any, logits: Callable[..., Any], shard: Shard, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
) -> tuple[Tensor, None]:
    """Hidden [sequence / (tensor size with sequence parallelism), 1, hidden] -> logits, or losses."""
    given = layer.labelled
    if given is None:
        result: tuple[Tensor, None] = logits(hidden, weight=weight, runtime_gather_output=runtime_gather_output)
        return result
    if shard.group is not None:  # each rank's gradient is a part: their sum belongs to everybody's input
        spread = gather_from_sequence_parallel_region if layer.config.sequence_parallel else copy_to_tensor_model_parallel_region
        hidden = spread(hidden)
    scale = None if layer.config.grad_scale_func is None else layer.config.grad_scale_func(torch.ones(1, device=hidden.device))
    losses: Tensor = _LabelledLoss.apply(hidden[:, 0], layer.weight if weight is None else weight, given, shard, scale)  # type: ignore[no-untyped-call]
    return losses[:, None, None], None


class _LabelledLoss(torch.autograd.Function):
    """Hidden [sequence, hidden], weight [vocabulary share, hidden] -> losses [labelled] float32.

    ``scale`` [1] float32 is what the losses will be multiplied by (float16's loss scale): the gradient is made with it, so that its small numbers are not lost.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, given: Labelled, shard: Shard, scale: Tensor | None) -> Tensor:
        chosen = hidden.index_select(0, given.positions)
        ctx.trained, ctx.shape = weight.requires_grad, hidden.shape
        fitting = max(1, PIECE_BYTES // (weight.shape[0] * weight.itemsize))
        size = fitting // 128 * 128 or fitting  # whole tiles, and addresses that the kernels need not be compiled for again
        pieces = [slice(0, len(chosen))] if ctx.trained else [slice(start, start + size) for start in range(0, len(chosen), size)]
        losses = torch.empty(len(chosen), dtype=torch.float32, device=hidden.device)
        for piece in pieces:
            logits = chosen[piece] @ weight.t()
            losses[piece] = cross_entropy_(logits, given.labels[piece], shard, scale)
            if not ctx.trained:
                torch.mm(logits, weight, out=chosen[piece])  # the piece has done its part: its gradient takes its place
        ctx.save_for_backward(given.positions, scale, *((chosen, logits, weight) if ctx.trained else (chosen,)))
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        positions, scale, chosen, *trained = ctx.saved_tensors
        factor = (gradients[0] if scale is None else gradients[0] / scale)[:, None].to(chosen.dtype)
        of_weight = None
        if ctx.trained:
            logits, weight = trained
            of_weight = logits.t() @ (chosen * factor)
            chosen = logits @ weight
        of_hidden = torch.zeros(ctx.shape, dtype=chosen.dtype, device=chosen.device)
        of_hidden.index_copy_(0, positions, chosen * factor)
        return of_hidden, of_weight, None, None, None


def cross_entropy_(logits: Tensor, labels: Tensor, shard: Shard, scale: Tensor | None = None) -> Tensor:
    """Losses [rows] float32 of this rank's logits [rows, columns and padding], which become their own gradient, times ``scale``. Collective over the shard's group."""
    if _has_kernels(logits):
        from finetune_trainer import kernels

        sums, targets = kernels.softmax_statistics(logits, labels, shard.first, shard.columns)
    else:
        sums, targets = _softmax_statistics(logits, labels, shard)
    if shard.group is not None:
        sums, targets = _combine(sums, targets, shard.group)
    if _has_kernels(logits):
        kernels.write_softmax_gradient(logits, labels, sums, shard.first, shard.columns, scale)
    else:
        _write_softmax_gradient(logits, labels, sums, shard, scale)
    return sums - targets


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _combine(sums: Tensor, targets: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    own = torch.stack([sums, targets])
    every = own.new_empty(distributed.get_world_size(group), *own.shape)
    distributed.all_gather(list(every), own, group=group)
    return every[:, 0].logsumexp(dim=0), every[:, 1].sum(dim=0)


def _softmax_statistics(logits: Tensor, labels: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    real = logits[:, : shard.columns].float()
    sums = real.logsumexp(dim=1)
    rows, columns = _own_labels(labels, shard)
    targets = torch.zeros_like(sums)
    targets[rows] = real[rows, columns]
    return sums, targets


def _write_softmax_gradient(logits: Tensor, labels: Tensor, sums: Tensor, shard: Shard, scale: Tensor | None) -> None:
    values = logits.float().sub_(sums[:, None]).exp_()
    rows, columns = _own_labels(labels, shard)
    values[rows, columns] -= 1.0
    values[:, shard.columns :] = 0.0
    if scale is not None:
        values *= scale
    if values.data_ptr() != logits.data_ptr():
        logits.copy_(values)


def _own_labels(labels: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Rows whose label is among this rank's columns, and that column."""
    local = labels - shard.first
    rows = ((local >= 0) & (local < shard.columns)).nonzero()[:, 0]
    return rows, local[rows]
