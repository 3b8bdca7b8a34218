"""What is left of an event when it has been heard."""

from __future__ import annotations

from finetune_operator.handlers import lighten


def test_an_object_that_was_heard_keeps_what_identifies_it() -> None:
    identity = {"namespace": "team", "name": "job", "uid": "u", "resourceVersion": "7"}
    raw = {"apiVersion": "v1", "kind": "FineTuneJob", "metadata": {**identity, "managedFields": [{}], "labels": {"a": "b"}}, "spec": {"x": 1}, "status": {}}
    lighten(raw)
    assert raw == {"apiVersion": "v1", "kind": "FineTuneJob", "metadata": identity}
