"""The operator's Prometheus metrics, named as controller-runtime names them where it has the same ones. Jobs are counted when they are asked for."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

from prometheus_client import Counter, Gauge, Histogram, Info
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector
from pydantic.alias_generators import to_camel

REQUESTS = Counter("rest_client_requests", "Requests to the API server, watches left out.", ["method", "code"])
REQUEST_SECONDS = Histogram("rest_client_request_duration_seconds", "Time of a request, waiting for its turn left out.", ["verb"])
RECONCILES = Counter("controller_runtime_reconcile", "Decisions about a job.", ["result"])
RECONCILE_SECONDS = Histogram("controller_runtime_reconcile_time_seconds", "Time of a decision and of carrying it out.")
EVENTS_DROPPED = Counter("finetune_events_dropped", "Events that were not told because too many waited.")
POLLS = Counter("finetune_progress_polls", "Questions to a trainer's /progress.", ["result"])
WATCH_EVENTS = Counter("finetune_watch_events", "What watches have told.", ["kind"])
JOBS_FINISHED = Counter("finetune_jobs_finished", "Jobs that this replica saw end.", ["namespace", "result", "reason"])
JOB_RESTARTS = Counter("finetune_job_restarts", "Gangs that this replica started anew.", ["namespace", "reason"])
LEADER = Gauge("finetune_operator_leader", "1 while this replica acts.")
BUILD = Info("finetune_operator_build", "Version of the operator.")
BUILD.info({"version": version("mcore-finetune")})


@cache
def requests(method: str, status: int) -> Counter:
    """Requests of a method that were answered so. Remembered: to find a metric by its labels takes longer than to count."""
    return REQUESTS.labels(method, str(status))


@cache
def request_seconds(method: str) -> Histogram:
    """Times of a method's requests, of those that failed too."""
    return REQUEST_SECONDS.labels(method)


@cache
def reconciles(result: str) -> Counter:
    """Decisions that ended so."""
    return RECONCILES.labels(result)


@cache
def watch_events(kind: str) -> Counter:
    """What watches have told of this kind."""
    return WATCH_EVENTS.labels(kind)


@dataclass(frozen=True)
class JobSample:
    """One job, as metrics show it."""

    namespace: str
    name: str
    phase: str
    progress: Mapping[str, Any] | None
    """`status.progress` of a job that has not ended."""


class JobCollector(Collector):
    """Jobs by phase, and the progress of those that run: read from the store at each scrape, so that nothing is missed or left behind."""

    def __init__(self, jobs: Callable[[], Iterable[JobSample]], depth: Callable[[], int], oldest_seconds: Callable[[], float]) -> None:
        self.jobs = jobs
        self.depth = depth
        self.oldest_seconds = oldest_seconds
        REGISTRY.register(self)

    def collect(self) -> Iterator[Metric]:
        """Called by Prometheus' client at each scrape."""
        jobs = list(self.jobs())
        yield GaugeMetricFamily("workqueue_depth", "Jobs that wait for a decision or are being decided about.", value=self.depth())
        yield GaugeMetricFamily("workqueue_unfinished_work_seconds", "How long the oldest of them has waited.", value=self.oldest_seconds())
        yield _by_phase(jobs)
        yield from _progress(jobs)


def _by_phase(jobs: list[JobSample]) -> Metric:
    family = GaugeMetricFamily("finetune_jobs", "Jobs by phase.", labels=["namespace", "phase"])
    for (namespace, phase), count in sorted(Tally((job.namespace, job.phase) for job in jobs).items()):
        family.add_metric([namespace, phase], count)
    return family


_PROGRESS = {
    "step": "Optimizer steps done.",
    "total_steps": "Optimizer steps of the whole run.",
    "loss": "Training loss.",
    "tokens_per_second": "Over all processes, padding not counted.",
    "eta_seconds": "Time left in training.",
}


def _progress(jobs: list[JobSample]) -> Iterator[Metric]:
    for field, text in _PROGRESS.items():
        family = GaugeMetricFamily(f"finetune_job_{field}", text, labels=["namespace", "name"])
        for job in jobs:
            value = (job.progress or {}).get(to_camel(field))
            if value is not None:
                family.add_metric([job.namespace, job.name], value)
        yield family
