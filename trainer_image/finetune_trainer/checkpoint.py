"""Checkpoints of a run: written to a partial folder, published by a rename, found again by the run's identity.

``<outputDir>/checkpoints/step-N`` holds a torch_dist checkpoint of Megatron-core and ``manifest.json``, which is written last: a
folder without it is not whole. Our own facts are in the manifest; Megatron's common.pt is empty, and tensors are read
with ``weights_only``. The index that torch writes is a pickle: it is opened only when it names nothing but the classes of an index.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import queue
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing import get_context, resource_tracker
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from finetune_trainer import hf_export, hf_files, launch, megatron_cpu, training_state
from finetune_trainer.agreement import from_every, from_first
from finetune_trainer.checkpoint_files import (
    CLAIM,
    INDEX,
    MANIFEST,
    Claim,
    Manifest,
    check_index,
    choose_checkpoint,
    finish_replacements,
    free_name,
    make_empty,
    read_manifest,
    read_whole,
    surplus,
    sync_folder,
)
from finetune_trainer.contract import ConfigurationError, EngineError, Preempted, RunConfig
from finetune_trainer.lora import adapters, merged_weight
from finetune_trainer.parallel import Ranks
from finetune_trainer.report import Beginning, Report, write_atomically
from finetune_trainer.training_state import TrainingState

megatron_cpu.install()

from megatron.core import dist_checkpointing  # noqa: E402  (after the redirection)
from megatron.core.dist_checkpointing import ShardedObject  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy  # noqa: E402

LATEST = "latest_checkpointed_iteration.txt"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
TORCH_WRITER = ("inline_container", "iostream error")
"""In the words of torch's writer of files, which does not say why a write has failed."""
PROBE_BYTES = 2**20
"""More than a full disk still takes: a write that fails for want of room has taken what there was."""


class Checkpoints:
    """The checkpoints of one run, and what it takes to write and to find them."""

    def __init__(self, config: RunConfig, identity: str, digests: Mapping[str, str], state: TrainingState, report: Report) -> None:
        self.folder = Path(config.run.output_dir) / "checkpoints"
        self._options = config.checkpoints
        self._claim = Claim(identity=identity, attempt=config.run.attempt)
        self._digests = dict(digests)
        self._state = state
        self._report = report
        self._queue = AsyncCallsQueue() if config.checkpoints.async_save else None
        self._pending = False
        _collect_results_in(asynchronous=config.checkpoints.async_save)

    def resume(self, total_steps: int) -> Beginning:
        """Go on from the newest whole checkpoint of this run, when there is one and ``resume`` is auto. Collective."""
        found, notes = from_first(functools.partial(self._open, total_steps))
        for note in notes:
            self._report.note(note)
        if found is None:
            return Beginning(0, total_steps)
        manifest = read_manifest(found)
        loaded = dist_checkpointing.load(training_state.expect(self._state), str(found))
        training_state.restore(self._state, loaded, manifest.updates)
        _restore_scaler(self._state, manifest.grad_scaler)
        self._report.note(f"continues from step {manifest.step} ({found})")
        return Beginning(manifest.step, total_steps, manifest.updates, tuple(manifest.curve))

    def _open(self, total_steps: int) -> tuple[Path | None, list[str]]:
        """Take the folder for this attempt, remove what broken saves have left, and choose the checkpoint to go on from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_newer_attempt()
        write_atomically(self.folder / CLAIM, self._claim.model_dump_json().encode())
        finish_replacements(self.folder)
        for partial in [*self.folder.glob(".partial-*"), *self.folder.glob(".old-*")]:
            shutil.rmtree(partial)
        if self._options.resume == "never":
            return None, []
        found, notes = choose_checkpoint(self.folder, self._claim.identity, total_steps, self._digests)
        if found is not None:
            check_index(found / INDEX)
        return found, notes

    @property
    def resumable(self) -> bool:
        """Whether training can go on from what ``save`` writes."""
        return not self._options.no_save_optim

    def is_due(self, step: int) -> bool:
        """Whether ``saveSteps`` asks for a checkpoint after ``step``."""
        return step % self._options.save_steps == 0

    def save(self, step: int, updates: int) -> None:
        """Write a checkpoint of ``step`` and publish it; with asyncSave it is published by a later ``poll`` or ``wait``. Collective.

        Raises Preempted when a newer attempt of this run has started, ConfigurationError when the disk is full, EngineError when writing fails otherwise.
        """
        self.wait()
        ranks = self._state.ranks
        partial = self.folder / f".partial-step-{step}-attempt-{self._claim.attempt}"
        from_first(functools.partial(make_empty, partial))
        manifest = Manifest(
            identity=self._claim.identity,
            attempt=self._claim.attempt,
            step=step,
            updates=updates,
            digests=self._digests,
            with_optimizer=not self._options.no_save_optim,
            grad_scaler=_scaler_state(self._state),
            world_size=ranks.world_size,
            tensor_model_parallel_size=ranks.tp.size,
            pipeline_model_parallel_size=ranks.pp.size,
            saved=datetime.now(UTC),
            curve=list(self._report.curve),
            files={},
        )
        tensors = training_state.gather(self._state, with_optimizer=manifest.with_optimizer)
        with _explain_failed_writes(self.folder):
            request = dist_checkpointing.save(tensors, str(partial), _strategy(), async_sharded_save=self._queue is not None)
        publish = functools.partial(self._publish, partial, manifest)
        if self._queue is None:
            publish()
        else:
            request.add_finalize_fn(publish)
            self._queue.schedule_async_request(request)
            self._pending = True

    def poll(self) -> None:
        """Publish an asynchronous checkpoint that is written by now; raises what ``save`` does. Collective."""
        self._finalize(blocking=False)

    def wait(self) -> None:
        """Publish the asynchronous checkpoint that is being written; raises what ``save`` does. Collective."""
        self._finalize(blocking=True)

    def close(self) -> None:
        """Wait, and end what writes in the background; raises what ``save`` does. Collective."""
        self.wait()
        _collect_results_in(asynchronous=False)

    def refuse_newer_attempt(self) -> None:
        """Raise Preempted on every rank when a newer attempt of this run has started. Collective."""
        from_first(self._refuse_newer_attempt)

    def _finalize(self, *, blocking: bool) -> None:
        if self._queue is not None and self._pending:
            with _explain_failed_writes(self.folder):
                self._queue.maybe_finalize_async_calls(blocking=blocking)
            self._pending = self._queue.get_num_unfinalized_calls() > 0

    def _publish(self, partial: Path, manifest: Manifest) -> None:
        from_first(functools.partial(self._publish_alone, partial, manifest))
        self._report.heartbeat()

    def _publish_alone(self, partial: Path, manifest: Manifest) -> None:
        self._refuse_newer_attempt()
        whole = manifest.model_copy(update={"files": {path.name: path.stat().st_size for path in partial.iterdir()}})
        write_atomically(partial / MANIFEST, whole.model_dump_json(indent=2).encode())
        place = self.folder / f"step-{manifest.step}"
        old = self.folder / f".old-step-{manifest.step}"
        if place.exists():
            found = read_whole(place)
            place.rename(old if isinstance(found, Manifest) and found.is_of(manifest.identity, self._digests) else free_name(place))
        partial.rename(place)
        sync_folder(self.folder)
        if old.exists():
            shutil.rmtree(old)
        for path in surplus(self.folder, manifest.identity, self._options.save_total_limit, self._digests):
            shutil.rmtree(path)

    def _refuse_newer_attempt(self) -> None:
        path = self.folder / CLAIM
        if path.is_file():
            newest = Claim.model_validate_json(path.read_bytes())
            if newest.identity == self._claim.identity and newest.attempt > self._claim.attempt:
                raise Preempted(f"attempt {newest.attempt} of this run has started in {self.folder}; attempt {self._claim.attempt} publishes nothing more")


# Megatron's writer


def _strategy() -> Any:
    return TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)


@functools.cache
def _manager() -> SyncManager:
    manager = SyncManager(ctx=get_context("spawn"))
    with _stop_signals_blocked():
        manager.start(launch.die_with_parent, (os.getpid(),))
    return manager


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Let what is started meanwhile never get SIGTERM and SIGINT: systemd and Slurm send them to every process, and a rank still saves then.

    A process inherits what its parent blocks. One that ignored them by itself would have to import this module, and with it torch and Megatron-core.
    """
    resource_tracker.ensure_running()  # now, because starting it unblocks both signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collect_results_in(*, asynchronous: bool) -> None:
    """Give Megatron's writer the queue for its results.

    Its own is a manager process for every rank, which outlives a rank that is killed. A save that is waited for needs no other process than the
    writer, which this one reads at once; one in the background gets a manager that dies with its rank.
    """
    filesystem_async._results_queue = _manager().Queue() if asynchronous else queue.Queue()


@contextmanager
def _explain_failed_writes(folder: Path) -> Iterator[None]:
    """Turn what Megatron's writer raises, below ``folder``, into a failure with a reason.

    Raises ConfigurationError when the disk is full, else EngineError. A CheckpointException, which is no Exception, comes on every rank
    and says why on rank 0 alone: all raise what that one finds.
    """
    try:
        yield
    except CheckpointException as error:
        failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        raise from_first(functools.partial(_describe_failed_write, folder, failures)) from error
    except RuntimeError as error:
        if not _is_of_torch_writer(str(error)):
            raise
        raise _describe_failed_write(folder, {torch.distributed.get_rank(): error}) from error  # of common.pt, which rank 0 writes alone


def _describe_failed_write(folder: Path, failures: Mapping[int, BaseException]) -> EngineError:
    full = _full_disk(folder, [str(failure) for failure in failures.values()])
    if full is not None:
        return ConfigurationError(
            f"{folder}: the disk is full ({full}): a checkpoint could not be written, {shutil.disk_usage(folder).free} bytes are free; "
            "run.outputDir needs more room (checkpoints.saveTotalLimit keeps fewer checkpoints)"
        )
    rank, first = min(failures.items())
    line = str(first).partition("\n")[0]
    return EngineError(f"{folder}: a checkpoint could not be written: rank {rank}: {type(first).__name__}: {line}")


def _full_disk(folder: Path, failures: Sequence[str]) -> str | None:
    """The kernel's words for a full disk or quota, where that is why writing failed. Errors come from other processes as texts, without their causes."""
    for number in FULL_DISK:
        if any(f"[Errno {number}]" in failure for failure in failures):
            return os.strerror(number)
    return _probe(folder) if any(map(_is_of_torch_writer, failures)) else None


def _is_of_torch_writer(failure: str) -> bool:
    return any(sign in failure for sign in TORCH_WRITER)


def _probe(folder: Path) -> str | None:
    """Try to write; the kernel's words when the disk or the quota is full."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror if error.errno in FULL_DISK else None
    return None


def _scaler_state(state: TrainingState) -> dict[str, float]:
    """The loss scale of float16, else nothing."""
    for inner in state.optimizer.chained_optimizers:
        scaler = getattr(inner, "grad_scaler", None)
        if scaler is not None:
            return {name: float(value) for name, value in scaler.state_dict().items()}
    return {}


def _restore_scaler(state: TrainingState, saved: dict[str, float]) -> None:
    for inner in state.optimizer.chained_optimizers:
        scaler = getattr(inner, "grad_scaler", None)
        if scaler is not None and saved:
            scale = torch.tensor([saved["scale"]], dtype=torch.float32, device=state.ranks.device)
            scaler.load_state_dict({**{name: int(value) for name, value in saved.items()}, "scale": scale})


# The megatron format


def save_model(chunks: Sequence[torch.nn.Module], ranks: Ranks, folder: Path, step: int) -> None:
    """Write the whole model (LoRA merged) as Megatron-core's torch_dist: ``iter_<step>`` and ``latest_checkpointed_iteration.txt``, as Megatron-LM reads it. Collective.

    Raises ConfigurationError when the disk is full, EngineError when writing fails otherwise.
    """
    from_first(functools.partial(hf_export.check_replaceable, folder))
    partial = hf_export.partial_folder(folder)
    iteration = partial / f"iter_{step:07}"
    from_first(functools.partial(make_empty, iteration, partial))
    _collect_results_in(asynchronous=False)
    with merged(chunks):
        content = {**_sharded_weights(chunks), "iteration": step, "checkpoint_version": 3.0}
        with _explain_failed_writes(folder.parent):
            dist_checkpointing.save(content, str(iteration), _strategy())
    from_first(lambda: write_atomically(partial / LATEST, str(step).encode()))
    _describe_files(partial, ranks)
    from_first(functools.partial(hf_export.replace_folder, partial, folder))


def differing_weights(chunks: Sequence[torch.nn.Module], folder: Path) -> list[str]:
    """Read a folder of ``save_model`` back: names of this rank's parameters, as this stage calls them, that are not bitwise there. Collective."""
    iteration = folder / f"iter_{int((folder / LATEST).read_text(encoding='utf-8')):07}"
    differing = []
    with merged(chunks):
        content = {model: _tensors_only(weights) for model, weights in _sharded_weights(chunks).items()}
        trained = {(model, name): each.data for model, weights in content.items() for name, each in weights.items() if isinstance(each.data, torch.Tensor)}
        for model, name in trained:
            content[model][name].data = torch.zeros_like(trained[model, name])  # loading fills these tensors
        loaded = dist_checkpointing.load(content, str(iteration))
        differing = [name for (model, name), tensor in trained.items() if not torch.equal(loaded[model][name], tensor)]
    return sorted(differing)


def _sharded_weights(chunks: Sequence[torch.nn.Module]) -> dict[str, dict[str, Any]]:
    sharded: dict[str, dict[str, Any]] = {}
    for index, chunk in enumerate(chunks):
        model: Any = chunk
        sharded["model" if len(chunks) == 1 else f"model{index}"] = model.sharded_state_dict()
    return sharded


def _tensors_only(sharded: dict[str, Any]) -> dict[str, Any]:
    """Without the modules' extra states: which modules have one depends on the kind of layers, and on transformer-engine's version."""
    return {name: each for name, each in sharded.items() if not isinstance(each, ShardedObject)}


def _describe_files(folder: Path, ranks: Ranks) -> None:
    """Write the manifest with every file's hash; the ranks share the files out."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    own = {name: hf_files.describe_file(folder / name) for name in names[ranks.rank :: ranks.world_size]}
    files = {name: entry for each in from_every(own) for name, entry in each.items()}
    content = {"version": 1, "files": dict(sorted(files.items()))}
    from_first(lambda: write_atomically(folder / hf_files.MANIFEST, json.dumps(content, indent=2).encode()))


@contextmanager
def merged(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The model without its adapters, their product in the weights, while the context lasts."""
    undo: list[Callable[[], None]] = []
    for chunk in chunks:
        parents = {id(child): (parent, name) for parent in chunk.modules() for name, child in parent.named_children()}
        for _, layer in adapters([chunk]):
            undo.append(_merge(*parents[id(layer)], layer))
    try:
        yield
    finally:
        for step in undo:
            step()


def _merge(parent: torch.nn.Module, name: str, layer: Any) -> Callable[[], None]:
    """Put a layer with the merged weight in the place of one with an adapter; what is returned puts the adapter back."""
    base, weight = layer.base, layer.base.weight.data
    base.weight.data = merged_weight(layer)
    layer.ask_for_normed(False)
    setattr(parent, name, base)

    def put_back() -> None:
        base.weight.data = weight
        layer.ask_for_normed(True)
        setattr(parent, name, layer)

    return put_back
