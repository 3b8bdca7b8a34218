"""What a run keeps for weights that it does not train: counted in every rank, on a CPU as on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import small_models
import small_runs
from finetune_trainer import data, lora, train
from finetune_trainer.model import unwrap
from small_models import Layout
from small_runs import Job


@dataclass(frozen=True)
class Kept:
    """Numbers of elements on this rank after two steps."""

    frozen: int
    trained: int
    with_gradient: list[str]
    """Frozen weights that have a gradient or a place for one."""
    main: int
    """In what the optimizer updates."""
    moments: int
    buffered: int


def count_kept(job: Job) -> Kept:
    """Train two steps and count."""
    trainers: list[Any] = []
    counted: list[Kept] = []

    def afterwards(chunks: Any, ranks: Any) -> None:
        parameters = [(name, parameter) for chunk in chunks for name, parameter in chunk.named_parameters()]
        optimizers = [inner.optimizer for inner in trainers[0].optimizer.chained_optimizers]
        counted.append(
            Kept(
                frozen=sum(each.numel() for _, each in parameters if not each.requires_grad),
                trained=sum(each.numel() for _, each in parameters if each.requires_grad),
                with_gradient=[name for name, each in parameters if not each.requires_grad and (each.grad is not None or hasattr(each, "main_grad"))],
                main=sum(each.numel() for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]),
                moments=sum(each.numel() for optimizer in optimizers for each in moments_of(optimizer)),
                buffered=sum(buffer.numel for chunk in trainers[0].chunks for buffer in chunk.buffers),
            )
        )

    small_runs.train(job, interfere=trainers.append, afterwards=afterwards)
    return counted[0]


def moments_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for state in optimizer.state.values():
        yield from (each for each in state.values() if isinstance(each, torch.Tensor) and each.numel() > 1)


def count_saved(layout: Layout, length: int) -> float:
    """Numbers that the forward pass of one row keeps for the backward pass, weights left out, per token."""
    built = small_models.build(layout)
    lora.attach(built.chunks, layout.config.tuning, 1)
    (chunk,) = built.chunks
    chunk.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    (ids,) = small_models.token_rows((length,), unwrap(chunk).architecture.vocab_size)
    row = data.Row(torch.tensor(ids, dtype=torch.int32).numpy(), torch.ones(length, dtype=torch.bool).numpy())
    batch = data.collate([row], built.ranks.tp.size, built.ranks.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = train.forward_step(iter([batch]), chunk)
    numbers = sum(kept.values()) / getattr(torch, layout.torch_dtype).itemsize / length
    del output
    gc.collect()
    return numbers
