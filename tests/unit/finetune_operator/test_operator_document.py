"""docs/operator.md and the README say what is so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from finetune_operator import chart, cli, job_file
from finetune_operator.status import Phase

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/operator.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str, program: str) -> list[list[str]]:
    """Words of every command line of a program, in blocks that are set in, without comments."""
    lines = re.findall(rf"^    (?:kubectl )?{program} (.*?)(?:  +#.*)?$", text.replace("\\\n", " "), re.MULTILINE)
    return [line.split() for line in lines]


def test_first_job_is_a_job(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "job.yaml"
    path.write_text(block, encoding="utf-8")
    job = job_file.load(path).job
    assert job.spec.volumes.work
    assert job.spec.volumes.work.volume_claim_template


@pytest.mark.parametrize("words", [words for text in (PAGE, README) for words in commands(text, "finetune")], ids=" ".join)
def test_commands_are_understood(words: list[str]) -> None:
    cli._parser().parse_args(words)


@pytest.mark.parametrize("text", [PAGE, README], ids=["operator.md", "README.md"])
def test_values_that_are_set_are_values_of_the_chart(text: str) -> None:
    known = json.loads(chart.values_schema())
    keys = re.findall(r"--set ([\w.]+)=", text) + re.findall(r"`((?:settings|crds|metricsService|rbac|image)\.\w+)=?", text)
    assert keys
    for key in keys:
        assert _has(known, known, key.split(".")), key


def _has(document: dict[str, Any], schema: dict[str, Any], path: list[str]) -> bool:
    if "$ref" in schema:
        return _has(document, document["$defs"][schema["$ref"].rsplit("/", 1)[1]], path)
    return not path or (path[0] in schema.get("properties", {}) and _has(document, schema["properties"][path[0]], path[1:]))


def test_every_phase_that_the_operator_gives_is_explained() -> None:
    told = re.findall(r"^\| ([A-Z]\w+) \|", PAGE, re.MULTILINE)
    assert set(told) == set(Phase) - {Phase.QUEUED}  # nothing queues jobs yet


def test_links_lead_somewhere() -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]+)(?:#([^)]*))?\)", PAGE):
        linked = ROOT / "docs" / target
        assert linked.exists(), target
        headings = [
            re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in linked.read_text(encoding="utf-8").splitlines()
            if line.startswith("#")
        ]
        assert not anchor or anchor in headings, anchor
