"""The load: jobs as a user would write them, and the floor, which makes the operator's objects without an operator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson
import uvloop
from operator_access import Access, post
from operator_processes import busy_seconds, cpu_seconds, own_seconds

from finetune_operator import manifests, names, schema
from finetune_operator.plan import Identity, cluster_place, make_plan
from finetune_operator.settings import Settings
from kube_api import ApiServer

IN_FLIGHT = 8
"""More do not make the floor faster on two cores: 8 in flight gave 80-107 jobs a second, 32 the same."""
NODES = 2
TEMPLATE, FLOOR_OWNER = "job-template", "floor-owner"
FLOOR_LABEL = names.JOB_LABEL[:-4] + "rest"
"""Stands for the label by which the operator watches its pods, as long as that: a floor's pods are not its."""

Submit = Callable[[int], Awaitable[None]]


def job(name: str, namespace: str) -> dict[str, Any]:
    """A two-node LoRA job on existing claims."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"source": "Qwen/Qwen2.5-7B-Instruct"},
            "data": {"dataset": ["swift/self-cognition#500", "./data/chats.jsonl"], "maxLength": 2048},
            "tuning": {"tunerType": "lora", "loraRank": 16, "targetModules": ["all-linear"]},
            "training": {"globalBatchSize": 16, "trainIters": 500, "lr": 1e-4},
            "nodes": {"count": NODES, "resources": {"requests": {"cpu": 4, "memory": "32Gi"}, "limits": {"memory": "64Gi"}}},
            "volumes": {"cache": {"claimName": "cache"}, "work": {"claimName": "work"}},
        },
    }


def job_name(index: int) -> str:
    return f"job-{index:05d}"


def children(namespace: str, owner: dict[str, str]) -> list[tuple[str, bytes]]:
    """Path and body of each object that the operator makes of the job named TEMPLATE, in its order; owned by another object, or the garbage collector would take them."""
    parsed = schema.parse(job(TEMPLATE, namespace))
    settings = Settings(trainer_image="localhost/trainer:1")
    plan = make_plan(parsed, settings, cluster_place(settings), Identity(owner["uid"]))
    made = manifests.objects(plan, manifests.Owner(TEMPLATE, owner["uid"], namespace), settings)
    collections = {"Service": "services", "Pod": "pods"}
    bodies = []
    for child in made:
        child["metadata"]["ownerReferences"][0] |= owner
        body = orjson.dumps(child).replace(names.JOB_LABEL.encode(), FLOOR_LABEL.encode())
        bodies.append((f"/api/v1/namespaces/{namespace}/{collections[child['kind']]}", body))
    return bodies


async def at_once(jobs: int, submit: Submit) -> float:
    """Call `submit` for every number, IN_FLIGHT at a time; when the first was called, monotonic."""
    waiting = iter(range(jobs))

    async def slot() -> None:
        for index in waiting:
            await submit(index)

    begun = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT):
            group.create_task(slot())
    return begun


def submit_jobs(access: Access, jobs: int, namespace: str) -> tuple[float, float]:
    """Create jobs; when the first request was sent and when the last was answered, monotonic."""

    async def run() -> tuple[float, float]:
        path, template = f"/apis/{names.API_VERSION}/namespaces/{namespace}/{names.PLURAL}", orjson.dumps(job(TEMPLATE, namespace))
        async with access.session(IN_FLIGHT) as session:
            begun = await at_once(jobs, lambda index: post(session, path, template.replace(TEMPLATE.encode(), job_name(index).encode())))
        return begun, time.monotonic()

    return uvloop.run(run())


@dataclass(frozen=True)
class Floor:
    """What the API server allows: the same objects by a bare client."""

    jobs: int
    last_seconds: float
    """From the first request to the answer of the last."""
    api_server_cpu_seconds: float
    client_cpu_seconds: float
    foreign_cores: float
    """Cores that other work of the machine kept busy meanwhile, the controller manager's and etcd's included."""


def floor(api: ApiServer, access: Access, jobs: int, namespace: str) -> Floor:
    """Make the objects of so many jobs in a new namespace."""
    api.create_namespace(namespace)
    uid = api.post(f"/api/v1/namespaces/{namespace}/configmaps", {"metadata": {"name": FLOOR_OWNER}})["metadata"]["uid"]
    bodies = children(namespace, {"apiVersion": "v1", "kind": "ConfigMap", "name": FLOOR_OWNER, "uid": uid})

    async def run() -> float:
        async with access.session(IN_FLIGHT) as session:

            async def make(index: int) -> None:
                for path, body in bodies:
                    await post(session, path, body.replace(TEMPLATE.encode(), job_name(index).encode()))

            return await at_once(jobs, make)

    pid = api.processes.pid("kube-apiserver")
    assert pid is not None
    server, own, machine = cpu_seconds(pid), own_seconds(), busy_seconds()
    begun = uvloop.run(run())
    seconds, server, own = time.monotonic() - begun, cpu_seconds(pid) - server, own_seconds() - own
    return Floor(jobs, seconds, server, own, (busy_seconds() - machine - server - own) / seconds)
