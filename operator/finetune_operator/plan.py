"""spec + settings -> Plan: what every node of the gang runs, with which environment, and the trainer's RunConfig. Pure.

The same Plan becomes pods in a cluster and local processes in `finetune run`; they differ in their `Place` only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic.alias_generators import to_camel

from finetune_operator import names
from finetune_operator.problems import InvalidJob, Problem
from finetune_operator.schema import FineTuneJob, Spec
from finetune_operator.settings import Settings
from finetune_trainer.contract import Contract, ModelConfig, RunConfig, RunContext

LAUNCHER = ("megatron", "launch")
UNBUILT_SCHEMES = {"ms": "ModelScope", "pvc": "a PersistentVolumeClaim", "s3": "object storage"}


@dataclass(frozen=True)
class Place:
    """Where a gang runs: what a pod and a process on this machine do not share."""

    kind: Literal["cluster", "local"]
    work: str
    """Folder of all results."""
    relative_to: str
    """What `./` means in a source or a dataset."""
    run_file: str
    """RunConfig's path; `{output_dir}` in it is the folder of the run's results."""
    progress_host: str
    progress_port: int
    master_port: int
    master_address: str | None = None
    """Absent: the host name of node 0."""
    cache: str | None = None
    """Folder of the shared cache; absent: the user's own."""
    termination_message_path: str | None = None


@dataclass(frozen=True)
class Identity:
    """Which run of a job this is."""

    uid: str
    attempt: int = 1


@dataclass(frozen=True)
class Variable:
    """One environment variable: a value, or where Kubernetes takes it from."""

    name: str
    value: str | None = None
    value_from: dict[str, Any] | None = None


@dataclass(frozen=True)
class NodePlan:
    """One launcher: a pod in a cluster, a process here."""

    index: int
    host: str
    environment: tuple[Variable, ...]


@dataclass(frozen=True)
class Plan:
    """One gang, whole."""

    job: FineTuneJob
    config: RunConfig
    command: tuple[str, ...]
    nodes: tuple[NodePlan, ...]
    processes_per_node: int
    accelerator: str | None
    """Kubernetes resource, one per process; None: CPU."""
    master_port: int
    """Of the gang's rendezvous on node 0; 0: a free one."""

    @property
    def world_size(self) -> int:
        return len(self.nodes) * self.processes_per_node

    @cached_property
    def run_config(self) -> str:
        """RunConfig as one line of JSON: the same in every pod of the gang."""
        return self.config.dump(one_line=True)


def cluster_place(settings: Settings) -> Place:
    """Where pods run."""
    return Place(
        kind="cluster",
        work=settings.work_mount,
        relative_to=settings.work_mount,
        run_file=settings.run_file,
        progress_host="0.0.0.0",
        progress_port=settings.progress_port,
        master_port=settings.master_port,
        cache=settings.cache_mount,
        termination_message_path=settings.termination_message_path,
    )


def make_plan(job: FineTuneJob, settings: Settings, place: Place, identity: Identity) -> Plan:
    """Plan one gang of a job; raises InvalidJob naming the field."""
    if place.kind == "cluster" and job.spec.volumes.work is None and settings.work_claim is None:
        raise InvalidJob(Problem("spec.volumes.work", "it is required in a cluster: {claimName: ...} or {volumeClaimTemplate: ...}"))
    config = _run_config(job, settings, place, identity)
    run_file = place.run_file.format(output_dir=config.run.output_dir)
    nodes = job.spec.nodes
    return Plan(
        job=job,
        config=config,
        command=(*LAUNCHER, run_file),
        nodes=tuple(NodePlan(index, names.host(job.name, index), _environment(job, place, index)) for index in range(nodes.count)),
        processes_per_node=nodes.processes_per_node,
        accelerator=nodes.accelerator.resource,
        master_port=place.master_port,
    )


def _run_config(job: FineTuneJob, settings: Settings, place: Place, identity: Identity) -> RunConfig:
    spec = job.spec
    model = ModelConfig(**{name: getattr(spec.model, name) for name in ModelConfig.model_fields})
    datasets = [_locate(dataset, place, f"spec.data.dataset[{index}]") for index, dataset in enumerate(spec.data.dataset)]
    return RunConfig(
        model=model.model_copy(update={"source": _locate(model.source, place, "spec.model.source")}),
        data=spec.data.model_copy(update={"dataset": datasets}),
        tuning=spec.tuning,
        parallelism=spec.parallelism,
        training=spec.training,
        checkpoints=spec.checkpoints,
        output=spec.output,
        run=RunContext(
            name=job.name,
            namespace=job.namespace,
            uid=identity.uid,
            attempt=identity.attempt,
            output_dir=names.result_folder(place.work, job.namespace, job.name, identity.uid),
            progress_host=place.progress_host,
            progress_port=place.progress_port,
            termination_message_path=place.termination_message_path,
            grace_seconds=settings.grace_seconds,
        ),
    )


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def _locate(source: str, place: Place, field: str) -> str:
    """A source or dataset as the trainer takes it: an absolute path, or an id; `#N` stays. Raises InvalidJob for the rest."""
    scheme = _SCHEME.match(source)
    if scheme and scheme[1] == "hf":
        return scheme[2]
    if scheme:
        what = f"{UNBUILT_SCHEMES[scheme[1]]} is not supported yet" if scheme[1] in UNBUILT_SCHEMES else "this scheme is unknown"
        raise InvalidJob(Problem(field, f"{source}: {what}; give a Hugging Face id (hf://ORG/NAME or ORG/NAME) or a path that begins with / or ./"))
    if source.startswith(("../", "~")) or source in (".", ".."):
        raise InvalidJob(Problem(field, f"{source}: a path must begin with / or ./, which is {_RELATIVE[place.kind]}"))
    if source.startswith("./"):
        return f"{place.relative_to.rstrip('/')}/{source[2:]}"
    return source


_RELATIVE = {"local": "the YAML's folder", "cluster": "the work volume"}


def _environment(job: FineTuneJob, place: Place, node: int) -> tuple[Variable, ...]:
    """What one node's launcher gets. Of two equal names the later one counts: defaults, then the user's, then the gang's."""
    spec = job.spec
    given = [Variable(variable.name, variable.value if variable.value_from is None else None, variable.value_from) for variable in spec.nodes.env]
    merged = {variable.name: variable for variable in (*_defaults(spec, place), *given, *_gang(job, place, node))}
    return tuple(merged.values())


def _defaults(spec: Spec, place: Place) -> list[Variable]:
    variables = [Variable("PYTHONUNBUFFERED", "1")]
    if place.cache is not None:
        variables.append(Variable("HF_HOME", f"{place.cache.rstrip('/')}/huggingface"))
    if place.kind == "cluster" and spec.model.token_secret_ref is not None:
        variables.append(Variable("HF_TOKEN", value_from={"secretKeyRef": spec.model.token_secret_ref.model_dump(mode="json")}))
    return variables


def _gang(job: FineTuneJob, place: Place, node: int) -> list[Variable]:
    """PyTorchJob's variables, and torchrun's. RANK counts nodes and WORLD_SIZE processes, as there; the launcher sets those of each process."""
    nodes = job.spec.nodes
    address = place.master_address or names.master_address(job.name)
    values: dict[str, str | int] = {
        "RANK": node,
        "WORLD_SIZE": nodes.world_size,
        "NNODES": nodes.count,
        "NODE_RANK": node,
        "NPROC_PER_NODE": nodes.processes_per_node,
        "MASTER_ADDR": address,
        "MASTER_PORT": place.master_port,
        "PET_NNODES": nodes.count,
        "PET_NODE_RANK": node,
        "PET_NPROC_PER_NODE": nodes.processes_per_node,
        "PET_MASTER_ADDR": address,
        "PET_MASTER_PORT": place.master_port,
    }
    return [Variable(name, str(value)) for name, value in values.items()]


def cluster_only_fields(job: FineTuneJob) -> list[str]:
    """API paths of the fields that were written, other than as their default, and mean something in a cluster only."""
    spec = job.spec
    parts: list[tuple[str, Any, frozenset[str]]] = [
        ("", spec, frozenset(("suspend", "volumes", "run_policy"))),
        ("model.", spec.model, frozenset(("token_secret_ref",))),
        ("nodes.accelerator.", spec.nodes.accelerator, frozenset(("resource_name",))),
        ("nodes.", spec.nodes, frozenset(("image", "resources", "shared_memory", "node_selector", "tolerations", "pod_template"))),
    ]
    written = [
        f"{prefix}{to_camel(name)}"
        for prefix, part, fields in parts
        for name, field in type(part).model_fields.items()
        if name in fields & part.model_fields_set and _is_given(getattr(part, name), field.default)
    ]
    return written + [f"nodes.env[{index}].valueFrom" for index, variable in enumerate(spec.nodes.env) if variable.value_from is not None]


def _is_given(value: Any, default: Any) -> bool:
    content = value.model_dump(exclude_defaults=True) if isinstance(value, Contract) else value
    return value != default and content not in ({}, [], None)
