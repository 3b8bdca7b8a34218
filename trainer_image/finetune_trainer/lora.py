"""Low-rank adapters around Megatron's parallel linear layers, and where they attach.

Query, key and value are one linear layer here and share one A, as gate and up do; each part has its own rows of B.

Sharding follows the layer. Column-parallel: A [rank, in] is on every tensor-parallel rank, B [out / tp, rank] is cut by
rows. Row-parallel: A [rank, in / tp] is cut by columns, B [out, rank] is on every rank. Communication happens on the
tensor of width rank between the two, so it costs next to nothing. A factor that every rank holds gets a whole gradient
by itself; with sequence parallelism each rank sees a part of the sequence, and ``weight.sequence_parallel`` tells
Megatron's ``finalize_model_grads`` to sum.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from finetune_trainer import megatron_cpu
from finetune_trainer.contract import TuningConfig
from finetune_trainer.low_rank import Lower, Raise, share_kept
from finetune_trainer.model import canonical_name, unwrap

megatron_cpu.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402  (after the redirection)
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory  # noqa: E402
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint  # noqa: E402

ALL_LINEAR = "all-linear"
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


class Factor(torch.nn.Module):
    """One of the two matrices of an adapter: ``weight`` [out, in], this rank's share.

    Its product is a call of the module, not a use of its weight: overlapParamGather gathers the weight in the hook of the call.
    """

    weight: torch.nn.Parameter

    def __init__(self, weight: torch.Tensor, cut: int | None, summed: bool) -> None:
        """``cut`` is the dimension cut over tensor-parallel ranks; ``summed`` says that each rank finds only a part of the gradient."""
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        if cut is not None:
            tensor_parallel.set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=cut, stride=1)
        self.weight.sequence_parallel = summed  # type: ignore[attr-defined]
        self.sums: torch.Tensor | None = None

    def add_in_place(self) -> None:
        """Have the backward pass add the weight's gradient to Megatron's ``main_grad`` [out, in], float32, as it is made, and autograd get none."""
        self.sums = self.weight.main_grad  # type: ignore[attr-defined]


class FactorA(Factor):
    """Into the low rank."""

    def forward(self, hidden: torch.Tensor, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden [..., in] as it is, with which to go on, and ``A(dropped(hidden))`` [..., rank]; what is kept of hidden is not scaled up."""
        outputs: tuple[torch.Tensor, torch.Tensor] = Lower.apply(hidden, self.weight, dropout, self.sums)  # type: ignore[no-untyped-call]
        return outputs


class FactorB(Factor):
    """Out of it."""

    def forward(self, low: torch.Tensor, output: torch.Tensor, scale: float) -> torch.Tensor:
        """The base's output [..., out], which is overwritten, plus ``scale * B(low)``."""
        raised: torch.Tensor = Raise.apply(output, low, self.weight, scale, self.sums)  # type: ignore[no-untyped-call]
        return raised


class LoraLinear(torch.nn.Module):
    """``base(x) + scale * B(A(dropout(x)))`` around a column- or row-parallel linear layer.

    Parameters: ``lora_A.weight`` [rank, in] ([rank, in / tp] of a row-parallel layer) and ``lora_B.weight`` [out / tp, rank] ([out, rank] of a row-parallel layer).
    """

    def __init__(self, base: torch.nn.Module, tuning: TuningConfig, seed: int, name: str, gated: bool) -> None:
        """Wrap ``base``; ``name`` is its canonical name, ``gated`` says that its output is gate and up projection. Needs resolved LoRA options."""
        super().__init__()
        assert tuning.lora_rank is not None, "resolve fills the LoRA options"
        assert tuning.lora_alpha is not None, "resolve fills the LoRA options"
        assert tuning.lora_dropout is not None, "resolve fills the LoRA options"
        self.base = base
        self.gated = gated
        self.parallel_mode = _parallel_mode(base)
        self.scale = tuning.lora_alpha / (math.sqrt(tuning.lora_rank) if tuning.use_rslora else tuning.lora_rank)
        self.dropout = tuning.lora_dropout
        self.tp_size = parallel_state.get_tensor_model_parallel_world_size()
        linear: Any = base
        self.sequence_parallel = bool(linear.config.sequence_parallel) and self.tp_size > 1
        self.ask_for_normed(True)
        is_column = self.parallel_mode == "column"
        lora_a, lora_b = _initial_factors(linear.weight, tuning.lora_rank, self.parallel_mode, seed, name)
        self.lora_A = FactorA(lora_a, cut=None if is_column else 1, summed=is_column and self.sequence_parallel)
        self.lora_B = FactorB(lora_b, cut=0 if is_column else None, summed=not is_column and self.sequence_parallel)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden [sequence, batch, in] -> output [sequence, batch, out] and the bias that the caller adds, shares as the base's."""
        dropout = self.dropout if self.training else 0.0
        if self.begins_with_norm:
            (output, normed), bias = _split(self.base(hidden))
            _, low = self._lower(normed, dropout)
        else:
            hidden, low = self._lower(hidden, dropout)
            output, bias = self.base(hidden)
        return self.lora_B(self._communicate(low), output, self.scale / share_kept(dropout)), bias

    def ask_for_normed(self, wanted: bool) -> None:
        """Have the base return, beside its output, what its matrix product saw: transformer-engine's layer may begin with the norm, and A must see the same."""
        linear: Any = self.base
        if self.begins_with_norm:
            linear.return_layernorm_output = wanted
            linear.return_layernorm_output_gathered = False

    @property
    def begins_with_norm(self) -> bool:
        """Whether the base holds a norm of its own input."""
        return hasattr(self.base, "return_layernorm_output")

    def _lower(self, hidden: torch.Tensor, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``A(dropped(hidden))`` [sequence, batch, rank] behind hidden itself.

        Dropout is alike on ranks that hold the same input, and differs between ranks that hold parts of it: with sequence parallelism the whole forward pass already draws from the random state of this rank.
        """
        if dropout > 0 and self.parallel_mode == "row" and self.tp_size > 1 and not self.sequence_parallel:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return self.lora_A(hidden, dropout)  # type: ignore[no-any-return]
        return self.lora_A(hidden, dropout)  # type: ignore[no-any-return]

    def _communicate(self, low: torch.Tensor) -> torch.Tensor:
        if self.tp_size == 1:
            return low
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                return _tensor(tensor_parallel.gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True))
            return _tensor(tensor_parallel.copy_to_tensor_model_parallel_region(low))
        if self.sequence_parallel:
            return _tensor(tensor_parallel.reduce_scatter_to_sequence_parallel_region(low))
        return _tensor(tensor_parallel.reduce_from_tensor_model_parallel_region(low))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """The base under the names of a model without adapters, and both factors, so that all can be loaded on another layout."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        base: Any = self.base
        sharded: dict[str, Any] = base.sharded_state_dict(f"{prefix}base.", sharded_offsets, metadata)
        replace_prefix_for_sharding(sharded, f"{prefix}base.", prefix)
        axis = {"lora_B.weight": 0} if self.parallel_mode == "column" else {"lora_A.weight": 1}
        factors = {name: parameter for name, parameter in self.named_parameters() if name.startswith("lora_")}
        groups = {"tp_group": parallel_state.get_tensor_model_parallel_group(), "dp_cp_group": metadata["dp_cp_group"]}
        sharded |= make_sharded_tensors_for_checkpoint(factors, prefix, axis, sharded_offsets, **groups)
        if self.gated:
            # Megatron's MLP knows the names of a layer without adapter only.
            for name in ("base.weight", "base.bias", "lora_B.weight"):
                if (key := prefix + name) in sharded:
                    sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets, metadata.get("singleton_local_shards", False))
        return sharded


def _tensor(value: Any) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value


def _split(result: tuple[Any, ...]) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
    """Output and normed input, and the bias to add, of a layer of transformer-engine's, which has two ways to put them."""
    if len(result) == 3:
        output, bias, normed = result
        return (output, normed), bias
    return result


def _parallel_mode(base: torch.nn.Module) -> Literal["column", "row"]:
    """Megatron-core's classes say it by their type, transformer-engine's by an attribute."""
    if isinstance(base, ColumnParallelLinear):
        return "column"
    if isinstance(base, RowParallelLinear):
        return "row"
    mode = getattr(base, "parallel_mode", None)
    assert mode in ("column", "row"), f"{type(base).__name__} is not a tensor-parallel linear layer"
    return "column" if mode == "column" else "row"


def _initial_factors(weight: torch.Tensor, rank: int, mode: str, seed: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A as PEFT draws it (Kaiming, uniform), this rank's part of the same whole matrix on every layout; B zero. In the weight's type and place."""
    tp_size = parallel_state.get_tensor_model_parallel_world_size() if mode == "row" else 1
    tp_rank = parallel_state.get_tensor_model_parallel_rank() if mode == "row" else 0
    columns = weight.shape[1]
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1 / math.sqrt(columns * tp_size)
    whole = torch.empty(rank, columns * tp_size).uniform_(-bound, bound, generator=generator)
    lora_a = whole[:, tp_rank * columns : (tp_rank + 1) * columns].contiguous()
    return lora_a.to(weight.device, weight.dtype), torch.zeros(weight.shape[0], rank, device=weight.device, dtype=weight.dtype)


def attach(chunks: Sequence[torch.nn.Module], tuning: TuningConfig, seed: int) -> None:
    """Freeze the base and wrap the targeted linear layers; with tunerType full nothing happens."""
    if tuning.tuner_type != "lora":
        return
    names = tuning.target_modules or [ALL_LINEAR]
    assert set(names) <= {ALL_LINEAR, *TARGETS}, f"resolve has let {names} through"
    targets = TARGETS if ALL_LINEAR in names else names
    for chunk in chunks:
        model = unwrap(chunk)
        model.requires_grad_(False)
        for name, module in list(model.decoder.layers.named_modules(prefix="decoder.layers")):
            parent, _, child = name.rpartition(".")
            if child in targets:
                adapter = LoraLinear(module, tuning, seed, canonical_name(model, name), gated=child == "linear_fc1")
                setattr(model.get_submodule(parent), child, adapter)
        if model.pre_process and model.config.recompute_granularity is not None:
            model.embedding.register_forward_hook(_start_gradient)


def _start_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Recompute runs a function backwards only if one of its *inputs* needs a gradient; behind a frozen embedding none does, and every adapter's gradient would be zero."""
    return output.requires_grad_(True)


def adapters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, LoraLinear]]:
    """Canonical global name of the linear layer (``decoder.layers.7.mlp.linear_fc1``) and its adapter, in the order of the layers."""
    for chunk in chunks:
        model = unwrap(chunk)
        for name, module in model.named_modules():
            if isinstance(module, LoraLinear):
                yield canonical_name(model, name), module


def add_gradients_in_place(chunks: Sequence[torch.nn.Module]) -> None:
    """Have the adapters add their gradients to ``main_grad`` themselves: not rounded to the weight's type before, and without a tensor and an addition of their own for each weight.

    The chunks are in Megatron's DistributedDataParallel. Not for overlapGradReduce: there Megatron's hook insists on a gradient from autograd.
    """
    for _, layer in adapters(chunks):
        layer.lora_A.add_in_place()
        layer.lora_B.add_in_place()


def merged_weight(layer: LoraLinear) -> torch.Tensor:
    """This rank's share of ``W + scale * B A``, computed in float32, in the type of W."""
    weight = _tensor(layer.base.weight)
    with torch.no_grad():
        change = layer.lora_B.weight.float() @ layer.lora_A.weight.float()
        return (weight.float() + layer.scale * change).to(weight.dtype)
