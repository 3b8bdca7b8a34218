"""Why a gang has ended, if it has: out of what is seen of its pods, of their nodes and of rank 0's heartbeat. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from finetune_operator import names
from finetune_operator.observed import Observed, Pod
from finetune_operator.reported import cut_message, read_failure, seconds_of
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
        return Failure(reason=self.reason, message=cut_message(self.message), rank=self.rank, node=self.node, exit_code=self.exit_code)


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
        name = names.pod(observed.job.name, observed.status.attempt, rank) if observed.job else f"of node {rank}"
        return Verdict(OperatorReason.POD_DELETED, f"pod {name} is gone")
    if pod.deletion is not None or (pod.failed and pod.disrupted):
        return _taken_away(pod, observed)
    if pod.failed and pod.exit_code is not None:
        return _failed(pod, observed)
    if not pod.succeeded and observed.lost_in(pod) == 0:
        return _node_lost(pod, observed)
    return _failed(pod, observed) if pod.failed else None


def _taken_away(pod: Pod, observed: Observed) -> Verdict:
    """A silent node's pods are deleted by Kubernetes itself (after 300 s by default): that is the node's loss, unless its kubelet has told of the pod's end."""
    lost = observed.lost_in(pod)
    if lost == 0 or (lost is not None and not pod.ended):
        return _node_lost(pod, observed)
    words = f": {pod.message}" if pod.message else ""
    where = f" from node {pod.node}" if pod.node else ""
    if pod.disrupted:
        return Verdict(OperatorReason.EVICTED, f"pod {pod.name} was evicted{where}{words}", node=pod.node, exit_code=pod.exit_code)
    return Verdict(OperatorReason.POD_DELETED, f"pod {pod.name} was deleted{words}", node=pod.node, exit_code=pod.exit_code)


def _node_lost(pod: Pod, observed: Observed) -> Verdict:
    node = observed.node_of(pod)
    if node is not None and node.exists and observed.lost_in(pod):
        message = f"node {pod.node} of pod {pod.name} is not ready, and the pod was taken away from it"
    elif node is not None and node.exists:
        message = f"node {pod.node} of pod {pod.name} was not ready for {observed.policy.node_lost_seconds} s (runPolicy.nodeLostSeconds)"
    else:
        message = f"node {pod.node} of pod {pod.name} no longer exists"
    return Verdict(OperatorReason.NODE_LOST, message, node=pod.node)


def _failed(pod: Pod, observed: Observed) -> Verdict:
    """The trainer's own words, which every node's launcher has of the one that failed first; where it left none its exit code; else Kubernetes' words."""
    told = read_failure(pod.termination_message)
    if _is_killed_for_memory(pod) and (told is None or told.reason is Reason.INTERNAL):
        return _about(pod, Reason.OUT_OF_MEMORY, _memory_message(pod))
    if told is not None:
        culprit = next((each for each in observed.gang if observed.job is not None and names.host(observed.job.name, each.node_rank) == told.host), pod)
        message = told.message or f"pod {culprit.name} ended with exit code {culprit.exit_code}"
        return Verdict(told.reason, message, told.rank, culprit.node, pod.exit_code, pod.finished)
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
    return min(observed.seconds_until(min(ends), settings.cause_wait_seconds), settings.cause_wait_seconds)  # a kubelet's clock may be ahead


def _hang_or_wait(observed: Observed, settings: Settings) -> Verdict | Wait | None:
    """All pods are well as far as they can be seen: is a node silent, or the trainer, or does one not follow node 0 that has ended?"""
    waits = [lost for lost in (observed.lost_in(pod) for pod in observed.gang if not pod.succeeded) if lost is not None]
    first = observed.gang[0]
    finished = first.finished if first.succeeded else None
    left = _seconds_to_hang(observed, settings) if finished is None else _seconds_to_follow(observed, finished)
    if left == 0:
        return _hang(observed) if finished is None else _hang_at_exit(observed, finished)
    waits += [] if left is None else [left]
    return Wait(min(waits)) if waits else None


def _seconds_to_follow(observed: Observed, finished: datetime) -> float | None:
    """Seconds that the others have left to end after node 0, which nobody can ask any more; None when all have ended."""
    if all(pod.ended for pod in observed.gang):
        return None
    return observed.seconds_until(finished, observed.policy.progress_deadline_seconds)


def _hang_at_exit(observed: Observed, finished: datetime) -> Verdict:
    left = [pod for pod in observed.gang if not pod.ended]
    late = f"pod{'s' * (len(left) > 1)} {', '.join(pod.name for pod in left)} did not end within {observed.policy.progress_deadline_seconds} s after that"
    message = f"node 0 ended well at {seconds_of(finished):%Y-%m-%dT%H:%M:%SZ}, but {late} (runPolicy.progressDeadlineSeconds)"
    return Verdict(Reason.HANG, message, node=left[0].node)


def _seconds_to_hang(observed: Observed, settings: Settings) -> float | None:
    """Seconds until the trainer counts as hanging, 0 when it does; None when it was never heard, or not all of it has begun.

    A heartbeat may not be older than the deadline. The trainer's clock may be wrong: one that looks too old has a moment to change, and one that looks too young is
    too old when it has not changed for so long by the clock of this process. After a restart of this process a trainer has the same moment to answer.
    """
    if not all(pod.begun for pod in observed.gang):
        return None
    deadline, moment = observed.policy.progress_deadline_seconds, settings.unanswered_seconds
    if observed.progress is not None:
        seen = observed.heartbeat_seen or observed.asked_since or observed.now
        looks_old = max(observed.seconds_until(observed.progress.last_heartbeat_time, deadline), observed.seconds_until(seen, min(moment, deadline)))
        return min(looks_old, observed.seconds_until(seen, deadline))
    written = observed.status.progress
    if written is None or written.last_heartbeat_time is None or observed.asked_since is None:
        return None
    return max(observed.seconds_until(written.last_heartbeat_time, deadline), observed.seconds_until(observed.asked_since, moment))


def _hang(observed: Observed) -> Verdict:
    told = observed.progress or observed.status.progress
    times = [told.last_heartbeat_time if told is not None else None, observed.heartbeat_seen if observed.progress is not None else None]
    since = min(time for time in times if time is not None)
    where = f"; it was at stage {told.stage}, step {told.steps}" if told is not None else ""
    deadline = observed.policy.progress_deadline_seconds
    node = next((pod.node for pod in observed.gang if pod.node_rank == 0), None)
    message = f"the trainer has shown no progress since {seconds_of(since):%Y-%m-%dT%H:%M:%SZ}, for {deadline} s (runPolicy.progressDeadlineSeconds){where}"
    return Verdict(Reason.HANG, message, node=node)
