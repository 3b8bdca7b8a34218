"""Every example in, the Kubernetes objects of its first gang out. `--update-golden` writes the files anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_operator import job_file, render
from finetune_operator.settings import Settings

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
SETTINGS = Settings(work_claim="results", trainer_image="registry.example/trainer:1.0")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_manifests_of_an_example(example: Path, update_golden: bool) -> None:
    path = Path(__file__).with_name("render") / f"{example.stem}.yaml"
    text = render.render(job_file.load_all(example), SETTINGS)
    if update_golden:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
