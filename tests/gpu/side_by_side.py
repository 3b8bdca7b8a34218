"""The tests on GPUs in several processes side by side, each some files: most of their time goes to starts and to the host, and one after the other they take a quarter of an hour.

``python tests/gpu/side_by_side.py [--record FILE] ...``; what else is given goes to pytest. The exit code is 0 when every process ran some tests, or had none to run, and all passed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GROUPS = (
    ("test_logits.py", "test_checkpoints.py", "test_export.py"),
    ("test_training.py", "test_host_paths.py"),
    ("test_low_rank.py",),
    ("test_memory.py", "test_hygiene.py"),
    ("test_reference_job.py",),
    ("test_losses_of_ms_swift.py",),
)
NO_TESTS = 5
"""pytest's exit code."""
POLL_SECONDS = 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--record", type=Path, help="write the machine, outcomes and figures of all to this JSON file")
    own, rest = parser.parse_known_args()
    check_groups()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        records = [Path(folder) / f"{number}.json" for number in range(len(GROUPS))]
        codes = run_groups(records, rest, began)
        if own.record is not None:
            write_record(own.record, records, time.monotonic() - began)
    if all(code == NO_TESTS for code in codes):
        return NO_TESTS
    return max((code for code in codes if code != NO_TESTS), default=0)


def check_groups() -> None:
    """End where a file of tests is in no group."""
    left_out = {path.name for path in HERE.glob("test_*.py")} - {name for group in GROUPS for name in group}
    if left_out:
        sys.exit(f"side_by_side.py: in no group: {', '.join(sorted(left_out))}")


def run_groups(records: list[Path], arguments: list[str], began: float) -> list[int]:
    """Start a pytest for each group, print what each says when it ends, and return their exit codes; none outlives this process."""
    logs = [record.with_suffix(".log") for record in records]
    running: dict[int, subprocess.Popen[bytes]] = {}
    codes = [NO_TESTS] * len(GROUPS)
    try:
        for number, group in enumerate(GROUPS):
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                *(str(HERE / name) for name in group),
                "--record",
                str(records[number]),
                *arguments,
            ]
            with logs[number].open("wb") as log:
                running[number] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while running:
            for number in [number for number, process in running.items() if process.poll() is not None]:
                codes[number] = running.pop(number).returncode
                print(f"== {' '.join(GROUPS[number])} {shlex.join(arguments)}: exit code {codes[number]} after {time.monotonic() - began:.0f} s", flush=True)
                print(logs[number].read_text(errors="replace"), flush=True)
            time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return codes


def write_record(path: Path, records: list[Path], seconds: float) -> None:
    """One record of those of all groups."""
    parts: list[dict[str, Any]] = [json.loads(record.read_text()) for record in records if record.exists()]
    whole = {
        "date": parts[0]["date"],
        "command": shlex.join(["python", *sys.argv]),
        "seconds": round(seconds, 1),
        "machine": parts[0]["machine"],
        "tests": {name: test for part in parts for name, test in part["tests"].items()},
        "not_run": sorted({name for part in parts for name in part["not_run"]}),
        "figures": {name: figures for part in parts for name, figures in part["figures"].items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
