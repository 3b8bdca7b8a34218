from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from finetune_trainer.contract import ModelError
from finetune_trainer.data.rows import Row, Rows, check_vocabulary, fit_length, pack


def make_row(length: int, learned: slice = slice(2, None), first: int = 100) -> Row:
    labelled = np.zeros(length, dtype=bool)
    labelled[learned] = True
    return Row(np.arange(first, first + length, dtype=np.int32), labelled)


@pytest.mark.parametrize("strategy", ["delete", "left", "right"])
def test_row_that_fits_is_kept_as_it_is(strategy: Literal["delete", "left", "right"]) -> None:
    row = make_row(8)
    assert fit_length(row, 8, strategy) is row
    assert fit_length(row, None, strategy) is row


def test_long_row_is_dropped_or_cut_on_the_side_that_is_named() -> None:
    row = make_row(8, slice(3, 6))
    assert fit_length(row, 7, "delete") is None
    left, right = fit_length(row, 4, "left"), fit_length(row, 4, "right")
    assert left is not None
    assert right is not None
    assert left.input_ids.tolist() == [104, 105, 106, 107]
    assert left.labelled.tolist() == [True, True, False, False]
    assert right.input_ids.tolist() == [100, 101, 102, 103]
    assert right.labelled.tolist() == [False, False, False, True]


def test_cut_row_without_a_token_to_learn_is_dropped() -> None:
    assert fit_length(make_row(8, slice(5, 8)), 4, "right") is None
    assert fit_length(make_row(8, slice(0, 5)), 4, "left") is None, "its one labelled token is the first, which nothing predicts"


def test_packed_rows_fill_sequences_and_keep_their_boundaries() -> None:
    rows = [make_row(length, first=1000 * number) for number, length in enumerate([3, 7, 5, 2, 10, 4])]
    packed = pack(rows, 10)
    assert [row.segments for row in packed] == [(3, 7), (5, 4), (2,), (10,)]
    assert packed[0].input_ids.tolist() == [*range(3), *range(1000, 1007)]
    assert packed[0].labelled.tolist() == [False, False, True, False, False, True, True, True, True, True]
    assert sum(len(row) for row in packed) == sum(len(row) for row in rows)


def test_packing_loses_no_row_and_fills_most_of_each_sequence() -> None:
    generator = np.random.default_rng(0)
    rows = [make_row(int(length), first=10_000 * number) for number, length in enumerate(generator.integers(3, 300, 500))]
    packed = pack(rows, 512)
    assert max(len(row) for row in packed) <= 512
    assert sorted(token for row in packed for token in row.input_ids) == sorted(token for row in rows for token in row.input_ids)
    assert sum(len(row) for row in rows) / (512 * len(packed)) > 0.98
    assert [row.segments for row in pack(rows, 512)] == [row.segments for row in packed]


def test_row_of_one_conversation_is_one_segment() -> None:
    assert make_row(5).segments == (5,)


def test_digest_sees_tokens_labels_and_boundaries() -> None:
    one = Rows([make_row(4), make_row(3)], {})
    assert one.digest == Rows([make_row(4), make_row(3)], {}).digest
    others = [
        Rows([make_row(3), make_row(4)], {}),
        Rows([make_row(4), make_row(3, slice(1, None))], {}),
        Rows([make_row(4), make_row(3, first=101)], {}),
        Rows(pack([make_row(4), make_row(3)], 8), {}),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 5
    assert len(one.digest) == 16


def test_token_that_the_model_has_no_embedding_for_is_refused() -> None:
    rows = Rows([make_row(4), make_row(8, first=200), make_row(4)], {})
    check_vocabulary(rows, 208)
    with pytest.raises(
        ModelError, match=r"the token id 207, but vocab_size in the model's config.json is 207, so ids end at 206: tokenizer and model do not belong together"
    ):
        check_vocabulary(rows, 207)
