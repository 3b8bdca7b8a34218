"""What happens next to a job: a pure function of what was observed. Nothing is remembered between two decisions but the job's status.

The order in which a decision is carried out makes it safe to die anywhere:

* A gang is made children first; the status patch that raises `attempt` comes last. So a missing pod of gang `attempt + 1` is one
  that is still to be made, and a missing pod of gang `attempt` is one that somebody deleted.
* A gang's end is written (Restarting, Suspended, Succeeded or Failed) before its pods are deleted: every gang is judged once.
* The next gang is made when no pod of an earlier one is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from finetune_operator import conditions
from finetune_operator.observed import Node, Observed, Pod, Refusal
from finetune_operator.reported import LOADED_STAGES, finite, read_result, round_progress
from finetune_operator.settings import Settings
from finetune_operator.status import ConditionType, Failure, OperatorReason, PodCounts, Status, consequence_of
from finetune_operator.verdict import Verdict, Wait, judge
from finetune_trainer.contract import Consequence

__all__ = ["Decision", "Deletion", "Event", "Node", "Observed", "Pod", "Refusal", "decide"]

EVENT_MESSAGE_LIMIT = 1024


@dataclass(frozen=True)
class Deletion:
    """One pod to delete, this one only (a precondition on its uid)."""

    name: str
    uid: str
    force: bool = False
    """Without waiting for its kubelet: its node is lost."""


@dataclass(frozen=True)
class Event:
    """One Kubernetes Event about the job; its name is made of job, attempt and reason, so that it is told once."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """What to do, in this order: make the gang, write the status, tell events, delete pods."""

    status: Status
    """The whole status as it should be; equal to the observed one where nothing changed (then nothing is written)."""
    create: int | None = None
    """Attempt of the gang whose Service, claim and missing pods are to be made, before the status is written."""
    missing: tuple[int, ...] = ()
    """Node ranks of that gang that have no pod yet."""
    delete: tuple[Deletion, ...] = ()
    events: tuple[Event, ...] = ()
    again_after: float | None = None
    """Seconds after which time alone may change the decision; None: only what happens can."""
    poll: str | None = None
    """Address of the pod whose /progress is to be asked; None: nobody's."""


def decide(observed: Observed, settings: Settings) -> Decision:
    """What to do about a job now: the answer of the first rule that has one."""
    return next(decision for decision in (rule(observed, settings) for rule in RULES) if decision is not None)


def _when_it_has_ended(observed: Observed, settings: Settings) -> Decision | None:
    """Succeeded and Failed are for ever; only pods are cleaned up."""
    if not _has_ended(observed.status):
        return None
    return _answer(observed, settings, observed.status, remove=_pods_to_clean(observed, has_failed=observed.status.is_true(ConditionType.FAILED)))


def _when_it_is_invalid(observed: Observed, settings: Settings) -> Decision | None:
    """A spec that cannot be carried out is never tried again: most of it cannot be changed. One that was carried out before is not at fault."""
    refusal = _refusal_of(observed)
    if refusal is None or refusal.kind != "InvalidSpec" or observed.status.attempt > 0:
        return None
    verdict = Verdict(OperatorReason.INVALID_SPEC, refusal.message)
    return _fail(observed, settings, verdict.reason, verdict.message, verdict.failure, event="InvalidSpec")


def _refusal_of(observed: Observed) -> Refusal | None:
    """Why the next gang cannot be made, as far as it is known."""
    if observed.invalid is not None:
        return Refusal("InvalidSpec", "; ".join(map(str, observed.invalid.problems)))
    return Refusal("InvalidSpec", "the spec cannot be read") if observed.job is None else observed.refusal


def _when_all_pods_have_succeeded(observed: Observed, settings: Settings) -> Decision | None:
    gang = observed.gang
    if not _is_live(observed.status) or len(gang) < observed.desired or not all(pod.succeeded for pod in gang):
        return None
    result = read_result(gang[0].termination_message)
    counts = conditions.count_pods(observed.desired, gang)
    status = conditions.succeeded(_with_progress(observed.status, observed), result, counts, observed.now)
    event = Event("Normal", "Succeeded", _cut(result.message))
    return _answer(observed, settings, status, remove=_pods_to_clean(observed, has_failed=False), events=(event,))


def _when_it_is_suspended(observed: Observed, settings: Settings) -> Decision | None:
    """Pods end by SIGTERM, which makes the trainer write a checkpoint. It counts as no restart."""
    if observed.job is None or not observed.job.spec.suspend:
        return None
    status, is_new = observed.status, not observed.status.is_true(ConditionType.SUSPENDED)
    counts = conditions.count_pods(observed.desired, observed.gang, stopped=True) if is_new or status.pods is None else status.pods
    before = _with_progress(status, observed) if is_new else status
    status = conditions.suspended(before, counts, ending=bool(observed.pods), now=observed.now)
    events = (Event("Normal", "Suspended", "spec.suspend is true"),) if is_new else ()
    return _answer(observed, settings, status, remove=observed.pods, events=events)


def _when_its_deadline_has_passed(observed: Observed, settings: Settings) -> Decision | None:
    if _until_deadline(observed) != 0:
        return None
    message = f"the job was active for {observed.policy.active_deadline_seconds} s (runPolicy.activeDeadlineSeconds)"
    verdict = Verdict(OperatorReason.DEADLINE_EXCEEDED, message)
    return _fail(observed, settings, verdict.reason, message, verdict.failure)


def _when_its_gang_has_ended(observed: Observed, settings: Settings) -> Decision | None:
    """Give up, or start all pods anew; at most runPolicy.backoffLimit times for what is counted."""
    verdict = judge(observed, settings) if _is_live(observed.status) else None
    if not isinstance(verdict, Verdict):
        return None
    if verdict.consequence is Consequence.PERMANENT:
        return _fail(observed, settings, verdict.reason, verdict.message, verdict.failure)
    counted, limit = verdict.consequence is Consequence.RETRY, observed.policy.backoff_limit
    done = observed.status.restarts.counted
    if counted and done >= limit:
        message = f"{done} counted restarts of {limit} (runPolicy.backoffLimit) are used up; the last gang ended: {verdict.reason}: {verdict.message}"
        return _fail(observed, settings, OperatorReason.BACKOFF_LIMIT_EXCEEDED, message, verdict.failure)
    counts = conditions.count_pods(observed.desired, observed.gang, stopped=True)
    status = conditions.restarting(_with_progress(observed.status, observed), verdict.failure, counts, counted=counted, now=observed.now)
    event = Event("Warning", "Restarting", _cut(f"gang {observed.status.attempt} ended: {verdict.reason}: {verdict.message}"))
    return _answer(observed, settings, status, remove=observed.pods, events=(event,), waits=[] if observed.pods else [0.0])


def _when_its_gang_lives(observed: Observed, settings: Settings) -> Decision | None:
    if not _is_live(observed.status):
        return None
    gang, old = observed.gang, observed.status
    judgement = judge(observed, settings)
    waits = [judgement.seconds] if isinstance(judgement, Wait) else []
    silence = _seconds_to_answer(observed, settings)
    status, wait = _status_of_live_gang(observed, settings, silence)
    events = (Event("Normal", "Started", f"all pods of gang {old.attempt} run"),) if _turns_true(old, status, ConditionType.RUNNING) else ()
    strays = _without(observed.pods, gang)
    return _answer(observed, settings, status, remove=strays, events=events, waits=[*waits, wait, silence or None], poll=_address(observed))


def _address(observed: Observed) -> str | None:
    """Where rank 0 of a gang that lives can be asked for its progress; None while it cannot."""
    first = observed.gang[0]
    return first.address if first.started and first.deletion is None else None


def _seconds_to_answer(observed: Observed, settings: Settings) -> float | None:
    """Seconds that rank 0 has left for its first answer to this process, 0 when they have passed; None when it has answered, or cannot be asked."""
    if observed.progress is not None or _address(observed) is None:
        return None
    return observed.seconds_until(observed.asked_since or observed.now, settings.unanswered_seconds)


def _when_old_pods_are_left(observed: Observed, settings: Settings) -> Decision | None:
    """No gang lives: the next one waits until no pod of another is left."""
    members = observed.members(observed.status.attempt + 1)
    old = _without(observed.pods, [pod for pod in members if pod.deletion is None])
    if not old:
        return None
    status = observed.status
    if not status.is_true(ConditionType.RESTARTING):
        status = conditions.waiting_for_old_pods(status, conditions.CHECKPOINTING, observed.now)
    return _answer(observed, settings, status, remove=old)


def _when_it_was_refused(observed: Observed, settings: Settings) -> Decision | None:
    """Somebody else has to do something: hold, tell, and try again later."""
    refusal = _refusal_of(observed)
    if refusal is None:
        return None
    status = conditions.refused(observed.status, refusal, observed.now)
    is_new = _turns_true(observed.status, status, ConditionType.NAME_CONFLICT)
    events = (Event("Warning", "NameConflict", _cut(refusal.message)),) if is_new else ()
    wait = settings.leftover_retry_seconds if refusal.kind == "Leftover" else settings.refusal_retry_seconds
    return _answer(observed, settings, status, events=events, waits=[wait])


def _when_it_restarts_too_fast(observed: Observed, settings: Settings) -> Decision | None:
    """Restarts that nothing limits get slower, so that a trainer that always says it was preempted does not spin."""
    restarting = observed.status.condition(ConditionType.RESTARTING)
    if restarting is None or restarting.status != "True" or consequence_of(restarting.reason) is not Consequence.UNCOUNTED:
        return None
    restarts = observed.status.restarts
    doublings = min(max(restarts.total - restarts.counted - 1, 0), 32)
    delay = min(settings.uncounted_delay_seconds * 2**doublings, settings.uncounted_delay_limit_seconds)
    wait = observed.seconds_until(restarting.last_transition_time, delay)
    return _answer(observed, settings, observed.status, waits=[wait]) if wait > 0 else None


def _otherwise_make_the_next_gang(observed: Observed, settings: Settings) -> Decision | None:
    """What is there of it already was made before the operator died: it is kept."""
    old, attempt = observed.status, observed.status.attempt + 1
    members = observed.members(attempt)
    there = {pod.node_rank for pod in members}
    missing = tuple(rank for rank in range(observed.desired) if rank not in there)
    counts = conditions.count_pods(observed.desired, members)
    status = conditions.made(old, attempt, counts, conditions.waiting_message(observed.desired, members), observed.now)
    events = (Event("Normal", "Resumed", f"gang {attempt} is made"),) if old.is_true(ConditionType.SUSPENDED) else ()
    return _answer(observed, settings, status, create=attempt, missing=missing, events=events, waits=[0.0] if members else [])


Rule = Callable[[Observed, Settings], Decision | None]
RULES: tuple[Rule, ...] = (
    _when_it_has_ended,
    _when_it_is_invalid,
    _when_all_pods_have_succeeded,
    _when_it_is_suspended,
    _when_its_deadline_has_passed,
    _when_its_gang_has_ended,
    _when_its_gang_lives,
    _when_old_pods_are_left,
    _when_it_restarts_too_fast,
    _when_it_was_refused,
    _otherwise_make_the_next_gang,
)
"""Each answers or passes; the last one always answers."""


def _has_ended(status: Status) -> bool:
    return status.is_true(ConditionType.SUCCEEDED) or status.is_true(ConditionType.FAILED)


def _is_live(status: Status) -> bool:
    """Whether gang `attempt` was made and has not been judged."""
    return status.attempt >= 1 and not any(status.is_true(kind) for kind in (ConditionType.RESTARTING, ConditionType.SUSPENDED))


def _without(pods: Iterable[Pod], others: Iterable[Pod]) -> list[Pod]:
    uids = {pod.uid for pod in others}
    return [pod for pod in pods if pod.uid not in uids]


def _turns_true(old: Status, new: Status, kind: ConditionType) -> bool:
    return new.is_true(kind) and not old.is_true(kind)


def _answer(
    observed: Observed, settings: Settings, status: Status, *, remove: Iterable[Pod] = (), waits: Iterable[float | None] = (), **parts: Any
) -> Decision:
    """The decision with its deletions, and with the least of all waits."""
    stamped = conditions.stamp(status, observed.generation)
    delete, all_waits = [], list(waits)
    for pod in remove:
        deletion, wait = _delete(pod, observed, settings)
        delete += deletion
        all_waits.append(wait)
    if not _has_ended(stamped) and stamped.start_time is not None:
        all_waits.append(_until_deadline(observed, stamped))
    known = [wait for wait in all_waits if wait is not None]
    return Decision(status=stamped, delete=tuple(delete), again_after=min(known) if known else None, **parts)


def _delete(pod: Pod, observed: Observed, settings: Settings) -> tuple[list[Deletion], float | None]:
    """How a pod goes, or seconds after which to look at it again: one that is being deleted is forced only where no kubelet can end it."""
    if pod.deletion is None:
        return [Deletion(pod.name, pod.uid)], None
    grace, lost = observed.seconds_until(pod.deletion, 0), observed.lost_in(pod)
    if grace > 0 or lost is None:
        return [], max(grace, lost or 0.0) or settings.refusal_retry_seconds
    return ([Deletion(pod.name, pod.uid, force=True)], None) if lost == 0 else ([], lost)


def _pods_to_clean(observed: Observed, *, has_failed: bool) -> list[Pod]:
    """Pods that go when the job has ended. What is left of a gang that failed must not go on computing, whatever the policy says."""
    policy = observed.policy.clean_pod_policy
    if policy == "All":
        return list(observed.pods)
    return [pod for pod in observed.pods if pod.active] if has_failed or policy == "Running" else []


def _fail(observed: Observed, settings: Settings, reason: str, message: str, failure: Failure, *, event: str = "Failed") -> Decision:
    counts = conditions.count_pods(observed.desired, observed.gang, stopped=True) if _is_live(observed.status) else observed.status.pods
    before = _with_progress(observed.status, observed)
    status = conditions.failed(before, reason, message, failure, counts or PodCounts(desired=observed.desired), observed.now)
    told = Event("Warning", event, _cut(message if event == reason else f"{reason}: {message}"))
    return _answer(observed, settings, status, remove=_pods_to_clean(observed, has_failed=True), events=(told,))


def _until_deadline(observed: Observed, status: Status | None = None) -> float | None:
    """Seconds until runPolicy.activeDeadlineSeconds have passed; None without such a limit, or while no gang was made."""
    start, limit = (status or observed.status).start_time, observed.policy.active_deadline_seconds
    return None if start is None or limit is None else observed.seconds_until(start, limit)


def _status_of_live_gang(observed: Observed, settings: Settings, silence: float | None) -> tuple[Status, float | None]:
    """The status of a gang that goes on, and seconds after which more of it may be written.

    A change that only counts (of progress, of pods that have started or ended while others have not) is written now and then, any other at once.
    """
    old, gang = observed.status, observed.gang
    if any(pod.failed for pod in gang):
        return old, None
    counts = conditions.count_pods(observed.desired, gang)
    if all(pod.begun for pod in gang):
        silent = f"{_address(observed)}:{settings.progress_port}" if silence == 0 else None
        state, wait = conditions.running(old, counts, loaded=_has_loaded(observed), silent=silent, now=observed.now), 0.0
    else:
        state = conditions.starting(old, counts, conditions.waiting_message(observed.desired, gang), observed.now)
        wait = _seconds_to_start(observed, settings)
    calm, fresh = (conditions.stamp(each, observed.generation) for each in (state.model_copy(update={"pods": old.pods}), _with_progress(state, observed)))
    if fresh == old or calm != old or (observed.progress_due and wait == 0):
        return fresh, None
    return old, wait or settings.progress_write_seconds


def _has_loaded(observed: Observed) -> bool:
    """Whether the trainers of this gang have their model and data; it stays so."""
    if observed.progress is not None and observed.progress.stage in LOADED_STAGES:
        return True
    return observed.status.is_true(ConditionType.INITIALIZED) and observed.status.is_true(ConditionType.RUNNING)


def _seconds_to_start(observed: Observed, settings: Settings) -> float:
    """Seconds that the pods of a new gang are given to start together, before some of them are counted."""
    running = observed.status.condition(ConditionType.RUNNING)
    return 0.0 if running is None else observed.seconds_until(running.last_transition_time, settings.progress_write_seconds)


def _with_progress(status: Status, observed: Observed) -> Status:
    """The status with what was last heard of the gang's progress."""
    if observed.progress is None:
        return status
    progress, left_out = round_progress(observed.progress)
    resolved = finite(observed.progress.resolved) or status.resolved
    return conditions.incomplete(status.model_copy(update={"progress": progress, "resolved": resolved}), left_out, observed.now)


def _cut(message: str) -> str:
    """A message that fits into an Event."""
    data = message.encode()
    return message if len(data) <= EVENT_MESSAGE_LIMIT else data[: EVENT_MESSAGE_LIMIT - 3].decode(errors="ignore") + "…"
