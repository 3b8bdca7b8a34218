"""A rank's share of each Hugging Face tensor: the rows of a family, cut for one rank.

Import, export, adapters and verification all walk these pieces. Pure: tensors and arithmetic, no files, no collectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from finetune_trainer.families import Architecture, Family
from finetune_trainer.rules import Cut, Dims, Rule, match_names, part_shapes
from finetune_trainer.shards import Share, local_dims, share_slices, whole_shape

EMBEDDING = "embedding.word_embeddings.weight"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Piece:
    """What one rank holds of one Hugging Face tensor.

    ``place`` is a view of the Megatron-core tensor, its elements in the order of the Hugging Face tensor's part
    ``slices``, but shaped as the layout has it; ``shape`` is that of the whole Hugging Face tensor.
    """

    name: str
    place: Tensor
    shape: tuple[int, ...]
    slices: tuple[slice, ...]
    cut: Cut

    def part(self) -> Tensor:
        """The piece in the shape of ``slices``; a copy where the layout is not contiguous."""
        return self.place.reshape([part.stop - part.start for part in self.slices])


@dataclass(frozen=True)
class Layout:
    """The rows of one model by canonical Megatron-core name, and the share of one rank.

    ``twins``: tensors that a model with tied embeddings does not need, by the Hugging Face name of the tensor they equal.
    """

    family: Family
    rows: Mapping[str, Rule]
    dims: Dims
    local: Dims
    share: Share
    twins: Mapping[str, str]

    @classmethod
    def of(cls, family: Family, architecture: Architecture, share: Share) -> Layout:
        """The layout of a model for tensor-parallel rank ``share``; raises ModelError where the shares are not equal or two rows make one parameter."""
        dims = architecture.dims(share.size)
        rules = family.rows(architecture)
        rows = {rule.mcore: rule for rule in rules}
        match_names(f"the table of family {family.model_type}", rows, [rule.mcore for rule in rules])
        unneeded = [rule.hf[0] for rule in family.weights if rule.untied_only] if architecture.tied_embeddings else []
        return cls(family, rows, dims, local_dims(dims, share), share, dict(zip(rows[EMBEDDING].hf, unneeded, strict=False)))

    def names(self) -> list[str]:
        """The Hugging Face names of all weights, in the order of the model."""
        return [name for rule in self.rows.values() for name in rule.hf]

    def weight(self, mcore: str, tensor: Tensor) -> Iterator[Piece]:
        """The pieces of one Megatron-core parameter, or of a tensor laid out like it."""
        rule = self.rows[mcore]
        return self._cut(rule, rule.hf, tensor, rule.cut)

    def adapter(self, linear: str, lora_a: Tensor, lora_b: Tensor) -> Iterator[Piece]:
        """The pieces of the adapter of linear layer ``linear``: for each Hugging Face layer in it lora_A (the same for all) and lora_B.

        ``lora_a`` [rank, in] is cut by columns where the layer's weight is, ``lora_b`` [out, rank] by rows where it is.
        """
        rule = self.rows[f"{linear}.weight"]
        cut_a, cut_b = (Cut.COLUMNS, Cut.WHOLE) if rule.cut is Cut.COLUMNS else (Cut.WHOLE, rule.cut)
        shape = whole_shape(lora_a.shape, cut_a, self.share.size)
        for name in rule.hf:
            yield Piece(adapter_name(name, "lora_A"), lora_a, shape, share_slices(shape, cut_a, self.share), cut_a)
        yield from self._cut(rule, tuple(adapter_name(name, "lora_B") for name in rule.hf), lora_b, cut_b)

    def _cut(self, rule: Rule, names: tuple[str, ...], tensor: Tensor, cut: Cut) -> Iterator[Piece]:
        shapes = part_shapes(rule, whole_shape(tensor.shape, cut, self.share.size), self.dims)
        places = rule.places(tensor, self.local if cut is not Cut.WHOLE else self.dims)
        for name, place, shape in zip(names, places, shapes, strict=True):
            yield Piece(name, place, shape, share_slices(shape, cut, self.share, rule.padded_rows(self.dims)), cut)


def adapter_name(name: str, matrix: str) -> str:
    """PEFT's name of ``lora_A`` or ``lora_B`` of the linear layer whose weight Hugging Face calls ``name``."""
    return f"{PEFT_PREFIX}{name.removesuffix('.weight')}.{matrix}.weight"
