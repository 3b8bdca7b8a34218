"""Shares of tensors: equal, without gaps, and the padding of the vocabulary at the end."""

from __future__ import annotations

import pytest

from finetune_trainer.contract import ModelError
from finetune_trainer.rules import Cut, Dims
from finetune_trainer.shards import Share, local_dims, padded_vocab_size, share_of, share_slices, whole_shape

DIMS = Dims(num_query_groups=4, num_attention_heads=12, head_dim=64, vocab_size=419, padded_vocab_size=512)


@pytest.mark.parametrize(
    ("vocab_size", "tp", "padded"),
    [(49152, 8, 49152), (151936, 8, 151936), (128256, 8, 128256), (419, 1, 424), (419, 4, 448), (513, 4, 544), (16, 2, 16)],
)
def test_vocabulary_is_padded_to_eight_rows_a_rank(vocab_size: int, tp: int, padded: int) -> None:
    assert padded_vocab_size(vocab_size, tp) == padded


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_cover_a_dimension_once(size: int) -> None:
    assert [index for rank in range(size) for index in range(8)[share_of(8, Share(rank, size))]] == list(range(8))


def test_share_of_a_padded_dimension_ends_where_the_data_end() -> None:
    shares = [share_of(300, Share(rank, 4), 512) for rank in range(4)]
    assert shares == [slice(0, 128), slice(128, 256), slice(256, 300), slice(300, 300)]


def test_slices_follow_the_cut() -> None:
    share = Share(1, 2)
    assert share_slices((6, 8), Cut.WHOLE, share) == (slice(0, 6), slice(0, 8))
    assert share_slices((6, 8), Cut.ROWS, share) == (slice(3, 6), slice(0, 8))
    assert share_slices((6, 8), Cut.COLUMNS, share) == (slice(0, 6), slice(4, 8))
    assert share_slices((6,), Cut.ROWS, share) == (slice(3, 6),)


def test_whole_shape_undoes_the_cut() -> None:
    assert whole_shape((3, 8), Cut.ROWS, 2) == (6, 8)
    assert whole_shape((6, 4), Cut.COLUMNS, 2) == (6, 8)
    assert whole_shape((6, 8), Cut.WHOLE, 2) == (6, 8)


def test_dimension_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ModelError, match=r"dimension of 9 does not divide into 2 equal parts; parallelism\.tensorModelParallelSize"):
        share_slices((9, 8), Cut.ROWS, Share(0, 2))


def test_local_dims_are_those_of_the_rank() -> None:
    assert local_dims(DIMS, Share(0, 2)) == Dims(2, 6, 64, 256, 256)
    assert local_dims(DIMS, Share(1, 2)) == Dims(2, 6, 64, 163, 256)


def test_tensor_size_that_does_not_divide_the_groups_is_refused() -> None:
    with pytest.raises(ModelError, match=r"tensorModelParallelSize is 8; it must divide the model's 4 query groups"):
        local_dims(DIMS, Share(0, 8))
