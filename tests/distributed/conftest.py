"""Gangs of one, two and four worker processes, each started by the first test that asks for it and ended with the last test of this folder; and a disk that is soon full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that takes 256 KiB; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
