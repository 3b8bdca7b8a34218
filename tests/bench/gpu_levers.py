"""What each lever gives, alone: ``python gpu_levers.py [--rounds N] [--steps N] [--only WORDS] [--record FILE] sft FLAGS`` sets a run up as ``megatron sft FLAGS`` does, and then takes some steps with everything and some without each lever, in turn, in one process.

Prints a line for each. Trains as it goes: losses are not to be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any
from unittest import mock

WARM_UP = 1
"""Steps at the start of a visit that are not counted."""


@dataclass(frozen=True)
class Step:
    """Seconds of one step, and of its forward and backward passes those in which a core of the host worked for this process."""

    seconds: float
    host: float


@dataclass
class Visits:
    """What one lever's visits took, round by round; ``having`` are the steps with everything just before or after, in turn."""

    having: list[list[Step]] = field(default_factory=list)
    without: list[list[Step]] = field(default_factory=list)
    more_gib: float = 0.0
    """The most memory of the last visit without it, less that of the one with everything beside it."""

    def describe(self) -> str:
        step, host = (f"{name} {ratio:.3f} ± {error:.3f}" for name, ratio, error in [("step", *compare(self, "seconds")), ("host", *compare(self, "host"))])
        middle = median(step.seconds for steps in self.having for step in steps)
        return f"{step}, {host} ({len(self.having)} rounds; {middle:.4f} s/it with everything), {self.more_gib:+.1f} GiB"


def compare(visits: Visits, name: str) -> tuple[float, float]:
    """A step without the lever over one with everything, by ``name`` of Step: geometric mean over the rounds of the ratio of medians, and its standard error."""
    logarithms = [
        math.log(median(getattr(step, name) for step in without) / median(getattr(step, name) for step in having))
        for having, without in zip(visits.having, visits.without, strict=True)
    ]
    ratio = math.exp(mean(logarithms))
    return ratio, ratio * stdev(logarithms) / math.sqrt(len(logarithms)) if len(logarithms) > 1 else math.nan


def launch_ranks(options: argparse.Namespace) -> int:
    """`megatron sft`."""
    from finetune_trainer import cli, launch

    how = json.dumps([options.rounds, options.steps, options.only, options.record and str(options.record.absolute())])
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


def measure(rounds: int, num_steps: int, only: list[str], record: str | None, trainer: Any, rows: Any, config: Any, ranks: Any, *_: Any) -> None:
    """Takes the place of ``train.fit``, and ends the process."""
    import torch

    from finetune_trainer import train

    train.set_training(trainer, True)
    levers = {name: lever for name, lever in LEVERS.items() if not only or any(words in name for words in only)}
    visits = {name: Visits() for name in levers}
    numbers = iter(range(sys.maxsize))

    def visit() -> tuple[list[Step], float]:
        torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
        steps = [take_step(trainer, rows, config, ranks, next(numbers)) for _ in range(num_steps)][WARM_UP:]
        return steps, torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0

    for turn in range(rounds):
        for name, without in levers.items():
            having = visit() if turn % 2 == 0 else None
            with without(trainer):
                lacking = visit()
            having = having or visit()
            visits[name].having.append(having[0])
            visits[name].without.append(lacking[0])
            visits[name].more_gib = lacking[1] - having[1]
        if ranks.rank == 0 and record:
            Path(record).write_text(json.dumps({name: asdict(of_lever) for name, of_lever in visits.items()}))
    if ranks.rank == 0:
        for name, of_lever in visits.items():
            print(f"without {name}: {of_lever.describe()}", flush=True)
    torch.distributed.barrier()
    os._exit(0)


def take_step(trainer: Any, rows: Any, config: Any, ranks: Any, step: int) -> Step:
    """One step of ``train.fit``."""
    from finetune_trainer import train

    training = config.training
    began = time.perf_counter()
    reading = train.order(len(rows.rows), training.seed, config.data.train_dataloader_shuffle)
    numbers = train.micro_batches(reading, step, training.global_batch_size, micro_batch_size(training), ranks.dp, rows.lengths)
    batches = [train.collate([rows.rows[number] for number in some], train._multiple(config, ranks), ranks.device) for some in numbers]
    train.seed_step(trainer, step, ranks)
    host = time.process_time()
    outputs = train.run_forward_backward(trainer, batches)
    host = time.process_time() - host
    train.sum_up(outputs, batches, ranks, False)
    norm, _ = train.update(trainer)
    assert norm > 0, "no gradient: a switch has cut something off"
    return Step(time.perf_counter() - began, host)


def micro_batch_size(training: Any) -> int:
    return int(training.micro_batch_size)


def has_none(*_: Any) -> bool:
    """Takes the place of a ``_has_kernels``; a MagicMock would keep every tensor that it was called with."""
    return False


def without_kernels_of_adapters(trainer: Any) -> Any:
    """Products, and dropout with a mask of whole numbers, by torch."""
    return mock.patch("finetune_trainer.low_rank._has_kernels", has_none)


def without_adding_in_place(trainer: Any) -> Any:
    """B's product by the same kernel, onto a copy of the base's output."""
    from finetune_trainer import low_rank

    def forward(ctx: Any, output: Any, low: Any, factor: Any, scale: float, sums: Any) -> Any:
        ctx.scale, ctx.sums = scale, sums
        ctx.save_for_backward(low, factor)
        copy = output.clone()
        low_rank._add_product(copy.view(-1, copy.shape[-1]), low.flatten(0, -2), factor.t(), None, scale, onto=True)
        return copy

    return mock.patch.object(low_rank.Raise, "forward", staticmethod(forward))


@contextlib.contextmanager
def without_adding_gradients_in_place(trainer: Any) -> Iterator[None]:
    """Gradients of adapters by way of autograd, and of Megatron's hook for each."""
    from finetune_trainer import lora

    factors = [factor for _, layer in lora.adapters(trainer.chunks) for factor in (layer.lora_A, layer.lora_B)]
    before = [factor.sums for factor in factors]
    for factor in factors:
        factor.sums = None
    try:
        yield
    finally:
        for factor, sums in zip(factors, before, strict=True):
            factor.sums = sums


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


def without_kernels_of_swiglu(trainer: Any) -> Any:
    """The same in torch's functions, as on a CPU."""
    return mock.patch("finetune_trainer.swiglu._has_kernels", has_none)


def without_kernels_of_loss(trainer: Any) -> Any:
    """The same in torch's functions, as on a CPU; the gradient still is made in the forward pass."""
    return mock.patch("finetune_trainer.loss._has_kernels", has_none)


@contextlib.contextmanager
def without_keeping_activations(trainer: Any) -> Iterator[None]:
    """Every layer recomputed."""
    from finetune_trainer import lora

    embeddings = [lora.unwrap(chunk).embedding for chunk in trainer.chunks if lora.unwrap(chunk).pre_process]
    hooks = [embedding.register_forward_hook(lora._start_gradient) for embedding in embeddings]
    settings = [chunk.config for chunk in trainer.chunks]
    names = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    before = [[getattr(each, name) for name in names] for each in settings]
    for each in settings:
        each.recompute_granularity, each.recompute_method, each.recompute_num_layers = "full", "uniform", 1
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for each, values in zip(settings, before, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(each, name, value)


def without_large_micro_batches(trainer: Any) -> Any:
    """Micro batches of half the size, twice as many."""
    return mock.patch(f"{__name__}.micro_batch_size", lambda training: training.micro_batch_size // 2)


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
        module.can_go_straight = False
        if module.rng_states_tracker is not None:  # as with sequence parallelism
            module.fused_attention.attention_dropout_ctx = module.rng_states_tracker.fork
    try:
        yield
    finally:
        for module, (can_go_straight, context) in zip(modules, before, strict=True):
            module.can_go_straight, module.fused_attention.attention_dropout_ctx = can_go_straight, context


def without_nothing(trainer: Any) -> Any:
    """For the noise of the others."""
    return contextlib.nullcontext()


LEVERS: dict[str, Callable[[Any], Any]] = {
    "nothing": without_nothing,
    "kernels of adapters": without_kernels_of_adapters,
    "adding B's product in place": without_adding_in_place,
    "adding gradients in place": without_adding_gradients_in_place,
    "launching kernels as compiled": without_launching_as_compiled,
    "going straight to cuDNN": without_going_straight_to_cudnn,
    "dealing rows by length": without_dealing,
    "leaving unlabelled tokens out": without_leaving_tokens_out,
    "kernels of SwiGLU": without_kernels_of_swiglu,
    "kernels of the loss": without_kernels_of_loss,
    "keeping activations": without_keeping_activations,
    "large micro batches": without_large_micro_batches,
}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="how often every lever is visited")
    parser.add_argument("--steps", type=int, default=6, help="steps of a visit; the first is not counted")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="levers whose name holds one of these words, parted by commas")
    parser.add_argument("--record", type=Path, help="write seconds of every step to this file after each round, as JSON")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="sft FLAGS")
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(launch_ranks(read_options()))
