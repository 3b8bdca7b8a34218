"""What watches tell, in any order, against what the operator has written itself."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator import names
from finetune_operator.pods import PodRecord, read_pod
from finetune_operator.schema import FineTuneJob
from finetune_operator.status import ConditionType, Phase, PodCounts, Status
from finetune_operator.store import Store, dump_status, merge_patch, read_status

KEY = ("team", "job")
SPEC = {"model": {"source": "Qwen/Qwen2.5-7B-Instruct"}, "data": {"dataset": ["swift/self-cognition#8"]}, "volumes": {"work": {"claimName": "results"}}}


def raw_job(
    version: int,
    *,
    uid: str = "u1",
    made: str = "2026-11-21T10:00:00Z",
    generation: int = 1,
    spec: dict[str, Any] | None = None,
    status: dict[str, Any] | None = None,
) -> dict[str, Any]:
    metadata = {"namespace": KEY[0], "name": KEY[1], "uid": uid, "generation": generation, "resourceVersion": str(version), "creationTimestamp": made}
    return {"metadata": metadata, "spec": spec or SPEC, "status": status or {}}


def raw_pod(version: int, name: str = "job-1-0", *, owner: str = "u1", phase: str = "Pending", uid: str = "p1") -> dict[str, Any]:
    labels = {names.JOB_LABEL: "job", names.ATTEMPT_LABEL: "1", names.NODE_LABEL: "0"}
    owners = [{"kind": names.KIND, "uid": owner, "name": "job", "controller": True}]
    metadata = {"namespace": "team", "name": name, "uid": uid, "resourceVersion": str(version), "labels": labels, "ownerReferences": owners}
    return {"metadata": metadata, "spec": {}, "status": {"phase": phase}}


def pod(version: int, **options: Any) -> PodRecord:
    record = read_pod(raw_pod(version, **options))
    assert record is not None
    return record


def test_what_is_older_than_what_was_written_is_no_news() -> None:
    store = Store()
    assert store.put_job(raw_job(5)) == KEY
    assert store.put_job(raw_job(5)) is None
    assert store.put_job(raw_job(4)) is None
    assert store.put_job(raw_job(6, generation=2)) == KEY
    assert store.jobs[KEY].generation == 2


def test_a_spec_is_read_once_for_each_generation() -> None:
    store = Store()
    store.put_job(raw_job(1))
    parsed = store.jobs[KEY].parsed
    assert isinstance(parsed, FineTuneJob)
    store.put_job(raw_job(2, status={"attempt": 1}))
    assert store.jobs[KEY].parsed is parsed
    store.put_job(raw_job(3, generation=2, spec={**SPEC, "suspend": True}))
    changed = store.jobs[KEY].parsed
    assert isinstance(changed, FineTuneJob)
    assert changed.spec.suspend


def test_a_job_that_takes_the_name_of_another_is_younger_and_has_none_of_its_pods() -> None:
    store = Store()
    store.put_job(raw_job(1, uid="u1"))
    store.put_pod(pod(2, owner="u1"))
    first = store.jobs[KEY]
    assert store.pod_of_another(first) is None
    store.put_job(raw_job(3, uid="u2", made="2026-11-21T10:00:01Z"))
    second = store.jobs[KEY]
    assert second.age > first.age
    assert store.pods_of(second) == ()
    assert store.pod_of_another(second) == "job-1-0"
    store.remove_job(KEY, "u1")
    assert store.jobs[KEY] is second


def test_the_age_of_a_job_is_when_it_was_made_and_not_when_it_was_seen() -> None:
    store = Store()
    store.put_job(raw_job(9, made="2026-11-21T10:00:00Z"))
    young, other = store.jobs[KEY].age, Store()
    other.put_job(raw_job(1, uid="u0", made="2026-11-20T23:59:59Z"))
    assert other.jobs[KEY].age < young
    store.put_job(raw_job(10, status={"attempt": 1}))
    assert store.jobs[KEY].age == young


def test_a_pod_without_an_owner_is_nobodys_leftover() -> None:
    store = Store()
    store.put_job(raw_job(1))
    store.put_pod(pod(2, owner=""))
    assert store.pod_of_another(store.jobs[KEY]) is None


def test_a_namespace_that_could_not_be_listed_is_not_forgotten() -> None:
    store = Store()
    store.put_job(raw_job(1))
    store.put_pod(pod(2))
    assert store.keep_pods(set(), since=5, unlisted={"team"}) == store.keep_jobs(set(), since=5, unlisted={"team"}) == []
    assert store.keep_pods(set(), since=5, unlisted={"other"}) == store.keep_jobs(set(), since=5, unlisted={"other"}) == [KEY]


def test_a_pod_that_changes_only_where_nobody_looks_is_no_news() -> None:
    store = Store()
    assert store.put_pod(pod(1)) == KEY
    assert store.put_pod(pod(2)) is None
    assert store.put_pod(pod(3, phase="Running")) == KEY
    assert store.put_pod(pod(2, phase="Pending")) is None
    store.put_job(raw_job(4))
    assert [found.phase for found in store.pods_of(store.jobs[KEY])] == ["Running"]


def test_a_list_forgets_what_it_does_not_have_and_keeps_what_is_younger() -> None:
    store = Store()
    store.put_job(raw_job(1))
    store.put_pod(pod(2, name="job-1-0", uid="p1"))
    store.put_pod(pod(9, name="job-1-1", uid="p2"))
    assert store.keep_pods(set(), since=5) == [KEY]
    assert [found.name for found in store.pods_of(store.jobs[KEY])] == ["job-1-1"]
    assert store.keep_jobs({"u1"}, since=5) == []
    assert store.keep_jobs(set(), since=5) == [KEY]
    assert store.jobs == {}


def test_the_answer_to_a_deletion_is_taken_in() -> None:
    store = Store()
    store.put_job(raw_job(1))
    store.put_pod(pod(2))
    going = raw_pod(3)
    going["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:00Z"
    store.note_deletion(KEY, "job-1-0", "p1", {"kind": "Pod", **going})
    assert [found.deletion is not None for found in store.pods_of(store.jobs[KEY])] == [True]
    store.note_deletion(KEY, "job-1-0", "p1", {"kind": "Status", "status": "Success"})
    assert store.pods_of(store.jobs[KEY]) == ()


@pytest.mark.parametrize("answer", ["creation", "deletion"])
def test_an_answer_that_comes_after_the_pods_end_does_not_bring_it_back(answer: str) -> None:
    store = Store()
    store.put_job(raw_job(1))
    store.put_pod(pod(2))
    store.remove_pod(KEY, "job-1-0", "p1")
    if answer == "deletion":
        store.note_deletion(KEY, "job-1-0", "p1", {"kind": "Pod", **raw_pod(3)})
    assert store.put_pod(pod(3)) is None
    assert store.pods_of(store.jobs[KEY]) == ()
    assert store.put_pod(pod(5, uid="p2")) == KEY


@pytest.mark.parametrize(
    ("field", "value"), [("attempt", "many"), ("conditions", [{"type": "Failed"}]), ("restarts", {"total": -1})], ids=["attempt", "conditions", "restarts"]
)
def test_a_job_of_whose_status_what_decides_cannot_be_read_is_held(field: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    store.put_job(raw_job(1, status={"phase": "Running", field: value}))
    store.put_job(raw_job(1, status={"phase": "Running", field: value}))
    assert store.jobs[KEY].held
    assert caplog.records[0].getMessage().startswith(f"team/job: nothing is done about it, because its status cannot be read; correct {field}: ")
    assert len(caplog.records) == 1
    assert store.put_job(raw_job(2, status={"attempt": 2})) == KEY
    assert (store.jobs[KEY].held, store.jobs[KEY].status.attempt) == (False, 2)


def test_of_a_status_only_what_cannot_be_read_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    ended = {"type": "Succeeded", "status": "True", "reason": "Succeeded", "lastTransitionTime": "2026-05-04T12:00:00Z"}
    status = read_status({"attempt": 4, "conditions": [ended], "restarts": {"total": 3, "counted": 1}, "phase": "Dreaming", "ofTomorrow": {"a": 1}}, KEY)
    assert status is not None
    assert (status.attempt, status.restarts.total, status.is_true(ConditionType.SUCCEEDED), status.phase) == (4, 3, True, None)
    assert "team/job: of its status ofTomorrow, phase cannot be read and is left out" in caplog.text


def test_a_status_is_read_back_as_it_was_written() -> None:
    status = Status(observed_generation=2, phase=Phase.RUNNING, attempt=3, pods=PodCounts(desired=2, running=2))
    body = dump_status(status)
    assert body == {"observedGeneration": 2, "phase": "Running", "attempt": 3, "pods": {"desired": 2, "running": 2, "succeeded": 0, "failed": 0}}
    assert read_status(body) == status


LEAVES = st.sampled_from([0, 1, "x", [], [1], {}])
OBJECTS = st.dictionaries(st.sampled_from("abc"), LEAVES | st.dictionaries(st.sampled_from("abc"), LEAVES, max_size=3), max_size=3)


def apply_merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386, section 2, word by word."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = apply_merge_patch(result.get(name), value)
    return result


@settings(deadline=None)
@given(OBJECTS, OBJECTS)
def test_a_merge_patch_makes_the_one_of_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert apply_merge_patch(before, merge_patch(before, after)) == after
    assert merge_patch(after, after) == {}


def test_a_sample_for_metrics_has_phase_and_progress_until_the_job_ends() -> None:
    store = Store()
    status = {"phase": "Running", "progress": {"step": 3, "totalSteps": 9, "loss": 1.5}}
    store.put_job(raw_job(1, status=status))
    (sample,) = store.samples()
    assert (sample.namespace, sample.name, sample.phase) == ("team", "job", "Running")
    assert sample.progress is not None
    assert (sample.progress["step"], sample.progress["totalSteps"], sample.progress["loss"]) == (3, 9, 1.5)
    store.put_job(raw_job(2, status={**status, "phase": "Succeeded", "completionTime": "2026-11-21T11:00:00Z"}))
    assert [(sample.phase, sample.progress) for sample in store.samples()] == [("Succeeded", None)]
    store.put_job(raw_job(3))
    assert [sample.phase for sample in store.samples()] == ["Pending"]


def test_a_job_at_rest_takes_little_memory() -> None:
    """Models are made when they are wanted: with them a job takes 20 KiB."""
    store, jobs = Store(), 100

    def put(number: int) -> None:
        raw = raw_job(1, uid=f"u{number}", status={"phase": "Running", "progress": {"step": 3, "totalSteps": 9}})
        raw["metadata"]["name"] = f"job-{number}"
        store.put_job(raw)
        record = store.jobs["team", f"job-{number}"]
        assert isinstance(record.parsed, FineTuneJob)
        assert record.status.phase is Phase.RUNNING
        record.rest()

    put(jobs)  # what is made once
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(jobs):
            put(number)
        list(store.samples())
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / jobs < 4096
