"""What leaves a process: HTTP, the log, report.json, loss.png, the termination message."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from finetune_trainer import report as reports
from finetune_trainer.contract import Artifact, ConfigurationError, CurvePoint, FailureReport, Progress, Reason, RunConfig, RunReport, Verification
from finetune_trainer.report import Beginning, Report


def make_config(folder: Path, **run: object) -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"source": "/models/x"}, "data": {"dataset": ["/data/x.jsonl"]}, "training": {"loggingSteps": 2}, "run": {"outputDir": str(folder), **run}}
    )


def point(step: int, loss: float = 2.0, seconds: float = 0.5, tokens: int = 100) -> CurvePoint:
    return CurvePoint(step=step, loss=loss, learning_rate=1e-4, gradient_norm=0.25, tokens=tokens, seconds=seconds)


@pytest.fixture
def report(tmp_path: Path) -> Iterator[Report]:
    found = Report(make_config(tmp_path / "out"), rank=0)
    found.serve()
    yield found
    found.close()


def get(report: Report, path: str) -> str:
    address = json.loads((report.folder / "progress.json").read_text())["address"]
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def test_progress_is_served_from_the_start_under_the_address_in_progress_json(report: Report) -> None:
    progress = Progress.model_validate_json(get(report, "/progress"))
    assert (progress.stage, progress.steps, progress.loss) == ("starting", "0/0", None)
    assert "lastHeartbeatTime" in get(report, "/progress")


def test_progress_after_a_step_has_figures_and_time_left(report: Report) -> None:
    report.begin(Beginning(0, 10))
    report.step(point(1, loss=3.0))
    report.step(point(2, loss=2.5, seconds=1.5))
    progress = Progress.model_validate_json(get(report, "/progress"))
    assert (progress.stage, progress.steps, progress.percent, progress.loss) == ("training", "2/10", 20, 2.5)
    assert progress.tokens_per_second == 100.0
    assert (progress.eta_seconds, progress.remaining) == (8.0, "8s")
    assert progress.gradient_norm == 0.25
    assert progress.recent == report.curve


def test_progress_holds_the_newest_steps_of_this_attempt_only(report: Report) -> None:
    report.begin(Beginning(2, 100, 2, (point(1), point(2))))
    for step in range(3, 101):
        report.step(point(step))
    progress = Progress.model_validate_json(get(report, "/progress"))
    assert [each.step for each in progress.recent] == list(range(37, 101))
    assert len(report.curve) == 100


def test_metrics_carry_units_in_their_names_and_the_run_in_their_labels(report: Report) -> None:
    report.begin(Beginning(0, 10))
    report.step(point(1, loss=3.0))
    lines = get(report, "/metrics").splitlines()
    assert 'finetune_loss{name="run",namespace="default"} 3.0' in lines
    assert 'finetune_tokens_total{name="run",namespace="default"} 100.0' in lines
    assert 'finetune_stage_info{name="run",namespace="default",stage="training"} 1.0' in lines
    assert any(line.startswith("finetune_last_heartbeat_timestamp_seconds{") for line in lines)


def test_another_path_names_the_two_that_there_are(report: Report) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(report, "/")
    assert refused.value.code == 404
    assert "/progress and /metrics" in refused.value.read().decode()


def test_the_heartbeat_is_the_end_of_the_last_work_and_not_of_the_answer(report: Report) -> None:
    first = Progress.model_validate_json(get(report, "/progress"))
    report._start -= 1.0  # a second passes
    second = Progress.model_validate_json(get(report, "/progress"))
    assert second.last_heartbeat_time == first.last_heartbeat_time
    assert second.elapsed_seconds > first.elapsed_seconds
    report.heartbeat()
    assert Progress.model_validate_json(get(report, "/progress")).last_heartbeat_time > first.last_heartbeat_time


def test_the_address_is_gone_when_the_run_has_ended(report: Report) -> None:
    report.close()
    assert not (report.folder / "progress.json").exists()


def test_an_older_attempt_leaves_a_newer_ones_address_and_report(tmp_path: Path) -> None:
    newer, older = (Report(make_config(tmp_path / "out", attempt=attempt), rank=0) for attempt in (2, 1))
    older.serve()
    newer.serve()
    address = (tmp_path / "out" / "progress.json").read_text()
    newer.finish("0" * 16)
    older.close()
    older.fail("0" * 16, FailureReport(reason=Reason.PREEMPTED, message="attempt 2 has started", rank=0, exit_code=143))
    assert (tmp_path / "out" / "progress.json").read_text() == address
    assert RunReport.model_validate_json((tmp_path / "out" / "report.json").read_bytes()).succeeded
    newer.close()


def loopbacks() -> list[str]:
    """The loopback addresses of this machine: not every one has IPv6."""
    with socket.socket(socket.AF_INET6) if socket.has_dualstack_ipv6() else contextlib.nullcontext() as probe:
        has_both = probe is not None and probe.connect_ex(("::1", 9)) in (0, errno.ECONNREFUSED)
    return ["127.0.0.1", *(["[::1]"] if has_both else [])]


@pytest.mark.parametrize("loopback", loopbacks())
def test_all_addresses_are_those_of_both_families(loopback: str, tmp_path: Path) -> None:
    report = Report(make_config(tmp_path / "out", progressHost="0.0.0.0"), rank=0)
    report.serve()
    port = int(json.loads((report.folder / "progress.json").read_text())["address"].rpartition(":")[2])
    with urllib.request.urlopen(f"http://{loopback}:{port}/progress", timeout=10) as answer:
        assert Progress.model_validate_json(answer.read()).stage == "starting"
    report.close()


def test_all_addresses_of_a_machine_without_ipv6_are_those_of_ipv4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "EVERY_ADDRESS_OF_BOTH", "100::1")  # nobody's: cannot be bound, as nothing of IPv6 can on such a machine
    report = Report(make_config(tmp_path / "out", progressHost="0.0.0.0"), rank=0)
    report.serve()
    assert get(report, "/progress")
    report.close()


def test_a_port_in_use_is_refused_by_its_field(report: Report, tmp_path: Path) -> None:
    port = int(json.loads((report.folder / "progress.json").read_text())["address"].rpartition(":")[2])
    with pytest.raises(ConfigurationError, match=rf"run.progressPort: cannot serve progress on 127.0.0.1 port {port}: Address already in use"):
        Report(make_config(tmp_path / "other", progressPort=port), rank=0).serve()


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"run.outputDir: the output folder .*file/out cannot be written: Not a directory"):
        Report(make_config(tmp_path / "file" / "out"), rank=0).serve()


def test_ranks_above_zero_say_nothing_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(make_config(tmp_path / "out"), rank=1)
    report.serve()
    report.begin(Beginning(0, 1))
    report.note("never heard")
    report.step(point(1))
    report.finish("0" * 16)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


def test_a_line_is_printed_for_the_first_the_last_and_every_logging_step(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    report.begin(Beginning(0, 5))
    for step in range(1, 6):
        report.step(point(step))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/5", "2/5", "4/5", "5/5"]
    assert lines[1] == "step 2/5  loss 2.0000  lr 1.00e-04  grad norm 0.2500  200 tokens/s  2s left"


def test_a_note_is_said_once(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    report.note("packing has no effect")
    report.note("packing has no effect")
    assert capsys.readouterr().out.count("note: packing has no effect") == 1


def test_the_report_of_a_success_holds_the_whole_run(report: Report) -> None:
    report.begin(Beginning(3, 4, 3, (point(1), point(2), point(3))))
    report.step(point(4))
    report.rows({"read": 5, "dropped": 1, "trained": 4})
    report.result([Artifact(format="peft", path="/x", sha256="ab")], Verification(level="Adapter", passed=True, max_logit_difference=1e-6), [1.23456])
    report.finish("f" * 16)
    found = RunReport.model_validate_json((report.folder / "report.json").read_bytes())
    assert found.succeeded
    assert [each.step for each in found.curve] == [1, 2, 3, 4]
    assert (found.resumed_from_step, found.rows["dropped"], found.peak_memory_gib, found.identity) == (3, 1, [1.235], "f" * 16)
    assert found.artifacts[0].format == "peft"
    assert found.versions["torch"]
    assert (report.folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_of_a_failure_names_it_and_keeps_the_curve(tmp_path: Path) -> None:
    message = tmp_path / "termination"
    report = Report(make_config(tmp_path / "out", terminationMessagePath=str(message)), rank=0)
    report.serve()
    report.begin(Beginning(0, 9))
    report.step(point(1))
    report.fail("0" * 16, FailureReport(reason=Reason.NUMERIC, message="step 2: the loss is nan", rank=0, exit_code=14))
    report.close()
    found = RunReport.model_validate_json((tmp_path / "out" / "report.json").read_bytes())
    assert found.failure is not None
    assert (found.succeeded, found.failure.reason, len(found.curve)) == (False, Reason.NUMERIC, 1)
    assert json.loads(message.read_text())["failure"]["message"] == "step 2: the loss is nan"
    assert "curve" not in json.loads(message.read_text())


def test_a_written_file_is_never_seen_in_part(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    reports.write_atomically(path, b"one")
    reports.write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]


def test_metrics_leave_out_what_is_not_finite(report: Report) -> None:
    report._progress = Progress(last_heartbeat_time=datetime.now(UTC)).model_copy(update={"loss": math.nan})
    assert "finetune_loss{" not in get(report, "/metrics")


def test_neither_the_report_nor_the_start_of_a_rank_imports_torch() -> None:
    program = "import sys, finetune_trainer.report, finetune_trainer.launch, finetune_trainer.__main__; print([name for name in ('torch', 'megatron', 'transformers', 'matplotlib') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert result.stdout.strip() == "[]"
