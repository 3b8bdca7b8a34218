"""A pod as Kubernetes tells it -> what matters of it to a decision. Pure."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_operator import names
from finetune_operator.observed import Pod

_ORDINARY = frozenset(("ContainerCreating", "PodInitializing", "Completed", "Error"))
"""Reasons of a container's state that say nothing that its phase and exit code do not."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PodRecord:
    """A pod and whose it is."""

    namespace: str
    job: str
    owner: str
    """The job's uid; empty: not ours."""
    resource_version: int
    pod: Pod


def read_pod(raw: dict[str, Any]) -> PodRecord | None:
    """A pod with our labels; None for one whose labels somebody else has written, or that cannot be read. The metadata alone will do for a pod just made."""
    metadata = raw["metadata"]
    try:
        return _read_record(metadata, raw)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        logger.warning("pod %s/%s cannot be read and is left alone: %s: %s", metadata.get("namespace"), metadata.get("name"), type(error).__name__, error)
        return None


def _read_record(metadata: dict[str, Any], raw: dict[str, Any]) -> PodRecord | None:
    labels = metadata.get("labels") or {}
    job, attempt, node_rank = (labels.get(label, "") for label in (names.JOB_LABEL, names.ATTEMPT_LABEL, names.NODE_LABEL))
    if not (job and attempt.isdecimal() and node_rank.isdecimal()):
        return None
    return PodRecord(
        namespace=metadata["namespace"],
        job=job,
        owner=_owner(metadata),
        resource_version=int(metadata["resourceVersion"]),
        pod=_read(metadata, int(attempt), int(node_rank), raw.get("spec") or {}, raw.get("status") or {}),
    )


def read_time(text: str | None) -> datetime | None:
    """A Kubernetes time, in UTC."""
    return None if text is None else datetime.fromisoformat(text)


def _owner(metadata: dict[str, Any]) -> str:
    owners = (owner["uid"] for owner in metadata.get("ownerReferences") or () if owner.get("controller") and owner.get("kind") == names.KIND)
    return next(owners, "")


def _read(metadata: dict[str, Any], attempt: int, node_rank: int, spec: dict[str, Any], status: dict[str, Any]) -> Pod:
    conditions = {condition["type"]: condition for condition in status.get("conditions") or ()}
    container = _named(status.get("containerStatuses") or (), names.TRAINER_CONTAINER)
    state = container.get("state") or {}
    ended = state.get("terminated") or {}
    started = "running" in state
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=attempt,
        node_rank=node_rank,
        phase=status.get("phase") or "Pending",
        started=started,
        node=spec.get("nodeName"),
        address=status.get("podIP"),
        exit_code=ended.get("exitCode"),
        finished=read_time(ended.get("finishedAt")),
        termination_message=ended.get("message") or "",
        message=_message(status, state, conditions, spec),
        disrupted=conditions.get("DisruptionTarget", {}).get("status") == "True",
        deletion=read_time(metadata.get("deletionTimestamp")),
        silent_since=_silent_since(conditions.get("Ready", {})) if started else None,
    )


def _named(containers: Iterable[dict[str, Any]], name: str) -> dict[str, Any]:
    return next((container for container in containers if container.get("name") == name), {})


def _silent_since(ready: dict[str, Any]) -> datetime | None:
    return read_time(ready.get("lastTransitionTime")) if ready.get("status") in ("False", "Unknown") else None


def _message(status: dict[str, Any], state: dict[str, Any], conditions: dict[str, dict[str, Any]], spec: dict[str, Any]) -> str:
    """Why it waits or failed: `Evicted: ...`, `OOMKilled`, `ImagePullBackOff: image`, `Unschedulable: ...`; empty when there is nothing to say."""
    if status.get("reason"):
        return _sentence(status["reason"], status.get("message"))
    what = (state.get("terminated") or state.get("waiting") or {}).get("reason")
    if what in ("ErrImagePull", "ImagePullBackOff"):  # a kubelet goes to and fro between the two, with other words each time
        return f"ImagePullBackOff: {_named(spec.get('containers') or (), names.TRAINER_CONTAINER).get('image')}"
    if what and what not in _ORDINARY:
        return _sentence(what, (state.get("waiting") or {}).get("message"))
    scheduled = conditions.get("PodScheduled", {})
    return _sentence(scheduled.get("reason", "Unschedulable"), scheduled.get("message")) if scheduled.get("status") == "False" else ""


def _sentence(reason: str, message: str | None) -> str:
    return f"{reason}: {message}" if message else reason
