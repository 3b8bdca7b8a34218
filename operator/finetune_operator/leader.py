"""One replica acts, the others wait: leader election by a Lease, with the official client."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from kubernetes.aio import client
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from finetune_operator import metrics
from finetune_operator.settings import Settings
from finetune_operator.settings_load import Replica

UNREACHABLE = (aiohttp.ClientError, TimeoutError, OSError)

logger = logging.getLogger(__name__)


class Lock(LeaseLock):
    """The official Lease lock, for which an API server that cannot be reached, or does not answer in time, is one that has refused: it is asked again."""

    def __init__(self, settings: Settings, replica: Replica, api: client.ApiClient) -> None:
        super().__init__(settings.lease_name, settings.lease_namespace or replica.namespace, replica.name, api)
        self.seconds = settings.renew_deadline_seconds / 2
        self.reached = False
        """Whether the API server has answered to the last question."""
        self.leading = False
        self.renewed = 0.0
        """When the last request that took or renewed the Lease was begun, as `time.monotonic` has it."""

    async def get(self, name: str, namespace: str) -> Any:
        """As the official lock's."""
        try:
            async with asyncio.timeout(self.seconds):
                found = await super().get(name, namespace)
        except UNREACHABLE as error:
            self.reached = False
            return False, ApiException(status=0, reason=str(error) or type(error).__name__)
        self.reached = True
        return found

    async def create(self, name: str, namespace: str, election_record: Any) -> bool:
        """As the official lock's, which cannot in kubernetes 37.0: it asks for `pretty=True`, and its own API takes text only."""
        return await self._try(self._create(name, namespace, election_record))

    async def _create(self, name: str, namespace: str, election_record: Any) -> bool:
        lease = client.V1Lease(metadata=client.V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        try:
            await self.api_instance.create_namespaced_lease(namespace, lease)
        except ApiException as error:
            logger.warning("the Lease could not be made: %s", error.reason)
            return False
        return True

    async def update(self, name: str, namespace: str, updated_record: Any) -> bool:
        """As the official lock's."""
        return await self._try(super().update(name, namespace, updated_record))

    async def release(self) -> None:
        """Let the next replica act at once, as this one has ended its work."""
        try:
            async with asyncio.timeout(self.seconds):
                lease = await self.api_instance.read_namespaced_lease(self.name, self.namespace)
                if lease.spec.holder_identity == self.identity:
                    lease.spec.holder_identity = None
                    await self.api_instance.replace_namespaced_lease(self.name, self.namespace, lease)
        except (*UNREACHABLE, ApiException) as error:
            logger.warning("the Lease could not be released, it will expire: %s", error)

    async def lapse(self, seconds: float) -> None:
        """Wait until the Lease has not been renewed for so long."""
        while (left := self.renewed + seconds - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _try(self, write: Awaitable[bool]) -> bool:
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self.seconds):
                written = await write
        except UNREACHABLE as error:
            logger.warning("the Lease could not be written: %s", error)
            return False
        if written:
            self.renewed = begun
        return written


class LeadershipLost(Exception):
    """Another replica may act now: this process must end."""


async def lead(lock: Lock, settings: Settings, work: Callable[[], Awaitable[None]]) -> None:
    """Wait for the Lease, then work while it is held, and release it when the work has ended, however that was.

    The official election notices late that it renews in vain (up to renewDeadlineSeconds and two requests after it began to, when another replica may
    act already): the time since the last renewal is watched here too. Raises LeadershipLost, and what the work raises.
    """
    taken = asyncio.Event()

    async def started() -> None:
        taken.set()

    config = Config(lock, settings.lease_duration_seconds, settings.renew_deadline_seconds, settings.retry_period_seconds, started, None)
    election = asyncio.create_task(LeaderElection(config).run())
    waiting = asyncio.create_task(taken.wait())
    try:
        await asyncio.wait({election, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if taken.is_set():
            await _work(lock, settings, work, election)
        else:
            await election
    finally:
        await _end(waiting, election)
        if taken.is_set():
            await lock.release()


async def _work(lock: Lock, settings: Settings, work: Callable[[], Awaitable[None]], election: asyncio.Task[None]) -> None:
    """Work until it ends, or the Lease does; in the end nothing of the work is left."""
    logger.info("%s leads", lock.identity)
    metrics.LEADER.set(1)
    lock.leading = True
    lapse = asyncio.create_task(lock.lapse(settings.renew_deadline_seconds))
    working = asyncio.ensure_future(work())
    try:
        await asyncio.wait({election, lapse, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            message = f"{lock.identity} could not renew the Lease {lock.namespace}/{lock.name} for {settings.renew_deadline_seconds:g} s"
            raise LeadershipLost(message) from (election.exception() if election.done() else None)
        working.result()
    finally:
        await _end(lapse, working)
        metrics.LEADER.set(0)
        lock.leading = False


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
