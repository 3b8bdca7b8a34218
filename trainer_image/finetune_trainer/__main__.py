"""One rank of a run: ``python -m finetune_trainer RUN.json``, from a RunConfig to a verified result.

Everything heavy is imported inside functions: /progress is answered, and rows are read, before torch is imported.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import math
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from finetune_trainer import launch, reading
from finetune_trainer.contract import (
    Artifact,
    ArtifactFormat,
    ConfigurationError,
    DataError,
    EngineError,
    FailureReport,
    OutOfMemoryError,
    Reason,
    RunConfig,
    Verification,
    VerificationError,
    exit_for,
)
from finetune_trainer.failures import Failure, leave_failure
from finetune_trainer.report import Report
from finetune_trainer.streams import Unfailing, write_line

if TYPE_CHECKING:
    from finetune_trainer.data import Rows
    from finetune_trainer.families import Family
    from finetune_trainer.hf_files import HFModel
    from finetune_trainer.memory import Machine, ModelFacts
    from finetune_trainer.parallel import Ranks
    from finetune_trainer.train import Trainer

SHARED_SECTIONS = ("model", "data", "tuning", "parallelism", "training", "checkpoints", "output")
BROKEN_CONNECTION = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe", "connection refused", "socket")
TIMED_OUT = ("timed out", "timeout")


class Stop:
    """Whether this process was asked to end by SIGTERM or SIGINT.

    In training it ends after the step. Elsewhere nothing is lost by it, and the kernel ends it at once: a handler would not run
    inside C++ (waiting for the other ranks), and what it raised could be taken for an error of a library. The launcher says why.
    """

    def __init__(self) -> None:
        self.requested = False
        self._handle_signals(signal.SIG_DFL)

    @contextmanager
    def waits(self) -> Iterator[None]:
        """While training lasts: the loop asks ``requested`` after each step."""
        self._handle_signals(self._note)
        try:
            yield
        finally:
            self._handle_signals(signal.SIG_DFL)

    def ignore(self) -> None:
        """While the last words are written."""
        self._handle_signals(signal.SIG_IGN)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True

    def _handle_signals(self, handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)


def main(arguments: Sequence[str]) -> int:
    """Run one rank; returns the exit code."""
    stop = Stop()
    report: Report | None = None
    rank, identity = 0, ""
    try:
        rank = launch.current_rank()
        config = read_config(arguments)
        identity = config.identity()
        report = Report(config, rank)
        gc.disable()  # until training begins: what is imported and built until then stays
        warnings.filterwarnings("ignore", module=r"(megatron|torch|transformer_engine|transformers|peft)\b.*")
        rows = reading.start(config, launch.place_on_node(), launch.failure_folder())  # first: it forks, and must not with threads
        report.serve()
        run(config, identity, report, stop, rows)
    except Exception as error:  # noqa: BLE001 the one place where every failure gets its reason and exit code
        stop.ignore()
        failure = describe(error, rank)
        leave(failure, report, identity)
        return failure.report.exit_code
    report.close()
    return 0


def read_config(arguments: Sequence[str]) -> RunConfig:
    """The configuration that the command line names; raises ConfigurationError."""
    if len(arguments) != 1:
        raise ConfigurationError("usage: python -m finetune_trainer RUN.json")
    return RunConfig.load(Path(arguments[0]))


@dataclass(frozen=True)
class Job:
    """What a run works on, and how: all that is known before anything large is made, the same on every rank."""

    config: RunConfig
    """Resolved."""
    machine: Machine
    hf: HFModel
    family: Family
    facts: ModelFacts
    rows: Rows
    total_steps: int

    def describe_shortage(self) -> str:
        """What was estimated, and what would need less memory."""
        from finetune_trainer import resolve

        return resolve.describe_shortage(self.config, self.facts, self.machine, max(self.rows.lengths))


def run(given: RunConfig, identity: str, report: Report, stop: Stop, beside: reading.Reading) -> None:
    """The straight line of one run, whose rows are read ``beside`` it. Collective."""
    from finetune_trainer import checkpoint, checkpoint_files, parallel, train, training_state, verify
    from finetune_trainer.agreement import from_every

    report.stage("loading")
    parallel.open_process_group(given)
    job = find_job(given, report, beside)
    config, total_steps = job.config, job.total_steps
    with explain_out_of_memory(job.describe_shortage):
        ranks = parallel.initialize(config.parallelism, config.training.seed)
        chunks, trainer = load(job, ranks, report)
        checkpoints = checkpoint.Checkpoints(config, identity, {"rows": job.rows.digest, "model": model_digest(job.hf)}, trainer.state, report)
        beginning = checkpoints.resume(total_steps)
        needed = checkpoint_files.needed_bytes(config, *training_state.count_bytes(trainer.state), model_bytes(job.hf, config), total_steps - beginning.step)
        artifacts = prepare_output(config, total_steps, needed)
        with stop.waits(), collects_garbage():
            train.fit(trainer, job.rows, config, ranks, report, checkpoints, beginning, lambda: stop.requested)

        checkpoints.refuse_newer_attempt()
        report.stage("exporting")
        for kind, folder in artifacts:
            export(kind, folder, chunks, job.family, job.hf, config, ranks, total_steps)
            report.heartbeat()
        report.stage("verifying")
        verification = verify.check(chunks, job.family, job.hf, config, ranks, job.rows.rows, artifacts)
        peaks = from_every(peak_memory_gib())
        parallel.shut_down()
        conclude(report, identity, artifacts, verification, peaks)


def find_job(given: RunConfig, report: Report, beside: reading.Reading) -> Job:
    """Open the model, wait for the rows, choose what ``given`` is silent about, and refuse what cannot work. Collective."""
    from finetune_trainer import families, hf_files, memory, parallel, resolve, train, verify
    from finetune_trainer.agreement import from_every, together

    config = agree(given, from_every((given.model_dump(), given.run.output_dir)))
    machine = parallel.describe_machine()

    def tell(line: str) -> None:
        report.say(line)
        report.heartbeat()

    def open_model() -> tuple[HFModel, Family, ModelFacts]:
        hf = hf_files.open_model(config.model)
        family = families.find(hf.config)
        facts = memory.read_facts(hf.config)
        resolve.resolve(config, facts, machine)  # what cannot work is refused before rows are waited for
        return hf, family, facts

    hf, family, facts = together(open_model)
    rows = together(lambda: beside.rows(tell))
    check_same_rows(from_every(rows.digest))
    resolution = resolve.resolve(config, facts, machine, max(rows.lengths))
    job = Job(resolution.config, machine, hf, family, facts, rows, resolve.total_steps(resolution.config, len(rows.rows)))
    together(lambda: train.check_schedule(job.config.training, job.total_steps))
    together(lambda: verify.check_memory(hf, job.config, parallel.host_memory()))
    for note in resolution.notes:
        report.note(note)
    report.resolved(resolution.chosen)
    report.rows(rows.counts)
    return job


def load(job: Job, ranks: Ranks, report: Report) -> tuple[Sequence[Any], Trainer]:
    """The model with the checkpoint's weights and its adapters, cut as ``ranks`` say, bare and set up for training. Collective."""
    from finetune_trainer import convert, lora, model, train
    from finetune_trainer.agreement import together

    config = job.config
    chunks = together(lambda: model.build(job.family, job.hf.config, config, ranks))
    together(lambda: convert.import_base(chunks, job.family, job.hf, ranks))
    report.heartbeat()
    together(lambda: lora.attach(chunks, config.tuning, config.training.seed))
    return chunks, train.prepare(chunks, job.family, job.hf.config, config, ranks, job.total_steps)


@contextmanager
def collects_garbage() -> Iterator[None]:
    """From now on; what is there already is not looked at again."""
    gc.freeze()
    gc.enable()
    yield


@contextmanager
def explain_out_of_memory(describe_shortage: Callable[[], str]) -> Iterator[None]:
    """Turn the allocator's error into one that says what was estimated and what would need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory: {_one_line(error)}; {describe_shortage()}") from error


def agree(own: RunConfig, everyone: Sequence[tuple[Mapping[str, Any], str]]) -> RunConfig:
    """This rank's configuration with rank 0's output folder; raises ConfigurationError when nodes were started with other options."""
    first, output_dir = everyone[0]
    for rank, (other, _) in enumerate(everyone):
        for section in SHARED_SECTIONS:
            for name, value in first[section].items():
                if other[section][name] != value:
                    raise ConfigurationError(
                        f"{section}.{name} is {other[section][name]!r} on rank {rank} and {value!r} on rank 0; every node must be started with the same options"
                    )
    return own.model_copy(update={"run": own.run.model_copy(update={"output_dir": output_dir})})


def check_same_rows(digests: Sequence[str]) -> None:
    """Raise DataError when the ranks have read different rows, as nodes do whose copies of a file differ."""
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise DataError(f"data.dataset: rank {rank} has read other rows than rank 0; every node must see the same files and the same tokenizer")


def model_digest(hf: HFModel) -> str:
    """Hash of config.json and of every tensor's name, shape and data type, 16 hexadecimal digits; the weights' values are not read."""
    tensors = sorted((name, list(entry.shape), str(entry.dtype)) for name, entry in hf.entries.items())
    return hashlib.sha256(json.dumps([hf.config, tensors], sort_keys=True).encode()).hexdigest()[:16]


def model_bytes(hf: HFModel, config: RunConfig) -> int:
    """Bytes of the model's tensors as an export has them: in the data type of the run, whatever the source's is."""
    import torch

    dtype: torch.dtype = getattr(torch, config.model.torch_dtype or "float32")
    return sum(math.prod(entry.shape) for entry in hf.entries.values()) * dtype.itemsize


def prepare_output(config: RunConfig, total_steps: int, needed: int) -> list[tuple[ArtifactFormat, Path]]:
    """Before training: remove what killed exports have left, and prove that every result can be written. Collective.

    Returns the results that are to come. Raises ConfigurationError for a folder that holds something else, cannot be
    written, or whose disk has fewer than ``needed`` bytes free.
    """
    from finetune_trainer import hf_export
    from finetune_trainer.agreement import from_first, together

    output_dir = Path(config.run.output_dir)
    artifacts = list(artifact_folders(config, output_dir, total_steps).items())

    def check() -> None:
        for _, folder in artifacts:
            hf_export.check_replaceable(folder)
        hf_export.check_output_folder(output_dir, needed)

    from_first(lambda: hf_export.remove_partials(output_dir))
    together(check)
    return artifacts


def artifact_folders(config: RunConfig, output_dir: Path, step: int) -> dict[ArtifactFormat, Path]:
    """Where each format of the result goes; the adapter is Megatron-SWIFT's ``checkpoint-<step>``, merged weights beside it."""
    formats = config.output.formats or []
    if config.run.artifact_layout == "formats":
        return {kind: output_dir / kind for kind in formats}
    merged = "-merged" if config.tuning.tuner_type == "lora" else ""
    suffixes: dict[ArtifactFormat, str] = {"peft": "", "huggingface": merged, "megatron": "-mcore"}
    return {kind: output_dir / f"checkpoint-{step}{suffixes[kind]}" for kind in formats}


def export(kind: ArtifactFormat, folder: Path, chunks: Sequence[Any], family: Family, hf: HFModel, config: RunConfig, ranks: Ranks, step: int) -> None:
    """Write one format of the result. Collective."""
    from finetune_trainer import checkpoint, convert

    if kind == "peft":
        convert.export_adapter(chunks, family, hf, ranks, folder, config.tuning, config.model.source)
    elif kind == "huggingface":
        convert.export_huggingface(chunks, family, hf, ranks, folder, config.output.max_shard_size)
    else:
        checkpoint.save_model(chunks, ranks, folder, step)


def conclude(report: Report, identity: str, artifacts: Sequence[tuple[ArtifactFormat, Path]], verification: Verification, peaks: Sequence[float]) -> None:
    """Leave the report of a run that has come to its end; raises VerificationError when the result was not proven."""
    from finetune_trainer import hf_files

    found = (
        [Artifact(format=kind, path=str(folder), sha256=hf_files.file_sha256(folder / hf_files.MANIFEST)) for kind, folder in artifacts]
        if report.speaks
        else []
    )
    report.result(found, verification, peaks)
    if not verification.passed:
        raise VerificationError(f"output.verification {verification.level}: {verification.message}")
    report.finish(identity)


def peak_memory_gib() -> float:
    """The most memory that this process has held: on its GPU where it has one, else of the host."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# What a failure is


def describe(error: BaseException, rank: int) -> Failure:
    """The reason, the sentence and the exit code of an exception; an Internal one keeps its traceback."""
    reason, message = classify(error)
    trace = "".join(traceback.format_exception(error)) if reason is Reason.INTERNAL else ""
    report = FailureReport(reason=reason, message=message, rank=rank, node=socket.gethostname(), exit_code=exit_for(reason).code)
    return Failure(report, time.time(), trace)


def classify(error: BaseException) -> tuple[Reason, str]:
    """Reason and sentence of an exception."""
    if isinstance(error, EngineError):
        return error.reason, str(error)
    text = _one_line(error)
    if _is_out_of_memory(error):
        return (
            Reason.OUT_OF_MEMORY,
            f"out of memory: {text}. A smaller training.microBatchSize or data.maxLength, recomputeGranularity full or larger parallel sizes need less",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Reason.CONFIGURATION, f"the disk is full: {error}; run.outputDir needs more room (checkpoints.saveTotalLimit keeps fewer checkpoints)"
    if _is_distributed(error):
        lowered = text.lower()
        if any(sign in lowered for sign in TIMED_OUT):
            return Reason.HANG, f"a collective did not end within parallelism.ddpTimeout: {text}"
        return Reason.DISTRIBUTED, f"the connection between the ranks broke: {text}"
    return Reason.INTERNAL, f"{type(error).__name__}: {text}" if text else type(error).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n", 1)[0].split())


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _is_distributed(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    lowered = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and any(sign in lowered for sign in BROKEN_CONNECTION))


def leave(failure: Failure, report: Report | None, identity: str) -> None:
    """Hand the failure to the launcher, or say it where there is none; leave rank 0's report."""
    folder = launch.failure_folder()
    if folder is not None:
        leave_failure(folder, failure)
    else:
        write_line(failure.trace or failure.report.message, sys.stderr)
    if report is not None:
        report.close()
        try:
            report.fail(identity, failure.report)
        except OSError as error:
            if folder is None:  # else the launcher tries again, and says so
                write_line(f"the report could not be written: {error}", sys.stderr)


def end(code: int) -> None:
    """End this process. After a failure at once: what is left of a broken gang would wait for its other ranks."""
    Unfailing(sys.stdout).flush()
    Unfailing(sys.stderr).flush()
    if code == 0:
        sys.exit(0)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


if __name__ == "__main__":
    end(main(sys.argv[1:]))
