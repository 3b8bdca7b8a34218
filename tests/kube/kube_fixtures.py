"""Real Kubernetes for tests: fixture `api` (no nodes, no root needed) and fixture `cluster` (one node, root needed)."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from kube_api import API_BINARIES, ApiServer, start_api_server
from kube_build import binaries
from kube_cluster import CLUSTER_BINARIES, Cluster, start_cluster

__all__ = ["ApiServer", "Cluster", "api", "cluster", "start_api_server", "start_cluster"]


def _build(request: pytest.FixtureRequest, names: tuple[str, ...]) -> None:
    """Build what is missing, with the lines that say so on the terminal."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        binaries(*names)


@contextmanager
def _terminable() -> Iterator[None]:
    """A pytest that is asked to end (SIGTERM) ends as by Ctrl-C: in good order, with the cluster's containers and mounts removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """etcd, API server and controller manager, for all tests of a session: give each test a namespace of its own."""
    _build(request, API_BINARIES)
    with start_api_server(tmp_path_factory.mktemp("api")) as server:
        yield server


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Kubernetes with one node, for all tests of a session. Its logs are kept in pytest's temporary folder."""
    _build(request, CLUSTER_BINARIES)
    with _terminable(), start_cluster() as running:
        yield running
        shutil.copytree(running.processes.logs, tmp_path_factory.mktemp("cluster") / "log")
