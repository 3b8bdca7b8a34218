"""Launchers that live and end together."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from finetune_operator.gang import Ending, Gang, Launcher

ROUNDS = 60
NODES = 6


def make_gang(folder: Path, *scripts: str, kind: type[Gang] = Gang) -> Gang:
    return kind([Launcher(("/bin/sh", "-c", script), {"PATH": "/usr/bin:/bin"}, folder, folder / f"{index}.log") for index, script in enumerate(scripts)], 30)


def test_no_exit_code_is_lost_when_launchers_end_while_they_are_signalled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All end by themselves at nearly the same time; the first to end has SIGTERM sent to the others."""
    for _ in range(ROUNDS):
        gang = make_gang(tmp_path, *["trap '' TERM; sleep 0.05; exit 12"] * NODES)
        assert asyncio.run(gang.run()).code == 12
    assert caplog.text == ""


def test_the_node_that_failed_first_decides(tmp_path: Path) -> None:
    ending = asyncio.run(make_gang(tmp_path, "exec sleep 600", "exit 12", "exec sleep 600").run())
    assert (ending.code, ending.node, ending.asked) == (12, 1, False)


class Followed(Gang):
    """A gang that leaves files: ``saved`` once it has seen the end of its first launcher."""

    def _end_the_others(self, code: int) -> None:
        super()._end_the_others(code)
        (self._launchers[0].folder / "saved").touch()


def test_a_gang_that_was_asked_to_stop_is_not_asked_again_when_its_first_launcher_has_saved(tmp_path: Path) -> None:
    """A second SIGTERM would have the other launcher end at once, in the middle of its checkpoint."""
    asked = "trap 'echo asked >> asked-{0}' TERM; touch ready-{0}; until [ -s asked-{0} ]; do sleep 0.02; done"
    quick, slow = f"{asked.format(0)}; exit 143", f"{asked.format(1)}; until [ -e saved ]; do sleep 0.02; done; sleep 0.02; exit 143"
    gang = make_gang(tmp_path, quick, slow, kind=Followed)

    async def stop_when_ready() -> Ending:
        run = asyncio.create_task(gang.run())
        while not all((tmp_path / f"ready-{index}").exists() for index in (0, 1)):
            assert not run.done()
            await asyncio.sleep(0.02)
        gang.stop()
        return await run

    assert asyncio.run(stop_when_ready()) == Ending(143, 0, asked=True)
    assert [(tmp_path / f"asked-{index}").read_text() for index in (0, 1)] == ["asked\n"] * 2


def test_a_first_request_of_the_user_after_a_launcher_was_preempted_does_not_count_as_a_second_one(tmp_path: Path) -> None:
    slow = "trap 'echo asked >> asked; touch slow-asked' TERM; touch ready; until [ -e go ]; do sleep 0.02; done; exit 143"
    gang = make_gang(tmp_path, "until [ -e ready ]; do sleep 0.02; done; exit 143", slow, kind=Followed)

    async def stop_after_the_first() -> Ending:
        run = asyncio.create_task(gang.run())
        while not (tmp_path / "slow-asked").exists():
            assert not run.done()
            await asyncio.sleep(0.02)
        gang.stop()
        (tmp_path / "go").touch()
        return await run

    assert asyncio.run(stop_after_the_first()) == Ending(143, 0, asked=True)
    assert (tmp_path / "asked").read_text() == "asked\n"


def test_a_launcher_that_was_preempted_has_the_others_save(tmp_path: Path) -> None:
    preempted, other = "until [ -e ready ]; do sleep 0.02; done; exit 143", "trap 'touch saved; exit 143' TERM; touch ready; while :; do sleep 0.02; done"
    assert asyncio.run(make_gang(tmp_path, preempted, other).run()) == Ending(143, 0, asked=False)
    assert (tmp_path / "saved").exists()


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
