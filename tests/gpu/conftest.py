"""Tests on real GPUs. What a test needs stands in its marker; a test whose hardware or peer is not there is left out, and the last lines say so.

``--record FILE`` writes what was run: the machine, the command, each test's outcome and seconds, and the figures that tests have noted.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from factories import make_rows, make_tiny_model, make_tokenizer
from gang import CPU_ONLY, Gang
from gpu_runs import run_command

HERE = Path(__file__).parent
NEEDED_GPUS = {"one_gpu": 1, "gpu2": 2, "gpu4": 4}
EXACT = {"NVIDIA_TF32_OVERRIDE": "0", "OMP_NUM_THREADS": "4", "NVTE_TORCH_COMPILE": "0"}
"""What the launcher gives to ranks: products of float32 in float32."""
ATTENTION = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 512}
"""Heads of a size that every attention kernel takes."""
PACKAGES = ("torch", "transformer-engine", "flash-attn", "megatron-core", "transformers", "peft", "ms-swift", "mcore-bridge")


@functools.cache
def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def has_peer() -> bool:
    """ms-swift, and the folder of its tokenizer and data."""
    return importlib.util.find_spec("swift") is not None and "GPU_STACK" in os.environ


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write the machine, outcomes and figures to this JSON file")


def missing(item: pytest.Item) -> str | None:
    """What the test needs and this machine lacks."""
    needed = max((count for marker, count in NEEDED_GPUS.items() if item.get_closest_marker(marker)), default=1)
    if needed > count_gpus():
        return f"{needed} GPUs"
    return "ms-swift and GPU_STACK" if item.get_closest_marker("peer") and not has_peer() else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lacking = {item: lack for item in items if HERE in item.path.parents and (lack := missing(item))}
    items[:] = [item for item in items if item not in lacking]
    if lacking:
        config.hook.pytest_deselected(items=list(lacking))
    config.stash[LACKING] = sorted(f"{item.nodeid} needs {lack}" for item, lack in lacking.items())


LACKING = pytest.StashKey[list[str]]()
FIGURES = pytest.StashKey[dict[str, dict[str, Any]]]()


class Record:
    """Written anew after every test, so that a session that is killed leaves what it has."""

    def __init__(self, path: Path, config: pytest.Config) -> None:
        self.path, self.config = path, config
        self.tests: dict[str, dict[str, Any]] = {}
        self.machine: dict[str, Any] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.tests[report.nodeid] = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
            if not report.passed:
                self.tests[report.nodeid]["message"] = report.longreprtext[-4000:]
        elif report.when == "teardown":
            self.write()

    def pytest_sessionfinish(self) -> None:
        self.write()

    def write(self) -> None:
        self.machine = self.machine or describe_machine()
        content = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "machine": self.machine,
            "tests": self.tests,
            "not_run": self.config.stash.get(LACKING, []),
            "figures": {name: figures for name, figures in self.config.stash[FIGURES].items() if figures},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = {}
    path = config.getoption("--record", default=None)
    if path is not None:
        config.pluginmanager.register(Record(path, config))


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keep figures of this test for the record."""
    figures = request.config.stash[FIGURES].setdefault(request.node.nodeid, {})
    return lambda **values: figures.update(values)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in config.stash.get(LACKING, []):
        terminalreporter.write_line(f"not run: {line}")


def describe_machine() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    installed = {name: version for name in PACKAGES if (version := version_of(name))}
    gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines() if shutil.which("nvidia-smi") else []
    return {"gpus": gpus, "cores": os.cpu_count(), "python": platform.python_version(), "packages": installed}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# Workers


def gang_of(size: int, environment: dict[str, str]) -> Iterator[Gang]:
    gang = Gang(size, environment=environment, grace_seconds=10.0)
    try:
        yield gang
    finally:
        gang.close()


def visible_gpus() -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(str(index) for index in range(count_gpus()))), **EXACT}


@pytest.fixture(scope="session")
def gpu1() -> Iterator[Gang]:
    yield from gang_of(1, visible_gpus())


@pytest.fixture(scope="session")
def gpu2() -> Iterator[Gang]:
    yield from gang_of(2, visible_gpus())


@pytest.fixture(scope="session")
def gpu4() -> Iterator[Gang]:
    yield from gang_of(4, visible_gpus())


@pytest.fixture(scope="session")
def cpu1() -> Iterator[Gang]:
    """A process that sees no GPU."""
    yield from gang_of(1, {**CPU_ONLY, **EXACT})


# Models and rows


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """By family and data type: small models whose heads every attention kernel takes."""
    folder = tmp_path_factory.mktemp("models")
    return {
        (family, dtype): make_tiny_model(family, folder / f"{family}-{dtype}", torch_dtype=dtype, **ATTENTION)
        for family in ("llama", "qwen2", "qwen3")
        for dtype in ("float32", "bfloat16")
    }


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows"), 40)


@pytest.fixture(scope="session")
def reference_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ms-swift's tokenizer where it is at hand: its chat template names that."""
    folder = tmp_path_factory.mktemp("reference")
    stack = os.environ.get("GPU_STACK")
    tokenizer = Path(stack) / "tok" if stack else make_tokenizer(folder / "tokenizer")
    run_command([sys.executable, str(HERE / "reference_model.py"), str(folder / "Qwen2.5-7B-Instruct"), str(tokenizer)], 200)
    return folder / "Qwen2.5-7B-Instruct"
