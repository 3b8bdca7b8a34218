"""FineTuneJobs of a cluster as text for people: a table of many, a page of one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_operator.advice import ADVICE
from finetune_operator.describe import value_text
from finetune_operator.lifecycle import Pod
from finetune_operator.status import Condition, ConditionType, JobProgress, Phase, Status
from finetune_trainer.contract import format_duration

_STYLES = {Phase.RUNNING: "cyan", Phase.SUCCEEDED: "green", Phase.FAILED: "red", Phase.RESTARTING: "yellow"}
_SAID_BY_PHASE = frozenset((ConditionType.INITIALIZED, ConditionType.RUNNING, ConditionType.SUCCEEDED, ConditionType.READY, ConditionType.RECONCILING))
"""Conditions that say nothing, being true, that the head of the page does not."""
_SHORT = frozenset(("PHASE", "STEPS", "LOSS", "REMAINING", "ATTEMPT", "AGE", "NODE RANK", "STATE", "TYPE", "REASON"))
"""Columns that are never broken; in narrow terminals the others are."""
_DAY = 86400


@dataclass(frozen=True)
class JobView:
    """What a cluster knows of one job."""

    namespace: str
    name: str
    uid: str
    created: datetime
    spec: dict[str, Any]
    status: Status
    pods: tuple[Pod, ...] = ()
    being_deleted: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status.is_true(ConditionType.SUCCEEDED) or self.status.is_true(ConditionType.FAILED)


def jobs_table(jobs: Iterable[JobView], now: datetime, *, namespaces: bool) -> Table:
    """The columns of `kubectl get ftj`, with those of the namespace when jobs of several are shown."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="")
    for heading in (*(("NAMESPACE",) if namespaces else ()), "NAME", "PHASE", "STEPS", "LOSS", "REMAINING", "ATTEMPT", "AGE"):
        table.add_column(heading, no_wrap=heading in _SHORT, overflow="fold")
    for job in jobs:
        table.add_row(*((job.namespace,) if namespaces else ()), *_row(job, now))
    return table


def job_page(job: JobView, now: datetime) -> Group:
    """Everything about one job that a person may want to know, and what to do when it has failed."""
    sections = (
        _head(job, now),
        _progress(job, now),
        _attempts(job),
        _pods(job.pods),
        _conditions(job.status),
        _failure(job.status),
        _results(job.status),
        _chosen(job.status),
    )
    shown = [section for section in sections if section is not None]
    return Group(*(part for index, section in enumerate(shown) for part in ((Text(), section) if index else (section,))))


def age(since: datetime, now: datetime) -> str:
    """`31s`, `4m10s`, `2h05m`, `3d4h`."""
    seconds = max(0.0, (now - since).total_seconds())
    return format_duration(seconds) if seconds < _DAY else f"{int(seconds // _DAY)}d{int(seconds % _DAY // 3600)}h"


def phase_text(job: JobView) -> Text:
    """The phase, in its colour."""
    phase = job.status.phase or Phase.PENDING
    return Text("Deleting" if job.being_deleted else phase.value, style=_STYLES.get(phase, ""))


def _row(job: JobView, now: datetime) -> Iterator[Text | str]:
    progress = job.status.progress or JobProgress()
    yield job.name
    yield phase_text(job)
    yield progress.steps if job.status.progress else ""
    yield _number(progress.loss)
    yield progress.remaining or ""
    yield str(job.status.attempt or "")
    yield age(job.created, now)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _facts(rows: Iterable[tuple[str, RenderableType]]) -> Table:
    """Two columns: what, and what it is."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    return grid


def _section(title: str, body: RenderableType) -> Group:
    return Group(Text(title, style="bold"), Padding(body, (0, 0, 0, 2), expand=False))


def _columns(headings: Sequence[str], rows: Iterable[Sequence[RenderableType]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in headings:
        table.add_column(heading, no_wrap=heading in _SHORT, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _head(job: JobView, now: datetime) -> RenderableType:
    status = job.status
    title = Text.assemble((f"FineTuneJob {job.namespace}/{job.name}", "bold"), "   ", phase_text(job), "   ", _duration(job, now))
    rows: list[tuple[str, RenderableType]] = [
        ("model", Text(str(job.spec.get("model", {}).get("source", "")))),
        ("data", Text(", ".join(job.spec.get("data", {}).get("dataset", ())))),
        ("processes", Text(_processes(job.spec.get("nodes", {})))),
    ]
    ready = status.condition(ConditionType.READY)
    if ready is not None and ready.message:
        rows.append(("message", Text(ready.message)))
    if status.observed_generation is None:
        rows.append(("message", Text("no operator has seen this job yet: is one running, and does it serve this namespace?")))
    return Group(title, Padding(_facts(rows), (0, 0, 0, 2), expand=False))


def _duration(job: JobView, now: datetime) -> str:
    started, ended = job.status.start_time, job.status.completion_time
    if started is None:
        return f"made {age(job.created, now)} ago"
    return f"ran {age(started, ended)}" if ended else f"for {age(started, now)}"


def _processes(nodes: dict[str, Any]) -> str:
    accelerator = nodes.get("accelerator", {})
    resource = "CPU" if accelerator.get("type") == "CPU" else accelerator.get("resourceName", "nvidia.com/gpu")
    return f"{nodes.get('count', 1)} × {nodes.get('processesPerNode', 1)} (nodes × processes on each), {resource}"


def _progress(job: JobView, now: datetime) -> RenderableType | None:
    progress = job.status.progress
    if progress is None:
        return None
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        progress.stage, ProgressBar(total=max(progress.total_steps, 1), completed=progress.step, width=40), f"{progress.percent} %", f"step {progress.steps}"
    )
    figures = (
        ("loss", _number(progress.loss)),
        ("learning rate", _number(progress.learning_rate)),
        ("tokens/s", _number(progress.tokens_per_second)),
        ("left", progress.remaining or ""),
        ("heartbeat", f"{age(progress.last_heartbeat_time, now)} ago" if progress.last_heartbeat_time and not job.ended else ""),
    )
    return _section("Progress", Group(bar, Text("   ".join(f"{name} {value}" for name, value in figures if value))))


def _attempts(job: JobView) -> RenderableType | None:
    status = job.status
    if not status.attempt:
        return None
    restarts = status.restarts
    rows: list[tuple[str, RenderableType]] = [("attempt", str(status.attempt))]
    if restarts.total:
        limit = job.spec.get("runPolicy", {}).get("backoffLimit")
        counted = f"{restarts.counted} counted" + (f" of runPolicy.backoffLimit {limit}" if limit is not None else "")
        rows.append(("restarts", f"{restarts.total}, {counted}"))
        rows.append(("because of", ", ".join(f"{reason.reason} × {reason.count}" for reason in restarts.reasons)))
    return _section("Gang", _facts(rows))


def _pods(pods: Sequence[Pod]) -> RenderableType | None:
    if not pods:
        return None
    rows = [
        (pod.name, str(pod.node_rank), _pod_state(pod), pod.node or "", Text(pod.message)) for pod in sorted(pods, key=lambda pod: (pod.attempt, pod.node_rank))
    ]
    return _section("Pods", _columns(("NAME", "NODE RANK", "STATE", "NODE", "MESSAGE"), rows))


def _pod_state(pod: Pod) -> str:
    if pod.deletion is not None:
        return "Ending"
    if pod.phase == "Running" and pod.silent_since is not None:
        return "Silent"
    return f"{pod.phase} ({pod.exit_code})" if pod.phase == "Failed" and pod.exit_code is not None else pod.phase


def _conditions(status: Status) -> RenderableType | None:
    """Those that are true and say more than the phase, the failure or one another."""
    shown: list[Condition] = []
    told = {status.failure.reason} if status.failure else set()
    for condition in sorted(status.conditions, key=lambda condition: condition.type == ConditionType.STALLED):
        again = condition.type in (ConditionType.FAILED, ConditionType.STALLED) and condition.reason in told
        says_more = condition.type not in _SAID_BY_PHASE or condition.reason in ADVICE
        if condition.status == "True" and says_more and not again:
            shown.append(condition)
            told.add(condition.reason)
    if not shown:
        return None
    return _section("Conditions", _columns(("TYPE", "REASON", "MESSAGE"), [_condition_row(condition) for condition in shown]))


def _condition_row(condition: Condition) -> tuple[str, str, Text]:
    advice = ADVICE.get(condition.reason) if condition.type != ConditionType.RESTARTING else None
    sentences = [condition.message, *((f"What to do: {advice.action}.",) if advice else ())]
    return condition.type, condition.reason, Text("\n".join(sentence for sentence in sentences if sentence))


def _failure(status: Status) -> RenderableType | None:
    failure = status.failure
    if failure is None:
        return None
    places = ((failure.rank, f"rank {failure.rank}"), (failure.node, f"on {failure.node}"), (failure.exit_code, f"exit code {failure.exit_code}"))
    where = ", ".join(text for value, text in places if value is not None)
    rows: list[tuple[str, RenderableType]] = [("reason", failure.reason + (f" ({where})" if where else "")), ("message", Text(failure.message))]
    advice = ADVICE.get(failure.reason)
    if advice is not None:
        rows += [("means", f"{advice.meaning}."), ("what to do", f"{advice.action}.")]
    return _section("Failure" if status.is_true(ConditionType.FAILED) else "Last failure", _facts(rows))


def _results(status: Status) -> RenderableType | None:
    rows: list[tuple[str, RenderableType]] = [(artifact.format, Text(f"{artifact.path}  sha256 {artifact.sha256[:12]}")) for artifact in status.artifacts]
    verification = status.verification
    if verification is not None:
        difference = verification.max_logit_difference
        parts = (
            verification.level,
            "passed" if verification.passed else "NOT PASSED",
            f"largest difference of logits {difference:.3g}" if difference is not None else "",
        )
        rows.append(("verification", Text(", ".join(part for part in (*parts, verification.message) if part))))
    return _section("Results", _facts(rows)) if rows else None


def _chosen(status: Status) -> RenderableType | None:
    if not status.resolved:
        return None
    return _section("Chosen where the spec is silent", _facts((name, Text(value_text(value))) for name, value in status.resolved.items()))
