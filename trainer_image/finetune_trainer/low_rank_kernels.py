"""Triton kernels for the products of an adapter. With dropout, what is dropped is never written, only a bit for each number that says whether it was kept.

A program works on blocks of 8 x GROUP columns; bit ``j`` of byte ``i`` says whether column ``8 * i + j`` was kept. Random numbers are Philox-4x32 with seven rounds (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", 2011), 16 bits for a number, its key and place taken from torch's generator of the GPU, so that a recomputed forward pass draws the same.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune_trainer.kernel_launch import Kernel

GROUP = 16
BLOCK = 8 * GROUP
ROUNDS = 7
FEW_TOKENS = 4096
"""Up to here a program that reads whole rows takes few of them, so that there is one for every multiprocessor."""
FEW_ROWS, ROWS, GRADIENT_ROWS, PRODUCT_ROWS = 16, 32, 64, 16
"""Rows of hidden that a program works on at a time."""
PROGRAMS = 1024
"""As many as keep a GPU busy."""
SUMS_BLOCK = 1024
WARPS, GRADIENT_WARPS, PRODUCT_WARPS = 4, 4, 2
WIDE_ROWS, WIDE_COLUMNS, WIDE_PARTS, WIDE_WARPS = 64, 256, 16, 4
"""Of a gradient that is read once: rows and columns at a time, and into how many parts its rows are cut."""


def lower(hidden: Tensor, factor: Tensor, threshold: int) -> tuple[Tensor, Tensor]:
    """Hidden [tokens, in], A [rank, in] -> ``dropped A^T`` [tokens, rank], and which numbers of hidden were kept: uint8 [tokens, bytes].

    A number is dropped, which makes it zero, where its 16 random bits are below ``threshold``; the others are not scaled up.
    """
    hidden, factor = hidden.contiguous(), factor.contiguous()
    (tokens, columns), rank = hidden.shape, factor.shape[0]
    low = torch.empty(tokens, rank, dtype=hidden.dtype, device=hidden.device)
    kept = torch.empty(tokens, _count_blocks(columns, BLOCK) * GROUP, dtype=torch.uint8, device=hidden.device)
    if tokens:
        rows = FEW_ROWS if tokens <= FEW_TOKENS else ROWS
        seed, place = _draw(hidden.device)
        sizes = (rows, GROUP, _padded(rank), ROUNDS)
        _lower.launch((_count_blocks(tokens, rows),), hidden, factor, low, kept, tokens, columns, rank, seed, place, threshold, *sizes)
    return low, kept


def add_factor_gradient(target: Tensor, hidden: Tensor, kept: Tensor, of_low: Tensor) -> None:
    """Add the gradient ``of_low^T dropped`` of A to target, float32 [rank, in]; of_low [tokens, rank]. Always the same sums in the same order."""
    hidden, of_low = hidden.contiguous(), of_low.contiguous()
    assert target.is_contiguous(), f"rows of {target.shape[1]} numbers lie {target.stride()} apart"
    (tokens, columns), rank = hidden.shape, of_low.shape[1]
    blocks, rows = _count_blocks(columns, BLOCK), GRADIENT_ROWS
    parts = max(1, min(_count_blocks(tokens, 4 * rows), _count_blocks(PROGRAMS, blocks)))
    share = _count_blocks(_count_blocks(tokens, parts), rows) * rows
    sums = torch.empty(parts, rank, columns, dtype=torch.float32, device=hidden.device)
    _find_factor_gradient.launch((blocks, parts), hidden, kept, of_low, sums, tokens, columns, rank, share, rows, GROUP, _padded(rank))
    _add_parts.launch((_count_blocks(target.numel(), SUMS_BLOCK),), target, sums, target.numel(), parts, SUMS_BLOCK)


def find_gradients(gradient: Tensor, low: Tensor, factor: Tensor, scale: float, target: Tensor) -> Tensor:
    """For gradient [tokens, out], low [tokens, rank] and B [out, rank], reading gradient once: ``scale * gradient B`` [tokens, rank], while ``scale * gradient^T low`` is added to target, float32 [out, rank].

    Always the same sums in the same order. Until they are summed, the parts of both take float32 [out / WIDE_COLUMNS, tokens, rank] and [WIDE_PARTS, out, rank].
    """
    gradient, low, factor = gradient.contiguous(), low.contiguous(), factor.contiguous()
    assert target.is_contiguous(), f"rows of {target.shape[1]} numbers lie {target.stride()} apart"
    (tokens, columns), rank = gradient.shape, factor.shape[1]
    blocks = _count_blocks(columns, WIDE_COLUMNS)
    parts = max(1, min(_count_blocks(tokens, WIDE_ROWS), WIDE_PARTS))
    share = _count_blocks(_count_blocks(tokens, parts), WIDE_ROWS) * WIDE_ROWS
    of_low = torch.empty(blocks, tokens, rank, dtype=torch.float32, device=gradient.device)
    sums = torch.empty(parts, columns, rank, dtype=torch.float32, device=gradient.device)
    sizes = (WIDE_ROWS, WIDE_COLUMNS, _padded(rank))
    _find_gradients.launch((blocks, parts), gradient, low, factor, of_low, sums, tokens, columns, rank, share, scale, *sizes)
    _add_parts.launch((_count_blocks(target.numel(), SUMS_BLOCK),), target, sums, target.numel(), parts, SUMS_BLOCK)
    return of_low.sum(dim=0).to(low.dtype)


def add_product(target: Tensor, left: Tensor, right: Tensor, kept: Tensor | None = None, scale: float = 1.0, *, onto: bool = True) -> None:
    """Add ``scale * left right`` to target [tokens, columns], where kept; or write it over what is there, with zeros where dropped. left [tokens, rank], right [rank, columns]."""
    assert target.is_contiguous(), f"rows of {target.shape[1]} numbers lie {target.stride()} apart"
    left = left.contiguous()
    (tokens, columns), rank = target.shape, left.shape[1]
    if tokens:
        grid = (_count_blocks(tokens, PRODUCT_ROWS), _count_blocks(columns, BLOCK))
        sizes = (PRODUCT_ROWS, GROUP, _padded(rank))
        _add_product.launch(
            grid, target, left, right, left if kept is None else kept, tokens, columns, rank, *right.stride(), scale, onto, kept is not None, *sizes
        )


def _draw(device: torch.device) -> tuple[int, int]:
    """Key and place of the random numbers of one call; torch's generator goes on behind them."""
    if device.type == "cpu":  # Triton's interpreter
        return int(torch.randint(2**31, ())), 0
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    place = generator.get_offset()
    generator.set_offset(place + 4)
    return generator.initial_seed(), place


def _count_blocks(size: int, block: int) -> int:
    return -(-size // block)


@functools.cache
def _padded(rank: int) -> int:
    """The smallest size of a matrix product."""
    return max(16, int(triton.next_power_of_2(rank)))


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(bits, ROWS: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bytes [rows, group] -> whether each column [rows, 8 x group] was kept. The eight of a byte stay with the thread that has it."""
    return tl.reshape((bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, (ROWS, 8 * GROUP)) != 0


@triton.jit  # type: ignore[untyped-decorator]
def _kept_bits(random, bound, PLACE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two bits, at PLACE and above it: whether the lower and the upper half of 32 random bits reach the upper half of ``bound``, whose lower half is zero."""
    return tl.where((random << 16) >= bound, 1 << PLACE, 0) | tl.where(random >= bound, 2 << PLACE, 0)


@Kernel.of("tokens", "seed", "place", "threshold", warps=WARPS)
def _lower(  # type: ignore[no-untyped-def]
    hidden, factor, low, kept, tokens, columns, rank, seed, place, threshold,
    ROWS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < tokens
    ranks = tl.arange(0, RANK)
    blocks = tl.cdiv(columns, 8 * GROUP)
    bound = threshold.to(tl.uint32) << 16
    total = tl.zeros((ROWS, RANK), tl.float32)
    for block in range(blocks):
        column = block * 8 * GROUP + tl.arange(0, 8 * GROUP)
        byte = block * GROUP + tl.arange(0, GROUP)
        values = tl.load(hidden + rows[:, None] * columns + column[None, :], mask=is_row[:, None] & (column < columns)[None, :], other=0.0)
        weights = tl.load(factor + ranks[None, :] * columns + column[:, None], mask=(ranks < rank)[None, :] & (column < columns)[:, None], other=0.0)
        numbers = tl.zeros((ROWS, GROUP), tl.uint32)
        counter = rows.to(tl.uint32)[:, None] + numbers
        a, b, c, d = tl.philox(seed, counter, byte.to(tl.uint32)[None, :] + numbers, numbers + place.to(tl.uint32), numbers, ROUNDS)
        bits = _kept_bits(a, bound, 0) | _kept_bits(b, bound, 2) | _kept_bits(c, bound, 4) | _kept_bits(d, bound, 6)
        tl.store(kept + rows[:, None] * blocks * GROUP + byte[None, :], bits.to(tl.uint8), mask=is_row[:, None])
        values = tl.where(_unpack(bits, ROWS, GROUP), values, 0.0)
        total = tl.dot(values, weights, total, input_precision="ieee")
    target = low + rows[:, None] * rank + ranks[None, :]
    tl.store(target, total.to(low.dtype.element_ty), mask=is_row[:, None] & (ranks < rank)[None, :])


@Kernel.of("tokens", "share", warps=GRADIENT_WARPS)
def _find_factor_gradient(  # type: ignore[no-untyped-def]
    hidden, kept, of_low, sums, tokens, columns, rank, share,
    ROWS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = block * 8 * GROUP + tl.arange(0, 8 * GROUP)
    byte = block * GROUP + tl.arange(0, GROUP)
    ranks = tl.arange(0, RANK)
    width = tl.cdiv(columns, 8 * GROUP) * GROUP
    total = tl.zeros((RANK, 8 * GROUP), tl.float32)
    for start in range(0, share, ROWS):
        rows = part * share + start + tl.arange(0, ROWS)
        is_row = rows < tokens
        bits = tl.load(kept + rows[:, None] * width + byte[None, :], mask=is_row[:, None], other=0).to(tl.int32)
        values = tl.load(hidden + rows[:, None] * columns + column[None, :], mask=is_row[:, None] & (column < columns)[None, :], other=0.0)
        gradient = tl.load(of_low + rows[None, :] * rank + ranks[:, None], mask=is_row[None, :] & (ranks < rank)[:, None], other=0.0)
        values = tl.where(_unpack(bits, ROWS, GROUP), values, 0.0)
        total = tl.dot(gradient, values, total, input_precision="ieee")
    target = sums + (part * rank + ranks[:, None]) * columns + column[None, :]
    tl.store(target, total, mask=(ranks < rank)[:, None] & (column < columns)[None, :])


@Kernel.of("parts", warps=WARPS)
def _add_parts(target, sums, size, parts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    total = tl.load(target + places, mask=inside, other=0.0)
    for part in range(parts):
        total += tl.load(sums + part * size + places, mask=inside, other=0.0)
    tl.store(target + places, total, mask=inside)


@Kernel.of("tokens", "share", warps=WIDE_WARPS)
def _find_gradients(  # type: ignore[no-untyped-def]
    gradient, low, factor, of_low, sums, tokens, columns, rank, share, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)
    is_column, is_rank = column < columns, ranks < rank
    weights = tl.load(factor + column[:, None] * rank + ranks[None, :], mask=is_column[:, None] & is_rank[None, :], other=0.0)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    for start in range(0, share, ROWS):
        rows = part * share + start + tl.arange(0, ROWS)
        is_row = rows < tokens
        values = tl.load(gradient + rows[:, None] * columns + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
        lower = tl.load(low + rows[None, :] * rank + ranks[:, None], mask=is_row[None, :] & is_rank[:, None], other=0.0)
        found = tl.dot(values, weights, input_precision="ieee") * scale
        tl.store(of_low + (block * tokens + rows[:, None]) * rank + ranks[None, :], found, mask=is_row[:, None] & is_rank[None, :])
        total = tl.dot(lower, values, total, input_precision="ieee")
    target = sums + (part * columns + column[None, :]) * rank + ranks[:, None]
    tl.store(target, total * scale, mask=is_rank[:, None] & is_column[None, :])


@Kernel.of("tokens", warps=PRODUCT_WARPS)
def _add_product(  # type: ignore[no-untyped-def]
    target, left, right, kept, tokens, columns, rank, row_stride, column_stride, scale,
    ONTO: tl.constexpr, DROPPED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * 8 * GROUP + tl.arange(0, 8 * GROUP)
    ranks = tl.arange(0, RANK)
    is_row, is_column, is_rank = rows < tokens, column < columns, ranks < rank
    factor = tl.load(left + rows[:, None] * rank + ranks[None, :], mask=is_row[:, None] & is_rank[None, :], other=0.0)
    other = tl.load(right + ranks[:, None] * row_stride + column[None, :] * column_stride, mask=is_rank[:, None] & is_column[None, :], other=0.0)
    change = tl.dot(factor, other, input_precision="ieee") * scale
    if DROPPED:
        byte = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
        width = tl.cdiv(columns, 8 * GROUP) * GROUP
        bits = tl.load(kept + rows[:, None] * width + byte[None, :], mask=is_row[:, None], other=0).to(tl.int32)
        change = tl.where(_unpack(bits, ROWS, GROUP), change, 0.0)
    pointers = target + rows[:, None] * columns + column[None, :]
    inside = is_row[:, None] & is_column[None, :]
    if ONTO:
        change += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    tl.store(pointers, change.to(target.dtype.element_ty), mask=inside)
