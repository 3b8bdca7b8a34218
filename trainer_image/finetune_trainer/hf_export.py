"""Hugging Face folders, written by many processes at once.

The layout of every file follows from the list of tensors, so all processes know it without talking. One process makes the
files at their full size under a partial name (``create``), each writes its own byte ranges (``write``, ``close``), all bring
them to the disk and hash files (``seal``), and one writes the manifest and renames the folder (``publish``). What a crash
leaves behind bears a partial name and no manifest.

Writing and hashing are done by a few threads of each process: both leave Python's lock alone. A kernel lets one thread at a
time write to a file, so tensors that follow one another should go to different files.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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

NUM_THREADS = 4
"""Threads with which one process writes, and then hashes. The files of a large model are about as many."""
MAX_WAITING_BYTES = 2**29
"""Of tensors that were handed over and are not written yet: ``write`` waits for more room, so that copies of them do not fill the memory."""
STAGED_BYTES = 2**24
"""Page-locked memory of one thread, through which it copies from a GPU: some times faster than from memory that can be paged out."""

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


def files_in_turn(plans: Sequence[FilePlan], names: Iterable[str]) -> list[str]:
    """Tensors in an order that goes from file to file, so that several threads find a file that nobody else is writing to."""
    files: dict[str, list[str]] = {plan.name: [] for plan in plans}
    place = {name: plan.name for plan in plans for name in plan.offsets}
    for name in names:
        files[place[name]].append(name)
    return [name for turn in itertools.zip_longest(*files.values()) for name in turn if name is not None]


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


class WaitingBytes:
    """A count of the bytes that wait to be written. ``add`` returns once fewer than ``limit`` wait: there are never more than that and one tensor."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self.most = 0
        """The highest count so far."""
        self._changed = threading.Condition()

    def add(self, count: int) -> None:
        """Wait for room, then count ``count`` bytes more."""
        with self._changed:
            self._changed.wait_for(lambda: self.count < self.limit)
            self.count += count
            self.most = max(self.most, self.count)

    def remove(self, count: int) -> None:
        """Count ``count`` bytes less."""
        with self._changed:
            self.count -= count
            self._changed.notify_all()


class FolderWriter:
    """One process's view of a folder that is being written; ``create`` and ``publish`` are for one process alone."""

    def __init__(self, folder: Path, tensors: Sequence[TensorSpec], plans: Sequence[FilePlan], max_waiting_bytes: int = MAX_WAITING_BYTES) -> None:
        self.folder = folder
        self.partial = partial_folder(folder)
        self.plans = tuple(plans)
        self.waiting = WaitingBytes(max_waiting_bytes)
        self._specs = {tensor.name: tensor for tensor in tensors}
        self._files = {name: plan for plan in plans for name in plan.offsets}
        self._descriptors: dict[str, int] = {}
        self._written: list[Path] = []
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        """Guards the descriptors and the failure."""
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="export")
        self._staging = threading.local()

    def create(self, texts: Mapping[str, str], copied: Mapping[str, Path]) -> None:
        """Make the partial folder: weight files at full size, ``texts`` by name, copies of files by name.

        Raises ConfigurationError naming the path for a folder that cannot be written, is full, or holds something else.
        """
        check_replaceable(self.folder)
        try:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            with ThreadPoolExecutor(NUM_THREADS) as threads:
                list(threads.map(self._preallocate, self.plans))
            for name, text in texts.items():
                (self.partial / name).write_text(text, encoding="utf-8")
            for name, source in copied.items():
                (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, self.partial / name)
            self._written += [self.partial / name for name in (*texts, *copied)]
        except OSError as error:
            raise disk_error(self.folder, error, sum(plan.size for plan in self.plans)) from error

    def _preallocate(self, plan: FilePlan) -> None:
        with (self.partial / plan.name).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, plan.size)
            file.write(plan.header)

    def write(self, name: str, row: int, rows: Tensor) -> None:
        """Have ``rows`` of tensor ``name`` written, beginning at its row ``row``; they must not change before ``close``.

        A failure is kept until ``close``, so that a process whose disk fails still takes part in the others' collectives.
        """
        if self._failure is not None or rows.numel() == 0:
            return
        spec, plan = self._specs[name], self._files[name]
        rows = rows.detach().to(dtype=spec.dtype).contiguous()
        self.waiting.add(rows.nbytes)
        # The stream that makes the rows: a copy that another thread puts on it comes after.
        stream = torch.cuda.current_stream(rows.device) if rows.device.type == "cuda" else None
        self._threads.submit(self._write_rows, self.partial / plan.name, plan.offsets[name] + row * spec.row_bytes, rows, stream)

    def _write_rows(self, path: Path, offset: int, rows: Tensor, stream: torch.cuda.Stream | None) -> None:
        """In a thread; whatever goes wrong must not be lost, nor keep ``write`` waiting."""
        try:
            for data in self._host_bytes(rows, stream):
                if self._failure is not None:
                    return
                _write_at(self._descriptor(path), data, offset)
                offset += len(data)
        except OSError as error:
            self._keep(disk_error(path, error))
        except Exception as error:  # noqa: BLE001 raised by ``close``
            self._keep(error)
        finally:
            self.waiting.remove(rows.nbytes)

    def _keep(self, failure: Exception) -> None:
        with self._lock:
            self._failure = self._failure or failure

    def _host_bytes(self, rows: Tensor, stream: torch.cuda.Stream | None) -> Iterator[memoryview]:
        """The bytes of contiguous ``rows``, in order; what was given before is overwritten by the next where they are on a GPU."""
        data = rows.reshape(-1).view(torch.uint8)
        if stream is None:
            yield _view(data)
            return
        torch.cuda.set_device(rows.device)  # each thread has its own; with another one the process would also make itself at home on that
        if not hasattr(self._staging, "place"):
            self._staging.place = torch.empty(STAGED_BYTES, dtype=torch.uint8, pin_memory=True)
        for part in data.split(STAGED_BYTES):
            place = self._staging.place[: part.numel()]
            with torch.cuda.stream(stream):
                place.copy_(part, non_blocking=True)
            stream.synchronize()
            yield _view(place)

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path.name not in self._descriptors:
                self._descriptors[path.name] = os.open(path, os.O_WRONLY)
            return self._descriptors[path.name]

    def close(self) -> None:
        """Wait until everything is written, and let go of the files, so that every node sees it; raises the first failure of the writes."""
        self._threads.shutdown()
        descriptors, self._descriptors = self._descriptors, {}
        for name, descriptor in descriptors.items():
            self._written.append(self.partial / name)
            try:
                os.close(descriptor)
            except OSError as error:  # a network's disk sends the last bytes now
                self._keep(disk_error(self.partial / name, error))
        if self._failure is not None:
            raise self._failure

    def seal(self, part: int, parts: int) -> dict[str, Any]:
        """Bring what this process wrote to the disk and, meanwhile, hash a share of the files; every process must have closed.

        Returns the manifest entries of every ``parts``-th file, from the ``part``-th on; together all parts cover the folder.
        """
        try:
            sizes = {self.partial / plan.name: plan.size for plan in self.plans}
            paths = (path for path in self.partial.rglob("*") if path.is_file())
            mine = sorted(paths, key=lambda path: (-sizes.get(path, 0), path))[part::parts]  # the largest are dealt out first
            with ThreadPoolExecutor(NUM_THREADS + 1) as threads:
                synced = threads.submit(_sync_files, self._written)
                entries = {path.relative_to(self.partial).as_posix(): entry for path, entry in zip(mine, threads.map(describe_file, mine), strict=True)}
                synced.result()
        except OSError as error:
            raise disk_error(self.partial, error) from error
        return entries

    def publish(self, entries: Mapping[str, Any]) -> None:
        """Write the manifest and give the folder its name; an earlier export of that name is replaced."""
        try:
            with (self.partial / MANIFEST).open("w", encoding="utf-8") as file:
                file.write(json.dumps({"version": 1, "files": dict(sorted(entries.items()))}, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            _sync(self.partial)
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
        _sync(folder.parent)
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


def _view(data: Tensor) -> memoryview:
    array: Any = data.numpy()
    return memoryview(array)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _sync_files(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            _sync(path)
        except OSError as error:
            raise disk_error(path, error) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
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
