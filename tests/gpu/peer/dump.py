"""Run ms-swift's ``megatron sft`` and leave what another trainer needs to repeat it: batches, initial LoRA weights, losses.

``torchrun dump.py FLAGS`` with the folder in ``PEER_DUMP`` and the number of steps in ``PEER_STEPS``; the run ends after them.

* ``lora-<rank>.safetensors``: every LoRA parameter of this rank before the first step, by ms-swift's name
* ``batch-<step>.safetensors``: ``tokens``, ``labels`` (-100 where nothing is learned) and ``cu_seqlens`` of the step's only micro batch
* ``steps.json``: loss, norm of the gradient and learning rate of each step
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from swift.megatron import megatron_sft_main
from swift.megatron.trainers.trainer import MegatronTrainer
from torch import distributed

FOLDER, STEPS = Path(os.environ["PEER_DUMP"]), int(os.environ["PEER_STEPS"])
steps: list[dict[str, float]] = []

original_prepare_batch = MegatronTrainer._prepare_batch
original_train_step = MegatronTrainer.train_step
original_train = MegatronTrainer.train


def save(tensors: dict[str, torch.Tensor], name: str) -> None:
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, FOLDER / name)


def train(self: Any, *args: Any) -> None:
    """Before the first step."""
    (model,) = self.unwrapped_models
    save({name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}, f"lora-{distributed.get_rank()}.safetensors")
    original_train(self, *args)


def prepare_batch(self: Any, data: Any, *args: Any) -> Any:
    """The batch as the model gets it: labels are the tokens after."""
    batch = original_prepare_batch(self, data, *args)
    if distributed.get_rank() == 0:
        packed = batch["packed_seq_params"]
        save({"tokens": batch["input_ids"][0], "labels": batch["labels"][0], "cu_seqlens": packed.cu_seqlens_q}, f"batch-{len(steps)}.safetensors")
    return batch


def train_step(self: Any, *args: Any) -> Any:
    """One step; after the last one the processes end."""
    rate = float(self.optimizer.param_groups[0]["lr"])
    metrics, norm, _ = result = original_train_step(self, *args)
    loss, labelled = torch.stack([each["loss"] for each in metrics]).sum(dim=0).tolist()
    steps.append({"loss": loss / labelled, "labelled": labelled, "gradient_norm": float(norm), "learning_rate": rate})
    if len(steps) == STEPS:
        if distributed.get_rank() == 0:
            (FOLDER / "steps.json").write_text(json.dumps(steps))
        distributed.barrier()
        os._exit(0)
    return result


MegatronTrainer.train, MegatronTrainer._prepare_batch, MegatronTrainer.train_step = train, prepare_batch, train_step

if __name__ == "__main__":
    megatron_sft_main()
