"""A user's pod template laid over a pod of ours, by the rules of Kubernetes' strategic-merge patch. Pure.

Maps are merged. Of the lists, those that Kubernetes knows by a key are merged item by item (containers, ports, mounts, ...), all others are replaced. A volume or a variable
is one of several kinds, so it is replaced whole by one of the same name. null, or `$patch: delete`, takes away; `$patch: replace` replaces a whole map or list.
What the gang needs is put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_operator import names
from finetune_operator.problems import InvalidJob, Problem

Json = dict[str, Any]

ROOT = "spec.nodes.podTemplate"
KEYS = {
    **dict.fromkeys(("containers", "initContainers", "volumes", "imagePullSecrets", "env", "schedulingGates", "resourceClaims"), "name"),
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}
"""Lists of a pod that are merged by the value of one field; Kubernetes' patchMergeKey."""
UNIONS = frozenset(("volumes", "env"))
"""Lists of which an item is one of several kinds: of two with the same key the later one counts, whole."""
DIRECTIVE = "$patch"
GANG_FIELDS = ("hostname", "subdomain", "restartPolicy")
CONTAINER_FIELDS = ("command", "terminationMessagePath", "terminationMessagePolicy")
NO_FIELDS_OF_A_TRAINER = ("args", "restartPolicy", "restartPolicyRules")
"""What a template cannot give to the trainer's container: a gang is started anew as a whole."""


def lay(template_metadata: Json, template_spec: Json, pod: Json, *, kept_mounts: frozenset[str]) -> Json:
    """The pod with a template over it; ``kept_mounts``: paths whose mounts and volumes stay ours. Raises InvalidJob naming the field of the template."""
    spec = merge(pod["spec"], template_spec, f"{ROOT}.spec")
    described = merge_metadata(metadata(template_metadata, f"{ROOT}.metadata"), pod["metadata"])
    return {**pod, "metadata": described, "spec": _with_the_gangs(spec, pod["spec"], kept_mounts)}


def metadata(given: Json, path: str) -> Json:
    """Labels and annotations that a template gives to what is made from it; raises InvalidJob for all else."""
    for key, values in given.items():
        if values is None:
            continue
        if key not in ("labels", "annotations"):
            raise _problem(f"{path}.{key}", "a template gives labels and annotations only")
        if not isinstance(values, dict):
            raise _problem(f"{path}.{key}", f"it must be a mapping {_found(values)}")
        for name, value in values.items():
            if not isinstance(value, str):
                raise _problem(f"{path}.{key}.{name}", f"it must be a string; put it in quotes {_found(value)}")
    return {key: values for key, values in given.items() if values is not None}


def merge_metadata(given: Json, ours: Json) -> Json:
    """Our metadata with the labels and annotations of a template; of two with the same name ours stays."""
    parts = {key: {**given.get(key, {}), **ours.get(key, {})} for key in ("labels", "annotations")}
    return {**ours, **{key: values for key, values in parts.items() if values}}


def merge(ours: Json, theirs: Any, path: str) -> Json:
    """One map over another."""
    if not isinstance(theirs, dict):
        raise _problem(path, f"it must be a mapping {_found(theirs)}")
    if _directive(theirs, path) == "replace":
        return _instead(ours, theirs, path)
    merged = dict(ours)
    for key, value in theirs.items():
        if key == DIRECTIVE:
            continue
        if value is None or (isinstance(value, dict) and _directive(value, f"{path}.{key}") == "delete"):
            merged.pop(key, None)
        else:
            merged[key] = _value(ours.get(key), value, key, f"{path}.{key}")
    return merged


def _instead(ours: Json, theirs: Json, path: str) -> Json:
    """One map in place of another; what is a list in ours must be one in theirs."""
    lists: Json = {key: [] for key, value in ours.items() if key in KEYS and isinstance(value, list)}
    merged = merge(lists, _without(theirs, DIRECTIVE), path)
    return {key: value for key, value in merged.items() if key in theirs}


def _value(ours: Any, theirs: Any, key: str, path: str) -> Any:
    if key in KEYS and (isinstance(theirs, list) or isinstance(ours, list)):
        return _list(ours or [], theirs, key, path)
    if isinstance(theirs, dict):
        if ours is not None and not isinstance(ours, dict):
            raise _problem(path, f"it must not be a mapping {_found(theirs)}")
        return merge(ours or {}, theirs, path)
    if isinstance(ours, dict | list) and type(theirs) is not type(ours):
        raise _problem(path, f"it must be a {'mapping' if isinstance(ours, dict) else 'list'} {_found(theirs)}")
    return theirs


def _list(ours: list[Json], theirs: Any, name: str, path: str) -> list[Json]:
    """One list over another, item by item; what is new comes last."""
    key = KEYS[name]
    items = dict(_keyed(theirs, key, path))
    if any(item == {DIRECTIVE: "replace"} for item in theirs):
        ours = []
    merged: dict[Any, Json] = {item[key]: item for item in ours}
    for value, (place, item) in items.items():
        if _directive(item, place) == "delete":
            merged.pop(value, None)
        elif name in UNIONS:
            merged[value] = _without_directives(item)
        elif _directive(item, place) == "replace":
            merged[value] = _instead(merged.get(value, {}), item, place)
        else:
            merged[value] = merge(merged.get(value, {}), item, place)
    return list(merged.values())


def _keyed(items: Any, key: str, path: str) -> Iterator[tuple[Any, tuple[str, Json]]]:
    """Each item of a list with its key and its place."""
    if not isinstance(items, list):
        raise _problem(path, f"it must be a list {_found(items)}")
    seen: set[Any] = set()
    for index, item in enumerate(items):
        place = f"{path}[{index}]"
        if not isinstance(item, dict):
            raise _problem(place, f"it must be a mapping {_found(item)}")
        if item == {DIRECTIVE: "replace"}:
            continue
        value = item.get(key)
        if not isinstance(value, str | int):
            raise _problem(f"{place}.{key}", "it is required")
        if value in seen:
            raise _problem(f"{place}.{key}", f"{value} is given twice")
        seen.add(value)
        yield value, (place, item)


def _directive(value: Json, path: str) -> str | None:
    """`delete`, `replace` or nothing; raises InvalidJob for directives that are not known here."""
    unknown = next((key for key in value if key.startswith("$") and key != DIRECTIVE), None)
    if unknown is not None:
        raise _problem(f"{path}.{unknown}", f"this directive is not supported; {DIRECTIVE} is")
    directive = value.get(DIRECTIVE)
    if directive not in (None, "delete", "replace", "merge"):
        raise _problem(f"{path}.{DIRECTIVE}", f"it must be delete, replace or merge {_found(directive)}")
    return directive


def _without_directives(value: Json) -> Json:
    return {key: item for key, item in value.items() if key != DIRECTIVE and item is not None}


def _with_the_gangs(spec: Json, ours: Json, kept_mounts: frozenset[str]) -> Json:
    """The merged spec with what the gang needs as we made it."""
    containers, path = spec.get("containers"), f"{ROOT}.spec.containers"
    trainer = next((item for item in containers or [] if item["name"] == names.TRAINER_CONTAINER), None)
    if trainer is None:
        raise _problem(path, f"the container {names.TRAINER_CONTAINER} must stay")
    own = ours["containers"][0]
    kept = [mount for mount in own["volumeMounts"] if mount["mountPath"] in kept_mounts]
    volumes = {mount["name"]: volume for mount in kept for volume in ours["volumes"] if volume["name"] == mount["name"]}
    trainer = _without(trainer, *NO_FIELDS_OF_A_TRAINER) | {name: own[name] for name in CONTAINER_FIELDS}
    trainer["env"] = _environment(_listed(trainer, "env", path), own["env"])
    trainer["volumeMounts"] = [*kept, *(mount for mount in _listed(trainer, "volumeMounts", path) if mount["mountPath"] not in kept_mounts)]
    return {
        **spec,
        **{name: ours[name] for name in GANG_FIELDS},
        "containers": [trainer if item["name"] == names.TRAINER_CONTAINER else item for item in containers or []],
        "volumes": [*volumes.values(), *(volume for volume in spec.get("volumes", []) if volume["name"] not in volumes)],
    }


def _listed(container: Json, name: str, path: str) -> list[Json]:
    """A list of a container that may have replaced ours whole."""
    items = container.get(name, [])
    if not isinstance(items, list):
        raise _problem(f"{path}[{container['name']}].{name}", f"it must be a list {_found(items)}")
    return items


def _environment(merged: list[Json], ours: list[Json]) -> list[Json]:
    """The merged variables, of which those of the gang are ours."""
    gang = {variable["name"]: variable for variable in ours if names.is_gang_environment(variable["name"])}
    return [*(variable for variable in merged if not names.is_gang_environment(variable["name"])), *gang.values()]


def _without(value: Json, *keys: str) -> Json:
    return {name: item for name, item in value.items() if name not in keys}


def _found(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return f"(found {kinds.get(type(value), repr(value))})"


def _problem(path: str, message: str) -> InvalidJob:
    return InvalidJob(Problem(path, message))
