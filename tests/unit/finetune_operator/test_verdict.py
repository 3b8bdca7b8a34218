"""Why a gang ended: each line of the tables is one situation."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.observed import Observed
from finetune_operator.verdict import Verdict, Wait, judge
from finetune_trainer.contract import EXITS, Consequence, Reason
from situations import ALL_RUN, LOADING, SETTINGS, TRAINING, at, failed, heard, node, pod, policy, running, seen, succeeded, told_failure

RETRY, PERMANENT, UNCOUNTED = Consequence.RETRY, Consequence.PERMANENT, Consequence.UNCOUNTED
ENDING = (succeeded(0), succeeded(1, finished=at(140)), running(2))
MEMORY = "pod tiny-1-1 was killed because it used more host memory than its limit (OOMKilled); raise nodes.resources.limits.memory"


def judged(*pods: Any, **fields: Any) -> Observed:
    return seen(TRAINING, *pods, **{"now": 101, **fields})


def told(reason: Reason, message: str, code: int, rank: int = 3, host: str = "elsewhere") -> str:
    return told_failure(reason, message, code, rank, host)


VERDICTS: list[tuple[str, Observed, str, str, Consequence]] = [
    ("a pod is gone", judged(running(0)), "PodDeleted", "pod tiny-1-1 is gone", RETRY),
    ("all pods are gone", judged(), "PodDeleted", "pod tiny-1-0 is gone", RETRY),
    ("a pod is being deleted", judged(running(0), running(1, deletion=at(120))), "PodDeleted", "pod tiny-1-1 was deleted", RETRY),
    ("its deletion counts, not its exit code", judged(running(0), failed(1, 10, deletion=at(120))), "PodDeleted", "pod tiny-1-1 was deleted", RETRY),
    (
        "a pod that ended well is deleted while others run",
        judged(running(0), succeeded(1, deletion=at(120))),
        "PodDeleted",
        "pod tiny-1-1 was deleted",
        RETRY,
    ),
    (
        "a pod is drained",
        judged(running(0), running(1, deletion=at(120), disrupted=True)),
        "Evicted",
        "pod tiny-1-1 was evicted from node node-1",
        UNCOUNTED,
    ),
    (
        "the kubelet evicted a pod",
        judged(running(0), failed(1, 137, disrupted=True, message="Evicted: The node was low on resource: memory")),
        "Evicted",
        "pod tiny-1-1 was evicted from node node-1: Evicted: The node was low on resource: memory",
        UNCOUNTED,
    ),
    (
        "a pod that was evicted before it was bound",
        judged(running(0), failed(1, None, node=None, disrupted=True)),
        "Evicted",
        "pod tiny-1-1 was evicted",
        UNCOUNTED,
    ),
    (
        "a pod is taken away from a lost node",
        judged(running(0), running(1, deletion=at(420), disrupted=True), now=401, nodes=(node(1, 100),)),
        "NodeLost",
        "node node-1 of pod tiny-1-1 was not ready for 300 s (runPolicy.nodeLostSeconds)",
        RETRY,
    ),
    (
        "a pod is taken away from a silent node before that counts as lost",
        judged(running(0), running(1, deletion=at(420), disrupted=True), now=399, nodes=(node(1, 100),)),
        "NodeLost",
        "node node-1 of pod tiny-1-1 is not ready, and the pod was taken away from it",
        RETRY,
    ),
    (
        "a node that shuts down in good order evicts its pods",
        judged(
            running(0), failed(1, 143, disrupted=True, message="Terminated: Pod was terminated in response to imminent node shutdown."), nodes=(node(1, 100),)
        ),
        "Evicted",
        "pod tiny-1-1 was evicted from node node-1: Terminated: Pod was terminated in response to imminent node shutdown.",
        UNCOUNTED,
    ),
    (
        "a node is no more",
        judged(running(0), running(1), nodes=(node(1, exists=False),)),
        "NodeLost",
        "node node-1 of pod tiny-1-1 no longer exists",
        RETRY,
    ),
    (
        "a node is silent for too long",
        judged(running(0), running(1), now=400, nodes=(node(1, 100),)),
        "NodeLost",
        "node node-1 of pod tiny-1-1 was not ready for 300 s (runPolicy.nodeLostSeconds)",
        RETRY,
    ),
    (
        "the job's own nodeLostSeconds counts",
        judged(running(0), running(1), now=110, nodes=(node(1, 100),), spec={"runPolicy": {"nodeLostSeconds": 10}}),
        "NodeLost",
        "node node-1 of pod tiny-1-1 was not ready for 10 s (runPolicy.nodeLostSeconds)",
        RETRY,
    ),
    (
        "the trainer's own words",
        judged(running(0), failed(1, 11, termination_message=told(Reason.DATA, "data.dataset[0]: no rows", 11))),
        "Data",
        "data.dataset[0]: no rows",
        PERMANENT,
    ),
    (
        "the trainer's word counts more than its exit code",
        judged(running(0), failed(1, 137, termination_message=told(Reason.NUMERIC, "loss is nan at step 4", 14))),
        "Numeric",
        "loss is nan at step 4",
        PERMANENT,
    ),
    (
        "a trainer without words",
        judged(running(0), failed(1, 11, termination_message=told(Reason.DATA, "", 11))),
        "Data",
        "pod tiny-1-1 ended with exit code 11",
        PERMANENT,
    ),
    *(
        (
            f"exit code {row.code} without a report",
            judged(succeeded(0), failed(1, row.code)),
            row.reason.value,
            f"pod tiny-1-1 ended with exit code {row.code} and left no report",
            row.consequence,
        )
        for row in EXITS
    ),
    (
        "a report that was cut",
        judged(succeeded(0), failed(1, 15, termination_message='{"failure": {"reason": "Da')),
        "OutOfMemory",
        "pod tiny-1-1 ended with exit code 15 and left no report",
        PERMANENT,
    ),
    (
        "a reason that is not the trainer's to give",
        judged(running(0), failed(1, 1, termination_message='{"failure": {"reason": "InvalidSpec", "message": "x"}}')),
        "Internal",
        "pod tiny-1-1 ended with exit code 1 and left no report",
        RETRY,
    ),
    (
        "another program's exit code",
        judged(running(0), failed(1, 127, message="ContainerCannotRun: no such file")),
        "PodFailed",
        "pod tiny-1-1 failed with exit code 127: ContainerCannotRun: no such file",
        RETRY,
    ),
    (
        "a pod that failed before its trainer ran",
        judged(running(0), failed(1, None, finished=None, message="UnexpectedAdmissionError: no GPU")),
        "PodFailed",
        "pod tiny-1-1 failed: UnexpectedAdmissionError: no GPU",
        RETRY,
    ),
    ("the memory limit", judged(running(0), failed(1, 137, message="OOMKilled")), "OutOfMemory", MEMORY, PERMANENT),
    (
        "the memory limit, of which the launcher saw a signal",
        judged(running(0), failed(1, 137, message="OOMKilled", termination_message=told(Reason.INTERNAL, "rank 3 was killed by signal SIGKILL", 137))),
        "OutOfMemory",
        MEMORY,
        PERMANENT,
    ),
    (
        "a kill that was not for memory",
        judged(running(0), failed(1, 137)),
        "PodFailed",
        "pod tiny-1-1 failed with exit code 137",
        RETRY,
    ),
    (
        "a trainer that failed beside a container that still runs",
        judged(running(0), failed(1, 12, phase="Running")),
        "Model",
        "pod tiny-1-1 ended with exit code 12 and left no report",
        PERMANENT,
    ),
    (
        "a cause counts more than an earlier consequence",
        judged(failed(0, 20, finished=at(90)), failed(1, 1, finished=at(99))),
        "Internal",
        "pod tiny-1-1 ended with exit code 1 and left no report",
        RETRY,
    ),
    (
        "of two causes the earlier one counts",
        judged(failed(0, 1, finished=at(99)), failed(1, 127, finished=at(98))),
        "PodFailed",
        "pod tiny-1-1 failed with exit code 127",
        RETRY,
    ),
    (
        "what no restart mends counts most",
        judged(failed(0, 1, finished=at(90)), failed(1, 12, finished=at(99))),
        "Model",
        "pod tiny-1-1 ended with exit code 12 and left no report",
        PERMANENT,
    ),
    (
        "an eviction counts more than what the others say of it",
        judged(running(0, deletion=at(130), disrupted=True), failed(1, 1)),
        "Evicted",
        "pod tiny-1-0 was evicted from node node-0",
        UNCOUNTED,
    ),
    (
        "an eviction counts more than a pod that is gone",
        judged(running(0, deletion=at(130), disrupted=True)),
        "Evicted",
        "pod tiny-1-0 was evicted from node node-0",
        UNCOUNTED,
    ),
    (
        "consequences only, after the wait",
        judged(running(0), failed(1, 20, finished=at(96))),
        "Distributed",
        "pod tiny-1-1 ended with exit code 20 and left no report",
        RETRY,
    ),
    (
        "consequences only, and no other pod runs",
        judged(failed(0, 143, finished=at(101)), failed(1, 20, finished=at(100))),
        "Distributed",
        "pod tiny-1-1 ended with exit code 20 and left no report",
        RETRY,
    ),
    (
        "the trainer shows no progress",
        judged(*ALL_RUN, now=1900, progress=heard(step=7, when=100)),
        "Hang",
        "the trainer has shown no progress since 2026-05-04T12:01:40Z, for 1800 s (runPolicy.progressDeadlineSeconds); it was at stage training, step 7/20",
        RETRY,
    ),
    (
        "the trainer shows no progress while one node has ended",
        judged(running(0), succeeded(1), now=1900, progress=heard(stage="exporting", step=20, when=100)),
        "Hang",
        "the trainer has shown no progress since 2026-05-04T12:01:40Z, for 1800 s (runPolicy.progressDeadlineSeconds); it was at stage exporting, step 20/20",
        RETRY,
    ),
    (
        "the trainer's clock is ahead",
        judged(*ALL_RUN, now=1900, progress=heard(step=7, when=5500), heartbeat_seen=at(100)),
        "Hang",
        "the trainer has shown no progress since 2026-05-04T12:01:40Z, for 1800 s (runPolicy.progressDeadlineSeconds); it was at stage training, step 7/20",
        RETRY,
    ),
    (
        "a heartbeat that is too old when it is first heard, and does not change",
        judged(*ALL_RUN, now=160, progress=heard(step=7, when=-3600), heartbeat_seen=at(100)),
        "Hang",
        "the trainer has shown no progress since 2026-05-04T11:00:00Z, for 1800 s (runPolicy.progressDeadlineSeconds); it was at stage training, step 7/20",
        RETRY,
    ),
    (
        "a trainer that does not answer an operator that has just begun to ask",
        judged(*ALL_RUN, now=5000, asked_since=at(4940)),
        "Hang",
        "the trainer has shown no progress since 2026-05-04T12:00:20Z, for 1800 s (runPolicy.progressDeadlineSeconds); it was at stage training, step 5/20",
        RETRY,
    ),
    (
        "node 0 has ended well, and a pod hangs at its exit",
        judged(succeeded(0), running(1), now=1900),
        "Hang",
        "node 0 ended well at 2026-05-04T12:01:40Z, but pod tiny-1-1 did not end within 1800 s after that (runPolicy.progressDeadlineSeconds)",
        RETRY,
    ),
    (
        "the job's own deadline counts at the exit too, and every pod that hangs is named",
        judged(succeeded(0), succeeded(1), running(2), pod(3), now=800, spec={"nodes": {"count": 4}, **policy(progressDeadlineSeconds=700)}),
        "Hang",
        "node 0 ended well at 2026-05-04T12:01:40Z, but pods tiny-1-2, tiny-1-3 did not end within 700 s after that (runPolicy.progressDeadlineSeconds)",
        RETRY,
    ),
    (
        "a pod that hangs at its exit on a node that is lost meanwhile",
        judged(succeeded(0), running(1), now=1900, nodes=(node(1, 1000),)),
        "NodeLost",
        "node node-1 of pod tiny-1-1 was not ready for 300 s (runPolicy.nodeLostSeconds)",
        RETRY,
    ),
]

NOT_YET: list[tuple[str, Observed, float | None]] = [
    ("all is well", judged(*ALL_RUN), None),
    ("pods wait", judged(pod(0), pod(1)), None),
    ("one has ended well", judged(running(0), succeeded(1)), None),
    ("a consequence waits for its cause", judged(running(0), failed(1, 20, finished=at(100))), 4.0),
    ("a preemption without a disruption waits too", judged(running(0), failed(1, 143, finished=at(99))), 3.0),
    ("the first of several consequences counts", judged(failed(0, 20, finished=at(97)), running(1), now=100), 2.0),
    ("a node is silent", judged(*ALL_RUN, nodes=(node(1, 100),)), 299.0),
    ("a node is well again", judged(running(0), running(1, silent_since=at(90)), nodes=(node(1),)), None),
    ("a pod that has ended well needs no node", judged(running(0), succeeded(1), nodes=(node(1, exists=False),)), None),
    ("the trainer is at work", judged(*ALL_RUN, progress=heard(when=100)), 1799.0),
    ("the next thing to look at comes first", judged(*ALL_RUN, progress=heard(when=100), nodes=(node(0, 50),)), 249.0),
    ("a heartbeat that looks too old has a moment to change", judged(*ALL_RUN, progress=heard(when=-3600), heartbeat_seen=at(100)), 59.0),
    ("the trainer's clock is behind, and it goes on", judged(*ALL_RUN, now=900, progress=heard(when=-3600), heartbeat_seen=at(899)), 59.0),
    ("the trainer was heard, and its heartbeat may be old", judged(*ALL_RUN, progress=heard(when=-3600), heartbeat_seen=None, asked_since=at(90)), 49.0),
    ("a kubelet's clock is ahead", judged(running(0), failed(1, 20, finished=at(7300))), 5.0),
    ("a trainer that was never reached does not hang", seen(LOADING, *ALL_RUN, now=9999, asked_since=at(20)), None),
    ("the operator was away and has not asked yet", judged(*ALL_RUN, now=9999), None),
    ("the operator was away and has asked for a moment", judged(*ALL_RUN, now=9999, asked_since=at(9990)), 51.0),
    ("node 0 has ended well, and the others have time to", judged(succeeded(0), running(1)), 1799.0),
    ("to the last second", judged(succeeded(0), running(1), now=1899), 1.0),
    ("as much as the spec says", judged(succeeded(0), running(1), spec=policy(progressDeadlineSeconds=700)), 699.0),
    ("a heartbeat that is older than node 0's end says nothing of it", judged(succeeded(0), running(1), now=1899, progress=heard(when=60)), 1.0),
    ("a pod that ends after node 0 gives the others no more time", judged(*ENDING, now=150, spec={"nodes": {"count": 3}}), 1750.0),
    ("a node that is silent after node 0 has ended", judged(succeeded(0), running(1), nodes=(node(1, 100),)), 299.0),
    ("all have ended before the deadline", judged(succeeded(0), succeeded(1), now=9999), None),
    ("nobody knows when node 0 ended", judged(succeeded(0, exit_code=None, finished=None), running(1), now=9999), None),
    ("a pod that has not started again cannot hang", judged(running(0), pod(1), now=9999, progress=heard(when=100)), None),
]


@pytest.mark.parametrize(("observed", "reason", "message", "consequence"), [row[1:] for row in VERDICTS], ids=[row[0] for row in VERDICTS])
def test_verdict(observed: Observed, reason: str, message: str, consequence: Consequence) -> None:
    verdict = judge(observed, SETTINGS)
    assert isinstance(verdict, Verdict)
    assert (verdict.reason, verdict.message, verdict.consequence) == (reason, message, consequence)


@pytest.mark.parametrize(("observed", "seconds"), [row[1:] for row in NOT_YET], ids=[row[0] for row in NOT_YET])
def test_gang_that_is_not_judged(observed: Observed, seconds: float | None) -> None:
    assert judge(observed, SETTINGS) == (None if seconds is None else Wait(seconds))


def test_failure_says_which_rank_on_which_node_with_which_code() -> None:
    message = told(Reason.OUT_OF_MEMORY, "rank 2: CUDA out of memory", 15, rank=2)
    verdict = judge(judged(running(0), failed(1, 15, termination_message=message)), SETTINGS)
    assert isinstance(verdict, Verdict)
    failure = verdict.failure
    assert (failure.reason, failure.rank, failure.node, failure.exit_code) == ("OutOfMemory", 2, "node-1", 15)


def test_failure_is_of_the_node_whose_rank_failed_first_whichever_pod_ended_first() -> None:
    message = told(Reason.NUMERIC, "rank 0: the loss is not finite", 14, rank=0, host="tiny-0")
    pods = (failed(0, 14, termination_message=message, finished=at(101)), failed(1, 14, termination_message=message, finished=at(100)))
    verdict = judge(judged(*pods), SETTINGS)
    assert isinstance(verdict, Verdict)
    assert (verdict.failure.rank, verdict.failure.node) == (0, "node-0")


def test_hang_is_of_the_node_that_was_asked() -> None:
    verdict = judge(judged(*ALL_RUN, now=1900, progress=heard(when=100)), SETTINGS)
    assert isinstance(verdict, Verdict)
    assert (verdict.node, verdict.rank, verdict.exit_code) == ("node-0", None, None)


def test_hang_at_the_exit_is_of_the_node_whose_pod_did_not_end() -> None:
    verdict = judge(judged(succeeded(0), running(1), now=1900), SETTINGS)
    assert isinstance(verdict, Verdict)
    assert (verdict.node, verdict.rank, verdict.exit_code) == ("node-1", None, None)
