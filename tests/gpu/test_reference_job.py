"""The reference job, end to end, on two GPUs."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from factories import make_rows
from finetune_trainer.contract import RunReport
from gpu_runs import run_command

HERE = Path(__file__).parent
Note = Callable[..., None]


@pytest.mark.gpu2
def test_the_reference_job_imports_trains_saves_exports_and_verifies(reference_model: Path, tmp_path: Path, note: Note) -> None:
    command = tmp_path / "bin" / "megatron"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m finetune_trainer.cli "$@"\n')
    command.chmod(0o755)
    variables = {"MODEL": str(reference_model), "DATA_A": str(make_rows(tmp_path, 600)), "OUT": str(tmp_path / "out")}
    began = time.monotonic()
    run_command(["sh", str(HERE / "reference_job.sh")], 400, PATH=f"{command.parent}:{os.environ['PATH']}", **variables)
    seconds = time.monotonic() - began
    (path,) = (tmp_path / "out").glob("**/report.json")
    report = RunReport.model_validate_json(path.read_bytes())
    steps = [point.seconds for point in report.curve[4:]]
    note(
        seconds=seconds,
        steps=len(report.curve),
        seconds_per_step=statistics.median(steps),
        first_step_seconds=report.curve[0].seconds,
        tokens_per_step=statistics.mean(point.tokens for point in report.curve),
        peak_memory_gib=report.peak_memory_gib,
        losses=[point.loss for point in report.curve],
        verification=None if report.verification is None else report.verification.model_dump(),
        notes=report.notes,
    )
    assert report.succeeded
    assert report.verification is not None
    assert report.verification.passed
    assert len(report.curve) == 1500 // 16
    assert report.curve[-1].loss < report.curve[0].loss - 0.1, "it learns"
    (artifact,) = report.artifacts
    with safe_open(Path(artifact.path) / "adapter_model.safetensors", "pt") as adapter:
        assert len(list(adapter.keys())) == 2 * 7 * 28
