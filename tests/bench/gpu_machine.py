"""This machine and the most that its GPUs give: ``python gpu_machine.py`` prints JSON. The ceiling is torch's product of two bfloat16 matrices of 8192 x 8192, median, on every GPU."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from statistics import median
from typing import Any

import torch

SIZE, REPEATS, WARM_UP = 8192, 30, 10
PACKAGES = ("torch", "triton", "transformer-engine", "flash-attn", "megatron-core", "transformers", "peft", "safetensors", "ms-swift", "mcore-bridge")


def measure_product(device: int) -> float:
    """Floating-point operations a second, in 10^12."""
    torch.cuda.set_device(device)
    left, right = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(WARM_UP + REPEATS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        torch.nn.functional.linear(left, right)
        ended.record()
        ended.synchronize()
        seconds.append(began.elapsed_time(ended) / 1e3)
    return float(2 * SIZE**3 / median(seconds[WARM_UP:]) / 1e12)


def describe() -> dict[str, Any]:
    """Hardware, versions and ceilings."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    count = torch.cuda.device_count()
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    cores, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    hardware = f"{count}x {names[0]}" if names else "no GPU"
    return {
        "name": f"{hardware}, {cores} cores, {memory:.0f} GiB",
        "gpus": subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines() if shutil.which("nvidia-smi") and count else [],
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "gemm_tflops": [round(measure_product(index), 1) for index in range(count)],
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(describe()))
