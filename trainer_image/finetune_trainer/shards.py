"""Which part of a tensor belongs to which tensor-parallel rank. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune_trainer.contract import ModelError
from finetune_trainer.rules import Cut, Dims

VOCAB_MULTIPLE = 8
"""A rank's share of the vocabulary is a multiple of this."""


@dataclass(frozen=True)
class Share:
    """Member ``rank`` of a group of ``size`` processes."""

    rank: int
    size: int


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding over all ``tp`` ranks: the next multiple of 8 x tp.

    Matrix units want multiples of 8. Megatron-LM pads to 128 x tp; with 8 the common vocabularies need no padding, which
    costs memory, and time to keep out of the loss.
    """
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def share_of(size: int, share: Share, padded: int | None = None) -> slice:
    """The indices, out of ``size``, that belong to a rank: equal shares of ``padded`` (or of ``size``), cut off where ``size`` ends.

    Raises ModelError where the shares would not be equal.
    """
    total = size if padded is None else padded
    if total % share.size:
        raise ModelError(f"a tensor dimension of {total} does not divide into {share.size} equal parts; parallelism.tensorModelParallelSize must divide it")
    step = total // share.size
    return slice(min(share.rank * step, size), min((share.rank + 1) * step, size))


def share_slices(shape: Sequence[int], cut: Cut, share: Share, padded_rows: int | None = None) -> tuple[slice, ...]:
    """One slice per dimension: what a rank holds of a Hugging Face tensor of ``shape``.

    ``padded_rows``: the rows of the Megatron-core tensor where it has more (the vocabulary). Raises ModelError for a
    dimension that does not divide.
    """
    slices = [slice(0, size) for size in shape]
    if cut is Cut.ROWS:
        slices[0] = share_of(shape[0], share, padded_rows)
    elif cut is Cut.COLUMNS:
        slices[1] = share_of(shape[1], share)
    return tuple(slices)


def whole_shape(shape: Sequence[int], cut: Cut, size: int) -> tuple[int, ...]:
    """The shape over all ``size`` ranks of a Megatron-core tensor whose share has ``shape``."""
    whole = list(shape)
    if cut is not Cut.WHOLE:
        whole[0 if cut is Cut.ROWS else 1] *= size
    return tuple(whole)


def local_dims(dims: Dims, share: Share) -> Dims:
    """The sizes of one rank's share; raises ModelError where query groups or the padded vocabulary do not divide."""
    for name, count in (("query groups", dims.num_query_groups), ("attention heads", dims.num_attention_heads)):
        if count % share.size:
            raise ModelError(f"parallelism.tensorModelParallelSize is {share.size}; it must divide the model's {count} {name}")
    rows = share_of(dims.vocab_size, share, dims.padded_vocab_size)
    return replace(
        dims,
        num_query_groups=dims.num_query_groups // share.size,
        num_attention_heads=dims.num_attention_heads // share.size,
        vocab_size=rows.stop - rows.start,
        padded_vocab_size=dims.padded_vocab_size // share.size,
    )
