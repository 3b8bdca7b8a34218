"""The collectives of conversion. Nothing here knows about names, layouts or files."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from finetune_trainer.shards import Share

Value = TypeVar("Value")


def gather(value: Value, group: ProcessGroup) -> list[Value]:
    """The value of every member of ``group``, on every member, in the order of ranks. Values are pickled."""
    values: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(values, value, group=group)
    return values


def columns_to_rows(columns: Tensor, share: Share, group: ProcessGroup) -> tuple[int, Tensor]:
    """Exchange a share of the columns of a matrix for a share of its rows: the number of the first row, and the rows, whole.

    ``columns`` [rows, columns / size] on every member of ``group``; the result is [rows / size, columns], the first
    members having one row more where the rows do not divide. Each member sends and receives about its own share once.
    """
    if share.size == 1:
        return 0, columns
    counts = [len(part) for part in torch.arange(columns.shape[0]).tensor_split(share.size)]
    data = columns.contiguous().view(torch.uint8)
    mine, width = counts[share.rank], data.shape[1]
    received = data.new_empty(share.size * mine * width)
    distributed.all_to_all_single(received, data.reshape(-1), [mine * width] * share.size, [count * width for count in counts], group=group)
    rows = received.view(share.size, mine, width).transpose(0, 1).reshape(mine, share.size * width)
    return sum(counts[: share.rank]), rows.view(columns.dtype)
