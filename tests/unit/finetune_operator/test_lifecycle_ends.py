"""A gang that ends, and what follows: each line of the tables is one situation."""

from __future__ import annotations

import pytest

from finetune_operator.lifecycle import decide
from finetune_operator.observed import Refusal
from finetune_operator.problems import InvalidJob, Problem
from finetune_operator.status import Restarts, Status
from finetune_trainer.contract import Reason
from situations import (
    ALL_RUN,
    FAILED,
    NEW,
    PENDING,
    PREEMPTED,
    RESTARTING,
    SETTINGS,
    SUCCEEDED,
    TRAINING,
    Case,
    after,
    at,
    check,
    check_again,
    failed,
    node,
    pod,
    policy,
    running,
    seen,
    succeeded,
    told_failure,
    told_success,
)

GONE = "gang 1 ended: PodDeleted: pod tiny-1-1 is gone"
DELETED = "gang 1 ended: PodDeleted: pod tiny-1-1 was deleted"
EXIT_HANGS = (
    "gang 1 ended: Hang: node 0 ended well at 2026-05-04T12:01:40Z, but pod tiny-1-1 did not end within 1800 s after that (runPolicy.progressDeadlineSeconds)"
)
UNREAD = "node 0 left no report that can be read, so what was exported and verified is not known here; report.json is on the work volume"
EXPORTED = "peft at /work/default/tiny/u/peft; verified: Adapter"
SUSPEND = {"suspend": True}
REFUSED_SPEC = Refusal("InvalidSpec", "nodes.podTemplate.spec.containers[0].image: Required value")
INVALID = InvalidJob(Problem("spec.volumes.work", "it is required in a cluster"), Problem("spec.nodes.count", "it must be at least 1"))
HALF_ENDED = after(TRAINING, succeeded(0), running(1), now=101)
OFTEN_RESTARTED = TRAINING.model_copy(update={"restarts": Restarts(total=9, counted=9)})

ENDING_WELL = [
    Case(
        "all pods have ended well",
        seen(TRAINING, succeeded(0, termination_message=told_success()), succeeded(1), now=101),
        phase="Succeeded",
        ready=("True", "Succeeded", EXPORTED),
        true={"Ready", "Succeeded", "Initialized"},
        events=(f"Normal Succeeded: {EXPORTED}",),
        fields={
            "progress.step": 20,
            "progress.steps": "20/20",
            "progress.stage": "finished",
            "progress.percent": 100,
            "completion_time": at(101),
            "pods.running": 0,
        },
    ),
    Case(
        "a job that was never asked for its progress",
        seen(PENDING, succeeded(0), succeeded(1), now=9),
        phase="Succeeded",
        events=(f"Normal Succeeded: {UNREAD}",),
        fields={"progress": None},
    ),
    Case(
        "a report that was cut is not believed",
        seen(TRAINING, succeeded(0, termination_message=told_success()[:-40]), succeeded(1), now=101),
        ready=("True", "Succeeded", UNREAD),
        events=(f"Normal Succeeded: {UNREAD}",),
        fields={"artifacts": [], "verification": None},
    ),
    Case(
        "success counts more than a deadline that has passed meanwhile",
        seen(TRAINING, succeeded(0), succeeded(1), now=500, spec=policy(activeDeadlineSeconds=100)),
        phase="Succeeded",
        events=(f"Normal Succeeded: {UNREAD}",),
    ),
    Case(
        "success counts more than a suspension at the same time",
        seen(TRAINING, succeeded(0), succeeded(1), now=101, spec=SUSPEND),
        phase="Succeeded",
        events=(f"Normal Succeeded: {UNREAD}",),
    ),
    Case(
        "a container of the user's that runs on does not hold success back",
        seen(TRAINING, succeeded(0, phase="Running"), succeeded(1), now=101, spec=policy(cleanPodPolicy="Running")),
        phase="Succeeded",
        delete=("tiny-1-0",),
        events=(f"Normal Succeeded: {UNREAD}",),
    ),
    Case("pods that ended well stay", seen(SUCCEEDED, succeeded(0), succeeded(1), now=200), written=False),
    Case(
        "unless all are to be cleaned up",
        seen(SUCCEEDED, succeeded(0), succeeded(1), now=200, spec=policy(cleanPodPolicy="All")),
        delete=("tiny-1-0", "tiny-1-1"),
        written=False,
    ),
    Case("success is for ever: its pods may go", seen(SUCCEEDED, now=200), written=False),
    Case("success is for ever: suspend changes nothing", seen(SUCCEEDED, now=200, spec=SUSPEND), written=False),
    Case("success is for ever: a spec that can no longer be read changes nothing", seen(SUCCEEDED, now=200, job=None, invalid=INVALID), written=False),
    Case(
        "a new generation of a job that has ended is acknowledged",
        seen(SUCCEEDED, now=200, generation=3),
        fields={"observed_generation": 3, "completion_time": at(100)},
        phase="Succeeded",
    ),
]

GIVING_UP = [
    Case(
        "what no restart mends ends the job",
        seen(TRAINING, running(0), failed(1, 12, termination_message=told_failure(Reason.MODEL, "model.source: /no/such", 12)), now=101),
        phase="Failed",
        ready=("False", "Failed", "Model: model.source: /no/such"),
        true={"Failed", "Stalled", "Initialized"},
        delete=("tiny-1-0",),
        events=("Warning Failed: Model: model.source: /no/such",),
        fields={
            "failure.reason": "Model",
            "failure.rank": 3,
            "failure.node": "node-1",
            "failure.exit_code": 12,
            "completion_time": at(101),
            "restarts.total": 0,
        },
    ),
    Case(
        "with clean-up of all, its failed pods go too",
        seen(TRAINING, running(0), failed(1, 10), now=101, spec=policy(cleanPodPolicy="All")),
        phase="Failed",
        delete=("tiny-1-0", "tiny-1-1"),
        events=("Warning Failed: Configuration: pod tiny-1-1 ended with exit code 10 and left no report",),
    ),
    Case(
        "the last restart is used up",
        seen(TRAINING, running(0), failed(1, 1), now=101, spec=policy(backoffLimit=0)),
        phase="Failed",
        ready=(
            "False",
            "Failed",
            "BackoffLimitExceeded: 0 counted restarts of 0 (runPolicy.backoffLimit) are used up; "
            "the last gang ended: Internal: pod tiny-1-1 ended with exit code 1 and left no report",
        ),
        delete=("tiny-1-0",),
        events=(
            "Warning Failed: BackoffLimitExceeded: 0 counted restarts of 0 (runPolicy.backoffLimit) are used up; "
            "the last gang ended: Internal: pod tiny-1-1 ended with exit code 1 and left no report",
        ),
        fields={"failure.reason": "Internal", "restarts.counted": 0},
    ),
    Case(
        "the job was active for too long",
        seen(TRAINING, *ALL_RUN, now=100, spec=policy(activeDeadlineSeconds=100)),
        phase="Failed",
        ready=("False", "Failed", "DeadlineExceeded: the job was active for 100 s (runPolicy.activeDeadlineSeconds)"),
        delete=("tiny-1-0", "tiny-1-1"),
        events=("Warning Failed: DeadlineExceeded: the job was active for 100 s (runPolicy.activeDeadlineSeconds)",),
        fields={"failure.reason": "DeadlineExceeded", "pods.running": 0},
    ),
    Case(
        "the deadline counts between two gangs too",
        seen(RESTARTING, now=150, spec=policy(activeDeadlineSeconds=150)),
        phase="Failed",
        true={"Failed", "Stalled", "Initialized"},
        events=("Warning Failed: DeadlineExceeded: the job was active for 150 s (runPolicy.activeDeadlineSeconds)",),
    ),
    Case(
        "the plan refuses the job",
        seen(NEW, invalid=INVALID),
        phase="Failed",
        ready=("False", "Failed", "InvalidSpec: spec.volumes.work: it is required in a cluster; spec.nodes.count: it must be at least 1"),
        true={"InvalidSpec", "Failed", "Stalled"},
        events=("Warning InvalidSpec: spec.volumes.work: it is required in a cluster; spec.nodes.count: it must be at least 1",),
        fields={"failure.reason": "InvalidSpec", "completion_time": at(0), "attempt": 0},
    ),
    Case(
        "a spec that cannot be read",
        seen(NEW, job=None, invalid=InvalidJob(Problem("spec.model", "it is required"))),
        phase="Failed",
        events=("Warning InvalidSpec: spec.model: it is required",),
    ),
    Case(
        "what no restart mends ends a job whose spec can no longer be read",
        seen(TRAINING, running(0), failed(1, 10), now=101, job=None, invalid=INVALID),
        phase="Failed",
        delete=("tiny-1-0",),
        events=("Warning Failed: Configuration: pod tiny-1-1 ended with exit code 10 and left no report",),
    ),
    Case(
        "a gang that ends is not failed for limits of a spec that can no longer be read",
        seen(OFTEN_RESTARTED, running(0), now=101, job=None, invalid=INVALID),
        phase="Restarting",
        delete=("tiny-1-0",),
        events=("Warning Restarting: gang 1 ended: PodDeleted: pod of node 1 is gone",),
        fields={"restarts.counted": 10},
    ),
    Case(
        "a gang of which neither spec nor status tell how large it is",
        seen(TRAINING.model_copy(update={"pods": None}), failed(0, 1), now=101, job=None, invalid=INVALID),
        phase="Restarting",
        delete=("tiny-1-0",),
        events=("Warning Restarting: gang 1 ended: Internal: pod tiny-1-0 ended with exit code 1 and left no report",),
    ),
    Case(
        "success counts though the spec can no longer be read",
        seen(TRAINING, succeeded(0), succeeded(1), now=101, job=None, invalid=INVALID),
        phase="Succeeded",
        events=(f"Normal Succeeded: {UNREAD}",),
    ),
    Case(
        "the API server calls a child invalid",
        seen(NEW, refusal=REFUSED_SPEC),
        phase="Failed",
        true={"InvalidSpec", "Failed", "Stalled"},
        ready=("False", "Failed", "InvalidSpec: nodes.podTemplate.spec.containers[0].image: Required value"),
        events=("Warning InvalidSpec: nodes.podTemplate.spec.containers[0].image: Required value",),
    ),
    Case(
        "half a gang that was refused goes",
        seen(NEW, pod(0), refusal=REFUSED_SPEC),
        phase="Failed",
        delete=("tiny-1-0",),
        events=("Warning InvalidSpec: nodes.podTemplate.spec.containers[0].image: Required value",),
    ),
    Case("what the operator left running when it died is deleted", seen(FAILED, failed(0, 10), running(1), now=200), delete=("tiny-1-1",), written=False),
    Case("failed pods stay for their logs", seen(FAILED, failed(0, 10), now=200), written=False),
    Case("a pod that is being deleted is left to its kubelet", seen(FAILED, running(1, deletion=at(230)), now=200), again=30.0, written=False),
    Case(
        "and forced where its node is no more",
        seen(FAILED, running(1, deletion=at(230)), now=230, nodes=(node(1, exists=False),)),
        delete=("tiny-1-1!",),
        written=False,
    ),
    Case("failure is for ever", seen(FAILED, now=200, spec=policy(backoffLimit=9)), written=False),
]

GANGS = [
    Case(
        "a pod is gone",
        seen(TRAINING, running(0), now=101),
        phase="Restarting",
        ready=("False", "Restarting", GONE),
        true={"Restarting", "Reconciling", "Initialized"},
        delete=("tiny-1-0",),
        events=(f"Warning Restarting: {GONE}",),
        fields={
            "attempt": 1,
            "restarts.total": 1,
            "restarts.counted": 1,
            "restarts.reasons.0.reason": "PodDeleted",
            "failure.reason": "PodDeleted",
            "pods.running": 0,
        },
    ),
    Case(
        "a pod is being deleted",
        seen(TRAINING, running(0), running(1, deletion=at(131)), now=101),
        phase="Restarting",
        delete=("tiny-1-0",),
        events=(f"Warning Restarting: {DELETED}",),
        again=30.0,
    ),
    Case(
        "a pod that was evicted does not count",
        seen(TRAINING, running(0), running(1, deletion=at(131), disrupted=True), now=101),
        delete=("tiny-1-0",),
        events=("Warning Restarting: gang 1 ended: Evicted: pod tiny-1-1 was evicted from node node-1",),
        again=30.0,
        fields={"restarts.total": 1, "restarts.counted": 0, "failure.reason": "Evicted"},
    ),
    Case(
        "the cause is awaited before a consequence counts",
        seen(TRAINING, running(0), failed(1, 20, finished=at(99)), now=101),
        again=3.0,
        poll="10.0.0.1",
        written=False,
    ),
    Case(
        "a silent node is awaited",
        seen(TRAINING, running(0), running(1, silent_since=at(50)), now=101, nodes=(node(1, 50),)),
        again=60.0,
        poll="10.0.0.1",
        written=False,
    ),
    Case(
        "a lost node ends the gang",
        seen(TRAINING, running(0), running(1, silent_since=at(50)), now=350, nodes=(node(1, 50),)),
        phase="Restarting",
        delete=("tiny-1-0", "tiny-1-1"),
        events=("Warning Restarting: gang 1 ended: NodeLost: node node-1 of pod tiny-1-1 was not ready for 300 s (runPolicy.nodeLostSeconds)",),
    ),
    Case(
        "the others are awaited when node 0 has ended well",
        seen(HALF_ENDED, succeeded(0), running(1), now=130),
        again=1770.0,
        written=False,
    ),
    Case(
        "as long as the spec says",
        seen(HALF_ENDED, succeeded(0), running(1), now=130, spec=policy(progressDeadlineSeconds=700)),
        again=670.0,
        written=False,
    ),
    Case(
        "a pod that ends before the deadline changes nothing",
        seen(HALF_ENDED, succeeded(0), succeeded(1, finished=at(1899)), now=1901),
        phase="Succeeded",
        events=(f"Normal Succeeded: {UNREAD}",),
    ),
    Case(
        "nor one that ends late, when that is seen first",
        seen(HALF_ENDED, succeeded(0), succeeded(1, finished=at(5000)), now=5001),
        phase="Succeeded",
        events=(f"Normal Succeeded: {UNREAD}",),
    ),
    Case(
        "a pod that hangs at its exit ends the gang",
        seen(HALF_ENDED, succeeded(0), running(1), now=1900),
        phase="Restarting",
        ready=("False", "Restarting", EXIT_HANGS),
        delete=("tiny-1-0", "tiny-1-1"),
        events=(f"Warning Restarting: {EXIT_HANGS}",),
        fields={"restarts.counted": 1, "failure.reason": "Hang", "failure.node": "node-1"},
    ),
    Case(
        "a gang that was judged is not judged again",
        seen(RESTARTING, running(0, deletion=at(131)), failed(1, 10), now=102),
        delete=("tiny-1-1",),
        again=29.0,
        written=False,
    ),
    Case("its pods that the operator had no time to delete go", seen(RESTARTING, *ALL_RUN, now=102), delete=("tiny-1-0", "tiny-1-1"), written=False),
    Case("a pod that does not end is looked at again", seen(RESTARTING, running(0, deletion=at(131)), now=140), again=30.0, written=False),
    Case(
        "a pod on a silent node waits until that counts as lost",
        seen(RESTARTING, running(0, deletion=at(131)), now=140, nodes=(node(0, 90),)),
        again=250.0,
        written=False,
    ),
    Case("and is forced then", seen(RESTARTING, running(0, deletion=at(131)), now=390, nodes=(node(0, 90),)), delete=("tiny-1-0!",), written=False),
    Case("not before its grace has passed", seen(RESTARTING, running(0, deletion=at(131)), now=130, nodes=(node(0, exists=False),)), again=1.0, written=False),
    Case(
        "the next gang is made when no old pod is left",
        seen(RESTARTING, now=133),
        phase="Pending",
        ready=("False", "WaitingForPods", "waiting for 2 pods to run"),
        true={"Reconciling"},
        create=2,
        missing=(0, 1),
        fields={"attempt": 2, "progress": None, "start_time": at(0), "restarts.counted": 1, "failure.reason": "PodDeleted"},
    ),
    Case("half a next gang is completed", seen(RESTARTING, pod(1, 2), now=133), create=2, missing=(0,), again=0.0, fields={"attempt": 2}),
    Case("but not beside an old pod", seen(RESTARTING, pod(1, 2), running(0, deletion=at(150)), now=133), again=17.0, written=False),
    Case("a preempted gang waits before the next", seen(PREEMPTED, now=104), again=6.0, written=False),
    Case("and is made then", seen(PREEMPTED, now=110), create=2, missing=(0, 1), fields={"restarts.total": 1, "restarts.counted": 0}),
]

TABLES = [*ENDING_WELL, *GIVING_UP, *GANGS]


@pytest.mark.parametrize("case", TABLES, ids=lambda case: case.name)
def test_decision(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", TABLES, ids=lambda case: case.name)
def test_status_survives_the_cluster_and_is_decided_once(case: Case) -> None:
    check_again(case)


def test_names_of_situations_differ() -> None:
    assert len({case.name for case in TABLES}) == len(TABLES)


def test_preemptions_in_a_row_wait_longer_each_time_up_to_a_limit() -> None:
    status, now, waits = TRAINING, 1000.0, []
    for attempt in range(1, 9):
        judged = decide(seen(status, failed(0, 143, attempt), failed(1, 143, attempt), now=now), SETTINGS).status
        waiting = decide(seen(judged, now=now), SETTINGS)
        waits.append(waiting.again_after)
        now += waiting.again_after or 0
        made = decide(seen(judged, now=now), SETTINGS)
        assert made.create == attempt + 1
        status = made.status
    assert waits == [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0, 300.0]
    assert status.restarts.counted == 0


def test_restarts_are_counted_by_reason_until_they_are_used_up() -> None:
    status = TRAINING
    for attempt in (1, 2, 3):
        judged = decide(seen(status, running(0, attempt), now=100), SETTINGS).status
        status = decide(seen(judged, now=100), SETTINGS).status
    assert (status.attempt, status.restarts.total, status.restarts.counted) == (4, 3, 3)
    assert [(each.reason, each.count) for each in status.restarts.reasons] == [("PodDeleted", 3)]
    last = decide(seen(status, running(0, 4), now=100), SETTINGS).status
    condition = last.condition("Failed")
    assert condition is not None
    assert (condition.reason, condition.message) == (
        "BackoffLimitExceeded",
        "3 counted restarts of 3 (runPolicy.backoffLimit) are used up; the last gang ended: PodDeleted: pod tiny-4-1 is gone",
    )
    assert (last.failure.reason if last.failure else None, last.restarts.counted, last.attempt) == ("PodDeleted", 3, 4)


@pytest.mark.parametrize("message", ["x" * 40000, "行" * 40000], ids=["ascii", "not ascii"])
def test_a_long_refusal_is_cut_to_what_the_status_takes(message: str) -> None:
    status = decide(seen(NEW, refusal=Refusal("InvalidSpec", message)), SETTINGS).status
    assert status.failure is not None
    words = [status.failure.message, *(condition.message for condition in status.conditions)]
    assert {len(each) for each in words} == {32768}
    assert Status.model_validate_json(status.model_dump_json(by_alias=True, exclude_none=True)) == status


def test_a_long_message_of_a_pod_is_cut_to_what_the_status_takes() -> None:
    status = decide(seen(TRAINING, running(0), failed(1, 1, termination_message="", message=""), now=101), SETTINGS).status
    long = decide(seen(TRAINING, running(0), failed(1, 3, message="y" * 50000), now=101), SETTINGS).status
    assert status.failure is not None
    assert long.failure is not None
    assert (len(status.failure.message) < 100, len(long.failure.message), long.failure.message[-1]) == (True, 32768, "…")


def test_a_long_message_of_an_event_is_cut_to_what_kubernetes_takes() -> None:
    long = told_failure(Reason.DATA, "行" * 900, 11)
    event = decide(seen(TRAINING, failed(0, 11, termination_message=long), running(1), now=101), SETTINGS).events[0]
    assert 1000 < len(event.message.encode()) <= 1024
    assert event.message.endswith("…")
