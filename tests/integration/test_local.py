"""Whole runs on this machine with a real launcher program that trains nothing (launcher_program.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from finetune_operator import gang, local
from finetune_trainer.contract import ConfigurationError
from jobs import load_job, write_job

PROGRAM = Path(__file__).with_name("launcher_program.py")
RUN = "import sys; from pathlib import Path; from finetune_operator import gang, job_file, local; gang.END_SECONDS = 60; local.REPEAT_SECONDS = float(sys.argv[5]); sys.exit(local.run_job(job_file.load(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3], (sys.executable, sys.argv[4])))"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers end because they are asked to; on a busy machine they are not killed for being slow."""
    monkeypatch.setattr(gang, "END_SECONDS", 60)


def behaving(behaviour: str, count: int = 1, **nodes: Any) -> dict[str, Any]:
    env = [*nodes.pop("env", []), {"name": "BEHAVIOUR", "value": behaviour}]
    return {"count": count, "accelerator": {"type": "CPU"}, "env": env, **nodes}


def run(folder: Path, **sections: Any) -> int:
    return local.run_job(load_job(folder, **sections), folder / "runs", "auto", (sys.executable, str(PROGRAM)))


def only_run(folder: Path) -> Path:
    (path,) = (folder / "runs" / "default" / "tiny").iterdir()
    return path


def environment(folder: Path, node: int) -> dict[str, str]:
    content: dict[str, str] = json.loads((only_run(folder) / f"environment-{node}.json").read_text())
    return content


def test_run_shows_progress_and_says_what_came_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, nodes=behaving("finish", count=2)) == 0
    lines = capsys.readouterr().out.splitlines()
    folder = only_run(tmp_path)
    assert lines[:3] == [f"run {folder.name}", f"results: {folder}", f"output of the processes: {folder}/logs/attempt-1"]
    assert lines[3].startswith("progress: http://127.0.0.1:")
    assert lines[4:9] == [
        "chosen: training.microBatchSize 4",
        "training",
        "step 1/6  loss 4  learning rate 0.0001  512 tokens/s  5s left",
        "step 5/6  loss 0.8  learning rate 0.0001  512 tokens/s  1s left",
        "step 6/6  loss 0.6667  learning rate 0.0001  512 tokens/s  0s left",
    ]
    assert lines[9].startswith("finished in ")
    assert lines[9].endswith(": loss 4 → 0.6667 in 6 steps")
    assert lines[10:] == ["verified (Adapter, largest difference of a logit 1.5e-06)", f"report.json: {folder}/report.json"]


def test_each_node_has_its_launcher_with_the_environment_of_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "77")
    monkeypatch.setenv("PET_RDZV_BACKEND", "c10d")
    monkeypatch.setenv("KEPT", "yes")
    env = [{"name": "A", "value": "1"}, {"name": "B", "value": "$(A)-$(UNKNOWN)-$$(A)"}]
    assert run(tmp_path, nodes=behaving("finish", count=2, processesPerNode=2, env=env)) == 0
    first, second = environment(tmp_path, 0), environment(tmp_path, 1)
    assert {
        name: second[name] for name in ("RANK", "NODE_RANK", "WORLD_SIZE", "NNODES", "NPROC_PER_NODE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "B", "KEPT")
    } == {
        "RANK": "1",
        "NODE_RANK": "1",
        "WORLD_SIZE": "4",
        "NNODES": "2",
        "NPROC_PER_NODE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "CUDA_VISIBLE_DEVICES": "",
        "B": "1-$(UNKNOWN)-$(A)",
        "KEPT": "yes",
    }
    assert first["MASTER_PORT"] == second["PET_MASTER_PORT"] != "0"
    assert "PET_RDZV_BACKEND" not in second
    assert (only_run(tmp_path) / "logs" / "attempt-1" / "tiny-1.log").read_text() == "node 1 starts\n"


def test_each_node_gets_its_own_share_of_the_gpus(tmp_path: Path) -> None:
    file = load_job(tmp_path, nodes={"count": 2, "processesPerNode": 2})
    with local.runs.claim(file.job, local.Settings(), local.local_place(file, tmp_path), "never") as claimed:
        nodes = local.launchers(claimed, ("launcher",), {"CUDA_VISIBLE_DEVICES": "7,6,5,4"}, ["7", "6", "5", "4"])
    assert [node.environment["CUDA_VISIBLE_DEVICES"] for node in nodes] == ["7,6", "5,4"]
    assert nodes[0].command == ("launcher", str(claimed.folder / "run.json"))


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose nvidia-smi shows four cards."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nfor card in 0 1 2 3; do echo $card, GPU-$card, 81920; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def on_gpus(**nodes: Any) -> dict[str, Any]:
    return {"count": 2, "processesPerNode": 2, "env": [{"name": "BEHAVIOUR", "value": "finish"}], **nodes}


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(("visible", "shares"), [(None, ["0,1", "2,3"]), ("3,1,0,2", ["3,1", "0,2"]), ("", ["", ""])])
def test_nodes_of_one_machine_have_cards_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, shares: list[str]) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert run(tmp_path, nodes=on_gpus()) == 0
    assert [environment(tmp_path, node)["CUDA_VISIBLE_DEVICES"] for node in (0, 1)] == shares


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(("visible", "count", "shown"), [(None, 3, "shows 4;"), ("0,1,2", 2, "shows 3 (CUDA_VISIBLE_DEVICES is '0,1,2');")])
def test_some_cards_but_too_few_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, shown: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigurationError) as error:
        run(tmp_path, nodes=on_gpus(count=count))
    assert f"nodes: count {count} with processesPerNode 2 needs {2 * count} GPUs, one per process; this machine {shown}" in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_when_one_node_fails_all_end_and_its_reason_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, nodes=behaving("fail", count=3)) == 12
    folder = only_run(tmp_path)
    assert (folder / "ended-0").exists()
    assert (folder / "ended-2").exists()
    assert capsys.readouterr().err.splitlines() == ["Model (rank 1): model.safetensors is truncated", f"log: {folder}/logs/attempt-1/tiny-1.log"]


def test_a_trainers_failure_about_an_option_says_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "data.maxLength is 8; no row is that short"
    assert run(tmp_path, data={"dataset": ["org/rows"], "maxLength": 8}, nodes=behaving("fail", count=2, env=[{"name": "MESSAGE", "value": message}])) == 12
    text = (tmp_path / "job.yaml").read_text().splitlines()
    line = text.index("    maxLength: 8") + 1
    assert capsys.readouterr().err.startswith(f"Model (rank 1): {tmp_path}/job.yaml:{line}: spec.{message}\n")


def test_a_launcher_that_leaves_no_reason_shows_the_end_of_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, nodes=behaving("crash")) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("Internal: tiny-0 ended with exit code 1; the end of ")
    assert errors[-1] == "RuntimeError: the launcher itself is broken"


def test_what_means_nothing_here_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    nodes = behaving("finish", image="trainer:1", tolerations=[{"operator": "Exists"}])
    del nodes["accelerator"]
    assert run(tmp_path, nodes=nodes, volumes={"work": {"claimName": "results"}}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["ignored without a cluster: volumes, nodes.image, nodes.tolerations", "there is no GPU here: 1 process on the CPU"]
    assert sum("ignored" in line for line in lines) == 1


class Started:
    """`run_job` in a process of its own, as the command line has it."""

    def __init__(self, folder: Path, resume: str, repeat_seconds: float, **sections: Any) -> None:
        arguments = [str(write_job(folder, **sections)), str(folder / "runs"), resume, str(PROGRAM), str(repeat_seconds)]
        self.process = subprocess.Popen([sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def await_line(self, start: str) -> None:
        stream: IO[str] | None = self.process.stdout
        assert stream is not None
        for line in stream:
            if line.startswith(start):
                return
        raise AssertionError(f"it ended before it said {start!r}: {self.process.communicate()[1]}")

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        threading.Event().wait(0.05)


@contextmanager
def started(folder: Path, resume: str = "auto", repeat_seconds: float = local.REPEAT_SECONDS, **sections: Any) -> Iterator[Started]:
    run = Started(folder, resume, repeat_seconds, **sections)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_nodes_after_a_checkpoint_and_resume_continues(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, nodes=behaving("stop", count=2)) as run:
        run.await_line("step 1/6")
        run.process.send_signal(number)
        code, out, err = run.end()
    assert code == 143
    assert "stopping after a checkpoint; once more stops at once" in out
    assert err.startswith("stopped after ")
    assert f"continue with: finetune run -f {tmp_path / 'job.yaml'} --work {tmp_path / 'runs'} --resume auto" in err
    with started(tmp_path, nodes=behaving("stop", count=2)) as again:
        code, out, err = again.end()
    assert (code, err) == (0, "")
    assert out.startswith(f"continuing run {only_run(tmp_path).name} (attempt 2; --resume never starts anew)\n")


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with started(tmp_path, nodes=behaving("stubborn", count=2)) as run:
        run.await_line("step 1/6")
        await_file(only_run(tmp_path) / "environment-1.json")  # node 1 listens for signals from here on
        run.process.send_signal(signal.SIGINT)
        run.await_line("stopping after a checkpoint")
        # A launcher that has not yet run its handler would take two SIGTERMs for one.
        for node in (0, 1):
            await_file(only_run(tmp_path) / f"asked-{node}")
        time.sleep(local.REPEAT_SECONDS)  # so soon it would be the same request
        run.process.send_signal(signal.SIGINT)
        code, out, err = run.end()
    assert code == 143
    assert "stopping at once" in out
    assert "there is no checkpoint yet" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_twice_in_a_moment_is_one_request(tmp_path: Path, number: signal.Signals) -> None:
    """As from `timeout`, which signals its command and then the group, and from a terminal that is closed."""
    with started(tmp_path, repeat_seconds=600, nodes=behaving("slow", count=2)) as run:
        run.await_line("step 1/6")
        run.process.send_signal(number)
        run.await_line("stopping after a checkpoint")
        run.process.send_signal(number)
        (only_run(tmp_path) / "go").touch()
        code, out, err = run.end()
    assert code == 143
    assert "stopping at once" not in out
    assert err.startswith("stopped after ")
    assert (only_run(tmp_path) / "checkpoints" / "step-3").exists()


def test_a_run_whose_output_nobody_reads_any_more_still_stops_after_a_checkpoint(tmp_path: Path) -> None:
    """Ctrl-C ends `tee` too."""
    with started(tmp_path, nodes=behaving("stop", count=2)) as run:
        run.await_line("step 1/6")
        assert run.process.stdout is not None
        run.process.stdout.close()
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(60) == 143
    assert (only_run(tmp_path) / "checkpoints" / "step-3").exists()


def test_a_failure_after_a_signal_is_told_as_one(tmp_path: Path) -> None:
    with started(tmp_path, nodes=behaving("full", count=1)) as run:
        run.await_line("step 1/6")
        run.process.send_signal(signal.SIGINT)
        code, _, err = run.end()
    assert code == 10
    assert err.startswith("Configuration (rank 0): checkpoints: the disk is full\nlog: ")


def test_never_starts_anew(tmp_path: Path) -> None:
    with started(tmp_path, nodes=behaving("stop")) as run:
        run.await_line("step 1/6")
        run.process.send_signal(signal.SIGTERM)
        run.end()
    with started(tmp_path, "never", nodes=behaving("stop")) as again:
        again.await_line("step 1/6")
        again.process.send_signal(signal.SIGTERM)
        again.end()
    assert len(list((tmp_path / "runs" / "default" / "tiny").iterdir())) == 2


def test_launchers_are_asked_to_end_when_finetune_run_is_killed(tmp_path: Path) -> None:
    with started(tmp_path, nodes=behaving("stop")) as run:
        run.await_line("step 1/6")
        run.process.kill()
        run.process.wait()
    await_file(only_run(tmp_path) / "checkpoints" / "step-3")
