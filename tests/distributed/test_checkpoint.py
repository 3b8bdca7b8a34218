"""Checkpoints: a resumed run is the uninterrupted one, also on another layout, also after a kill in the middle of a save."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from factories import make_rows, make_tiny_model
from finetune_trainer import hf_files
from finetune_trainer.contract import ConfigurationError, EngineError, Preempted
from gang import Gang
from small_runs import Job, Outcome, export_megatron, train

SAME = 1e-6
FULL: dict[str, Any] = {"tunerType": "full", "loraDropout": None}
TP2: dict[str, Any] = {"tensorModelParallelSize": 2, "sequenceParallel": True}
PP2: dict[str, Any] = {"tensorModelParallelSize": 1, "pipelineModelParallelSize": 2}
DP2: dict[str, Any] = {"tensorModelParallelSize": 1}


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, so that a pipeline holds one parameter twice."""
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("model") / "qwen3", num_hidden_layers=2)


@pytest.fixture(scope="package")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows"), 40)


@pytest.fixture(scope="package")
def uninterrupted(gang2: Gang, model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Outcome, Path]]:
    """Runs of 6 steps on TP2, with checkpoints at 3 and 6."""
    found = {}
    for name, tuning in (("lora", {}), ("full", FULL)):
        folder = tmp_path_factory.mktemp(name)
        found[name] = gang2.run(train, Job(model, rows, folder, parallelism=TP2, tuning=tuning))[0], folder
    return found


def at_step_3(finished: Path, folder: Path) -> Path:
    """A run's folder as it was after step 3."""
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "step-6")
    return folder


@pytest.mark.parametrize("tuner", ["lora", "full"])
@pytest.mark.parametrize(("size", "parallelism"), [(2, TP2), (1, DP2), (2, PP2), (2, DP2)], ids=["tp2", "one", "pp2", "dp2"])
def test_a_resumed_run_is_the_uninterrupted_one_on_every_layout(
    size: int,
    parallelism: dict[str, Any],
    tuner: str,
    gang1: Gang,
    gang2: Gang,
    model: Path,
    rows: Path,
    uninterrupted: dict[str, tuple[Outcome, Path]],
    tmp_path: Path,
) -> None:
    whole, finished = uninterrupted[tuner]
    folder = at_step_3(finished, tmp_path / "run")
    job = Job(model, rows, folder, parallelism=parallelism, tuning=FULL if tuner == "full" else {})
    for outcome in (gang1 if size == 1 else gang2).run(train, job):
        assert outcome.resumed_from == 3
        assert outcome.losses[:3] == whole.losses[:3]
        assert outcome.losses[3:] == pytest.approx(whole.losses[3:], abs=SAME)
        assert outcome.rates == whole.rates
        assert outcome.notes[-1] == f"continues from step 3 ({folder / 'checkpoints' / 'step-3'})"


def test_a_checkpoint_of_data_parallel_ranks_goes_on_on_one(gang1: Gang, gang2: Gang, model: Path, rows: Path, tmp_path: Path) -> None:
    whole = gang2.run(train, Job(model, rows, tmp_path / "run", parallelism=DP2))[0]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    resumed = gang1.run(train, Job(model, rows, tmp_path / "run"))[0]
    assert resumed.losses == pytest.approx(whole.losses, abs=SAME)


@pytest.mark.parametrize(
    ("training", "parallelism", "dtype"),
    [
        ({"optimizer": "sgd", "lr": 0.1}, DP2, "float32"),
        ({}, {**DP2, "useDistributedOptimizer": False}, "float32"),
        ({}, DP2, "bfloat16"),
        ({}, {**DP2, "overlapGradReduce": True, "overlapParamGather": True}, "float32"),
    ],
    ids=["sgd", "whole-optimizer", "bfloat16", "overlap"],
)
def test_every_kind_of_optimizer_goes_on_exactly(
    training: dict[str, Any], parallelism: dict[str, Any], dtype: str, gang2: Gang, model: Path, rows: Path, tmp_path: Path
) -> None:
    job = Job(model, rows, tmp_path / "run", parallelism=parallelism, training=training, dtype=dtype)
    whole = gang2.run(train, job)[0]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    assert gang2.run(train, job)[0].losses == pytest.approx(whole.losses, abs=SAME)


def test_dropout_goes_on_as_if_never_interrupted(gang2: Gang, model: Path, rows: Path, tmp_path: Path) -> None:
    job = Job(model, rows, tmp_path / "run", parallelism=TP2, tuning={"loraDropout": 0.3})
    whole = gang2.run(train, job)[0]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    assert gang2.run(train, job)[0].losses == pytest.approx(whole.losses, abs=SAME)
    without = gang2.run(train, Job(model, rows, tmp_path / "other", parallelism=TP2))[0]
    assert without.losses != pytest.approx(whole.losses, abs=1e-4), "dropout does something"


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(
    gang2: Gang, model: Path, rows: Path, uninterrupted: dict[str, tuple[Outcome, Path]], tmp_path: Path
) -> None:
    """Rank 0 alone is asked; all ranks stop after the same step."""
    with pytest.raises(Preempted, match="was asked to stop and has saved step 4 of 6; with resume auto it goes on from there"):
        gang2.run(train, Job(model, rows, tmp_path, parallelism=TP2, stop_at=4))
    outcome = gang2.run(train, Job(model, rows, tmp_path, parallelism=TP2))[0]
    assert outcome.resumed_from == 4
    assert outcome.losses == pytest.approx(uninterrupted["lora"][0].losses, abs=SAME)


def test_a_checkpoint_written_in_the_background_is_the_same(
    gang2: Gang, model: Path, rows: Path, uninterrupted: dict[str, tuple[Outcome, Path]], tmp_path: Path
) -> None:
    checkpoints = {"asyncSave": True, "saveSteps": 2}
    gang2.run(train, Job(model, rows, tmp_path, parallelism=TP2, checkpoints=checkpoints))
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-2", "step-4", "step-6"]
    shutil.rmtree(folder / "step-6")
    resumed = gang2.run(train, Job(model, rows, tmp_path, parallelism=TP2, checkpoints=checkpoints))[0]
    assert (resumed.resumed_from, resumed.losses) == (4, pytest.approx(uninterrupted["lora"][0].losses, abs=SAME))


def test_another_runs_checkpoints_are_left_alone_and_kept(gang1: Gang, model: Path, rows: Path, tmp_path: Path) -> None:
    job = Job(model, rows, tmp_path, training={"trainIters": 3})
    gang1.run(train, job)
    other = gang1.run(train, Job(model, rows, tmp_path, training={"trainIters": 3, "lr": 1e-3}, checkpoints={"saveTotalLimit": 1}))[0]
    assert other.resumed_from == 0
    assert "step-3 in" in other.notes[-1]
    assert "is of another run (model, data, tuning or training differ: identity" in other.notes[-1]
    names = {path.name: json.loads((path / "manifest.json").read_text())["identity"] for path in (tmp_path / "checkpoints").glob("step-*")}
    assert names["step-3-other-1"] == job.config.identity()
    assert names["step-3"] != job.config.identity()


def test_a_run_on_changed_rows_starts_anew_and_keeps_the_old_checkpoints(gang1: Gang, model: Path, tmp_path: Path) -> None:
    """The data set has the same name, so the identity is the same."""
    data = make_rows(tmp_path, 40)
    job = Job(model, data, tmp_path / "run", training={"trainIters": 3}, checkpoints={"saveTotalLimit": 1})
    gang1.run(train, job)
    data.write_text(data.read_text().replace("0. ", "zero. "))
    other = gang1.run(train, job)[0]
    assert other.resumed_from == 0
    assert other.notes[-1] == f"{tmp_path / 'run' / 'checkpoints' / 'step-3'} is left alone: it was saved with other rows under the same name"
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")) == ["step-3", "step-3-other-1"]
    assert gang1.run(train, job)[0].resumed_from == 3


def test_only_the_newest_checkpoints_are_kept(gang1: Gang, model: Path, rows: Path, tmp_path: Path) -> None:
    gang1.run(train, Job(model, rows, tmp_path, checkpoints={"saveSteps": 1, "saveTotalLimit": 2}))
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-5", "step-6"]


def test_a_checkpoint_without_the_optimizer_is_smaller_and_not_gone_on_from(gang1: Gang, model: Path, rows: Path, tmp_path: Path) -> None:
    job = Job(model, rows, tmp_path, training={"trainIters": 3}, checkpoints={"noSaveOptim": True})
    gang1.run(train, job)
    outcome = gang1.run(train, job)[0]
    assert outcome.resumed_from == 0
    assert "saved with noSaveOptim, so training cannot go on from it" in outcome.notes[-1]


def test_an_older_attempt_publishes_nothing_over_a_newer_one(gang1: Gang, model: Path, rows: Path, tmp_path: Path) -> None:
    gang1.run(train, Job(model, rows, tmp_path, attempt=2, training={"trainIters": 3}))
    with pytest.raises(Preempted, match="attempt 2 of this run has started in .*; attempt 1 publishes nothing more"):
        gang1.run(train, Job(model, rows, tmp_path, attempt=1, training={"trainIters": 3}))


def test_resume_never_starts_anew(gang1: Gang, model: Path, rows: Path, tmp_path: Path) -> None:
    first = gang1.run(train, Job(model, rows, tmp_path))[0]
    second = gang1.run(train, Job(model, rows, tmp_path, checkpoints={"resume": "never"}))[0]
    assert (second.resumed_from, second.losses) == (0, first.losses)


def test_our_facts_are_json_and_megatrons_common_state_is_read_without_pickled_classes(uninterrupted: dict[str, tuple[Outcome, Path]]) -> None:
    import torch

    folder = uninterrupted["lora"][1] / "checkpoints" / "step-3"
    assert json.loads((folder / "manifest.json").read_text())["step"] == 3
    assert torch.load(folder / "common.pt", weights_only=True) == {}


def test_the_megatron_format_is_the_whole_model_and_read_on_any_layout(gang1: Gang, gang2: Gang, model: Path, rows: Path, tmp_path: Path) -> None:
    job = Job(model, rows, tmp_path / "run", parallelism=TP2, tuning=FULL, training={"trainIters": 3})
    assert gang2.run(export_megatron, job, tmp_path / "megatron", write=True) == [[], []]
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "3"
    hf_files.check_manifest(tmp_path / "megatron")
    finished = {"model": model, "rows": rows, "output": tmp_path / "run", "tuning": FULL, "training": {"trainIters": 3}}
    assert gang1.run(export_megatron, Job(**finished), tmp_path / "megatron", write=False) == [[]]
    assert gang2.run(export_megatron, Job(**finished, parallelism=PP2), tmp_path / "megatron", write=False) == [[], []]
    base = Job(model, rows, tmp_path / "other", parallelism=TP2, tuning=FULL, training={"trainIters": 1, "lr": 1e-2})
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in gang2.run(export_megatron, base, tmp_path / "megatron", write=False)[1]


def test_the_megatron_format_leaves_a_folder_of_other_content_alone(gang1: Gang, model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"megatron is not empty and holds no export"):
        gang1.run(export_megatron, Job(model, rows, tmp_path / "run", training={"trainIters": 1}), tmp_path / "megatron", write=True)
    assert [path.name for path in (tmp_path / "megatron").iterdir()] == ["thesis.txt"]


def test_the_megatron_format_holds_merged_weights_and_leaves_the_adapters_in_place(gang2: Gang, model: Path, rows: Path, tmp_path: Path) -> None:
    job = Job(model, rows, tmp_path / "run", parallelism=TP2, training={"trainIters": 3})
    assert gang2.run(export_megatron, job, tmp_path / "megatron", write=True) == [[], []]
    assert gang2.run(export_megatron, job, tmp_path / "megatron", write=False) == [[], []]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waited-for", "in-the-background"])
def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(asynchronous: bool, gang1: Gang, model: Path, rows: Path, tmp_path: Path) -> None:
    """The process dies when the files of step 4 are there and their manifest is not."""
    checkpoints = {"saveSteps": 2, "asyncSave": asynchronous}
    job = Job(model, rows, tmp_path / "run", checkpoints=checkpoints)
    program = "\n".join(
        [
            "import os, signal",
            "from pathlib import Path",
            "import small_runs",
            "from finetune_trainer.checkpoint import Checkpoints",
            "publish = Checkpoints._publish",
            "def killed(self, partial, manifest):",
            "    if manifest.step == 4:",
            "        os.kill(os.getpid(), signal.SIGKILL)",
            "    publish(self, partial, manifest)",
            "Checkpoints._publish = killed",
            f"small_runs.train(small_runs.Job(Path({str(model)!r}), Path({str(rows)!r}), Path({str(tmp_path / 'run')!r}), checkpoints={checkpoints!r}))",
        ]
    )
    script = tmp_path / "killed.py"
    script.write_text("if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in program.splitlines()))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, str(script)], env=environment, timeout=150)
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [".partial-step-4-attempt-1", "attempt.json", "step-2"]
    resumed = gang1.run(train, job)[0]
    whole = gang1.run(train, Job(model, rows, tmp_path / "whole"))[0]
    assert (resumed.resumed_from, resumed.losses) == (2, pytest.approx(whole.losses, abs=SAME))
    assert not list(folder.glob(".partial-*"))


MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["waited-for", "in-the-background"])


def fail(run: Callable[..., Any], *arguments: Any, **options: Any) -> EngineError:
    """What the run ends with on this rank."""
    with pytest.raises(EngineError) as caught:
        run(*arguments, **options)
    assert caught.value.__cause__ is not None
    return caught.value


def fill_disk(trainer: Any, disk: Path) -> None:
    """Leave no room even for a checkpoint's smallest file."""
    with pytest.raises(OSError, match="No space left on device"):
        (disk / "filler").write_bytes(bytes(2**20))


def forbid_large_files(trainer: Any) -> None:
    """Make the kernel refuse what a checkpoint's tensors need, on a disk that has room."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))


def train_with_small_files(job: Job) -> EngineError:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        return fail(train, job, forbid_large_files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def signal_children(trainer: Any) -> None:
    """As systemd and Slurm stop a job: every process gets the signal; a rank itself goes on until its checkpoint is written."""
    for child in psutil.Process().children(recursive=True):
        for number in (signal.SIGINT, signal.SIGTERM):
            child.send_signal(number)


@MODES
def test_a_full_disk_is_said_on_every_rank_with_the_folder_and_what_would_help(
    asynchronous: bool, gang2: Gang, model: Path, rows: Path, small_disk: Path
) -> None:
    job = Job(model, rows, small_disk, parallelism=TP2, tuning=FULL, checkpoints={"asyncSave": asynchronous})
    errors = gang2.run(fail, train, job)
    assert [type(error) for error in errors] == [ConfigurationError, ConfigurationError]
    assert {str(error) for error in errors} == {
        f"{small_disk / 'checkpoints'}: the disk is full (No space left on device): a checkpoint could not be written, 0 bytes are free; "
        "run.outputDir needs more room (checkpoints.saveTotalLimit keeps fewer checkpoints)"
    }


@MODES
def test_a_disk_without_room_for_the_smallest_file_is_full_too(asynchronous: bool, gang1: Gang, model: Path, rows: Path, small_disk: Path) -> None:
    job = Job(model, rows, small_disk, checkpoints={"asyncSave": asynchronous})
    error = gang1.run(fail, train, job, functools.partial(fill_disk, disk=small_disk))[0]
    assert type(error) is ConfigurationError
    assert str(error).startswith(f"{small_disk / 'checkpoints'}: the disk is full (No space left on device): ")


def test_a_full_disk_is_said_of_the_megatron_format_too(gang2: Gang, model: Path, rows: Path, small_disk: Path, tmp_path: Path) -> None:
    job = Job(model, rows, tmp_path / "run", parallelism=TP2, tuning=FULL, training={"trainIters": 1})
    for error in gang2.run(fail, export_megatron, job, small_disk / "megatron", write=True):
        assert type(error) is ConfigurationError
        assert str(error).startswith(f"{small_disk}: the disk is full (No space left on device): ")


@MODES
def test_another_failure_of_the_writer_is_an_error_with_its_words(asynchronous: bool, gang2: Gang, model: Path, rows: Path, tmp_path: Path) -> None:
    job = Job(model, rows, tmp_path, parallelism=TP2, tuning=FULL, checkpoints={"asyncSave": asynchronous})
    first, second = gang2.run(train_with_small_files, job)
    assert (type(first), str(first)) == (EngineError, str(second))
    assert str(first).startswith(f"{tmp_path / 'checkpoints'}: a checkpoint could not be written: rank 0: RuntimeError: Worker failure: ")


def test_a_signal_to_every_process_leaves_the_background_save_whole(gang1: Gang, model: Path, rows: Path, tmp_path: Path) -> None:
    gang1.run(train, Job(model, rows, tmp_path, checkpoints={"asyncSave": True}), signal_children)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-3", "step-6"]
