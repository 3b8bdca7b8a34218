"""The switches of tests/bench/gpu_levers.py: each changes what its name says, and puts it back."""

from __future__ import annotations

from pathlib import Path

from factories import make_rows, make_tiny_model
from gang import Gang
from lever_switches import expect_switches
from small_runs import Job, train


def test_every_switch_changes_its_own_and_puts_it_back(gang1: Gang, tmp_path: Path) -> None:
    job = Job(
        make_tiny_model("llama", tmp_path / "model"), make_rows(tmp_path, 8), tmp_path / "out", training={"trainIters": 1, "recomputeGranularity": "none"}
    )
    assert len(gang1.run(train, job, expect_switches)[0].losses) == 1
