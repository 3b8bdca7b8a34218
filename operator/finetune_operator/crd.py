"""The CustomResourceDefinition, made from the models of `schema` and `status`. Pure: a dictionary out; `generate` writes it.

A structural schema: nothing is referred to, an optional field is one that may be absent (never null), exclusive bounds are OpenAPI v3.0's. Defaults are those of
`spec` that hold for every job; a status has none, so that what is read back is what was written.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic.fields import FieldInfo

from finetune_operator import cel, names, schema
from finetune_operator.status import Status
from finetune_trainer.contract import Contract, Flag

Json = dict[str, Any]

MAX_TEXT = 32768
"""Longest string of a status whose model says nothing."""
MAX_ITEMS = 64
MAX_INT32 = 2**31 - 1
_KEPT = frozenset(
    (
        *("type", "format", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        *(
            "x-kubernetes-int-or-string",
            "x-kubernetes-preserve-unknown-fields",
            "x-kubernetes-list-type",
            "x-kubernetes-list-map-keys",
            "x-kubernetes-map-type",
        ),
    )
)

COLUMNS: tuple[tuple[str, str, str, int, str], ...] = (
    ("Phase", "string", ".status.phase", 0, "What the job is doing."),
    ("Steps", "string", ".status.progress.steps", 0, "Optimizer steps done, of all."),
    ("Loss", "number", ".status.progress.loss", 0, "Loss of the newest step."),
    ("Remaining", "string", ".status.progress.remaining", 0, "Time left in training."),
    ("Attempt", "integer", ".status.attempt", 0, "Number of the newest gang."),
    ("Age", "date", ".metadata.creationTimestamp", 0, "Time since the job was made."),
    ("Model", "string", ".spec.model.source", 1, "The model to start from."),
    ("Nodes", "integer", ".spec.nodes.count", 1, "Pods of the gang."),
    ("Message", "string", '.status.conditions[?(@.type=="Ready")].message', 1, "Of the condition Ready."),
)

DESCRIPTION = (
    "FineTuneJob fine-tunes a Hugging Face model on Megatron-core: a gang of pods trains it, proves the result and leaves adapters or weights on the work volume. "
    "Needed are spec.model.source, spec.data.dataset and, in a cluster, spec.volumes.work; for the rest the trainer chooses or a default holds. "
    f"metadata.name: {names.NAME_RULE}."
)


def custom_resource_definition() -> Json:
    """The whole CustomResourceDefinition."""
    singular = names.KIND.lower()
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": singular,
                "shortNames": ["ftj"],
                "categories": ["finetune", "mcore"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": names.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [_column(*column) for column in COLUMNS],
                    "schema": {"openAPIV3Schema": _root()},
                }
            ],
        },
    }


def _column(name: str, kind: str, path: str, priority: int, description: str) -> Json:
    column = {"name": name, "type": kind, "jsonPath": path, "description": description}
    return {**column, "priority": priority} if priority else column


def _root() -> Json:
    texts = {"apiVersion": f"Group and version of this schema: {names.API_VERSION}.", "kind": f"{names.KIND}."}
    return {
        "description": DESCRIPTION,
        "type": "object",
        "required": ["spec"],
        "properties": {
            **{key: {"description": text, "type": "string"} for key, text in texts.items()},
            "metadata": {"type": "object"},
            "spec": object_schema(schema.Spec, defaults=True),
            "status": object_schema(Status, defaults=False),
        },
        "x-kubernetes-validations": [rule.entry() for rule in cel.of(schema.FineTuneJob)],
    }


def object_schema(model: type[Contract], *, defaults: bool) -> Json:
    """The structural schema of a model and of all models inside it."""
    document = model.model_json_schema(by_alias=True)
    definitions = document.get("$defs", {})
    properties = {
        str(field.alias): _property(field, resolve(document["properties"][field.alias], definitions), defaults) for field in model.model_fields.values()
    }
    result: Json = {"description": docstring(model), "type": "object", "properties": properties}
    required = [str(field.alias) for field in model.model_fields.values() if field.is_required()]
    if required:
        result["required"] = required
    rules = [rule.entry() for rule in cel.of(model)]
    if rules:
        result["x-kubernetes-validations"] = rules
    return result


def resolve(prop: Json, definitions: dict[str, Json]) -> Json:
    """A property without `anyOf` null and with what it refers to in place; what is beside them stays."""
    parts = [part for part in prop.get("anyOf", []) if part.get("type") != "null"]
    if len(parts) == 1:
        prop = {**parts[0], **{key: value for key, value in prop.items() if key != "anyOf"}}
    if "$ref" in prop:
        prop = {**definitions[prop["$ref"].rsplit("/", 1)[1]], **prop}
    return prop


def _property(field: FieldInfo, prop: Json, defaults: bool) -> Json:
    inner = schema.model_in(field.annotation)
    if inner is None:
        result = _plain(prop)
    elif prop.get("type") == "array":
        result = {**_plain({**prop, "items": {"type": "object"}}), "items": object_schema(inner, defaults=defaults)}
    else:
        result = object_schema(inner, defaults=defaults)
    if defaults and not field.is_required() and field.default is not None:
        result = {"default": {} if isinstance(field.default, Contract) else field.default, **result}
    return {"description": _described(field, result), **{key: value for key, value in result.items() if key != "description"}}


def _described(field: FieldInfo, prop: Json) -> str:
    """The field's description, else its model's; with the default, which `kubectl explain` does not show."""
    text = description(field) or str(prop.get("description", ""))
    default = prop.get("default")
    return text if default is None or isinstance(default, dict | list) else f"{text} Default: {json.dumps(default, ensure_ascii=False).strip(chr(34))}."


def _plain(prop: Json) -> Json:
    """A property that has no model: a number, a string, a list, a map, or an object of Kubernetes' own."""
    if "x-kubernetes-int-or-string" in prop:
        return {key: value for key, value in prop.items() if key in (*_KEPT, "anyOf")}
    result = {key: value for key, value in prop.items() if key in _KEPT}
    if "const" in prop:
        result["enum"] = [prop["const"]]
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in prop:
            result |= {bound: prop[exclusive], exclusive: True}
    return result | _of_type(prop, result)


def _of_type(prop: Json, found: Json) -> Json:
    """What the API server wants to be told of a type: formats, and an end to everything."""
    match prop["type"]:
        case "integer":
            return {"format": "int32" if prop.get("maximum", MAX_INT32 + 1) <= MAX_INT32 else "int64"}
        case "number":
            return {"format": "double"}
        case "string" if not {"enum", "format", "maxLength"} & found.keys():
            return {"maxLength": MAX_TEXT}
        case "array":
            ends = {"maxItems": MAX_ITEMS, "x-kubernetes-list-type": "atomic"}
            return {**{key: value for key, value in ends.items() if key not in found}, "items": _plain(prop["items"])}
        case "object":
            return _map(prop)
    return {}


def _map(prop: Json) -> Json:
    """A map of values with one type, or an object whose fields are not ours to know."""
    values = prop.get("additionalProperties")
    if not isinstance(values, dict):
        known = {key: _plain(value) for key, value in prop.get("properties", {}).items()}
        return {"x-kubernetes-preserve-unknown-fields": True} | ({"properties": known} if known else {})
    result: Json = {"maxProperties": prop.get("maxProperties", MAX_ITEMS), "additionalProperties": _plain(values)}
    keys = prop.get("propertyNames", {})
    if "maxLength" in keys:
        rule = cel.Rule(
            f"self.all(key, size(key) >= {keys.get('minLength', 0)} && size(key) <= {keys['maxLength']})", f"a key has 1 to {keys['maxLength']} characters"
        )
        result["x-kubernetes-validations"] = [rule.entry()]
    return result


def docstring(model: type[Contract]) -> str:
    """A model's docstring in one line."""
    return " ".join((model.__doc__ or "").split())


def description(field: FieldInfo) -> str:
    """A field's description with its unit, and why it has no effect where it has none."""
    flag = next((item for item in field.metadata if isinstance(item, Flag)), Flag())
    unit = f" In {flag.unit}." if flag.unit else ""
    inert = f" No effect: {flag.inert}." if flag.inert else ""
    return f"{field.description or ''}{unit}{inert}".strip()
