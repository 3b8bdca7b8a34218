"""How one Megatron-core parameter and its Hugging Face tensors are laid out in each other.

A rule says where, inside the Megatron-core tensor, each Hugging Face part lies: ``places`` returns views. ``fuse`` copies the
parts into these views and ``split`` reads them back, so the two are inverse to each other by construction, for a whole
tensor as for the share of one tensor-parallel rank. Pure tensors: no ranks, files or modules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Self

import torch
from torch import Tensor

from finetune_trainer.contract import ModelError

LAYER = "*"
"""Stands for the number of a layer in the names of a rule."""


class Cut(Enum):
    """How every Hugging Face part of a rule is cut over tensor-parallel ranks."""

    WHOLE = "whole"
    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True)
class Dims:
    """The sizes that layouts depend on: of the whole model, or of the share of one tensor-parallel rank (`shards.local_dims`)."""

    num_query_groups: int
    num_attention_heads: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int


@dataclass(frozen=True)
class Rule(ABC):
    """One Megatron-core parameter and the Hugging Face tensors that it is made of.

    ``mcore`` and ``hf`` may hold ``*``, the number of the layer. ``untied_only``: the row does not exist in a model whose
    output layer is its embedding. A rule only rearranges rows, so it commutes with the product of an adapter:
    ``split(B @ A) == split(B) @ A``; the rule of a linear layer's weight is the rule of its lora_B.
    """

    mcore: str
    hf: tuple[str, ...]
    cut: Cut
    untied_only: bool = False

    @abstractmethod
    def places(self, fused: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        """Views into ``fused`` [rows, ...], one for each Hugging Face part, with the part's elements in the part's order."""

    def padding(self, fused: Tensor, dims: Dims) -> Tensor:
        """The view of the rows that no Hugging Face part fills; they are zero."""
        return fused[fused.shape[0] :]

    def padded_rows(self, dims: Dims) -> int | None:
        """Rows of the whole Megatron-core tensor where it has more than its parts together, else None."""
        return None

    def fused_rows(self, parts: Sequence[Tensor], dims: Dims) -> int:
        """Rows of the Megatron-core tensor that ``parts`` make."""
        return sum(part.shape[0] for part in parts)

    def fuse(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        """The Megatron-core tensor made of the Hugging Face ``parts``."""
        fused = parts[0].new_empty((self.fused_rows(parts, dims), *parts[0].shape[1:]))
        for place, part in zip(self.places(fused, dims), parts, strict=True):
            place.copy_(part.reshape(place.shape))
        self.padding(fused, dims).zero_()
        return fused

    def split(self, tensor: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        """The Hugging Face parts of a Megatron-core tensor; views of it where the layout allows."""
        return tuple(place.reshape(-1, *tensor.shape[1:]) for place in self.places(tensor, dims))

    def at_layer(self, layer: int) -> Self:
        """This rule with the layer's number in its names."""
        return replace(self, mcore=self.mcore.replace(LAYER, str(layer)), hf=tuple(name.replace(LAYER, str(layer)) for name in self.hf))


@dataclass(frozen=True)
class Copy(Rule):
    """One Hugging Face tensor, as it is."""

    def places(self, fused: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        return (fused,)


@dataclass(frozen=True)
class QKV(Rule):
    """Query, key and value: for each query group its query heads, then its key head, then its value head. Weight or bias."""

    def places(self, fused: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        queries = dims.num_attention_heads // dims.num_query_groups
        groups = fused.view(dims.num_query_groups, queries + 2, dims.head_dim, *fused.shape[1:])
        return groups[:, :queries], groups[:, queries : queries + 1], groups[:, queries + 1 :]


@dataclass(frozen=True)
class GateUp(Rule):
    """The gate's rows, then the up projection's, of the share at hand: two halves of the same size on every rank."""

    def places(self, fused: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        half = fused.shape[0] // 2
        return fused[:half], fused[half:]


@dataclass(frozen=True)
class Vocab(Rule):
    """One row per token of the vocabulary; the rows that pad it are zero and stay behind on the way out."""

    def places(self, fused: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        return (fused[: dims.vocab_size],)

    def padding(self, fused: Tensor, dims: Dims) -> Tensor:
        return fused[dims.vocab_size :]

    def padded_rows(self, dims: Dims) -> int | None:
        return dims.padded_vocab_size

    def fused_rows(self, parts: Sequence[Tensor], dims: Dims) -> int:
        return dims.padded_vocab_size


def part_shapes(rule: Rule, shape: Sequence[int], dims: Dims) -> tuple[tuple[int, ...], ...]:
    """Shapes of a rule's Hugging Face parts, for a Megatron-core tensor of ``shape``; both whole, or both of one share."""
    fused = torch.empty(tuple(shape), device="meta")
    return tuple((place.numel() // max(1, fused[0].numel()), *fused.shape[1:]) for place in rule.places(fused, dims))


def match_names(side: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Refuse names that are expected and missing, found and unexpected, or there more than once on either side.

    Raises ModelError with the sorted lists; ``side`` says whose names they are, such as `the files of /models/x`.
    """
    wanted, there = Counter(iter(expected)), Counter(iter(found))  # iter: a mapping's values are no counts
    lists = {
        "missing": sorted(wanted.keys() - there.keys()),
        "unexpected": sorted(there.keys() - wanted.keys()),
        "mapped more than once": sorted(name for name, count in wanted.items() if count > 1),
        "present more than once": sorted(name for name, count in there.items() if count > 1),
    }
    problems = [f"{len(names)} {what}: {', '.join(names)}" for what, names in lists.items() if names]
    if problems:
        raise ModelError(f"{side}: the tensors do not match the model. " + "; ".join(problems))
