"""The kernels compute what torch does (in Triton's interpreter, which needs no GPU), and compile for one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

INTERPRETED = """
import json, torch
from finetune_trainer import kernels

torch.manual_seed(0)
DTYPE = getattr(torch, "{dtype}")
FIRST, COLUMNS, ROWS = 3000, 4900, 7
logits = torch.randn(ROWS, 5000).mul_(4).to(DTYPE)
labels = torch.tensor([3000, 7899, 7900, 2999, 0, 5000, 6000])
exact = logits[:, :COLUMNS].double()
sums, targets = kernels.softmax_statistics(logits, labels, FIRST, COLUMNS)
here = (labels >= FIRST) & (labels < FIRST + COLUMNS)
expected_targets = torch.where(here, exact[torch.arange(ROWS), (labels - FIRST).clamp(0, COLUMNS - 1)], 0.0)
gradient = exact.softmax(dim=1)
gradient[here, labels[here] - FIRST] -= 1.0
kernels.write_softmax_gradient(logits, labels, sums, FIRST, COLUMNS, torch.full((1,), 2.0))

gate_up = torch.randn(3, 2 * 2500).to(DTYPE)
above = torch.randn(3, 2500).to(DTYPE)
exact_input = gate_up.double().requires_grad_()
exact_output = torch.nn.functional.silu(exact_input[:, :2500]) * exact_input[:, 2500:]
exact_output.backward(above.double())
empty = kernels.swiglu(gate_up[:0]).shape[0] + kernels.swiglu_gradient(gate_up[:0], above[:0]).shape[0] + kernels.softmax_statistics(logits[:0], labels[:0], 0, 9)[0].shape[0]


def difference(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


print(json.dumps({
    "sums": difference(sums, exact.logsumexp(dim=1)),
    "targets": difference(targets, expected_targets),
    "gradient": difference(logits[:, :COLUMNS], 2 * gradient),
    "padding": float(logits[:, COLUMNS:].abs().max()),
    "swiglu": difference(kernels.swiglu(gate_up), exact_output.detach()),
    "swiglu_gradient": difference(kernels.swiglu_gradient(gate_up, above), exact_input.grad),
    "empty": empty,
}))
"""

INTERPRETED_DROPOUT = """
import json, torch
from unittest import mock
from finetune_trainer import low_rank
from finetune_trainer import low_rank_kernels as kernels

torch.manual_seed(0)
DTYPE = getattr(torch, "{dtype}")
TOKENS, COLUMNS, RANK, DROPOUT, SCALE = {tokens}, 300, {rank}, 0.3, 2.0
hidden, factor, of_low, target = (torch.randn(*shape).to(DTYPE) for shape in ((TOKENS, COLUMNS), (RANK, COLUMNS), (TOKENS, RANK), (TOKENS, COLUMNS)))
threshold = low_rank.threshold(DROPOUT)
low, packed = kernels.lower(hidden, factor, threshold)
_, others = kernels.lower(hidden, factor, threshold)
kept = ((packed[:, :, None].int() >> torch.arange(8)) & 1).flatten(1)[:, :COLUMNS]
dropped, change = hidden.double() * kept, (of_low.double() @ factor.double()) * kept
added, written = target.clone(), target.clone()
raised = target.clone()
kernels.add_product(added, of_low, factor, packed)
kernels.add_product(written, of_low, factor, packed, onto=False)
kernels.add_product(raised, of_low, factor.t().contiguous().t(), scale=SCALE)
total = torch.randn(RANK, COLUMNS)
before = total.double()
kernels.add_factor_gradient(total, hidden, packed, of_low)
factor_b = torch.randn(COLUMNS, RANK).to(DTYPE)
wide = torch.randn(COLUMNS, RANK)
wide_before = wide.double()
of_wide = kernels.find_gradients(target, of_low, factor_b, SCALE, wide)
empty = kernels.lower(hidden[:0], factor, threshold)[0].shape[0]


def difference(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


low_rank._has_kernels = lambda *_: True
changed = low_rank.Raise.apply(target.clone().requires_grad_().exp(), of_low, torch.randn(COLUMNS, RANK).to(DTYPE), SCALE, None)
try:
    changed.sum().backward()
    found_out = False
except RuntimeError as error:
    found_out = "modified by an inplace operation" in str(error)

low_rank.WIDE_RANK, low_rank.WIDE_ITEMSIZE = RANK, DTYPE.itemsize
inputs, reads_once = [], []
for low_rank.WIDE_BYTES, sums in ((target.nbytes, None), (target.nbytes, torch.zeros(COLUMNS, RANK)), (target.nbytes + 1, None)):
    inputs.append((of_low.clone().requires_grad_(), factor_b.clone().requires_grad_(), sums))
    with mock.patch.object(kernels, "find_gradients", wraps=kernels.find_gradients) as reading:
        low_rank.Raise.apply(torch.zeros(TOKENS, COLUMNS, dtype=DTYPE), *inputs[-1][:2], SCALE, sums).backward(target)
    reads_once.append(reading.called)

print(json.dumps({
    "a layer that keeps its own output is found out": found_out,
    "reads once": reads_once,
    "errors": {
        "low": difference(low, dropped @ factor.double().t()),
        "factor": difference(total, before + of_low.double().t() @ dropped),
        "added": difference(added, target.double() + change),
        "written": difference(written, change),
        "raised": difference(raised, target.double() + SCALE * of_low.double() @ factor.double()),
        "low, read once": difference(of_wide, SCALE * target.double() @ factor_b.double()),
        **{f"low, by autograd {n}": difference(of.grad, SCALE * target.double() @ factor_b.double()) for n, (of, _, _) in enumerate(inputs)},
        **{
            f"B, by autograd {n}": difference(of.grad if sums is None else sums, SCALE * target.double().t() @ of_low.double())
            for n, (_, of, sums) in enumerate(inputs)
        },
        "B, read once": difference(wide, wide_before + SCALE * target.double().t() @ of_low.double()),
    },
    "share kept": kept.double().mean().item(),
    "spread of columns": kept.double().mean(dim=0).std().item(),
    "spread of rows": kept.double().mean(dim=1).std().item(),
    "neighbours alike": (kept[:, 1:] == kept[:, :-1]).double().mean().item(),
    "again alike": (packed == others).double().mean().item(),
    "threshold": threshold,
    "empty": empty,
}))
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from finetune_trainer import low_rank_kernels, kernels

POINTERS = dict.fromkeys(("logits", "gate_up", "output", "gradient"), "*bf16") | dict.fromkeys(("sums", "targets", "factor"), "*fp32") | {"labels": "*i64"}
POINTERS |= dict.fromkeys(("hidden", "factor", "low", "target", "of_low", "left", "right"), "*bf16") | {"kept": "*u8", "seed": "i64", "scale": "fp32"}
SIZES = {"GROUP": low_rank_kernels.GROUP, "RANK": 16}
for kernel, constants in (
    (kernels._softmax_statistics, {"BLOCK": 4096}),
    (kernels._softmax_gradient, {"BLOCK": 4096, "SCALED": True}),
    (kernels._swiglu, {"BLOCK": 2048}),
    (kernels._swiglu_gradient, {"BLOCK": 2048}),
    (low_rank_kernels._lower, SIZES | {"ROWS": low_rank_kernels.ROWS, "ROUNDS": low_rank_kernels.ROUNDS}),
    (low_rank_kernels._find_factor_gradient, SIZES | {"ROWS": low_rank_kernels.GRADIENT_ROWS}),
    (low_rank_kernels._find_gradients, {"ROWS": low_rank_kernels.WIDE_ROWS, "COLUMNS": low_rank_kernels.WIDE_COLUMNS, "RANK": 16}),
    (low_rank_kernels._add_parts, {"BLOCK": low_rank_kernels.SUMS_BLOCK}),
    *((low_rank_kernels._add_product, SIZES | {"ROWS": low_rank_kernels.PRODUCT_ROWS, "ONTO": onto, "DROPPED": dropped}) for onto in (True, False) for dropped in (True, False)),
):
    names = kernel.function.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    if kernel is kernels._softmax_gradient:
        signature["factor"] = "*fp32"
    if kernel is low_rank_kernels._add_parts:
        signature["target"] = "*fp32"
    if kernel is low_rank_kernels._find_gradients:
        signature |= {"factor": "*bf16", "of_low": "*fp32"}
    source = ASTSource(kernel.function, signature, {(names.index(name),): value for name, value in constants.items()})
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernel.warps}).asm["ptx"]))
"""


def interpret(program: str, **values: object) -> dict[str, Any]:
    """What a program prints under Triton's interpreter; in a process of its own, because Triton decides when it is imported."""
    for name, value in values.items():
        program = program.replace(f"{{{name}}}", str(value))
    done = subprocess.run([sys.executable, "-c", program], env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_kernels_compute_what_torch_does(dtype: str, tolerance: float) -> None:
    """One rounding to the type of the tensors is all that they may be off."""
    found = interpret(INTERPRETED, dtype=dtype)
    assert found.pop("empty") == 0
    assert found.pop("padding") == 0.0
    assert {name: error for name, error in found.items() if error > tolerance} == {}


@pytest.mark.parametrize(("dtype", "tolerance", "tokens", "rank"), [("float32", 2e-6, 130, 8), ("float32", 2e-6, 50, 20), ("float16", 2**-10, 130, 8)])
def test_kernels_with_dropout_compute_what_torch_does(dtype: str, tolerance: float, tokens: int, rank: int) -> None:
    """bfloat16: tests/gpu, since the interpreter's products of it are wrong."""
    found = interpret(INTERPRETED_DROPOUT, dtype=dtype, tokens=tokens, rank=rank)
    assert {name: error for name, error in found["errors"].items() if error > tolerance} == {}
    assert found["empty"] == 0
    assert found["a layer that keeps its own output is found out"]
    assert found["reads once"] == [True, True, False]
    assert found["threshold"] == pytest.approx(0.3 * 2**16, abs=0.5)
    deviation = (0.3 * 0.7) ** 0.5
    assert found["share kept"] == pytest.approx(0.7, abs=5 * deviation / (300 * tokens) ** 0.5)
    assert found["spread of columns"] == pytest.approx(deviation / tokens**0.5, rel=0.25)
    assert found["spread of rows"] == pytest.approx(deviation / 300**0.5, rel=0.35)
    assert found["neighbours alike"] == pytest.approx(0.7**2 + 0.3**2, abs=0.03)
    assert found["again alike"] < 0.1


def test_kernels_compile_for_a_hopper_gpu(tmp_path: object) -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], env={"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [int(line) for line in done.stdout.split()]
    assert len(sizes) == 12
    assert min(sizes) > 1000


ARGUMENTS = [
    0,
    1,
    2,
    15,
    16,
    17,
    2**31 - 1,
    2**31,
    -(2**31),
    -(2**31) - 1,
    2**40,
    0.0,
    1.0,
    2.5,
    *(torch.zeros(9)[place:] for place in (0, 1, 4, 8)),
    torch.zeros(9, dtype=torch.uint8),
]


@pytest.mark.parametrize("is_free", [False, True])
def test_arguments_that_are_described_alike_are_alike_for_triton(is_free: bool) -> None:
    """So that what was compiled for one is right for the other."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    from finetune_trainer.kernel_launch import _describe

    found: dict[Any, set[Any]] = {}
    for argument in ARGUMENTS:
        found.setdefault((type(argument), _describe(argument, is_free)), set()).add(native_specialize_impl(CUDABackend, argument, False, not is_free, True))
    assert {description: kinds for description, kinds in found.items() if len(kinds) > 1} == {}
    assert len(found) > 5
