from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.data.order import deal, make_generator, make_interleaving, make_sample, micro_batches, order


@dataclass(frozen=True)
class Place:
    rank: int
    size: int


def sample(num_rows: int, count: int | None, shuffle: bool = True, seed: int = 42) -> list[int]:
    indices: list[int] = make_sample(num_rows, count, shuffle, make_generator(seed, 0)).tolist()
    return indices


def test_no_number_takes_every_row_once_in_order() -> None:
    assert sample(5, None) == [0, 1, 2, 3, 4]


def test_fewer_rows_than_there_are_are_drawn_without_replacement() -> None:
    drawn = sample(100, 30)
    assert len(set(drawn)) == 30
    assert drawn != sorted(drawn)
    assert drawn == sample(100, 30)
    assert drawn != sample(100, 30, seed=43)


def test_more_rows_than_there_are_repeat_the_whole_set_and_draw_the_rest() -> None:
    drawn = sample(10, 37)
    assert drawn[:30] == list(range(10)) * 3
    assert len(set(drawn[30:])) == 7
    assert set(Counter(drawn).values()) == {3, 4}


def test_without_shuffling_the_first_rows_are_taken() -> None:
    assert sample(4, 2, shuffle=False) == [0, 1]
    assert sample(4, 6, shuffle=False) == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [  # what datasets.interleave_datasets (5.2.0) gives for data sets of 3, 4 and 2 rows
        ("first_exhausted", [(1, 0), (0, 0), (2, 0), (1, 1), (0, 1), (2, 1)]),
        ("all_exhausted", [(1, 0), (0, 0), (2, 0), (1, 1), (0, 1), (2, 1), (1, 2), (1, 3), (0, 2)]),
    ],
)
def test_interleaving_is_that_of_the_datasets_library(strategy: str, expected: list[tuple[int, int]]) -> None:
    assert make_interleaving([3, 4, 2], [0.5, 0.3, 0.2], 42, strategy) == expected  # type: ignore[arg-type]


def test_interleaving_with_more_than_a_thousand_draws_reads_every_row_in_turn() -> None:
    pairs = make_interleaving([2000, 3000], [0.5, 0.5], 0, "first_exhausted")
    assert [index for source, index in pairs if source == 0] == list(range(2000))
    assert pairs[-1] == (0, 1999)
    everything = make_interleaving([2000, 3000], [0.5, 0.5], 0, "all_exhausted")
    assert everything[: len(pairs)] == pairs
    assert set(everything) == {(source, index) for source, length in ((0, 2000), (1, 3000)) for index in range(length)}


def test_each_epoch_is_another_permutation_of_all_rows() -> None:
    rows = order(50, seed=1, shuffle=True)
    epochs = [[rows[position] for position in range(epoch * 50, epoch * 50 + 50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_is_a_function_of_the_seed_and_the_position_alone() -> None:
    forwards = order(7, seed=3, shuffle=True)
    backwards = order(7, seed=3, shuffle=True)
    expected = [forwards[position] for position in range(40)]
    assert [backwards[position] for position in reversed(range(40))] == expected[::-1]
    assert [order(7, seed=4, shuffle=True)[position] for position in range(40)] != expected


def test_order_of_a_seed_does_not_change_between_versions() -> None:
    rows = order(8, seed=42, shuffle=True)
    assert [rows[position] for position in range(16)] == [6, 5, 0, 4, 7, 3, 1, 2, 6, 5, 1, 7, 2, 0, 3, 4]


def test_order_without_shuffling_is_that_of_the_rows() -> None:
    rows = order(3, seed=3, shuffle=False)
    assert [rows[position] for position in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 0 rows to order; at least 1 is needed"):
        order(0, seed=1, shuffle=True)


LENGTHS = [5, 90, 7, 40, 12, 61, 33, 2, 80, 19, 55, 8, 71, 3, 26, 47, 11, 64, 38, 15]


@pytest.mark.parametrize(("size", "micro_batch_size"), [(1, 1), (1, 8), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_every_layout_reads_the_same_rows_in_a_step(size: int, micro_batch_size: int) -> None:
    rows = order(20, seed=5, shuffle=True)
    for step in range(6):
        shares = [micro_batches(rows, step, 8, micro_batch_size, Place(rank, size), LENGTHS) for rank in range(size)]
        assert {len(batch) for share in shares for batch in share} == {micro_batch_size}
        assert len({len(share) for share in shares}) == 1
        together = [row for share in shares for batch in share for row in batch]
        assert sorted(together) == sorted(rows[position] for position in range(step * 8, step * 8 + 8))


def test_one_micro_batch_keeps_the_order_of_the_rows() -> None:
    rows = order(20, seed=5, shuffle=True)
    assert micro_batches(rows, 1, 8, 8, Place(0, 1), LENGTHS) == [[rows[position] for position in range(8, 16)]]


def test_processes_get_about_as_many_tokens_each() -> None:
    rows = order(20, seed=5, shuffle=False)
    shares = [micro_batches(rows, 0, 16, 2, Place(rank, 2), LENGTHS) for rank in range(2)]
    tokens = [sum(LENGTHS[row] for batch in share for row in batch) for share in shares]
    assert sum(tokens) == sum(LENGTHS[:16]) == 559
    assert abs(tokens[0] - tokens[1]) <= 3
    in_order = [sum(LENGTHS[0:8]), sum(LENGTHS[8:16])]
    assert abs(in_order[0] - in_order[1]) == 59, "rows as they come would differ by a fifth"


def test_micro_batches_are_balanced_too() -> None:
    rows = order(20, seed=5, shuffle=False)
    batches = [batch for rank in range(2) for batch in micro_batches(rows, 0, 16, 4, Place(rank, 2), LENGTHS)]
    assert max(sum(LENGTHS[row] for row in batch) for batch in batches) <= 1.05 * 559 / 4


def test_rows_of_one_length_are_dealt_evenly() -> None:
    assert sorted(map(len, deal([7] * 12, 4))) == [3, 3, 3, 3]
    assert deal([], 3) == [[], [], []]


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_groups_differ_by_no_more_than_the_largest_size(groups: int, room: int, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4096), min_size=groups * room, max_size=groups * room))
    dealt = deal(sizes, groups)
    assert sorted(index for group in dealt for index in group) == list(range(len(sizes)))
    assert {len(group) for group in dealt} == {room}
    sums = [sum(sizes[index] for index in group) for group in dealt]
    assert max(sums) - min(sums) <= max(sizes)


def test_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"globalBatchSize is 8; it must be a multiple of microBatchSize \(3\) x data-parallel size \(2\)"):
        micro_batches(order(4, 0, False), 0, 8, 3, Place(0, 2), [1] * 4)


def test_purposes_and_numbers_have_their_own_random_numbers() -> None:
    drawn = [tuple(make_generator(42, purpose, number).integers(0, 2**31, 4)) for purpose in range(3) for number in range(3)]
    assert len(set(drawn)) == 9
    assert np.array_equal(make_generator(42, 1, 2).permutation(9), make_generator(42, 1, 2).permutation(9))
