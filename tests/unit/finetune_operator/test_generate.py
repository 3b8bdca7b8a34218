"""docs/api.md, the CustomResourceDefinition and the chart's files are made from the models."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_operator import generate, status

ROOT = Path(__file__).parents[3]


def test_committed_document_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert generate.main(["--check"]) == 0


def test_stale_document_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().err.splitlines() == [f"{path} is stale; run make generate" for path in generate.documents()]
    assert {str(path) for path in generate.documents()} >= {"docs/api.md", "crds/finetune.mcore.dev_finetunejobs.yaml"}
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


def test_every_field_is_described() -> None:
    rows = [line.split(" | ") for line in generate.api_document().split("## Reasons")[0].splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert [row[0] for row in rows if row[3].strip(" |") == ""] == []


def test_every_reason_says_whether_it_is_retried_and_what_to_do() -> None:
    section = generate.api_document().split("## Reasons, and what to do")[1].split("## Exit codes")[0]
    rows = {cells[1]: cells[2:5] for line in section.splitlines() if len(cells := [cell.strip() for cell in line.split("|")]) == 6}
    assert set(status.REASONS) <= rows.keys()
    assert all(cell for row in rows.values() for cell in row)
    assert [rows[reason][1] for reason in ("OutOfMemory", "NodeLost", "Preempted", "NameConflict")] == ["no", "yes, counted", "yes, not counted", "waits"]


def test_a_stale_definition_alone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate.main([]) == 0
    generate.CRD_FILE.write_text("other")
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().err == "crds/finetune.mcore.dev_finetunejobs.yaml is stale; run make generate\n"


def test_every_phase_and_condition_is_explained() -> None:
    assert list(generate.PHASES) == list(status.Phase)
    assert list(generate.CONDITIONS) == list(status.ConditionType)
    document = generate.api_document()
    assert "| Restarting | A gang ended before its time" in document
    assert "| `phase` | Pending \\| Initializing \\| Queued" in document
