"""Verification of exported results: it passes for what the trainer holds, and names what was tampered with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from factories import make_rows, make_tiny_model
from finetune_trainer.contract import RunConfig, Verification
from finetune_trainer.verify import Comparison, compare
from gang import Gang

FORMATS = ("peft", "huggingface", "megatron")


def make_config(folder: Path, rows: Path, **sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"source": str(folder), "torchDtype": "float32", **sections.get("model", {})},
            "data": {"dataset": [str(rows)], "maxLength": 512},
            "tuning": {"loraRank": 4, "loraAlpha": 16, "loraDropout": 0.0, "targetModules": ["all-linear"], "useRslora": False},
            "parallelism": {"tensorModelParallelSize": 1, "pipelineModelParallelSize": 1, **sections.get("parallelism", {})},
            "output": {"formats": list(FORMATS), "verification": "Logits", **sections.get("output", {})},
            "run": {"outputDir": str(folder.parent)},
        }
    )


def export_and_check(config: RunConfig, folder: Path, tampering: Any) -> Verification:
    """Adapters of random weights, exported in every format, tampered with by rank 0, verified."""
    from torch import distributed

    from finetune_trainer import __main__ as program
    from finetune_trainer import convert, data, families, hf_files, lora, model, parallel, verify

    parallel.open_process_group(config)
    ranks = parallel.initialize(config.parallelism, 1)
    hf = hf_files.open_model(config.model)
    family = families.find(hf.config)
    chunks = model.build(family, hf.config, config, ranks)
    convert.import_base(chunks, family, hf, ranks)
    lora.attach(chunks, config.tuning, 1)
    for name, layer in lora.adapters(chunks):
        fill(name, layer.lora_B.weight, ranks)
    artifacts = [(kind, folder / kind) for kind in config.output.formats or []]
    for kind, target in artifacts:
        program.export(kind, target, chunks, family, hf, config, ranks, 1)
    if ranks.rank == 0 and tampering is not None:
        tampering(folder)
    distributed.barrier()
    rows = data.open_rows(config.data, data.load_tokenizer(hf.folder)).rows
    return verify.check(chunks, family, hf, config, ranks, rows, artifacts)


def fill(name: str, weight: torch.Tensor, ranks: Any) -> None:
    """Values that differ over the tensor-parallel ranks exactly where the matrix is cut."""
    is_cut = getattr(weight, "tensor_model_parallel", False)
    generator = torch.Generator().manual_seed(len(name) * 100 + (ranks.tp.rank if is_cut else 0))
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)


def change_a_byte(folder: Path) -> None:
    file = folder / "peft" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def change_a_tensor(folder: Path) -> None:
    """As a faulty export would: the manifest agrees with the file."""
    file = folder / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if ".layers.2." in name and name.endswith("down_proj.lora_B.weight"))
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    rewrite_manifest(folder / "peft", file)


def change_the_rotary_base(folder: Path) -> None:
    file = folder / "huggingface" / "config.json"
    config = json.loads(file.read_text())
    for part in (config, config.get("rope_parameters", {})):
        if "rope_theta" in part:
            part["rope_theta"] *= 2
    file.write_text(json.dumps(config))
    rewrite_manifest(folder / "huggingface", file)


def rewrite_manifest(folder: Path, file: Path) -> None:
    from finetune_trainer import hf_files

    path = folder / hf_files.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][file.name] = hf_files.describe_file(file)
    path.write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("data"), 20)


@pytest.mark.parametrize(
    ("family", "parallelism"),
    [
        ("llama", {"tensorModelParallelSize": 2}),
        ("qwen2", {"tensorModelParallelSize": 2, "sequenceParallel": True}),
        ("qwen3", {"pipelineModelParallelSize": 2}),
        ("qwen3", {}),
    ],
)
def test_every_format_of_an_honest_export_is_the_model(family: str, parallelism: dict[str, Any], gang2: Gang, rows: Path, tmp_path: Path) -> None:
    config = make_config(make_tiny_model(family, tmp_path / "model"), rows, parallelism=parallelism)
    found = gang2.run(export_and_check, config, tmp_path, None)
    assert found[0] == found[1]
    assert found[0].passed, found[0].message
    assert found[0].max_logit_difference is not None
    assert 0 < found[0].max_logit_difference < 1e-5


def test_bfloat16_is_compared_in_its_own_type_and_in_float32(gang1: Gang, rows: Path, tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "model", torch_dtype="bfloat16")
    config = make_config(model, rows, model={"torchDtype": "bfloat16"}, output={"formats": ["peft", "huggingface"]})
    found = gang1.run(export_and_check, config, tmp_path, None)[0]
    assert found.passed, found.message


@pytest.mark.parametrize(
    ("tampering", "complaint"),
    [
        (change_a_byte, "adapter_model.safetensors"),
        (change_a_tensor, "decoder.layers.2.mlp.linear_fc2"),
        (change_the_rotary_base, r"the first layer that differs is decoder\.layers\.0"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_result_that_is_not_the_model_is_refused_and_named(tampering: Any, complaint: str, gang2: Gang, rows: Path, tmp_path: Path) -> None:
    import re

    config = make_config(make_tiny_model("qwen2", tmp_path / "model"), rows, parallelism={"tensorModelParallelSize": 2}, output={"verification": "Adapter"})
    found = gang2.run(export_and_check, config, tmp_path, tampering)
    assert [each.passed for each in found] == [False, False]
    assert re.search(complaint, found[0].message), found[0].message


def test_a_prediction_may_differ_only_in_a_tie() -> None:
    ours, theirs = torch.tensor([[1.0, 1.0 + 5e-6, 0.0]]), torch.tensor([[1.0 + 5e-6, 1.0, 0.0]])
    assert compare([ours], [theirs], 1e-5).agree
    clear = compare([torch.tensor([[1.0, 1.1, 0.0]])], [torch.tensor([[1.1, 1.0, 0.0]])], 1e-5)
    assert clear.argmax_mismatches == 1
    assert not clear.agree


def test_logits_that_are_not_finite_never_agree() -> None:
    assert not Comparison(float("nan"), 1.0, 0, 1e-5).agree
    assert not compare([torch.tensor([[float("nan"), 1.0]])], [torch.tensor([[0.0, 1.0]])], 1e-5).agree
