"""The tests on GPUs in several processes side by side, each some files: most of their time goes to starts and to the host, and one after the other they take a quarter of an hour.

``python tests/gpu/side_by_side.py [--record FILE] ...``; what else is given goes to every pytest. Tests that watch whole cards, or the clock, come afterwards, alone. The exit code is 0 when all that ran has passed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Group = tuple[str, ...]
SIDE_BY_SIDE: tuple[Group, ...] = (
    ("test_logits.py", "test_checkpoints.py", "test_export.py"),
    ("test_training.py", "test_host_paths.py"),
    ("test_low_rank.py",),
    ("test_memory.py",),
    ("test_reference_job.py",),
    ("test_losses_of_ms_swift.py",),
)
ALONE: Group = ("test_hygiene.py",)
NO_TESTS = 5
"""pytest's exit code."""
POLL_SECONDS = 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--record", type=Path, help="write the machine, outcomes and figures of all to this JSON file")
    own, rest = parser.parse_known_args()
    check_groups({path.name for path in HERE.glob("test_*.py")})
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        codes = run_groups(SIDE_BY_SIDE, Path(folder), rest, began) | run_groups((ALONE,), Path(folder), rest, began)
        if own.record is not None:
            parts = [json.loads(path.read_text()) for group in codes if (path := record_of(Path(folder), group)).exists()]
            own.record.parent.mkdir(parents=True, exist_ok=True)
            own.record.write_text(json.dumps(merge(parts, time.monotonic() - began), indent=1) + "\n")
    for group, code in codes.items():
        if code not in (0, NO_TESTS):
            print(f"== {' '.join(group)}: exit code {code}")
    return exit_code(list(codes.values()))


def check_groups(files: set[str]) -> None:
    """End where a file of tests is in no group."""
    left_out = files - {name for group in (*SIDE_BY_SIDE, ALONE) for name in group}
    if left_out:
        sys.exit(f"side_by_side.py: in no group: {', '.join(sorted(left_out))}")


def exit_code(codes: Sequence[int]) -> int:
    """Of all processes: the first that is neither success nor "no tests here" (1 for one that a signal has ended), and "no tests" where nobody had any."""
    failed = [code for code in codes if code not in (0, NO_TESTS)]
    if failed:
        return failed[0] if failed[0] > 0 else 1
    return NO_TESTS if all(code == NO_TESTS for code in codes) else 0


def record_of(folder: Path, group: Group) -> Path:
    return folder / f"{group[0]}.json"


def run_groups(groups: Sequence[Group], folder: Path, arguments: Sequence[str], began: float) -> dict[Group, int]:
    """Start a pytest for each group, print what each says when it ends, and return their exit codes. None of them outlives this function."""
    running: dict[Group, subprocess.Popen[bytes]] = {}
    codes: dict[Group, int] = {}
    try:
        for group in groups:
            files = [str(HERE / name) for name in group]
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings", *files, "--record", str(record_of(folder, group))]
            with record_of(folder, group).with_suffix(".log").open("wb") as log:
                running[group] = subprocess.Popen([*command, *arguments], stdout=log, stderr=subprocess.STDOUT)
        while running:
            for group in [group for group, process in running.items() if process.poll() is not None]:
                codes[group] = running.pop(group).returncode
                print(f"== {' '.join(group)}: exit code {codes[group]} after {time.monotonic() - began:.0f} s", flush=True)
                print(record_of(folder, group).with_suffix(".log").read_text(errors="replace"), flush=True)
            time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGINT)  # pytest ends its tests' own processes then
        for process in running.values():
            process.wait()
    return codes


def merge(parts: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """One record of those of all groups; empty where there are none."""
    first = parts[0] if parts else {}
    return {
        "date": first.get("date"),
        "command": shlex.join(["python", *sys.argv]),
        "seconds": round(seconds, 1),
        "machine": first.get("machine"),
        "tests": {name: test for part in parts for name, test in part["tests"].items()},
        "not_run": sorted({name for part in parts for name in part["not_run"]}),
        "figures": {name: figures for part in parts for name, figures in part["figures"].items()},
    }


if __name__ == "__main__":
    sys.exit(main())
