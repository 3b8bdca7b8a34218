"""Makes a gang's objects by POST, and says why one could not be made. A foreign object that has a child's name is never touched."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

from finetune_operator import manifests, names
from finetune_operator.connection import METADATA_ONLY, Answer, ApiError, Connection, Order, Priority, Turns
from finetune_operator.observed import Refusal
from finetune_operator.plan import Identity, Plan, cluster_place, make_plan
from finetune_operator.pods import read_pod
from finetune_operator.problems import InvalidJob
from finetune_operator.schema import FineTuneJob
from finetune_operator.settings import Settings
from finetune_operator.store import JobRecord, Store

COLLECTIONS = {"Service": "services", "Pod": "pods", "PersistentVolumeClaim": "persistentvolumeclaims"}
ADMISSION_WORDS = ("denied the request", "denied request")
"""Of webhooks; of ValidatingAdmissionPolicies."""
DECODING_WORDS = ("cannot be handled as a", "strict decoding error", "cannot unmarshal")
"""Of an API server that cannot read what it was sent."""


@dataclass(frozen=True)
class Children:
    """The children of jobs, in the cluster and (pods) in the store."""

    connection: Connection
    store: Store
    settings: Settings
    gangs: Turns
    """Gangs that are made at the same time: a gang that waits holds no manifests (35 KiB for two pods)."""

    async def make(self, job: JobRecord, attempt: int, missing: tuple[int, ...]) -> Refusal | None:
        """Make what is missing of a gang: Service, claim, pods. None when all of it stands; raises ApiError, aiohttp.ClientError, TimeoutError."""
        async with self.gangs.turn(_order(job)):
            return await self._make_gang(job, attempt, missing)

    async def _make_gang(self, job: JobRecord, attempt: int, missing: tuple[int, ...]) -> Refusal | None:
        assert isinstance(job.parsed, FineTuneJob)
        try:
            plan = make_plan(job.parsed, self.settings, cluster_place(self.settings), Identity(job.uid, attempt))
            owner = manifests.Owner(name=job.key[1], uid=job.uid, namespace=job.key[0])
            shared = [manifests.service(plan, owner), manifests.work_claim(plan, owner)]
            pods = [manifests.pod(plan, node_rank, owner, self.settings) for node_rank in missing]
        except InvalidJob as problem:
            return Refusal("InvalidSpec", str(problem))
        return await self._dry_run(job, plan, pods) or await self._make_shared(job, shared) or await self._make_pods(job, pods)

    async def _dry_run(self, job: JobRecord, plan: Plan, pods: list[dict[str, Any]]) -> Refusal | None:
        """A pod that users have written parts of is shown to the API server before anything is made."""
        if plan.job.spec.nodes.pod_template is None or not pods:
            return None
        answer = await self._post(job, pods[0], dry_run=True)
        return None if answer.ok or answer.status == 409 else _refusal(pods[0], answer)

    async def _make_shared(self, job: JobRecord, children: list[dict[str, Any] | None]) -> Refusal | None:
        for child in children:
            refusal = await self._make(job, child) if child is not None else None
            if refusal is not None:
                return refusal
        return None

    async def _make_pods(self, job: JobRecord, pods: list[dict[str, Any]]) -> Refusal | None:
        """All pods, several at a time; none any more after the first that is refused."""
        waiting, refusals = deque(pods), list[Refusal]()

        async def make_some() -> None:
            while waiting:
                try:
                    refusal = await self._make(job, waiting.popleft())
                except BaseException:
                    waiting.clear()
                    raise
                if refusal is not None:
                    refusals.append(refusal)
                    waiting.clear()

        await asyncio.gather(*(make_some() for _ in range(min(len(pods), self.connection.in_flight))))
        return refusals[0] if refusals else None

    async def _make(self, job: JobRecord, child: dict[str, Any]) -> Refusal | None:
        answer = await self._post(job, child)
        if answer.status == 409:
            found = await self.connection.send("GET", self._path(child, named=True), order=_order(job))
            if found.status == 404:
                raise ApiError("POST", self._path(child), answer)  # it went between the two requests: again
            if not found.ok:
                raise ApiError("GET", self._path(child, named=True), found)
            refusal = judge_holder(job, child, found.body["metadata"])
            if refusal is not None:
                return refusal
            answer = found
        elif not answer.ok:
            return _refusal(child, answer)
        self._note(child, answer)
        return None

    def _note(self, child: dict[str, Any], answer: Answer) -> None:
        record = read_pod(answer.body) if child["kind"] == "Pod" else None
        if record is not None:
            self.store.put_pod(record)

    async def _post(self, job: JobRecord, child: dict[str, Any], *, dry_run: bool = False) -> Answer:
        params = {"fieldManager": names.OPERATOR, **({"dryRun": "All"} if dry_run else {})}
        return await self.connection.send("POST", self._path(child), child, order=_order(job), accept=METADATA_ONLY, params=params)

    @staticmethod
    def _path(child: dict[str, Any], *, named: bool = False) -> str:
        collection = f"/api/v1/namespaces/{child['metadata']['namespace']}/{COLLECTIONS[child['kind']]}"
        return f"{collection}/{child['metadata']['name']}" if named else collection


def _order(job: JobRecord) -> Order:
    return Priority.CHILDREN, job.age


def judge_holder(job: JobRecord, child: dict[str, Any], metadata: dict[str, Any]) -> Refusal | None:
    """Whose an object is that already has a child's name; None: the job's own, or a claim that an earlier job of its name has left to it."""
    what = f"{child['kind']} {metadata['name']}"
    owners = metadata.get("ownerReferences") or []
    if any(owner["uid"] == job.uid for owner in owners):
        return Refusal("Leftover", f"{what} is being deleted") if metadata.get("deletionTimestamp") else None
    earlier = any(owner.get("kind") == names.KIND and owner.get("name") == job.key[1] for owner in owners)
    ours = (metadata.get("labels") or {}).get(names.JOB_LABEL) == job.key[1]
    if ours and earlier:
        return Refusal("Leftover", f"{what} of an earlier job of this name is still there")
    if ours and not owners and child["kind"] == "PersistentVolumeClaim":
        return Refusal("Leftover", f"{what} is being deleted") if metadata.get("deletionTimestamp") else None
    return Refusal("NameConflict", f"{what} exists and does not belong to this job; remove or rename it, or give the job another name")


def _refusal(child: dict[str, Any], answer: Answer) -> Refusal:
    """Why the API server did not take a child; raises ApiError for what is not about the child.

    Invalid is what the API server itself cannot read, or calls invalid field by field. What admission says, in whatever words and with whatever
    code, may be otherwise tomorrow.
    """
    what = f"{child['kind']} {child['metadata']['name']}"
    if answer.status in (400, 422) and is_invalid(answer):
        return Refusal("InvalidSpec", f"the API server refuses {what}: {answer.message}")
    if answer.status in (400, 403, 404, 422):
        return Refusal("CreationRefused", f"{what} cannot be made: {answer.message}")
    raise ApiError("POST", what, answer)


def is_invalid(answer: Answer) -> bool:
    """Whether an object was refused for what it is, not for what somebody's policy is."""
    if any(words in answer.message for words in ADMISSION_WORDS):
        return False
    if answer.status == 422:
        return bool((answer.body.get("details") or {}).get("causes"))
    return any(words in answer.message for words in DECODING_WORDS)
