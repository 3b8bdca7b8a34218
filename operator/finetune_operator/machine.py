"""What this machine has: GPUs, memory, and models in the user's Hugging Face cache. Read-only; the environment is handed in."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune_operator.plan import Plan
from finetune_trainer.contract import ConfigurationError, DataError, EngineError, ModelError, RunConfig
from finetune_trainer.resolve import Machine


def visible_gpus(environment: Mapping[str, str]) -> list[tuple[str, float]]:
    """The GPUs that this process may use, each with its memory in GiB."""
    try:
        query = ("nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits")
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    gpus = [(row[0], row[1], _gib(row[2])) for row in rows if len(row) == 3]
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return [(index, memory) for index, _, memory in gpus]
    named = ((name, _memory_of(name, gpus)) for name in map(str.strip, wanted.split(",")))
    return [(name, memory) for name, memory in named if memory is not None]


def _gib(mebibytes: str) -> float:
    """Memory as nvidia-smi prints it, in GiB; 0 where it is not known (`[N/A]` with memory that the CPU shares)."""
    return int(mebibytes) / 1024 if mebibytes.isdecimal() else 0.0


def _memory_of(name: str, gpus: list[tuple[str, str, float]]) -> float | None:
    """GiB of what an entry of CUDA_VISIBLE_DEVICES names: an index, the beginning of a UUID, or a part of a GPU (MIG), whose memory is not known."""
    if name.startswith("MIG-"):
        return 0.0
    return next((memory for index, uuid, memory in gpus if name == index or (name.startswith("GPU-") and uuid.startswith(name))), None)


def this_machine(plan: Plan, environment: Mapping[str, str], gpu_memory_gib: float | None = None) -> Machine:
    """What the trainer will find here; a GPU's memory may be given for a machine that is elsewhere."""
    gpus = visible_gpus(environment)
    if plan.accelerator and gpu_memory_gib is not None:
        return Machine("cuda", plan.world_size, gpu_memory_gib)
    if plan.accelerator and len(gpus) >= plan.world_size:
        return Machine("cuda", plan.world_size, min(memory for _, memory in gpus[: plan.world_size]))
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Machine("cpu", plan.world_size, host / plan.processes_per_node)


def check_sources(config: RunConfig) -> None:
    """Refuse paths that lead nowhere, before anything is started; raises ModelError or DataError. Ids are the trainer's to look up."""
    for problem in missing_sources(config):
        raise problem


def missing_sources(config: RunConfig) -> Iterator[EngineError]:
    """One error for each path that leads nowhere on this machine."""
    source = config.model.source
    if source.startswith("/"):
        if not os.path.isdir(source):
            what = f"{source} is a file; it must be a Hugging Face model folder or a hub id" if os.path.exists(source) else f"there is no folder {source}"
            yield ModelError(f"model.source: {what}")
        elif not os.path.isfile(os.path.join(source, "config.json")):
            yield ModelError(f"model.source: {source} is not a Hugging Face model folder: it has no config.json")
    for index, dataset in enumerate(config.data.dataset):
        path = dataset if os.path.exists(dataset) else re.sub(r"#[^#/]*$", "", dataset)
        if path.startswith("/") and not os.path.exists(path):
            yield DataError(f"data.dataset[{index}]: {path}: no such file or folder")


def find_config(config: RunConfig, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The model's config.json when it is at hand: in its folder, or in the user's Hugging Face cache."""
    source = config.model.source
    folder = Path(source) if source.startswith("/") else _cached_snapshot(source, config.model.revision or "main", environment)
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"model.source: cannot read {folder / 'config.json'}: {error}") from error
    return content if isinstance(content, dict) else None


def _cached_snapshot(source: str, revision: str, environment: Mapping[str, str]) -> Path | None:
    """The folder of a hub model in the cache, by huggingface_hub's layout."""
    home = environment.get("HF_HOME") or os.path.join(environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface")
    cache = Path(environment.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    model = cache / f"models--{source.replace('/', '--')}"
    reference = model / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = model / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None
