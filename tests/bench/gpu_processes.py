"""One start of one side's processes: the command, its environment, a deadline, and what it leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_results import Figures, Run, read_figures, read_marks, select
from gpu_works import Job, Layout, Side

from finetune_trainer.ports import find_free_port

HERE = Path(__file__).resolve().parent
LAST_WORDS = 6000
"""Characters of a failed process's output that are shown and kept."""
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "PYTORCH_KERNEL_CACHE_PATH": "torch", "CUDA_CACHE_PATH": "cuda"}
"""Every place where a side keeps compiled kernels."""
OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|CUDA out of memory|out of memory: ")
PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Stand:
    """Where it is measured: a folder for everything, the model, the data by name, how many processes, and their environment besides."""

    work: Path
    model: Path
    data: Mapping[str, Path]
    num_processes: int = 2
    environment: Mapping[str, str] | None = None


def run_side(stand: Stand, job: Job, side: Side, layout: Layout) -> Run:
    """Run ``job`` once; never raises for what the processes do."""
    folder = Path(tempfile.mkdtemp(prefix=f"{job.name}-{side}-", dir=stand.work))
    marks = folder / "marks"
    marks.mkdir()
    program = {"ours": [str(HERE / "gpu_ours.py"), "sft"], "peer": peer_launcher(stand.num_processes)}[side]
    places = ["--model", str(stand.model), "--dataset", str(stand.data[job.data]), "--output_dir", str(folder / "out")]
    command = [sys.executable, *program, *job.flags(side, layout), *places]
    caches = {name: stand.work / "caches" / side / place for name, place in CACHES.items()}
    for place in caches.values():
        place.mkdir(parents=True, exist_ok=True)
    environment = {
        **{name: str(place) for name, place in caches.items()},
        "NPROC_PER_NODE": str(stand.num_processes),
        "BENCH_MARKS": str(marks),
        "BENCH_STEPS": str(job.steps),
        "BENCH_END": "saving" if job.saves else "training",
        **(stand.environment or {}),
    }
    log = folder / "output.log"
    launched = time.time()
    code = follow(command, environment, log, marks, job)
    seconds = time.time() - launched
    output = log.read_text(encoding="utf-8", errors="replace")
    ranks = read_marks(marks)
    outcome = name_outcome(code, output)
    try:
        figures = read_figures(ranks, launched, stand.num_processes)
    except (KeyError, IndexError, ValueError) as error:  # marks that a dying rank has left in part
        figures, outcome = Figures(), f"{outcome}; its marks cannot be read ({error})"
    kept = "" if outcome == "finished" and figures.steps else output[-LAST_WORDS:]
    run = Run(job, side, layout.name, command, environment, outcome, seconds, figures, ranks, read_report(folder), kept)
    shutil.rmtree(folder, ignore_errors=True)
    return run


def peer_launcher(num_processes: int) -> list[str]:
    """torchrun, as ms-swift's own command starts its processes."""
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(num_processes), "--master_port", str(find_free_port()), str(HERE / "peer_swift" / "sft.py")]


def follow(command: list[str], environment: Mapping[str, str], log: Path, marks: Path, job: Job) -> int | None:
    """The exit code of a command, or None where it ran past its deadline and was killed; says how far it is."""
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while (left := job.deadline_seconds - (time.monotonic() - began)) > 0:
                try:
                    return process.wait(timeout=min(PROGRESS_SECONDS, left))
                except subprocess.TimeoutExpired:
                    first = next(iter(read_marks(marks)), [])
                    last, steps = first[-1]["mark"] if first else "launched", len(select(first, "step"))
                    print(f"  {time.monotonic() - began:4.0f} s: {last}, {steps} of {job.steps} steps", flush=True)
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # ranks of both sides die with their launcher
                process.wait()


def name_outcome(code: int | None, output: str) -> str:
    """How a run ended; the peer's launcher ends with 1 whatever happened, so running out of memory is read from the output."""
    if code == 0:
        return "finished"
    if OUT_OF_MEMORY.search(output):
        return "out of memory"
    return "deadline" if code is None else "failed"


def read_report(folder: Path) -> dict[str, Any] | None:
    """Our report.json, where there is one."""
    found = list((folder / "out").glob("**/report.json"))
    report: dict[str, Any] | None = json.loads(found[0].read_bytes()) if found else None
    return report
