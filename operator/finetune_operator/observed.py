"""What a decision is made from: a job, its status, its pods and their nodes at one moment. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from finetune_operator.problems import InvalidJob
from finetune_operator.schema import FineTuneJob
from finetune_operator.status import Status
from finetune_operator.workload import RunPolicy
from finetune_trainer.contract import Progress

UNREAD_POLICY = RunPolicy(progress_deadline_seconds=2**31 - 1, backoff_limit=2**31 - 1)
"""Of a job whose spec cannot be read: it is not failed for limits that are not its own. No gang is made of it either."""


@dataclass(frozen=True)
class Pod:
    """What matters of one pod of a job, of any gang."""

    name: str
    uid: str
    attempt: int
    node_rank: int
    phase: Literal["Pending", "Running", "Succeeded", "Failed", "Unknown"] = "Pending"
    started: bool = False
    """Whether the trainer's container runs."""
    node: str | None = None
    """Kubernetes node that it was bound to."""
    address: str | None = None
    """IP address."""
    exit_code: int | None = None
    """Of the trainer's container, when it has ended."""
    finished: datetime | None = None
    """When the trainer's container ended."""
    termination_message: str = ""
    message: str = ""
    """Why it waits or failed, in Kubernetes' words: ImagePullBackOff: ..., Unschedulable: ..., Evicted: ..."""
    disrupted: bool = False
    """Condition DisruptionTarget: preempted, drained or evicted by the cluster."""
    deletion: datetime | None = None
    """metadata.deletionTimestamp: when its grace period ends."""
    silent_since: datetime | None = None
    """Since when its kubelet has not been heard: condition Ready is False or Unknown while the container runs; a hint to look at the node."""

    @property
    def succeeded(self) -> bool:
        """Whether the trainer ended well. Its own container decides: a container of the user's in the same pod may run on, or fail."""
        return self.exit_code == 0 or (self.exit_code is None and self.phase == "Succeeded")

    @property
    def failed(self) -> bool:
        """Whether the trainer failed, or the pod before it could start."""
        return not self.succeeded and (self.exit_code is not None or self.phase == "Failed")

    @property
    def ended(self) -> bool:
        """Whether the trainer has ended."""
        return self.succeeded or self.failed

    @property
    def begun(self) -> bool:
        """Whether the trainer runs or has ended."""
        return self.started or self.ended

    @property
    def active(self) -> bool:
        """Whether a container of it may still run."""
        return self.phase not in ("Succeeded", "Failed")


@dataclass(frozen=True)
class Node:
    """A Kubernetes node that was looked at because one of its pods is silent or does not end."""

    name: str
    exists: bool
    silent_since: datetime | None = None
    """Since when condition Ready is not True; None: it is ready."""


@dataclass(frozen=True)
class Refusal:
    """A child that could not be made, and why; the answer of the last attempt to make it."""

    kind: Literal["NameConflict", "InvalidSpec", "CreationRefused", "Leftover"]
    """NameConflict: a foreign object has its name. InvalidSpec: the API server calls it invalid. CreationRefused: quota, admission, missing rights.
    Leftover: a child of an earlier job of this name is still going."""
    message: str


@dataclass(frozen=True)
class Observed:
    """Everything that a decision is made from, besides the job and the settings."""

    now: datetime
    job: FineTuneJob | None
    """None: its spec cannot be read; `invalid` says why."""
    generation: int
    status: Status
    pods: tuple[Pod, ...] = ()
    """Pods of this job (by owner's uid) that exist, of any gang, also those being deleted."""
    nodes: tuple[Node, ...] = ()
    progress: Progress | None = None
    """What rank 0 of gang `status.attempt` last answered; None: nothing yet."""
    progress_due: bool = True
    """Whether progress may be written now: the last write of it is old enough."""
    asked_since: datetime | None = None
    """Since when this process has asked rank 0 of gang `status.attempt` for its progress; None: not yet."""
    heartbeat_seen: datetime | None = None
    """When this process first saw the heartbeat that `progress` has, by its own clock; None: nothing heard yet."""
    invalid: InvalidJob | None = None
    refusal: Refusal | None = None
    """Of the attempt to make children that was just carried out; None when it is time to try again."""

    @property
    def policy(self) -> RunPolicy:
        """The job's runPolicy; where its spec cannot be read, one without limits."""
        return UNREAD_POLICY if self.job is None else self.job.spec.run_policy

    @property
    def desired(self) -> int:
        """Pods of a whole gang; where the spec cannot be read, of the one that was made."""
        if self.job is not None:
            return self.job.spec.nodes.count
        if self.status.pods is not None:
            return self.status.pods.desired
        return sum(pod.attempt == self.status.attempt for pod in self.pods) or min(self.status.attempt, 1)

    @property
    def gang(self) -> tuple[Pod, ...]:
        """The pods of gang `status.attempt`, by their node rank."""
        return self.members(self.status.attempt)

    def members(self, attempt: int) -> tuple[Pod, ...]:
        """The pods of a gang, by their node rank."""
        found = (pod for pod in self.pods if pod.attempt == attempt and 0 <= pod.node_rank < self.desired)
        return tuple(sorted(found, key=lambda pod: pod.node_rank))

    def node_of(self, pod: Pod) -> Node | None:
        """The node of a pod, when it was looked at."""
        return next((node for node in self.nodes if node.name == pod.node), None)

    def lost_in(self, pod: Pod) -> float | None:
        """Seconds until a pod's node counts as lost, 0 when it does; None while nothing is wrong with it as far as is known."""
        node = self.node_of(pod)
        if node is None or (node.exists and node.silent_since is None):
            return None
        if not node.exists or node.silent_since is None:
            return 0.0
        return self.seconds_until(node.silent_since, self.policy.node_lost_seconds)

    def seconds_until(self, since: datetime, seconds: float) -> float:
        """Seconds until so many have passed since a moment, 0 when they have."""
        return max(0.0, (since + timedelta(seconds=seconds) - self.now).total_seconds())
