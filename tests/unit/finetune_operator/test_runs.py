"""Which folder of results a run gets."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from finetune_operator import runs
from finetune_operator.plan import Place
from finetune_operator.settings import Settings
from finetune_trainer.contract import ConfigurationError, RunConfig, RunReport
from jobs import make_job


def place(work: Path) -> Place:
    return Place("local", str(work), str(work), "{output_dir}/run.json", "127.0.0.1", 0, 40000, "127.0.0.1")


def claim(work: Path, policy: str = "auto", **sections: Any) -> Any:
    return runs.claim(make_job(**sections), Settings(), place(work), policy)


def start_run(work: Path, *, checkpoint: bool = True, succeeded: bool | None = None, **sections: Any) -> runs.Run:
    """A run as an earlier call has left it."""
    with claim(work, "never", **sections) as run:
        runs.write_run_file(run)
    if checkpoint:
        (run.folder / "checkpoints" / "step-1").mkdir(parents=True)
        (run.folder / "checkpoints" / "step-1" / "manifest.json").write_text("{}")
    if succeeded is not None:
        (run.folder / "report.json").write_text(make_report(run.plan.config, succeeded).model_dump_json())
    return run


def make_report(config: RunConfig, succeeded: bool) -> RunReport:
    now = datetime.now(UTC)
    run = config.run
    return RunReport(
        name=run.name,
        namespace=run.namespace,
        uid=run.uid,
        attempt=run.attempt,
        identity=config.identity(),
        succeeded=succeeded,
        start_time=now,
        completion_time=now,
    )


def test_each_run_is_new_with_never(tmp_path: Path) -> None:
    first, second = start_run(tmp_path), start_run(tmp_path)
    assert first.folder != second.folder
    assert first.folder == tmp_path / "default" / "tiny" / first.plan.config.run.uid[:8]


def test_auto_continues_the_newest_run_in_its_folder_as_the_next_attempt(tmp_path: Path) -> None:
    older, newer = start_run(tmp_path), start_run(tmp_path, succeeded=False)
    os.utime(older.folder / "run.json", (1, 1))
    with claim(tmp_path) as run:
        assert (run.folder, run.continued, run.plan.config.run.attempt) == (newer.folder, True, 2)
        assert run.plan.config.run.uid == newer.plan.config.run.uid
        assert run.plan.config.identity() == newer.plan.config.identity()
        assert run.plan.config.checkpoints.resume == "auto"


@pytest.mark.parametrize(
    ("left", "asked"),
    [
        ({"training": {"lr": 1e-3}}, {}),
        ({"checkpoint": False}, {}),
        ({"succeeded": True}, {}),
    ],
    ids=["another learning rate", "no checkpoint", "succeeded"],
)
def test_auto_starts_anew_where_there_is_nothing_to_continue(tmp_path: Path, left: dict[str, Any], asked: dict[str, Any]) -> None:
    earlier = start_run(tmp_path, **left)
    with claim(tmp_path, **asked) as run:
        assert not run.continued
        assert run.folder != earlier.folder


def test_a_newest_run_that_has_succeeded_is_not_passed_over_for_an_older_one(tmp_path: Path) -> None:
    older, newer = start_run(tmp_path), start_run(tmp_path, succeeded=True)
    os.utime(older.folder / "run.json", (1, 1))
    with claim(tmp_path) as run:
        assert not run.continued
        assert run.folder not in (older.folder, newer.folder)


def test_a_newer_run_of_another_identity_is_passed_over(tmp_path: Path) -> None:
    older = start_run(tmp_path)
    os.utime(older.folder / "run.json", (1, 1))
    start_run(tmp_path, succeeded=True, training={"lr": 1e-3})
    with claim(tmp_path) as run:
        assert run.folder == older.folder


def test_only_a_finished_checkpoint_is_one(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    assert not runs.has_checkpoint(tmp_path)
    (checkpoints / "step-1").mkdir(parents=True)
    (checkpoints / "attempt.json").write_text("{}")
    assert not runs.has_checkpoint(tmp_path)
    (checkpoints / "step-1" / "manifest.json").write_text("{}")
    assert runs.has_checkpoint(tmp_path)


def test_another_layout_of_processes_is_the_same_run(tmp_path: Path) -> None:
    earlier = start_run(tmp_path)
    with claim(tmp_path, nodes={"processesPerNode": 2}, parallelism={"tensorModelParallelSize": 2}) as run:
        assert run.folder == earlier.folder


def test_a_run_that_is_still_going_on_is_not_continued(tmp_path: Path) -> None:
    start_run(tmp_path)
    with claim(tmp_path) as running, claim(tmp_path) as second:
        assert running.continued
        assert not second.continued


def test_a_damaged_run_file_is_passed_over(tmp_path: Path) -> None:
    earlier = start_run(tmp_path)
    (earlier.folder / "run.json").write_text("{}")
    with claim(tmp_path) as run:
        assert not run.continued


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot write results to .*: Not a directory; choose another folder with --work"), claim(tmp_path / "file"):
        pass


def test_address_of_an_earlier_attempt_is_removed(tmp_path: Path) -> None:
    earlier = start_run(tmp_path)
    (earlier.folder / "progress.json").write_text('{"address": "127.0.0.1:1"}')
    with claim(tmp_path) as run:
        runs.write_run_file(run)
    assert not (run.folder / "progress.json").exists()
    assert RunConfig.load(run.folder / "run.json") == run.plan.config


def test_report_of_an_earlier_attempt_is_not_this_ones(tmp_path: Path) -> None:
    earlier = start_run(tmp_path, succeeded=False)
    assert runs.read_report(earlier) is not None
    with claim(tmp_path) as run:
        assert runs.read_report(run) is None
