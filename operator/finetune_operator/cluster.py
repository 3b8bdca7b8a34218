"""Observe a job, decide, carry it out: everything the operator does to a cluster goes through here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import aiohttp

from finetune_operator import conditions, lifecycle, metrics, names
from finetune_operator.children import Children
from finetune_operator.connection import MERGE_PATCH, METADATA_LIST, METADATA_ONLY, ApiError, Connection, Priority
from finetune_operator.lifecycle import Decision, Deletion, Event
from finetune_operator.observed import Node, Observed, Pod, Refusal
from finetune_operator.pods import read_time
from finetune_operator.polling import Poller
from finetune_operator.problems import InvalidJob
from finetune_operator.queue import Key
from finetune_operator.settings import Settings
from finetune_operator.status import ConditionType, Status
from finetune_operator.store import JobRecord, Store, dump_status, merge_patch
from finetune_operator.telling import Teller

MOST_ROUNDS = 5
"""Decisions that may follow one another at once; more would be a decision that contradicts itself, and waits for the queue."""
OVERDUE = timedelta(seconds=5)
"""A pod that is still there so long after its grace period: its node is looked at."""
OUR_PODS = {"labelSelector": names.JOB_LABEL}
JOBS, PODS = (f"/apis/{names.API_VERSION}", names.PLURAL), ("/api/v1", "pods")
NOT_SERVABLE = (403, 404)
"""Answers to a list by which a namespace cannot be served: no rights; or nothing of that kind."""
OTHER_UID = "Precondition failed: UID"
"""The API server's words for a deletion of a pod that is another of the same name."""

logger = logging.getLogger(__name__)


class StartAnew(Exception):
    """What kopf found at its start is no longer so: this process must end, and the next one will find what is."""


class NotServed(Exception):
    """The API server does not know FineTuneJobs."""


class Conflict(ApiError):
    """The job has changed since it was observed: it is observed again."""


@dataclass
class Listing:
    """What several lists have found, and the oldest resource version that this is true at."""

    uids: set[str] = field(default_factory=set)
    versions: list[int] = field(default_factory=list)

    @property
    def since(self) -> int:
        return min(self.versions, default=0)


@dataclass(frozen=True)
class Cluster:
    """All that reconciling a job needs."""

    connection: Connection
    store: Store
    settings: Settings
    children: Children
    poller: Poller
    teller: Teller

    async def reconcile(self, key: Key) -> float | None:
        """Bring one job one or more decisions further; seconds after which to look again, None: when something happens.

        Raises ApiError, aiohttp.ClientError, TimeoutError: nothing is lost, the same is decided again.
        """
        again: float | None = 0.0
        for _ in range(MOST_ROUNDS):
            job = self.store.jobs.get(key)
            if job is None or job.deleted or job.held:
                self.poller.leave(key)
                return None
            decision, settled = await self._step(job)
            if settled:
                again = decision.again_after
                break
        return again

    async def _step(self, job: JobRecord) -> tuple[Decision, bool]:
        """One decision, carried out; whether another one at once would find nothing to do."""
        decision, made = await self._decide(job)
        written = await self._write(job, decision.status, _urgency(job, decision))
        for event in decision.events:  # before what may fail: decided again, it is no news
            self._tell(job, event, decision.status)
        await self._delete(job, decision.delete)
        self.poller.follow(job.key, decision.status.attempt, decision.poll, spoken=decision.status.progress is not None)
        job.rest()
        return decision, made or not (written or decision.delete)

    async def _decide(self, job: JobRecord) -> tuple[Decision, bool]:
        """A decision, and whether its gang was made; where that was refused, the decision about the refusal."""
        observed = await self.observe(job)
        decision = lifecycle.decide(observed, self.settings)
        if decision.create is None:
            return decision, False
        refusal = self._leftover(job) or await self.children.make(job, decision.create, decision.missing)
        if refusal is None:
            return decision, True
        return lifecycle.decide(replace(observed, refusal=refusal), self.settings), False

    def _leftover(self, job: JobRecord) -> Refusal | None:
        """A pod of an earlier job of this name, whatever its gang's number: it computes, and writes, as one of this job would."""
        pod = self.store.pod_of_another(job)
        return None if pod is None else Refusal("Leftover", f"Pod {pod} of an earlier job of this name is still there")

    async def complain(self, key: Key, error: Exception) -> None:
        """Say on a job that deciding about it fails again and again, because a log is not where its user looks."""
        job = self.store.jobs.get(key)
        if job is None or job.deleted or job.held or job.status.completion_time is not None:
            return
        words = str(error) if isinstance(error, ApiError | aiohttp.ClientError) else ""  # of a defect nothing but its kind: its words may hold anything
        await self._write(job, conditions.retrying(job.status, words or type(error).__name__, datetime.now(UTC)), Priority.STATUS)

    # Observe

    async def observe(self, job: JobRecord) -> Observed:
        """What is known of a job, and of the nodes of its pods that are silent or overdue."""
        now = datetime.now(UTC)
        pods = self.store.pods_of(job)
        parsed = job.parsed
        return Observed(
            now=now.replace(microsecond=0),
            job=None if isinstance(parsed, InvalidJob) else parsed,
            invalid=parsed if isinstance(parsed, InvalidJob) else None,
            generation=job.generation,
            status=job.status,
            pods=pods,
            nodes=await self._look_at(sorted(_suspects(pods, now)), job),
            heartbeat_seen=self.poller.heartbeat_seen(job.key, job.status.attempt),
            progress=self.poller.progress(job.key, job.status.attempt),
            progress_due=self.poller.is_due(job.key),
            asked_since=self.poller.asked_since(job.key, job.status.attempt),
        )

    async def _look_at(self, nodes: Iterable[str], job: JobRecord) -> tuple[Node, ...]:
        found = await asyncio.gather(*(self._look(node, job) for node in nodes))
        return tuple(node for node in found if node is not None)

    async def _look(self, name: str, job: JobRecord) -> Node | None:
        """A node; None where the operator may not see it: nothing is known of it then."""
        answer = await self.connection.send("GET", f"/api/v1/nodes/{name}", order=(Priority.CHILDREN, job.age))
        if answer.status == 404:
            return Node(name, exists=False)
        if answer.status == 403:
            _warn_of_nodes()
            return None
        if not answer.ok:
            raise ApiError("GET", f"nodes/{name}", answer)
        ready: dict[str, str] = next((found for found in answer.body["status"].get("conditions", ()) if found["type"] == "Ready"), {})
        return Node(name, exists=True, silent_since=None if ready.get("status") == "True" else read_time(ready.get("lastTransitionTime")))

    # Carry out

    async def _write(self, job: JobRecord, status: Status, urgency: Priority) -> bool:
        """Write what has changed of the status, only if the job is still the one that was observed. Raises Conflict where it is not."""
        before = job.status
        if status == before:
            return False
        dumped = dump_status(status)
        patch = {"metadata": {"resourceVersion": str(job.resource_version)}, "status": merge_patch(job.dumped, dumped)}
        path = f"/apis/{names.API_VERSION}/namespaces/{job.key[0]}/{names.PLURAL}/{job.key[1]}/status"
        params = {"fieldManager": names.OPERATOR}
        job.rest()  # this may wait for its turn until all gangs of a burst are made
        answer = await self.connection.send("PATCH", path, patch, order=(urgency, job.age), accept=METADATA_ONLY, content_type=MERGE_PATCH, params=params)
        if answer.status == 404:
            self.store.remove_job(job.key, job.uid)
            return True
        if not answer.ok:
            raise (Conflict if answer.status == 409 else ApiError)("PATCH", path, answer)
        if status.progress != before.progress:
            self.poller.note_written(job.key)
        _count(job.key[0], before, status)
        job.note_written(int(answer.body["metadata"]["resourceVersion"]), dumped)
        return True

    async def _delete(self, job: JobRecord, deletions: Iterable[Deletion]) -> None:
        await asyncio.gather(*(self._delete_one(job, deletion) for deletion in deletions))

    async def _delete_one(self, job: JobRecord, deletion: Deletion) -> None:
        """Delete one pod; one that is gone, or is another of the same name, is not there any more."""
        body = {"preconditions": {"uid": deletion.uid}, **({"gracePeriodSeconds": 0} if deletion.force else {})}
        path = f"/api/v1/namespaces/{job.key[0]}/pods/{deletion.name}"
        answer = await self.connection.send("DELETE", path, body, order=(Priority.CHILDREN, job.age))
        if answer.status == 404 or (answer.status == 409 and OTHER_UID in answer.message):
            self.store.remove_pod(job.key, deletion.name, deletion.uid)
        elif not answer.ok:
            raise ApiError("DELETE", path, answer)
        else:
            self.store.note_deletion(job.key, deletion.name, deletion.uid, answer.body)

    def _tell(self, job: JobRecord, event: Event, status: Status) -> None:
        self.teller.tell(job, event)
        if event.reason == "Restarting" and status.failure is not None:
            metrics.JOB_RESTARTS.labels(job.key[0], status.failure.reason).inc()

    # Compare with what there is

    async def resync(self, places: Iterable[str]) -> list[Key]:
        """Forget jobs and pods that went while no watch was there to tell; the keys that this concerns.

        Raises NotServed where FineTuneJobs are no longer known, ApiError, aiohttp.ClientError, TimeoutError.
        """
        jobs, pods, unlisted = Listing(), Listing(), set[str]()
        for place in places:
            try:
                await self._list(jobs, JOBS, place, {})
                await self._list(pods, PODS, place, OUR_PODS)
            except ApiError as error:
                if error.status == 404:
                    await self.check_served()
                if not place or error.status not in NOT_SERVABLE:
                    raise
                logger.warning("namespace %s is left out of a comparison: %s", place, error)
                unlisted.add(place)
        return [*self.store.keep_jobs(jobs.uids, jobs.since, unlisted), *self.store.keep_pods(pods.uids, pods.since, unlisted)]

    async def check_served(self) -> None:
        """Whether kopf will find FineTuneJobs where it looks for them, once, at its start; raises NotServed, ApiError."""
        groups = await self._get("/apis")
        if any(group["name"] == names.GROUP for group in groups["groups"]):
            kinds = await self._get(JOBS[0], missing={"resources": []})
            if any(kind["name"] == names.PLURAL for kind in kinds["resources"]):
                return
        raise NotServed(f"the API server does not know {names.PLURAL}.{names.GROUP}: apply the CustomResourceDefinition")

    async def check_place(self, place: str) -> None:
        """Raises ApiError where the jobs of a namespace (empty: of all) cannot be listed."""
        await self._get(path_of(JOBS, place), params={"limit": "1"})

    async def may_serve(self, place: str) -> bool:
        """Whether jobs and pods of a namespace can be listed."""
        try:
            for kind in (JOBS, PODS):
                await self._get(path_of(kind, place), params={"limit": "1"})
        except ApiError as error:
            if error.status not in NOT_SERVABLE:
                raise
            return False
        return True

    async def _list(self, listing: Listing, kind: tuple[str, str], place: str, params: dict[str, str]) -> None:
        async for page in self.connection.pages(path_of(kind, place), params, accept=METADATA_LIST):
            listing.uids.update(item["metadata"]["uid"] for item in page["items"] or ())
        listing.versions.append(int(page["metadata"]["resourceVersion"]))

    async def _get(self, path: str, params: dict[str, str] | None = None, missing: dict[str, Any] | None = None) -> dict[str, Any]:
        """An object; ``missing`` where there is none. Raises ApiError."""
        answer = await self.connection.send("GET", path, order=(Priority.EVENTS, ""), params=params)
        if answer.status == 404 and missing is not None:
            return missing
        if not answer.ok:
            raise ApiError("GET", path, answer)
        return answer.body


def _suspects(pods: Iterable[Pod], now: datetime) -> set[str]:
    """Nodes that a decision may depend on."""
    return {pod.node for pod in pods if pod.node and (pod.silent_since or (pod.deletion and pod.deletion + OVERDUE < now))}


def path_of(kind: tuple[str, str], place: str) -> str:
    """Where a kind is listed: in a namespace; everywhere, where that is empty."""
    return f"{kind[0]}/namespaces/{place}/{kind[1]}" if place else "/".join(kind)


def _urgency(job: JobRecord, decision: Decision) -> Priority:
    """The status of a job's first gang waits until all gangs of a burst are made, and what only counts or explains does; an end, a restart, a start do not."""
    return Priority.STATUS if decision.create == 1 or decision.status.phase == job.status.phase else Priority.CHILDREN


@cache
def _warn_of_nodes() -> None:
    """Once."""
    logger.warning("the operator has no right to get nodes: one that is lost is not noticed before its pods are deleted")


def _count(namespace: str, before: Status, status: Status) -> None:
    for kind, result in ((ConditionType.SUCCEEDED, "succeeded"), (ConditionType.FAILED, "failed")):
        condition = status.condition(kind)
        if condition is not None and condition.status == "True" and not before.is_true(kind):
            metrics.JOBS_FINISHED.labels(namespace, result, condition.reason).inc()
