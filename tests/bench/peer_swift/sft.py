"""The peer's side of ``make bench-gpu``: ms-swift's ``megatron sft`` unchanged, but for marks that its ranks leave. ``torchrun sft.py FLAGS``.

BENCH_STEPS is the number of steps; BENCH_END says what comes after the last one, ``training`` nothing, ``saving`` the checkpoint. Then the processes end at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from gpu_marks import Marks, leave_fsync_out, peak

PR_SET_PDEATHSIG = 1


def main() -> None:
    """One rank."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a launcher that is killed leaves its workers behind
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as its own command does
    marks = Marks()
    marks.write("started")
    from swift.megatron import megatron_sft_main

    marks.write("stage loading")
    leave_fsync_out()
    mark_phases(marks)
    mark_steps(marks, int(os.environ["BENCH_STEPS"]), saves=os.environ["BENCH_END"] == "saving")
    megatron_sft_main()


def mark_phases(marks: Marks) -> None:
    """Time what loads and saves."""
    from mcore_bridge import GPTBridge
    from swift.megatron.trainers.trainer import MegatronTrainer

    tuner = sys.argv[sys.argv.index("--tuner_type") + 1]
    marks.around(GPTBridge, "load_weights", "load")
    # The whole of it: configuration and tokenizer are written by functions around save_weights that are put in later.
    marks.around(MegatronTrainer, "save_checkpoint", "export" if tuner == "full" else "adapter")


def mark_steps(marks: Marks, num_steps: int, *, saves: bool) -> None:
    """Time the steps. Tokens are those of the batch as the model gets it: rows without padding, but for a few tokens up to a multiple of the tensor size."""
    import torch
    from megatron.core import mpu
    from swift.megatron.trainers.trainer import MegatronTrainer

    prepare_one, train_one, train_all = MegatronTrainer._prepare_batch, MegatronTrainer.train_step, MegatronTrainer.train
    tokens: list[int] = []
    losses: list[torch.Tensor] = []

    def prepare_batch(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        tokens[-1] += data["input_ids"].numel()
        return prepare_one(self, data, *args, **kwargs)

    def train_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens.append(0)
        result = train_one(self, *args, **kwargs)
        losses.append(torch.stack([each["loss"] for each in result[0]]).sum(dim=0))  # [sum, labelled tokens]; read after the last step
        marks.write("step", data_rank=mpu.get_data_parallel_rank(), tokens=tokens[-1])
        if len(losses) == num_steps:
            marks.write("trained", **peak())
            marks.write("losses", values=torch.stack(losses).tolist())
            if not saves:
                end()
        return result

    def train(self: Any, *args: Any, **kwargs: Any) -> None:
        train_all(self, *args, **kwargs)
        end()

    MegatronTrainer._prepare_batch, MegatronTrainer.train_step, MegatronTrainer.train = prepare_batch, train_step, train


def end() -> None:
    """All ranks together, without the seconds that an interpreter takes to end."""
    import torch

    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
