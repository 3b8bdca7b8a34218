"""What each reason means and what to do about it: the one table of `finetune status` and of the documentation."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_operator.status import ConditionReason, OperatorReason
from finetune_trainer.contract import Reason

_AGAIN = "delete the job and apply the corrected file"


@dataclass(frozen=True)
class Advice:
    """One row; both are sentences without a full stop."""

    meaning: str
    action: str


ADVICE: dict[str, Advice] = {
    Reason.CONFIGURATION: Advice(
        "The trainer refuses a field of the spec, or what it needs is not there", f"Correct the field that the message names; {_AGAIN}"
    ),
    Reason.DATA: Advice("A data set cannot be read, or none of its rows can be trained on", f"Correct the file and the line that the message names; {_AGAIN}"),
    Reason.MODEL: Advice(
        "The model cannot be loaded: not found, not whole, or of a family that is not supported",
        f"Check model.source, model.revision, the token in model.tokenSecretRef and the cache volume; {_AGAIN}",
    ),
    Reason.VERIFICATION: Advice(
        "What was exported does not give the trainer's results; it is kept, but must not be used",
        "Compare the difference that the message gives with report.json; please report it with both, for this should not happen",
    ),
    Reason.NUMERIC: Advice(
        "The loss or the gradient is no longer finite", f"Lower training.lr, lengthen the warm-up, or look for broken rows in the data; {_AGAIN}"
    ),
    Reason.OUT_OF_MEMORY: Advice(
        "A process ran out of memory; the same layout would do so again",
        f"Lower training.microBatchSize or data.maxLength, set training.recomputeGranularity full, or raise parallelism.tensorModelParallelSize; {_AGAIN}",
    ),
    Reason.DISTRIBUTED: Advice(
        "Processes lost each other: a network fault, or a collective that timed out",
        "Nothing, when it happens once: the gang is started anew. Often: look at the network between the nodes, and at NetworkPolicies",
    ),
    Reason.HANG: Advice(
        "The trainer's heartbeat was silent for runPolicy.progressDeadlineSeconds, or a pod had not ended so long after node 0 had ended well",
        "Nothing, when it happens once: the gang is started anew. Often: look at storage, network and drivers; raise the deadline when single pieces of work take so long",
    ),
    Reason.INTERNAL: Advice("The trainer failed in a way that it did not foresee", "Read `finetune logs NAME`; please report what stands there"),
    Reason.PREEMPTED: Advice(
        "The trainer was asked to stop, and saved its state", "Nothing: the gang is started anew from its checkpoint, and the restart is not counted"
    ),
    OperatorReason.NODE_LOST: Advice(
        "A node was silent for runPolicy.nodeLostSeconds, or is gone",
        "Nothing: the gang is started anew from its checkpoint, on other nodes where there are any",
    ),
    OperatorReason.POD_DELETED: Advice(
        "Somebody deleted a pod of the gang", "Nothing: the gang is started anew from its checkpoint. To stop a job, suspend or delete it"
    ),
    OperatorReason.POD_FAILED: Advice(
        "A pod failed before the trainer could say why", "Look at `kubectl describe pod`: image, command, volumes, limits; and at `finetune logs NAME`"
    ),
    OperatorReason.EVICTED: Advice(
        "The cluster took a pod's place: preemption, a drained node, a full disk", "Nothing: the gang is started anew, and the restart is not counted"
    ),
    OperatorReason.BACKOFF_LIMIT_EXCEEDED: Advice(
        "The gang was started anew runPolicy.backoffLimit times, and failed again",
        "Read status.restarts.reasons and the last failure's message; when its cause is gone, delete the job and apply it again (runPolicy.backoffLimit may be raised while a job runs)",
    ),
    OperatorReason.DEADLINE_EXCEEDED: Advice(
        "The job was active for longer than runPolicy.activeDeadlineSeconds", f"Raise it (that is possible while a job runs) or shorten the training; {_AGAIN}"
    ),
    OperatorReason.NAME_CONFLICT: Advice(
        "An object that is not the job's has the name of its Service, a pod or its claim; it is not touched",
        "Delete or rename the object that the message names, and the job goes on; or give the job another name",
    ),
    OperatorReason.INVALID_SPEC: Advice(
        "The spec cannot be run as it is: a rule across fields, or the API server refuses what was made of it",
        f"Correct the field that the message names; {_AGAIN}",
    ),
    ConditionReason.CREATION_REFUSED: Advice(
        "The API server does not let the operator make the job's Service, claim or pods: quota, admission, missing rights",
        "Do what the message says; the operator tries again by itself",
    ),
    ConditionReason.RETRYING: Advice(
        "The operator has failed several times in a row to act on the job: the API server refuses or does not answer, or the operator has a defect",
        "Do what the message says; where it says nothing, look into the operator's log; it tries again by itself",
    ),
    ConditionReason.UNANSWERED: Advice(
        "The pods run, but rank 0 does not answer the operator, so that nothing is known of its progress; the training itself may go on",
        "Let the operator's pods reach the trainer's port (settings.progressPort, 8080) through NetworkPolicies; see `finetune logs NAME` for what the trainer does",
    ),
    ConditionReason.NOT_FINITE: Advice(
        "A number of the progress is not finite and left out of status, for JSON has no such number",
        "Watch the loss; the job fails with Numeric when it does not recover",
    ),
}
"""By reason. Reasons that are not here tell of the ordinary course of a job."""
