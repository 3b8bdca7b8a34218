"""The CustomResourceDefinition is structural, bounded and described; tests/integration holds it against a real API server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from finetune_operator import cel, crd
from finetune_operator.schema import Spec
from finetune_operator.workload import Nodes

DEFINITION = crd.custom_resource_definition()
VERSION = DEFINITION["spec"]["versions"][0]
ROOT = VERSION["schema"]["openAPIV3Schema"]


def walk(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema in a schema, with its path."""
    yield path, schema
    for name, value in schema.get("properties", {}).items():
        yield from walk(value, f"{path}.{name}")
    if "items" in schema:
        yield from walk(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from walk(schema["additionalProperties"], f"{path}.*")


ALL = dict(walk(ROOT))
OURS = {path: schema for path, schema in ALL.items() if path.startswith((".spec", ".status"))}


def at(path: str) -> dict[str, Any]:
    return ALL[path]


def test_identity() -> None:
    spec = DEFINITION["spec"]
    assert DEFINITION["metadata"] == {"name": "finetunejobs.finetune.mcore.dev"}
    assert (spec["group"], spec["scope"], spec["names"]["kind"], spec["names"]["shortNames"]) == ("finetune.mcore.dev", "Namespaced", "FineTuneJob", ["ftj"])
    assert (VERSION["name"], VERSION["served"], VERSION["storage"], VERSION["subresources"]) == ("v1alpha1", True, True, {"status": {}})


def test_columns() -> None:
    columns = VERSION["additionalPrinterColumns"]
    assert [column["name"] for column in columns if "priority" not in column] == ["Phase", "Steps", "Loss", "Remaining", "Attempt", "Age"]
    assert [column["name"] for column in columns if column.get("priority") == 1] == ["Model", "Nodes", "Message"]


def test_schema_is_structural() -> None:
    for path, schema in ALL.items():
        assert not {"$ref", "$defs", "oneOf", "allOf", "title", "const", "nullable", "propertyNames"} & schema.keys(), path
        assert "type" in schema or schema.get("x-kubernetes-int-or-string"), path
        assert "anyOf" not in schema or schema["x-kubernetes-int-or-string"], path
        assert isinstance(schema.get("exclusiveMinimum", False), bool), path


def test_everything_has_an_end() -> None:
    for path, schema in OURS.items():
        kind = schema.get("type")
        if kind == "string" and schema.get("format") != "date-time":
            assert {"maxLength", "enum"} & schema.keys(), path
        if kind == "array":
            assert {"maxItems", "x-kubernetes-list-type"} <= schema.keys(), path
        if "additionalProperties" in schema:
            assert "maxProperties" in schema, path
        if kind == "integer":
            assert schema["format"] in ("int32", "int64"), path


def test_every_field_is_described() -> None:
    assert [
        path for path, schema in OURS.items() if "[]" not in path[-2:] and ".*" not in path[-2:] and not schema.get("description") and "accessModes" not in path
    ] == []


@pytest.mark.parametrize(
    ("path", "default"),
    [
        (".spec.suspend", False),
        (".spec.tuning", {}),
        (".spec.tuning.tunerType", "lora"),
        (".spec.training.globalBatchSize", 16),
        (".spec.nodes", {}),
        (".spec.nodes.accelerator", {}),
        (".spec.nodes.accelerator.type", "GPU"),
        (".spec.nodes.env", []),
        (".spec.volumes.persistentVolumeClaimRetentionPolicy.whenDeleted", "Retain"),
        (".spec.runPolicy.progressDeadlineSeconds", 1800),
    ],
)
def test_unconditional_default(path: str, default: Any) -> None:
    assert at(path)["default"] == default


@pytest.mark.parametrize(
    "path",
    ["tuning.loraRank", "training.lr", "training.microBatchSize", "parallelism.tensorModelParallelSize", "model.torchDtype", "nodes.accelerator.resourceName"],
)
def test_what_the_engine_chooses_has_no_default(path: str) -> None:
    assert "default" not in at(f".spec.{path}")


def test_a_status_has_no_default() -> None:
    assert [path for path, schema in ALL.items() if path.startswith(".status") and "default" in schema] == []


def test_bounds_are_those_of_the_models() -> None:
    assert at(".spec.training.lr") | {"description": ""} == {"description": "", "type": "number", "format": "double", "minimum": 0, "exclusiveMinimum": True}
    assert (at(".spec.nodes.count")["minimum"], at(".spec.nodes.count")["maximum"], at(".spec.nodes.count")["format"]) == (1, 4096, "int32")
    assert at(".spec.output.maxShardSize")["format"] == "int64"
    assert at(".spec.model.torchDtype")["enum"] == ["float32", "bfloat16", "float16"]
    assert at(".status.phase")["enum"] == ["Pending", "Initializing", "Queued", "Running", "Restarting", "Suspended", "Succeeded", "Failed"]


def test_kinds_of_kubernetes() -> None:
    quantity = at(".spec.nodes.sharedMemory")
    assert quantity["x-kubernetes-int-or-string"] is True
    assert quantity["anyOf"] == [{"type": "integer"}, {"type": "string"}]
    assert at(".spec.nodes.podTemplate.spec")["x-kubernetes-preserve-unknown-fields"] is True
    assert at(".spec.nodes.env")["x-kubernetes-list-map-keys"] == ["name"]
    assert at(".status.conditions")["x-kubernetes-list-map-keys"] == ["type"]
    assert at(".spec.data.dataset")["x-kubernetes-list-type"] == "atomic"
    assert at(".status.conditions[].lastTransitionTime")["format"] == "date-time"


def test_units_and_inert_options_are_said() -> None:
    assert at(".spec.parallelism.ddpTimeout")["description"].endswith("In seconds. Default: 600.")
    assert "No effect: " in at(".spec.data.datasetNumProc")["description"]


def test_every_field_of_spec_is_guarded_or_said_to_be_free() -> None:
    guarded = {rule.field for rule in cel.changes()}
    assert guarded == {field.alias for name, field in Spec.model_fields.items() if name not in ("suspend", "run_policy", "nodes")} | {
        f"nodes.{field.alias}" for field in Nodes.model_fields.values()
    }
    assert [rule["fieldPath"] for rule in at(".spec")["x-kubernetes-validations"]][-len(guarded) :] == [f".{rule.field}" for rule in cel.changes()]


def test_messages_fit_kubernetes() -> None:
    for schema in ALL.values():
        for rule in schema.get("x-kubernetes-validations", []):
            assert 0 < len(rule["message"]) <= 2048
            assert "\n" not in rule["message"]


def test_a_description_says_the_default_because_explain_does_not() -> None:
    assert at(".spec.training.globalBatchSize")["description"].endswith("Default: 16.")
    assert at(".spec.tuning.tunerType")["description"].endswith("Default: lora.")
    assert "Default" not in at(".spec.training.lr")["description"]
    assert "Default" not in at(".spec.nodes.env")["description"]
