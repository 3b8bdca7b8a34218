"""What the switches of tests/bench/gpu_step_levers.py and gpu_export_levers.py change, looked at on a rank."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from small_runs import Job, train

BENCH = Path(__file__).parents[1] / "bench"
ELSEWHERE = {"nothing", "going straight to cuDNN"}
"""That of attention needs transformer-engine."""


def expect_switches(trainer: Any) -> None:
    """Fail unless every switch changes what it stands for, and nothing else that is looked at, while it lasts."""
    sys.path.append(str(BENCH))
    import gpu_step_levers

    looks = find_looks(trainer, gpu_step_levers)
    assert looks.keys() | ELSEWHERE == gpu_step_levers.LEVERS.keys()
    before = {name: look() for name, look in looks.items()}
    for name in looks:
        with gpu_step_levers.LEVERS[name](trainer):
            assert [each for each, look in looks.items() if look() != before[each]] == [name]
        assert {each: look() for each, look in looks.items()} == before


def find_looks(trainer: Any, gpu_step_levers: Any) -> dict[str, Callable[[], Any]]:
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
        "reading wide gradients once": lambda: low_rank._is_wide,
        "launching kernels as compiled": lambda: kernel_launch.Kernel.launch,
        "dealing rows by length": lambda: order.deal,
        "leaving unlabelled tokens out": lambda: training.collate,
        "kernels of SwiGLU": lambda: swiglu._has_kernels,
        "kernels of the loss": lambda: loss._has_kernels,
        "gradient of the loss in the forward pass": lambda: loss._LabelledLoss,
        "keeping activations": lambda: (chunk.config.recompute_granularity, len(lora.unwrap(chunk).embedding._forward_hooks)),
        "large micro batches": lambda: gpu_step_levers.micro_batch_size,
    }


def train_under(name: str, job: Job) -> list[float]:
    """Losses of a run without one lever."""
    sys.path.append(str(BENCH))
    import gpu_step_levers

    with gpu_step_levers.LEVERS[name](None):
        return train(job).losses


def export_under_every_switch(job: Job, folder: Path) -> dict[str, int]:
    """Export a trained model without each lever, to a folder of that lever's name; the bytes that this rank handed over for each."""
    from finetune_trainer import convert, families, hf_export, hf_files

    sys.path.append(str(BENCH))
    import gpu_export_levers

    written = dict.fromkeys(gpu_export_levers.LEVERS, 0)

    def counting(name: str) -> Any:
        hand_over = hf_export.FolderWriter.write

        def write(writer: hf_export.FolderWriter, tensor: str, row: int, rows: Any) -> None:
            written[name] += rows.nbytes
            hand_over(writer, tensor, row, rows)

        return mock.patch.object(hf_export.FolderWriter, "write", write)

    def export(chunks: Any, ranks: Any) -> None:
        hf = hf_files.open_model(job.config.model)
        for name, without in gpu_export_levers.LEVERS.items():
            with counting(name), without(None):
                convert.export_huggingface(chunks, families.find(hf.config), hf, ranks, folder / name, 2**16)

    train(job, afterwards=export)
    return written
