"""What the tests of several modules do in every rank: set up a layout, build a small model, load it; and transformers' answer to compare with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import param_is_not_shared

from finetune_trainer import convert, hf_files, lora, model, parallel, train
from finetune_trainer.contract import RunConfig
from finetune_trainer.data import Row, collate
from finetune_trainer.families import find
from finetune_trainer.parallel import Ranks


@dataclass(frozen=True)
class Layout:
    """Options of a run by their API names, for a model folder."""

    folder: Path
    parallelism: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    torch_dtype: str = "float32"

    @property
    def config(self) -> RunConfig:
        return RunConfig.model_validate(
            {
                "model": {"source": str(self.folder), "torchDtype": self.torch_dtype},
                "data": {"dataset": ["unused"]},
                "parallelism": {"ddpTimeout": 60, **self.parallelism},
                "training": self.training,
                "tuning": {"tunerType": "full"} if not self.tuning else self.tuning,
                "run": {"outputDir": str(self.folder)},
            }
        )


@dataclass(frozen=True)
class Built:
    chunks: list[Any]
    config: RunConfig
    ranks: Ranks


def build(layout: Layout) -> Built:
    """This rank's part of the model, with the folder's weights."""
    parallel.open_process_group(layout.config)
    ranks = parallel.initialize(layout.config.parallelism, layout.config.training.seed)
    hf = hf_files.open_model(layout.config.model)
    family = find(hf.config)
    chunks = model.build(family, hf.config, layout.config, ranks)
    convert.import_base(chunks, family, hf, ranks)
    return Built(chunks, layout.config, ranks)


def collect_gradients(built: Built, micro_batches: list[list[list[int]]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of one step and what Megatron's schedules and DDP leave in ``main_grad`` of each trained parameter, by canonical name; the loss on the last stage only.

    A micro batch is rows packed one after another, all of whose tokens are learned.
    """
    config = built.chunks[0].config
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
    wrapped = [DistributedDataParallel(config, ddp_config, chunk) for chunk in built.chunks]
    lora.add_gradients_in_place(wrapped)
    config.finalize_model_grads_func = finalize_model_grads
    batches = [collate([data_row(row) for row in rows], built.ranks.tp.size, built.ranks.device) for rows in micro_batches]
    for chunk in wrapped:
        chunk.zero_grad_buffer()
        chunk.train()
    losses = get_forward_backward_func()(
        forward_step_func=train.forward_step,
        data_iterator=iter(batches),
        model=wrapped[0],
        num_microbatches=len(micro_batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    total = torch.stack(losses).sum(dim=0).tolist() if losses else []
    unwrapped = model.unwrap(wrapped[0])
    named = unwrapped.named_parameters()
    return total[0] / total[1] if total else 0.0, {
        model.canonical_name(unwrapped, name): parameter.main_grad.clone() for name, parameter in named if parameter.requires_grad
    }


def data_row(ids: list[int]) -> Row:
    return Row(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool))


def counted_square(built: Built, gradients: dict[str, torch.Tensor]) -> float:
    """What this rank adds to the square of the gradient's norm by Megatron's rule: tensors that another rank holds too count once."""
    chunk = built.chunks[0]
    counted = (
        gradients[model.canonical_name(chunk, name)]
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad and param_is_not_shared(parameter) and tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter)
    )
    return sum(gradient.double().square().sum().item() for gradient in counted)


def pack(rows: list[list[int]]) -> PackedSeqParams:
    ends = torch.tensor([0, *itertools.accumulate(len(row) for row in rows)], dtype=torch.int32)
    longest = max(len(row) for row in rows)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest)


def token_rows(lengths: tuple[int, ...], vocab_size: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def transformers_logits(folder: Path, rows: list[list[int]]) -> list[torch.Tensor]:
    """float32 [tokens, vocabulary] of every row, by transformers."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [reference(torch.tensor([row])).logits[0] for row in rows]


__all__ = ["Built", "Layout", "build", "collect_gradients", "counted_square", "pack", "token_rows", "transformers_logits"]
