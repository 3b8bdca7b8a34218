"""What this machine has: GPUs, memory, and models in the user's Hugging Face cache. Read-only; the environment is handed in."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_operator.plan import Plan
from finetune_trainer.contract import ConfigurationError, RunConfig
from finetune_trainer.resolve import Machine


def visible_gpus(environment: Mapping[str, str]) -> list[tuple[str, float]]:
    """The GPUs that this process may use, each with its memory in GiB."""
    try:
        query = ("nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits")
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = [line.split(", ") for line in answer.strip().splitlines()]
    memory = {name: float(gpu[2]) / 1024 for gpu in gpus for name in gpu[:2]}
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    return [(name, memory[name]) for name in ([gpu[0] for gpu in gpus] if wanted is None else wanted.split(",")) if name in memory]


def this_machine(plan: Plan, environment: Mapping[str, str], gpu_memory_gib: float | None = None) -> Machine:
    """What the trainer will find here; a GPU's memory may be given for a machine that is elsewhere."""
    gpus = visible_gpus(environment)
    if plan.accelerator and gpu_memory_gib is not None:
        return Machine("cuda", plan.world_size, gpu_memory_gib)
    if plan.accelerator and len(gpus) >= plan.world_size:
        return Machine("cuda", plan.world_size, min(memory for _, memory in gpus[: plan.world_size]))
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Machine("cpu", plan.world_size, host / plan.processes_per_node)


def find_config(config: RunConfig, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The model's config.json when it is at hand: in its folder, or in the user's Hugging Face cache."""
    source = config.model.source
    folder = Path(source) if source.startswith("/") else _cached_snapshot(source, config.model.revision or "main", environment)
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"spec.model.source: cannot read {folder / 'config.json'}: {error}") from error
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
