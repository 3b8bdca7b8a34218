"""Gangs of one, two and four worker processes, each started by the first test that asks for it and ended with the last test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gang import Gang


def _gang(size: int) -> Iterator[Gang]:
    gang = Gang(size)
    try:
        yield gang
    finally:
        gang.close()


@pytest.fixture(scope="package")
def gang1() -> Iterator[Gang]:
    yield from _gang(1)


@pytest.fixture(scope="package")
def gang2() -> Iterator[Gang]:
    yield from _gang(2)


@pytest.fixture(scope="package")
def gang4() -> Iterator[Gang]:
    yield from _gang(4)
