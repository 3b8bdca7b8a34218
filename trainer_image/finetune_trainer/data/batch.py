"""Rows into the tensors of one micro batch: padding-free, one row after another (``thd``). The only module here that needs torch, which it imports when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from finetune_trainer.data.rows import Row

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro batch; n is its number of tokens, padding included."""

    tokens: torch.Tensor  # [1, n] int64
    labelled: torch.Tensor  # [k] int64: positions whose next token is learned, ascending
    labels: torch.Tensor  # [k] int64: that next token
    position_ids: torch.Tensor  # [1, n] int64: from 0 in each row
    cu_seqlens: torch.Tensor  # [sequences + 1] int32: where each sequence begins, and the end
    max_seqlen: int
    num_tokens: int  # padding not counted


def collate(rows: Sequence[Row], multiple: int, device: torch.device | str) -> Batch:
    """The rows one after another, the end padded to a multiple of ``multiple`` with a sequence of its own that counts nowhere.

    The conversations of a packed row are sequences of their own too.
    """
    import torch

    ids = np.concatenate([row.input_ids for row in rows])
    lengths = [length for row in rows for length in row.segments]
    padding = -len(ids) % multiple
    lengths_padded = [*lengths, padding] if padding else lengths
    cu_seqlens = np.cumsum([0, *lengths_padded])
    tokens = np.zeros(len(ids) + padding, dtype=np.int64)
    tokens[: len(ids)] = ids
    learned = np.concatenate([row.labelled for row in rows])
    learned[np.cumsum([0, *lengths[:-1]])] = False  # the first token of a sequence comes after none of its own
    labelled = np.flatnonzero(learned) - 1
    position_ids = np.arange(len(tokens)) - np.repeat(cu_seqlens[:-1], lengths_padded)

    def put(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device)

    return Batch(
        tokens=put(tokens)[None],
        labelled=put(labelled),
        labels=put(tokens[labelled + 1]),
        position_ids=put(position_ids)[None],
        cu_seqlens=put(cu_seqlens.astype(np.int32)),
        max_seqlen=max(lengths_padded),
        num_tokens=len(ids),
    )
