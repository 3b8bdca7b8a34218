"""From the marks of a run to figures, and from the figures of both sides to rows of docs/benchmarks/gpu.json."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from gpu_works import Job, Side, Work, model_flops

Marks = list[dict[str, Any]]
"""Of one rank, in the order of time."""
HIGHER_IS_BETTER = {"tokens_per_second_per_gpu"}


@dataclass(frozen=True)
class Step:
    """One optimizer step of the whole gang; its seconds reach from the end of the step before to its own end."""

    seconds: float
    tokens: int
    loss: float | None


@dataclass(frozen=True)
class Figures:
    """What the marks of one run say. Nothing of a run that did not come to its last step."""

    first_step_seconds: float | None = None
    """From the launch to the end of the first step."""
    steps: tuple[Step, ...] = ()
    """All but the first, which has no step before it."""
    peak_gib: float | None = None
    peak_reserved_gib: float | None = None
    phases: Mapping[str, float] | None = None
    """Seconds of the slowest rank by phase: load, adapter, export, checkpoint."""


@dataclass(frozen=True)
class Run:
    """One start of one side's processes."""

    job: Job
    side: Side
    layout: str
    command: list[str]
    environment: dict[str, str]
    outcome: str
    """``finished``, ``out of memory``, ``deadline`` or ``failed``."""
    seconds: float
    figures: Figures
    marks: list[Marks]
    report: dict[str, Any] | None
    output: str

    def counted(self) -> tuple[Step, ...]:
        """The steps after the warm-up; none of a job without one, whose steps nobody counts."""
        return self.figures.steps[self.job.warm_up - 1 :] if self.job.warm_up else ()

    def tokens_per_second(self) -> float | None:
        """Of all GPUs, over the steps that count."""
        steps = self.counted()
        return sum(step.tokens for step in steps) / sum(step.seconds for step in steps) if steps else None

    def step_seconds(self) -> float | None:
        """The median of the steps that count."""
        steps = self.counted()
        return median(step.seconds for step in steps) if steps else None

    def utilization(self, ceiling: float, gpus: int) -> float | None:
        """The FLOPs that its steps need over what the GPUs could have done in their time, ``ceiling`` 10^12 a second each (MFU)."""
        steps = self.counted()
        if not steps or not ceiling:
            return None
        needed = sum(model_flops(step.tokens, full=self.job.is_full) for step in steps)
        return needed / (sum(step.seconds for step in steps) * gpus * ceiling * 1e12)

    def raw(self) -> dict[str, Any]:
        """Everything, for the record."""
        return {
            **{name: getattr(self, name) for name in ("side", "layout", "outcome", "environment", "output", "report")},
            "job": self.job.name,
            "warm_up_steps": self.job.warm_up,
            "command": shlex.join(self.command),
            "wall_seconds": round(self.seconds, 2),
            "figures": asdict(self.figures),
            "marks": self.marks,
        }


def read_marks(folder: Path) -> list[Marks]:
    """The marks of every rank that has left some; a line that a killed rank has not finished is left out."""
    return [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")] for path in sorted(folder.glob("rank-*.jsonl"))]


def read_figures(ranks: Sequence[Marks], launched: float, num_ranks: int) -> Figures:
    """The figures of a run that was launched at the Unix time ``launched``."""
    if len(ranks) < num_ranks or any(not select(marks, "trained") for marks in ranks):
        return Figures()
    times = [mark["time"] for mark in select(ranks[0], "step")]
    copies = {select(marks, "step")[0]["data_rank"]: marks for marks in reversed(ranks)}.values()
    tokens = [sum(each) for each in zip(*([mark["tokens"] for mark in select(marks, "step")] for marks in copies), strict=True)]
    losses = read_losses(list(copies))
    steps = [Step(times[index] - times[index - 1], tokens[index], losses[index]) for index in range(1, len(times))]
    peaks = [select(marks, "trained")[0] for marks in ranks]
    phases = {mark["mark"] for marks in ranks for mark in marks if "seconds" in mark and mark["mark"] != "step"}
    return Figures(
        first_step_seconds=times[0] - launched,
        steps=tuple(steps),
        peak_gib=max(each["allocated_gib"] for each in peaks),
        peak_reserved_gib=max((each["reserved_gib"] for each in peaks if "reserved_gib" in each), default=None),
        phases={phase: max(mark["seconds"] for marks in ranks for mark in select(marks, phase)) for phase in sorted(phases)},
    )


def read_losses(copies: Sequence[Marks]) -> list[float | None]:
    """The mean loss of each step: ours is marked as such, the peer's as sum and labelled tokens of each data-parallel copy."""
    if not select(copies[0], "losses"):
        return [mark.get("loss") for mark in select(copies[0], "step")]
    values = [select(marks, "losses")[0]["values"] for marks in copies]
    return [sum(loss for loss, _ in step) / max(1.0, sum(labelled for _, labelled in step)) for step in zip(*values, strict=True)]


def select(marks: Marks, name: str) -> Marks:
    """The marks of a name."""
    return [mark for mark in marks if mark["mark"] == name]


def choose_best(runs: Sequence[Run]) -> Run | None:
    """The run that counts among those of a job and side: the most tokens a second; None where none came to its last step."""
    able = [run for run in runs if run.figures.first_step_seconds is not None]
    return max(able, key=lambda run: run.tokens_per_second() or 0.0) if able else None


def figures_of(work: Work, runs: Sequence[Run], side: Side, gpus: int) -> dict[tuple[str, str], float | None]:
    """By metric and unit, the figures of one side for one work."""
    found = [choose_best([run for run in runs if run.side == side and run.job.name == job]) for job in work.jobs]
    if work.reads == "start":
        values = [run.figures.first_step_seconds if run else None for run in found]
        return dict(zip((("first_step_cold_seconds", "s"), ("first_step_warm_seconds", "s")), values, strict=True))
    (run,) = found
    if work.reads == "mark":
        return {("seconds", "s"): (run.figures.phases or {}).get(work.mark) if run else None}
    rate = run.tokens_per_second() if run else None
    return {
        ("tokens_per_second_per_gpu", "tokens/s"): rate / gpus if rate else None,
        ("seconds", "s"): run.step_seconds() if run else None,
        ("peak_gib", "GiB"): run.figures.peak_gib if run else None,
    }


def make_rows(work: Work, runs: Sequence[Run], gpus: int, machine: str, date: str) -> list[dict[str, Any]]:
    """The rows of one work; a figure that is missing is None."""
    ours, peer = (figures_of(work, runs, side, gpus) for side in ("ours", "peer"))
    return [
        {
            "work": work.name,
            "metric": metric,
            "unit": unit,
            "ours": rounded(ours[metric, unit]),
            "peer": rounded(peer[metric, unit]),
            "ratio": ratio(metric, ours[metric, unit], peer[metric, unit]),
            "machine": machine,
            "date": date,
        }
        for metric, unit in ours
    ]


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4 if value < 10 else 1)


def ratio(metric: str, ours: float | None, peer: float | None) -> float | None:
    """Above 1 where ours is better; None where a side is missing."""
    if not ours or not peer:
        return None
    return round(ours / peer if metric in HIGHER_IS_BETTER else peer / ours, 3)


def merge_rows(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """``old`` with the rows of the same work, metric and machine replaced, each in its place, and the others after them."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["work"], row["metric"], row["machine"]

    fresh = {key(row): row for row in new}
    return [fresh.pop(key(row), row) for row in old] + list(fresh.values())


def describe_run(run: Run, ceiling: float, gpus: int) -> str:
    """One line of a run."""
    figures, rate = run.figures, run.tokens_per_second()
    if figures.first_step_seconds is None:
        return f"{run.job.name}, {run.side}, {run.layout}: {run.outcome} after {run.seconds:.0f} s"
    share = run.utilization(ceiling, gpus)
    parts = [
        f"{run.step_seconds():.3f} s/it, {rate / gpus:,.0f} tokens/s/GPU" if rate else "",
        f"MFU {share:.1%}" if share else "",
        f"peak {figures.peak_gib:.1f} GiB",
        f"first step after {figures.first_step_seconds:.1f} s",
        *(f"{phase} {seconds:.2f} s" for phase, seconds in (figures.phases or {}).items()),
        f"{mean(step.tokens for step in figures.steps):,.0f} tokens/it" if figures.steps else "",
        "" if run.outcome == "finished" else f"but then: {run.outcome}",
    ]
    return f"{run.job.name}, {run.side}, {run.layout}: " + ", ".join(part for part in parts if part)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for reading."""
    columns = ("work", "metric", "unit", "ours", "peer", "ratio")
    lines = [columns, *(tuple("-" if row[name] is None else str(row[name]) for name in columns) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "\n".join(
        "  ".join(text.ljust(width) if index < 3 else text.rjust(width) for index, (text, width) in enumerate(zip(line, widths, strict=True))) for line in lines
    )
