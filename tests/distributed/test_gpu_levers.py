"""The switches of tests/bench/gpu_levers.py: each changes what its name says, and puts it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from factories import make_rows, make_tiny_model
from gang import Gang
from lever_switches import expect_switches, export_under_every_switch, train_under
from small_runs import Job, train

BY_FIRST = "every rank writing its share"


def make_job(folder: Path, **sections: Any) -> Job:
    return Job(make_tiny_model("llama", folder / "model"), make_rows(folder, 16), folder / "out", **sections)


def test_every_switch_changes_its_own_and_puts_it_back(gang1: Gang, tmp_path: Path) -> None:
    job = make_job(tmp_path, training={"trainIters": 1, "recomputeGranularity": "none"})
    assert len(gang1.run(train, job, expect_switches)[0].losses) == 1


@pytest.mark.parametrize("sizes", [{}, {"tensorModelParallelSize": 2}])
def test_a_gradient_made_in_the_backward_pass_learns_the_same(gang2: Gang, tmp_path: Path, sizes: dict[str, Any]) -> None:
    job = make_job(tmp_path, parallelism=sizes, training={"trainIters": 3})
    losses, without = gang2.run(train_under, "nothing", job)[0], gang2.run(train_under, "gradient of the loss in the forward pass", job)[0]
    assert losses[0] > losses[-1]
    assert without == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"tensorModelParallelSize": 2}])
def test_every_way_to_export_writes_the_same_files(gang2: Gang, tmp_path: Path, sizes: dict[str, Any]) -> None:
    first, second = gang2.run(export_under_every_switch, make_job(tmp_path, parallelism=sizes, training={"trainIters": 1}), tmp_path / "exports")
    files = {name: {path.name: path.read_bytes() for path in (tmp_path / "exports" / name).iterdir()} for name in first}
    assert len(files["nothing"]) > 3
    assert all(content == files["nothing"] for content in files.values())
    assert {name for name in second if second[name] == 0} == {BY_FIRST}
    assert first[BY_FIRST] == first["nothing"] + second["nothing"]
