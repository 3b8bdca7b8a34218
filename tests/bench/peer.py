"""The peer of the step-time benchmark: transformers + PEFT on the job of a RunConfig; one process, or several with their gradients summed over gloo.

``python peer.py RUN.json THREADS ROWS_PER_PASS`` prints JSON: seconds, loss and tokens of every step, peak GiB per process. The rows, their order and the optimizer's numbers are those of
the RunConfig; rows of a pass are padded to the longest, as transformers' collators do.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM

from finetune_trainer import data
from finetune_trainer.contract import RunConfig

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Place:
    """This process among the data-parallel ones."""

    rank: int
    size: int


def main() -> None:
    config, threads, rows_per_pass = RunConfig.load(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    torch.manual_seed(config.training.seed)
    place = Place(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if place.size > 1:
        distributed.init_process_group("gloo")
    model = make_model(config)
    rows = data.open_rows(config.data, data.load_tokenizer(Path(config.model.source))).rows
    steps = train(model, rows, config, place, rows_per_pass)
    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    peaks = [torch.zeros(()) for _ in range(place.size)]
    if place.size > 1:
        distributed.all_gather(peaks, peak)
        distributed.destroy_process_group()
    else:
        peaks = [peak]
    if place.rank == 0:
        print(json.dumps({"steps": steps, "peakMemoryGib": [round(value.item(), 3) for value in peaks]}))


def make_model(config: RunConfig) -> Any:
    """The base model with fresh LoRA layers, in training mode."""
    base = AutoModelForCausalLM.from_pretrained(config.model.source, dtype=getattr(torch, config.model.torch_dtype or "float32"))
    tuning = config.tuning
    lora = LoraConfig(
        r=tuning.lora_rank or 8, lora_alpha=tuning.lora_alpha or 32, lora_dropout=tuning.lora_dropout or 0.0, target_modules=LINEAR, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, lora).train()


def train(model: Any, rows: Sequence[data.Row], config: RunConfig, place: Place, rows_per_pass: int) -> list[dict[str, float]]:
    """Every optimizer step of the job."""
    training = config.training
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=training.lr or 1e-4, betas=(training.adam_beta1, training.adam_beta2), eps=training.adam_eps, weight_decay=training.weight_decay
    )
    order = data.order(len(rows), training.seed, config.data.train_dataloader_shuffle)
    steps = []
    for step in range(training.train_iters or 1):
        begin = time.perf_counter()
        batches = data.micro_batches(order, step, training.global_batch_size, rows_per_pass, place, [len(row) for row in rows])
        every = [rows[order[step * training.global_batch_size + index]] for index in range(training.global_batch_size)]
        num_labelled = sum(int(row.labelled[1:].sum()) for row in every)
        loss = torch.tensor(sum(backward(model, [rows[index] for index in batch], num_labelled) for batch in batches))
        if place.size > 1:
            sum_gradients(parameters)
            distributed.all_reduce(loss)
        torch.nn.utils.clip_grad_norm_(parameters, training.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"seconds": time.perf_counter() - begin, "loss": loss.item(), "tokens": sum(len(row) for row in every)})
    return steps


def backward(model: Any, rows: Sequence[data.Row], num_labelled: int) -> float:
    """Forward and backward of one pass; its share of the mean loss."""
    length = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -100, dtype=torch.long)
    for index, row in enumerate(rows):
        ids = torch.from_numpy(row.input_ids).long()
        tokens[index, : len(row)], mask[index, : len(row)] = ids, 1
        labels[index, : len(row)] = torch.where(torch.from_numpy(row.labelled), ids, -100)
    loss: Tensor = model(input_ids=tokens, attention_mask=mask, labels=labels, num_items_in_batch=num_labelled).loss
    loss.backward()
    return loss.item()


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes, in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


if __name__ == "__main__":
    main()
