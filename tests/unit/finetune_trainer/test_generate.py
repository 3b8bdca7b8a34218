"""docs/flags.md is made from the contract, and a stale one is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer import flags, generate, swift_flags
from finetune_trainer.contract import EXITS


def test_every_flag_and_exit_code_is_documented() -> None:
    text = generate.render()
    names = [option.name for option in flags.options()] + [*swift_flags.NO_EFFECT, *swift_flags.FIXED, *swift_flags.REFUSED, *swift_flags.CONVERTED]
    assert [name for name in names if f"`--{name}" not in text] == []
    assert all(f"| {row.code} | {row.reason.value} |" in text for row in EXITS)
    assert "`--output_dir`<br>formerly `--save`" in text


def test_every_row_of_a_table_has_the_cells_of_its_head() -> None:
    width = 0
    for line in generate.render().splitlines():
        cells = line.replace("\\|", "").count("|") - 1
        if line.startswith("| ---"):
            width = cells
        elif line.startswith("| `--"):
            assert cells == width, line


def test_a_stale_file_is_noticed_with_its_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"], tmp_path) == 1
    assert generate.main([], tmp_path) == 0
    assert generate.main(["--check"], tmp_path) == 0
    file = tmp_path / "flags.md"
    file.write_text(file.read_text().replace("## training", "## trainings"))
    capsys.readouterr()
    assert generate.main(["--check"], tmp_path) == 1
    assert "-## trainings\n+## training\n" in capsys.readouterr().err
