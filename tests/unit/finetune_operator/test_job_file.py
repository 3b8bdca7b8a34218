"""A file with one FineTuneJob: what is found in it, and where a problem is."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_operator import job_file
from finetune_operator.problems import InvalidJob, Problem
from finetune_trainer.contract import ConfigurationError
from jobs import load_job, write_job

HEAD = "apiVersion: finetune.mcore.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: a}\nspec:\n"
REST = "  model: {source: a/b}\n  data: {dataset: [c/d]}\n"


def refusal(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigurationError) as error:
        job_file.load(path)
    return str(error.value).replace(str(path), "FILE")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + REST + "  training:\n    lr: 1e-4\n    minLr: x\n", 'FILE:9: spec.training.minLr: it must be a valid number (found "x")'),
        (HEAD + REST + "  training:\n    seed: 1\n    lrr: 1\n", "FILE:9: spec.training.lrr: unknown field; did you mean 'lr'?"),
        (HEAD + REST + "  tuning:\n    tunerType: full\n    loraRank: 1\n", "FILE:9: spec.tuning: loraRank is set; it needs tunerType lora (found full)"),
        (
            HEAD + REST + "  nodes:\n    env:\n    - name: A\n    - name: RANK\n",
            "FILE:10: spec.nodes.env[1].name: RANK is set by the gang itself and cannot be given",
        ),
        (HEAD + "  model: {source: a/b}\n", "FILE:4: spec.data: it is required"),
        (HEAD + REST + "  data: {}\n", "FILE: line 7: spec.data is written twice (first on line 6)"),
        ("kind: ConfigMap\nmetadata: {name: x}\n", "FILE: it must hold one FineTuneJob (found ConfigMap/x)"),
        ("", "FILE: it must hold one FineTuneJob (found an empty file)"),
        (HEAD + REST + "---\n" + HEAD + REST, "FILE: it must hold one FineTuneJob (found 2 (FineTuneJob/a, FineTuneJob/a))"),
        ("just text\n", "FILE:1: a FineTuneJob is a mapping that begins with apiVersion: finetune.mcore.dev/v1alpha1 and kind: FineTuneJob"),
        ("metadata: {name: x}\n", "FILE:1: apiVersion: it must be finetune.mcore.dev/v1alpha1 (found nothing)"),
    ],
)
def test_refusal_names_file_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path / "job.yaml", text) == message


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read .*none\.yaml: No such file or directory"):
        job_file.load(tmp_path / "none.yaml")


def test_other_objects_of_the_file_are_kept_by_name(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("kind: PersistentVolumeClaim\nmetadata: {name: results}\n---\n" + HEAD + REST)
    file = job_file.load(path)
    assert file.others == ("PersistentVolumeClaim/results",)
    assert file.job.name == "a"


def test_folder_is_the_files_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_job(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert job_file.load(path.relative_to(tmp_path.parent)).folder == tmp_path


def test_later_problems_are_located_too(tmp_path: Path) -> None:
    file = load_job(tmp_path)
    with pytest.raises(InvalidJob) as error, file.locating():
        raise InvalidJob(Problem("spec.model.source", "no"))
    line = (tmp_path / "job.yaml").read_text().splitlines().index("    source: org/model") + 1
    assert str(error.value) == f"{file.path}:{line}: spec.model.source: no"
