"""The kernels compute what torch does (in Triton's interpreter, which needs no GPU), and compile for one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from finetune_trainer import kernels

POINTERS = dict.fromkeys(("logits", "gate_up", "output", "gradient"), "*bf16") | dict.fromkeys(("sums", "targets", "factor"), "*fp32") | {"labels": "*i64"}
for kernel, constants in (
    (kernels._softmax_statistics, {"BLOCK": 4096}),
    (kernels._softmax_gradient, {"BLOCK": 4096, "SCALED": True}),
    (kernels._swiglu, {"BLOCK": 2048}),
    (kernels._swiglu_gradient, {"BLOCK": 2048}),
):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS}).asm["ptx"]))
"""


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_kernels_compute_what_torch_does(dtype: str, tolerance: float) -> None:
    """One rounding to the type of the tensors is all that they may be off."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED.replace("{dtype}", dtype)],
        env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found.pop("empty") == 0
    assert found.pop("padding") == 0.0
    assert {name: error for name, error in found.items() if error > tolerance} == {}


def test_kernels_compile_for_a_hopper_gpu(tmp_path: object) -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], env={"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [int(line) for line in done.stdout.split()]
    assert len(sizes) == 4
    assert min(sizes) > 1000
