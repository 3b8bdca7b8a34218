"""HTTP/1.1 as far as short requests to the API server need it: a request as a whole, its answer as a whole, over connections that are kept.

A general client takes twice the CPU for this (docs/decisions/0014-short-requests-without-a-client.md). What is a stream (watches) or talks to
somebody else goes by aiohttp, and what goes wrong here is told by aiohttp's exceptions, so that nobody need know which of the two it was.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import quote, urlsplit

import aiohttp

KEPT_SECONDS = 15.0
"""A connection that was idle for longer is not used again: the API server, or something between, may be about to close it."""
LONGEST_HEAD = 65536
REPEATABLE = frozenset(("GET", "PUT", "DELETE"))
"""Methods that are tried again on a new connection when a kept one turns out to be closed."""
EMPTY = (204, 304)
"""Answers without a body."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    """By their names in lower case."""
    content: bytes
    size: int
    """Bytes of all of it."""

    @property
    def is_last(self) -> bool:
        """Whether the server closes the connection after it."""
        return self.headers.get("connection", "").lower() == "close"


def read_reply(data: bytearray) -> Reply | None:
    """The answer that some bytes begin with; None while it is not whole. Raises ValueError where it is none."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if len(data) > LONGEST_HEAD:
            raise ValueError(f"{len(data)} bytes have come, and no end of the headers")
        return None
    first, *lines = data[:end].decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if version != "HTTP/1.1":
        raise ValueError(f"the answer begins with {first[:80]!r}")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status = int(rest[:3])
    body = _read_body(data, end + 4, status, headers)
    return None if body is None else Reply(status, headers, *body)


def _read_body(data: bytearray, start: int, status: int, headers: Mapping[str, str]) -> tuple[bytes, int] | None:
    """The body that begins at ``start``, and where it ends; None while it is not whole."""
    if status in EMPTY:
        return b"", start
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return _read_chunks(data, start)
    if "content-length" not in headers:
        raise ValueError(f"an answer {status} of unknown length")
    end = start + int(headers["content-length"])
    return None if len(data) < end else (bytes(data[start:end]), end)


def _read_chunks(data: bytearray, start: int) -> tuple[bytes, int] | None:
    """As `_read_body`. Nothing is copied before the last chunk has come: a list of pods has many."""
    chunks: list[slice] = []
    while (line_end := data.find(b"\r\n", start)) >= 0:
        size = int(data[start:line_end].partition(b";")[0], 16)
        start = line_end + 2
        end = start + size
        if len(data) < end + 2:
            return None
        if data[end : end + 2] != b"\r\n":
            raise ValueError("a chunk that does not end where it should")
        if size == 0:
            return b"".join(data[chunk] for chunk in chunks), end + 2
        chunks.append(slice(start, end))
        start = end + 2
    return None


class Wire(asyncio.Protocol):
    """One connection: a request, its answer, then the next request."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.answer: asyncio.Future[Reply] | None = None
        self.idle_since: float | None = None
        """Monotonic; None: it was never used."""

    @property
    def is_usable(self) -> bool:
        """Whether a request may be sent by it."""
        return not self.transport.is_closing() and (self.idle_since is None or time.monotonic() - self.idle_since < KEPT_SECONDS)

    async def ask(self, request: bytes) -> Reply:
        """Send a request and wait for its answer. Where that fails, or is cancelled, the connection is closed: an answer may still come."""
        self.answer = asyncio.get_running_loop().create_future()
        try:
            self.transport.write(request)
            reply = await self.answer
        except BaseException:
            self.transport.abort()
            raise
        finally:
            self.answer = None
        self.idle_since = time.monotonic()
        if reply.is_last:
            self.transport.close()
        return reply

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop. What comes unasked, or after an answer, is nobody's: the connection cannot be trusted any more."""
        self.received += data
        try:
            reply = read_reply(self.received)
        except ValueError as error:
            self._end(aiohttp.ClientPayloadError(f"an answer cannot be read: {error}"))
            return
        if self.answer is None or (reply is not None and reply.size != len(self.received)):
            self._end(aiohttp.ClientPayloadError("more has come than was asked for"))
        elif reply is not None and not self.answer.done():
            self.received.clear()
            self.answer.set_result(reply)

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the event loop."""
        self._end(aiohttp.ServerDisconnectedError(str(error) if error else None))

    def _end(self, error: aiohttp.ClientError) -> None:
        self.transport.abort()
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error)


class Wires:
    """Connections to one server; as many as there are requests at the same time."""

    def __init__(self, server: str, context: ssl.SSLContext | None, seconds: float) -> None:
        url = urlsplit(server)
        self.host, self.port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
        self.context = context if url.scheme == "https" else None
        self.seconds = seconds
        """Time that a request may take, with its connection."""
        self.prefix, self.named = url.path.rstrip("/"), url.netloc.rpartition("@")[2]
        self.idle: list[Wire] = []

    async def send(self, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes | None) -> Reply:
        """One request. Raises aiohttp.ClientError, TimeoutError."""
        request = self._write(method, path, query, headers, body or b"")
        async with asyncio.timeout(self.seconds):
            while True:
                wire = self._take() or await self._connect()
                is_new = wire.idle_since is None
                try:
                    reply = await wire.ask(request)
                except aiohttp.ServerDisconnectedError:
                    if is_new or method not in REPEATABLE:
                        raise
                    continue
                self.idle.append(wire)
                return reply

    def close(self) -> None:
        """Close what is idle; a request that is cancelled closes its own connection."""
        while self.idle:
            self.idle.pop().transport.close()

    def _write(self, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes) -> bytes:
        target = self.prefix + quote(path) + (f"?{query}" if query else "")
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self.named}", *(f"{name}: {value}" for name, value in headers.items())]
        if any("\n" in line or "\r" in line for line in lines):
            raise ValueError(f"{method} {path}: a line of the request has a break in it")
        return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode("latin-1") + body

    def _take(self) -> Wire | None:
        """The connection that was used last; those that cannot be used any more are closed."""
        while self.idle:
            wire = self.idle.pop()
            if wire.is_usable:
                return wire
            wire.transport.close()
        return None

    async def _connect(self) -> Wire:
        try:
            _, wire = await asyncio.get_running_loop().create_connection(Wire, self.host, self.port, ssl=self.context)
        except OSError as error:
            raise aiohttp.ClientConnectionError(f"cannot connect to {self.named}: {error}") from error
        return wire
