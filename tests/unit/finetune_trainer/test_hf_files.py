"""Model folders: what is read of them, and how damaged ones are refused before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune_trainer.contract import ModelConfig, ModelError
from finetune_trainer.hf_files import HFModel, TensorEntry, check_manifest, describe_file, file_sha256, open_adapter, open_model, read_header

TENSORS = {"a.weight": torch.arange(24, dtype=torch.float32).reshape(4, 6), "b.weight": torch.arange(8, dtype=torch.bfloat16), "c.ids": torch.arange(3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two indexed files."""
    save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b.weight": TENSORS["b.weight"], "c.ids": TENSORS["c.ids"]}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(
        tmp_path, {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors", "c.ids": "model-00002-of-00002.safetensors"}
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def opened(folder: Path) -> HFModel:
    return open_model(ModelConfig(source=str(folder)))


def test_entries_of_every_indexed_file_are_found(folder: Path) -> None:
    hf = opened(folder)
    assert hf.config == {"model_type": "llama"}
    assert {name: (entry.file[:11], entry.dtype, entry.shape) for name, entry in hf.entries.items()} == {
        "a.weight": ("model-00001", torch.float32, (4, 6)),
        "b.weight": ("model-00002", torch.bfloat16, (8,)),
        "c.ids": ("model-00002", torch.int64, (3,)),
    }


def test_single_file_comes_before_an_index_as_in_transformers(folder: Path) -> None:
    save_file({"d.weight": torch.ones(2)}, folder / "model.safetensors")
    assert {name: entry.file for name, entry in opened(folder).entries.items()} == {"d.weight": "model.safetensors"}


def test_slices_are_read_and_their_bytes_counted(folder: Path) -> None:
    hf = opened(folder)
    assert hf.bytes_read == 0
    assert torch.equal(hf.read("a.weight", (slice(1, 3), slice(2, 6))), TENSORS["a.weight"][1:3, 2:6])
    assert hf.bytes_read == 2 * 4 * 4
    assert torch.equal(hf.read("b.weight"), TENSORS["b.weight"])
    assert hf.bytes_read == 2 * 4 * 4 + 8 * 2


@pytest.mark.parametrize("slices", [(slice(0, 4), slice(0, 6)), (slice(1, 3), slice(0, 6)), (slice(0, 4), slice(3, 6)), (slice(4, 4), slice(0, 6))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_part_is_copied_into_a_place_of_any_type_and_its_bytes_counted(folder: Path, slices: tuple[slice, ...], dtype: torch.dtype) -> None:
    hf = opened(folder)
    expected = TENSORS["a.weight"][slices]
    place = torch.full(expected.shape, float("nan"), dtype=dtype)
    hf.copy_into(place, "a.weight", slices)
    assert torch.equal(place, expected.to(dtype))
    assert hf.bytes_read == expected.nbytes


def test_part_is_copied_in_order_into_a_place_with_gaps(folder: Path) -> None:
    hf = opened(folder)
    fused = torch.zeros(2, 3, 6)
    hf.copy_into(fused[:, :2], "a.weight", (slice(0, 4), slice(0, 6)))
    assert torch.equal(fused[:, :2].reshape(4, 6), TENSORS["a.weight"])
    assert torch.equal(fused[:, 2], torch.zeros(2, 6))


def test_file_cut_short_after_it_was_opened_is_refused(folder: Path) -> None:
    hf = opened(folder)
    with (folder / "model-00001-of-00002.safetensors").open("rb+") as file:
        file.truncate(100)
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors: it has become shorter"):
        hf.copy_into(torch.empty(4, 6), "a.weight", (slice(0, 4), slice(0, 6)))


def test_tensor_of_another_type_than_a_weight_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"tensor c\.ids is of type torch\.int64; weights must be float32, bfloat16 or float16"):
        opened(folder).read("c.ids")
    with pytest.raises(ModelError, match=r"there is no tensor d\.weight"):
        opened(folder).read("d.weight")


def truncate(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def truncate_header(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def empty(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")


def replace_by_text(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n" * 3)


def lose_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def lose_tensor(folder: Path) -> None:
    save_file({"b.weight": TENSORS["b.weight"]}, folder / "model-00002-of-00002.safetensors")


def double_tensor(folder: Path) -> None:
    save_file(TENSORS, folder / "model-00002-of-00002.safetensors")


def point_outside(folder: Path) -> None:
    write_index(folder, {"a.weight": "../other.safetensors"})


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def only_pickles(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def adapter_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated data": (truncate, r"model-00002-of-00002\.safetensors: truncated: it has \d+ bytes; its header promises \d+"),
    "truncated header": (truncate_header, r"model-00002-of-00002\.safetensors: truncated, or not a safetensors file: it has 20 bytes"),
    "empty": (empty, r"model-00001-of-00002\.safetensors: truncated, or not a safetensors file: it has 0 bytes"),
    "git-lfs pointer": (replace_by_text, r"model-00001-of-00002\.safetensors: truncated, or not a safetensors file"),
    "missing shard": (lose_shard, r"index\.json: it names model-00002-of-00002\.safetensors, which is missing from"),
    "tensor not in its file": (lose_tensor, r"index\.json: tensors that are not in the file that it names: c\.ids"),
    "tensor in two files": (double_tensor, r"tensors in more than one file: a\.weight"),
    "outside the folder": (point_outside, r"weight_map must tie tensor names to names of files in this folder"),
    "broken index": (break_index, r"index\.json: cannot be read as JSON"),
    "pickles only": (only_pickles, r"neither model\.safetensors nor .*; found pytorch_model\.bin: a pickle can run code when it is opened, so it is refused"),
    "no config": (lose_config, r"is not a Hugging Face model folder: it has no config\.json"),
    "config is a list": (break_config, r"config\.json: must hold a JSON object \(found list\)"),
    "an adapter": (adapter_only, r"it holds an adapter \(adapter_config\.json\), not a model"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_folder_is_refused_by_the_name_of_the_file(case: str, folder: Path) -> None:
    damage, message = DAMAGES[case]
    damage(folder)
    with pytest.raises(ModelError, match=message):
        opened(folder)


def test_header_that_lies_is_refused(tmp_path: Path) -> None:
    text = b'{"a": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(ModelError, match=r"x\.safetensors: its header is not that of a safetensors file \(KeyError: 'Q7'\)"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "model.source: there is no folder /no/such/folder"),
        ("./no-such-folder", "model.source: there is no folder ./no-such-folder"),
        ("s3://bucket/model", "model.source: s3:// is not supported"),
    ],
)
def test_missing_model_is_refused(source: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_model(ModelConfig(source=source))
    assert str(caught.value).startswith(message)


def test_file_in_place_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is a file; it must be a Hugging Face model folder"):
        opened(folder / "config.json")


def test_hub_id_that_is_not_in_the_cache_is_refused_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"model\.source: nobody/nothing is no folder here, and the Hugging Face hub did not give it: "):
        open_model(ModelConfig(source="nobody/nothing"))


def test_adapter_in_a_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a PEFT adapter folder: it has no adapter_config\.json"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"there is no adapter_model\.safetensors; adapter_model\.bin is a pickle, which is never opened"):
        open_adapter(tmp_path)


def write_manifest(folder: Path) -> None:
    files = {path.name: describe_file(path) for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))


def test_manifest_tells_a_changed_a_missing_and_a_foreign_file(folder: Path) -> None:
    write_manifest(folder)
    assert check_manifest(folder) == file_sha256(folder / "manifest.json")
    (folder / "extra.txt").write_text("x")
    with pytest.raises(ModelError, match=r"extra\.txt: is not listed in manifest\.json"):
        check_manifest(folder)
    (folder / "extra.txt").unlink()
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("llama", "lamal"))
    with pytest.raises(ModelError, match=r"config\.json: its size or sha256 is not the one in manifest\.json"):
        check_manifest(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json: is missing"):
        check_manifest(folder)


def test_entry_says_where_its_bytes_are(folder: Path) -> None:
    entry = read_header(folder / "model-00001-of-00002.safetensors")["a.weight"]
    assert isinstance(entry, TensorEntry)
    assert (folder / entry.file).read_bytes()[entry.offset :] == TENSORS["a.weight"].numpy().tobytes()
