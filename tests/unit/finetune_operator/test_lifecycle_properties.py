"""Whatever happens to a job's pods and nodes, and wherever the operator dies: what always holds. The cluster here is a small model of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator.lifecycle import Decision, decide
from finetune_operator.observed import Node, Observed, Pod, Refusal
from finetune_operator.schema import FineTuneJob
from finetune_operator.status import Status
from jobs import make_job
from situations import SETTINGS, at, heard

NODES = 2
GRACE = 30.0
WHOLE = 99
"""More steps than any decision has."""
RETRIED = (1, 20, 21, 137, 255)
PERMANENT = (10, 11, 12, 13, 14, 15)
QUOTA = Refusal("CreationRefused", "exceeded quota")


@cache
def make(backoff_limit: int, suspend: bool) -> FineTuneJob:
    policy = {"backoffLimit": backoff_limit, "progressDeadlineSeconds": 700, "nodeLostSeconds": 300}
    return make_job(nodes={"count": NODES}, runPolicy=policy, suspend=suspend)


@dataclass
class World:
    """A cluster with one job."""

    backoff_limit: int = 3
    now: float = 0.0
    suspend: bool = False
    quota: bool = False
    status: Status = field(default_factory=Status)
    pods: dict[str, Pod] = field(default_factory=dict)
    made: int = 0
    silent: dict[int, float] = field(default_factory=dict)
    removed: set[int] = field(default_factory=set)
    heartbeat: tuple[int, float] | None = None
    gave_up: bool = False
    """A trainer has ended in a way that no restart mends."""

    def observe(self) -> Observed:
        nodes = (*(Node(f"node-{rank}", True, at(since)) for rank, since in self.silent.items()), *(Node(f"node-{rank}", False) for rank in self.removed))
        beats = self.heartbeat is not None and self.heartbeat[0] == self.status.attempt
        return Observed(
            now=at(self.now),
            job=make(self.backoff_limit, self.suspend),
            generation=1,
            status=self.status,
            pods=tuple(self.pods.values()),
            nodes=nodes,
            progress=heard(when=self.heartbeat[1]) if self.heartbeat is not None and beats else None,
            heartbeat_seen=at(self.heartbeat[1]) if self.heartbeat is not None and beats else None,
        )

    def operate(self, steps: int = WHOLE) -> Decision:
        """Decide and carry out the first steps of it; then the operator dies, or has nothing more to do."""
        observed = self.observe()
        decision = decide(observed, SETTINGS)
        if decision.create is not None and self.quota:
            decision = decide(replace(observed, refusal=QUOTA), SETTINGS)
            check(replace(observed, refusal=QUOTA), decision)
        else:
            check(observed, decision)
        actions: list[Callable[[], None]] = [lambda rank=rank: self._create(decision.create or 0, rank) for rank in decision.missing]  # type: ignore[misc]
        actions += [lambda: setattr(self, "status", decision.status)]
        actions += [lambda deletion=deletion: self._delete(deletion.name, deletion.uid, deletion.force) for deletion in decision.delete]  # type: ignore[misc]
        for action in actions[:steps]:
            action()
            self.check_gangs()
        return decision

    def settle(self) -> Decision:
        """Decide and carry out until there is nothing more to do at this moment."""
        for _ in range(8):
            before = (self.status, dict(self.pods))
            decision = self.operate()
            if (self.status, self.pods) == before:
                return decision
        raise AssertionError(f"the operator does not come to rest: {decision}")

    def check_gangs(self) -> None:
        alive = {pod.attempt for pod in self.pods.values() if not pod.ended}
        assert len(alive) <= 1, f"gangs {alive} live at once"

    def _create(self, attempt: int, rank: int) -> None:
        name = f"tiny-{attempt}-{rank}"
        assert name not in self.pods, f"{name} is made twice"
        self.made += 1
        self.pods[name] = Pod(name=name, uid=f"uid-{self.made}", attempt=attempt, node_rank=rank)

    def _delete(self, name: str, uid: str, force: bool) -> None:
        pod = self.pods.get(name)
        if pod is None or pod.uid != uid:
            return
        if force:
            assert pod.node_rank in self.removed or pod.node_rank in self.silent, "forced on a node that is well"
            del self.pods[name]
        elif pod.deletion is None:
            self._set(pod, deletion=at(self.now + GRACE))

    def _set(self, pod: Pod, **fields: object) -> None:
        self.pods[pod.name] = replace(pod, **fields)  # type: ignore[arg-type]

    def some(self, rank: int, *phases: str) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.node_rank == rank and pod.phase in phases and rank not in self.silent and rank not in self.removed]

    # What happens in a cluster.

    def start(self, rank: int) -> None:
        for pod in self.some(rank, "Pending"):
            if pod.deletion is None:
                self._set(pod, phase="Running", started=True, node=f"node-{rank}", address=f"10.0.0.{rank}")

    def end(self, rank: int, code: int) -> None:
        for pod in self.some(rank, "Running"):
            self._set(pod, phase="Failed" if code else "Succeeded", started=False, exit_code=code, finished=at(self.now))
            self.gave_up |= code in PERMANENT

    def delete(self, rank: int) -> None:
        for pod in [pod for pod in self.pods.values() if pod.node_rank == rank]:
            self._delete(pod.name, pod.uid, force=False)

    def vanish(self, rank: int) -> None:
        for pod in self.some(rank, "Pending", "Running", "Succeeded", "Failed"):
            del self.pods[pod.name]

    def evict(self, rank: int) -> None:
        for pod in self.some(rank, "Running"):
            self._set(pod, disrupted=True, deletion=at(self.now + GRACE))

    def lose(self, rank: int) -> None:
        self.silent.setdefault(rank, self.now)

    def remove_node(self, rank: int) -> None:
        self.removed.add(rank)

    def recover(self, rank: int) -> None:
        self.silent.pop(rank, None)
        self.removed.discard(rank)

    def reap(self, rank: int) -> None:
        """The kubelet ends the pods that are being deleted."""
        for pod in self.some(rank, "Pending", "Running", "Succeeded", "Failed"):
            if pod.deletion is not None:
                del self.pods[pod.name]

    def beat(self, _: int) -> None:
        self.heartbeat = (self.status.attempt, self.now)

    def set_suspend(self, rank: int) -> None:
        self.suspend = rank == 0

    def set_quota(self, rank: int) -> None:
        self.quota = rank == 0

    def finish(self) -> None:
        """From now on everything goes well: until the job has ended and nothing is left to do."""
        self.suspend = self.quota = False
        for _ in range(80):
            for rank in range(NODES):
                self.recover(rank)
                self.reap(rank)
                self.start(rank)
            self.beat(0)
            decision = self.settle()
            if has_ended(self.status) and not any(pod.deletion for pod in self.pods.values()):
                return
            if all(pod.phase in ("Running", "Succeeded") for pod in self.pods.values()):
                for rank in range(NODES):
                    self.end(rank, 0)
            self.now += decision.again_after or 1
        raise AssertionError(f"the job does not end: {self.status}")


def has_ended(status: Status) -> bool:
    return status.is_true("Succeeded") or status.is_true("Failed")  # type: ignore[arg-type]


def check(observed: Observed, decision: Decision) -> None:
    """What holds for every decision."""
    old, new = observed.status, decision.status
    assert old.attempt <= new.attempt <= old.attempt + 1
    assert new.restarts.counted <= observed.policy.backoff_limit
    assert new.restarts.counted <= new.restarts.total
    assert (decision.create is not None) == (new.attempt > old.attempt)
    assert decision.create is None or all(pod.attempt == decision.create for pod in observed.pods), "a gang is made beside pods of another"
    assert len(decision.events) <= 1
    assert not decision.events or new != old, "told without a change"
    assert decision.again_after is None or decision.again_after >= 0
    if has_ended(old):
        assert new == old, "an end is for ever"
    if decision.create is None:
        again = decide(replace(observed, status=new), SETTINGS)
        if again.create is not None:
            assert decision.again_after == 0, "there is more to do, and nothing would wake the operator"
            return
        assert again.status == new, "the same is decided twice"
        assert not again.events, "the same is told twice"
        if decision.again_after is None or decision.again_after > 1:
            later = decide(replace(observed, status=new, now=observed.now + timedelta(seconds=1)), SETTINGS)
            assert later.status == new, "a second without news is a write"


RANKS = st.integers(0, NODES - 1)
Story = list[tuple[Callable[[World, Any], object], Any, bool]]


def wait(world: World, seconds: float) -> None:
    world.now += seconds


def start_all(world: World, _: int) -> None:
    """What mostly happens: old pods end, new ones are made and start."""
    for rank in range(NODES):
        world.reap(rank)
    world.settle()
    for rank in range(NODES):
        world.start(rank)
    world.settle()


def evict_seen(world: World, rank: int) -> None:
    world.evict(rank)
    world.operate()


def end(world: World, how: tuple[int, int]) -> None:
    world.end(*how)


def stories(*events: tuple[Callable[[World, Any], object], st.SearchStrategy[Any]], size: int = 30) -> st.SearchStrategy[Story]:
    """Events one after the other, each with what it is about and whether the operator is there to see it."""
    event = st.one_of(*(st.tuples(st.just(what), about, st.booleans()) for what, about in events))
    return st.lists(event, min_size=6, max_size=size)


CALM: tuple[tuple[Callable[[World, Any], object], st.SearchStrategy[Any]], ...] = (
    (start_all, RANKS),
    (World.start, RANKS),
    (World.reap, RANKS),
    (World.beat, RANKS),
    (World.set_suspend, RANKS),
    (World.set_quota, RANKS),
    (World.operate, st.sampled_from((0, 1, 2, 3))),
)
ROUGH = (
    *CALM,
    (start_all, RANKS),
    (wait, st.sampled_from((1, 6, 40, 310, 720))),
    (end, st.tuples(RANKS, st.sampled_from((0, 143, *RETRIED)))),
    (World.evict, RANKS),
    (World.delete, RANKS),
    (World.vanish, RANKS),
    (World.lose, RANKS),
    (World.remove_node, RANKS),
    (World.recover, RANKS),
)
PERMANENT_END = (end, st.tuples(RANKS, st.sampled_from(PERMANENT)))


def happen(world: World, story: Story) -> None:
    for event, about, is_seen in story:
        event(world, about)
        if is_seen:
            world.settle()
        world.check_gangs()
    world.finish()
    assert not [pod.name for pod in world.pods.values() if pod.active], "a pod is left running after the end"
    decision = world.operate()
    assert (decision.create, decision.delete, decision.events, decision.again_after) == (None, (), (), None)


@settings(deadline=None, max_examples=70)
@given(story=stories(*ROUGH))
def test_whatever_can_be_retried_ends_well(story: Story) -> None:
    world = World(backoff_limit=1000)
    happen(world, story)
    assert world.status.phase == "Succeeded"
    assert world.status.restarts.total <= world.status.attempt - 1


@settings(deadline=None, max_examples=70)
@given(story=stories(*ROUGH, PERMANENT_END), backoff_limit=st.integers(0, 3))
def test_a_job_fails_for_a_reason_only(story: Story, backoff_limit: int) -> None:
    world = World(backoff_limit=backoff_limit)
    happen(world, story)
    if world.status.phase == "Failed":
        condition = next(condition for condition in world.status.conditions if condition.type == "Failed")
        used_up = condition.reason == "BackoffLimitExceeded" and world.status.restarts.counted == backoff_limit
        assert used_up or world.gave_up
        assert world.status.failure is not None


@settings(deadline=None, max_examples=70)
@given(story=stories(*CALM, (evict_seen, RANKS), (wait, st.sampled_from((1, 3, 6)))))
def test_what_the_cluster_or_the_user_does_is_never_counted(story: Story) -> None:
    world = World(backoff_limit=0)
    happen(world, story)
    assert (world.status.phase, world.status.restarts.counted) == ("Succeeded", 0)


@settings(deadline=None, max_examples=40)
@given(deaths=st.lists(st.integers(0, 4), max_size=25))
def test_a_job_runs_once_however_often_the_operator_dies(deaths: list[int]) -> None:
    world = World()
    for steps in deaths:
        world.operate(steps)
        world.start(steps % NODES)
    world.finish()
    assert (world.status.phase, world.status.attempt, world.made) == ("Succeeded", 1, NODES)
