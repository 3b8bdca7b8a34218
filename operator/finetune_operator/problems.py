"""What is wrong with a job, told as the API path of the field and a sentence; pydantic's errors translated into that. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune_trainer.contract import ConfigurationError, nearest


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a job: the API path of the field (`spec.nodes.env[0].name`) and a sentence."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class InvalidJob(ConfigurationError):
    """A job that cannot run as it is written; every problem names its field."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class FieldError(ValueError):
    """Raised by a rule of a model: the field is given relative to that model."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def read(error: ValidationError) -> list[Problem]:
    """Every problem of a pydantic error, in the order of the fields."""
    return [found for problem in error.errors(include_url=False) for found in _unknown_fields(dict(problem)) or [_problem(dict(problem))]]


_UNKNOWN = re.compile(r"unknown field '([^']*)'(; did you mean '[^']*'\?)?")


def _unknown_fields(problem: dict[str, Any]) -> list[Problem]:
    """One problem for each name that the contract does not know; it tells all those of an object in one message."""
    message = problem["msg"].removeprefix("Value error, ")
    if not message.startswith("unknown field "):
        return []
    return [Problem(_join(_path(problem["loc"]), name), f"unknown field{hint}") for name, hint in _UNKNOWN.findall(message)]


def _problem(problem: dict[str, Any]) -> Problem:
    """One of pydantic's problems: its place as an API path, and the sentence with what was found."""
    cause = problem.get("ctx", {}).get("error")
    message = problem["msg"].removeprefix("Value error, ")
    field = _path(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return Problem(field, f"unknown field{_nearest_to(problem['loc'])}")
    if problem["type"] == "missing":
        return Problem(field, "it is required")
    if isinstance(cause, ValueError):
        return Problem(_join(field, getattr(cause, "field", "")), message)
    return Problem(field, _found(message, problem))


def _found(message: str, problem: dict[str, Any]) -> str:
    found = json.dumps(problem["input"], ensure_ascii=False)
    hint = "; put it in quotes" if problem["type"] == "string_type" and isinstance(problem["input"], int | float) else ""
    sentence = f"{message[:1].lower()}{message[1:]}".replace("input should be", "it must be")
    return f"{sentence} (found {found if len(found) <= 80 else found[:79] + '…'}){hint}"


def _nearest_to(location: tuple[str | int, ...]) -> str:
    """The suggestion for a name that is a field's in snake_case, which only the engine's command line takes."""
    name = str(location[-1])
    camel = re.sub(r"_([a-z0-9])", lambda match: match[1].upper(), name)
    return nearest(name, [camel])


def _path(location: tuple[str | int, ...]) -> str:
    text = ""
    for part in location:
        text = f"{text}[{part}]" if isinstance(part, int) else _join(text, part)
    return text


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
