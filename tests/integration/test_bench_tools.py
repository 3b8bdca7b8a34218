"""The tools of tests/bench that take a training run apart, on a CPU: they run to their end, and write down what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from factories import make_rows, make_tiny_model

BENCH = Path(__file__).parents[1] / "bench"
FLAGS = "--max_length 128 --tuner_type lora --global_batch_size 4 --micro_batch_size 2 --torch_dtype float32 --lr 1e-3 --lr_warmup_fraction 0"


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """``sft`` and what it needs."""
    folder = tmp_path_factory.mktemp("bench")
    return ["sft", "--model", str(make_tiny_model("llama", folder / "model")), "--dataset", str(make_rows(folder, 32)), *FLAGS.split()]


def run_tool(name: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """What it prints."""
    done = subprocess.run(
        [sys.executable, str(BENCH / name), *arguments], env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def run_levers(flags: list[str], folder: Path, *options: str) -> tuple[str, Any]:
    """What gpu_levers.py prints, and what it writes down."""
    said = run_tool("gpu_levers.py", *options, "--record", str(folder / "record.json"), *flags, "--train_iters", "100", "--output_dir", str(folder / "out"))
    return said, json.loads((folder / "record.json").read_text())


def test_steps_without_a_lever_are_taken_beside_steps_with_it(flags: list[str], tmp_path: Path) -> None:
    said, record = run_levers(flags, tmp_path, "--rounds", "2", "--steps", "3", "--only", "SwiGLU,forward pass")
    assert set(record) == {"kernels of SwiGLU", "gradient of the loss in the forward pass"}
    for name, visits in record.items():
        assert f"without {name}: seconds " in said
        assert [len(visit) for visit in (*visits["having"], *visits["without"])] == [2, 2, 2, 2]
        assert all(step["seconds"] > 0 for visit in visits["without"] for step in visit)


def test_exports_without_a_lever_are_made_beside_exports_with_it(flags: list[str], tmp_path: Path) -> None:
    said, record = run_levers(flags, tmp_path, "--what", "export", "--rounds", "1", "--only", "threads")
    assert "without threads: seconds " in said
    assert [len(record["threads"][which]) for which in ("having", "without")] == [1, 1]


def test_what_a_step_calls_is_listed_with_what_takes_longest_first(flags: list[str], tmp_path: Path) -> None:
    said, record = run_levers(flags, tmp_path, "--what", "kernels", "--steps", "2")
    times = [each["milliseconds"] for each in record["kernels"]]
    assert times == sorted(times, reverse=True)
    assert any(each["kernel"] == "_SwiGLU" and each["launches"] > 1 for each in record["kernels"])
    assert f"{sum(times):.2f} ms of kernels" in said


def test_starts_without_a_lever_are_made_beside_starts_with_it(flags: list[str], tmp_path: Path) -> None:
    said = run_tool("gpu_start_levers.py", "--rounds", "1", "--only", "kernels", "--record", str(tmp_path / "record.json"), *flags)
    record = json.loads((tmp_path / "record.json").read_text())
    assert {name: len(seconds) for name, seconds in record.items()} == {"nothing": 1, "keeping compiled kernels": 1}
    assert "with everything: " in said


COMPILES = """
import sys
sys.path.append({bench!r})
import gpu_start_levers
from finetune_trainer import __main__ as program

def main(arguments):
    print("torch" in sys.modules)
    program.run()
    return 0

def run():
    import torch
    import finetune_trainer.train
    from megatron.core import jit
    print(jit.jit_fuser is torch.compile)

program.main, program.run = main, run
gpu_start_levers.run_rank({lever!r}, [])
"""


@pytest.mark.parametrize(("lever", "compiles"), [("nothing", "False"), ("leaving functions uncompiled", "True")])
def test_functions_are_compiled_in_a_rank_without_that_lever_alone(lever: str, compiles: str) -> None:
    done = subprocess.run([sys.executable, "-c", COMPILES.format(bench=str(BENCH), lever=lever)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", compiles], "rows are read by a process without torch, as ever"


@pytest.mark.parametrize(("tool", "known"), [("gpu_start_levers.py", "keeping compiled kernels"), ("gpu_levers.py", "kernels of SwiGLU")])
def test_a_lever_that_there_is_not_is_refused(tool: str, known: str) -> None:
    done = subprocess.run([sys.executable, str(BENCH / tool), "--only", "keping", "sft"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert known in done.stderr


def test_kernels_are_timed_at_every_shape(tmp_path: Path) -> None:
    arguments = ["--tokens", "40", "--scale", "64", "--record", str(tmp_path / "record.json")]
    said = run_tool("gpu_kernels.py", *arguments, environment={"TRITON_INTERPRET": "1"})
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record) == len(said.splitlines()) == 17
    assert min(timing["microseconds"] for timing in record) > 0
