"""Microseconds of the kernels of adapters and of SwiGLU, beside what cuBLAS and a copy take: ``python gpu_kernels.py [--tokens N] [--scale N] [--record FILE]``, at the shapes of one layer of 7B.

Each is launched three times, then timed over ten. Bytes are those that it must read and write. Under ``TRITON_INTERPRET=1`` it runs without a GPU, to be tried with ``--tokens 40 --scale 64``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_trainer import kernels, low_rank, low_rank_kernels

FFN, QKV, HIDDEN, RANK, DROPOUT = 18944, 4608, 3584, 8, 0.05
WARM_UP, TIMES = 3, 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Timing:
    """One kernel at one shape."""

    name: str
    tokens: int
    columns: int
    microseconds: float
    gigabytes_per_second: float


def time_launches(launch: Callable[[], Any]) -> float:
    """Microseconds of one, by events on a GPU's stream."""
    for _ in range(WARM_UP):
        launch()
    if DEVICE == "cpu":
        began = time.perf_counter()
        launch()
        return (time.perf_counter() - began) * 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(TIMES):
        launch()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / TIMES * 1e3


def made(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(torch.bfloat16 if DEVICE == "cuda" else torch.float16)


def time_inputs(tokens: int, columns: int) -> list[Timing]:
    """The kernels that read an adapter's input: A, dropout, their gradients."""
    hidden, factor, low, target = made(tokens, columns), made(RANK, columns), made(tokens, RANK), made(tokens, columns)
    sums = torch.zeros(RANK, columns, device=DEVICE)
    threshold = low_rank.threshold(DROPOUT)
    _, kept = low_rank_kernels.lower(hidden, factor, threshold)
    launches: dict[str, tuple[Callable[[], Any], int]] = {
        "draw, drop, multiply by A": (lambda: low_rank_kernels.lower(hidden, factor, threshold), hidden.nbytes + kept.nbytes),
        "gradient of A": (lambda: low_rank_kernels.add_factor_gradient(sums, hidden, kept, low), hidden.nbytes + kept.nbytes),
        "A's part of the input's gradient": (lambda: low_rank_kernels.add_product(target, low, factor, kept), 2 * target.nbytes + kept.nbytes),
    }
    return [describe(name, tokens, columns, *launch) for name, launch in launches.items()]


def time_outputs(tokens: int, columns: int) -> list[Timing]:
    """The kernels at an adapter's output, and cuBLAS in their place."""
    gradient, factor, low = made(tokens, columns), made(columns, RANK), made(tokens, RANK)
    turned, of_low, sums = factor.t().contiguous(), torch.empty_like(low), torch.zeros(columns, RANK, device=DEVICE)

    def by_torch() -> None:
        torch.addmm(of_low, gradient, factor, beta=0, alpha=4.0, out=of_low)
        low_rank._sum_product(gradient.t(), low, 4.0, sums)

    launches: dict[str, tuple[Callable[[], Any], int]] = {
        "B's product in place": (lambda: low_rank_kernels.add_product(gradient, low, turned, None, 1e-9), 2 * gradient.nbytes),
        "B's product in place, torch": (lambda: torch.addmm(gradient, low, turned, alpha=1e-9, out=gradient), 2 * gradient.nbytes),
        "both gradients of B's product": (lambda: low_rank_kernels.find_gradients(gradient, low, factor, 4.0, sums), gradient.nbytes),
        "both gradients of B's product, torch": (by_torch, 2 * gradient.nbytes),
    }
    return [describe(name, tokens, columns, *launch) for name, launch in launches.items()]


def time_swiglu(tokens: int, columns: int) -> list[Timing]:
    """Forward, backward, and a copy of the larger tensor."""
    gate_up, above = made(tokens, 2 * columns), made(tokens, columns)
    copy = torch.empty_like(gate_up)
    launches: dict[str, tuple[Callable[[], Any], int]] = {
        "copy": (lambda: copy.copy_(gate_up), 2 * gate_up.nbytes),
        "SwiGLU": (lambda: kernels.swiglu(gate_up), gate_up.nbytes + above.nbytes),
        "SwiGLU's gradient": (lambda: kernels.swiglu_gradient(gate_up, above), 2 * gate_up.nbytes + above.nbytes),
    }
    return [describe(name, tokens, columns, *launch) for name, launch in launches.items()]


def describe(name: str, tokens: int, columns: int, launch: Callable[[], Any], size: int) -> Timing:
    """Time one, and print its line."""
    microseconds = time_launches(launch)
    timing = Timing(name, tokens, columns, round(microseconds, 1), round(size / microseconds / 1e3, 1))
    print(f"{name:40s} {tokens:6d} x {columns:5d} {timing.microseconds:10.1f} us {timing.gigabytes_per_second:8.1f} GB/s", flush=True)
    return timing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16272, help="of a micro batch")
    parser.add_argument("--scale", type=int, default=1, help="divide the widths of the layer by this")
    parser.add_argument("--record", type=Path, help="write every timing to this file, as JSON")
    options = parser.parse_args()
    tokens, scale = options.tokens, options.scale
    timings = [timing for columns in (FFN, HIDDEN) for timing in time_inputs(tokens, columns // scale)]
    timings += [timing for columns in (2 * FFN, QKV) for timing in time_outputs(tokens, columns // scale)]
    timings += time_swiglu(tokens, FFN // scale)
    if options.record:
        options.record.write_text(json.dumps([asdict(timing) for timing in timings], indent=1) + "\n")


if __name__ == "__main__":
    main()
