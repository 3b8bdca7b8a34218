"""Launchers that live and end together."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from finetune_operator.gang import Gang, Launcher

ROUNDS = 60
NODES = 6


def make_gang(folder: Path, *scripts: str) -> Gang:
    return Gang([Launcher(("/bin/sh", "-c", script), {"PATH": "/usr/bin:/bin"}, folder, folder / f"{index}.log") for index, script in enumerate(scripts)], 30)


def test_no_exit_code_is_lost_when_launchers_end_while_they_are_signalled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All end by themselves at nearly the same time; the first to end has SIGTERM sent to the others."""
    for _ in range(ROUNDS):
        gang = make_gang(tmp_path, *["trap '' TERM; sleep 0.05; exit 12"] * NODES)
        assert asyncio.run(gang.run()).code == 12
    assert caplog.text == ""


def test_the_node_that_failed_first_decides(tmp_path: Path) -> None:
    ending = asyncio.run(make_gang(tmp_path, "exec sleep 600", "exit 12", "exec sleep 600").run())
    assert (ending.code, ending.node, ending.asked) == (12, 1, False)


def test_a_signal_that_ends_a_launcher_gives_a_shells_code(tmp_path: Path) -> None:
    assert asyncio.run(make_gang(tmp_path, "kill -KILL $$").run()).code == 137


def test_a_launcher_that_cannot_start_leaves_none_behind(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    gang = Gang(
        [
            Launcher(("/bin/sh", "-c", f"echo $$ > {pid}; exec sleep 600"), {}, tmp_path, tmp_path / "0.log"),
            Launcher(("/nowhere",), {}, tmp_path, tmp_path / "1.log"),
        ],
        30,
    )
    with pytest.raises(FileNotFoundError):
        asyncio.run(gang.run())
    assert [node.process.poll() for node in gang._nodes] == [-9]
