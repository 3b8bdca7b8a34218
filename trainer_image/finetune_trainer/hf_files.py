"""Hugging Face model folders, read: config.json, the index of tensors, and slices of tensors.

Only safetensors files are read; a pickle is never opened. A tensor is copied once: whole rows of the right type by the
kernel into their place, all else out of the mapped file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune_trainer.contract import ModelConfig, ModelError
from finetune_trainer.model_folder import find_model_folder, read_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Data types by their names in safetensors files."""

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEADER_BYTES = 100_000_000
"""Largest header that safetensors itself accepts."""

MANIFEST = "manifest.json"
"""Written last into an exported folder: ``{"version": 1, "files": {name: {"bytes", "sha256"}}}``."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is: the name of its file in the folder, its data type and shape, and its first byte in the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class HFModel:
    """An opened folder of safetensors: a model, or an adapter (whose ``config`` is adapter_config.json)."""

    def __init__(self, folder: Path, config: dict[str, Any], entries: Mapping[str, TensorEntry]) -> None:
        self.folder = folder
        self.config = config
        self.entries = entries
        self.bytes_read = 0
        """Bytes of all slices asked for so far."""
        self._mapped: dict[str, Any] = {}
        self._streams: dict[str, FileIO] = {}

    def place_of(self, name: str) -> tuple[str, int]:
        """The file of tensor ``name`` and its first byte there: what sorts tensors in the order of the files."""
        entry = self.entries[name]
        return entry.file, entry.offset

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """The part ``slices`` (one per dimension; absent: all) of tensor ``name``, on the CPU, in the file's data type.

        A view of the mapped file: read-only by convention, and to be copied where it is to stay. Raises ModelError for
        a tensor that is not there, is of another type than float32, bfloat16 or float16, or cannot be read.
        """
        entry = self._weight(name)
        part: Tensor = self._map(entry.file).get_slice(name)[slices if slices is not None else tuple(slice(0, size) for size in entry.shape)]
        self.bytes_read += part.nbytes
        return part

    def copy_into(self, place: Tensor, name: str, slices: tuple[slice, ...]) -> None:
        """Copy the part ``slices`` of tensor ``name`` into ``place``: as many elements, in the same order, of any shape, type and device.

        Raises ModelError as ``read`` does.
        """
        entry = self._weight(name)
        whole_rows = all(part == slice(0, size) for part, size in zip(slices[1:], entry.shape[1:], strict=True))
        if not whole_rows or place.dtype != entry.dtype or place.device.type != "cpu":
            place.copy_(self.read(name, slices).view(place.shape))
            return
        offset = entry.offset + slices[0].start * math.prod(entry.shape[1:]) * entry.dtype.itemsize
        for run in _contiguous_runs(place):
            self._read_into(run, entry.file, offset)
            offset += run.nbytes
        self.bytes_read += place.nbytes

    def _read_into(self, run: Tensor, file: str, offset: int) -> None:
        array: Any = run.view(torch.uint8).numpy()
        data = memoryview(array)
        try:
            stream = self._streams.get(file) or self._streams.setdefault(file, (self.folder / file).open("rb", buffering=0))
            while data:
                count = os.preadv(stream.fileno(), [data], offset)
                if not count:
                    raise ModelError(f"{self.folder / file}: it has become shorter since it was opened")
                data, offset = data[count:], offset + count
        except OSError as error:
            raise ModelError(f"{self.folder / file}: cannot be read: {error}") from error

    def _weight(self, name: str) -> TensorEntry:
        entry = self.entries.get(name)
        if entry is None:
            raise ModelError(f"{self.folder}: there is no tensor {name}")
        if entry.dtype not in WEIGHT_DTYPES:
            raise ModelError(f"{self.folder / entry.file}: tensor {name} is of type {entry.dtype}; weights must be float32, bfloat16 or float16")
        return entry

    def _map(self, file: str) -> Any:
        if file not in self._mapped:
            path = self.folder / file
            try:
                self._mapped[file] = safe_open(path, framework="pt", device="cpu")
            except Exception as error:  # safetensors' own exception has no public base class but Exception
                raise ModelError(f"{path}: cannot be read: {error}") from error
        return self._mapped[file]


def _contiguous_runs(tensor: Tensor) -> list[Tensor]:
    """A tensor as flat views, in its order."""
    return [tensor.view(-1)] if tensor.is_contiguous() else [run for part in tensor.unbind(0) for run in _contiguous_runs(part)]


def open_model(model: ModelConfig) -> HFModel:
    """Open the model that ``model.source`` names: a folder, or a hub id (downloaded into the Hugging Face cache; no code runs).

    Raises ModelError for a missing folder or file, a truncated file, an index that names a missing file, pickles only.
    """
    folder = find_model_folder(model)
    return HFModel(folder, read_json(folder / "config.json"), read_entries(folder))


def open_adapter(folder: Path) -> HFModel:
    """Open a PEFT adapter folder; raises ModelError for a missing or truncated file."""
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} is not a PEFT adapter folder: it has no adapter_config.json")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        raise ModelError(f"{folder}: there is no {weights.name}" + (f"; {', '.join(pickles)} is a pickle, which is never opened" if pickles else ""))
    return HFModel(folder, read_json(folder / "adapter_config.json"), read_header(weights))


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model folder: of model.safetensors, or else of the files that model.safetensors.index.json names, as transformers chooses."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return read_header(folder / "model.safetensors")
    if index.is_file():
        return _read_indexed(folder, index)
    raise ModelError(f"{folder}: there is neither model.safetensors nor {index.name}" + _what_else(folder))


def _what_else(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"; found {', '.join(others)}, which no index names"
    if pickles:
        return f"; found {', '.join(pickles)}: a pickle can run code when it is opened, so it is refused; save the model with save_pretrained, which writes safetensors"
    return ""


def _read_indexed(folder: Path, index: Path) -> dict[str, TensorEntry]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
        raise ModelError(f"{index}: weight_map must tie tensor names to names of files in this folder")
    entries: dict[str, TensorEntry] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise ModelError(f"{index}: it names {file}, which is missing from {folder}")
        found = read_header(folder / file)
        twice = sorted(entries.keys() & found.keys())
        if twice:
            raise ModelError(f"{folder}: tensors in more than one file: {', '.join(twice)}")
        entries |= found
    wrong = sorted(name for name, file in weight_map.items() if name not in entries or entries[name].file != file)
    if wrong:
        raise ModelError(f"{index}: tensors that are not in the file that it names: {', '.join(wrong)}")
    return entries


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file; raises ModelError when it is truncated or not such a file. No weight is read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if 2 <= length <= min(size - 8, MAX_HEADER_BYTES) else b""
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    try:
        tensors = json.loads(header) if header else {}
        tensors.pop("__metadata__", None)
        promised = 8 + length + max((item["data_offsets"][1] for item in tensors.values()), default=0)
        entries = {
            name: TensorEntry(path.name, DTYPES[item["dtype"]], tuple(item["shape"]), 8 + length + item["data_offsets"][0]) for name, item in tensors.items()
        }
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ModelError(f"{path}: its header is not that of a safetensors file ({type(error).__name__}: {error})") from error
    if not header:
        raise ModelError(f"{path}: truncated, or not a safetensors file: it has {size} bytes, which do not hold its header")
    if promised != size:
        raise ModelError(f"{path}: {'truncated' if size < promised else 'damaged'}: it has {size} bytes; its header promises {promised}")
    return entries


def check_manifest(folder: Path) -> str:
    """Hash every file of an exported folder again; returns the sha256 of the manifest itself.

    Raises ModelError naming the first file that is missing, changed or not listed.
    """
    listed = read_json(folder / MANIFEST).get("files")
    if not isinstance(listed, dict):
        raise ModelError(f"{folder / MANIFEST}: files must be an object")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    for name in sorted(listed.keys() | there):
        if name not in listed or name not in there:
            raise ModelError(f"{folder / name}: {'is missing' if name in listed else f'is not listed in {MANIFEST}'}")
        if describe_file(folder / name) != listed[name]:
            raise ModelError(f"{folder / name}: its size or sha256 is not the one in {MANIFEST}")
    return file_sha256(folder / MANIFEST)


def describe_file(path: Path) -> dict[str, Any]:
    """The manifest's entry of one file."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
