"""Checkpoints on disk: what one says about itself, which one a run goes on from, which ones it removes, how much room they need.

No torch: folders, JSON and arithmetic.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from finetune_trainer.contract import ArtifactFormat, Contract, CurvePoint, ModelError, Natural, RunConfig

MANIFEST = "manifest.json"
CLAIM = "attempt.json"
INDEX = ".metadata"
NOTHING_KNOWN: Mapping[str, str] = MappingProxyType({})


class Manifest(Contract):
    """What a checkpoint says about itself."""

    version: Literal[1] = 1
    identity: str
    attempt: Natural
    step: Natural
    updates: Natural
    """Steps that changed the weights; fewer than ``step`` where float16 gradients overflowed."""
    with_optimizer: bool
    digests: dict[str, str] = Field({})
    """Hashes of what the identity only names: ``rows`` and ``model``."""
    grad_scaler: dict[str, float] = Field({})
    world_size: Natural
    tensor_model_parallel_size: Natural
    pipeline_model_parallel_size: Natural
    saved: datetime
    curve: list[CurvePoint]
    files: dict[str, int]
    """Bytes by file name."""

    def changed(self, digests: Mapping[str, str]) -> list[str]:
        """Names of what was something else when this checkpoint was saved; what either side does not know counts as the same."""
        return [name for name, digest in digests.items() if self.digests.get(name, digest) != digest]

    def is_of(self, identity: str, digests: Mapping[str, str]) -> bool:
        """Whether a run of this identity that trains on this has saved it."""
        return self.identity == identity and not self.changed(digests)


class Claim(Contract):
    """The newest attempt that has started in a folder."""

    identity: str
    attempt: Natural


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; raises OSError or pydantic's ValidationError where there is none that is whole."""
    return Manifest.model_validate_json((folder / MANIFEST).read_bytes())


def read_whole(folder: Path) -> Manifest | str:
    """The manifest of a whole checkpoint, or why it is not one."""
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return "it has no manifest, so it was never finished"
    except ValidationError:
        return "its manifest cannot be read"
    for name, size in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"its file {name} is {'truncated' if path.is_file() else 'missing'}"
    return manifest


def _by_step(folder: Path) -> list[Path]:
    """Folders of checkpoints, newest first."""
    found = [(int(number), path) for path in folder.glob("step-*") if (number := path.name.removeprefix("step-").partition("-")[0]).isdecimal()]
    return [path for _, path in sorted(found, reverse=True)]


def choose_checkpoint(folder: Path, identity: str, total_steps: int, digests: Mapping[str, str] = NOTHING_KNOWN) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a sentence for every one that was passed over.

    ``digests`` as in Manifest; what is not given is not compared.
    """
    notes = []
    foreign: dict[str, list[str]] = {}
    for path in _by_step(folder):
        manifest = read_whole(path)
        if isinstance(manifest, str):
            notes.append(f"{path} is left alone: {manifest}")
        elif manifest.identity != identity:
            foreign.setdefault(manifest.identity, []).append(path.name)
        elif changed := manifest.changed(digests):
            notes.append(
                f"{path} is left alone: it was saved with {' and '.join(f'other {name}' if name == 'rows' else f'another {name}' for name in changed)} under the same name"
            )
        elif not manifest.with_optimizer:
            notes.append(f"{path} is left alone: it was saved with noSaveOptim, so training cannot go on from it")
        elif manifest.step > total_steps:
            notes.append(f"{path} is left alone: the run has {total_steps} steps")
        else:
            return path, notes + [_describe_foreign(folder, names, other, identity) for other, names in foreign.items()]
    return None, notes + [_describe_foreign(folder, names, other, identity) for other, names in foreign.items()]


def _describe_foreign(folder: Path, names: Sequence[str], other: str, identity: str) -> str:
    return (
        f"{', '.join(names)} in {folder} {'is' if len(names) == 1 else 'are'} of another run (model, data, tuning or training differ: identity {other}, "
        f"this run's is {identity}) and left alone"
    )


def surplus(folder: Path, identity: str, limit: int | None, digests: Mapping[str, str] = NOTHING_KNOWN) -> list[Path]:
    """Whole checkpoints of this run beyond the newest ``limit``."""
    if limit is None:
        return []
    own = [path for path in _by_step(folder) if isinstance(found := read_whole(path), Manifest) and found.is_of(identity, digests)]
    return own[limit:]


def free_name(path: Path) -> Path:
    """A name beside ``path`` for another run's checkpoint that stands where ours is to be."""
    return next(name for number in range(1, 10_000) if not (name := path.with_name(f"{path.name}-other-{number}")).exists())


def finish_replacements(folder: Path) -> None:
    """Where a save was killed between its two renames, put the new checkpoint in its place when it is whole, else the old one back."""
    for old in folder.glob(".old-step-*"):
        place = folder / old.name.removeprefix(".old-")
        if place.exists():
            continue
        before = read_whole(old)
        partials = sorted(folder.glob(f".partial-{place.name}-*"))
        new = (
            path
            for path in partials
            if isinstance(before, Manifest) and isinstance(found := read_whole(path), Manifest) and found.is_of(before.identity, before.digests)
        )
        next(new, old).rename(place)
        sync_folder(folder)


def make_empty(folder: Path, top: Path | None = None) -> None:
    """Make ``folder``, and remove what stands there, or at ``top`` above it."""
    if (top or folder).exists():
        shutil.rmtree(top or folder)
    folder.mkdir(parents=True)


def sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _IndexReader(pickle.Unpickler):
    """Reads torch's index and refuses every class that does not belong in one."""

    allowed: ClassVar[Mapping[str, frozenset[str]]] = {
        "torch": frozenset({"Size", "float32"}),
        "torch.serialization": frozenset({"_get_layout"}),
        "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
        "torch.distributed.checkpoint.planner": frozenset({"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}),
        "torch.distributed.checkpoint.metadata": frozenset(
            {"ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"}
        ),
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.allowed.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in an index")
        return super().find_class(module, name)


def check_index(path: Path) -> None:
    """Refuse an index that would do more than describe tensors, before torch opens it; raises ModelError."""
    try:
        with path.open("rb") as file:
            _IndexReader(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise ModelError(f"{path}: not the index of a checkpoint: {error}") from error


def needed_bytes(config: RunConfig, checkpoint_bytes: int, trained_bytes: int, model_bytes: int, remaining_steps: int) -> int:
    """Bytes that the rest of a run writes at most at one time: its checkpoints and its exports."""
    options = config.checkpoints
    saves = -(-remaining_steps // options.save_steps)
    kept = saves if options.save_total_limit is None else min(saves, options.save_total_limit + 1)
    sizes: dict[ArtifactFormat, int] = {"peft": trained_bytes, "huggingface": model_bytes, "megatron": model_bytes}
    return kept * (trained_bytes if options.no_save_optim else checkpoint_bytes) + sum(sizes[each] for each in config.output.formats or [])
