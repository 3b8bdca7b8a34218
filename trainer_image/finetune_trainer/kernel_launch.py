"""Launches of Triton kernels that cost the host little: a kernel is found again by a key of our own, and launched as it was compiled.

Triton looks at every argument of every launch in Python, which takes as long as the launch itself. On short rows the host is what the forward pass waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

Argument = torch.Tensor | int | float | bool
Grid = tuple[int] | tuple[int, int]


class Kernel:
    """A function for GPUs that Triton compiles; arguments are given by place, all of them."""

    def __init__(self, function: Callable[..., Any], free: tuple[str, ...], warps: int) -> None:
        """``free`` names the numbers that change from launch to launch: for these nothing is compiled again."""
        self.function = triton.jit(do_not_specialize=list(free))(function)
        self.warps = warps
        self.is_free = [name in free for name in self.function.arg_names]
        self.compiled: dict[tuple[Any, ...], Any] = {}

    @classmethod
    def of(cls, *free: str, warps: int) -> Callable[[Callable[..., Any]], Kernel]:
        """Decorate a function: ``@Kernel.of("tokens", warps=4)``."""
        return lambda function: cls(function, free, warps)

    def launch(self, grid: Grid, *arguments: Argument) -> None:
        """Run on the current stream of the current device, where the arguments are."""
        key = (arguments[0].device.index, *map(_describe, arguments, self.is_free))  # type: ignore[union-attr]
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = self.function[grid](*arguments, num_warps=self.warps)
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments)


def _describe(argument: Argument, is_free: bool) -> Any:
    """What may be compiled for an argument: a tensor's type, and whether it lies at a multiple of 16 bytes; a number that is not free; whether a free one has 32 bits; nothing for a float."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, float):
        return None
    return -(2**31) <= argument < 2**31 if is_free else argument
