"""Switches for what makes a step fast: while one lasts, the engine of this process does without that lever. Each takes the trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock


def micro_batch_size(training: Any) -> int:
    return int(training.micro_batch_size)


def has_none(*_: Any) -> bool:
    """Takes the place of a ``_has_kernels``; a MagicMock would keep every tensor that it was called with."""
    return False


def without_kernels_of_adapters(trainer: Any) -> Any:
    """Products, and dropout with a mask of whole numbers, by torch."""
    return mock.patch("finetune_trainer.low_rank._has_kernels", has_none)


def without_adding_in_place(trainer: Any) -> Any:
    """B's product by the same kernel, onto a copy of the base's output."""
    from finetune_trainer import low_rank

    def forward(ctx: Any, output: Any, low: Any, factor: Any, scale: float, sums: Any) -> Any:
        ctx.scale, ctx.sums = scale, sums
        ctx.save_for_backward(low, factor)
        copy = output.clone()
        low_rank._add_product(copy.view(-1, copy.shape[-1]), low.flatten(0, -2), factor.t(), None, scale, onto=True)
        return copy

    return mock.patch.object(low_rank.Raise, "forward", staticmethod(forward))


@contextlib.contextmanager
def without_adding_gradients_in_place(trainer: Any) -> Iterator[None]:
    """Gradients of adapters by way of autograd, and of Megatron's hook for each."""
    from finetune_trainer import lora

    factors = [factor for _, layer in lora.adapters(trainer.chunks) for factor in (layer.lora_A, layer.lora_B)]
    before = [factor.sums for factor in factors]
    for factor in factors:
        factor.sums = None
    try:
        yield
    finally:
        for factor, sums in zip(factors, before, strict=True):
            factor.sums = sums


def without_reading_once(trainer: Any) -> Any:
    """The gradients of a wide layer's B and of what it raises by two products of cuBLAS, each of which reads the gradient."""
    return mock.patch("finetune_trainer.low_rank._is_wide", has_none)


def without_dealing(trainer: Any) -> Any:
    def deal(sizes: Any, groups: int) -> list[list[int]]:
        room = len(sizes) // groups
        return [list(range(group * room, (group + 1) * room)) for group in range(groups)]

    return mock.patch("finetune_trainer.data.order.deal", deal)


@contextlib.contextmanager
def without_leaving_tokens_out(trainer: Any) -> Iterator[None]:
    """Output layer and loss on every token."""
    import torch

    from finetune_trainer import train

    collate = train.collate

    def every(*arguments: Any) -> Any:
        batch = collate(*arguments)
        tokens = batch.tokens[0]
        return replace(batch, labelled=torch.arange(len(tokens) - 1, device=tokens.device), labels=tokens[1:].contiguous())

    with mock.patch.object(train, "collate", every):
        yield


def without_kernels_of_swiglu(trainer: Any) -> Any:
    """The same in torch's functions, as on a CPU."""
    return mock.patch("finetune_trainer.swiglu._has_kernels", has_none)


def without_kernels_of_loss(trainer: Any) -> Any:
    """The same in torch's functions, as on a CPU; the gradient still is made in the forward pass."""
    return mock.patch("finetune_trainer.loss._has_kernels", has_none)


def without_gradient_in_forward(trainer: Any) -> Any:
    """The loss and its gradient by autograd, from whole logits and Megatron-core's cross entropy in float32, on labelled rows still."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from finetune_trainer import loss

    def apply(hidden: Any, weight: Any, given: Any, shard: Any, scale: Any) -> Any:
        return vocab_parallel_cross_entropy(hidden.index_select(0, given.positions) @ weight.t(), given.labels)

    return mock.patch.object(loss, "_LabelledLoss", SimpleNamespace(apply=apply))


@contextlib.contextmanager
def without_keeping_activations(trainer: Any) -> Iterator[None]:
    """Every layer recomputed."""
    from finetune_trainer import lora

    embeddings = [lora.unwrap(chunk).embedding for chunk in trainer.chunks if lora.unwrap(chunk).pre_process]
    hooks = [embedding.register_forward_hook(lora._start_gradient) for embedding in embeddings]
    settings = [chunk.config for chunk in trainer.chunks]
    names = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    before = [[getattr(each, name) for name in names] for each in settings]
    for each in settings:
        each.recompute_granularity, each.recompute_method, each.recompute_num_layers = "full", "uniform", 1
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for each, values in zip(settings, before, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(each, name, value)


def without_large_micro_batches(trainer: Any) -> Any:
    """Micro batches of half the size, twice as many."""
    return mock.patch(f"{__name__}.micro_batch_size", lambda training: training.micro_batch_size // 2)


@contextlib.contextmanager
def without_launching_as_compiled(trainer: Any) -> Iterator[None]:
    """Kernels by Triton's own way: it looks at every argument of every launch."""
    from finetune_trainer.kernel_launch import Kernel

    def launch(self: Any, grid: Any, *arguments: Any) -> None:
        self.function[grid](*arguments, num_warps=self.warps)

    with mock.patch.object(Kernel, "launch", launch):
        yield


@contextlib.contextmanager
def without_going_straight_to_cudnn(trainer: Any) -> Iterator[None]:
    """Attention by transformer-engine's module, with its choice of a backend, and its own random states, at every call."""
    from finetune_trainer.packed_attention import PackedAttention

    modules = [module for chunk in trainer.chunks for module in chunk.modules() if isinstance(module, PackedAttention)]
    before = [(module.can_go_straight, module.fused_attention.attention_dropout_ctx) for module in modules]
    for module in modules:
        module.can_go_straight = False
        if module.rng_states_tracker is not None:  # as with sequence parallelism
            module.fused_attention.attention_dropout_ctx = module.rng_states_tracker.fork
    try:
        yield
    finally:
        for module, (can_go_straight, context) in zip(modules, before, strict=True):
            module.can_go_straight, module.fused_attention.attention_dropout_ctx = can_go_straight, context


LEVERS: dict[str, Callable[[Any], Any]] = {
    "nothing": contextlib.nullcontext,  # for the noise of the others
    "kernels of adapters": without_kernels_of_adapters,
    "adding B's product in place": without_adding_in_place,
    "adding gradients in place": without_adding_gradients_in_place,
    "reading wide gradients once": without_reading_once,
    "launching kernels as compiled": without_launching_as_compiled,
    "going straight to cuDNN": without_going_straight_to_cudnn,
    "dealing rows by length": without_dealing,
    "leaving unlabelled tokens out": without_leaving_tokens_out,
    "kernels of SwiGLU": without_kernels_of_swiglu,
    "kernels of the loss": without_kernels_of_loss,
    "gradient of the loss in the forward pass": without_gradient_in_forward,
    "keeping activations": without_keeping_activations,
    "large micro batches": without_large_micro_batches,
}
