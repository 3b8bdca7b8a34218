"""What training changes, as sharded tensors: the trained weights in float32 and the optimizer's state of each.

A tensor is stored as its Hugging Face parts (``Rule.places``), which no layout cuts differently, under the canonical name of
its parameter; so every layout can read what any other has written. The border to Megatron-core's untyped optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from finetune_trainer import megatron_cpu
from finetune_trainer.contract import TrainingConfig
from finetune_trainer.families import Architecture, Family
from finetune_trainer.lora import adapters
from finetune_trainer.model import named_weights
from finetune_trainer.parallel import Ranks
from finetune_trainer.rules import Copy, Cut, Dims, Rule
from finetune_trainer.shards import local_dims

megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402  (after the redirection)
from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402
from megatron.core.optimizer import ChainedOptimizer  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402

WEIGHTS = "weights"
GATHERED_ELEMENTS = 2**26
"""Elements that are gathered over data-parallel ranks at a time: 256 MiB."""


@dataclass(frozen=True)
class Trained:
    """One parameter that training changes: its canonical name, how its rows are laid out, and how they are cut."""

    name: str
    parameter: torch.nn.Parameter
    rule: Rule
    is_copy: bool = False
    """Whether another pipeline stage holds the same parameter (the tied embedding) and writes it."""


@dataclass(frozen=True)
class TrainingState:
    """All that a checkpoint holds, where it lives."""

    trained: tuple[Trained, ...]
    optimizer: ChainedOptimizer
    moments: tuple[str, ...]
    """Names of the optimizer's tensors per parameter."""
    dims: Dims
    """Sizes of this rank's share."""
    ranks: Ranks


@dataclass(frozen=True)
class _Owned:
    """What this process keeps of one parameter in its optimizer: the elements ``part`` of the flat parameter."""

    optimizer: torch.optim.Optimizer
    main: Tensor
    part: slice


def find_trained(chunks: Sequence[torch.nn.Module], family: Family, architecture: Architecture, ranks: Ranks) -> tuple[Trained, ...]:
    """Every parameter of this rank that requires a gradient, adapters and weights, in the order of the layers."""
    rules = {rule.mcore: rule for rule in family.rows(architecture)}
    found = []
    for name, layer in adapters(chunks):
        rule = rules[f"{name}.weight"]
        columns = rule.cut is Cut.COLUMNS
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        found.append(Trained(a, layer.lora_A.weight, Copy(a, (a,), Cut.COLUMNS if columns else Cut.WHOLE)))
        found.append(Trained(b, layer.lora_B.weight, Copy(b, (b,), Cut.WHOLE) if columns else rule))
    for name, parameter in named_weights(chunks):
        if parameter.requires_grad:
            found.append(Trained(name, parameter, rules[name], is_copy=name.startswith("embedding.") and not ranks.is_first_stage))
    return tuple(found)


def open_state(trained: tuple[Trained, ...], optimizer: ChainedOptimizer, training: TrainingConfig, architecture: Architecture, ranks: Ranks) -> TrainingState:
    """The state of a run that is set up."""
    moments = ("exp_avg", "exp_avg_sq") if training.optimizer == "adam" else ("momentum_buffer",) if training.sgd_momentum > 0 else ()
    return TrainingState(trained, optimizer, moments, local_dims(architecture.dims(ranks.tp.size), ranks.tp), ranks)


def count_bytes(state: TrainingState) -> tuple[int, int]:
    """Bytes of a whole checkpoint with the optimizer's state, and of the trained weights alone, over all ranks; the same on every rank. Collective."""
    own = sum(each.parameter.numel() for each in state.trained if not each.is_copy) if state.ranks.dp.rank == 0 else 0
    total = torch.tensor(own, dtype=torch.int64, device=state.ranks.device)
    distributed.all_reduce(total)
    weights = int(total.item()) * 4
    return weights * (1 + len(state.moments)), weights


# Out


def gather(state: TrainingState, *, with_optimizer: bool) -> dict[str, ShardedTensor]:
    """Copies, in CPU memory, of all state as sharded tensors by key. Collective."""
    names = (WEIGHTS, *state.moments) if with_optimizer else (WEIGHTS,)
    return {tensor.key: tensor for name in names for each, whole in _gather(state, name) for tensor in _shard(state, each, name, whole)}


def _gather(state: TrainingState, name: str) -> Iterator[tuple[Trained, Tensor]]:
    """One tensor of every trained parameter, float32, in the parameter's shape on this tensor- and pipeline-parallel rank."""
    for some in _batches(state.trained):
        flat = torch.zeros(sum(each.parameter.numel() for each in some), dtype=torch.float32, device=state.ranks.device)
        offset, shared = 0, False
        for each in some:
            owned, shared_here = _find_owned(state.optimizer, each.parameter)
            shared = shared or shared_here
            source = None if owned is None else owned.main if name == WEIGHTS else owned.optimizer.state.get(owned.main, {}).get(name)
            if owned is not None and source is not None:
                flat[offset + owned.part.start : offset + owned.part.stop].copy_(source.detach().reshape(-1))
            offset += each.parameter.numel()
        if shared and state.ranks.dp.size > 1:
            distributed.all_reduce(flat, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        pieces = flat.cpu().split([each.parameter.numel() for each in some])
        yield from zip(some, (piece.view(each.parameter.shape) for each, piece in zip(some, pieces, strict=True)), strict=True)


def _batches(trained: Sequence[Trained]) -> Iterator[list[Trained]]:
    batch: list[Trained] = []
    elements = 0
    for each in trained:
        if batch and elements + each.parameter.numel() > GATHERED_ELEMENTS:
            yield batch
            batch, elements = [], 0
        batch.append(each)
        elements += each.parameter.numel()
    if batch:
        yield batch


def _find_owned(optimizer: ChainedOptimizer, parameter: torch.nn.Parameter) -> tuple[_Owned | None, bool]:
    """This process's part of a parameter's state (None: another data-parallel rank has all of it), and whether parts are shared out at all."""
    for inner in optimizer.chained_optimizers:
        if isinstance(inner, DistributedOptimizer):
            if parameter not in inner.model_param_group_index_map:
                continue
            group, index = inner.model_param_group_index_map[parameter]
            part = inner._get_model_param_range_map(parameter)["param"]
            return _Owned(inner.optimizer, inner.optimizer.param_groups[group]["params"][index], slice(part.start, part.end)), True
        main = getattr(parameter, "main_param", None)
        return _Owned(inner.optimizer, parameter if main is None else main, slice(0, parameter.numel())), False
    return None, True


def _shard(state: TrainingState, each: Trained, name: str, whole: Tensor) -> list[ShardedTensor]:
    tp, dims, rule = state.ranks.tp, state.dims, each.rule
    padded = rule.padded_rows(dims) is not None
    parts = (whole,) if padded else rule.places(whole, dims)
    offsets = [] if rule.cut is Cut.WHOLE else [(0 if rule.cut is Cut.ROWS else 1, tp.rank, tp.size)]
    replica = (int(each.is_copy), tp.rank if rule.cut is Cut.WHOLE else 0, state.ranks.dp.rank)
    return [
        # Another tensor-parallel size pads the vocabulary to another length; the rows that differ are padding.
        ShardedTensor.from_rank_offsets(f"{name}.{each.name}.{index}", part.contiguous(), *offsets, replica_id=replica, allow_shape_mismatch=padded)
        for index, part in enumerate(parts)
    ]


# In


def expect(state: TrainingState) -> dict[str, ShardedTensor]:
    """Sharded tensors of all state, to be filled from a checkpoint."""
    empty = {each.name: torch.zeros(each.parameter.shape, dtype=torch.float32) for each in state.trained}
    return {
        tensor.key: tensor for name in (WEIGHTS, *state.moments) for each in state.trained for tensor in _shard(state, each, name, empty[each.name].clone())
    }


@torch.no_grad()
def restore(state: TrainingState, loaded: Mapping[str, Tensor], num_updates: int) -> None:
    """Put what was loaded into parameters and optimizer; ``num_updates`` optimizer steps have been made."""
    for each in state.trained:
        weights = _assemble(state, each, WEIGHTS, loaded)
        each.parameter.copy_(weights)
        owned, _ = _find_owned(state.optimizer, each.parameter)
        if owned is not None:
            if owned.main is not each.parameter:
                owned.main.copy_(weights.reshape(-1)[owned.part].view(owned.main.shape))
            owned.optimizer.state[owned.main] = _optimizer_state(state, each, owned, loaded, num_updates)
    for inner in state.optimizer.chained_optimizers:
        for group in inner.optimizer.param_groups:
            if not _keeps_steps_per_parameter(inner.optimizer):
                group["step"] = num_updates  # transformer-engine's FusedAdam


def _assemble(state: TrainingState, each: Trained, name: str, loaded: Mapping[str, Tensor]) -> Tensor:
    whole = torch.zeros(each.parameter.shape, dtype=torch.float32)
    places = (whole,) if each.rule.padded_rows(state.dims) is not None else each.rule.places(whole, state.dims)
    for index, place in enumerate(places):
        place.copy_(loaded[f"{name}.{each.name}.{index}"])
    return whole


def _optimizer_state(state: TrainingState, each: Trained, owned: _Owned, loaded: Mapping[str, Tensor], num_updates: int) -> dict[str, Any]:
    # A step of its own for each parameter: torch advances it once per parameter and step, also where parameters share one tensor.
    tensors: dict[str, Any] = (
        {"step": torch.tensor(float(num_updates))} if _keeps_steps_per_parameter(owned.optimizer) and state.moments[:1] == ("exp_avg",) else {}
    )
    for name in state.moments:
        tensors[name] = _assemble(state, each, name, loaded).reshape(-1)[owned.part].view(owned.main.shape).to(owned.main.device, copy=True)
    return tensors


def _keeps_steps_per_parameter(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.Adam | torch.optim.SGD)
