"""What a trainer has told of itself, as the status has it. Its words come out of a user's image: they are read leniently and never trusted to fit. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel

from finetune_operator.status import MESSAGE_LIMIT, JobProgress
from finetune_trainer.contract import Artifact, Progress, Reason, Verification

MEASURES = ("loss", "learning_rate", "tokens_per_second", "eta_seconds")
MEASURED_AT_EACH_STEP = ("loss", "learning_rate")
LOADED_STAGES = frozenset(("training", "saving", "exporting", "verifying", "finished"))
UNREAD = "node 0 left no report that can be read, so what was exported and verified is not known here; report.json is on the work volume"
MAX_ARTIFACTS = 16
CUT = "…"
"""Ends a text that was cut to fit into a termination message."""

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class TrainerFailure:
    """Why a run failed, in the trainer's words."""

    reason: Reason
    message: str
    rank: int | None
    exit_code: int | None
    host: str | None
    """Host name of the node whose rank failed first."""


@dataclass(frozen=True)
class Result:
    """What a run that succeeded has left."""

    artifacts: list[Artifact]
    verification: Verification | None
    resolved: dict[str, Any] | None
    message: str
    """What came out, in a sentence; or that the report could not be read."""


def seconds_of(time: datetime) -> datetime:
    """A time as Kubernetes writes it: UTC, whole seconds."""
    return time.astimezone(UTC).replace(microsecond=0)


def cut_message(message: str) -> str:
    """A message that fits into status."""
    return message if len(message) <= MESSAGE_LIMIT else message[: MESSAGE_LIMIT - 1] + CUT


def read_failure(termination_message: str) -> TrainerFailure | None:
    """The failure in a termination message; None when it is not the trainer's, or tells of none."""
    failure = _read(termination_message).get("failure")
    if not isinstance(failure, dict) or failure.get("reason") not in list(Reason):
        return None
    message = failure.get("message")
    return TrainerFailure(
        reason=Reason(failure["reason"]),
        message=message if isinstance(message, str) else "",
        rank=_integer(failure.get("rank"), 0),
        exit_code=_integer(failure.get("exitCode"), -(2**31)),
        host=failure["node"] if isinstance(failure.get("node"), str) else None,
    )


def read_result(termination_message: str) -> Result:
    """What the termination message of node 0 tells of a run that succeeded."""
    report = _read(termination_message)
    if report.get("succeeded") is not True:
        return Result([], None, None, UNREAD)
    listed = report.get("artifacts")
    found = [_model(Artifact, item) for item in listed[:MAX_ARTIFACTS]] if isinstance(listed, list) else []
    artifacts = [item for item in found if item is not None and not item.path.endswith(CUT) and not item.sha256.endswith(CUT)]
    verification = _model(Verification, report.get("verification"))
    resolved = report.get("resolved")
    return Result(artifacts, verification, resolved if isinstance(resolved, dict) and resolved else None, _describe(artifacts, verification))


def round_progress(progress: Progress) -> tuple[JobProgress, list[str]]:
    """Progress with 4 significant digits, and the API names of the numbers left out because they are not finite."""
    numbers = {name: getattr(progress, name) for name in MEASURES}
    odd = [to_camel(name) for name, number in numbers.items() if _is_left_out(name, number, progress)]
    rounded = {name: float(f"{number:.4g}") for name, number in numbers.items() if number is not None and math.isfinite(number)}
    return JobProgress(
        stage=progress.stage,
        step=progress.step,
        total_steps=progress.total_steps,
        steps=progress.steps[:64],
        percent=min(progress.percent, 100),
        remaining=None if progress.remaining is None else progress.remaining[:64],
        last_heartbeat_time=_heartbeat(progress.last_heartbeat_time),
        **rounded,
    ), odd


def _heartbeat(time: datetime) -> datetime | None:
    """A time that can be reckoned with; None for one at the ends of the calendar."""
    return seconds_of(time) if datetime.min.year < time.year < datetime.max.year else None


def _is_left_out(name: str, number: float | None, progress: Progress) -> bool:
    """Whether a number is missing because it is not finite: such a one arrives as JSON's null, though a step has both a loss and a rate."""
    if number is None:
        return name in MEASURED_AT_EACH_STEP and any(getattr(progress, each) is not None for each in (*MEASURED_AT_EACH_STEP, "gradient_norm"))
    return not math.isfinite(number)


def finish_progress(progress: JobProgress | None) -> JobProgress | None:
    """The progress of a run that has succeeded, out of what was last heard of it; None when nothing ever was."""
    if progress is None:
        return None
    total = progress.total_steps or progress.step
    done = {"step": total, "total_steps": total, "steps": f"{total}/{total}", "percent": 100, "eta_seconds": 0.0, "remaining": "0s"}
    return progress.model_copy(update={"stage": "finished", **done})


def finite(value: Any) -> Any:
    """A JSON value without the numbers that JSON does not have; whole numbers that Kubernetes' JSON does not have (beyond 64 bits) as text."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(termination_message: str) -> dict[str, Any]:
    """The JSON object of a message; empty for anything else: nothing, a cut one, another program's words, text that is not Unicode."""
    try:
        value = finite(json.loads(termination_message))
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _integer(value: Any, least: int) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31 else None


def _model(model: type[Model], value: Any) -> Model | None:
    """A model out of the part of a report; None when it does not fit."""
    try:
        return model.model_validate(value)
    except ValidationError:
        return None


def _describe(artifacts: list[Artifact], verification: Verification | None) -> str:
    exported = ", ".join(f"{item.format} at {item.path}" for item in artifacts) or "node 0's report names no result"
    return f"{exported}; verified: {verification.level}" if verification is not None and verification.passed else exported
