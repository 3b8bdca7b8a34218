"""What saves the host time on a GPU gives what the longer ways give: kernels that are launched again, and attention without transformer-engine's choice of a backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import small_models
from finetune_trainer import model
from gang import Gang
from gpu_runs import forget_attention_backend
from small_models import Layout

LENGTHS = (70, 5, 130, 33)
Models = dict[tuple[str, str], Path]


def launch_again(columns: int) -> list[float]:
    """Differences of a kernel's output to torch's, for one number of rows after another: compiled, launched again, then with tensors that do not lie at a multiple of 16 bytes."""
    from finetune_trainer import kernels

    found, before = [], len(kernels._swiglu.compiled)
    for rows, place in ((7, 0), (7, 0), (300, 0), (7, 1), (300, 1)):
        memory = torch.randn(rows * 2 * columns + place, device="cuda", generator=torch.Generator("cuda").manual_seed(rows))
        gate_up = memory[place:].view(rows, 2 * columns)
        expected = torch.nn.functional.silu(gate_up[:, :columns]) * gate_up[:, columns:]
        found.append(float((kernels.swiglu(gate_up) - expected).abs().max()))
    return [*found, len(kernels._swiglu.compiled) - before]


@pytest.mark.one_gpu
def test_a_kernel_that_is_launched_again_computes_the_same(gpu1: Gang) -> None:
    ((*differences, compiled),) = gpu1.run(launch_again, 1000)
    assert max(differences) <= 2e-6
    assert compiled == 2, "once for each place in memory, whatever the number of rows"


def attend_twice(layout: Layout) -> tuple[list[list[torch.Tensor]], dict[bool, bool]]:
    """One layer's core attention in training and in evaluation: first by transformer-engine's module, then as the engine goes on. Output (and gradients, in training) of each pass; whether it goes straight, by mode."""
    forget_attention_backend()
    built = small_models.build(layout)
    layer, sizes = built.chunks[0].decoder.layers[0].self_attention, built.chunks[0].config
    heads, groups, width = sizes.num_attention_heads, sizes.num_query_groups, sizes.kv_channels
    ends = torch.tensor([0, *LENGTHS], device="cuda", dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = model.packed_sequences(ends, max(LENGTHS))
    dtype = next(built.chunks[0].parameters()).dtype
    passes = []
    for training in (True, True, False, False):
        generator = torch.Generator("cuda").manual_seed(1)
        inputs = [torch.randn(sum(LENGTHS), count, width, device="cuda", generator=generator).to(dtype).requires_grad_() for count in (heads, groups, groups)]
        attention = layer.core_attention.train(training)
        with torch.set_grad_enabled(training):
            output = attention(*inputs, None, attn_mask_type=layer.attn_mask_type, attention_bias=None, packed_seq_params=packed)
        if training:
            output.backward(torch.randn(output.shape, device="cuda", generator=generator).to(dtype))
        passes.append([tensor.detach().float().cpu() for tensor in (output, *(each.grad for each in inputs if training))])
    return passes, layer.core_attention.takes_cudnn


@pytest.mark.one_gpu
@pytest.mark.parametrize(
    ("dtype", "backend", "straight"), [("bfloat16", "auto", True), ("bfloat16", "flash", False), ("float32", "auto", False)], ids=["auto", "flash", "float32"]
)
def test_attention_that_goes_straight_to_cudnn_computes_the_same(dtype: str, backend: str, straight: bool, models: Models, gpu1: Gang) -> None:
    layout = Layout(models["qwen2", dtype], training={"attentionBackend": backend}, torch_dtype=dtype)
    (((first, second, third, fourth), went),) = gpu1.run(attend_twice, layout)
    assert went == {True: straight, False: straight}
    for by_module, again in zip((*first, *third), (*second, *fourth), strict=True):
        assert by_module.abs().max() > 0
        assert (by_module - again).abs().max() <= {"bfloat16": 2**-7, "float32": 1e-6}[dtype] * by_module.abs().max()
