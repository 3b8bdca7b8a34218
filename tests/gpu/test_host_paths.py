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


def attend_twice(layout: Layout) -> tuple[list[list[torch.Tensor]], list[bool]]:
    """Output and gradients of one layer's core attention: by transformer-engine's module, then as the engine goes on; and whether it went straight from then on."""
    forget_attention_backend()
    built = small_models.build(layout)
    layer, sizes = built.chunks[0].decoder.layers[0].self_attention, built.chunks[0].config
    attention = layer.core_attention.train()
    heads, groups, width = sizes.num_attention_heads, sizes.num_query_groups, sizes.kv_channels
    ends = torch.tensor([0, *LENGTHS], device="cuda", dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = model.packed_sequences(ends, max(LENGTHS))
    dtype = next(built.chunks[0].parameters()).dtype
    passes = []
    for _ in range(2):
        generator = torch.Generator("cuda").manual_seed(1)
        inputs = [torch.randn(sum(LENGTHS), count, width, device="cuda", generator=generator).to(dtype).requires_grad_() for count in (heads, groups, groups)]
        output = attention(*inputs, None, attn_mask_type=layer.attn_mask_type, attention_bias=None, packed_seq_params=packed)
        output.backward(torch.randn(output.shape, device="cuda", generator=generator).to(dtype))
        passes.append([tensor.detach().float().cpu() for tensor in (output, *(each.grad for each in inputs))])
    return passes, list(attention.takes_cudnn.values())


@pytest.mark.one_gpu
@pytest.mark.parametrize(("dtype", "straight"), [("bfloat16", True), ("float32", False)])
def test_attention_that_goes_straight_to_cudnn_computes_the_same(dtype: str, straight: bool, models: Models, gpu1: Gang) -> None:
    (((first, second), went),) = gpu1.run(attend_twice, Layout(models["qwen2", dtype], torch_dtype=dtype))
    assert went == [straight]
    for by_module, again in zip(first, second, strict=True):
        assert by_module.abs().max() > 0
        assert (by_module - again).abs().max() <= {"bfloat16": 2**-7, "float32": 1e-6}[dtype] * by_module.abs().max()
