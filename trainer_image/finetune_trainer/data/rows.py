"""Rows of tokens, as training reads them: what they are, how a long one is cut, how short ones are packed into one sequence. Pure."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.contract import ModelError


@dataclass(frozen=True, eq=False)
class Row:
    """Tokens of one conversation, or of several that were packed.

    ``labelled[i]``: token i is to be predicted and counts in the loss. ``lengths`` are the packed conversations' own, empty when there is one: attention and positions begin anew with each.
    """

    input_ids: NDArray[np.int32]  # [tokens]
    labelled: NDArray[np.bool_]  # [tokens]
    lengths: tuple[int, ...] = ()

    @property
    def segments(self) -> tuple[int, ...]:
        """Lengths of the conversations in this row, in tokens; they sum to the row's."""
        return self.lengths or (len(self.input_ids),)

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, eq=False)
class Rows:
    """All rows of a run, in the order of the data set, with ``counts``: rows read, dropped, trained."""

    rows: Sequence[Row]
    counts: dict[str, int]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        return [len(row) for row in self.rows]

    @cached_property
    def digest(self) -> str:
        """Hash of every token, label and boundary, 16 hexadecimal digits: equal in two processes that will train on the same."""
        content = hashlib.sha256()
        for row in self.rows:
            content.update(np.array(row.segments, dtype="<i8").tobytes())
            content.update(row.input_ids.astype("<i4", copy=False).tobytes())
            content.update(np.packbits(row.labelled).tobytes())
        return content.hexdigest()[:16]


def check_vocabulary(rows: Rows, vocab_size: int) -> None:
    """Raise ModelError where a row has a token for which the model has no embedding."""
    largest = max(int(row.input_ids.max()) for row in rows.rows)
    if largest >= vocab_size:
        raise ModelError(
            f"the tokenizer gives the token id {largest}, but vocab_size in the model's config.json is {vocab_size}, so ids end at {vocab_size - 1}: "
            "tokenizer and model do not belong together; expected the tokenizer files that came with the model"
        )


def has_label(row: Row) -> bool:
    """Whether any token of the row is learned; the first one never is: nothing stands before it."""
    return bool(row.labelled[1:].any())


def fit_length(row: Row, max_length: int | None, strategy: Literal["delete", "left", "right"]) -> Row | None:
    """The row when it has at most ``max_length`` tokens, else what the strategy makes of it; None when nothing to learn is left."""
    if max_length is None or len(row) <= max_length:
        return row
    if strategy == "delete":
        return None
    kept = slice(-max_length, None) if strategy == "left" else slice(0, max_length)
    cut = Row(row.input_ids[kept].copy(), row.labelled[kept].copy())
    return cut if has_label(cut) else None


def pack(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Rows joined into sequences of at most ``max_length`` tokens: best fit, longest first, ties by number; the sequences in the order of their first rows."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for number in sorted(range(len(rows)), key=lambda index: (-len(rows[index]), index)):
        length = len(rows[number])
        place = bisect.bisect_left(free, (length, 0))
        if place < len(free):
            room, target = free.pop(place)
            bins[target].append(number)
        else:
            room, target = max_length, len(bins)
            bins.append([number])
        if room > length:
            bisect.insort(free, (room - length, target))
    return [_join([rows[number] for number in sorted(members)]) for members in sorted(bins, key=min)]


def _join(rows: Sequence[Row]) -> Row:
    return Row(np.concatenate([row.input_ids for row in rows]), np.concatenate([row.labelled for row in rows]), tuple(len(row) for row in rows))
