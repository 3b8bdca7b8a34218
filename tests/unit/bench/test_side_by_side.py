"""The runner of the tests on GPUs: what it makes of its processes' ends, and of their records."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import side_by_side
from side_by_side import NO_TESTS, exit_code, merge

CONFTEST = """
import json
from pathlib import Path

def pytest_addoption(parser):
    parser.addoption("--record", type=Path)

def pytest_sessionfinish(session):
    session.config.getoption("--record").write_text(json.dumps({"count": session.testscollected}))
"""
DYING = "import os, signal\n\ndef test_it():\n    os.kill(os.getpid(), signal.SIGKILL)\n"


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0, 0], 0), ([0, NO_TESTS], 0), ([NO_TESTS, NO_TESTS], NO_TESTS), ([0, 1, NO_TESTS], 1), ([0, -11, 0], 1), ([NO_TESTS, 2], 2)],
)
def test_a_process_that_failed_or_died_is_no_success(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected


def test_every_file_of_tests_is_run_once() -> None:
    groups = [name for group in (*side_by_side.SIDE_BY_SIDE, side_by_side.ALONE) for name in group]
    assert sorted(groups) == sorted(path.name for path in side_by_side.HERE.glob("test_*.py"))
    with pytest.raises(SystemExit, match=r"in no group: test_new\.py"):
        side_by_side.check_groups({*groups, "test_new.py"})


def test_records_become_one() -> None:
    parts = [
        {"date": "d", "machine": {"gpus": 2}, "tests": {"a": 1}, "not_run": ["y"], "figures": {}},
        {"date": "d", "machine": {"gpus": 2}, "tests": {"b": 2}, "not_run": ["x", "y"], "figures": {"b": {"loss": 1.0}}},
    ]
    whole = merge(parts, 12.34)
    assert (whole["tests"], whole["not_run"], whole["figures"], whole["seconds"]) == ({"a": 1, "b": 2}, ["x", "y"], {"b": {"loss": 1.0}}, 12.3)
    assert merge([], 1.0)["tests"] == {}


def test_each_group_has_a_process_and_what_it_said_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(side_by_side, "HERE", tmp_path)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_good.py").write_text("def test_it():\n    pass\n")
    (tmp_path / "test_dying.py").write_text(DYING)
    codes = side_by_side.run_groups([("test_good.py",), ("test_dying.py",)], tmp_path, [], time.monotonic())
    assert codes == {("test_good.py",): 0, ("test_dying.py",): -signal.SIGKILL}
    assert "1 passed" in capsys.readouterr().out
    assert side_by_side.record_of(tmp_path, ("test_good.py",)).exists()


def test_no_process_outlives_a_run_that_is_ended(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_slow.py").write_text(
        "import os, pathlib, time\n\ndef test_it():\n    pathlib.Path('pid').write_text(str(os.getpid()))\n    time.sleep(600)\n"
    )
    program = (
        "import pathlib, sys, side_by_side\n"
        "side_by_side.HERE = pathlib.Path.cwd()\n"
        "side_by_side.SIDE_BY_SIDE, side_by_side.ALONE = (('test_slow.py',),), ('test_slow.py',)\n"
        "sys.argv = ['side_by_side.py']\n"
        "sys.exit(side_by_side.main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(Path(side_by_side.__file__).parent)}) as runner:
        pid = tmp_path / "pid"
        while not (pid.exists() and pid.read_text()):
            assert runner.poll() is None
            time.sleep(0.05)
        runner.send_signal(signal.SIGTERM)
        assert runner.wait(timeout=60) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{pid.read_text()}").exists()
