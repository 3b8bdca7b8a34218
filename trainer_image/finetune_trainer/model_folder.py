"""Where a model lies, and its config.json: known without torch, so that a wrong path is refused before any process is started and rows are read beside the imports."""

from __future__ import annotations

import json
from os.path import exists, isdir  # False, where Path's raise: a name that is too long for a file
from pathlib import Path
from typing import Any

from finetune_trainer.contract import ModelConfig, ModelError

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
HUB_IGNORED = ("*/*.safetensors", "consolidated*")


def find_local_folder(source: str) -> Path | None:
    """The folder that ``model.source`` names, None for what can only be a hub id; raises ModelError for a file and for a path where nothing is."""
    path = Path(source).expanduser()
    if isdir(path):
        return path.resolve()
    if exists(path):
        raise ModelError(f"model.source: {source} is a file; it must be a Hugging Face model folder or a hub id")
    if source.startswith(("/", "./", "../", "~")):
        raise ModelError(f"model.source: there is no folder {source}")
    return None


def check_model_folder(folder: Path) -> None:
    """Raise ModelError for a folder without config.json."""
    if not (folder / "config.json").is_file():
        what = "it holds an adapter (adapter_config.json), not a model" if (folder / "adapter_config.json").is_file() else "it has no config.json"
        raise ModelError(f"model.source: {folder} is not a Hugging Face model folder: {what}")


def find_model_folder(model: ModelConfig) -> Path:
    """The folder of ``model.source``, from the hub where it is an id (no code runs); raises ModelError when there is none, or it holds no model."""
    source = model.source
    folder = find_local_folder(source)
    if folder is None:
        if "://" in source:
            raise ModelError(f"model.source: {source.split('://')[0]}:// is not supported; give a folder or a hub id such as Qwen/Qwen2.5-7B-Instruct")
        folder = _download(source, model.revision)
    check_model_folder(folder)
    return folder


def _download(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_IGNORED)))
    except Exception as error:  # among them those of the hub's HTTP library, which is another one from version to version
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model.source: {source} is no folder here, and the Hugging Face hub did not give it: {cause}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ModelError when it is missing or is something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object (found {type(value).__name__})")
    return value
