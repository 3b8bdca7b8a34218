"""Rows of docs/benchmarks/operator.json: our figures beside the best peer's and the targets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Peer:
    """The best figure of any peer as it is shipped, at any setting of its limits; measured on 2 cores, Kubernetes 1.35.4, one run each on 2026-11-21."""

    figure: float
    name: str


TRAINING_OPERATOR = "training-operator v1.9.3 (PyTorchJob), client limits and threads raised"
JOBSET = "JobSet v0.11.0, its limits and the controller manager's raised"
JOBSET_DEFAULT = "JobSet v0.11.0 at its defaults"

PEERS: dict[tuple[str, str], Peer] = {
    # Its own 30.81 s over 9.41 s of a bare Go client that makes Service, ConfigMap and 2 pods. JobSet raised: 50.42 s, at its defaults 179.23 s.
    ("burst-1000", "last_over_floor"): Peer(3.27, TRAINING_OPERATOR),
    ("burst-1000", "create_to_pods_p50_seconds"): Peer(11.65, TRAINING_OPERATOR),
    ("burst-1000", "create_to_pods_p99_seconds"): Peer(19.94, TRAINING_OPERATOR),
    # 2 Services, 2 pods, 1 status. JobSet writes 4 itself (Job, Service, 2 statuses) and has the controller manager write 3 more (2 pods, 1 status).
    ("burst-1000", "own_writes_per_job"): Peer(5, TRAINING_OPERATOR),
    ("burst-1000", "status_writes_per_job"): Peer(1, TRAINING_OPERATOR),
    ("burst-1000", "events_per_job"): Peer(2, JOBSET),
    ("burst-1000", "api_server_writes_per_job"): Peer(10, TRAINING_OPERATOR),
    ("burst-1000", "conflicts"): Peer(0, JOBSET),
    # JobSet without its webhooks: 7.6, and the controller manager's Job controller besides.
    ("burst-1000", "cpu_ms_per_job"): Peer(13.4, TRAINING_OPERATOR),
    ("burst-1000", "api_server_cpu_ms_per_job"): Peer(48.6, TRAINING_OPERATOR),
    ("burst-1000", "peak_rss_mb"): Peer(149, JOBSET_DEFAULT),
    # 2.36 s (the better of two bursts) over 0.93 s.
    ("burst-100", "last_over_floor"): Peer(2.54, TRAINING_OPERATOR),
    ("burst-100", "create_to_pods_p50_seconds"): Peer(1.12, TRAINING_OPERATOR),
    ("burst-100", "create_to_pods_p99_seconds"): Peer(1.36, TRAINING_OPERATOR),
    ("burst-100", "own_writes_per_job"): Peer(5, TRAINING_OPERATOR),
    ("burst-100", "status_writes_per_job"): Peer(1, TRAINING_OPERATOR),
    ("burst-100", "events_per_job"): Peer(2, JOBSET),
    ("burst-100", "api_server_writes_per_job"): Peer(10, TRAINING_OPERATOR),
    ("burst-100", "conflicts"): Peer(0, JOBSET),
    ("burst-100", "cpu_ms_per_job"): Peer(10.0, TRAINING_OPERATOR),
    ("burst-100", "api_server_cpu_ms_per_job"): Peer(50.3, TRAINING_OPERATOR),
    ("burst-100", "empty_rss_mb"): Peer(46, TRAINING_OPERATOR),
    ("burst-100", "peak_rss_mb"): Peer(60, JOBSET_DEFAULT),
    ("idle-minute", "writes"): Peer(0, JOBSET),
    ("idle-minute", "cpu_seconds"): Peer(0.03, JOBSET_DEFAULT),
    ("cold-start", "ready_seconds"): Peer(0.9, JOBSET),
    ("cold-start", "cpu_seconds"): Peer(1.3, JOBSET),
    ("cold-start", "peak_rss_mb"): Peer(141, JOBSET),
    ("cold-start", "writes"): Peer(0, JOBSET),
}

TARGETS: dict[tuple[str, str], float] = {
    ("burst-1000", "last_over_floor"): 1.8,
    ("burst-1000", "own_writes_per_job"): 4,
    ("burst-1000", "status_writes_per_job"): 1,
    ("burst-1000", "conflicts"): 0,
    ("burst-1000", "cpu_ms_per_job"): 6,
    ("burst-1000", "peak_rss_mb"): 120,
    ("idle-minute", "writes"): 0,
}
"""At most; not asserted, only shown."""


TABLE_COLUMNS = 120


def row(work: str, metric: str, unit: str, ours: float) -> dict[str, Any]:
    """One row; less is better in every unit here. No ratio can be given where ours is 0 and the peer's is not."""
    peer = PEERS.get((work, metric))
    return {
        "work": work,
        "metric": metric,
        "unit": unit,
        "ours": round(ours, 3),
        "peer": peer.figure if peer else None,
        "ratio": ratio(peer.figure, ours) if peer else None,
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def ratio(peer: float, ours: float) -> float | None:
    """Above 1 where ours is better."""
    if ours == 0:
        return 1.0 if peer == 0 else None
    return round(peer / ours, 3)


def machine() -> str:
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{models[0] if models else 'CPU'}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


def show(rows: list[dict[str, Any]], notes: list[str]) -> None:
    """A table in the terminal, with the targets."""
    table = Table(title=f"{rows[0]['machine']}; a ratio above 1 means that ours is better")
    columns = ("work", "metric", "unit", "ours", "peer", "ratio", "target")
    for column in columns:
        table.add_column(column, justify="left" if column in ("work", "metric", "unit") else "right")
    for entry in rows:
        table.add_row(*("" if entry[column] is None else str(entry[column]) for column in columns[:-1]), verdict(entry))
    console = Console(width=max(Console().width, TABLE_COLUMNS))
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


def verdict(entry: dict[str, Any]) -> str:
    """`≤ 6 met`, `≤ 6 MISSED`, or nothing."""
    target = TARGETS.get((entry["work"], entry["metric"]))
    if target is None:
        return ""
    return f"≤ {target:g} {'met' if entry['ours'] <= target else 'MISSED'}"
