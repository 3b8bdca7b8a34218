"""Requests to the API server: credentials by the official client, watches by aiohttp, the hot path by `wire` and orjson.

Creating four objects of a job costs 1.7 ms of CPU this way and 7.2 ms through the official client's models. All requests of the
process but watches share a bounded number of turns, given out by priority and then by the age of the job: a status is written when no child
waits to be made.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp
import orjson
from kubernetes.aio import client, config

from finetune_operator import metrics, names
from finetune_operator.wire import Wires

REQUEST_SECONDS = 30.0
WATCH_SECONDS = 300
"""After so long the API server is to end a watch."""
SILENCE_SECONDS = 90.0
"""A watch on which nothing came for so long is taken for broken: bookmarks come every minute."""
LIST_CHUNK = 100
"""A pod takes 25 KiB while it is read."""
THROTTLED = 429
MOST_THROTTLED = 3
"""Times that a request is sent again of which the API server says that it was too many."""
LONGEST_PAUSE_SECONDS = 30.0
METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
MERGE_PATCH = "application/merge-patch+json"

logger = logging.getLogger(__name__)


class Priority(IntEnum):
    """What goes first when requests wait."""

    CHILDREN = 0
    STATUS = 1
    EVENTS = 2


Order = tuple[Priority, str]
"""Priority, then the age of the job: a smaller text is older."""


class ApiError(Exception):
    """An answer of the API server that was not expected; the work it belongs to is tried again."""

    def __init__(self, method: str, path: str, answer: Answer) -> None:
        super().__init__(f"{method} {path}: {answer.status} {answer.message}")
        self.status = answer.status
        self.pause = answer.pause


@dataclass(frozen=True)
class Answer:
    """What the API server said: an object, its metadata only, or a Status."""

    status: int
    body: dict[str, Any]
    pause: float = 0.0
    """Seconds that the API server asks to be left alone (Retry-After)."""

    @property
    def ok(self) -> bool:
        return self.status < 300

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))


async def load_configuration() -> client.Configuration:
    """The service account's credentials in a pod, else the kubeconfig's; raises kubernetes.aio.config.ConfigException."""
    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        await config.load_kube_config(client_configuration=configuration)
    return configuration


async def authorization(configuration: client.Configuration) -> str | None:
    """The Authorization header, read anew where a token is renewed; None with a client certificate."""
    token: str | None = await configuration.get_api_key_with_prefix("BearerToken")
    return token or configuration.get_basic_auth_token()


def ssl_context(configuration: client.Configuration) -> ssl.SSLContext:
    """TLS as the kubeconfig says."""
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


@dataclass
class Turns:
    """So many at a time; those that wait go by their order, equal ones as they came."""

    free: int
    waiting: list[tuple[Order, int, asyncio.Future[None]]] = field(default_factory=list)
    serial: itertools.count[int] = field(default_factory=itertools.count)

    def turn(self, order: Order) -> Turn:
        """To be used as `async with turns.turn(order):`."""
        return Turn(self, order)

    async def take(self, order: Order) -> None:
        """Wait for a turn; every one is to be given back."""
        if self.free:
            self.free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self.waiting, (order, next(self.serial), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give()
            raise

    def give(self) -> None:
        """Leave a turn to the next."""
        while self.waiting:
            turn = heapq.heappop(self.waiting)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self.free += 1


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn, taken and given back. No generator: there are five of them for each job of a burst."""

    turns: Turns
    order: Order

    async def __aenter__(self) -> None:
        await self.turns.take(self.order)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.turns.give()


class Connection:
    """The API server, for everything but the watch of jobs (kopf's) and the Lease (the official client's)."""

    def __init__(self, configuration: client.Configuration, in_flight: int) -> None:
        self.configuration = configuration
        self.turns = Turns(in_flight)
        self.in_flight = in_flight

    async def __aenter__(self) -> Self:
        context = ssl_context(self.configuration)
        self.session = aiohttp.ClientSession(  # for watches
            connector=aiohttp.TCPConnector(limit=0, ssl=context),
            headers={"User-Agent": names.OPERATOR},
        )
        self.wires = Wires(self.configuration.host, context, REQUEST_SECONDS)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.wires.close()
        await self.session.close()

    async def send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        order: Order,
        accept: str = "application/json",
        content_type: str = "application/json",
        params: dict[str, str] | None = None,
    ) -> Answer:
        """One request, when its turn comes. Raises aiohttp.ClientError or TimeoutError; any answer of the API server is returned.

        When the API server is asked too much the turn is kept while it wants to be left alone: so there are fewer requests of any kind.
        """
        async with self.turns.turn(order):
            headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": names.OPERATOR}
            data = None if body is None else orjson.dumps(body)
            answer = await self._ask(method, path, data, headers, params)
            for _ in range(MOST_THROTTLED):
                if answer.status != THROTTLED or not answer.pause:
                    break
                await asyncio.sleep(min(answer.pause, LONGEST_PAUSE_SECONDS))
                answer = await self._ask(method, path, data, headers, params)
        return answer

    async def pages(
        self, path: str, params: dict[str, str], *, accept: str = "application/json", priority: Priority = Priority.EVENTS
    ) -> AsyncIterator[dict[str, Any]]:
        """A list, in chunks; raises ApiError, aiohttp.ClientError, TimeoutError."""
        onward = ""
        while True:
            query = {**params, "limit": str(LIST_CHUNK), "continue": onward}
            answer = await self.send("GET", path, order=(priority, ""), accept=accept, params=query)
            if not answer.ok:
                raise ApiError("GET", path, answer)
            yield answer.body
            onward = answer.body["metadata"].get("continue", "")
            if not onward:
                return

    async def watch(self, path: str, params: dict[str, str]) -> AsyncGenerator[dict[str, Any], None]:
        """Events of a kind, `{"type": ..., "object": ...}`, as they happen, until the API server ends the watch. It takes no turn.

        Raises ApiError where the watch is refused, aiohttp.ClientError, TimeoutError.
        """
        query = {**params, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(WATCH_SECONDS)}
        limits = aiohttp.ClientTimeout(total=WATCH_SECONDS + REQUEST_SECONDS, sock_connect=REQUEST_SECONDS, sock_read=SILENCE_SECONDS)
        headers = await self._authorized({"Accept": "application/json"})
        async with self.session.get(f"{self.configuration.host}{path}", params=query, headers=headers, timeout=limits) as response:
            if response.status != 200:
                raise ApiError("WATCH", path, Answer(response.status, _read(await response.read()), _pause(response.headers)))
            rest = b""
            async for chunk in response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in filter(None, lines):
                    yield _read(line)

    async def _authorized(self, headers: dict[str, str]) -> dict[str, str]:
        token = await authorization(self.configuration)
        return headers if token is None else {**headers, "Authorization": token}

    async def _ask(self, method: str, path: str, data: bytes | None, headers: dict[str, str], params: dict[str, str] | None) -> Answer:
        headers = await self._authorized(headers)
        begun = time.perf_counter()
        try:
            reply = await self.wires.send(method, path, urlencode(params or {}), headers, data)
        finally:
            metrics.request_seconds(method).observe(time.perf_counter() - begun)
        metrics.requests(method, reply.status).inc()
        return Answer(reply.status, _read(reply.content), _pause(reply.headers) if reply.status == THROTTLED else 0.0)


def _pause(headers: Mapping[str, str]) -> float:
    """Retry-After in seconds; 0 where there is none (a date, which HTTP allows too, is not what Kubernetes sends)."""
    text = headers.get("retry-after", "")
    return float(text) if text.isdecimal() else 0.0


def _read(content: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        return {"message": content[:200].decode(errors="replace")}
    return body if isinstance(body, dict) else {"message": str(body)[:200]}
