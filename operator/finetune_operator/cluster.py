"""Observe a job, decide, carry it out: everything the operator does to a cluster goes through here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_operator import lifecycle, metrics, names
from finetune_operator.children import Children
from finetune_operator.connection import MERGE_PATCH, METADATA_LIST, METADATA_ONLY, ApiError, Connection, Priority
from finetune_operator.lifecycle import Decision, Deletion, Event
from finetune_operator.observed import Node, Observed, Pod
from finetune_operator.pods import read_pod, read_time
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
LIST_CHUNK = "100"
OUR_PODS = {"labelSelector": names.JOB_LABEL}


class Conflict(ApiError):
    """The job has changed since it was observed: it is observed again."""


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
            if job is None or job.deleted:
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
        job.rest()  # its status may wait for its turn until all gangs of a burst are made
        written = await self._write(job, decision.status)
        await self._delete(job, decision.delete)
        for event in decision.events:
            self._tell(job, event, decision.status)
        self.poller.follow(job.key, decision.status.attempt, decision.poll, spoken=decision.status.progress is not None)
        return decision, made or not (written or decision.delete)

    async def _decide(self, job: JobRecord) -> tuple[Decision, bool]:
        """A decision, and whether its gang was made; where that was refused, the decision about the refusal."""
        observed = await self.observe(job)
        decision = lifecycle.decide(observed, self.settings)
        if decision.create is None:
            return decision, False
        refusal = await self.children.make(job, decision.create, decision.missing)
        if refusal is None:
            return decision, True
        return lifecycle.decide(replace(observed, refusal=refusal), self.settings), False

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
            progress=self.poller.progress(job.key, job.status.attempt),
            progress_due=self.poller.is_due(job.key),
            asked_since=self.poller.asked_since(job.key, job.status.attempt),
        )

    async def _look_at(self, nodes: Iterable[str], job: JobRecord) -> tuple[Node, ...]:
        return tuple(await asyncio.gather(*(self._look(node, job) for node in nodes)))

    async def _look(self, name: str, job: JobRecord) -> Node:
        answer = await self.connection.send("GET", f"/api/v1/nodes/{name}", order=(Priority.CHILDREN, job.age))
        if answer.status == 404:
            return Node(name, exists=False)
        if not answer.ok:
            raise ApiError("GET", f"nodes/{name}", answer)
        ready: dict[str, str] = next((found for found in answer.body["status"].get("conditions", ()) if found["type"] == "Ready"), {})
        return Node(name, exists=True, silent_since=None if ready.get("status") == "True" else read_time(ready.get("lastTransitionTime")))

    # Carry out

    async def _write(self, job: JobRecord, status: Status) -> bool:
        """Write what has changed of the status, only if the job is still the one that was observed. Raises Conflict where it is not."""
        if status == job.status:
            return False
        patch = {"metadata": {"resourceVersion": str(job.resource_version)}, "status": merge_patch(dump_status(job.status), dump_status(status))}
        path = f"/apis/{names.API_VERSION}/namespaces/{job.key[0]}/{names.PLURAL}/{job.key[1]}/status"
        params = {"fieldManager": names.OPERATOR}
        answer = await self.connection.send(
            "PATCH", path, patch, order=(Priority.STATUS, job.age), accept=METADATA_ONLY, content_type=MERGE_PATCH, params=params
        )
        if answer.status == 404:
            self.store.remove_job(job.key, job.uid)
            return True
        if not answer.ok:
            raise (Conflict if answer.status == 409 else ApiError)("PATCH", path, answer)
        if status.progress != job.status.progress:
            self.poller.note_written(job.key)
        _count(job, status)
        version = int(answer.body["metadata"]["resourceVersion"])
        if version > job.resource_version:
            job.resource_version, job.status = version, status
        return True

    async def _delete(self, job: JobRecord, deletions: Iterable[Deletion]) -> None:
        await asyncio.gather(*(self._delete_one(job, deletion) for deletion in deletions))

    async def _delete_one(self, job: JobRecord, deletion: Deletion) -> None:
        """Delete one pod; one that is gone, or is another of the same name, is not there any more."""
        body = {"preconditions": {"uid": deletion.uid}, **({"gracePeriodSeconds": 0} if deletion.force else {})}
        path = f"/api/v1/namespaces/{job.key[0]}/pods/{deletion.name}"
        answer = await self.connection.send("DELETE", path, body, order=(Priority.CHILDREN, job.age))
        if answer.status in (404, 409):
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

    async def resync(self) -> list[Key]:
        """Forget jobs and pods that went while no watch was there to tell; the keys that this concerns."""
        jobs = await self._list(f"/apis/{names.API_VERSION}", names.PLURAL, {})
        pods = await self._list("/api/v1", "pods", OUR_PODS)
        return [*self.store.keep_jobs(*jobs), *self.store.keep_pods(*pods)]

    async def recall(self) -> None:
        """Take in every pod, before anything is decided: watches tell a job before its pods, which would then read as deleted."""
        for path in self._paths("/api/v1", "pods"):
            async for page in self._pages(path, OUR_PODS, accept="application/json"):
                for raw in page["items"] or ():
                    record = read_pod(raw)
                    if record is not None:
                        self.store.put_pod(record)

    async def _list(self, group: str, plural: str, params: dict[str, str]) -> tuple[set[str], int]:
        """Uids of what there is, and the resource version that this is true at."""
        uids: set[str] = set()
        versions: list[int] = []
        for path in self._paths(group, plural):
            async for page in self._pages(path, params, accept=METADATA_LIST):
                uids.update(item["metadata"]["uid"] for item in page["items"] or ())
            versions.append(int(page["metadata"]["resourceVersion"]))
        return uids, min(versions)

    def _paths(self, group: str, plural: str) -> list[str]:
        """Where a kind is listed: everywhere, or in each namespace that is served."""
        return [f"{group}/namespaces/{namespace}/{plural}" for namespace in self.settings.watch_namespaces] or [f"{group}/{plural}"]

    async def _pages(self, path: str, params: dict[str, str], *, accept: str) -> AsyncIterator[dict[str, Any]]:
        """A list, in chunks; raises ApiError."""
        onward = ""
        while True:
            query = {**params, "limit": LIST_CHUNK, "continue": onward}
            answer = await self.connection.send("GET", path, order=(Priority.EVENTS, 0), accept=accept, params=query)
            if not answer.ok:
                raise ApiError("GET", path, answer)
            yield answer.body
            onward = answer.body["metadata"].get("continue", "")
            if not onward:
                return


def _suspects(pods: Iterable[Pod], now: datetime) -> set[str]:
    """Nodes that a decision may depend on."""
    return {pod.node for pod in pods if pod.node and (pod.silent_since or (pod.deletion and pod.deletion + OVERDUE < now))}


def _count(job: JobRecord, status: Status) -> None:
    for kind, result in ((ConditionType.SUCCEEDED, "succeeded"), (ConditionType.FAILED, "failed")):
        condition = status.condition(kind)
        if condition is not None and condition.status == "True" and not job.status.is_true(kind):
            metrics.JOBS_FINISHED.labels(job.key[0], result, condition.reason).inc()
