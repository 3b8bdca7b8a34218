"""Rows in a file of flat arrays, which several processes map: one copy of the tokens, however many read them.

A row that sampling has taken more than once is in the file once. ``Outline`` is all that must be known besides the file.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.data.rows import Row, Rows


@dataclass(frozen=True)
class Outline:
    """How many rows, rows that differ, packed conversations and tokens a file has, and what was counted and hashed when it was written."""

    rows: int
    distinct: int
    conversations: int
    tokens: int
    counts: dict[str, int]
    digest: str

    def arrays(self) -> list[tuple[type[np.generic], int]]:
        """Type and length of every array of the file, in its order; wide types first, so that each lies where its type wants it."""
        return [
            (np.int64, self.rows),  # which of the distinct rows
            (np.int64, self.distinct + 1),  # where its tokens begin, and the end
            (np.int64, self.distinct + 1),  # where its lengths of packed conversations begin, and the end
            (np.int32, self.conversations),
            (np.int32, self.tokens),
            (np.bool_, self.tokens),
        ]


def write_rows(rows: Rows, file: BinaryIO) -> Outline:
    """Write rows where ``map_rows`` will find them. Raises OSError."""
    distinct = list({id(row): row for row in rows.rows}.values())
    numbers = {id(row): number for number, row in enumerate(distinct)}
    starts = np.cumsum([0, *(len(row) for row in distinct)], dtype=np.int64)
    packed = np.cumsum([0, *(len(row.lengths) for row in distinct)], dtype=np.int64)
    file.write(np.array([numbers[id(row)] for row in rows.rows], dtype=np.int64).data)
    file.write(starts.data)
    file.write(packed.data)
    file.write(np.array([length for row in distinct for length in row.lengths], dtype=np.int32).data)
    for row in distinct:
        file.write(np.ascontiguousarray(row.input_ids, dtype=np.int32).data)
    for row in distinct:
        file.write(np.ascontiguousarray(row.labelled, dtype=np.bool_).data)
    return Outline(len(rows.rows), len(distinct), int(packed[-1]), int(starts[-1]), dict(rows.counts), rows.digest)


def map_rows(file: int, outline: Outline) -> Rows:
    """The rows of a file, by its descriptor, which may be closed afterwards; nothing is copied, and nothing can be written. Raises OSError."""
    content = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    arrays: list[NDArray[Any]] = []
    offset = 0
    for kind, length in outline.arrays():
        arrays.append(np.frombuffer(content, kind, length, offset) if length else np.empty(0, kind))
        offset += arrays[-1].nbytes
    return MappedRows(_Views(*arrays), outline.counts, outline)


class _Views(Sequence[Row]):
    """Rows that are made when they are asked for, of arrays that all of them share."""

    def __init__(
        self,
        numbers: NDArray[np.int64],
        starts: NDArray[np.int64],
        packed: NDArray[np.int64],
        conversations: NDArray[np.int32],
        input_ids: NDArray[np.int32],
        labelled: NDArray[np.bool_],
    ) -> None:
        self._numbers = numbers
        self._starts = starts
        self._packed = packed
        self._conversations = conversations
        self._input_ids = input_ids
        self._labelled = labelled

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        number = self._numbers.item(index)
        tokens = slice(self._starts.item(number), self._starts.item(number + 1))
        packed = slice(self._packed.item(number), self._packed.item(number + 1))
        return Row(self._input_ids[tokens], self._labelled[tokens], tuple(self._conversations[packed].tolist()))

    def lengths(self) -> list[int]:
        lengths: list[int] = np.diff(self._starts)[self._numbers].tolist()
        return lengths


@dataclass(frozen=True, eq=False)
class MappedRows(Rows):
    """Rows of which some things are known without a look at each."""

    rows: _Views
    outline: Outline

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        return self.rows.lengths()

    @cached_property
    def digest(self) -> str:
        """As the process has computed it that has written the file."""
        return self.outline.digest
