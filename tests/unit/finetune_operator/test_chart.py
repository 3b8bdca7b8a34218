"""The chart's generated files."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator import chart
from finetune_operator.settings import Settings

ROOT = Path(__file__).parents[3]
CRD = "# A definition.\napiVersion: apiextensions.k8s.io/v1\nmetadata:\n  name: things\nspec:\n  description: 'Fills {{NAME}} in'\n"


def test_chart_has_the_version_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    described = yaml.safe_load((ROOT / chart.CHART / "Chart.yaml").read_text())
    assert (described["version"], described["appVersion"]) == (project, project)


def test_values_are_the_defaults_each_under_its_description() -> None:
    text = chart.values_file()
    assert yaml.safe_load(text) == chart.Values().model_dump(mode="json", by_alias=True, exclude={"global_"})
    assert "  # Lease by which replicas agree on the one that acts.\n  leaseName: " in text
    assert max(map(len, text.splitlines())) <= chart.LINE_LENGTH


def test_schema_knows_every_setting_and_nothing_else() -> None:
    schema = json.loads(chart.values_schema())
    settings: dict[str, Any] = schema["$defs"]["Settings"]
    assert set(settings["properties"]) == set(Settings().model_dump(by_alias=True))
    assert not settings["additionalProperties"]
    assert not schema["additionalProperties"]


def test_definition_is_kept_and_its_braces_are_not_helms() -> None:
    template = chart.crd_template(CRD)
    assert "metadata:\n  annotations:\n    helm.sh/resource-policy: keep\n  name: things\n" in template
    assert """'Fills {{ "{{" }}NAME}} in'""" in template
    assert template.count("{{- if .Values.crds.enabled }}") == 1


@pytest.mark.parametrize("crd", ["kind: Thing\n", CRD.replace("  name:", "  annotations: {}\n  name:")])
def test_definition_that_cannot_be_annotated_is_refused(crd: str) -> None:
    with pytest.raises(ValueError, match="must have `metadata` without annotations"):
        chart.crd_template(crd)
