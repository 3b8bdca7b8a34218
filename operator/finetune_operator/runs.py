"""Folders of results on this machine: which run is continued, who holds it, and what it left.

The run to continue is the newest of the job's name whose identity is the same. Where there is none, or it has no checkpoint,
has succeeded or is still running, a new folder is made.
"""

from __future__ import annotations

import fcntl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError

from finetune_operator.plan import Identity, Place, Plan, make_plan
from finetune_operator.schema import FineTuneJob
from finetune_operator.settings import Settings
from finetune_trainer.contract import ConfigurationError, RunConfig, RunReport


@dataclass(frozen=True)
class Run:
    """One run that is about to start: its plan, its folder, and whether it continues an earlier attempt."""

    plan: Plan
    folder: Path
    continued: bool

    @property
    def log_folder(self) -> Path:
        return self.folder / "logs" / f"attempt-{self.plan.config.run.attempt}"


@contextmanager
def claim(job: FineTuneJob, settings: Settings, place: Place, policy: str) -> Iterator[Run]:
    """The run to continue, or a new one; its folder is locked, so that nobody else continues it meanwhile."""
    jobs = Path(place.work) / job.namespace / job.name

    def planned(identity: Identity) -> Plan:
        plan = make_plan(job, settings, place, identity)
        checkpoints = plan.config.checkpoints.model_copy(update={"resume": policy})
        return replace(plan, config=plan.config.model_copy(update={"checkpoints": checkpoints}))

    for folder in _newest_first(jobs) if policy == "auto" else ():
        with _locked(folder) as is_mine:
            earlier = _load(folder / "run.json", RunConfig)
            if earlier is None:
                continue
            plan = planned(Identity(earlier.run.uid, earlier.run.attempt + 1))
            if plan.config.identity() != earlier.identity() or plan.config.run.output_dir != str(folder):
                continue
            if is_mine and has_checkpoint(folder) and not _has_succeeded(folder):
                yield Run(plan, folder, continued=True)
                return
            break
    plan = planned(Identity(str(uuid.uuid4())))
    folder = Path(plan.config.run.output_dir)
    _make_folder(folder)
    with _locked(folder):
        yield Run(plan, folder, continued=False)


def _newest_first(jobs: Path) -> list[Path]:
    files = sorted(jobs.glob("*/run.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return [path.parent for path in files]


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has left a finished checkpoint: its manifest is written last."""
    return any(folder.glob("checkpoints/step-*/manifest.json"))


def _has_succeeded(folder: Path) -> bool:
    report = _load(folder / "report.json", RunReport)
    return report is not None and report.succeeded


def read_report(run: Run) -> RunReport | None:
    """The report of this attempt, when it left one."""
    report = _load(run.folder / "report.json", RunReport)
    return report if report is not None and report.attempt == run.plan.config.run.attempt else None


def _load(path: Path, model: type[Any]) -> Any:
    """A file of the contract, or None where there is none or it is of another version."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a run's folder; False when another process holds it."""
    with _open_lock(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _open_lock(folder: Path) -> TextIO:
    try:
        return (folder / ".lock").open("a")
    except OSError as error:
        raise _unwritable(folder, error) from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_run_file(run: Run) -> None:
    """RunConfig for the launchers, whole or not at all; what an earlier attempt said of its progress is gone."""
    part = run.folder / ".run.json"
    try:
        run.log_folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "progress.json").unlink(missing_ok=True)
        part.write_text(run.plan.config.dump())
        part.replace(run.folder / "run.json")
    except OSError as error:
        raise _unwritable(run.folder, error) from error


def _unwritable(folder: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"cannot write results to {folder}: {error.strerror}; choose another folder with --work")
