"""`finetune run` with the real engine: a YAML in, a verified adapter out; stopped, it continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from factories import make_rows, make_tiny_model

DEADLINE_SECONDS = 300

STEPS = 200
"""So many that a run of them is still training when a signal comes, however late."""
JOB = """
apiVersion: finetune.mcore.dev/v1alpha1
kind: FineTuneJob
metadata: {name: tiny, namespace: team-a}
spec:
  model: {source: ./model}
  data: {dataset: [./rows.jsonl], maxLength: 256}
  training: {globalBatchSize: 8, trainIters: %(steps)d, lr: 1e-3, loggingSteps: 1}
  tuning: {loraDropout: 0}
  checkpoints: {saveSteps: 1000}
  nodes: {count: %(nodes)d, image: "trainer:1"}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tiny_model("llama", tmp_path / "model")
    make_rows(tmp_path, 40)
    (tmp_path / "cwd").mkdir()
    return tmp_path


def finetune(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "finetune_operator.cli", "run", "-f", str(folder / "job.yaml"), "--work", str(folder / "results"), *arguments]


def run(folder: Path, *arguments: str) -> tuple[int, list[str], str]:
    done = subprocess.run(finetune(folder, *arguments), cwd=folder / "cwd", capture_output=True, text=True, timeout=DEADLINE_SECONDS, env=quiet())
    return done.returncode, done.stdout.splitlines(), done.stderr


def stop_after(folder: Path, line_start: str, numbers: Sequence[signal.Signals]) -> tuple[int, str]:
    """Start a run, send it signals once it has said a line, and wait for its end."""
    process = subprocess.Popen(finetune(folder), cwd=folder / "cwd", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet())
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(line_start):
            break
    for number in numbers:
        process.send_signal(number)
    _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert any(line.startswith(line_start) for line in said), f"{''.join(said)}\n{errors}"
    return process.returncode, errors


def quiet() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def result_folders(folder: Path) -> list[Path]:
    return sorted((folder / "results" / "team-a" / "tiny").iterdir())


def read_report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return content


def test_two_nodes_on_this_machine_give_a_verified_adapter(folder: Path) -> None:
    (folder / "job.yaml").write_text(JOB % {"steps": 4, "nodes": 2})
    code, lines, errors = run(folder)
    assert (code, errors) == (0, ""), "\n".join([*lines, errors])
    (results,) = result_folders(folder)
    assert lines[:3] == ["ignored without a cluster: nodes.image", "there is no GPU here: 2 processes on the CPU", f"run {results.name}"]
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/4", "2/4", "3/4", "4/4"]
    assert "verified (Adapter" in "\n".join(lines)
    assert f"peft: {results}/peft" in lines
    assert (results / "peft" / "adapter_model.safetensors").exists()
    assert (results / "loss.png").exists()
    report = read_report(results)
    assert report["succeeded"]
    assert report["verification"]["passed"]
    assert [point["step"] for point in report["curve"]] == [1, 2, 3, 4]
    assert sorted(path.name for path in (results / "logs" / "attempt-1").iterdir()) == ["tiny-0.log", "tiny-1.log"]


def test_ctrl_c_checkpoints_and_resume_auto_continues_the_same_curve(folder: Path) -> None:
    (folder / "job.yaml").write_text(JOB % {"steps": STEPS, "nodes": 1})
    code, errors = stop_after(folder, "step ", [signal.SIGINT])
    assert code == 143
    assert f"continue with: finetune run -f {folder / 'job.yaml'} --work {folder / 'results'} --resume auto" in errors
    (results,) = result_folders(folder)
    stopped = read_report(results)
    assert not stopped["succeeded"]
    done = len(stopped["curve"])
    assert 0 < done < STEPS

    code, lines, errors = run(folder, "--resume", "auto")
    assert (code, errors) == (0, ""), "\n".join([*lines, errors])
    assert lines[2] == f"continuing run {results.name} (attempt 2; --resume never starts anew)"
    assert result_folders(folder) == [results]
    report = read_report(results)
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [f"{step}/{STEPS}" for step in range(done + 1, STEPS + 1)]
    assert report["resumedFromStep"] == done
    assert [point["step"] for point in report["curve"]] == list(range(1, STEPS + 1))
    assert report["verification"]["passed"]

    code, _, _ = run(folder, "--resume", "never")
    assert code == 0
    (whole,) = (path for path in result_folders(folder) if path != results)
    uninterrupted = [point["loss"] for point in read_report(whole)["curve"]]
    assert [point["loss"] for point in report["curve"]] == pytest.approx(uninterrupted, rel=1e-6)


def test_what_the_model_cannot_do_is_refused_in_a_sentence(folder: Path) -> None:
    job = JOB % {"steps": 4, "nodes": 4}
    (folder / "job.yaml").write_text(job + "  parallelism: {tensorModelParallelSize: 4}\n")
    code, _, errors = run(folder)
    assert code == 10
    assert "parallelism.tensorModelParallelSize is 4; it must divide num_key_value_heads (2)" in errors
    assert "Traceback" not in errors


def test_missing_model_is_refused_in_a_sentence(folder: Path) -> None:
    (folder / "job.yaml").write_text((JOB % {"steps": 4, "nodes": 1}).replace("./model", "./nowhere"))
    code, _, errors = run(folder)
    assert code == 12
    assert errors == f"finetune: {folder}/job.yaml:6: spec.model.source: there is no folder {folder}/nowhere\n"
    assert not (folder / "results").exists()
    assert "Traceback" not in errors


def process_of_rank(launchers: psutil.Process, rank: int) -> psutil.Process:
    ranks = [each for each in launchers.children(recursive=True) if each.environ().get("LOCAL_RANK") is not None and each.environ().get("RANK") == str(rank)]
    return min(ranks, key=lambda each: each.create_time())


@pytest.mark.parametrize(
    ("number", "code", "start"),
    [
        (signal.SIGKILL, 137, "Internal (rank 1): rank 1 was killed by signal SIGKILL"),
        (signal.SIGSTOP, 21, "Hang (rank 0): a collective did not end within parallelism.ddpTimeout: "),
    ],
    ids=["killed", "hung"],
)
def test_a_rank_of_another_node_that_dies_or_hangs_ends_the_run_with_its_reason(
    folder: Path, number: signal.Signals, code: int, start: str, record_property: Callable[[str, object], None]
) -> None:
    job = (JOB % {"steps": 2000, "nodes": 2}).replace("  nodes:", "  parallelism: {ddpTimeout: 20}\n  nodes:")
    (folder / "job.yaml").write_text(job)
    process = subprocess.Popen(finetune(folder), cwd=folder / "cwd", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet())
    assert process.stdout is not None
    assert any(line.startswith("step ") for line in process.stdout)
    began = time.monotonic()
    process_of_rank(psutil.Process(process.pid), 1).send_signal(number)
    _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    seconds = round(time.monotonic() - began, 1)
    record_property("seconds to the end", seconds)
    print(f"{number.name}: the run ended after {seconds} s")
    assert (process.returncode, errors.startswith(start)) == (code, True), errors
    (results,) = result_folders(folder)
    assert start.startswith(f"{read_report(results)['failure']['reason']} ")
