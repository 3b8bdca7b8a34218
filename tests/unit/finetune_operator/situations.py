"""Jobs, pods and moments for the tests of decisions: a job of two nodes, and what can be seen of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_operator import lifecycle
from finetune_operator.lifecycle import Decision
from finetune_operator.observed import Node, Observed, Pod
from finetune_operator.settings import Settings
from finetune_operator.status import Status
from finetune_trainer.contract import Artifact, FailureReport, Progress, Reason, RunReport, Verification
from jobs import make_job

START = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC)
SETTINGS = Settings()


def at(seconds: float) -> datetime:
    """So many seconds after the first gang was made."""
    return START + timedelta(seconds=seconds)


def pod(rank: int, attempt: int = 1, **fields: Any) -> Pod:
    """A pod of the job `tiny` that waits."""
    name = f"tiny-{attempt}-{rank}"
    return Pod(name=name, uid=f"uid-{name}", attempt=attempt, node_rank=rank, **fields)


def running(rank: int, attempt: int = 1, **fields: Any) -> Pod:
    values: dict[str, Any] = {"phase": "Running", "started": True, "node": f"node-{rank}", "address": f"10.0.0.{rank + 1}", **fields}
    return pod(rank, attempt, **values)


def succeeded(rank: int, attempt: int = 1, **fields: Any) -> Pod:
    values: dict[str, Any] = {"phase": "Succeeded", "node": f"node-{rank}", "exit_code": 0, "finished": at(100), **fields}
    return pod(rank, attempt, **values)


def failed(rank: int, exit_code: int | None, attempt: int = 1, **fields: Any) -> Pod:
    values: dict[str, Any] = {"phase": "Failed", "node": f"node-{rank}", "exit_code": exit_code, "finished": at(100), **fields}
    return pod(rank, attempt, **values)


def node(rank: int, silent: float | None = None, *, exists: bool = True) -> Node:
    """The Kubernetes node of a rank, silent since so many seconds after the start."""
    return Node(f"node-{rank}", exists, None if silent is None else at(silent))


def heard(stage: str = "training", step: int = 5, when: float = 30, **fields: Any) -> Progress:
    values: dict[str, Any] = {
        "total_steps": 20,
        "steps": f"{step}/20",
        "percent": 5 * step,
        "loss": 1.5,
        "learning_rate": 1e-4,
        "last_heartbeat_time": at(when),
        **fields,
    }
    return Progress.model_construct(stage=stage, step=step, **values)


def report(**fields: Any) -> RunReport:
    values: dict[str, Any] = {"name": "tiny", "namespace": "default", "uid": "u", "attempt": 1, "identity": "i", "succeeded": True}
    return RunReport(**values, start_time=START, completion_time=START).model_copy(update=fields)


def told_failure(reason: Reason, message: str, exit_code: int, rank: int = 3, host: str = "elsewhere") -> str:
    """The termination message of a trainer that failed; ``host`` is the host name of the node whose rank failed first."""
    failure = FailureReport(reason=reason, message=message, rank=rank, node=host, exit_code=exit_code)
    return report(succeeded=False, failure=failure).summary()


def told_success() -> str:
    """The termination message of a trainer that succeeded."""
    artifacts = [Artifact(format="peft", path="/work/default/tiny/u/peft", sha256="ab" * 32)]
    return report(artifacts=artifacts, verification=Verification(level="Adapter", passed=True), resolved={"training.lr": 1e-4}).summary()


def seen(status: Status, *pods: Pod, now: float = 0, spec: dict[str, Any] | None = None, **fields: Any) -> Observed:
    """What is observed of a job of two nodes; the trainer's clock is right unless `heartbeat_seen` is given."""
    heard_at = fields["progress"].last_heartbeat_time if fields.get("progress") is not None else None
    job = make_job(**{"nodes": {"count": 2}, **(spec or {})})
    return Observed(**{"now": at(now), "job": job, "generation": 1, "status": status, "pods": pods, "heartbeat_seen": heard_at, **fields})


def after(status: Status, *pods: Pod, **fields: Any) -> Status:
    """The status that is decided for what is observed."""
    return lifecycle.decide(seen(status, *pods, **fields), SETTINGS).status


ALL_RUN = (running(0), running(1))
NEW = Status()
PENDING = after(NEW)
"""The first gang was made at 0 s."""
LOADING = after(PENDING, *ALL_RUN, now=10)
TRAINING = after(LOADING, *ALL_RUN, now=20, progress=heard(when=20))
RESTARTING = after(TRAINING, running(0), running(1, deletion=at(130)), now=100)
"""Judged at 100 s: a pod was deleted."""
PREEMPTED = after(TRAINING, failed(0, 143), failed(1, 143), now=100)
SUSPENDED = after(TRAINING, now=100, spec={"suspend": True})
SUCCEEDED = after(TRAINING, succeeded(0, termination_message=told_success()), succeeded(1), now=100)
FAILED = after(TRAINING, failed(0, 10), running(1), now=100)


def policy(**fields: Any) -> dict[str, Any]:
    return {"runPolicy": fields}


@dataclass(frozen=True)
class Case:
    """One situation and the decision; what is not said is expected not to be decided. `delete` marks forced ones with `!`."""

    name: str
    observed: Observed
    phase: str | None = None
    ready: tuple[str, str, str] | None = None
    true: set[str] | None = None
    create: int | None = None
    missing: tuple[int, ...] = ()
    delete: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    again: float | None = None
    poll: str | None = None
    written: bool = True
    fields: dict[str, Any] = field(default_factory=dict)


def describe(decision: Decision) -> dict[str, Any]:
    return {
        "create": decision.create,
        "missing": decision.missing,
        "delete": tuple(f"{each.name}{'!' * each.force}" for each in decision.delete),
        "events": tuple(f"{each.type} {each.reason}: {each.message}" for each in decision.events),
        "again": decision.again_after,
        "poll": decision.poll,
    }


def conditions(status: Status, value: str = "True") -> set[str]:
    return {condition.type for condition in status.conditions if condition.status == value}


def find(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part)
    return value


def check(case: Case) -> None:
    """The decision is the expected one, whole."""
    decision = lifecycle.decide(case.observed, SETTINGS)
    status = decision.status
    expected = {"create": case.create, "missing": case.missing, "delete": case.delete, "events": case.events, "again": case.again, "poll": case.poll}
    assert describe(decision) == expected
    assert (status != case.observed.status) == case.written
    assert status.phase == (case.phase or status.phase)
    assert case.true in (None, conditions(status))
    ready = next(condition for condition in status.conditions if condition.type == "Ready")
    assert case.ready in (None, (ready.status, ready.reason, ready.message))
    assert {path: find(status, path) for path in case.fields} == case.fields


def check_again(case: Case) -> None:
    """The status survives the API server, and the same is not decided twice."""
    decision = lifecycle.decide(case.observed, SETTINGS)
    read_back = Status.model_validate_json(decision.status.model_dump_json(by_alias=True, exclude_none=True))
    assert read_back == decision.status
    if decision.create is None:
        assert lifecycle.decide(replace(case.observed, status=read_back), SETTINGS).status == decision.status
