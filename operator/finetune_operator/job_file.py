"""A file with one FineTuneJob: reads it, and tells each problem by file, line and field."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune_operator import kubeyaml, names, schema
from finetune_operator.problems import InvalidJob, Problem
from finetune_operator.schema import FineTuneJob
from finetune_trainer.contract import ConfigurationError, Contract, EngineError, RunConfig

STANDARD_INPUT = Path("-")
_PART = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_OPTION = re.compile(r"(\w+\.\w+)(\[\d+\])*")
_OPTIONS = frozenset(
    f"{section}.{option.alias}"
    for section, field in RunConfig.model_fields.items()
    if section != "run" and isinstance(field.annotation, type) and issubclass(field.annotation, Contract)
    for option in field.annotation.model_fields.values()
)


@dataclass(frozen=True)
class JobFile:
    """A FineTuneJob and where it stands."""

    path: Path
    document: kubeyaml.Document
    job: FineTuneJob
    others: tuple[str, ...]
    """Other objects of the same file, `Kind/name`: for a cluster only."""

    @property
    def folder(self) -> Path:
        """What `./` in a source or a dataset means."""
        return Path.cwd() if self.path == STANDARD_INPUT else self.path.absolute().parent

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Problems of the job that are raised inside say the file and the line too."""
        try:
            with _locating(self.path, self.document):
                yield
        except InvalidJob:
            raise
        except EngineError as error:
            raise type(error)(self.located(str(error))) from error

    def located(self, sentence: str) -> str:
        """A sentence of the engine's that begins with an option (`training.lr is ...`), with file, line and the option's path in the file; another as it is."""
        option = _OPTION.match(sentence)
        if option is None or option[1] not in _OPTIONS:
            return sentence
        return f"{_place(self.path, self.document, Problem(f'spec.{option[0]}', ''))}: spec.{sentence}"


def load(path: Path) -> JobFile:
    """Read the one FineTuneJob of a file (`-`: standard input); raises ConfigurationError or InvalidJob."""
    jobs, others = _documents(path)
    if len(jobs) != 1:
        found = f"{len(jobs)} ({', '.join(map(_title, jobs))})" if jobs else ", ".join(others) or "an empty file"
        raise ConfigurationError(f"{path}: it must hold one {names.KIND} (found {found})")
    return _parse(path, jobs[0], others)


def load_all(path: Path) -> list[JobFile]:
    """Read every FineTuneJob of a file, at least one; raises ConfigurationError or InvalidJob."""
    jobs, others = _documents(path)
    if not jobs:
        raise ConfigurationError(f"{path}: it must hold a {names.KIND} (found {', '.join(others) or 'an empty file'})")
    return [_parse(path, job, others) for job in jobs]


def _documents(path: Path) -> tuple[list[kubeyaml.Document], tuple[str, ...]]:
    """The documents that are FineTuneJobs, or should be, and the titles of the others."""
    documents = _read(path)
    jobs = [document for document in documents if not isinstance(document.value, dict) or document.value.get("kind", names.KIND) == names.KIND]
    return jobs, tuple(_title(document) for document in documents if document not in jobs)


def _parse(path: Path, document: kubeyaml.Document, others: tuple[str, ...]) -> JobFile:
    with _locating(path, document):
        return JobFile(path, document, schema.parse(document.value), others)


def _read(path: Path) -> list[kubeyaml.Document]:
    try:
        return kubeyaml.read(sys.stdin.buffer.read() if path == STANDARD_INPUT else path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except kubeyaml.InvalidYAML as error:
        raise ConfigurationError(f"{path}: {error}") from error


def _title(document: kubeyaml.Document) -> str:
    value = document.value if isinstance(document.value, dict) else {}
    metadata = value.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return f"{value.get('kind', 'no kind')}/{name or '?'}"


@contextmanager
def _locating(path: Path, document: kubeyaml.Document) -> Iterator[None]:
    try:
        yield
    except InvalidJob as error:
        located = (Problem(_place(path, document, problem), str(problem)) for problem in error.problems)
        raise InvalidJob(*located) from error


def _place(path: Path, document: kubeyaml.Document, problem: Problem) -> str:
    """`file:line` of a problem's field; a sentence that begins with the name of a field below it is about that one."""
    parts: kubeyaml.Path = tuple(int(index) if index else name for name, index in _PART.findall(problem.field))
    subject = (*parts, problem.message.split(" ", 1)[0])
    line = document.line(subject if subject in document.lines else parts)
    return f"{path}:{line}" if line else str(path)
