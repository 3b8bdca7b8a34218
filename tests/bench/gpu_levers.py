"""What each lever gives, alone: ``python gpu_levers.py [--rounds N] [--only WORDS] [--record FILE] sft FLAGS`` sets a run up as ``megatron sft FLAGS`` does, and then takes some steps with everything and some without each lever, in turn, in one process.

Prints a line for each. Trains as it goes: losses are not to be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

STEPS, WARM_UP = 6, 2
"""Steps of one visit, of which the first are not counted."""


@dataclass
class Visits:
    """What one lever's visits took, in seconds of a step; ``before`` are the steps with everything just before each visit."""

    before: list[list[float]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    peak_gib: float = 0.0

    def describe(self) -> str:
        """Seconds of a step without the lever over seconds with it: by the medians of each visit and of the one before it, and by the fastest steps of all."""
        ratios = [median(without) / median(having) for having, without in zip(self.before, self.seconds, strict=True)]
        having, without = [value for visit in self.before for value in visit], [value for visit in self.seconds for value in visit]
        return (
            f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} rounds), fastest {min(without) / min(having):.3f}, "
            f"{median(without):.4f} over {median(having):.4f} s/it, peak {self.peak_gib:.1f} GiB"
        )


def launch_ranks(options: argparse.Namespace) -> int:
    """`megatron sft`."""
    from finetune_trainer import cli, launch

    how = json.dumps([options.rounds, options.only, options.record and str(options.record.absolute())])
    launch.launch = functools.partial(launch.launch, program=(sys.executable, "-P", str(Path(__file__).resolve()), "rank", how))
    return cli.main(options.command)


def run_rank(how: str, arguments: list[str]) -> None:
    """`python -m finetune_trainer RUN.json`, with the measurement in the place of training."""
    from finetune_trainer import __main__ as program
    from finetune_trainer.report import Report

    begin_stage = Report.stage

    def stage(self: Any, name: Any) -> None:
        if name == "loading":
            from finetune_trainer import train

            train.fit = functools.partial(measure, *json.loads(how))
        begin_stage(self, name)

    Report.stage = stage  # type: ignore[method-assign]
    program.main(arguments)


def measure(rounds: int, only: list[str], record: str | None, trainer: Any, rows: Any, config: Any, ranks: Any, *_: Any) -> None:
    """Takes the place of ``train.fit``, and ends the process."""
    import torch

    from finetune_trainer import train

    train.set_training(trainer, True)
    levers = {name: lever for name, lever in LEVERS.items() if not only or any(words in name for words in only)}
    visits = {name: Visits() for name in levers}
    numbers = iter(range(sys.maxsize))

    def visit() -> list[float]:
        return [take_step(trainer, rows, config, ranks, next(numbers)) for _ in range(STEPS)][WARM_UP:]

    for _ in range(rounds):
        for name, without in levers.items():
            visits[name].before.append(visit())
            torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
            with without(trainer):
                visits[name].seconds.append(visit())
            visits[name].peak_gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    if ranks.rank == 0:
        for name, of_lever in visits.items():
            print(f"without {name}: {of_lever.describe()}", flush=True)
        if record:
            Path(record).write_text(json.dumps({name: asdict(of_lever) for name, of_lever in visits.items()}))
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


@contextlib.contextmanager
def without_launching_as_compiled(trainer: Any) -> Iterator[None]:
    """Kernels by Triton's own way: it looks at every argument of every launch."""
    from finetune_trainer.kernel_launch import Kernel

    def launch(self: Any, grid: Any, *arguments: Any) -> None:
        self.function[grid](*arguments, num_warps=self.warps)

    with mock.patch.object(Kernel, "launch", launch):
        yield


@contextlib.contextmanager
def without_going_straight_to_cudnn(trainer: Any) -> Iterator[None]:
    """Attention by transformer-engine's module, with its choice of a backend, and its own random states, at every call."""
    from finetune_trainer.packed_attention import PackedAttention

    modules = [module for chunk in trainer.chunks for module in chunk.modules() if isinstance(module, PackedAttention)]
    before = [(module.can_go_straight, module.fused_attention.attention_dropout_ctx) for module in modules]
    for module in modules:
        module.can_go_straight, module.fused_attention.attention_dropout_ctx = False, module.rng_states_tracker.fork
    try:
        yield
    finally:
        for module, (can_go_straight, context) in zip(modules, before, strict=True):
            module.can_go_straight, module.fused_attention.attention_dropout_ctx = can_go_straight, context


LEVERS: dict[str, Callable[[Any], Any]] = {
    "kernels of adapters": without_kernels_of_adapters,
    "adding B's product in place": without_adding_in_place,
    "adding gradients in place": without_adding_gradients_in_place,
    "launching kernels as compiled": without_launching_as_compiled,
    "going straight to cuDNN": without_going_straight_to_cudnn,
    "dealing rows by length": without_dealing,
    "leaving unlabelled tokens out": without_leaving_tokens_out,
    "kernels of SwiGLU": without_kernels_of_swiglu,
}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="how often every lever is visited")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="levers whose name holds one of these words, parted by commas")
    parser.add_argument("--record", type=Path, help="write seconds of every step to this file, as JSON")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="sft FLAGS")
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(launch_ranks(read_options()))
