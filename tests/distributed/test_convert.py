"""Hugging Face weights go into the model and come out again bit by bit, on every layout, and every rank reads its own bytes only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from factories import VOCAB_SIZE, make_tiny_model
from finetune_trainer import convert, hf_files, lora, model, parallel
from finetune_trainer.contract import ConfigurationError, ModelError, RunConfig
from finetune_trainer.families import Family, find
from finetune_trainer.hf_files import HFModel, check_manifest
from finetune_trainer.parallel import Ranks
from gang import Gang
from small_models import Layout, token_rows

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3-untied": {"tie_word_embeddings": False},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensorModelParallelSize": 2},
    "pp2": {"pipelineModelParallelSize": 2},
    "dp2": {},
    "tp2-pp2": {"tensorModelParallelSize": 2, "pipelineModelParallelSize": 2},
    "tp2-dp2": {"tensorModelParallelSize": 2},
}
WORLD_SIZES = {"one": 1, "tp2": 2, "pp2": 2, "dp2": 2, "tp2-pp2": 4, "tp2-dp2": 4}
LORA = {"tunerType": "lora", "loraRank": 4, "loraAlpha": 12, "loraDropout": 0.0, "targetModules": ["all-linear"]}
ONE_FILE = 2**30


@pytest.fixture(scope="package")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_tiny_model(name.split("-")[0], tmp_path_factory.mktemp(name) / name, **overrides) for name, overrides in MODELS.items()}


@pytest.fixture
def gang(request: pytest.FixtureRequest) -> Callable[[str], Gang]:
    return lambda layout: request.getfixturevalue(f"gang{WORLD_SIZES[layout]}")


@dataclass(frozen=True)
class Built:
    """This rank's part of a model and what it was made from."""

    chunks: list[Any]
    family: Family
    config: RunConfig
    ranks: Ranks


def load(layout: Layout) -> tuple[Built, HFModel]:
    """This rank's part of the model, filled by ``import_base``."""
    parallel.open_process_group(layout.config)
    ranks = parallel.initialize(layout.config.parallelism, layout.config.training.seed)
    hf = hf_files.open_model(layout.config.model)
    family = find(hf.config)
    chunks = model.build(family, hf.config, layout.config, ranks)
    convert.import_base(chunks, family, hf, ranks)
    return Built(chunks, family, layout.config, ranks), hf


def attach(built: Built) -> None:
    """Adapters whose B is not zero: as after training, equal on all layouts of one tensor-parallel size."""
    lora.attach(built.chunks, built.config.tuning, built.config.training.seed)
    for name, layer in lora.adapters(built.chunks):
        generator = torch.Generator().manual_seed(sum(name.encode()) + 7 * built.ranks.tp.rank * ("fc1" in name or "qkv" in name))
        with torch.no_grad():
            layer.lora_B.weight.copy_(0.05 * torch.randn(layer.lora_B.weight.shape, generator=generator))


def round_trip(layout: Layout, target: Path, max_shard_size: int = ONE_FILE) -> list[str]:
    built, hf = load(layout)
    convert.export_huggingface(built.chunks, built.family, hf, built.ranks, target, max_shard_size)
    return convert.differing_weights(built.chunks, built.family, hf, target, built.ranks)


def import_only(layout: Layout) -> None:
    load(layout)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bits(named: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes()) for name, tensor in named.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bitwise(name: str, layout: str, folders: dict[str, Path], gang: Callable[[str], Gang], tmp_path: Path) -> None:
    differing = gang(layout).run(round_trip, Layout(folders[name], LAYOUTS[layout]), tmp_path / "out")
    assert differing == [[]] * WORLD_SIZES[layout]
    assert bits(tensors(tmp_path / "out")) == bits(tensors(folders[name]))
    assert check_manifest(tmp_path / "out") == hf_files.file_sha256(tmp_path / "out" / "manifest.json")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("file_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("run_dtype", ["float32", "bfloat16"])
def test_every_file_type_is_read_into_every_run_type(file_dtype: str, run_dtype: str, gang2: Gang, tmp_path: Path) -> None:
    source = make_tiny_model("qwen2", tmp_path / "model", torch_dtype=file_dtype)
    gang2.run(round_trip, Layout(source, LAYOUTS["tp2"], torch_dtype=run_dtype), tmp_path / "out")
    expected = {name: tensor.to(getattr(torch, run_dtype)) for name, tensor in tensors(source).items()}
    assert bits(tensors(tmp_path / "out")) == bits(expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config.get("dtype", run_dtype), config.get("torch_dtype", run_dtype)} == {run_dtype}


def test_export_is_cut_into_files_that_transformers_loads(folders: dict[str, Path], gang4: Gang, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "out"
    gang4.run(round_trip, Layout(folders["qwen2"], LAYOUTS["tp2-pp2"]), target, 150_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 3
    assert set(files) == set(index["weight_map"].values())
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((target / file).stat().st_size < 150_000 + 5_000 for file in files)
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).state_dict()
    source = AutoModelForCausalLM.from_pretrained(folders["qwen2"], dtype=torch.float32).state_dict()
    assert bits(loaded) == bits(source)
    assert AutoTokenizer.from_pretrained(target).chat_template == AutoTokenizer.from_pretrained(folders["qwen2"]).chat_template


def count_bytes(layout: Layout) -> tuple[int, int]:
    """Bytes asked of the files, and bytes of this rank's parameters without the rows that pad the vocabulary."""
    built, hf = load(layout)
    dims = built.family.architecture(hf.config).dims(built.ranks.tp.size)
    held = 0
    for _, parameter in model.named_weights(built.chunks):
        rows = (
            min(parameter.shape[0], max(0, VOCAB_SIZE - built.ranks.tp.rank * parameter.shape[0]))
            if parameter.shape[0] * built.ranks.tp.size == dims.padded_vocab_size
            else parameter.shape[0]
        )
        held += parameter[:rows].numel() * torch.float32.itemsize
    return hf.bytes_read, held


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "tp2-pp2"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_rank_reads_the_bytes_of_its_share_and_no_more(name: str, layout: str, folders: dict[str, Path], gang: Callable[[str], Gang]) -> None:
    counts = gang(layout).run(count_bytes, Layout(folders[name], LAYOUTS[layout]))
    assert [read for read, _ in counts] == [held for _, held in counts]
    whole = sum(tensor.nbytes for tensor in tensors(folders[name]).values())
    if layout != "one":
        assert max(read for read, _ in counts) < 0.75 * whole


def order_of_reading(layout: Layout) -> list[tuple[str, int]]:
    """Where the tensors lie that import reads, in the order in which it does."""
    seen: list[tuple[str, int]] = []
    copy_into = HFModel.copy_into

    def watched(hf: HFModel, place: torch.Tensor, name: str, slices: tuple[slice, ...]) -> None:
        seen.append(hf.place_of(name))
        copy_into(hf, place, name, slices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFModel, "copy_into", watched)
        load(layout)
    return seen


def test_import_reads_in_the_order_of_the_files(folders: dict[str, Path], gang: Callable[[str], Gang]) -> None:
    for places in gang("tp2-pp2").run(order_of_reading, Layout(folders["llama"], LAYOUTS["tp2-pp2"])):
        assert len(places) > 10
        assert places == sorted(places)


def edited(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Path:
    """A copy of a model folder, in one file, with its tensors changed."""
    shutil.copytree(source, target)
    named = tensors(target)
    for file in target.glob("model*"):
        file.unlink()
    change(named)
    save_file(named, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps({**json.loads((target / "config.json").read_text()), **config}))
    return target


def spoil(name: str, index: tuple[int, ...], value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(named: dict[str, torch.Tensor]) -> None:
        named[name][index] = value

    return change


def drop_and_add(named: dict[str, torch.Tensor]) -> None:
    del named["model.layers.1.mlp.up_proj.weight"], named["model.layers.0.input_layernorm.weight"]
    named["score.weight"] = torch.zeros(1, 64)


def narrow(named: dict[str, torch.Tensor]) -> None:
    named["model.layers.2.mlp.down_proj.weight"] = torch.zeros(64, 96)


BAD_FILES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "names": (drop_and_add, r"2 missing: model\.layers\.0\.input_layernorm\.weight, model\.layers\.1\.mlp\.up_proj\.weight; 1 unexpected: score\.weight"),
    "shape": (narrow, r"model\.layers\.2\.mlp\.down_proj\.weight has shape \[64, 96\]; the model needs \[64, 128\]"),
    "nan": (
        spoil("model.layers.3.self_attn.k_proj.weight", (31, 5), float("nan")),
        r"model\.safetensors: tensor model\.layers\.3\.self_attn\.k_proj\.weight has weights that are NaN or infinite",
    ),
    "infinity": (spoil("model.embed_tokens.weight", (418, 63), float("inf")), r"model\.embed_tokens\.weight has weights that are NaN or infinite"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_wrong_file_is_refused_by_the_name_of_its_tensor(case: str, folders: dict[str, Path], gang2: Gang, tmp_path: Path) -> None:
    change, message = BAD_FILES[case]
    source = edited(folders["llama"], tmp_path / "model", change)
    with pytest.raises(ModelError, match=message):
        gang2.run(import_only, Layout(source, LAYOUTS["tp2"]))


def test_weight_too_large_for_the_run_type_is_refused(folders: dict[str, Path], gang1: Gang, tmp_path: Path) -> None:
    source = edited(folders["llama"], tmp_path / "model", spoil("lm_head.weight", (3, 3), 1e30))
    with pytest.raises(ModelError, match=r"lm_head\.weight has values too large for torch\.float16; choose another model\.torchDtype"):
        gang1.run(import_only, Layout(source, torch_dtype="float16"))


def import_without_a_weight(layout: Layout) -> None:
    parallel.open_process_group(layout.config)
    ranks = parallel.initialize(layout.config.parallelism, layout.config.training.seed)
    hf = hf_files.open_model(layout.config.model)
    family = find(hf.config)
    chunks = model.build(family, hf.config, layout.config, ranks)
    chunks[0].register_parameter("surplus", torch.nn.Parameter(torch.zeros(1)))
    if ranks.is_last_stage:
        del chunks[0].decoder.final_layernorm.weight
    convert.import_base(chunks, family, hf, ranks)


def test_model_parameter_without_a_row_and_row_without_a_parameter_are_refused(folders: dict[str, Path], gang2: Gang) -> None:
    with pytest.raises(
        ModelError, match=r"the Megatron-core model: .* 1 missing: decoder\.final_layernorm\.weight; 1 unexpected: surplus; 1 present more than once: surplus"
    ):
        gang2.run(import_without_a_weight, Layout(folders["llama"], LAYOUTS["pp2"]))


@pytest.mark.parametrize("layout", ["one", "tp2-pp2"])
def test_tied_model_that_holds_its_output_layer_too_is_loaded_and_written_alike(
    layout: str, folders: dict[str, Path], gang: Callable[[str], Gang], tmp_path: Path
) -> None:
    def write_out(named: dict[str, torch.Tensor]) -> None:
        named["lm_head.weight"] = named["model.embed_tokens.weight"].clone()
        for number in range(4):
            named[f"model.layers.{number}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    source = edited(folders["llama-tied"], tmp_path / "model", write_out)
    gang(layout).run(round_trip, Layout(source, LAYOUTS[layout]), tmp_path / "out")
    expected = {name: tensor for name, tensor in tensors(source).items() if not name.endswith("inv_freq")}
    assert bits(tensors(tmp_path / "out")) == bits(expected)


def test_tied_model_with_another_output_layer_is_refused(folders: dict[str, Path], gang1: Gang, tmp_path: Path) -> None:
    def write_out(named: dict[str, torch.Tensor]) -> None:
        named["lm_head.weight"] = named["model.embed_tokens.weight"] + 1

    source = edited(folders["llama-tied"], tmp_path / "model", write_out)
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, but config\.json says that they are tied"):
        gang1.run(import_only, Layout(source))


def export_twice(layout: Layout, target: Path) -> None:
    built, hf = load(layout)
    for _ in range(2):
        convert.export_huggingface(built.chunks, built.family, hf, built.ranks, target, ONE_FILE)


def test_export_replaces_an_earlier_one_and_what_a_crash_left(folders: dict[str, Path], gang2: Gang, tmp_path: Path) -> None:
    (tmp_path / ".partial-out").mkdir()
    (tmp_path / ".partial-out" / "model-00007-of-00009.safetensors").write_bytes(b"half")
    gang2.run(export_twice, Layout(folders["qwen3"], LAYOUTS["pp2"]), tmp_path / "out")
    check_manifest(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_leaves_a_folder_of_other_content_alone(folders: dict[str, Path], gang2: Gang, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=rf"{tmp_path} is not empty and holds no export"):
        gang2.run(round_trip, Layout(folders["qwen3"], LAYOUTS["tp2"]), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_full_disk_is_refused_and_leaves_nothing_behind(folders: dict[str, Path], gang2: Gang, small_disk: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"{small_disk / 'out'}: the disk is full \(No space left on device\); the weights need \d+ bytes"):
        gang2.run(round_trip, Layout(folders["llama"], LAYOUTS["tp2"]), small_disk / "out")
    assert list(small_disk.iterdir()) == []


def write_adapter(layout: Layout, target: Path, rows: list[list[int]]) -> tuple[list[str], list[torch.Tensor] | None]:
    built, hf = load(layout)
    attach(built)
    convert.export_adapter(built.chunks, built.family, hf, built.ranks, target / "peft", built.config.tuning, str(layout.folder))
    convert.export_huggingface(built.chunks, built.family, hf, built.ranks, target / "merged", ONE_FILE)
    differing = convert.differing_adapters(built.chunks, built.family, hf, target / "peft", built.ranks)
    differing += convert.differing_weights(built.chunks, built.family, hf, target / "merged", built.ranks)
    return differing, model.logits(built.chunks, rows, built.ranks)


def peft_logits(base: Path, adapter: Path, rows: list[list[int]], *, merge: bool = False) -> list[torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(loaded, adapter)
    loaded = (loaded.merge_and_unload() if merge else loaded).eval()
    with torch.no_grad():
        return [loaded(torch.tensor([row])).logits[0] for row in rows]


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "tp2-pp2", "tp2-dp2"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_adapter_gives_the_same_logits_in_peft(name: str, layout: str, folders: dict[str, Path], gang: Callable[[str], Gang], tmp_path: Path) -> None:
    rows = token_rows((40, 7), VOCAB_SIZE)
    results = gang(layout).run(write_adapter, Layout(folders[name], LAYOUTS[layout], tuning=LORA), tmp_path, rows)
    assert [differing for differing, _ in results] == [[]] * WORLD_SIZES[layout]
    check_manifest(tmp_path / "peft")
    ours = results[0][1]
    assert ours is not None
    from transformers import AutoModelForCausalLM

    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    plain: Any = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
    for ids, found, theirs in zip(rows, ours, peft_logits(folders[name], tmp_path / "peft", rows), strict=True):
        limit = 2e-6 * theirs.abs().max()
        with torch.no_grad():
            assert (plain(torch.tensor([ids])).logits[0] - theirs).abs().max() > 1000 * limit
            assert (merged(torch.tensor([ids])).logits[0] - theirs).abs().max() <= 2 * limit
        assert (found - theirs).abs().max() <= limit


def test_adapter_folder_is_what_peft_writes(folders: dict[str, Path], gang2: Gang, tmp_path: Path) -> None:
    gang2.run(write_adapter, Layout(folders["llama"], LAYOUTS["tp2"], tuning=LORA), tmp_path, [[1, 2, 3]])
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"]) == (4, 12, 0.0, False)
    assert (config["task_type"], config["peft_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "LORA", str(folders["llama"]))
    named = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.3."
    assert len(named) == 4 * 7 * 2
    assert named[prefix + "self_attn.q_proj.lora_A.weight"].shape == (4, 64)
    assert named[prefix + "mlp.down_proj.lora_A.weight"].shape == (4, 128)
    assert named[prefix + "self_attn.k_proj.lora_B.weight"].shape == (32, 4)
    assert torch.equal(named[prefix + "self_attn.q_proj.lora_A.weight"], named[prefix + "self_attn.v_proj.lora_A.weight"])
    assert torch.equal(named[prefix + "mlp.gate_proj.lora_A.weight"], named[prefix + "mlp.up_proj.lora_A.weight"])


def test_adapter_of_some_layers_names_only_these(folders: dict[str, Path], gang2: Gang, tmp_path: Path) -> None:
    tuning = {**LORA, "targetModules": ["linear_proj", "linear_fc1"], "useRslora": True}
    gang2.run(write_adapter, Layout(folders["llama"], LAYOUTS["pp2"], tuning=tuning), tmp_path, [[1, 2, 3]])
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["gate_proj", "o_proj", "up_proj"]
    assert config["use_rslora"] is True
    assert len(load_file(tmp_path / "peft" / "adapter_model.safetensors")) == 4 * 3 * 2
