"""Processes whose standard output is a pipe that nobody reads, or a full disk."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from finetune_trainer.streams import Unfailing, write_line

PROGRAM = """
import sys
from finetune_trainer.streams import Unfailing, write_line
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


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_were_closed_at_the_start_end_nothing(closed: str) -> None:
    program = "import sys; from finetune_trainer.streams import write_line; write_line('one', sys.stdout); write_line('two', sys.stderr); sys.exit(7)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "" if " >&-" in f" {closed}" else "one\n", "" if "2>&-" in closed else "two\n")


def test_a_stream_that_does_not_wait_for_its_reader_goes_on_once_it_is_read() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with open(reading) as read, open(writing, "w") as stream:
        write_line("x" * 2**20, stream)
        os.set_blocking(reading, False)
        with suppress(BlockingIOError):  # nothing more is there
            while os.read(reading, 2**16):
                pass
        os.set_blocking(reading, True)
        write_line("more", stream)
        while not (line := read.readline()).endswith("more\n"):
            assert line
    assert line.endswith("more\n")


@pytest.mark.parametrize("name", ["encoding", "isatty", "fileno"])
def test_all_else_is_the_streams_own(name: str) -> None:
    assert getattr(Unfailing(sys.__stdout__), name) == getattr(sys.__stdout__, name)  # type: ignore[arg-type]
