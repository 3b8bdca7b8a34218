"""``make bench-gpu WORK=<name>[,<name>...]``: our engine and ms-swift at one work, one after the other on two GPUs of this machine.

Prints a table and merges its rows into docs/benchmarks/gpu.json; ``--record FILE`` keeps everything that was measured. GPU_STACK is the folder of the peer's tokenizer and data; the
random model of the shape of Qwen2.5-7B-Instruct is made once and kept in BENCH_WORK. Kernel caches are empty when the command begins, and each side keeps its own until it ends; the
files of packages and model are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_processes import Stand, run_side
from gpu_results import Run, describe_run, format_table, make_rows, merge_rows
from gpu_works import CHOSEN, PEER_LAYOUTS, Job, Layout, Side, Work, find_works, plan_jobs

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "benchmarks" / "gpu.json"
IMPORTS = ("from swift.megatron import megatron_sft_main", "import finetune_trainer.train, finetune_trainer.convert, finetune_trainer.verify")


@dataclass
class Session:
    """One call of the command."""

    works: Sequence[Work]
    stand: Stand
    machine: dict[str, Any]
    results: Path
    record: Path | None
    runs: list[Run] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def ceiling(self) -> float:
        """Of the slowest of the GPUs that are used, 10^12 floating-point operations a second; 0 where none was measured."""
        return min(self.machine["gemm_tflops"][: self.stand.num_processes], default=0.0)

    def measure(self, job: Job, side: Side, layout: Layout) -> None:
        """One run, told and recorded."""
        say(f"[{time.monotonic() - self.began:.0f} s] {job.name}, {side}, {layout.name}: {job.steps} steps")
        run = run_side(self.stand, job, side, layout)
        self.runs.append(run)
        if run.output:
            say(f"--- the last that it said ---\n{run.output}\n---")
        say("  " + describe_run(run, self.ceiling, self.stand.num_processes))
        self.write_record()

    def rows(self) -> list[dict[str, Any]]:
        """Of all works whose jobs have all been run."""
        done = {run.job.name for run in self.runs}
        works = [work for work in self.works if done.issuperset(work.jobs)]
        return [row for work in works for row in make_rows(work, self.runs, self.stand.num_processes, self.machine["name"], today())]

    def write_record(self) -> None:
        """Anew after every run, so that a session that is killed leaves what it has."""
        if self.record is not None:
            gpus, ceiling = self.stand.num_processes, self.ceiling
            runs = [{**run.raw(), "summary": describe_run(run, ceiling, gpus), "mfu": run.utilization(ceiling, gpus)} for run in self.runs]
            content = {
                "date": today(),
                "command": " ".join(Path(part).name if part.startswith("/") else part for part in sys.argv),
                "machine": self.machine,
                "rows": self.rows(),
                "runs": runs,
            }
            write(self.record, json.loads(without_places(json.dumps(content), self.stand.work)))

    def write_rows(self) -> None:
        """Merge what is known into the results."""
        old = json.loads(self.results.read_text(encoding="utf-8")) if self.results.is_file() else []
        write(self.results, merge_rows(old, self.rows()))


def main() -> None:
    """The command line; exit code 1 where a run of ours did not finish."""
    options = read_options()
    work = Path(os.environ.get("BENCH_WORK") or Path(tempfile.gettempdir()) / "bench-gpu")
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "caches", ignore_errors=True)
    stand = tiny_stand(work) if options.tiny else gpu_stand(work)
    machine = json.loads(run([sys.executable, str(ROOT / "tests/bench/gpu_machine.py")]).splitlines()[-1])
    say(f"{machine['name']}; bfloat16 GEMM ceiling {machine['gemm_tflops']} TFLOP/s")
    session = Session(options.works, stand, machine, options.results, options.record)
    for job in plan_jobs(options.works):
        for side in options.sides:
            for layout in wanted(job.layouts(side), options):
                session.measure(adapt(job, options), side, choose(layout, options))
        session.write_rows()
        session.write_record()
    say("\n" + format_table(session.rows()))
    sys.exit(any(each.side == "ours" and each.outcome != "finished" for each in session.runs))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("works", help="names with commas")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that the rows are merged into")
    parser.add_argument("--record", type=Path, help="write everything that was measured to this JSON file")
    parser.add_argument("--sides", default="ours,peer", help="measure these only")
    parser.add_argument("--ours-layout", default="", help="flags for our engine in the best works, in place of its own choice")
    parser.add_argument(
        "--peer-layout", default="", help="the name of the only layout of the peer's to measure in the best works, where the others were just measured"
    )
    parser.add_argument("--peer-attention", default="auto", help="the peer's --attention_backend in the best works")
    parser.add_argument("--tiny", action="store_true", help="try the harness: our side on the CPU, with a tiny model, figures of no worth")
    options = parser.parse_args()
    try:
        options.works = find_works(options.works)
    except ValueError as error:
        parser.error(str(error))
    options.sides = ["ours"] if options.tiny else options.sides.split(",")
    if options.sides != ["ours", "peer"] and options.results == RESULTS:
        parser.error("one side alone makes no ratio: give --results FILE, so that docs/benchmarks stays as it is")
    return options


def adapt(job: Job, options: argparse.Namespace) -> Job:
    """Fewer steps where only the harness is tried."""
    return replace(job, steps=min(job.steps, 4), warm_up=min(job.warm_up, 1)) if options.tiny else job


def wanted(layouts: Sequence[Layout], options: argparse.Namespace) -> list[Layout]:
    """All of them, or of the peer's in the best works the one that the command line names."""
    return [layout for layout in layouts if layout not in PEER_LAYOUTS or options.peer_layout in ("", layout.name)]


def choose(layout: Layout, options: argparse.Namespace) -> Layout:
    """A layout with what the command line says about it."""
    if layout is CHOSEN and options.ours_layout:
        return Layout(options.ours_layout, options.ours_layout)
    if layout in PEER_LAYOUTS:
        return replace(layout, flags=f"{layout.flags} --attention_backend {options.peer_attention}")
    return layout


def gpu_stand(work: Path) -> Stand:
    """The model of 7B in ``work``, made where it is not there yet while the packages of both sides come into the page cache."""
    if "GPU_STACK" not in os.environ:
        raise SystemExit("GPU_STACK is not set; it must name the folder of ms-swift's tokenizer and data")
    stack, model = Path(os.environ["GPU_STACK"]), work / "Qwen2.5-7B-Instruct"
    if not model.is_dir():
        say("making the model of 7B")
        partial = work / "partial-model"
        shutil.rmtree(partial, ignore_errors=True)
        readers = [subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for text in IMPORTS]
        run([sys.executable, str(ROOT / "tests/gpu/reference_model.py"), str(partial), str(stack / "tok")])
        for reader in readers:
            reader.wait()
        partial.rename(model)
    return Stand(work, model, {name: stack / f"{name}.jsonl" for name in ("long2048", "mixed1500")})


def tiny_stand(work: Path) -> Stand:
    """A model of some thousand weights, two processes on the CPU."""
    sys.path.append(str(ROOT / "tests"))
    from factories import make_rows as make_data
    from factories import make_tiny_model

    model = work / "tiny-model"
    if not model.is_dir():
        make_tiny_model("qwen2", model)
    rows = make_data(work, 64)
    return Stand(work, model, {"long2048": rows, "mixed1500": rows}, environment={"CUDA_VISIBLE_DEVICES": ""})


def without_places(text: str, work: Path) -> str:
    """``text`` with the folders of this machine by the names of their variables."""
    places = {sys.executable: "python", str(work): "$BENCH_WORK", os.environ.get("GPU_STACK", ""): "$GPU_STACK", f"{ROOT}/": ""}
    for place, name in places.items():
        text = text.replace(place, name) if place else text
    return text


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def run(command: list[str]) -> str:
    """The output of a command of the harness's own; what it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
