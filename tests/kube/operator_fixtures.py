"""Fixtures: an operator that serves every namespace while a module of tests runs, and a namespace of its own for each test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_operator import names
from kube_api import ApiServer
from operator_jobs import Team
from operator_process import Operator, Trainers, install, running_operator, running_trainers

__all__ = ["operator", "operator_kubeconfig", "team", "trainers"]

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def operator_kubeconfig(api: ApiServer) -> Path:
    """The API server serves FineTuneJobs, and the chart's service account has its rights; this is its kubeconfig."""
    return install(api)


@pytest.fixture(scope="session")
def trainers() -> Iterator[Trainers]:
    with running_trainers() as server:
        yield server


@pytest.fixture(scope="module")
def operator(operator_kubeconfig: Path, trainers: Trainers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """One operator with the chart's rights and short times, for the tests of a module."""
    with running_operator(tmp_path_factory.mktemp("operator"), operator_kubeconfig, progressPort=trainers.port) as process:
        yield process


@pytest.fixture
def team(api: ApiServer, operator_kubeconfig: Path, trainers: Trainers) -> Iterator[Team]:
    """A namespace; its jobs are deleted when the test has ended, so that nobody asks for their progress any more."""
    made = Team(api, api.create_namespace(f"team-{next(_numbers)}"), trainers)
    yield made
    api.delete(made.path(names.PLURAL), {"propagationPolicy": "Background"})
