"""What a pod template may not ask for, unless the operator's settings allow it: whoever can make jobs must not thereby get more of a node than a trainer needs. Pure.

The rules are those of the Pod Security Standard `restricted` that give away a node, root or the operator's word that a pod has no service-account token. A namespace
under that standard refuses more (volumes of other kinds, groups), and is what guards pods that are made in other ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from finetune_operator.overlay import ROOT
from finetune_operator.problems import InvalidJob, Problem

Json = dict[str, Any]

SPEC = f"{ROOT}.spec"
ADVICE = "an administrator allows it for all jobs by the operator's setting allowPrivilegedTemplates"
HOST_FIELDS = ("hostNetwork", "hostPID", "hostIPC")
CONTAINERS = ("containers", "initContainers")


def _is_given(value: Any) -> bool:
    return value not in (None, False, "", [], {})


CONTEXT_RULES: dict[str, Callable[[Any], bool]] = {
    "privileged": _is_given,
    "allowPrivilegeEscalation": _is_given,
    "runAsUser": lambda value: value == 0 and value is not False,
    "runAsNonRoot": lambda value: value is False,
    "capabilities": lambda value: isinstance(value, dict) and _is_given(value.get("add")),
    "seccompProfile": lambda value: isinstance(value, dict) and value.get("type") == "Unconfined",
    "procMount": lambda value: value not in (None, "Default"),
}
"""Fields of a security context, and which values are refused."""
DEEPER = {"capabilities": "capabilities.add", "seccompProfile": "seccompProfile.type"}


def confine(spec: Json, template: Json) -> Json:
    """The spec of a pod with a template over it, as it may be made: what the template took away of our confinement is put back.

    Raises InvalidJob naming the field of the template for what it asks for beyond that.
    """
    problems = [Problem(path, f"a pod template may not ask for this; {ADVICE}") for path in _findings(spec, template)]
    if problems:
        raise InvalidJob(*problems)
    confined = {name: [_with_context(item, "allowPrivilegeEscalation", False) for item in spec[name]] for name in CONTAINERS if _items(spec.get(name))}
    return {**_with_context(spec, "runAsNonRoot", True), **confined, "automountServiceAccountToken": False}


def _with_context(owner: Json, name: str, value: bool) -> Json:
    """A pod or container whose security context says this, where it says nothing; one that is no mapping is left to the API server."""
    context = owner.get("securityContext")
    if not isinstance(context, dict | None) or _mapping(context).get(name) is not None:
        return owner
    return {**owner, "securityContext": {**_mapping(context), name: value}}


def _findings(spec: Json, template: Json) -> Iterator[str]:
    """API paths of what is asked for and refused."""
    yield from (f"{SPEC}.{name}" for name in HOST_FIELDS if _is_given(spec.get(name)))
    yield from _of_context(spec, SPEC)
    for name in CONTAINERS:
        for container in _items(spec.get(name)):
            yield from _of_container(container, f"{SPEC}.{name}[{_place(container, template.get(name), 'name')}]", template.get(name))
    for volume in spec["volumes"]:
        yield from _of_volume(volume, f"{SPEC}.volumes[{_place(volume, template.get('volumes'), 'name')}]")


def _of_context(owner: Json, path: str) -> Iterator[str]:
    context = _mapping(owner.get("securityContext"))
    yield from (f"{path}.securityContext.{DEEPER.get(name, name)}" for name, is_refused in CONTEXT_RULES.items() if is_refused(context.get(name)))


def _of_container(container: Json, path: str, given: Any) -> Iterator[str]:
    yield from _of_context(container, path)
    theirs = next((item for item in _items(given) if item.get("name") == container["name"]), {})
    ports = [port for port in _items(container.get("ports")) if port.get("hostPort")]
    yield from (f"{path}.ports[{_place(port, theirs.get('ports'), 'containerPort')}].hostPort" for port in ports)


def _of_volume(volume: Json, path: str) -> Iterator[str]:
    if volume.get("hostPath") is not None:
        yield f"{path}.hostPath"
    sources = _items(_mapping(volume.get("projected")).get("sources"))
    yield from (
        f"{path}.projected.sources[{index}].serviceAccountToken" for index, source in enumerate(sources) if source.get("serviceAccountToken") is not None
    )


def _place(item: Json, given: Any, key: str) -> int:
    """Where an item of a laid list stands in the template's list: all that is refused comes from there."""
    return next((index for index, each in enumerate(_items(given)) if each.get(key) == item.get(key)), 0)


def _items(value: Any) -> list[Json]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _mapping(value: Any) -> Json:
    return value if isinstance(value, dict) else {}
