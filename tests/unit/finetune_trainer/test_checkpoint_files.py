"""Checkpoints on disk, without torch: which one a run goes on from, which ones it removes, what it refuses to open."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.checkpoint_files import (
    Manifest,
    check_index,
    choose_checkpoint,
    finish_replacements,
    make_empty,
    needed_bytes,
    read_manifest,
    read_whole,
    surplus,
)
from finetune_trainer.contract import ModelError, RunConfig

OWN, OTHER = "a" * 16, "b" * 16


def make_checkpoint(folder: Path, step: int, identity: str = OWN, **changes: Any) -> Path:
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    (path / "data.distcp").write_bytes(b"12345")
    facts: dict[str, Any] = {
        "identity": identity,
        "attempt": 1,
        "step": step,
        "updates": step,
        "with_optimizer": True,
        "world_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "saved": datetime.now(UTC),
        "curve": [],
        "files": {"data.distcp": 5},
    }
    (path / "manifest.json").write_text(Manifest.model_validate({**facts, **changes}).model_dump_json())
    return path


def test_the_newest_whole_checkpoint_of_the_run_is_chosen(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 9)
    newest = make_checkpoint(tmp_path, 10)
    assert choose_checkpoint(tmp_path, OWN, 20) == (newest, [])


def test_no_checkpoint_means_a_new_start_without_a_word(tmp_path: Path) -> None:
    assert choose_checkpoint(tmp_path, OWN, 20) == (None, [])


def test_partial_checkpoints_are_passed_over_with_their_reason(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path, 1)
    (make_checkpoint(tmp_path, 2) / "manifest.json").unlink()
    (make_checkpoint(tmp_path, 3) / "manifest.json").write_text('{"version": 1')
    (make_checkpoint(tmp_path, 4) / "data.distcp").write_bytes(b"123")
    (make_checkpoint(tmp_path, 5) / "data.distcp").unlink()
    found, notes = choose_checkpoint(tmp_path, OWN, 20)
    assert found == whole
    assert [note.partition(" is left alone: ")[2] for note in notes] == [
        "its file data.distcp is missing",
        "its file data.distcp is truncated",
        "its manifest cannot be read",
        "it has no manifest, so it was never finished",
    ]


def test_checkpoints_of_another_run_are_left_alone_with_one_sentence(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5, OTHER)
    make_checkpoint(tmp_path, 6, OTHER)
    own = make_checkpoint(tmp_path, 4)
    found, notes = choose_checkpoint(tmp_path, OWN, 20)
    assert found == own
    assert notes == [
        f"step-6, step-5 in {tmp_path} are of another run (model, data, tuning or training differ: identity {OTHER}, this run's is {OWN}) and left alone"
    ]


def test_checkpoints_of_other_rows_or_another_model_under_the_same_name_are_left_alone(tmp_path: Path) -> None:
    own = make_checkpoint(tmp_path, 1, digests={"rows": "r1", "model": "m1"})
    make_checkpoint(tmp_path, 2, digests={"rows": "r2", "model": "m1"})
    make_checkpoint(tmp_path, 3, digests={"rows": "r1", "model": "m2"})
    make_checkpoint(tmp_path, 4, digests={"rows": "r2", "model": "m2"})
    found, notes = choose_checkpoint(tmp_path, OWN, 20, {"rows": "r1", "model": "m1"})
    assert found == own
    assert [note.partition(" is left alone: ")[2] for note in notes] == [
        "it was saved with other rows and another model under the same name",
        "it was saved with another model under the same name",
        "it was saved with other rows under the same name",
    ]


def test_digests_are_compared_only_where_both_sides_have_them(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    newest = make_checkpoint(tmp_path, 2, digests={"rows": "r1"})
    assert choose_checkpoint(tmp_path, OWN, 20) == (newest, [])
    assert choose_checkpoint(tmp_path, OWN, 20, {"rows": "r1", "model": "m1"}) == (newest, [])
    assert choose_checkpoint(tmp_path, OWN, 20, {"rows": "r2"})[0] == tmp_path / "step-1"


def test_a_checkpoint_without_the_optimizer_cannot_be_gone_on_from(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5, with_optimizer=False)
    found, notes = choose_checkpoint(tmp_path, OWN, 20)
    assert found is None
    assert "it was saved with noSaveOptim" in notes[0]


def test_a_checkpoint_beyond_the_last_step_is_left_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 30)
    found, notes = choose_checkpoint(tmp_path, OWN, 20)
    assert found is None
    assert notes == [f"{tmp_path / 'step-30'} is left alone: the run has 20 steps"]


def test_only_the_runs_own_oldest_checkpoints_are_surplus(tmp_path: Path) -> None:
    first = make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2, OTHER)
    for step in (3, 10):
        make_checkpoint(tmp_path, step)
    assert surplus(tmp_path, OWN, 2) == [first]
    assert surplus(tmp_path, OWN, None) == []


def test_checkpoints_of_other_rows_neither_count_as_surplus_nor_push_out_new_ones(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 9, digests={"rows": "old"})
    first, second = (make_checkpoint(tmp_path, step, digests={"rows": "new"}) for step in (1, 2))
    assert surplus(tmp_path, OWN, 1, {"rows": "new"}) == [first]
    assert second.exists()


def test_a_whole_checkpoint_is_read_with_its_facts(tmp_path: Path) -> None:
    found = read_whole(make_checkpoint(tmp_path, 7))
    assert isinstance(found, Manifest)
    assert (found.step, found.identity) == (7, OWN)


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, ("false",)


def test_a_save_that_was_killed_between_its_renames_is_finished(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 4, attempt=1).rename(tmp_path / ".old-step-4")
    make_checkpoint(tmp_path, 4, attempt=2).rename(tmp_path / ".partial-step-4-attempt-2")
    finish_replacements(tmp_path)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-4"]
    assert read_manifest(tmp_path / "step-4").attempt == 2


@pytest.mark.parametrize("identity", [OWN, OTHER])
def test_the_old_checkpoint_comes_back_when_the_new_one_is_not_whole_or_of_another_run(tmp_path: Path, identity: str) -> None:
    make_checkpoint(tmp_path, 4, attempt=1).rename(tmp_path / ".old-step-4")
    partial = make_checkpoint(tmp_path, 4, identity, attempt=2).rename(tmp_path / ".partial-step-4-attempt-2")
    if identity == OWN:
        (partial / "manifest.json").unlink()
    finish_replacements(tmp_path)
    assert read_manifest(tmp_path / "step-4").attempt == 1


def test_a_save_that_was_killed_after_its_renames_is_left_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 4, attempt=1).rename(tmp_path / ".old-step-4")
    make_checkpoint(tmp_path, 4, attempt=2)
    finish_replacements(tmp_path)
    assert read_manifest(tmp_path / "step-4").attempt == 2


def test_an_index_that_names_anything_but_an_index_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps({"state_dict_metadata": Malicious()}))
    with pytest.raises(ModelError, match=r"\.metadata: not the index of a checkpoint: posix.system does not belong in an index"):
        check_index(path)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="not the index of a checkpoint"):
        check_index(path)


def test_an_empty_folder_is_made_where_another_stood(tmp_path: Path) -> None:
    (tmp_path / "a" / "old").mkdir(parents=True)
    make_empty(tmp_path / "a" / "new", tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("checkpoints", "formats", "expected"),
    [
        ({"saveSteps": 10}, ["peft"], 3 * 300 + 100),
        ({"saveSteps": 10, "saveTotalLimit": 1}, ["peft"], 2 * 300 + 100),
        ({"saveSteps": 10, "noSaveOptim": True}, ["huggingface", "megatron"], 3 * 100 + 2 * 1000),
        ({"saveSteps": 500}, ["peft", "huggingface"], 300 + 100 + 1000),
    ],
)
def test_the_room_that_a_run_needs_is_its_checkpoints_and_exports(checkpoints: dict[str, Any], formats: list[str], expected: int) -> None:
    config = RunConfig.model_validate(
        {"model": {"source": "/m"}, "data": {"dataset": ["/d"]}, "checkpoints": checkpoints, "output": {"formats": formats}, "run": {"outputDir": "/o"}}
    )
    assert needed_bytes(config, checkpoint_bytes=300, trained_bytes=100, model_bytes=1000, remaining_steps=25) == expected
