"""Answers of an API server that are rare, and what is made of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import REGISTRY

from api_server import FIRST, connected
from finetune_operator import names
from finetune_operator.children import Children
from finetune_operator.cluster import Cluster, NotServed, _urgency
from finetune_operator.connection import ApiError, Priority, Turns
from finetune_operator.lifecycle import Decision, Deletion
from finetune_operator.pods import read_pod
from finetune_operator.polling import Poller
from finetune_operator.settings import Settings
from finetune_operator.status import Phase, Status
from finetune_operator.store import JobRecord, Store, dump_status
from finetune_operator.telling import Teller
from jobs import job_value
from situations import NEW, after

Json = dict[str, Any]
Answers = dict[str, tuple[int, Json]]
"""By method and path."""
KEY = ("team", "job")
JOBS, PODS = f"/apis/{names.API_VERSION}/namespaces/team/{names.PLURAL}", "/api/v1/namespaces/team/pods"
KNOWN: Answers = {
    "GET /apis": (200, {"groups": [{"name": names.GROUP}]}),
    f"GET /apis/{names.API_VERSION}": (200, {"resources": [{"name": names.PLURAL}]}),
}
EMPTY: Json = {"metadata": {"resourceVersion": "9"}, "items": []}


def with_cluster(answers: Answers, scenario: Callable[[Cluster, JobRecord], Awaitable[Any]], **settings: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """What a scenario returns, and what it has asked an API server that answers so."""
    asked: list[tuple[str, Any]] = []

    async def answer(request: web.Request) -> web.Response:
        what = f"{request.method} {request.path}"
        asked.append((what, await request.json() if request.can_read_body else None))
        status, body = answers.get(what, (404, {"message": "nothing here"}))
        return web.json_response(body, status=status)

    async def main() -> Any:
        application, chosen, store = web.Application(), Settings(**settings), Store()
        application.router.add_route("*", "/{path:.*}", answer)
        async with connected(application) as connection, Poller(chosen, lambda key: None) as poller:
            children = Children(connection, store, chosen, Turns(1))
            put_job_and_pod(store)
            return await scenario(Cluster(connection, store, chosen, children, poller, Teller(connection)), store.jobs[KEY])

    return asyncio.run(main()), asked


def put_job_and_pod(store: Store) -> None:
    metadata = {"namespace": "team", "name": "job", "uid": "u1", "generation": 1, "resourceVersion": "1", "creationTimestamp": "2026-11-21T10:00:00Z"}
    store.put_job({"metadata": metadata, "spec": {}})
    labels = {names.JOB_LABEL: "job", names.ATTEMPT_LABEL: "1", names.NODE_LABEL: "0"}
    pod = read_pod({"metadata": {"namespace": "team", "name": "job-1-0", "uid": "p1", "resourceVersion": "2", "labels": labels}})
    assert pod is not None
    store.put_pod(pod)


def test_a_node_that_the_operator_may_not_see_is_unknown(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(cluster: Cluster, job: JobRecord) -> Any:
        return await cluster._look_at(["a", "b"], job)

    answers = {"GET /api/v1/nodes/a": (403, {"message": "nodes is forbidden"}), "GET /api/v1/nodes/b": (200, {"status": {}})}
    nodes, _ = with_cluster(answers, scenario)
    assert [(node.name, node.exists) for node in nodes] == [("b", True)]
    assert "no right to get nodes" in caplog.text


@pytest.mark.parametrize(
    ("status", "message", "gone"),
    [
        (404, 'pods "job-1-0" not found', True),
        (409, 'Operation cannot be fulfilled on Pod "job-1-0": Precondition failed: UID in precondition: p1, UID in object meta: p2', True),
        (409, 'Operation cannot be fulfilled on pods "job-1-0": the object has been modified', False),
    ],
)
def test_a_pod_is_gone_when_it_is_not_there_or_is_another(status: int, message: str, gone: bool) -> None:
    async def scenario(cluster: Cluster, job: JobRecord) -> Any:
        with contextlib.nullcontext() if gone else pytest.raises(ApiError, match="the object has been modified"):
            await cluster._delete_one(job, Deletion("job-1-0", "p1"))
        return "p1" in cluster.store.gone

    assert with_cluster({f"DELETE {PODS}/job-1-0": (status, {"message": message})}, scenario)[0] is gone


def test_a_job_about_which_deciding_fails_says_so_in_its_status_and_keeps_the_rest() -> None:
    async def scenario(cluster: Cluster, job: JobRecord) -> Any:
        await cluster.complain(KEY, ValueError("a secret " * 10000))
        return job.status

    answers = {f"PATCH {JOBS}/job/status": (200, {"metadata": {"resourceVersion": "3"}})}
    status, ((_, patch),) = with_cluster(answers, scenario)
    (condition,) = patch["status"]["conditions"]
    assert (condition["type"], condition["status"], condition["reason"]) == ("Reconciling", "True", "Retrying")
    assert condition["message"] == "the operator fails to act on this job and tries again: ValueError"
    assert patch["status"].keys() == {"conditions"}
    assert status.conditions[0].reason == "Retrying"


def test_what_the_api_server_said_is_passed_on() -> None:
    async def scenario(cluster: Cluster, job: JobRecord) -> Any:
        found = await cluster.connection.send("POST", PODS, {}, order=FIRST)
        await cluster.complain(KEY, ApiError("POST", "Pod job-1-0", found))

    answers = {f"PATCH {JOBS}/job/status": (200, {"metadata": {"resourceVersion": "3"}}), f"POST {PODS}": (500, {"message": "failed calling webhook"})}
    _, (_, (_, patch)) = with_cluster(answers, scenario)
    assert patch["status"]["conditions"][0]["message"].endswith("tries again: POST Pod job-1-0: 500 failed calling webhook")


def test_a_restart_is_told_and_counted_once_though_a_pod_cannot_be_deleted() -> None:
    def restarts() -> float:
        return REGISTRY.get_sample_value("finetune_job_restarts_total", {"namespace": "team", "reason": "PodDeleted"}) or 0.0

    async def scenario(cluster: Cluster, job: JobRecord) -> Any:
        before = restarts()
        put_gang_without_node_1(cluster.store)
        for _ in range(2):
            with pytest.raises(ApiError, match="500 etcd is away"):
                await cluster.reconcile(KEY)
        return [body["reason"] for _, body in drain(cluster.teller)], restarts() - before

    answers = {
        f"PATCH {JOBS}/job/status": (200, {"metadata": {"resourceVersion": "9"}}),
        f"DELETE {PODS}/job-1-0": (500, {"message": "etcd is away"}),
    }
    found, asked = with_cluster(answers, scenario)
    assert found == (["Restarting"], 1.0)
    assert [what for what, _ in asked] == [f"PATCH {JOBS}/job/status", *2 * [f"DELETE {PODS}/job-1-0"]]


def test_nothing_is_told_of_a_status_that_was_not_written() -> None:
    async def scenario(cluster: Cluster, job: JobRecord) -> Any:
        put_gang_without_node_1(cluster.store)
        with pytest.raises(ApiError, match="409"):
            await cluster.reconcile(KEY)
        return drain(cluster.teller)

    assert with_cluster({f"PATCH {JOBS}/job/status": (409, {"message": "the object has been modified"})}, scenario)[0] == []


def put_gang_without_node_1(store: Store) -> None:
    """The job `job` with a gang of two nodes, of which one is gone."""
    status = dump_status(after(NEW))
    metadata = {"namespace": "team", "name": "job", "uid": "u1", "generation": 1, "resourceVersion": "5", "creationTimestamp": "2026-11-21T10:00:00Z"}
    store.put_job({"metadata": metadata, "spec": job_value(nodes={"count": 2}, volumes={"work": {"claimName": "w"}})["spec"], "status": status})
    labels = {names.JOB_LABEL: "job", names.ATTEMPT_LABEL: "1", names.NODE_LABEL: "0"}
    owner = {"uid": "u1", "kind": names.KIND, "controller": True}
    pod = {"namespace": "team", "name": "job-1-0", "uid": "p2", "resourceVersion": "6", "labels": labels, "ownerReferences": [owner]}
    record = read_pod({"metadata": pod})
    assert record is not None
    store.put_pod(record)


def drain(teller: Teller) -> list[tuple[str, Json]]:
    """What waits to be told."""
    return [teller.waiting.get_nowait() for _ in range(teller.waiting.qsize())]


@pytest.mark.parametrize(
    ("before", "decision", "urgency"),
    [
        (None, Decision(Status(phase=Phase.PENDING, attempt=1), create=1), Priority.STATUS),
        (Phase.RUNNING, Decision(Status(phase=Phase.RUNNING, attempt=1)), Priority.STATUS),
        (Phase.RUNNING, Decision(Status(phase=Phase.RESTARTING, attempt=1)), Priority.CHILDREN),
        (Phase.RESTARTING, Decision(Status(phase=Phase.PENDING, attempt=2), create=2), Priority.CHILDREN),
        (Phase.RUNNING, Decision(Status(phase=Phase.SUSPENDED, attempt=1)), Priority.CHILDREN),
        (Phase.RUNNING, Decision(Status(phase=Phase.SUCCEEDED, attempt=1)), Priority.CHILDREN),
    ],
    ids=["first gang", "progress", "restart", "second gang", "suspended", "succeeded"],
)
def test_no_end_and_no_restart_waits_until_the_gangs_of_a_burst_are_made(before: Phase | None, decision: Decision, urgency: Priority) -> None:
    async def scenario(cluster: Cluster, job: JobRecord) -> Any:
        job.status = Status(phase=before)
        return _urgency(job, decision)

    assert with_cluster({}, scenario)[0] is urgency


@pytest.mark.parametrize("missing", ["GET /apis", f"GET /apis/{names.API_VERSION}"])
def test_kopf_is_not_started_before_the_kind_is_where_it_looks(missing: str) -> None:
    async def scenario(cluster: Cluster, job: JobRecord) -> Any:
        with pytest.raises(NotServed, match="does not know finetunejobs.finetune.mcore.dev: apply the CustomResourceDefinition"):
            await cluster.check_served()

    with_cluster({**KNOWN, missing: (200, {"groups": [], "resources": []})}, scenario)


def test_a_comparison_goes_on_without_a_namespace_that_cannot_be_listed() -> None:
    async def scenario(cluster: Cluster, job: JobRecord) -> Any:
        return await cluster.resync(["other", "team"]), await cluster.resync(["team", "other"]), cluster.store.jobs

    other = {path.replace("/team/", "/other/"): (403, {"message": "no"}) for path in (f"GET {JOBS}", f"GET {PODS}")}
    (first, second, jobs), _ = with_cluster({**KNOWN, **other, f"GET {JOBS}": (200, EMPTY), f"GET {PODS}": (200, EMPTY)}, scenario)
    assert (first, second, jobs) == ([KEY, KEY], [], {})


def test_a_kind_that_is_gone_ends_the_comparison_of_all_namespaces() -> None:
    async def scenario(cluster: Cluster, job: JobRecord) -> Any:
        with pytest.raises(NotServed):
            await cluster.resync(["team"])
        return cluster.store.jobs

    jobs, _ = with_cluster({"GET /apis": (200, {"groups": []}), f"GET {PODS}": (200, EMPTY)}, scenario)
    assert jobs.keys() == {KEY}
