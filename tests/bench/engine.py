"""``make bench``: the engine against its peers on this machine; a table in the terminal, and rows in docs/benchmarks/engine.json.

``python engine.py import`` and ``python engine.py steps`` measure one part, and show it only.

The job is SmolLM2-135M-Instruct, LoRA of rank 8 on every linear layer, 8 rows of self-cognition a step, float32, no dropout. The peer is transformers + PEFT at the best of its settings (processes, threads,
rows per pass). A ratio above 1 means that ours is better.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from finetune_trainer.contract import (
    CheckpointsConfig,
    DataConfig,
    ModelConfig,
    OutputConfig,
    ParallelismConfig,
    RunConfig,
    RunContext,
    TrainingConfig,
    TuningConfig,
)

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "tests" / "bench"
RESULTS = ROOT / "docs" / "benchmarks" / "engine.json"
STEPS, WARM_UP = 10, 2
PEER_SETTINGS = ((2, 1, 1), (2, 1, 4), (1, 2, 4))
"""Processes, threads of each, rows per pass: its best ones on two cores, of all that make eight rows."""

sys.path.insert(0, str(ROOT / "examples"))
import smollm2  # noqa: E402 it lies beside the example that it prepares


def main() -> None:
    parts = {"import": import_rows, "steps": step_rows}
    chosen = sys.argv[1:] or list(parts)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(smollm2.prepare(), Path(folder))
        rows = [entry for part in chosen for entry in parts[part](config, Path(folder))]
    if not sys.argv[1:]:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    show(rows)


def make_config(model: Path, folder: Path) -> RunConfig:
    """The job; what is silent here is chosen by the engine."""
    return RunConfig(
        model=ModelConfig(source=str(model), torch_dtype="float32"),
        data=DataConfig(
            dataset=["swift/self-cognition", "mcore-finetune/general-knowledge"],
            system="You are a helpful assistant.",
            max_length=512,
            model_name=["Robot"],
            model_author=["the robot people"],
        ),
        tuning=TuningConfig(tuner_type="lora", lora_rank=8, lora_alpha=32, lora_dropout=0.0),
        parallelism=ParallelismConfig(tensor_model_parallel_size=1, pipeline_model_parallel_size=1),
        training=TrainingConfig(global_batch_size=8, train_iters=STEPS, lr=1e-3, recompute_granularity="none"),
        checkpoints=CheckpointsConfig(resume="never", save_steps=10_000),
        output=OutputConfig(formats=["peft"], verification="Files"),
        run=RunContext(output_dir=str(folder / "run")),
    )


def import_rows(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """Import against reading the bytes, and against transformers."""
    measured = json.loads(run([sys.executable, str(BENCH / "importing.py"), str(write(config, folder))]))
    seconds = measured["seconds"]
    size = f"{measured['bytes'] / 2**20:.0f} MiB"
    works = []
    for state in ("warm", "cold"):
        for peer, what in (
            ("read", "reading the bytes into fresh memory"),
            ("reread", "reading the bytes into memory in use"),
            ("transformers", "transformers"),
        ):
            works.append(row(f"import of {size}, {state} page cache, against {what}", "s", seconds[f"import {state}"], seconds[f"{peer} {state}"]))
    return works


def step_rows(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """Time per optimizer step and peak memory, ours and the peer's best, each the better of two runs taken in turn."""
    measured = {setting: run_peer(config, folder, setting) for setting in PEER_SETTINGS}
    best = min(measured, key=lambda setting: step_seconds(measured[setting]))
    ours = run_engine(config, folder)
    peers, engines = [measured[best], run_peer(config, folder, best)], [ours, run_engine(config, folder)]
    peer, engine = min(peers, key=step_seconds), min(engines, key=step_seconds)
    processes, threads, rows = best
    print(
        f"peer's settings (processes, threads, rows per pass), seconds per step: { {setting: round(step_seconds(result), 3) for setting, result in measured.items()} }"
    )
    print(f"last loss: ours {engine['steps'][-1]['loss']:.4f}, peer {peer['steps'][-1]['loss']:.4f}")
    against = f"transformers + PEFT ({processes} process{'es' * (processes > 1)}, {threads} thread{'s' * (threads > 1)}, {rows} rows per pass)"
    return [
        row(f"LoRA step of 8 rows on 2 processes, against {against}", "s", step_seconds(engine), step_seconds(peer)),
        row(f"peak memory of a rank in that job, against {against}", "GiB", max(engine["peakMemoryGib"]), max(peer["peakMemoryGib"])),
    ]


def run_engine(config: RunConfig, folder: Path) -> dict[str, Any]:
    """One run by our launcher, on two processes."""
    config = config.model_copy(update={"run": RunContext(output_dir=tempfile.mkdtemp(dir=folder))})
    run([sys.executable, "-m", "finetune_trainer.cli", "launch", str(write(config, folder))], NPROC_PER_NODE="2", CUDA_VISIBLE_DEVICES="")
    report = json.loads(Path(config.run.output_dir, "report.json").read_text(encoding="utf-8"))
    return {"steps": report["curve"], "peakMemoryGib": report["peakMemoryGib"]}


def run_peer(config: RunConfig, folder: Path, setting: tuple[int, int, int]) -> dict[str, Any]:
    """One run of the peer."""
    processes, threads, rows = setting
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    text = run([*launcher, str(BENCH / "peer.py"), str(write(config, folder)), str(threads), str(rows)], OMP_NUM_THREADS=str(threads), CUDA_VISIBLE_DEVICES="")
    result: dict[str, Any] = json.loads(text.splitlines()[-1])
    return result


def step_seconds(result: dict[str, Any]) -> float:
    """Median over the steps after the warm-up."""
    return median(step["seconds"] for step in result["steps"][WARM_UP:])


def write(config: RunConfig, folder: Path) -> Path:
    path = folder / "run.json"
    path.write_text(config.dump(), encoding="utf-8")
    return path


def run(command: list[str], **environment: str) -> str:
    """The standard output of a command; its error output is shown when it fails."""
    print("$ " + " ".join(Path(part).name if part.startswith("/") else part for part in command), flush=True)
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def row(work: str, unit: str, ours: float, peer: float) -> dict[str, Any]:
    """One row; less is better in every unit here."""
    return {
        "work": work,
        "metric": "peak resident memory" if unit == "GiB" else "median time",
        "unit": unit,
        "ours": round(ours, 4),
        "peer": round(peer, 4),
        "ratio": round(peer / ours, 3),
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def machine() -> str:
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{models[0] if models else 'CPU'}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{rows[0]['machine']}; a ratio above 1 means that ours is better")
    for column in ("work", "unit", "ours", "peer", "ratio"):
        table.add_column(column, justify="left" if column in ("work", "unit") else "right")
    for entry in rows:
        table.add_row(*(str(entry[column]) for column in ("work", "unit", "ours", "peer", "ratio")))
    Console().print(table)


if __name__ == "__main__":
    main()
