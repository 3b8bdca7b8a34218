"""Where a model lies that is no hub id: known without torch, so that a wrong path is refused before any process is started."""

from __future__ import annotations

from os.path import exists, isdir  # False, where Path's raise: a name that is too long for a file
from pathlib import Path

from finetune_trainer.contract import ModelError


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
