"""``make bench-operator``: bursts of jobs against a real API server and the bare floor on this machine; a table, and rows in docs/benchmarks/operator.json.

One run: etcd, API server and controller manager at its defaults, no nodes (pods only have to be made). First the floor (a bare client makes the operator's
objects, 8 in flight), then the operator: bursts of 100 and 1,000 two-node jobs, an idle minute, a cold start; then the floor again. About 6 minutes. A ratio
above 1 means that ours is better. Every process shares the machine's cores: compare ratios to the floor, CPU and memory, never seconds of two machines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "kube"))

import operator_results as results  # noqa: E402 they find tests/kube through the line above
from operator_access import Access, Write, come_to_rest, of_resource, writes  # noqa: E402
from operator_load import NODES, Floor, floor, submit_jobs  # noqa: E402
from operator_processes import NAMESPACE, Memory, OperatorProcess, busy_seconds, cpu_seconds, memory, own_seconds  # noqa: E402

from finetune_operator import names  # noqa: E402
from kube_api import START_SECONDS, ApiServer, start_api_server  # noqa: E402
from kube_processes import until  # noqa: E402

CRD = ROOT / "crds" / f"{names.GROUP}_{names.PLURAL}.yaml"
RESULTS = ROOT / "docs" / "benchmarks"
FULL = [100, 1000]
WARM_UP_JOBS = 60
IDLE_SECONDS = 60.0
LONGEST_BURST_SECONDS = 300.0
DAEMONS = ("operator", "kube-apiserver", "etcd", "kube-controller-manager")
BUSY_CORES = 0.3
"""Foreign work above which a run's seconds say little."""


@dataclass(frozen=True)
class Snapshot:
    """All counters at one moment."""

    time: float
    cpu: dict[str, float]
    busy: float
    requests: Counter[tuple[str, str]]
    writes: Counter[Write]
    memory: dict[str, Memory]

    @classmethod
    def take(cls, api: ApiServer, operator: OperatorProcess) -> Snapshot:
        """Now; CPU first, because reading the others costs some."""
        pids = {name: pid for name in DAEMONS if (pid := api.processes.pid(name)) is not None}
        cpu = {name: cpu_seconds(pid) for name, pid in pids.items()} | {"client": own_seconds()}
        usage = {name: memory(pid) for name, pid in pids.items()}
        return cls(time.monotonic(), cpu, busy_seconds(), operator.requests(), writes(api), usage)

    def cpu_since(self, before: Snapshot) -> dict[str, float]:
        return {name: round(self.cpu[name] - before.cpu[name], 2) for name in self.cpu}


@dataclass(frozen=True)
class Burst:
    """What one burst gave."""

    jobs: int
    submit_seconds: float
    last_seconds: float
    """From the first request to the second pod of the last job."""
    create_to_pods: list[float]
    """Seconds from a job's appearance to that of its second pod, by length."""
    settled_seconds: float
    """Until the controller manager has written its Endpoints too."""
    cpu_in_burst: dict[str, float]
    cpu_settled: dict[str, float]
    writes: dict[str, int]
    """Of everybody, until settled."""
    requests: dict[str, int]
    """Of the operator, by its own count."""
    counted: dict[str, float]
    memory_before: dict[str, Memory]
    memory: dict[str, Memory]
    foreign_cores: float


def main() -> None:
    arguments = parse(sys.argv[1:])
    if not CRD.exists():
        raise SystemExit(f"{CRD.relative_to(ROOT)} is not there; run make generate")
    with tempfile.TemporaryDirectory() as folder, start_api_server(Path(folder)) as api:
        figures = measure(api, arguments.jobs, arguments.idle_seconds)
    rows = [
        *(row for burst in figures["bursts"] for row in burst_rows(burst, figures["floors"])),
        *idle_rows(figures["idle"]),
        *cold_rows(figures["cold_start"]),
    ]
    if arguments.output is not None:
        (arguments.output / "raw").mkdir(parents=True, exist_ok=True)
        save(arguments.output / "operator.json", rows)
        save(arguments.output / "raw" / "operator.json", raw(figures))
    results.show(rows, notes(figures, arguments.output))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the operator against a bare client.")
    parser.add_argument("--jobs", type=int, nargs="+", default=FULL, help="sizes of the bursts (default: 100 1000)")
    parser.add_argument("--idle-seconds", type=float, default=IDLE_SECONDS, help="length of the idle time (default: 60)")
    parser.add_argument("--output", type=Path, help="folder of results (default: docs/benchmarks for a run with all defaults, else none)")
    parsed = parser.parse_args(arguments)
    if parsed.output is None and parsed.jobs == FULL and parsed.idle_seconds == IDLE_SECONDS:
        parsed.output = RESULTS
    return parsed


# The run


def measure(api: ApiServer, sizes: list[int], idle_seconds: float) -> dict[str, Any]:
    """Everything, in one run; the operator rests while the floor is measured."""
    access = Access.of(api)
    install(api)
    floor(api, access, WARM_UP_JOBS, "warm-up")
    floors = floors_of(api, access, sizes, "before")
    operator = OperatorProcess(api)
    operator.start()
    operator.wait_ready()
    come_to_rest(api)
    bursts = [burst(api, access, operator, jobs) for jobs in sizes]
    idle = be_idle(api, operator, idle_seconds)
    cold = start_cold(api, operator)
    operator.stop()
    floors += floors_of(api, access, sizes, "after")
    return {"floors": floors, "bursts": bursts, "idle": idle, "cold_start": cold}


def install(api: ApiServer) -> None:
    say("API server ready; installing the CRD")
    api.kubectl("apply", "--server-side", "-f", CRD)
    until(lambda: api.find(f"/apis/{names.API_VERSION}/{names.PLURAL}"), START_SECONDS, f"API {names.API_VERSION}")
    api.create_namespace(NAMESPACE)


def floors_of(api: ApiServer, access: Access, sizes: list[int], when: str) -> list[Floor]:
    found = []
    for jobs in sizes:
        come_to_rest(api)
        found.append(floor(api, access, jobs, f"floor-{when}-{jobs}"))
        say(f"floor of {jobs} jobs {when}: {found[-1].last_seconds:.2f} s")
    return found


def burst(api: ApiServer, access: Access, operator: OperatorProcess, jobs: int) -> Burst:
    """One burst in a namespace of its own."""
    namespace = api.create_namespace(f"burst-{jobs}")
    come_to_rest(api)
    watcher = start_watcher(access, namespace, jobs)
    before = Snapshot.take(api, operator)
    begun, submitted = submit_jobs(access, jobs, namespace)
    seen = json.loads(watcher.communicate()[0])
    last = Snapshot.take(api, operator)
    complete = {name: times[NODES - 1] for name, times in seen["pods"].items() if len(times) >= NODES}
    if len(complete) < jobs:
        raise SystemExit(f"{len(complete)} of {jobs} jobs got their pods; the operator's log ends with:\n{api.processes.log_tail('operator')}")
    settled_at = come_to_rest(api)
    settled = Snapshot.take(api, operator)
    made, requests = settled.writes - before.writes, settled.requests - before.requests
    cpu_in_burst = last.cpu_since(before)
    say(f"burst of {jobs} jobs: {max(complete.values()) - begun:.2f} s")
    return Burst(
        jobs=jobs,
        submit_seconds=submitted - begun,
        last_seconds=max(complete.values()) - begun,
        create_to_pods=sorted(complete[name] - seen["jobs"][name] for name in complete),
        settled_seconds=settled_at - begun,
        cpu_in_burst=cpu_in_burst | {"watcher": round(seen["cpu"], 2)},
        cpu_settled=settled.cpu_since(before),
        writes={" ".join(write): count for write, count in sorted(made.items())},
        requests={" ".join(request): count for request, count in sorted(requests.items())},
        counted=count(made, requests, jobs),
        memory_before=before.memory,
        memory=settled.memory,
        foreign_cores=round((last.busy - before.busy - sum(cpu_in_burst.values()) - seen["cpu"]) / (last.time - before.time), 2),
    )


def start_watcher(access: Access, namespace: str, jobs: int) -> subprocess.Popen[str]:
    wanted = {"access": asdict(access), "namespace": namespace, "jobs": jobs, "pods": NODES, "seconds": LONGEST_BURST_SECONDS}
    watcher = subprocess.Popen([sys.executable, str(Path(__file__).with_name("operator_watch.py")), json.dumps(wanted)], stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    if watcher.stdout.readline() != "watching\n":
        raise SystemExit("the watcher did not start")
    time.sleep(1)  # its watches are served by then
    return watcher


def count(made: Counter[Write], requests: Counter[tuple[str, str]], jobs: int) -> dict[str, float]:
    """Per job, from the API server's count: only the operator writes Services, pods and statuses here; the client one job, the controller manager Endpoints.

    What else the operator has posted, by its own count, are Events; the controller manager tells some too.
    """
    events, leases = of_resource(made, "events"), of_resource(made, "leases")
    children = of_resource(made, "services", "pods")
    posts = sum(number for (method, _), number in requests.items() if method == "POST")
    status = sum(number for (_, resource, _), number in made.items() if resource == f"{names.PLURAL}/status")
    return {
        "own_writes_per_job": (children + status) / jobs,
        "status_writes_per_job": status / jobs,
        "own_requests_per_job": (sum(requests.values()) - (posts - children)) / jobs,
        "events_per_job": (posts - children) / jobs,
        "lease_writes": leases,
        "api_server_writes_per_job": (sum(made.values()) - events - leases) / jobs,
        "conflicts": sum(number for (_, code), number in requests.items() if code == "409"),
    }


def be_idle(api: ApiServer, operator: OperatorProcess, seconds: float) -> dict[str, Any]:
    """Nothing happens: what is written all the same."""
    come_to_rest(api)
    before = Snapshot.take(api, operator)
    time.sleep(seconds)
    after = Snapshot.take(api, operator)
    say(f"idle for {seconds:g} s")
    return {
        "seconds": seconds,
        "own_writes": sum(number for (method, _), number in (after.requests - before.requests).items() if method != "GET"),
        "writes": {" ".join(write): number for write, number in (after.writes - before.writes).items()},
        "lease_writes": of_resource(after.writes - before.writes, "leases"),
        "cpu": after.cpu_since(before),
        "memory": after.memory,
    }


def start_cold(api: ApiServer, operator: OperatorProcess) -> dict[str, Any]:
    """The operator ends and starts anew beside all jobs of the run."""
    operator.stop()
    before, begun = writes(api), time.monotonic()
    operator.start()
    rested, ready = operator.rest(begun)
    if ready is None:
        raise SystemExit(f"the operator was not ready {rested:.0f} s after its start; its log ends with:\n{api.processes.log_tail('operator')}")
    made = writes(api) - before
    say(f"cold start: ready after {ready:.2f} s")
    return {
        "ready_seconds": ready,
        "rested_seconds": rested,
        "cpu_seconds": cpu_seconds(operator.pid),
        "memory": memory(operator.pid),
        "own_writes": sum(number for (method, _), number in operator.requests().items() if method != "GET"),
        "writes": {" ".join(write): number for write, number in made.items()},
    }


# The rows


def burst_rows(burst: Burst, floors: list[Floor]) -> list[dict[str, Any]]:
    work, percentiles = f"burst-{burst.jobs}", quantiles(burst.create_to_pods, n=100, method="inclusive")
    floor_seconds = mean(floor.last_seconds for floor in floors if floor.jobs == burst.jobs)
    units = {"lease_writes": "writes", "conflicts": "answers", "own_requests_per_job": "requests"}
    empty = [("empty_rss_mb", "MiB", burst.memory_before["operator"].resident)] if burst.jobs == FULL[0] else []
    figures = [
        ("last_over_floor", "×", burst.last_seconds / floor_seconds),
        ("last_seconds", "s", burst.last_seconds),
        ("floor_seconds", "s", floor_seconds),
        ("create_to_pods_p50_seconds", "s", percentiles[49]),
        ("create_to_pods_p99_seconds", "s", percentiles[98]),
        *((metric, units.get(metric, "writes"), value) for metric, value in burst.counted.items()),
        ("cpu_ms_per_job", "ms", 1000 * burst.cpu_settled["operator"] / burst.jobs),
        ("api_server_cpu_ms_per_job", "ms", 1000 * burst.cpu_settled["kube-apiserver"] / burst.jobs),
        *empty,
        ("peak_rss_mb", "MiB", burst.memory["operator"].peak),
    ]
    return [results.row(work, metric, unit, value) for metric, unit, value in figures]


def idle_rows(idle: dict[str, Any]) -> list[dict[str, Any]]:
    figures = [("writes", "writes", idle["own_writes"]), ("lease_writes", "writes", idle["lease_writes"]), ("cpu_seconds", "s", idle["cpu"]["operator"])]
    return [results.row("idle-minute", metric, unit, value) for metric, unit, value in [*figures, ("rss_mb", "MiB", idle["memory"]["operator"].resident)]]


def cold_rows(cold: dict[str, Any]) -> list[dict[str, Any]]:
    figures = [("ready_seconds", "s", cold["ready_seconds"]), ("cpu_seconds", "s", cold["cpu_seconds"]), ("writes", "writes", cold["own_writes"])]
    return [results.row("cold-start", metric, unit, value) for metric, unit, value in [*figures, ("peak_rss_mb", "MiB", cold["memory"].peak)]]


def notes(figures: dict[str, Any], output: Path | None) -> list[str]:
    foreign = max((burst.foreign_cores for burst in figures["bursts"]), default=0.0)
    told = [f"other work kept {foreign:.1f} cores busy in a burst: repeat on a quiet machine"] if foreign > BUSY_CORES else []
    return [*told, f"written to {output}" if output else "not written: this was no run with all defaults (--output FOLDER writes)"]


def raw(figures: dict[str, Any]) -> dict[str, Any]:
    """All figures as they were measured, as JSON has them."""
    return {
        **figures,
        "floors": [asdict(floor) for floor in figures["floors"]],
        "bursts": [{**asdict(burst), "create_to_pods": [round(seconds, 4) for seconds in burst.create_to_pods]} for burst in figures["bursts"]],
        "idle": {**figures["idle"], "memory": {name: asdict(usage) for name, usage in figures["idle"]["memory"].items()}},
        "cold_start": {**figures["cold_start"], "memory": asdict(figures["cold_start"]["memory"])},
    }


def save(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def say(what: str) -> None:
    print(what, flush=True)


if __name__ == "__main__":
    main()
