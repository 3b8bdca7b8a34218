"""The operator is killed at random moments while jobs are in flight: nothing is doubled, nothing is lost."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from finetune_operator import names
from kube_api import ApiServer
from kube_processes import until
from operator_jobs import Team
from operator_process import SHORT_LEASE, START_SECONDS, SYSTEM_NAMESPACE, Operator, Trainers
from operator_traffic import PodHistory, Traffic, condition

KILLS = 50
JOBS_IN_FLIGHT = 20
SEED = 20260501
LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{SYSTEM_NAMESPACE}/leases/finetune-operator"


@pytest.fixture
def replicas(api: ApiServer, operator_kubeconfig: Path, trainers: Trainers, tmp_path: Path) -> Iterator[dict[str, Operator]]:
    """Two replicas: one acts, the other has its program loaded and waits."""
    made = {name: Operator(tmp_path, operator_kubeconfig, name, progressPort=trainers.port, **SHORT_LEASE) for name in ("operator-a", "operator-b")}
    yield made
    for replica in made.values():
        if replica.runs:
            replica.kill()
    if api.find(LEASE):
        api.delete(LEASE)  # the next operator waits for a holder by its own times, which are long


def leader(team: Team, replicas: dict[str, Operator]) -> Operator | None:
    """Who holds the Lease; a replica that has ended of itself is started anew, as a kubelet does."""
    for replica in replicas.values():
        if not replica.runs:
            replica.start()
    lease = team.api.find(LEASE)
    return replicas.get((lease or {"spec": {}})["spec"].get("holderIdentity") or "")


def kill_at_a_random_moment(team: Team, replicas: dict[str, Operator], history: PodHistory, chance: random.Random) -> None:
    """After so many changes of pods, or so many milliseconds after it took over: also while it is still reading what there is.

    The Lease of the dead leader is deleted. That shortens the wait for its end, and nothing else: the process is gone, and what
    it had not yet done stays undone. That a Lease that expires is taken over is a test of its own.
    """
    acting = until(lambda: leader(team, replicas), START_SECONDS, "a replica leads")
    assert isinstance(acting, Operator)
    seen, changes = history.count, chance.choice((0, 1, 2, 3, 5, 8, 13))
    until(lambda: history.count >= seen + changes, START_SECONDS, f"{changes} changes of pods")
    threading.Event().wait(chance.uniform(0, 0.3 if changes else 1.0))
    acting.kill()
    team.api.delete(LEASE)
    acting.start()


def finished(future: Future[None]) -> bool:
    """Whether the jobs have all ended; raises what went wrong with driving them."""
    if future.done():
        future.result()
    return future.done()


def test_fifty_kills_double_nothing_and_lose_nothing(team: Team, replicas: dict[str, Operator]) -> None:
    chance = random.Random(SEED)
    history, traffic = PodHistory(team), Traffic(team, JOBS_IN_FLIGHT, SEED)
    with ThreadPoolExecutor(1) as executor:
        driving = executor.submit(traffic.follow_scripts)
        try:
            for _ in range(KILLS):
                kill_at_a_random_moment(team, replicas, history, chance)
                assert not finished(driving)
            traffic.no_more.set()
            team.until(lambda: leader(team, replicas) and finished(driving), "all jobs end", 2 * START_SECONDS)
        finally:
            traffic.stopped.set()
    history.close()
    assert_scripts_were_followed(team, traffic)
    assert_no_pod_was_doubled(traffic, history)


def assert_scripts_were_followed(team: Team, traffic: Traffic) -> None:
    """Every job is in its right end state, and counts exactly the failures that it has had."""
    jobs = {job["metadata"]["name"]: job for job in team.all(names.PLURAL)}
    assert jobs.keys() == traffic.scripts.keys()
    assert len(jobs) >= JOBS_IN_FLIGHT
    for name, script in traffic.scripts.items():
        status = jobs[name]["status"]
        kind = "Succeeded" if script.end == "Succeeded" else "Failed"
        restarts = status.get("restarts", {"total": 0, "counted": 0})
        found = (condition(jobs[name], kind).get("reason"), status["attempt"], restarts["total"], restarts["counted"])
        assert found == (script.end, len(script.gangs), script.restarts, script.counted), f"{name}: {status}"


def assert_no_pod_was_doubled(traffic: Traffic, history: PodHistory) -> None:
    """Two pods for each gang, made once each; and never while a pod of another gang of the job was there."""
    expected = {(name, attempt + 1, rank) for name, script in traffic.scripts.items() for attempt in range(len(script.gangs)) for rank in range(2)}
    assert set(history.made) == expected
    assert {place: count for place, count in history.made.items() if count > 1} == {}
    assert history.mixed == []
