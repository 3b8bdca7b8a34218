"""Hugging Face folders, written by many processes at once.

The layout of every file follows from the list of tensors, so all processes know it without talking. One process makes the
files at their full size under a partial name (``create``), each writes its own byte ranges (``write``, ``close``), and one
writes the manifest and renames the folder (``publish``). What a crash leaves behind bears a partial name and no manifest.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.contract import ConfigurationError, EngineError
from finetune_trainer.hf_files import DTYPES, MANIFEST, HFModel, describe_file

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_ALIGNMENT = 8
PARTIAL = ".partial-"
"""How the names of unfinished results begin."""

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""What goes with the weights into an exported model, where the source has it."""

RETRIED_ERRNOS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN)
"""Failures of a disk that may pass; all others are the user's to mend."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Size of one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class FilePlan:
    """One safetensors file: its name, its first bytes, its size, and where each tensor begins."""

    name: str
    header: bytes
    size: int
    offsets: Mapping[str, int]


def plan_files(tensors: Sequence[TensorSpec], stem: str, max_shard_size: int | None = None) -> tuple[FilePlan, ...]:
    """Distribute tensors, in their order, over files of at most ``max_shard_size`` bytes (a larger tensor gets a file of its own).

    One file is ``<stem>.safetensors``, several ``<stem>-00001-of-0000N.safetensors``, as transformers names them.
    """
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if max_shard_size is not None and shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    names = [f"{stem}.safetensors"] if len(shards) == 1 else [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    return tuple(_plan_file(name, shard) for name, shard in zip(names, shards, strict=True))


def _plan_file(name: str, tensors: Sequence[TensorSpec]) -> FilePlan:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, begin + tensor.nbytes]}
        begin += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    start = 8 + len(text)
    offsets = {tensor.name: start + header[tensor.name]["data_offsets"][0] for tensor in tensors}
    return FilePlan(name, len(text).to_bytes(8, "little") + text, start + begin, offsets)


def index_json(plans: Sequence[FilePlan], tensors: Sequence[TensorSpec]) -> str | None:
    """The text of model.safetensors.index.json; None where one file holds everything."""
    if len(plans) == 1:
        return None
    weight_map = {name: plan.name for plan in plans for name in plan.offsets}
    metadata = {"total_parameters": sum(math.prod(tensor.shape) for tensor in tensors), "total_size": sum(tensor.nbytes for tensor in tensors)}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def model_config(source: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The source's config.json with the data type of the weights written, under the key that the source used."""
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("torch_dtype", "dtype") if key in source] or ["torch_dtype"]
    return {**source, **dict.fromkeys(keys, name)}


def partial_folder(folder: Path) -> Path:
    """Where ``folder`` is written until it is whole."""
    return folder.with_name(f"{PARTIAL}{folder.name}")


class FolderWriter:
    """One process's view of a folder that is being written; ``create`` and ``publish`` are for one process alone."""

    def __init__(self, folder: Path, tensors: Sequence[TensorSpec], plans: Sequence[FilePlan]) -> None:
        self.folder = folder
        self.partial = partial_folder(folder)
        self.plans = tuple(plans)
        self._specs = {tensor.name: tensor for tensor in tensors}
        self._files = {name: plan for plan in plans for name in plan.offsets}
        self._descriptors: dict[str, int] = {}
        self._failure: EngineError | None = None

    def create(self, texts: Mapping[str, str], copied: Mapping[str, Path]) -> None:
        """Make the partial folder: weight files at full size, ``texts`` by name, copies of files by name.

        Raises ConfigurationError naming the path for a folder that cannot be written, is full, or holds something else.
        """
        check_replaceable(self.folder)
        try:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            for plan in self.plans:
                self._preallocate(plan)
            for name, text in texts.items():
                (self.partial / name).write_text(text, encoding="utf-8")
            for name, source in copied.items():
                (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, self.partial / name)
        except OSError as error:
            raise disk_error(self.folder, error, sum(plan.size for plan in self.plans)) from error

    def _preallocate(self, plan: FilePlan) -> None:
        with (self.partial / plan.name).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, plan.size)
            file.write(plan.header)

    def write(self, name: str, row: int, rows: Tensor) -> None:
        """Write ``rows`` of tensor ``name``, beginning at its row ``row``.

        A failure is kept until ``close``, so that a process whose disk fails still takes part in the others' collectives.
        """
        if self._failure is not None or rows.numel() == 0:
            return
        spec, plan = self._specs[name], self._files[name]
        data = _bytes(rows.detach().to(device="cpu", dtype=spec.dtype))
        offset = plan.offsets[name] + row * spec.row_bytes
        try:
            descriptor = self._descriptor(plan.name)
            while data:
                written = os.pwrite(descriptor, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            self._failure = disk_error(self.partial / plan.name, error)

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self.partial / file, os.O_WRONLY)
        return self._descriptors[file]

    def close(self) -> None:
        """Bring what this process wrote to the disk; raises the first failure of its writes."""
        descriptors, self._descriptors = self._descriptors, {}
        for file, descriptor in descriptors.items():
            try:
                if self._failure is None:
                    os.fsync(descriptor)
            except OSError as error:
                self._failure = disk_error(self.partial / file, error)
            finally:
                os.close(descriptor)
        if self._failure is not None:
            raise self._failure

    def describe(self, part: int, parts: int) -> dict[str, Any]:
        """Manifest entries of every ``parts``-th file, from the ``part``-th on; together all parts cover the folder."""
        try:
            paths = sorted(path for path in self.partial.rglob("*") if path.is_file())
            return {path.relative_to(self.partial).as_posix(): describe_file(path) for path in paths[part::parts]}
        except OSError as error:
            raise disk_error(self.partial, error) from error

    def publish(self, entries: Mapping[str, Any]) -> None:
        """Write the manifest and give the folder its name; an earlier export of that name is replaced."""
        try:
            with (self.partial / MANIFEST).open("w", encoding="utf-8") as file:
                file.write(json.dumps({"version": 1, "files": dict(sorted(entries.items()))}, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(self.partial)
        except OSError as error:
            raise disk_error(self.folder, error) from error
        replace_folder(self.partial, self.folder)

    def discard(self) -> None:
        """Remove the partial folder of a failed export."""
        shutil.rmtree(self.partial, ignore_errors=True)


def replace_folder(partial: Path, folder: Path) -> None:
    """Give ``partial`` the name ``folder``; an earlier export of that name is first moved aside, so that a crash never leaves half of it there."""
    old = folder.parent / f"{PARTIAL}old-{folder.name}"
    try:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise disk_error(folder, error) from error


def remove_partials(output_dir: Path) -> None:
    """Remove the folders of exports that were killed; raises ConfigurationError naming one that cannot be removed."""
    for partial in output_dir.glob(f"{PARTIAL}*"):
        try:
            shutil.rmtree(partial)
        except OSError as error:
            raise disk_error(partial, error) from error


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def side_files(hf: HFModel) -> dict[str, Path]:
    """The tokenizer, the chat template and the generation settings of a model folder, by name."""
    found = [path for pattern in SIDE_FILES for path in sorted(hf.folder.glob(pattern))]
    return {path.relative_to(hf.folder).as_posix(): path for path in found}


def check_replaceable(folder: Path) -> None:
    """Raise ConfigurationError where ``folder`` holds something that is no earlier export (has no manifest)."""
    try:
        if folder.exists() and not (folder / MANIFEST).is_file() and any(folder.iterdir()):
            raise ConfigurationError(
                f"{folder} is not empty and holds no export of an earlier run (no {MANIFEST}); it is left alone: remove it or choose another folder"
            )
    except OSError as error:
        raise disk_error(folder, error) from error


def check_output_folder(folder: Path, needed: int) -> None:
    """Prove, before training, that ``folder`` can be made and written and that its disk has ``needed`` bytes free.

    Raises ConfigurationError naming the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, probe = tempfile.mkstemp(prefix=".probe-", dir=folder)  # a name of its own: other nodes' processes try the same folder
        try:
            os.write(descriptor, b"\0")
        finally:
            os.close(descriptor)
            Path(probe).unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise disk_error(folder, error, needed) from error
    if free < needed:
        raise ConfigurationError(f"{folder}: the disk is too full: the results need {needed} bytes, {free} are free")


def disk_error(path: Path, error: OSError, needed: int | None = None) -> EngineError:
    """The failure of a file operation, for the user: ConfigurationError, or EngineError where trying again may help."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        amount = "" if needed is None else f"; the weights need {needed} bytes"
        return ConfigurationError(f"{path}: the disk is full ({error.strerror}){amount}")
    if error.errno == errno.ENOENT:
        return ConfigurationError(f"{path}: {error}; the output folder must be on a disk that every node shares")
    if error.errno in RETRIED_ERRNOS:
        return EngineError(f"{path}: cannot be written: {error}")
    return ConfigurationError(f"{path}: cannot be written: {error}")
