"""Processes whose standard output is a pipe that nobody reads, or a full disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_trainer.streams import Lasting

PROGRAM = """
import sys
from finetune_trainer.streams import Lasting, write_line
write_line("one", sys.stdout)
sys.stdin.readline()
for _ in range(3):
    write_line("more", sys.stdout)
    write_line("told", sys.stderr)
print("x" * 100_000)
sys.exit(7)
"""


def start(output: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.PIPE, env=environment, text=True)


def test_a_reader_that_ends_ends_nothing_and_changes_no_exit_code() -> None:
    reading, writing = os.pipe()
    process = start(writing)
    os.close(writing)
    assert os.read(reading, 100) == b"one\n"
    os.close(reading)
    assert process.communicate("go\n") == (None, "told\n" * 3)
    assert process.returncode == 7


def test_a_full_disk_ends_nothing_either() -> None:
    with open("/dev/full", "w") as full:
        process = start(full.fileno())
    assert process.communicate("go\n") == (None, "told\n" * 3)
    assert process.returncode == 7


def test_a_stream_that_is_read_is_written_as_it_is(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        process = start(file.fileno())
        assert process.communicate("go\n") == (None, "told\n" * 3)
    assert (tmp_path / "out").read_text() == "one\n" + "more\n" * 3 + "x" * 100_000 + "\n"


@pytest.mark.parametrize("name", ["encoding", "isatty", "fileno"])
def test_all_else_is_the_streams_own(name: str) -> None:
    assert getattr(Lasting(sys.__stdout__), name) == getattr(sys.__stdout__, name)  # type: ignore[arg-type]
