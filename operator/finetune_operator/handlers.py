"""What watches tell goes into the store, the job's key into the queue; nothing else happens here. kopf watches jobs, a reflector pods."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import kopf
from kubernetes.aio import client

from finetune_operator import connection, metrics, names
from finetune_operator.children import Children
from finetune_operator.cluster import NOT_SERVABLE, OUR_PODS, PODS, Cluster, NotServed, StartAnew, path_of
from finetune_operator.connection import ApiError, Connection, Turns
from finetune_operator.pods import read_pod
from finetune_operator.polling import Poller
from finetune_operator.queue import Key, Queue
from finetune_operator.reflector import Reflector
from finetune_operator.settings import Settings
from finetune_operator.store import Store
from finetune_operator.telling import Teller

SETTLE_SECONDS = 2.0
"""After a watch has listed anew, its events have come by then."""
CREDENTIAL_MINUTES = 5
"""A service account's token is read again before it is rotated."""
RECALL_RETRY_SECONDS = 1.0

ORDINARY = (ApiError, aiohttp.ClientError, OSError, TimeoutError)
"""What may go wrong with requests."""

logger = logging.getLogger(__name__)


@dataclass
class Operator:
    """What the leading replica holds while it leads."""

    settings: Settings
    configuration: client.Configuration
    store: Store = field(default_factory=Store)
    listed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a watch has begun anew: what went in between was not told."""
    watching: asyncio.Event = field(default_factory=asyncio.Event)
    queue: Queue | None = None

    async def run(self) -> None:
        """Serve jobs until asked to stop (SIGTERM, SIGINT: kopf's) or cancelled.

        Raises StartAnew and NotServed when the next process would see more than this one, and what kopf raises when it cannot go on.
        """
        async with self._working() as (queue, cluster, reflector):
            versions = await self._recall(cluster, reflector)
            places = list(versions)
            following = (reflector.follow(path_of(PODS, place), version) for place, version in versions.items())
            tasks = [asyncio.create_task(each) for each in (self._resync(cluster, queue, places), self._watch(queue, places), *following)]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                await queue.close()  # before kopf, which takes its time
                await _end(tasks)

    async def _watch(self, queue: Queue, places: list[str]) -> None:
        await kopf.operator(
            registry=self._registry(queue),
            settings=kopf_settings(),
            identity=names.OPERATOR,  # type: ignore[arg-type]  # else kopf asks for the user's name, which a pod's user need not have; its type is not public
            standalone=True,
            clusterwide=not self.settings.watch_namespaces,
            namespaces=[place for place in places if place],
            ready_flag=self.watching,
        )

    def stuck_seconds(self) -> float:
        """How long the oldest decision has waited for a worker."""
        return self.queue.oldest_seconds() if self.queue else 0.0

    def longest_seconds(self) -> float:
        """How long the slowest decision has been worked at."""
        return self.queue.longest_seconds() if self.queue else 0.0

    def depth(self) -> int:
        """Jobs that wait for a decision or are being decided about."""
        return self.queue.depth() if self.queue else 0

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[tuple[Queue, Cluster, Reflector]]:
        async with Connection(self.configuration, self.settings.requests_in_flight) as api, Poller(self.settings, self._heard) as poller:
            teller = Teller(api)
            cluster = Cluster(
                api, self.store, self.settings, Children(api, self.store, self.settings, Turns(2 * self.settings.requests_in_flight)), poller, teller
            )
            self.queue = queue = Queue(cluster.reconcile, cluster.complain, ORDINARY)
            telling = asyncio.create_task(teller.run())
            try:
                yield queue, cluster, Reflector(api, OUR_PODS, lambda kind, raw: self._hear_pod(queue, kind, raw), self.listed.set)
            finally:
                await queue.close()
                await _end([telling])

    async def _recall(self, cluster: Cluster, reflector: Reflector) -> dict[str, str]:
        """Wait until there is something to serve; by namespace (one without a name: all) the resource version at which its pods were listed.

        Pods come before anything is decided: a job that is told before its pods would read as one whose pods were deleted. Each trouble is told once.
        """
        told = ""
        while True:
            try:
                await cluster.check_served()
                versions, problem = await self._recall_all(cluster, reflector)
            except (NotServed, *ORDINARY) as error:
                versions, problem = {}, str(error) or type(error).__name__
            if problem and problem != told:
                logger.warning("%s", problem)
                told = problem
            if versions:
                return versions
            await asyncio.sleep(RECALL_RETRY_SECONDS)

    async def _recall_all(self, cluster: Cluster, reflector: Reflector) -> tuple[dict[str, str], str]:
        """The namespaces that can be served, as above, and what is wrong with the others."""
        versions, problems = {}, []
        for place in self.settings.watch_namespaces or [""]:
            try:
                await cluster.check_place(place)
                versions[place] = await reflector.list(path_of(PODS, place))
            except ApiError as error:
                if not place or error.status not in NOT_SERVABLE:
                    raise
                problems.append(f"namespace {place} cannot be served for now: {error}")
        return versions, "; ".join(problems)

    def _heard(self, key: Key) -> None:
        if self.queue is not None:
            self.queue.add(key)

    async def _resync(self, cluster: Cluster, queue: Queue, places: list[str]) -> None:
        """Compare with the cluster after a watch has begun anew, and every so often. Raises NotServed, StartAnew."""
        while True:
            try:
                async with asyncio.timeout(self.settings.resync_seconds):
                    await self.listed.wait()
                    await asyncio.sleep(SETTLE_SECONDS)
            except TimeoutError:
                logger.debug("comparing with the cluster, as every %g s", self.settings.resync_seconds)
            self.listed.clear()
            try:
                for key in await cluster.resync(places):
                    queue.add(key)
                await self._look_again(cluster, places)
            except ORDINARY as error:
                logger.warning("the cluster could not be listed, it will be later: %s", error)

    async def _look_again(self, cluster: Cluster, places: list[str]) -> None:
        """Raises StartAnew when a namespace that was left out can be served now: kopf is told its namespaces once."""
        for place in self.settings.watch_namespaces:
            if place not in places and await cluster.may_serve(place):
                raise StartAnew(f"namespace {place} can be served now")

    def _registry(self, queue: Queue) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()

        @kopf.on.login(registry=registry)
        async def login(**_: Any) -> kopf.ConnectionInfo:
            return await credentials(self.configuration)

        @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry)
        async def job(event: Any, **_: Any) -> None:
            self._hear_job(queue, event["type"], event["object"])
            lighten(event["object"])

        return registry

    def _hear_job(self, queue: Queue, kind: str | None, raw: dict[str, Any]) -> None:
        _note(kind)
        if kind is None:
            self.listed.set()
        metadata = raw["metadata"]
        key: Key | None = (metadata["namespace"], metadata["name"])
        if kind == "DELETED":
            self.store.remove_job((metadata["namespace"], metadata["name"]), metadata["uid"])
        else:
            key = self.store.put_job(raw)
        if key is not None:
            queue.add(key)

    def _hear_pod(self, queue: Queue, kind: str | None, raw: dict[str, Any]) -> None:
        _note(kind)
        record = read_pod(raw)
        if record is None:
            return
        key: Key | None = (record.namespace, record.job)
        if kind == "DELETED":
            self.store.remove_pod((record.namespace, record.job), record.pod.name, record.pod.uid)
        else:
            key = self.store.put_pod(record)
        if key is not None:
            queue.add(key)


def _note(kind: str | None) -> None:
    metrics.watch_events(kind or "LISTED").inc()


def lighten(raw: dict[str, Any]) -> None:
    """Leave of an object that was heard only what kopf still asks for: its own objects of an event are in reference cycles, and would keep the whole
    of it (15 KiB) until the garbage collector comes.
    """
    for name in raw.keys() - {"apiVersion", "kind", "metadata"}:
        del raw[name]
    metadata = raw["metadata"]
    for name in metadata.keys() - {"namespace", "name", "uid", "resourceVersion"}:
        del metadata[name]


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class NoDiffs(kopf.DiffBaseStorage):
    """Events carry no differences: kopf would copy every object deeply to find some (a sixth of the operator's CPU in a burst)."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        """Nothing is compared."""
        return {}

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        """Nothing was kept."""
        return None

    def store(self, **_: Any) -> None:
        """Nothing is kept."""


class NoProgress(kopf.ProgressStorage):
    """Handlers of events have no progress to keep."""

    def fetch(self, **_: Any) -> None:
        """Nothing was kept."""

    def store(self, **_: Any) -> None:
        """Nothing is kept."""

    def purge(self, **_: Any) -> None:
        """Nothing is to be removed."""

    def touch(self, **_: Any) -> None:
        """Nothing is to be woken."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        """There is nothing to clear."""
        return essence


def kopf_settings() -> kopf.OperatorSettings:
    """kopf without its own state: no finalizers, no annotations, no Events, no watching of kinds and namespaces."""
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.persistence.diffbase_storage = NoDiffs()
    settings.persistence.progress_storage = NoProgress()
    settings.watching.chunk_size = connection.LIST_CHUNK
    settings.watching.server_timeout = connection.WATCH_SECONDS
    settings.watching.client_timeout = connection.WATCH_SECONDS + connection.REQUEST_SECONDS
    settings.queueing.idle_timeout = 0.05  # until then a worker of kopf's holds the whole object: 80 MiB at a start beside 1,000 jobs
    settings.networking.request_timeout = connection.REQUEST_SECONDS
    settings.networking.enforce_retry_after = True
    return settings


async def credentials(configuration: client.Configuration) -> kopf.ConnectionInfo:
    """kopf's credentials out of the official client's."""
    header = await connection.authorization(configuration)
    scheme, _, token = (header or "").partition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        scheme=scheme or None,
        token=token or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        expiration=datetime.now(UTC) + timedelta(minutes=CREDENTIAL_MINUTES) if header else None,
    )
