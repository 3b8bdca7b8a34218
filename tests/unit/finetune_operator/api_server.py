"""A connection to a small HTTP server that answers as an API server does in the rare case that a test is about."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio import client

from finetune_operator.connection import Connection, Order, Priority

FIRST: Order = (Priority.CHILDREN, "")


@asynccontextmanager
async def serving(application: web.Application) -> AsyncIterator[client.Configuration]:
    """Configuration of a client of this server."""
    async with TestServer(application) as server:
        yield client.Configuration(host=str(server.make_url("")).rstrip("/"))


@asynccontextmanager
async def connected(application: web.Application, in_flight: int = 8) -> AsyncIterator[Connection]:
    async with serving(application) as configuration, Connection(configuration, in_flight) as connection:
        yield connection
