"""The status of a FineTuneJob: what users, GitOps tools and the operator itself read back. Written once, here; the CRD is made from it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_trainer.contract import Artifact, Consequence, Contract, Natural, Verification, exit_for
from finetune_trainer.contract import Reason as TrainerReason

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
MESSAGE_LIMIT = 32768
Message = Annotated[str, Field(max_length=MESSAGE_LIMIT)]


class Phase(StrEnum):
    """A summary for printing; never read back."""

    PENDING = "Pending"
    INITIALIZING = "Initializing"
    QUEUED = "Queued"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class OperatorReason(StrEnum):
    """The operator's part of the closed list of reasons; the trainer's part is in its contract."""

    NODE_LOST = "NodeLost"
    POD_DELETED = "PodDeleted"
    POD_FAILED = "PodFailed"
    EVICTED = "Evicted"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    NAME_CONFLICT = "NameConflict"
    INVALID_SPEC = "InvalidSpec"


REASONS: tuple[str, ...] = (*(reason.value for reason in TrainerReason), *(reason.value for reason in OperatorReason))
"""Why a gang or a job ended: the whole closed list."""


def consequence_of(reason: str) -> Consequence:
    """What is done about a reason: give up, try again and count it, or try again without counting."""
    if reason in tuple(TrainerReason):
        return exit_for(TrainerReason(reason)).consequence
    if reason in (OperatorReason.NODE_LOST, OperatorReason.POD_DELETED, OperatorReason.POD_FAILED):
        return Consequence.RETRY
    return Consequence.UNCOUNTED if reason == OperatorReason.EVICTED else Consequence.PERMANENT


class ConditionType(StrEnum):
    """Every condition that the operator writes."""

    SUSPENDED = "Suspended"
    INITIALIZED = "Initialized"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    NAME_CONFLICT = "NameConflict"
    INVALID_SPEC = "InvalidSpec"
    STATUS_INCOMPLETE = "StatusIncomplete"
    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"


class Condition(Contract):
    """Kubernetes' metav1.Condition."""

    type: str = Field(max_length=316, description="What is true or not.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it is.")
    reason: str = Field(min_length=1, max_length=1024, description="Why, in one word.")
    message: Message = Field("", description="Why, in a sentence.")
    last_transition_time: datetime = Field(description="When status last changed.")
    observed_generation: Natural | None = Field(None, description="metadata.generation that this was decided for.")


class PodCounts(Contract):
    """Pods of the newest gang."""

    desired: Count = Field(0, description="Pods of a whole gang.")
    running: Count = Field(0, description="Pods whose trainer runs.")
    succeeded: Count = Field(0, description="Pods that ended well.")
    failed: Count = Field(0, description="Pods that failed.")


class JobProgress(Contract):
    """What rank 0 of the newest gang last said; at most 15 s old while it runs. Numbers have 4 significant digits."""

    stage: str = Field("starting", max_length=64, description="starting, loading, training, saving, exporting, verifying or finished.")
    step: Natural = Field(0, description="Optimizer steps done.")
    total_steps: Natural = Field(0, description="Optimizer steps of the whole run.")
    steps: str = Field("0/0", max_length=64, description="step/totalSteps, for printing.")
    percent: Annotated[int, Field(ge=0, le=100)] = Field(0, description="Of totalSteps.")
    loss: float | None = Field(None, description="Mean over the labelled tokens of the newest global batch.")
    learning_rate: float | None = Field(None, description="Of the newest step.")
    tokens_per_second: float | None = Field(None, description="Over all processes, padding not counted.")
    eta_seconds: float | None = Field(None, description="Time left in training, in seconds.")
    remaining: str | None = Field(None, max_length=64, description="etaSeconds for printing: 31s, 4m10s, 2h05m.")
    last_heartbeat_time: datetime | None = Field(
        None, description="End of the trainer's last piece of work; silent for runPolicy.progressDeadlineSeconds it is a Hang."
    )


class ReasonCount(Contract):
    """How often gangs ended for one reason."""

    reason: str = Field(max_length=64, description="Of the closed list of reasons.")
    count: Count = Field(description="How often.")


class Restarts(Contract):
    """How often the gang was started anew."""

    total: Count = Field(0, description="All restarts.")
    counted: Count = Field(0, description="Those that runPolicy.backoffLimit is compared with: all but preemptions and evictions.")
    reasons: list[ReasonCount] = Field([], max_length=32, description="Why.")


class Failure(Contract):
    """Why the newest gang that failed did so: of the rank that failed first."""

    reason: str = Field(max_length=64, description="Of the closed list of reasons.")
    message: Message = Field("", description="The trainer's own words, or what was seen of its pod.")
    rank: Natural | None = Field(None, description="Rank of the process.")
    node: str | None = Field(None, max_length=253, description="Kubernetes node.")
    exit_code: int | None = Field(None, description="Of the trainer's container.")


class Status(Contract):
    """What has become of the job. Written by the operator."""

    observed_generation: Natural | None = Field(None, description="metadata.generation that this status is about.")
    phase: Phase | None = Field(None, description="Summary for printing. Scripts should read conditions.")
    attempt: Natural = Field(0, description="Number of the newest gang, from 1; rises with every restart and resume.")
    start_time: datetime | None = Field(None, description="When the first gang was made, or the first since the job was resumed.")
    completion_time: datetime | None = Field(None, description="When the job ended.")
    conditions: list[Condition] = Field(
        [], max_length=32, description="What is true of the job.", json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    )
    resolved: dict[str, Any] | None = Field(None, description="What the trainer chose where the spec was silent, by API name.")
    pods: PodCounts | None = Field(None, description="Pods of the newest gang.")
    progress: JobProgress | None = Field(None, description="What the trainer last said.")
    restarts: Restarts = Field(Restarts(), description="How often the gang was started anew.")
    artifacts: list[Artifact] = Field([], max_length=16, description="What was exported.")
    verification: Verification | None = Field(None, description="What was proven about the artifacts.")
    failure: Failure | None = Field(None, description="Why the newest gang that failed did so.")

    def condition(self, kind: ConditionType) -> Condition | None:
        """The condition of a type, when there is one."""
        return next((condition for condition in self.conditions if condition.type == kind), None)

    def is_true(self, kind: ConditionType) -> bool:
        """Whether the condition of a type is there and True."""
        condition = self.condition(kind)
        return condition is not None and condition.status == "True"


class ConditionReason(StrEnum):
    """Reasons of conditions beside those for which gangs and jobs end: the rest of the closed list."""

    CREATED = "Created"
    WAITING_FOR_PODS = "WaitingForPods"
    WAITING_FOR_OLD_PODS = "WaitingForOldPods"
    STARTING = "Starting"
    LOADING = "Loading"
    TRAINING = "Training"
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    RESTARTING = "Restarting"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CREATION_REFUSED = "CreationRefused"
    RETRYING = "Retrying"
    UNANSWERED = "Unanswered"
    NOT_FINITE = "NotFinite"
