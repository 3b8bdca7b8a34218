"""What watches have told, in memory: jobs and their pods, never older than what the operator itself has written.

A copy, not a memory: everything here is in the cluster too, and a new process reads it from there.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

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

logger = logging.getLogger(__name__)


@dataclass
class JobRecord:
    """One FineTuneJob as it was last told, or written."""

    key: Key
    uid: str
    age: int
    """Rank among all jobs that this process has seen: a smaller number was seen earlier."""
    generation: int
    resource_version: int
    deleted: bool
    spec: Any
    status: Status

    @cached_property
    def parsed(self) -> FineTuneJob | InvalidJob:
        """The job as a model, or why it cannot be read."""
        metadata = {"namespace": self.key[0], "name": self.key[1], "uid": self.uid}
        try:
            return schema.parse({"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": metadata, "spec": self.spec})
        except InvalidJob as problems:
            return problems

    def rest(self) -> None:
        """Nothing is to be decided for now: the model is made again when it is wanted (0.1 ms); it takes 10 KiB."""
        self.__dict__.pop("parsed", None)


@dataclass
class Store:
    """Jobs by key, and pods by the job they are labelled with."""

    jobs: dict[Key, JobRecord] = field(default_factory=dict)
    pods: dict[Key, dict[str, PodRecord]] = field(default_factory=dict)
    gone: dict[str, None] = field(default_factory=dict)
    """Pods that are there no more, by uid: the answer to their creation or deletion may come after a watch has told of their end."""
    ages: itertools.count[int] = field(default_factory=itertools.count)

    def put_job(self, raw: dict[str, Any]) -> Key | None:
        """Take in a job; its key when that is news, None when it is old or what was written by the operator itself."""
        metadata = raw["metadata"]
        key = (metadata["namespace"], metadata["name"])
        known = self.jobs.get(key)
        version = int(metadata["resourceVersion"])
        if known is not None and version <= known.resource_version:
            return None
        same = known is not None and known.uid == metadata["uid"]
        record = JobRecord(
            key=key,
            uid=metadata["uid"],
            age=known.age if known is not None and same else next(self.ages),
            generation=metadata["generation"],
            resource_version=version,
            deleted="deletionTimestamp" in metadata,
            spec=raw.get("spec"),
            status=read_status(raw.get("status"), key),
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

    def samples(self) -> Iterator[JobSample]:
        """All jobs, for metrics."""
        return (JobSample(*job.key, job.status) for job in list(self.jobs.values()))

    def keep_jobs(self, uids: set[str], since: int) -> list[Key]:
        """Forget jobs that a list of resource version ``since`` no longer has; their keys."""
        gone = [job for job in self.jobs.values() if job.uid not in uids and job.resource_version < since]
        for job in gone:
            self.remove_job(job.key, job.uid)
        return [job.key for job in gone]

    def keep_pods(self, uids: set[str], since: int) -> list[Key]:
        """Forget pods that a list of resource version ``since`` no longer has; their jobs' keys."""
        gone = [(key, record) for key, pods in self.pods.items() for record in pods.values() if record.pod.uid not in uids and record.resource_version < since]
        for key, record in gone:
            self.remove_pod(key, record.pod.name, record.pod.uid)
        return [key for key, _ in gone]


def read_status(raw: dict[str, Any] | None, key: Iterable[str] = ()) -> Status:
    """A status as it stands on a job; one that nobody could have written (somebody did) counts as absent."""
    try:
        return Status.model_validate(raw or {})
    except ValidationError as error:
        logger.warning("%s: its status cannot be read and is written anew: %s", "/".join(key), error)
        return Status()


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
