"""What the status says in each state that a job can be in: phase, conditions, times, counters. Pure.

Ready, Reconciling and Stalled are kstatus's: Ready is True when the cluster has done its part (all pods run, the job has
succeeded, or its user has suspended it), Reconciling and Stalled are absent, not False, when they do not hold.
A status that says what it said before is equal to what it was: times change with what they tell of only.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from finetune_operator.observed import Pod, Refusal
from finetune_operator.reported import Result, cut_message, finish_progress, seconds_of
from finetune_operator.status import Condition, ConditionReason, ConditionType, Failure, OperatorReason, Phase, PodCounts, ReasonCount, Restarts, Status

Model = TypeVar("Model", bound=BaseModel)
CHECKPOINTING = "the pods of the last gang write a checkpoint and end"


def set_condition(status: Status, kind: ConditionType, value: bool, reason: str, message: str, now: datetime) -> Status:
    """The status with a condition; its lastTransitionTime stays while its value does."""
    word: Literal["True", "False"] = "True" if value else "False"
    old = status.condition(kind)
    since = old.last_transition_time if old is not None and old.status == word else seconds_of(now)
    generation = old.observed_generation if old is not None else None
    new = Condition(type=kind.value, status=word, reason=str(reason), message=cut_message(message), last_transition_time=since, observed_generation=generation)
    if old is None:
        return _with(status, conditions=[*status.conditions, new])
    return _with(status, conditions=[new if condition is old else condition for condition in status.conditions])


def drop(status: Status, *kinds: ConditionType) -> Status:
    """The status without some conditions."""
    return _with(status, conditions=[condition for condition in status.conditions if condition.type not in kinds])


def lower(status: Status, kinds: Sequence[ConditionType], reason: str, message: str, now: datetime) -> Status:
    """The status in which no condition of these is True; those that never were stay absent."""
    for kind in kinds:
        if status.is_true(kind):
            status = set_condition(status, kind, False, reason, message, now)
    return status


def stamp(status: Status, generation: int) -> Status:
    """The status as decided for this generation of the spec; each decision weighs every condition anew."""
    conditions = [_with(condition, observed_generation=generation) for condition in status.conditions]
    return _with(status, observed_generation=generation, conditions=conditions)


def count_pods(desired: int, pods: Sequence[Pod], *, stopped: bool = False) -> PodCounts:
    """How many of a gang's pods run and have ended; when it is being stopped none counts as running."""
    running = 0 if stopped else sum(pod.started and not pod.ended for pod in pods)
    return PodCounts(desired=desired, running=running, succeeded=sum(pod.succeeded for pod in pods), failed=sum(pod.failed for pod in pods))


def waiting_message(desired: int, pods: Sequence[Pod]) -> str:
    """Why not all pods run."""
    words = next((f"pod {pod.name}: {pod.message}" for pod in pods if not pod.begun and pod.message), None)
    return words or f"waiting for {_pods(desired)} to run"


def starting(status: Status, counts: PodCounts, message: str, now: datetime) -> Status:
    """Not every pod's trainer runs yet."""
    status = _with(status, phase=Phase.PENDING, pods=counts)
    status = set_condition(status, ConditionType.INITIALIZED, False, ConditionReason.WAITING_FOR_PODS, "", now)
    status = set_condition(status, ConditionType.RUNNING, False, ConditionReason.WAITING_FOR_PODS, "", now)
    return _reconciling(status, ConditionReason.WAITING_FOR_PODS, message, now)


def made(status: Status, attempt: int, counts: PodCounts, message: str, now: datetime) -> Status:
    """A new gang is there, and nothing of it runs yet."""
    status = _with(status, attempt=attempt, start_time=status.start_time or seconds_of(now), progress=None)
    status = lower(status, [ConditionType.SUSPENDED], ConditionReason.RESUMED, f"gang {attempt} has been made", now)
    made_kinds = [ConditionType.RESTARTING, ConditionType.NAME_CONFLICT]
    status = lower(status, made_kinds, ConditionReason.CREATED, f"gang {attempt} has been made", now)
    return starting(drop(status, ConditionType.STATUS_INCOMPLETE), counts, message, now)


def running(status: Status, counts: PodCounts, *, loaded: bool, silent: str | None = None, now: datetime) -> Status:
    """Every pod's trainer runs, or has ended well while others still run; ``silent``: where it was asked for its progress in vain."""
    here = f"{_pods(counts.desired)} run" if counts.desired > 1 else "the pod runs"
    reason = ConditionReason.TRAINING if loaded else ConditionReason.LOADING
    message = here if loaded else f"{here}; model and data are being loaded"
    status = _with(status, phase=Phase.RUNNING if loaded else Phase.INITIALIZING, pods=counts)
    status = set_condition(status, ConditionType.INITIALIZED, loaded, reason, "", now)
    status = set_condition(status, ConditionType.RUNNING, True, ConditionReason.TRAINING, "", now)
    if silent is not None:
        return _reconciling(status, ConditionReason.UNANSWERED, f"{here}; rank 0 at {silent} does not answer; is there a NetworkPolicy?", now)
    return _settled(status, True, ConditionReason.TRAINING, message, now)


def restarting(status: Status, failure: Failure, counts: PodCounts, *, counted: bool, now: datetime) -> Status:
    """A gang has ended and another is to follow."""
    message = f"gang {status.attempt} ended: {failure.reason}: {failure.message}"
    restarts = _count_restart(status.restarts, failure.reason, counted)
    status = _with(status, phase=Phase.RESTARTING, pods=counts, failure=failure, restarts=restarts)
    status = set_condition(status, ConditionType.RESTARTING, True, failure.reason, message, now)
    status = lower(status, [ConditionType.RUNNING], ConditionReason.RESTARTING, "", now)
    return _reconciling(status, ConditionReason.RESTARTING, message, now)


def suspended(status: Status, counts: PodCounts, *, ending: bool, now: datetime) -> Status:
    """The user wants no gang; `ending`: pods of the last one are still there."""
    lowered = [ConditionType.RUNNING, ConditionType.RESTARTING, ConditionType.NAME_CONFLICT]
    status = _with(status, phase=Phase.SUSPENDED, pods=counts, start_time=None)
    status = set_condition(status, ConditionType.SUSPENDED, True, ConditionReason.SUSPENDED, "spec.suspend is true", now)
    status = lower(status, lowered, ConditionReason.SUSPENDED, "", now)
    if ending:
        return _reconciling(status, ConditionReason.WAITING_FOR_OLD_PODS, CHECKPOINTING, now)
    return _settled(status, True, ConditionReason.SUSPENDED, "suspended by spec.suspend", now)


def waiting_for_old_pods(status: Status, message: str, now: datetime) -> Status:
    """The next gang is wanted, but pods of an earlier one, or of an earlier job of this name, are still there."""
    phase = Phase.RESTARTING if status.is_true(ConditionType.RESTARTING) else Phase.PENDING
    return _reconciling(_with(status, phase=phase), ConditionReason.WAITING_FOR_OLD_PODS, message, now)


def retrying(status: Status, message: str, now: datetime) -> Status:
    """The operator cannot do its part for now, whatever that is; all else stands as it was last known."""
    words = f"the operator fails to act on this job and tries again: {message}"
    return set_condition(drop(status, ConditionType.STALLED), ConditionType.RECONCILING, True, ConditionReason.RETRYING, words, now)


def refused(status: Status, refusal: Refusal, now: datetime) -> Status:
    """The next gang is wanted, but a child of it could not be made."""
    if refusal.kind == "Leftover":
        return waiting_for_old_pods(_without_conflict(status, now), refusal.message, now)
    phase = Phase.RESTARTING if status.is_true(ConditionType.RESTARTING) else Phase.PENDING
    status = _with(status, phase=phase)
    if refusal.kind == "NameConflict":
        status = set_condition(status, ConditionType.NAME_CONFLICT, True, OperatorReason.NAME_CONFLICT, refusal.message, now)
        return _stalled(status, OperatorReason.NAME_CONFLICT, refusal.message, now)
    return _reconciling(_without_conflict(status, now), ConditionReason.CREATION_REFUSED, refusal.message, now)


def succeeded(status: Status, result: Result, counts: PodCounts, now: datetime) -> Status:
    """Every pod of the gang has ended well."""
    told = {"artifacts": result.artifacts, "verification": result.verification, "resolved": status.resolved or result.resolved}
    status = _with(status, phase=Phase.SUCCEEDED, pods=counts, progress=finish_progress(status.progress), completion_time=seconds_of(now), **told)
    status = set_condition(status, ConditionType.SUCCEEDED, True, ConditionReason.SUCCEEDED, result.message, now)
    status = lower(status, [ConditionType.RUNNING], ConditionReason.SUCCEEDED, "", now)
    return _settled(status, True, ConditionReason.SUCCEEDED, result.message, now)


def failed(status: Status, reason: str, message: str, failure: Failure, counts: PodCounts, now: datetime) -> Status:
    """The job has ended without success; `failure` is of its last gang, `reason` why there is no other."""
    status = _with(status, phase=Phase.FAILED, pods=counts, failure=failure, completion_time=seconds_of(now))
    if reason == OperatorReason.INVALID_SPEC:
        status = set_condition(status, ConditionType.INVALID_SPEC, True, reason, message, now)
    status = set_condition(status, ConditionType.FAILED, True, reason, message, now)
    lowered = [ConditionType.RUNNING, ConditionType.RESTARTING, ConditionType.SUSPENDED, ConditionType.NAME_CONFLICT]
    status = lower(status, lowered, ConditionReason.FAILED, "", now)
    return _stalled(status, ConditionReason.FAILED, f"{reason}: {message}", now)


def incomplete(status: Status, names: Sequence[str], now: datetime) -> Status:
    """The status with the names of numbers that had to be left out, if any."""
    if not names:
        return drop(status, ConditionType.STATUS_INCOMPLETE)
    message = f"left out of progress because not finite: {', '.join(names)}"
    return set_condition(status, ConditionType.STATUS_INCOMPLETE, True, ConditionReason.NOT_FINITE, message, now)


def _reconciling(status: Status, reason: str, message: str, now: datetime) -> Status:
    status = set_condition(status, ConditionType.READY, False, reason, message, now)
    return set_condition(drop(status, ConditionType.STALLED), ConditionType.RECONCILING, True, reason, message, now)


def _stalled(status: Status, reason: str, message: str, now: datetime) -> Status:
    status = set_condition(status, ConditionType.READY, False, reason, message, now)
    return set_condition(drop(status, ConditionType.RECONCILING), ConditionType.STALLED, True, reason, message, now)


def _settled(status: Status, value: bool, reason: str, message: str, now: datetime) -> Status:
    return drop(set_condition(status, ConditionType.READY, value, reason, message, now), ConditionType.RECONCILING, ConditionType.STALLED)


def _without_conflict(status: Status, now: datetime) -> Status:
    return lower(status, [ConditionType.NAME_CONFLICT], ConditionReason.CREATED, "", now)


def _count_restart(restarts: Restarts, reason: str, counted: bool) -> Restarts:
    counts = {each.reason: each.count for each in restarts.reasons}
    counts[reason] = counts.get(reason, 0) + 1
    reasons = [ReasonCount(reason=each, count=count) for each, count in counts.items()]
    return Restarts(total=restarts.total + 1, counted=restarts.counted + counted, reasons=reasons)


def _pods(count: int) -> str:
    return "1 pod" if count == 1 else f"{count} pods"


def _with(model: Model, **fields: Any) -> Model:
    return model.model_copy(update=fields)
