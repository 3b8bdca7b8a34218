"""The Lease: what holds it works, what works holds it, and what has ended has released it. On a small HTTP server that keeps one Lease."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio import client

from api_server import serving
from finetune_operator.leader import LeadershipLost, Lock, lead
from finetune_operator.settings import Settings
from finetune_operator.settings_load import Replica

SETTINGS = Settings(lease_duration_seconds=4, renew_deadline_seconds=1.3, retry_period_seconds=1)
REPLICA = Replica("replica-a", "system")


@dataclass
class Leases:
    """One Lease, that can be written so often."""

    writes: int = 1000
    lease: dict[str, Any] | None = None
    holders: list[str | None] = field(default_factory=list)

    @property
    def application(self) -> web.Application:
        application = web.Application()
        path = "/apis/coordination.k8s.io/v1/namespaces/system/leases"
        application.router.add_get(f"{path}/{{name}}", self._get)
        application.router.add_post(path, self._write)
        application.router.add_put(f"{path}/{{name}}", self._write)
        return application

    async def _get(self, _request: web.Request) -> web.Response:
        return web.json_response({"kind": "Status", "code": 404}, status=404) if self.lease is None else web.json_response(self.lease)

    async def _write(self, request: web.Request) -> web.Response:
        if len(self.holders) == self.writes:
            return web.json_response({"kind": "Status", "code": 409}, status=409)
        self.lease = await request.json()
        self.holders.append(self.lease["spec"].get("holderIdentity"))
        return web.json_response(self.lease)


async def led(leases: Leases, work: Callable[[Lock], Awaitable[None]]) -> None:
    async with serving(leases.application) as configuration, client.ApiClient(configuration) as api, asyncio.timeout(30):
        lock = Lock(SETTINGS, REPLICA, api)
        await lead(lock, SETTINGS, lambda: work(lock))


def test_the_lease_is_released_when_the_work_has_ended() -> None:
    leases = Leases()

    async def work(lock: Lock) -> None:
        assert lock.leading
        assert leases.holders == ["replica-a"]

    asyncio.run(led(leases, work))
    assert leases.holders == ["replica-a", None]


def test_the_lease_is_released_when_the_work_has_failed() -> None:
    leases = Leases()

    async def work(lock: Lock) -> None:
        raise RuntimeError("kopf cannot go on")

    with pytest.raises(RuntimeError, match="kopf cannot go on"):
        asyncio.run(led(leases, work))
    assert leases.holders == ["replica-a", None]


def test_the_lease_is_released_after_the_work_when_the_replica_is_asked_to_end() -> None:
    leases = Leases()
    begun, ended = asyncio.Event(), list[str | None]()

    async def work(lock: Lock) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.extend(leases.holders)

    async def main() -> None:
        leading = asyncio.create_task(led(leases, work))
        await begun.wait()
        leading.cancel()
        await asyncio.wait({leading})
        assert leading.cancelled()

    asyncio.run(main())
    assert (ended, leases.holders) == (["replica-a"], ["replica-a", None])


def test_work_ends_as_soon_as_the_lease_was_not_renewed_for_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official election goes on trying then, 2 s after the last renewal: it counts from its first attempt in vain."""
    leases = Leases(writes=2)
    attempts: list[str] = []
    official = Lock.update

    async def update(self: Lock, name: str, namespace: str, updated_record: Any) -> bool:
        attempts.append(name)
        return await official(self, name, namespace, updated_record)

    monkeypatch.setattr(Lock, "update", update)

    async def work(lock: Lock) -> None:
        await asyncio.Event().wait()

    with pytest.raises(LeadershipLost, match="replica-a could not renew the Lease system/finetune-operator for 1.3 s"):
        asyncio.run(led(leases, work))
    assert len(attempts) <= 2, "the one at once that renews, and one in vain after 1 s"
