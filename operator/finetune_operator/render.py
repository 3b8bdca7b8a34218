"""The manifests of jobs as text, without a cluster: what the operator would make of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from finetune_operator import kubeyaml, names
from finetune_operator.job_file import JobFile
from finetune_operator.manifests import Owner, objects
from finetune_operator.plan import Identity, cluster_place, make_plan
from finetune_operator.settings import Settings


def render(files: Iterable[JobFile], settings: Settings) -> str:
    """Service, claim and pods of the first gang of every job, as YAML documents; raises InvalidJob naming file, line and field."""
    return kubeyaml.write(manifest for file in files for manifest in _manifests(file, settings))


def _manifests(file: JobFile, settings: Settings) -> Iterator[dict[str, Any]]:
    job, owner = file.job, Owner(file.job.name, names.PLACEHOLDER_UID, file.job.namespace)
    with file.locating():
        plan = make_plan(job, settings, cluster_place(settings), Identity(names.PLACEHOLDER_UID))
        yield from objects(plan, owner, settings)
