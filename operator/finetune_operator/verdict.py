"""Why a gang has ended, if it has: out of what is seen of its pods, of their nodes and of rank 0's heartbeat. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from finetune_operator import names
from finetune_operator.observed import Observed, Pod
from finetune_operator.reported import read_failure, seconds_of
from finetune_operator.settings import Settings
from finetune_operator.status import Failure, OperatorReason, consequence_of
from finetune_trainer.contract import EXITS, Consequence, Reason

CONSEQUENCES = frozenset((Reason.DISTRIBUTED, Reason.HANG, Reason.PREEMPTED))
"""What a trainer tells when another node's has gone: the cause is looked for first."""
OUT_OF_MEMORY_KILL = "OOMKilled"
_LATEST = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Verdict:
    """Why a gang ended."""

    reason: str
    message: str
    rank: int | None = None
    """Rank of the process."""
    node: str | None = None
    """Kubernetes node."""
    exit_code: int | None = None
    finished: datetime | None = None
    """When its trainer ended, where that is known."""

    @property
    def consequence(self) -> Consequence:
        """What is done about it."""
        return consequence_of(self.reason)

    @property
    def failure(self) -> Failure:
        """As status has it."""
        return Failure(reason=self.reason, message=self.message, rank=self.rank, node=self.node, exit_code=self.exit_code)


@dataclass(frozen=True)
class Wait:
    """Nothing to judge yet; after these seconds there may be, though nothing happens."""

    seconds: float


def judge(observed: Observed, settings: Settings) -> Verdict | Wait | None:
    """Why gang `status.attempt` has ended; None when it has not, or a Wait.

    Of several findings the one that no restart would mend counts; then a pod that is gone, then a failure that is a pod's own,
    the earliest first; what only tells of another pod's end comes last, and waits a moment for its cause.
    """
    pods = {pod.node_rank: pod for pod in observed.gang}
    findings = [finding for finding in (_of_rank(rank, pods.get(rank), observed) for rank in range(observed.desired)) if finding is not None]
    if not findings:
        return _hang_or_wait(observed, settings)
    verdict = min(findings, key=_weight)
    wait = _wait_for_cause(verdict, findings, observed, settings)
    return Wait(wait) if wait > 0 else verdict


def _of_rank(rank: int, pod: Pod | None, observed: Observed) -> Verdict | None:
    """What is wrong with one node's pod; a deletion is judged before an exit code."""
    if pod is None:
        name = names.pod(observed.job.name, observed.status.attempt, rank) if observed.job else str(rank)
        return Verdict(OperatorReason.POD_DELETED, f"pod {name} is gone")
    if pod.deletion is not None or (pod.failed and pod.disrupted):
        return _taken_away(pod, observed)
    if pod.failed and pod.exit_code is not None:
        return _failed(pod)
    if not pod.succeeded and observed.lost_in(pod) == 0:
        return _node_lost(pod, observed)
    return _failed(pod) if pod.failed else None


def _taken_away(pod: Pod, observed: Observed) -> Verdict:
    if observed.lost_in(pod) == 0:
        return _node_lost(pod, observed)
    words = f": {pod.message}" if pod.message else ""
    where = f" from node {pod.node}" if pod.node else ""
    if pod.disrupted:
        return Verdict(OperatorReason.EVICTED, f"pod {pod.name} was evicted{where}{words}", node=pod.node, exit_code=pod.exit_code)
    return Verdict(OperatorReason.POD_DELETED, f"pod {pod.name} was deleted{words}", node=pod.node, exit_code=pod.exit_code)


def _node_lost(pod: Pod, observed: Observed) -> Verdict:
    node = observed.node_of(pod)
    if node is not None and node.exists:
        message = f"node {pod.node} of pod {pod.name} was not ready for {observed.policy.node_lost_seconds} s (runPolicy.nodeLostSeconds)"
    else:
        message = f"node {pod.node} of pod {pod.name} no longer exists"
    return Verdict(OperatorReason.NODE_LOST, message, node=pod.node)


def _failed(pod: Pod) -> Verdict:
    """The trainer's own words; where it left none its exit code; else Kubernetes' words."""
    told = read_failure(pod.termination_message)
    if _is_killed_for_memory(pod) and (told is None or told.reason is Reason.INTERNAL):
        return _about(pod, Reason.OUT_OF_MEMORY, _memory_message(pod))
    if told is not None:
        return _about(pod, told.reason, told.message or f"pod {pod.name} ended with exit code {pod.exit_code}", told.rank)
    row = next((row for row in EXITS if row.code == pod.exit_code), None)
    if row is not None:
        return _about(pod, row.reason, f"pod {pod.name} ended with exit code {row.code} and left no report")
    code = "" if pod.exit_code is None else f" with exit code {pod.exit_code}"
    return _about(pod, OperatorReason.POD_FAILED, f"pod {pod.name} failed{code}{': ' if pod.message else ''}{pod.message}")


def _about(pod: Pod, reason: str, message: str, rank: int | None = None) -> Verdict:
    return Verdict(reason, message, rank, pod.node, pod.exit_code, pod.finished)


def _is_killed_for_memory(pod: Pod) -> bool:
    return pod.message.startswith(OUT_OF_MEMORY_KILL)


def _memory_message(pod: Pod) -> str:
    return f"pod {pod.name} was killed because it used more host memory than its limit (OOMKilled); raise nodes.resources.limits.memory"


def _weight(verdict: Verdict) -> tuple[int, datetime]:
    """The least is the cause."""
    tests: tuple[Callable[[Verdict], bool], ...] = (
        lambda each: each.consequence is Consequence.PERMANENT,
        lambda each: each.reason == OperatorReason.NODE_LOST,
        lambda each: each.reason == OperatorReason.EVICTED,
        lambda each: each.reason == OperatorReason.POD_DELETED,
        lambda each: each.reason not in CONSEQUENCES,
    )
    place = next((index for index, test in enumerate(tests) if test(verdict)), len(tests))
    return place, verdict.finished or _LATEST


def _wait_for_cause(verdict: Verdict, findings: list[Verdict], observed: Observed, settings: Settings) -> float:
    """Seconds that a consequence waits for its cause: the culprit's launcher may end a moment later than its victims'."""
    ends = [finding.finished for finding in findings if finding.finished is not None]
    if verdict.reason not in CONSEQUENCES or not ends or all(pod.ended for pod in observed.gang):
        return 0.0
    return observed.seconds_until(min(ends), settings.cause_wait_seconds)


def _hang_or_wait(observed: Observed, settings: Settings) -> Verdict | Wait | None:
    """All pods are well as far as they can be seen: is a node silent, or the trainer?"""
    waits = [lost for lost in (observed.lost_in(pod) for pod in observed.gang if not pod.succeeded) if lost is not None]
    heartbeat = _last_heartbeat(observed) if all(pod.begun for pod in observed.gang) else None
    if heartbeat is not None:
        left = max(observed.seconds_until(heartbeat, observed.policy.progress_deadline_seconds), _seconds_to_ask(observed, settings))
        if left == 0:
            return _hang(observed, heartbeat)
        waits.append(left)
    return Wait(min(waits)) if waits else None


def _last_heartbeat(observed: Observed) -> datetime | None:
    """When the trainer was last known to work; None when it was never heard, or was not asked by this process and so cannot be called silent."""
    if observed.progress is not None:
        return observed.progress.last_heartbeat_time
    written = observed.status.progress
    return written.last_heartbeat_time if written is not None and observed.asked_since is not None else None


def _seconds_to_ask(observed: Observed, settings: Settings) -> float:
    """Seconds that rank 0 still has to answer a process that knows its heartbeat from the status only."""
    if observed.progress is not None or observed.asked_since is None:
        return 0.0
    return observed.seconds_until(observed.asked_since, settings.unanswered_seconds)


def _hang(observed: Observed, heartbeat: datetime) -> Verdict:
    told = observed.progress or observed.status.progress
    where = f"; it was at stage {told.stage}, step {told.steps}" if told is not None else ""
    deadline = observed.policy.progress_deadline_seconds
    node = next((pod.node for pod in observed.gang if pod.node_rank == 0), None)
    message = f"the trainer has shown no progress since {seconds_of(heartbeat):%Y-%m-%dT%H:%M:%SZ}, for {deadline} s (runPolicy.progressDeadlineSeconds){where}"
    return Verdict(Reason.HANG, message, node=node)
