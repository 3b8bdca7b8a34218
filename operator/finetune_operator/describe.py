"""A Plan as text for people: what would run, and what is chosen where the file is silent. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic.alias_generators import to_camel
from rich.cells import cell_len

from finetune_operator.plan import Plan, Variable
from finetune_trainer.contract import Contract, RunConfig
from finetune_trainer.resolve import Resolution

Row = tuple[str, str, str]
SECTIONS = ("model", "data", "tuning", "parallelism", "training", "checkpoints", "output")
_ABSENT = re.compile(r"Absent: (.+?)\.(?:\s|$)")
_LEFT_ABSENT = frozenset(
    (
        *("data.interleaveProb", "parallelism.decoderFirstPipelineNumLayers", "parallelism.decoderLastPipelineNumLayers"),
        *("training.lrDecayIters", "training.recomputeModules", "checkpoints.saveTotalLimit"),
    )
)
"""Options that nobody chooses: absent has a meaning of its own."""


def plan_text(plan: Plan, resolution: Resolution | None, notes: Iterable[str] = (), *, on_cpu: bool = False) -> str:
    """The whole description; ``on_cpu``: there are no GPUs for it. Without a resolution (no config.json at hand) open values are the trainer's to choose."""
    blocks = [_summary(plan, resolution, on_cpu), _environment(plan), _options(plan, resolution)]
    sentences = [*notes, *(resolution.notes if resolution else ())]
    if sentences:
        blocks.append(["Notes", *(f"  {sentence}" for sentence in sentences)])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def processes(plan: Plan, on_cpu: bool = False) -> str:
    """`2 nodes × 1 process, nvidia.com/gpu`."""
    on = "CPU" if on_cpu or plan.accelerator is None else plan.accelerator
    return f"{_count(len(plan.nodes), 'node', 'nodes')} × {_count(plan.processes_per_node, 'process', 'processes')}, {on}"


def value_text(value: Any) -> str:
    """A value as it would stand in the YAML."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False)


def _summary(plan: Plan, resolution: Resolution | None, on_cpu: bool) -> list[str]:
    config = plan.config
    rows = [
        ("model", config.model.source + (f" at {config.model.revision}" if config.model.revision else ""), ""),
        ("data", ", ".join(config.data.dataset), ""),
        ("processes", processes(plan, on_cpu), ""),
        ("results", config.run.output_dir, ""),
        ("command", " ".join(plan.command), ""),
    ]
    if resolution is not None:
        rows.append(("memory", f"about {resolution.memory_gib:.1f} GiB a process", ""))
    return [f"{plan.job.kind} {plan.job.namespace}/{plan.job.name}", *_table(rows)]


def _environment(plan: Plan) -> list[str]:
    """Environment of every node: what all share is said once."""
    shared = [variable for variable in plan.nodes[0].environment if all(variable in node.environment for node in plan.nodes)]
    lines = ["Environment of every launcher" if len(plan.nodes) > 1 else "Environment of the launcher", *_table(map(_variable, shared))]
    for node in plan.nodes if len(plan.nodes) > 1 else ():
        own = " ".join(f"{variable.name}={variable.value}" for variable in node.environment if variable not in shared)
        lines.append(f"  {node.host}: {own}")
    return lines


def _variable(variable: Variable) -> Row:
    value = variable.value if variable.value_from is None else json.dumps(variable.value_from)
    return (variable.name, "a free port" if variable.name.endswith("MASTER_PORT") and value == "0" else value or "", "")


def _options(plan: Plan, resolution: Resolution | None) -> list[str]:
    rows = list(_written(plan.config))
    chosen: list[Row] = list(_open(plan.config))
    if resolution is not None:
        chosen = [(name, value_text(value), "chosen") for name, value in resolution.chosen.items()]
    return ["Options (the rest are defaults)", *_table(rows + chosen)]


def _parts(config: RunConfig) -> Iterator[tuple[str, Contract]]:
    return ((section, getattr(config, section)) for section in SECTIONS)


def _written(config: RunConfig) -> Iterator[Row]:
    for section, part in _parts(config):
        for name, field in type(part).model_fields.items():
            value = getattr(part, name)
            if name in part.model_fields_set and value is not None and (section, name) not in (("model", "source"), ("data", "dataset")):
                yield f"{section}.{to_camel(name)}", value_text(value), "written" if value != field.default else "written, the default"


def _open(config: RunConfig) -> Iterator[Row]:
    """What is silent and has no default: the description of the option says what it will be."""
    for section, part in _parts(config):
        if section == "tuning" and config.tuning.tuner_type == "full":
            continue
        for name, field in type(part).model_fields.items():
            rule, option = _ABSENT.search(field.description or ""), f"{section}.{to_camel(name)}"
            if getattr(part, name) is None and rule and option not in _LEFT_ABSENT:
                yield option, rule[1], "chosen by the trainer"


def _table(rows: Iterable[Row]) -> list[str]:
    cells = list(rows)
    widths = [max((cell_len(row[column]) for row in cells), default=0) for column in range(2)]
    return [f"  {_fill(first, widths[0])}  {_fill(second, widths[1])}  {third}".rstrip() for first, second, third in cells]


def _fill(text: str, width: int) -> str:
    """Spaces up to a width in a terminal's cells, of which a Chinese character takes two."""
    return text + " " * (width - cell_len(text))


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
