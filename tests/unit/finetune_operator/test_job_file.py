"""A file with one FineTuneJob: what is found in it, and where a problem is."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_operator import job_file
from finetune_operator.problems import InvalidJob, Problem
from finetune_trainer.contract import ConfigurationError, DataError
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
        (
            HEAD + REST + "  training:\n    lrr: 1\n    seeed: 1\n",
            "FILE:8: spec.training.lrr: unknown field; did you mean 'lr'?\nFILE:9: spec.training.seeed: unknown field; did you mean 'seed'?",
        ),
        (HEAD + REST + "  training:\n    lrr:\n", "FILE:8: spec.training.lrr: unknown field; did you mean 'lr'?"),
        (HEAD + "  model: {source: a/b}\n  data:\n", "FILE:6: spec.data: it is required"),
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


def test_null_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(HEAD + REST + "  training:\n  tuning: {loraRank: ~}\n  nodes:\n    count: null\n    podTemplate: {spec: {nodeName: null}}\n")
    spec = job_file.load(path).job.spec
    assert spec.training.global_batch_size == 16
    assert "lora_rank" not in spec.tuning.model_fields_set
    assert spec.nodes.count == 1
    assert spec.nodes.pod_template is not None
    assert spec.nodes.pod_template.spec == {"nodeName": None}


@pytest.mark.parametrize(
    ("sentence", "located"),
    [
        ("training.lr is 1", "FILE:12: spec.training.lr is 1"),
        ("data.dataset[0]: /x: no such file", "FILE:10: spec.data.dataset[0]: /x: no such file"),
        ("model.safetensors is truncated", "model.safetensors is truncated"),
        ("rows.jsonl:3: no messages", "rows.jsonl:3: no messages"),
    ],
)
def test_refusal_of_the_engine_is_located_where_it_names_an_option(tmp_path: Path, sentence: str, located: str) -> None:
    file = load_job(tmp_path, training={"lr": 1.0})
    with pytest.raises(DataError) as error, file.locating():
        raise DataError(sentence)
    assert str(error.value) == located.replace("FILE", str(file.path))
