"""A job that begins, runs, is suspended or cannot have its children: each line of the tables is one situation."""

from __future__ import annotations

import pytest

from finetune_operator.lifecycle import decide
from finetune_operator.observed import Refusal
from finetune_operator.problems import InvalidJob, Problem
from situations import (
    ALL_RUN,
    LOADING,
    NEW,
    PENDING,
    RESTARTING,
    SETTINGS,
    SUSPENDED,
    TRAINING,
    Case,
    at,
    check,
    check_again,
    failed,
    heard,
    pod,
    policy,
    running,
    seen,
    succeeded,
)

ENDING = "the pods of the last gang write a checkpoint and end"
SUSPEND = {"suspend": True}
CONFLICT = Refusal("NameConflict", "Service tiny is not this job's")
QUOTA = Refusal("CreationRefused", "exceeded quota: pods")
LEFTOVER = Refusal("Leftover", "pod tiny-1-0 of an earlier job of this name is still ending")
UNREADABLE = InvalidJob(Problem("spec.model", "it is required"))
SETTINGS_CHANGED = Refusal("InvalidSpec", "spec.nodes.image: it is required, because the operator's settings name no trainer image")
UNANSWERED = decide(seen(LOADING, *ALL_RUN, now=70, asked_since=at(10)), SETTINGS).status
HELD_BY_NAME = decide(seen(NEW, refusal=CONFLICT), SETTINGS).status
HELD_BY_QUOTA = decide(seen(NEW, refusal=QUOTA), SETTINGS).status
TERMINATING = (running(0, deletion=at(130)), running(1, deletion=at(130)))

BEGINNING = [
    Case(
        "a new job gets its first gang",
        seen(NEW, now=0.7),
        phase="Pending",
        ready=("False", "WaitingForPods", "waiting for 2 pods to run"),
        true={"Reconciling"},
        create=1,
        missing=(0, 1),
        fields={"attempt": 1, "start_time": at(0), "observed_generation": 1},
    ),
    Case("a gang of which the operator made one pod before it died is completed", seen(NEW, pod(0)), create=1, missing=(1,), again=0.0, phase="Pending"),
    Case("a gang of which only the status was not written is taken over", seen(NEW, *ALL_RUN), create=1, again=0.0, fields={"attempt": 1}),
    Case(
        "a pod of the coming gang that is being deleted is awaited",
        seen(NEW, pod(0, deletion=at(30)), pod(1)),
        again=30.0,
        ready=("False", "WaitingForOldPods", ENDING),
    ),
    Case("a pod that has no place in the gang goes first", seen(NEW, pod(7)), delete=("tiny-1-7",), ready=("False", "WaitingForOldPods", ENDING)),
    Case("pods that wait change nothing", seen(PENDING, pod(0), pod(1), now=60), written=False),
    Case(
        "a job with a deadline looks again when it passes",
        seen(PENDING, pod(0), pod(1), now=60, spec=policy(activeDeadlineSeconds=100)),
        again=40.0,
        written=False,
    ),
    Case("a new job with a deadline looks again when it passes", seen(NEW, spec=policy(activeDeadlineSeconds=100)), create=1, missing=(0, 1), again=100.0),
    Case(
        "why a pod waits is said",
        seen(PENDING, pod(0), pod(1, message="ImagePullBackOff: no/such"), now=5),
        phase="Pending",
        ready=("False", "WaitingForPods", "pod tiny-1-1: ImagePullBackOff: no/such"),
        true={"Reconciling"},
    ),
    Case("the first pod that runs is not yet worth a write", seen(PENDING, running(0), pod(1), now=2), again=13.0, poll="10.0.0.1", written=False),
    Case(
        "after a while the pods that run are counted",
        seen(PENDING, running(0), pod(1), now=15),
        again=60.0,
        poll="10.0.0.1",
        fields={"pods.running": 1},
        phase="Pending",
    ),
    Case("but not more often than progress", seen(PENDING, running(0), pod(1), now=15, progress_due=False), again=15.0, poll="10.0.0.1", written=False),
    Case(
        "all pods run",
        seen(PENDING, *ALL_RUN, now=10),
        phase="Initializing",
        ready=("True", "Training", "2 pods run; model and data are being loaded"),
        true={"Ready", "Running"},
        events=("Normal Started: all pods of gang 1 run",),
        again=60.0,
        poll="10.0.0.1",
        fields={"pods.running": 2},
    ),
    Case("a pod without an address is not asked", seen(LOADING, running(0, address=None), running(1), now=11), written=False),
    Case(
        "what was just made under another generation is about the new one",
        seen(PENDING, pod(0), pod(1), generation=2),
        fields={"observed_generation": 2, "conditions.0.observed_generation": 2},
    ),
]

TRAINING_CASES = [
    Case("nothing new while loading", seen(LOADING, *ALL_RUN, now=12, progress=None), again=60.0, poll="10.0.0.1", written=False),
    Case(
        "the first step",
        seen(LOADING, *ALL_RUN, now=20, progress=heard(when=20, loss=1.23456, learning_rate=8.00001e-5, tokens_per_second=5512.3)),
        phase="Running",
        ready=("True", "Training", "2 pods run"),
        true={"Ready", "Running", "Initialized"},
        again=1800.0,
        poll="10.0.0.1",
        fields={"progress.steps": "5/20", "progress.percent": 25, "progress.loss": 1.235, "progress.learning_rate": 8e-5, "progress.tokens_per_second": 5512.0},
    ),
    Case(
        "progress that is due is written",
        seen(TRAINING, *ALL_RUN, now=40, progress=heard(step=7, when=40)),
        again=1800.0,
        poll="10.0.0.1",
        fields={"progress.step": 7},
    ),
    Case(
        "progress that is not due is not",
        seen(TRAINING, *ALL_RUN, now=30, progress=heard(step=7), progress_due=False),
        again=15.0,
        poll="10.0.0.1",
        written=False,
    ),
    Case(
        "progress goes along with what is written anyway",
        seen(LOADING, *ALL_RUN, now=30, progress=heard(step=7), progress_due=False),
        again=1800.0,
        poll="10.0.0.1",
        phase="Running",
        fields={"progress.step": 7},
    ),
    Case(
        "what the trainer chose is shown",
        seen(TRAINING, *ALL_RUN, now=30, progress=heard(resolved={"training.lr": 1e-4})),
        again=1800.0,
        poll="10.0.0.1",
        fields={"resolved": {"training.lr": 1e-4}},
    ),
    Case(
        "numbers that are not finite are left out and named",
        seen(TRAINING, *ALL_RUN, now=30, progress=heard(loss=float("nan"), learning_rate=float("inf"))),
        true={"Ready", "Running", "Initialized", "StatusIncomplete"},
        again=1800.0,
        poll="10.0.0.1",
        fields={"progress.loss": None, "progress.learning_rate": None},
    ),
    Case(
        "after the operator's restart the status stands until the trainer answers",
        seen(TRAINING, *ALL_RUN, now=5000),
        again=60.0,
        poll="10.0.0.1",
        written=False,
    ),
    Case(
        "a trainer that was asked for a moment has time to answer",
        seen(LOADING, *ALL_RUN, now=30, asked_since=at(10)),
        again=40.0,
        poll="10.0.0.1",
        written=False,
    ),
    Case(
        "a trainer that does not answer is said, and goes on",
        seen(LOADING, *ALL_RUN, now=70, asked_since=at(10)),
        phase="Initializing",
        ready=("False", "Unanswered", "2 pods run; rank 0 at 10.0.0.1:8080 does not answer; is there a NetworkPolicy?"),
        true={"Running", "Reconciling"},
        poll="10.0.0.1",
    ),
    Case("it is said once", seen(UNANSWERED, *ALL_RUN, now=90000, asked_since=at(10)), poll="10.0.0.1", written=False),
    Case(
        "and taken back when it answers",
        seen(UNANSWERED, *ALL_RUN, now=100, asked_since=at(10), progress=heard(when=100)),
        phase="Running",
        ready=("True", "Training", "2 pods run"),
        true={"Ready", "Running", "Initialized"},
        again=1800.0,
        poll="10.0.0.1",
    ),
    Case(
        "a spec that can no longer be read does not end what runs",
        seen(TRAINING, *ALL_RUN, now=5000, job=None, invalid=UNREADABLE, progress=heard(when=30)),
        phase="Running",
        ready=("True", "Training", "2 pods run"),
        again=2147478677.0,
        poll="10.0.0.1",
    ),
    Case(
        "a pod that has ended well does not end the gang",
        seen(TRAINING, running(0), succeeded(1), now=101),
        phase="Running",
        again=60.0,
        poll="10.0.0.1",
        fields={"pods.succeeded": 1},
    ),
    Case(
        "a pod of an earlier gang that turns up is deleted",
        seen(TRAINING, *ALL_RUN, running(0, 0), now=30),
        delete=("tiny-0-0",),
        again=60.0,
        poll="10.0.0.1",
        written=False,
    ),
    Case(
        "a pod of a gang that was never made is deleted",
        seen(TRAINING, *ALL_RUN, pod(0, 3), now=30),
        delete=("tiny-3-0",),
        again=60.0,
        poll="10.0.0.1",
        written=False,
    ),
    Case("a refusal of long ago does not hold a gang that runs", seen(TRAINING, *ALL_RUN, now=30, refusal=QUOTA), again=60.0, poll="10.0.0.1", written=False),
    Case("a deadline looms", seen(TRAINING, *ALL_RUN, now=30, spec=policy(activeDeadlineSeconds=100)), poll="10.0.0.1", again=60.0, written=False),
]

SUSPENSION = [
    Case(
        "a job that is suspended from the start has no children",
        seen(NEW, spec=SUSPEND),
        phase="Suspended",
        ready=("True", "Suspended", "suspended by spec.suspend"),
        true={"Ready", "Suspended"},
        events=("Normal Suspended: spec.suspend is true",),
        fields={"attempt": 0, "start_time": None, "pods.desired": 2},
    ),
    Case(
        "a gang is stopped",
        seen(TRAINING, *ALL_RUN, now=100, spec=SUSPEND),
        phase="Suspended",
        ready=("False", "WaitingForOldPods", ENDING),
        true={"Suspended", "Reconciling", "Initialized"},
        delete=("tiny-1-0", "tiny-1-1"),
        events=("Normal Suspended: spec.suspend is true",),
        fields={"start_time": None, "restarts.total": 0, "attempt": 1, "pods.running": 0},
    ),
    Case(
        "half a gang is stopped",
        seen(NEW, pod(0), spec=SUSPEND),
        phase="Suspended",
        delete=("tiny-1-0",),
        events=("Normal Suspended: spec.suspend is true",),
        fields={"attempt": 0},
    ),
    Case(
        "its last pod has ended",
        seen(SUSPENDED, now=130, spec=SUSPEND),
        phase="Suspended",
        written=False,
        ready=("True", "Suspended", "suspended by spec.suspend"),
    ),
    Case("a deadline does not pass while suspended", seen(SUSPENDED, now=9999, spec={**SUSPEND, **policy(activeDeadlineSeconds=10)}), written=False),
    Case(
        "an exit of 143 of a suspended gang is not a failure",
        seen(SUSPENDED, failed(0, 143), now=110, spec=SUSPEND),
        delete=("tiny-1-0",),
        phase="Suspended",
        fields={"failure": None},
    ),
    Case(
        "resumed, the old pods are awaited", seen(SUSPENDED, *TERMINATING, now=110), phase="Pending", ready=("False", "WaitingForOldPods", ENDING), again=20.0
    ),
    Case(
        "and a new gang is made",
        seen(SUSPENDED, now=140),
        phase="Pending",
        true={"Reconciling"},
        create=2,
        missing=(0, 1),
        events=("Normal Resumed: gang 2 is made",),
        fields={"attempt": 2, "start_time": at(140), "restarts.total": 0},
    ),
    Case(
        "a job that waits for its restart can be suspended",
        seen(RESTARTING, now=110, spec=SUSPEND),
        true={"Ready", "Suspended", "Initialized"},
        phase="Suspended",
        events=("Normal Suspended: spec.suspend is true",),
    ),
    Case(
        "a name conflict does not hold a suspension",
        seen(HELD_BY_NAME, now=10, spec=SUSPEND, refusal=CONFLICT),
        true={"Ready", "Suspended"},
        phase="Suspended",
        events=("Normal Suspended: spec.suspend is true",),
    ),
]

REFUSALS = [
    Case(
        "a foreign object has the name",
        seen(NEW, refusal=CONFLICT),
        phase="Pending",
        ready=("False", "NameConflict", "Service tiny is not this job's"),
        true={"NameConflict", "Stalled"},
        events=("Warning NameConflict: Service tiny is not this job's",),
        again=30.0,
        fields={"attempt": 0, "start_time": None},
    ),
    Case("it is told once", seen(HELD_BY_NAME, now=30, refusal=CONFLICT), again=30.0, written=False),
    Case("it is tried again", seen(HELD_BY_NAME, now=30), create=1, missing=(0, 1), true={"Reconciling"}, phase="Pending"),
    Case(
        "while restarting the phase stays",
        seen(RESTARTING, now=140, refusal=CONFLICT),
        phase="Restarting",
        true={"NameConflict", "Stalled", "Restarting", "Initialized"},
        events=("Warning NameConflict: Service tiny is not this job's",),
        again=30.0,
    ),
    Case(
        "a quota is used up",
        seen(NEW, refusal=QUOTA),
        phase="Pending",
        ready=("False", "CreationRefused", "exceeded quota: pods"),
        true={"Reconciling"},
        again=30.0,
    ),
    Case(
        "a quota after a conflict",
        seen(HELD_BY_NAME, now=30, refusal=QUOTA),
        true={"Reconciling"},
        ready=("False", "CreationRefused", "exceeded quota: pods"),
        again=30.0,
    ),
    Case("a refusal is told once", seen(HELD_BY_QUOTA, now=30, refusal=QUOTA), again=30.0, written=False),
    Case(
        "what was made before and cannot be now is held: its spec is not at fault",
        seen(RESTARTING, now=140, refusal=SETTINGS_CHANGED),
        phase="Restarting",
        true={"Reconciling", "Restarting", "Initialized"},
        ready=("False", "CreationRefused", "spec.nodes.image: it is required, because the operator's settings name no trainer image"),
        again=30.0,
    ),
    Case(
        "so is a gang whose spec can no longer be read",
        seen(RESTARTING, now=140, job=None, invalid=UNREADABLE),
        phase="Restarting",
        ready=("False", "CreationRefused", "spec.model: it is required"),
        again=30.0,
    ),
    Case(
        "but its old pods end first",
        seen(RESTARTING, running(0), now=140, job=None, invalid=UNREADABLE),
        delete=("tiny-1-0",),
        written=False,
    ),
    Case("half a gang is kept while the rest is refused", seen(HELD_BY_QUOTA, running(0), now=30, refusal=QUOTA), again=30.0, written=False),
    Case(
        "the children of an earlier job of this name are awaited",
        seen(NEW, refusal=LEFTOVER),
        phase="Pending",
        true={"Reconciling"},
        ready=("False", "WaitingForOldPods", "pod tiny-1-0 of an earlier job of this name is still ending"),
        again=3.0,
    ),
]

TABLES = [*BEGINNING, *TRAINING_CASES, *SUSPENSION, *REFUSALS]


@pytest.mark.parametrize("case", TABLES, ids=lambda case: case.name)
def test_decision(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", TABLES, ids=lambda case: case.name)
def test_status_survives_the_cluster_and_is_decided_once(case: Case) -> None:
    check_again(case)


def test_names_of_situations_differ() -> None:
    assert len({case.name for case in TABLES}) == len(TABLES)


def test_what_is_left_out_of_the_status_is_named() -> None:
    status = decide(seen(TRAINING, *ALL_RUN, now=30, progress=heard(loss=float("nan"), eta_seconds=float("inf"))), SETTINGS).status
    condition = status.condition("StatusIncomplete")
    assert condition is not None
    assert (condition.reason, condition.message) == ("NotFinite", "left out of progress because not finite: loss, etaSeconds")
    assert decide(seen(status, *ALL_RUN, now=60, progress=heard()), SETTINGS).status.condition("StatusIncomplete") is None


def test_conditions_that_end_are_false_with_a_reason() -> None:
    resumed = decide(seen(SUSPENDED, now=140), SETTINGS).status.condition("Suspended")
    restarted = decide(seen(RESTARTING, now=140), SETTINGS).status.condition("Restarting")
    unblocked = decide(seen(HELD_BY_NAME, now=30), SETTINGS).status.condition("NameConflict")
    told = [(each.status, each.reason, each.last_transition_time) for each in (resumed, restarted, unblocked) if each is not None]
    assert told == [("False", "Resumed", at(140)), ("False", "Created", at(140)), ("False", "Created", at(30))]
