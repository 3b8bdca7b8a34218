"""Short requests to the API server: each is one write, its answer is read as a whole, over connections that are kept.

httptools (the parser of Node.js) reads the answers. A general client takes twice the CPU for a request (docs/decisions/0015-short-requests-without-a-client.md). What is a stream (watches) or talks to
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
import httptools

KEPT_SECONDS = 15.0
"""A connection that was idle for longer is not used again: the API server, or something between, may be about to close it."""
REPEATABLE = frozenset(("GET", "PUT", "DELETE"))
"""Methods that are tried again on a new connection when a kept one turns out to be closed."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    """By their names in lower case."""
    content: bytes
    is_last: bool
    """Whether the server closes the connection after it."""


class Reader:
    """Puts answers together from what comes over one connection."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.replies: list[Reply] = []
        self.is_inside = False
        """Whether a part of an answer has come, and not yet all of it."""

    def read(self, data: bytes) -> list[Reply]:
        """The answers that are whole with these bytes. Raises httptools.HttpParserError where they belong to none."""
        self.replies = []
        self.parser.feed_data(data)
        return self.replies

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self.is_inside = True
        self.headers: dict[str, str] = {}
        self.chunks: list[bytes] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, chunk: bytes) -> None:
        """Called by the parser."""
        self.chunks.append(chunk)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.is_inside = False
        self.replies.append(Reply(self.parser.get_status_code(), self.headers, b"".join(self.chunks), not self.parser.should_keep_alive()))


class Wire(asyncio.Protocol):
    """One connection: a request, its answer, then the next request."""

    def __init__(self) -> None:
        self.reader = Reader()
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
        try:
            replies = self.reader.read(data)
        except httptools.HttpParserError as error:
            self._end(aiohttp.ClientPayloadError(f"an answer cannot be read: {error}"))
            return
        if self.answer is None or self.answer.done() or len(replies) > 1 or (replies and self.reader.is_inside):
            self._end(aiohttp.ClientPayloadError("more has come than was asked for"))
        elif replies:
            self.answer.set_result(replies[0])

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
