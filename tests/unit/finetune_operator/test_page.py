"""What `finetune status` shows of a cluster's jobs."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console, RenderableType

from finetune_operator.advice import ADVICE
from finetune_operator.lifecycle import Pod
from finetune_operator.page import JobView, age, job_page, jobs_table
from finetune_operator.status import REASONS, Status

NOW = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC)
SPEC: dict[str, Any] = {
    "model": {"source": "Qwen/Qwen2.5-7B-Instruct"},
    "data": {"dataset": ["swift/self-cognition#500", "./more.jsonl"]},
    "nodes": {"count": 2, "processesPerNode": 4, "accelerator": {"type": "GPU"}},
    "runPolicy": {"backoffLimit": 3},
}
PROGRESS = {
    "stage": "training",
    "step": 42,
    "totalSteps": 93,
    "steps": "42/93",
    "percent": 45,
    "loss": 1.234,
    "learningRate": 8e-5,
    "tokensPerSecond": 5500,
    "etaSeconds": 31,
    "remaining": "31s",
    "lastHeartbeatTime": "2026-05-04T11:59:56Z",
}


def condition(kind: str, reason: str, message: str = "", status: str = "True") -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": "2026-05-04T11:00:00Z"}


def job(name: str = "robin", *, pods: tuple[Pod, ...] = (), spec: dict[str, Any] | None = None, **status: Any) -> JobView:
    """A job that was made two hours ago."""
    known = Status.model_validate({"observedGeneration": 1, **status})
    return JobView("team-a", name, "7c0e", NOW - timedelta(hours=2, minutes=5), spec or SPEC, known, pods)


def text(renderable: RenderableType, width: int = 160) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(renderable)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def page(view: JobView, width: int = 160) -> str:
    return "\n".join(text(job_page(view, NOW), width))


def words(line: str) -> list[str]:
    return line.split()


def test_table_has_the_columns_of_kubectl() -> None:
    running = job(phase="Running", attempt=2, progress=PROGRESS)
    new = JobView("team-a", "new", "1", NOW - timedelta(seconds=7), SPEC, Status())
    lines = text(jobs_table([running, new], NOW, namespaces=False))
    assert [words(line) for line in lines] == [
        ["NAME", "PHASE", "STEPS", "LOSS", "REMAINING", "ATTEMPT", "AGE"],
        ["robin", "Running", "42/93", "1.234", "31s", "2", "2h05m"],
        ["new", "Pending", "7s"],
    ]
    assert words(text(jobs_table([running], NOW, namespaces=True))[1])[:2] == ["team-a", "robin"]


def test_page_of_a_running_job_says_how_far_it_is() -> None:
    pods = (Pod("robin-2-1", "b", 2, 1, node="node-b"), Pod("robin-2-0", "a", 2, 0, phase="Running", started=True, node="node-a"))
    shown = page(
        job(
            phase="Running",
            attempt=2,
            startTime="2026-05-04T10:00:00Z",
            progress=PROGRESS,
            pods=pods,
            restarts={"total": 3, "counted": 1, "reasons": [{"reason": "NodeLost", "count": 1}, {"reason": "Evicted", "count": 2}]},
            resolved={"training.microBatchSize": 4, "model.torchDtype": "bfloat16"},
        )
    )
    assert "FineTuneJob team-a/robin   Running   for 2h00m" in shown
    assert "Qwen/Qwen2.5-7B-Instruct" in shown
    assert "2 × 4 (nodes × processes on each), nvidia.com/gpu" in shown
    assert "loss 1.234   learning rate 8e-05   tokens/s 5500   left 31s   heartbeat 4s ago" in shown
    assert "45 %  step 42/93" in shown
    assert "3, 1 counted of runPolicy.backoffLimit 3" in shown
    assert "NodeLost × 1, Evicted × 2" in shown
    assert shown.index("robin-2-0") < shown.index("robin-2-1")
    assert words(next(line for line in shown.splitlines() if "robin-2-0" in line)) == ["robin-2-0", "0", "Running", "node-a"]
    assert "model.torchDtype         bfloat16" in shown


def test_page_of_a_failed_job_says_what_to_do() -> None:
    failure = {"reason": "OutOfMemory", "message": "CUDA out of memory [rank 3]", "rank": 3, "node": "node-b", "exitCode": 15}
    shown = page(job(phase="Failed", conditions=[condition("Failed", "OutOfMemory", "CUDA out of memory")], failure=failure))
    assert "OutOfMemory (rank 3, on node-b, exit code 15)" in shown
    assert "CUDA out of memory [rank 3]" in shown  # brackets are not rich's markup
    assert "Lower training.microBatchSize" in shown
    assert "Last failure" not in shown


def test_failure_of_an_earlier_gang_is_the_last_failure() -> None:
    shown = page(job(phase="Running", attempt=2, failure={"reason": "NodeLost", "message": "node-b is silent"}))
    assert "Last failure" in shown
    assert "NodeLost\n" in shown


def test_page_of_a_succeeded_job_says_where_the_results_are() -> None:
    done = job(
        phase="Succeeded",
        startTime="2026-05-04T10:00:00Z",
        completionTime="2026-05-04T10:30:00Z",
        conditions=[condition("Succeeded", "Succeeded"), condition("Ready", "Succeeded", "93 steps in 30m")],
        artifacts=[{"format": "peft", "path": "/work/team-a/robin/7c0e/peft", "sha256": "0123456789abcdef"}],
        verification={"level": "Adapter", "passed": True, "maxLogitDifference": 1.1e-6},
    )
    shown = page(done)
    assert done.ended
    assert "ran 30m00s" in shown
    assert "93 steps in 30m" in shown
    assert "/work/team-a/robin/7c0e/peft  sha256 0123456789ab" in shown
    assert "Adapter, passed, largest difference of logits 1.1e-06" in shown


def test_verification_that_failed_is_not_overlooked() -> None:
    shown = page(job(verification={"level": "Logits", "passed": False, "maxLogitDifference": 3.0, "message": "rows 3 and 8 differ"}))
    assert "Logits, NOT PASSED, largest difference of logits 3, rows 3 and 8 differ" in shown


def test_only_conditions_that_say_more_than_the_phase_are_shown() -> None:
    conditions = [
        condition("Running", "Training"),
        condition("Ready", "Training", "step 42/93"),
        condition("Suspended", "Resumed", status="False"),
        condition("NameConflict", "NameConflict", "Service robin is not this job's"),
    ]
    shown = page(job(phase="Pending", conditions=conditions))
    assert "Service robin is not this job's" in shown
    assert "What to do: Delete or rename the object that the message names" in shown
    assert "Suspended" not in shown
    assert [words(line)[0] for line in shown.splitlines() if "NameConflict" in line] == ["NameConflict"]


def test_job_that_no_operator_has_seen_says_so() -> None:
    view = JobView("team-a", "new", "1", NOW - timedelta(seconds=7), SPEC, Status())
    assert "no operator has seen this job yet" in page(view)
    assert "made 7s ago" in page(view)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"phase": "Failed", "exit_code": 15}, "Failed (15)"),
        ({"phase": "Failed"}, "Failed"),
        ({"phase": "Running", "started": True, "silent_since": NOW}, "Silent"),
        ({"phase": "Running", "deletion": NOW}, "Ending"),
        ({"phase": "Pending", "message": "ImagePullBackOff: nowhere/trainer"}, "Pending"),
    ],
)
def test_state_of_a_pod(changes: dict[str, Any], state: str) -> None:
    pod = replace(Pod("robin-1-0", "a", 1, 0), **changes)
    line = next(line for line in page(job(pods=(pod,))).splitlines() if "robin-1-0" in line)
    assert line.strip().startswith(f"robin-1-0  0          {state}")
    assert line.endswith(pod.message or state)


def test_job_that_waits_for_its_administrator_says_what_to_do() -> None:
    conditions = [condition("Reconciling", "CreationRefused", "exceeded quota"), condition("Ready", "CreationRefused", "exceeded quota", status="False")]
    assert "What to do: Do what the message says; the operator tries again by itself." in page(job(phase="Pending", conditions=conditions))
    assert "Conditions" not in page(job(phase="Pending", conditions=[condition("Reconciling", "WaitingForPods", "waiting for 2 pods to run")]))


def test_what_the_failure_says_is_not_said_again() -> None:
    conditions = [condition("Stalled", "BackoffLimitExceeded", "twice"), condition("Failed", "BackoffLimitExceeded", "4 gangs failed")]
    failure = {"reason": "Distributed", "message": "rank 1 is gone"}
    shown = page(job(phase="Failed", conditions=conditions, failure=failure))
    assert [words(line)[:2] for line in shown.splitlines() if "BackoffLimitExceeded" in line] == [["Failed", "BackoffLimitExceeded"]]
    assert "What to do: Read status.restarts.reasons" in shown
    same = page(job(phase="Failed", conditions=[condition("Failed", "Data"), condition("Stalled", "Data")], failure={"reason": "Data", "message": "row 3"}))
    assert "Conditions" not in same


def test_names_of_any_length_stay_whole_in_a_narrow_terminal() -> None:
    name, node = "q" * 52, "ip-10-0-0-1.some-region.compute.internal"
    view = job(name, phase="Running", pods=(Pod(f"{name}-1-0", "a", 1, 0, phase="Running", node=node),))
    pods = page(view, width=80).split("Pods\n")[1]
    assert pods.count("q") == 52
    assert "…" not in pods
    assert "\n".join(text(jobs_table([view], NOW, namespaces=False), 80)).count("q") == 52


def test_long_words_are_folded_not_cut() -> None:
    sha, path = "f" * 64, "/work/" + "x" * 150
    shown = page(job(artifacts=[{"format": "peft", "path": path, "sha256": sha}]), width=60)
    assert path in shown.replace("\n", "").replace(" ", "")


def test_deleted_job_says_so() -> None:
    assert "Deleting" in page(replace(job(phase="Running"), being_deleted=True))


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-3, "0s"), (0, "0s"), (59, "59s"), (250, "4m10s"), (7500, "2h05m"), (86399, "23h59m"), (3 * 86400 + 4 * 3600 + 5, "3d4h")]
)
def test_age(seconds: int, shown: str) -> None:
    assert age(NOW - timedelta(seconds=seconds), NOW) == shown


def test_every_reason_for_which_a_job_ends_has_advice() -> None:
    assert set(REASONS) <= set(ADVICE)
    sentences = [sentence for advice in ADVICE.values() for sentence in (advice.meaning, advice.action)]
    assert all(sentence and not sentence.endswith(".") and sentence[0].isupper() for sentence in sentences)
