"""What watches have told, in memory: jobs and their pods, never older than what the operator itself has written.

A copy, not a memory: everything here is in the cluster too, and a new process reads it from there.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import orjson
from pydantic import ValidationError

from finetune_operator import names, schema
from finetune_operator.metrics import JobSample
from finetune_operator.observed import Pod
from finetune_operator.pods import PodRecord, read_pod
from finetune_operator.problems import InvalidJob
from finetune_operator.queue import Key
from finetune_operator.schema import FineTuneJob
from finetune_operator.status import Status

MOST_GONE = 4096
"""Uids of pods that are remembered as gone: of the newest, because an answer to a request is late by seconds at most."""

DECISIVE = frozenset(("conditions", "attempt", "restarts"))
"""Fields of a status that decisions are made from."""

logger = logging.getLogger(__name__)


@dataclass
class JobRecord:
    """One FineTuneJob as it was last told, or written."""

    key: Key
    uid: str
    age: str
    """When it was made, then its name: a smaller text is an older job's, for every process alike."""
    generation: int
    resource_version: int
    deleted: bool
    spec: bytes
    """As JSON: a tenth of what it takes as dictionaries."""
    written: bytes
    """Its status as far as it can be read, as JSON."""
    held: bool = False
    """Whether what decides of its status cannot be read: then nothing is done about it."""

    @cached_property
    def status(self) -> Status:
        """Its status as it was last told, or written."""
        return Status.model_validate(self.dumped)

    @property
    def dumped(self) -> dict[str, Any]:
        """The same, as `dump_status` has it."""
        body: dict[str, Any] = orjson.loads(self.written)
        return body

    @cached_property
    def parsed(self) -> FineTuneJob | InvalidJob:
        """The job as a model, or why it cannot be read."""
        metadata = {"namespace": self.key[0], "name": self.key[1], "uid": self.uid}
        try:
            return schema.parse_json(
                orjson.dumps({"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": metadata, "spec": orjson.Fragment(self.spec)})
            )
        except InvalidJob as problems:
            return problems

    def rest(self) -> None:
        """Nothing is to be decided for now: the models are made again when they are wanted (0.2 ms); they take 17 KiB."""
        self.__dict__.pop("parsed", None)
        self.__dict__.pop("status", None)

    def sample(self) -> JobSample:
        """What metrics show of it; without the models, which would stay."""
        status = self.dumped
        return JobSample(*self.key, status.get("phase", "Pending"), None if "completionTime" in status else status.get("progress"))

    def note_written(self, resource_version: int, dumped: dict[str, Any]) -> None:
        """Take in a status that was written, as `dump_status` has it: what a watch tells of it later is no news."""
        if resource_version > self.resource_version:
            self.resource_version, self.written = resource_version, pack(dumped)
            self.__dict__.pop("status", None)


@dataclass
class Store:
    """Jobs by key, and pods by the job they are labelled with."""

    jobs: dict[Key, JobRecord] = field(default_factory=dict)
    pods: dict[Key, dict[str, PodRecord]] = field(default_factory=dict)
    gone: dict[str, None] = field(default_factory=dict)
    """Pods that are there no more, by uid: the answer to their creation or deletion may come after a watch has told of their end."""

    def put_job(self, raw: dict[str, Any]) -> Key | None:
        """Take in a job; its key when that is news, None when it is old or what was written by the operator itself."""
        metadata = raw["metadata"]
        key = (metadata["namespace"], metadata["name"])
        known = self.jobs.get(key)
        version = int(metadata["resourceVersion"])
        if known is not None and version <= known.resource_version:
            return None
        same = known is not None and known.uid == metadata["uid"]
        status = read_status(raw.get("status"), key)
        record = JobRecord(
            key=key,
            uid=metadata["uid"],
            age=f"{metadata['creationTimestamp']} {key[0]}/{key[1]}",
            generation=metadata["generation"],
            resource_version=version,
            deleted="deletionTimestamp" in metadata,
            spec=pack(raw.get("spec")),
            written=pack(dump_status(status or Status())),
            held=status is None,
        )
        if known is not None and same and known.generation == record.generation and "parsed" in known.__dict__:
            record.__dict__["parsed"] = known.parsed  # the spec is the same
        self.jobs[key] = record
        return key

    def remove_job(self, key: Key, uid: str) -> None:
        """Forget a job that is gone; another of the same name stays."""
        record = self.jobs.get(key)
        if record is not None and record.uid == uid:
            del self.jobs[key]

    def put_pod(self, record: PodRecord) -> Key | None:
        """Take in a pod; its job's key when that is news."""
        if record.pod.uid in self.gone:
            return None
        key = (record.namespace, record.job)
        pods = self.pods.setdefault(key, {})
        known = pods.get(record.pod.name)
        if known is not None and record.resource_version <= known.resource_version:
            return None
        pods[record.pod.name] = record
        return None if known is not None and known.pod == record.pod and known.owner == record.owner else key

    def note_deletion(self, key: Key, name: str, uid: str, raw: dict[str, Any]) -> None:
        """Take in the answer to a deletion: the pod as it goes; a Status, when it has gone at once."""
        record = read_pod(raw) if raw.get("kind") == "Pod" else None
        if record is not None:
            self.put_pod(record)
        elif raw.get("kind") == "Status":
            self.remove_pod(key, name, uid)

    def remove_pod(self, key: Key, name: str, uid: str) -> None:
        """Forget a pod that is gone, for good; another of the same name stays."""
        self.gone[uid] = None
        if len(self.gone) > MOST_GONE:
            del self.gone[next(iter(self.gone))]
        pods = self.pods.get(key, {})
        if name in pods and pods[name].pod.uid == uid:
            del pods[name]
            if not pods:
                del self.pods[key]

    def pods_of(self, job: JobRecord) -> tuple[Pod, ...]:
        """The job's own pods, of any gang."""
        return tuple(record.pod for record in self.pods.get(job.key, {}).values() if record.owner == job.uid)

    def pod_of_another(self, job: JobRecord) -> str | None:
        """A pod of another job of this job's name, one that was before."""
        return next((record.pod.name for record in self.pods.get(job.key, {}).values() if record.owner not in ("", job.uid)), None)

    def samples(self) -> Iterator[JobSample]:
        """All jobs, for metrics."""
        return (job.sample() for job in list(self.jobs.values()))

    def keep_jobs(self, uids: set[str], since: int, unlisted: Collection[str] = ()) -> list[Key]:
        """Forget jobs that a list of resource version ``since`` no longer has, but for those of namespaces that could not be listed; their keys."""
        gone = [job for job in self.jobs.values() if job.uid not in uids and job.resource_version < since and job.key[0] not in unlisted]
        for job in gone:
            self.remove_job(job.key, job.uid)
        return [job.key for job in gone]

    def keep_pods(self, uids: set[str], since: int, unlisted: Collection[str] = ()) -> list[Key]:
        """As `keep_jobs`, for pods; their jobs' keys."""
        there = ((key, record) for key, pods in self.pods.items() if key[0] not in unlisted for record in pods.values())
        gone = [(key, record) for key, record in there if record.pod.uid not in uids and record.resource_version < since]
        for key, record in gone:
            self.remove_pod(key, record.pod.name, record.pod.uid)
        return [key for key, _ in gone]


def read_status(raw: dict[str, Any] | None, key: Iterable[str] = ()) -> Status | None:
    """A status as it stands on a job, without the fields that cannot be read (another version, or somebody, has written them).

    None where what decides is among them: a job that has ended would be trained again, one with a gang would get another.
    """
    given, job = raw or {}, "/".join(key)
    try:
        return Status.model_validate(given)
    except ValidationError as error:
        problem = error
    readable = {field: value for field, value in given.items() if _can_be_read(field, value)}
    left_out = sorted(given.keys() - readable.keys())
    if DECISIVE & set(left_out):
        logger.error("%s: nothing is done about it, because its status cannot be read; correct %s: %s", job, ", ".join(left_out), problem)
        return None
    logger.warning("%s: of its status %s cannot be read and is left out: %s", job, ", ".join(left_out), problem)
    return Status.model_validate(readable)


def _can_be_read(field: str, value: Any) -> bool:
    try:
        Status.model_validate({field: value})
    except ValidationError:
        return False
    return True


def pack(value: Any) -> bytes:
    """As JSON, copied: what orjson gives keeps all the memory in which it was made (4 KiB at least)."""
    return bytes(memoryview(orjson.dumps(value)))


def dump_status(status: Status) -> dict[str, Any]:
    """A status as JSON, without what is absent or empty."""
    body = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {name: value for name, value in body.items() if value not in ([], {}) and not (name == "restarts" and value["total"] == 0)}


def merge_patch(before: Any, after: Any) -> Any:
    """The JSON merge patch (RFC 7386) that makes ``after`` of ``before``; empty where they are equal."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return after
    changed = {name: merge_patch(before.get(name), value) for name, value in after.items() if name not in before or before[name] != value}
    return {**changed, **dict.fromkeys(before.keys() - after.keys())}
