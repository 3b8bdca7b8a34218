"""What the machine has; nvidia-smi is a small program that answers as the real one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_operator import machine
from finetune_operator.plan import Identity, Place, Plan, make_plan
from finetune_operator.settings import Settings
from finetune_trainer.contract import ConfigurationError, DataError, EngineError, ModelError
from jobs import make_job

PLACE = Place("local", "/w", "/y", "{output_dir}/run.json", "127.0.0.1", 0, 1, "127.0.0.1")


def make(source: str = "org/model", **nodes: object) -> Plan:
    return make_plan(make_job(model={"source": source}, nodes=nodes), Settings(), PLACE, Identity("u" * 8))


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '0, GPU-aa11, 81920\\n1, GPU-bb22, 40960\\n2, GPU-cc33, [N/A]\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [("0", 80.0), ("1", 40.0), ("2", 0.0)]),
        (" 1 , 0", [("1", 40.0), ("0", 80.0)]),
        ("GPU-bb22,GPU-a", [("GPU-bb22", 40.0), ("GPU-a", 80.0)]),
        ("MIG-1234,2", [("MIG-1234", 0.0), ("2", 0.0)]),
        ("1", [("1", 40.0)]),
        ("", []),
        ("-1", []),
    ],
)
def test_gpus_are_those_that_cuda_visible_devices_leaves(visible: str | None, expected: list[tuple[str, float]]) -> None:
    assert machine.visible_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_machine_without_nvidia_smi_has_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.visible_gpus({}) == []


@pytest.mark.usefixtures("gpus")
def test_memory_is_the_least_of_the_gpus_that_are_used() -> None:
    assert machine.this_machine(make(processesPerNode=2), {}).memory_gib == 40.0
    assert machine.this_machine(make(processesPerNode=1), {}).memory_gib == 80.0
    assert machine.this_machine(make(processesPerNode=4), {}).device == "cpu"
    assert machine.this_machine(make(processesPerNode=3), {}).memory_gib == 0
    assert machine.this_machine(make(accelerator={"type": "CPU"}), {}).device == "cpu"


def test_memory_of_a_gpu_that_is_elsewhere_is_believed() -> None:
    found = machine.this_machine(make(count=2, processesPerNode=4), {}, 24.0)
    assert (found.device, found.world_size, found.memory_gib) == ("cuda", 8, 24.0)


def test_config_json_is_found_in_the_models_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert machine.find_config(make(str(tmp_path)).config, {}) == {"model_type": "llama"}


def test_config_json_is_found_in_the_hugging_face_cache(tmp_path: Path) -> None:
    model = tmp_path / "hub" / "models--org--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    (model / "snapshots" / "abc").mkdir(parents=True)
    (model / "snapshots" / "abc" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert machine.find_config(make().config, {"HF_HOME": str(tmp_path)}) == {"model_type": "qwen2"}
    assert machine.find_config(make().config, {"HF_HUB_CACHE": str(tmp_path / "hub")}) == {"model_type": "qwen2"}
    assert machine.find_config(make("org/other").config, {"HF_HOME": str(tmp_path)}) is None


def test_broken_config_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"model\.source: cannot read .*config\.json"):
        machine.find_config(make(str(tmp_path)).config, {})


@pytest.mark.parametrize(
    ("source", "dataset", "kind", "message"),
    [
        ("/no/model", "org/rows", ModelError, "model.source: there is no folder /no/model"),
        ("{folder}/rows.jsonl", "org/rows", ModelError, "model.source: {folder}/rows.jsonl is a file; it must be a Hugging Face model folder or a hub id"),
        ("{folder}", "org/rows", ModelError, "model.source: {folder} is not a Hugging Face model folder: it has no config.json"),
        ("org/model", "/no/rows.jsonl#5", DataError, "data.dataset[0]: /no/rows.jsonl: no such file or folder"),
    ],
)
def test_path_that_leads_nowhere_is_refused(tmp_path: Path, source: str, dataset: str, kind: type[EngineError], message: str) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    job = make_job(model={"source": source.format(folder=tmp_path)}, data={"dataset": [dataset]})
    with pytest.raises(kind) as error:
        machine.check_sources(make_plan(job, Settings(), PLACE, Identity("u" * 8)).config)
    assert str(error.value) == message.format(folder=tmp_path)


def test_ids_and_paths_that_are_there_pass(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("")
    job = make_job(model={"source": str(tmp_path)}, data={"dataset": [f"{tmp_path}/rows.jsonl#5", "org/rows"]})
    machine.check_sources(make_plan(job, Settings(), PLACE, Identity("u" * 8)).config)
