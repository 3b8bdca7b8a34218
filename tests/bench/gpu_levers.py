"""What each lever gives, alone: ``python gpu_levers.py sft FLAGS`` sets a run up as ``megatron sft FLAGS`` does, and then takes some steps with everything and some without each lever, in one process.

Prints a line for each: seconds of a step (median), and of one with everything over it. Trains as it goes; the last line of a lever is not to be compared with the first by its loss.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

ROUNDS, STEPS, WARM_UP = 2, 6, 2
"""Every lever is visited so often, with so many steps of which the first are not counted."""


def launch_ranks(arguments: list[str]) -> int:
    """`megatron sft`."""
    from finetune_trainer import cli, launch

    launch.launch = functools.partial(launch.launch, program=(sys.executable, "-P", str(Path(__file__).resolve()), "rank"))
    return cli.main(arguments)


def run_rank(arguments: list[str]) -> None:
    """`python -m finetune_trainer RUN.json`, with the measurement in the place of training."""
    from finetune_trainer import __main__ as program
    from finetune_trainer.report import Report

    begin_stage = Report.stage

    def stage(self: Any, name: Any) -> None:
        if name == "loading":
            from finetune_trainer import train

            train.fit = measure
        begin_stage(self, name)

    Report.stage = stage  # type: ignore[method-assign]
    program.main(arguments)


def measure(trainer: Any, rows: Any, config: Any, ranks: Any, *_: Any) -> None:
    """Takes the place of ``train.fit``, and ends the process."""
    import torch

    from finetune_trainer import train

    train.set_training(trainer, True)
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    step = 0
    for _ in range(ROUNDS):
        for name, without in LEVERS.items():
            torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
            with without(trainer):
                for counted in range(STEPS):
                    taken = take_step(trainer, rows, config, ranks, step)
                    step += 1
                    if counted >= WARM_UP:
                        seconds.setdefault(name, []).append(taken)
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    if ranks.rank == 0:
        base = median(seconds["everything"])
        for name, values in seconds.items():
            print(f"{name}: {median(values):.4f} s/it, {base / median(values):.3f}, peak {peaks[name]:.1f} GiB", flush=True)
    torch.distributed.barrier()
    os._exit(0)


def take_step(trainer: Any, rows: Any, config: Any, ranks: Any, step: int) -> float:
    """One step of ``train.fit``, in seconds."""
    from finetune_trainer import train

    training = config.training
    began = time.perf_counter()
    reading = train.order(len(rows.rows), training.seed, config.data.train_dataloader_shuffle)
    numbers = train.micro_batches(reading, step, training.global_batch_size, training.micro_batch_size, ranks.dp, rows.lengths)
    batches = [train.collate([rows.rows[number] for number in some], train._multiple(config, ranks), ranks.device) for some in numbers]
    train.seed_step(trainer, step, ranks)
    train.sum_up(train.run_forward_backward(trainer, batches), batches, ranks, False)
    train.update(trainer)
    return time.perf_counter() - began


def without_kernels_of_adapters(trainer: Any) -> Any:
    def has_none(*_: Any) -> bool:  # where a MagicMock would keep every tensor that it was called with
        return False

    return mock.patch("finetune_trainer.low_rank._has_kernels", new=has_none)


def without_adding_in_place(trainer: Any) -> Any:
    from finetune_trainer.low_rank import Raise

    def forward(ctx: Any, output: Any, low: Any, factor: Any, scale: float, sums: Any) -> Any:
        import torch

        ctx.scale, ctx.sums = scale, sums
        ctx.save_for_backward(low, factor)
        return torch.addmm(output.flatten(0, -2), low.flatten(0, -2), factor.t(), alpha=scale).view(output.shape)

    return mock.patch.object(Raise, "forward", staticmethod(forward))


@contextlib.contextmanager
def without_adding_gradients_in_place(trainer: Any) -> Iterator[None]:
    """Gradients of adapters by way of autograd, and of Megatron's hook for each."""
    from finetune_trainer import lora

    factors = [factor for _, layer in lora.adapters(trainer.chunks) for factor in (layer.lora_A, layer.lora_B)]
    for factor in factors:
        factor.sums = None
    try:
        yield
    finally:
        lora.add_gradients_in_place(trainer.chunks)


def without_dealing(trainer: Any) -> Any:
    def deal(sizes: Any, groups: int) -> list[list[int]]:
        room = len(sizes) // groups
        return [list(range(group * room, (group + 1) * room)) for group in range(groups)]

    return mock.patch("finetune_trainer.data.order.deal", deal)


@contextlib.contextmanager
def without_leaving_tokens_out(trainer: Any) -> Iterator[None]:
    """Output layer and loss on every token."""
    import torch

    from finetune_trainer import train

    collate = train.collate

    def every(*arguments: Any) -> Any:
        batch = collate(*arguments)
        tokens = batch.tokens[0]
        return replace(batch, labelled=torch.arange(len(tokens) - 1, device=tokens.device), labels=tokens[1:].contiguous())

    with mock.patch.object(train, "collate", every):
        yield


@contextlib.contextmanager
def without_kernels_of_swiglu(trainer: Any) -> Iterator[None]:
    import torch

    def forward(gate_up: Any) -> Any:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    def backward(gate_up: Any, gradient: Any) -> Any:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.cat([torch.ops.aten.silu_backward(gradient * up, gate), gradient * torch.nn.functional.silu(gate)], dim=-1)

    with mock.patch.multiple("finetune_trainer.swiglu", _forward=forward, _backward=backward):
        yield


LEVERS: dict[str, Callable[[Any], Any]] = {
    "everything": contextlib.nullcontext,
    "without kernels of adapters": without_kernels_of_adapters,
    "without adding B's product in place": without_adding_in_place,
    "without adding gradients in place": without_adding_gradients_in_place,
    "without dealing rows by length": without_dealing,
    "without leaving unlabelled tokens out": without_leaving_tokens_out,
    "without kernels of SwiGLU": without_kernels_of_swiglu,
}


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        run_rank(sys.argv[2:])
    else:
        sys.exit(launch_ranks(sys.argv[1:]))
