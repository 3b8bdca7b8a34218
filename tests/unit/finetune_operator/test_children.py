"""What is made of a refusal, and that no more is asked for after it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from api_server import connected
from finetune_operator.children import Children, is_invalid
from finetune_operator.connection import Answer, ApiError, Turns
from finetune_operator.observed import Refusal
from finetune_operator.settings import Settings
from finetune_operator.store import JobRecord, Store

SETTINGS = Settings(trainer_image="registry.example/trainer:1", requests_in_flight=2)
CAUSES = {"causes": [{"reason": "FieldValueNotSupported", "message": 'Unsupported value: "Sometimes"', "field": "spec.dnsPolicy"}]}
WEBHOOK = 'admission webhook "mine.example.test" denied the request: spec.dnsPolicy cannot unmarshal'
POLICY = "pods \"job-1-0\" is forbidden: ValidatingAdmissionPolicy 'mine' with binding 'mine' denied request: no"
NUMBER = 'Pod in version "v1" cannot be handled as a Pod: json: cannot unmarshal string into Go struct field PodSpec.spec.priority of type int32'

REFUSALS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "field by field": (422, {"message": 'Pod "job-1-0" is invalid: spec.dnsPolicy', "details": CAUSES}, True),
    "of another type": (400, {"message": NUMBER}, True),
    "unknown field": (400, {"message": 'Pod in version "v1" cannot be handled as a Pod: strict decoding error: unknown field "spec.mine"'}, True),
    "a policy that says Invalid": (422, {"message": POLICY, "details": {"causes": [{"message": POLICY}]}}, False),
    "a webhook that says Invalid": (422, {"message": WEBHOOK, "details": CAUSES}, False),
    "a webhook that says nothing": (400, {"message": WEBHOOK}, False),
    "no causes": (422, {"message": "no"}, False),
    "bad request": (400, {"message": "no"}, False),
}


@pytest.mark.parametrize(("status", "body", "invalid"), REFUSALS.values(), ids=REFUSALS.keys())
def test_invalid_is_what_the_api_server_itself_cannot_read_or_calls_so_field_by_field(status: int, body: dict[str, Any], invalid: bool) -> None:
    assert is_invalid(Answer(status, body)) is invalid


def job_of(nodes: int) -> JobRecord:
    metadata = {"namespace": "team", "name": "job", "uid": "u1-of-job", "generation": 1, "resourceVersion": "1", "creationTimestamp": "2026-11-21T10:00:00Z"}
    spec: dict[str, Any] = {"model": {"source": "org/model"}, "data": {"dataset": ["org/rows"]}, "volumes": {"work": {"claimName": "results"}}}
    store = Store()
    key = store.put_job({"metadata": metadata, "spec": {**spec, "nodes": {"count": nodes, "accelerator": {"type": "CPU"}}}})
    assert key is not None
    return store.jobs[key]


def make(nodes: int, pod_status: int, body: dict[str, Any]) -> tuple[Refusal | None, int]:
    """What becomes of a gang of which every pod is answered so, and how many pods were asked for."""
    pods = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal pods
        if not request.path.endswith("/pods"):
            return web.json_response({"kind": "Service"}, status=201)
        pods += 1
        return web.json_response(body, status=pod_status)

    async def main() -> Refusal | None:
        application = web.Application()
        application.router.add_post("/{path:.*}", answer)
        async with connected(application, SETTINGS.requests_in_flight) as connection:
            children = Children(connection, Store(), SETTINGS, Turns(1))
            return await children.make(job_of(nodes), 1, tuple(range(nodes)))

    return asyncio.run(main()), pods


def test_no_more_pods_are_asked_for_after_the_first_that_is_refused() -> None:
    refusal, pods = make(64, 403, {"message": "exceeded quota"})
    assert refusal == Refusal("CreationRefused", "Pod job-1-0 cannot be made: exceeded quota")
    assert pods <= SETTINGS.requests_in_flight


def test_no_more_pods_are_asked_for_after_the_first_that_fails() -> None:
    with pytest.raises(ApiError, match="POST Pod job-1-0: 500 a webhook does not answer"):
        make(64, 500, {"message": "a webhook does not answer"})


def test_what_admission_refuses_is_not_the_specs_fault() -> None:
    assert make(1, 422, {"message": POLICY, "details": CAUSES})[0] == Refusal("CreationRefused", f"Pod job-1-0 cannot be made: {POLICY}")
    assert make(1, 422, {"message": "is invalid", "details": CAUSES})[0] == Refusal("InvalidSpec", "the API server refuses Pod job-1-0: is invalid")
