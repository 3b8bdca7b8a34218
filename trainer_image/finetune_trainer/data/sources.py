"""Where rows come from: the names of data sets, the files behind them, the sets that are built in. Reads files and the Hugging Face cache; what is in a row is ``conversations``' business."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from os.path import exists  # False, where Path.exists raises: a name that is too long for a file
from pathlib import Path
from typing import Any, Literal

from finetune_trainer.contract import ConfigurationError, DataConfig, DataError, nearest
from finetune_trainer.data.conversations import Conversation, make_conversation, parse_rows

SELF_COGNITION = "self_cognition.jsonl"
BUILT_IN = {
    "swift/self-cognition": SELF_COGNITION,
    "usf_bios/self-cognition": SELF_COGNITION,
    "mcore-finetune/general-knowledge": "general_knowledge.jsonl",
}
SUFFIXES = (".jsonl", ".json")
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "configuration.json")  # files of a data set's folder that hold no rows
SPLITS = re.compile(r"(?:^|[^a-z])(train|test|eval|evaluation|dev|valid|validation)(?:[^a-z]|$)")


@dataclass(frozen=True)
class Source:
    """One data set of ``data.dataset``: what it is, where, and how many rows of it are wanted (None: all)."""

    kind: Literal["built-in", "path", "hub"]
    name: str
    subset: str | None = None
    num_rows: int | None = None


def find_source(text: str) -> Source:
    """What an entry of ``data.dataset`` names: `id`, `id:subset` or `path`, with `#N`; an existing path is a path whatever it looks like."""
    if exists(text):
        return Source("path", text)
    if "://" in text or text.startswith("ms::"):
        raise ConfigurationError(
            f"data.dataset: {text!r} names a store that is not built yet ({re.split('::?', text)[0]}); expected a path, an id of the Hugging Face Hub, or one of {', '.join(BUILT_IN)}"
        )
    name, num_rows = _split_count(text.removeprefix("hf::"))
    if name in BUILT_IN:
        return Source("built-in", name, None, num_rows)
    if exists(name):
        return Source("path", name, None, num_rows)
    if name.startswith(("/", "./", "../", "~")):
        raise DataError(f"data.dataset: {name}: no such file or folder{_subset_hint(name)}")
    return _find_id(name, num_rows)


def load_source(source: Source, config: DataConfig) -> list[Conversation]:
    """Every row of a data set, checked; raises DataError with the place of the first that is wrong."""
    if source.kind == "built-in":
        return list(_load_built_in(source.name, config))
    files = _list_files(Path(source.name)) if source.kind == "path" else _list_hub_files(source)
    conversations = [conversation for file in files for conversation in _load_file(file)]
    if not conversations:
        raise DataError(f"{source.name}: the data set is empty, expected at least one row")
    return conversations


def _split_count(text: str) -> tuple[str, int | None]:
    name, mark, count = text.rpartition("#")
    if not mark:
        return text, None
    if not count.isascii() or not count.isdigit() or int(count) < 1:
        raise ConfigurationError(f"data.dataset: {text!r} ends with #{count}, expected # and the number of rows to sample, 1 or more")
    return name, int(count)


def _subset_hint(name: str) -> str:
    path, mark, subset = name.rpartition(":")
    return f"; {path} is there, but only the ids of data sets have subsets (found :{subset})" if mark and exists(path) else ""


def _find_id(text: str, num_rows: int | None) -> Source:
    name, mark, subset = text.partition(":")
    if exists(name):
        raise DataError(f"data.dataset: {text}: no such file or folder{_subset_hint(text)}")
    if name in BUILT_IN:
        raise ConfigurationError(f"data.dataset: {text!r} names the subset {subset!r}, but {name} is built in and has none; expected {name}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.endswith(SUFFIXES):
        guess = nearest(name, sorted(BUILT_IN))
        raise DataError(f"data.dataset: {text!r} is no file here, and no id of a data set (owner/name) either{guess}")
    if mark and not subset:
        raise ConfigurationError(f"data.dataset: {text!r} ends with a colon, expected id:subset")
    return Source("hub", name, subset or None, num_rows)


def _load_built_in(name: str, config: DataConfig) -> Iterator[Conversation]:
    content = resources.files("finetune_trainer.data").joinpath(BUILT_IN[name]).read_bytes()
    if BUILT_IN[name] == SELF_COGNITION:
        _check_identity(name, config)
    for place, row in parse_rows(content, name):
        yield make_conversation(_fill(row, config), place)


def _check_identity(name: str, config: DataConfig) -> None:
    for field, value in (("data.modelName", config.model_name), ("data.modelAuthor", config.model_author)):
        if not value:
            raise ConfigurationError(f"{field} is absent; {name} teaches the model who it is and needs it: one value, or two (Chinese, English)")


def _fill(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """A built-in row with the name and the author of its language: the first values are Chinese, the last ones English, and a single one is both."""
    index = 0 if row["language"] == "zh" else -1
    for mark, values in (("{{NAME}}", config.model_name), ("{{AUTHOR}}", config.model_author)):
        if values:
            row = {key: text.replace(mark, values[index]) for key, text in row.items()}
    return row


def _list_files(path: Path) -> list[Path]:
    """The files of rows at a path: itself, or those of a folder."""
    if path.is_dir():
        return _choose_files(path, None, str(path))
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: found a file of type {path.suffix or 'none'}, expected .jsonl or .json")
    return [path]


def _list_hub_files(source: Source) -> list[Path]:
    """The files of a data set of the Hugging Face Hub, from the cache, downloaded first where they are not in it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(source.name, repo_type="dataset", allow_patterns=[f"*{suffix}" for suffix in SUFFIXES])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"data.dataset: {source.name} cannot be had from the Hugging Face Hub, and is not in its cache ({reason}); a data set that lies in a file is named by its path"
        ) from error
    return _choose_files(Path(folder), source.subset, source.name)


def _choose_files(folder: Path, subset: str | None, name: str) -> list[Path]:
    """The files with rows to train on: those of the subset (a folder or the stem of a file), and of the training split where files name splits."""
    found = sorted(path for suffix in SUFFIXES for path in folder.rglob(f"*{suffix}") if path.name not in DESCRIPTIONS)
    files = [path for path in found if subset is None or subset in (path.stem, *path.relative_to(folder).parts[:-1])]
    if not files:
        there = ", ".join(str(path.relative_to(folder)) for path in found[:8]) or "none"
        wanted = f" of the subset {subset!r}" if subset else ""
        raise DataError(f"{name}: the data set has no .jsonl or .json file{wanted} (files of that kind: {there})")
    return (
        [path for path in files if _split(path.relative_to(folder)) == "train"] or [path for path in files if _split(path.relative_to(folder)) is None] or files
    )


def _split(path: Path) -> str | None:
    match = SPLITS.search(str(path).lower())
    return match.group(1) if match else None


def _load_file(path: Path) -> Iterator[Conversation]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read: {error.strerror}") from error
    if not content.strip():
        raise DataError(f"{path}: the file is empty, expected rows with messages, one JSON object a line")
    for place, row in parse_rows(content, str(path)):
        yield make_conversation(row, place)
