"""Short requests over kept connections: what an answer is, and which connection may be used again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import aiohttp
import httptools
import pytest

from finetune_operator import wire
from finetune_operator.wire import Reader, Wires

CREATED = b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{'a':\r\n3;x=y\r\n 1}\r\n0\r\n\r\n"

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.mark.parametrize(
    ("data", "status", "content"),
    [
        (CREATED, 201, b"{}"),
        (CHUNKED, 200, b"{'a': 1}"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 429 Too Many Requests\r\ncontent-length:0\r\nRETRY-AFTER: 1\r\n\r\n", 429, b""),
    ],
)
def test_an_answer_is_read_when_its_last_byte_has_come_and_the_next_one_after_it(data: bytes, status: int, content: bytes) -> None:
    reader = Reader()
    for _ in range(2):
        assert [reply for place in range(len(data) - 1) for reply in reader.read(data[place : place + 1])] == []
        assert reader.is_inside
        (reply,) = reader.read(data[-1:])
        assert not reader.is_inside
        assert (reply.status, reply.content, reply.is_last) == (status, content, False)


def test_names_of_headers_are_in_lower_case() -> None:
    (reply,) = Reader().read(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After:  7\r\nContent-Length: 0\r\nConnection: Close\r\n\r\n")
    assert reply.headers["retry-after"] == "7"
    assert reply.is_last


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfive\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}{}\r\n",
    ],
)
def test_what_is_no_answer_is_refused(data: bytes) -> None:
    with pytest.raises(httptools.HttpParserError):
        Reader().read(data)


@asynccontextmanager
async def serving(serve: Serve, path: str = "", seconds: float = 5.0) -> AsyncIterator[tuple[Wires, list[int]]]:
    """Connections to a server, and one item for each connection that was made."""
    made: list[int] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.append(1)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    wires = Wires(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{path}", None, seconds)
    try:
        yield wires, made
    finally:
        wires.close()
        server.close()


async def read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """The head of a request, and its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    return head, await reader.readexactly(int(head.partition("Content-Length: ")[2].split()[0]))


async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await read_request(reader)
        writer.write(CREATED)


async def answer_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One answer, which says that it is the last."""
    await read_request(reader)
    writer.write(CREATED.replace(b"Content-Type", b"Connection: close\r\nContent-Type"))
    await reader.read()


async def answer_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One answer; the next request is read, and the connection closed."""
    await read_request(reader)
    writer.write(CREATED)
    await read_request(reader)


def test_a_request_is_sent_as_a_whole_below_the_path_of_the_server() -> None:
    asked: list[tuple[str, bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await read_request(reader))
        writer.write(CREATED)

    async def main() -> str:
        async with serving(serve, "/clusters/one/") as (wires, _):
            await wires.send("POST", "/api/v1/namespaces/a b/pods", "fieldManager=x", {"Accept": "application/json"}, b"{}")
            return wires.named

    named = asyncio.run(main())
    head = f"POST /clusters/one/api/v1/namespaces/a%20b/pods?fieldManager=x HTTP/1.1\r\nHost: {named}\r\nAccept: application/json\r\nContent-Length: 2\r\n\r\n"
    assert asked == [(head, b"{}")]


def test_a_connection_is_used_again_and_another_is_made_where_it_is_busy() -> None:
    async def main() -> tuple[int, int]:
        async with serving(answer_all) as (wires, made):
            for _ in range(5):
                await wires.send("POST", "/", "", {}, b"{}")
            one = len(made)
            await asyncio.gather(*(wires.send("POST", "/", "", {}, b"{}") for _ in range(3)))
            return one, len(made)

    assert asyncio.run(main()) == (1, 3)


@pytest.mark.parametrize(("serve", "kept_seconds"), [(answer_all, 0.0), (answer_and_close, 15.0)])
def test_a_connection_that_was_idle_for_long_or_that_the_server_ends_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch, serve: Serve, kept_seconds: float
) -> None:
    monkeypatch.setattr(wire, "KEPT_SECONDS", kept_seconds)

    async def main() -> int:
        async with serving(serve) as (wires, made):
            for _ in range(3):
                await wires.send("POST", "/", "", {}, b"{}")
            return len(made)

    assert asyncio.run(main()) == 3


def test_only_what_may_be_repeated_is_sent_again_when_a_kept_connection_turns_out_to_be_closed() -> None:
    async def main() -> int:
        async with serving(answer_one) as (wires, made):
            await wires.send("POST", "/", "", {}, b"{}")
            await wires.send("GET", "/", "", {}, None)
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await wires.send("POST", "/", "", {}, b"{}")
            return len(made)

    assert asyncio.run(main()) == 2


def test_a_request_without_an_answer_ends_in_time_and_its_connection_with_it() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await reader.read()

    async def main() -> tuple[int, int]:
        async with serving(serve, seconds=0.05) as (wires, made):
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    await wires.send("GET", "/", "", {}, None)
            return len(made), len(wires.idle)

    assert asyncio.run(main()) == (2, 0)


@pytest.mark.parametrize("data", [b"what?\r\n\r\n", CREATED + CREATED, CREATED + CREATED[:9]])
def test_an_answer_that_is_none_or_is_followed_by_another_is_not_trusted(data: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(data)
        await reader.read()

    async def main() -> int:
        async with serving(serve) as (wires, _):
            with pytest.raises(aiohttp.ClientPayloadError):
                await wires.send("GET", "/", "", {}, None)
            return len(wires.idle)

    assert asyncio.run(main()) == 0


def test_a_server_that_is_not_there_is_an_error_of_the_connection() -> None:
    async def main() -> None:
        async with serving(answer_all) as (wires, _):
            pass
        with pytest.raises(aiohttp.ClientConnectionError, match=r"cannot connect to 127\.0\.0\.1"):
            await wires.send("GET", "/", "", {}, None)

    asyncio.run(main())


def test_a_header_cannot_bring_others_with_it() -> None:
    async def main() -> None:
        async with serving(answer_all) as (wires, made):
            with pytest.raises(ValueError, match="a break in it"):
                await wires.send("GET", "/", "", {"Authorization": "Bearer a\r\nHost: other"}, None)
            assert not made

    asyncio.run(main())
