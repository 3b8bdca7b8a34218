"""What the switches of tests/bench/gpu_levers.py change, looked at on a rank."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[1] / "bench"
ELSEWHERE = {"nothing", "going straight to cuDNN"}
"""That of attention needs transformer-engine."""


def expect_switches(trainer: Any) -> None:
    """Fail unless every switch changes what it stands for, and nothing else that is looked at, while it lasts."""
    sys.path.append(str(BENCH))
    import gpu_levers

    looks = find_looks(trainer, gpu_levers)
    assert looks.keys() | ELSEWHERE == gpu_levers.LEVERS.keys()
    before = {name: look() for name, look in looks.items()}
    for name in looks:
        with gpu_levers.LEVERS[name](trainer):
            assert [each for each, look in looks.items() if look() != before[each]] == [name]
        assert {each: look() for each, look in looks.items()} == before


def find_looks(trainer: Any, gpu_levers: Any) -> dict[str, Callable[[], Any]]:
    """By lever: what it changes."""
    from finetune_trainer import kernel_launch, lora, loss, low_rank, swiglu
    from finetune_trainer import train as training

    order = importlib.import_module("finetune_trainer.data.order")
    factors = [factor for _, layer in lora.adapters(trainer.chunks) for factor in (layer.lora_A, layer.lora_B)]
    (chunk,) = trainer.chunks
    return {
        "kernels of adapters": lambda: low_rank._has_kernels,
        "adding B's product in place": lambda: low_rank.Raise.forward,
        "adding gradients in place": lambda: [id(factor.sums) for factor in factors],
        "launching kernels as compiled": lambda: kernel_launch.Kernel.launch,
        "dealing rows by length": lambda: order.deal,
        "leaving unlabelled tokens out": lambda: training.collate,
        "kernels of SwiGLU": lambda: swiglu._has_kernels,
        "kernels of the loss": lambda: loss._has_kernels,
        "keeping activations": lambda: (chunk.config.recompute_granularity, len(lora.unwrap(chunk).embedding._forward_hooks)),
        "large micro batches": lambda: gpu_levers.micro_batch_size,
    }
