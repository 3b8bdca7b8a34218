"""A pod as Kubernetes tells it."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator import names
from finetune_operator.pods import read_pod

LABELS = {names.JOB_LABEL: "job", names.ATTEMPT_LABEL: "2", names.NODE_LABEL: "1"}


def raw_pod(**parts: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "team", "name": "job-2-1", "uid": "p1", "resourceVersion": "7", "labels": LABELS}, **parts}


def test_a_pod_that_was_just_made_is_known_by_its_metadata() -> None:
    record = read_pod(raw_pod())
    assert record is not None
    assert (record.namespace, record.job, record.owner, record.resource_version) == ("team", "job", "", 7)
    assert (record.pod.name, record.pod.attempt, record.pod.node_rank, record.pod.phase) == ("job-2-1", 2, 1, "Pending")


STRANGE: dict[str, dict[str, Any]] = {
    "time": {"status": {"containerStatuses": [{"name": "trainer", "state": {"terminated": {"exitCode": 0, "finishedAt": "yesterday"}}}]}},
    "conditions": {"status": {"conditions": ["Ready"]}},
    "condition without a type": {"status": {"conditions": [{"status": "True"}]}},
    "state": {"status": {"containerStatuses": [{"name": "trainer", "state": {"terminated": "yes"}}]}},
}


@pytest.mark.parametrize("parts", STRANGE.values(), ids=STRANGE.keys())
def test_a_pod_that_cannot_be_read_is_left_alone_and_named(parts: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert read_pod(raw_pod(**parts)) is None
    assert "pod team/job-2-1 cannot be read and is left alone" in caplog.text
