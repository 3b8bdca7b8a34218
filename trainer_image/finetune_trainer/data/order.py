"""Which rows are used, and when: sampling, mixing, the order of an epoch, the micro batches of a step.

All of it is a function of lengths and seeds, the same in every process; which rows a step has is the same on every layout. Random numbers are numpy's PCG64, seeded by ``SeedSequence([seed, purpose, number])``, one generator for
each purpose, so that changing one draw moves no other; interleaving alone uses ``PCG64(data_seed)`` as ``datasets.interleave_datasets`` does, and gives its result.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
SAMPLING, MIXING, EPOCHS = 0, 1, 2  # purposes of random numbers


class DataParallel(Protocol):
    """Which of the data-parallel processes this is."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...


def make_generator(seed: int, purpose: int, number: int = 0) -> np.random.Generator:
    """Random numbers of one purpose."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, purpose, number])))


def make_sample(num_rows: int, count: int | None, shuffle: bool, generator: np.random.Generator) -> Indices:
    """``count`` of ``num_rows`` rows: the whole set ``count // num_rows`` times, then the rest drawn without replacement (the first rows, when not ``shuffle``).

    ``None`` takes every row once.
    """
    if count is None:
        return np.arange(num_rows)
    whole, rest = divmod(count, num_rows)
    drawn = generator.permutation(num_rows)[:rest] if shuffle else np.arange(rest)
    return np.concatenate([np.tile(np.arange(num_rows), whole), drawn]).astype(np.int64)


def make_interleaving(
    lengths: Sequence[int], probabilities: Sequence[float], seed: int, stopping_strategy: Literal["first_exhausted", "all_exhausted"]
) -> list[tuple[int, int]]:
    """Pairs of data set and row, drawn with the probabilities until the first data set (or every one, the used-up ones starting again) has been read to its end."""
    generator = np.random.default_rng(seed)
    is_finished = any if stopping_strategy == "first_exhausted" else all
    exhausted = [False] * len(lengths)
    position = [0] * len(lengths)
    pairs: list[tuple[int, int]] = []
    while True:
        for source in generator.choice(len(lengths), size=1000, p=list(probabilities)).tolist():
            if is_finished(exhausted):
                return pairs
            pairs.append((source, position[source]))
            position[source] = (position[source] + 1) % lengths[source]
            exhausted[source] |= position[source] == 0


class Order:
    """The endless sequence of row numbers that training reads: ``order[position]``, epoch after epoch, each a new permutation when shuffled."""

    def __init__(self, num_rows: int, seed: int, shuffle: bool) -> None:
        self.num_rows = num_rows
        self._seed = seed
        self._shuffle = shuffle
        self._epoch: tuple[int, Indices] = (-1, np.arange(0))

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        if not self._shuffle:
            return place
        if self._epoch[0] != epoch:
            self._epoch = (epoch, make_generator(self._seed, EPOCHS, epoch).permutation(self.num_rows))
        return int(self._epoch[1][place])


def order(num_rows: int, seed: int, shuffle: bool) -> Order:
    """The order in which ``num_rows`` rows are read: a function of ``seed`` alone."""
    if num_rows < 1:
        raise ValueError(f"there are {num_rows} rows to order; at least 1 is needed")
    return Order(num_rows, seed, shuffle)


def micro_batches(order: Order, step: int, global_batch_size: int, micro_batch_size: int, dp: DataParallel, lengths: Sequence[int]) -> list[list[int]]:
    """The rows that this data-parallel process reads in optimizer step ``step`` (from 0): one list for each micro batch. ``lengths``: tokens of every row.

    The step's rows are positions ``step * global_batch_size`` onwards whatever the layout is; they are dealt so that micro batches, and then processes, have about as
    many tokens each: a step lasts as long as its slowest process, and takes the memory of its largest micro batch.
    """
    num_micro_batches, rest = divmod(global_batch_size, micro_batch_size * dp.size)
    if rest:
        raise ValueError(
            f"globalBatchSize is {global_batch_size}; it must be a multiple of microBatchSize ({micro_batch_size}) x data-parallel size ({dp.size})"
        )
    rows = [order[position] for position in range(step * global_batch_size, (step + 1) * global_batch_size)]
    batches = deal([lengths[row] for row in rows], num_micro_batches * dp.size)
    shares = deal([sum(lengths[rows[place]] for place in batch) for batch in batches], dp.size)
    return [[rows[place] for place in batches[number]] for number in shares[dp.rank]]


def deal(sizes: Sequence[int], groups: int) -> list[list[int]]:
    """Indices of ``sizes``, ascending, in groups of as many each whose sums are close: the largest first, each into the smallest group that has room.

    The longest-processing-time rule (Graham, "Bounds on multiprocessing timing anomalies", 1969).
    """
    room = len(sizes) // groups
    dealt: list[list[int]] = [[] for _ in range(groups)]
    sums = [(0, group) for group in range(groups)]
    for index in sorted(range(len(sizes)), key=lambda each: (-sizes[each], each)):
        total, group = heapq.heappop(sums)
        dealt[group].append(index)
        if len(dealt[group]) < room:
            heapq.heappush(sums, (total + sizes[index], group))
    return [sorted(group) for group in dealt]
