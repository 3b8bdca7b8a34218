"""docs/api.md is made from the schema."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_operator import generate

ROOT = Path(__file__).parents[3]


def test_committed_document_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert generate.main(["--check"]) == 0


def test_stale_document_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().err == "docs/api.md is stale; run make generate\n"
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


def test_every_field_is_described() -> None:
    rows = [line.split(" | ") for line in generate.api_document().split("## Environment")[0].splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row[0] for row in rows if row[3].strip(" |") == ""] == []
