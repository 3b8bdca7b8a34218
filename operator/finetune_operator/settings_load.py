"""Reads the operator's settings and its own identity from the environment: a JSON file that FINETUNE_SETTINGS names, POD_NAME, POD_NAMESPACE."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from finetune_operator.settings import Settings
from finetune_trainer.contract import ConfigurationError, describe_errors

SETTINGS_FILE = "FINETUNE_SETTINGS"


@dataclass(frozen=True)
class Replica:
    """Who this process is among the operator's replicas."""

    name: str
    namespace: str


def load(environment: Mapping[str, str] | None = None) -> tuple[Settings, Replica]:
    """The settings and this replica; raises ConfigurationError naming the file and the field."""
    environment = os.environ if environment is None else environment
    path = environment.get(SETTINGS_FILE)
    settings = _read(Path(path)) if path else Settings()
    replica = Replica(environment.get("POD_NAME") or f"{socket.gethostname()}-{os.getpid()}", environment.get("POD_NAMESPACE") or "default")
    return settings, replica


def _read(path: Path) -> Settings:
    try:
        return Settings.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"cannot read the operator's settings ({SETTINGS_FILE}): {error}") from error
    except ValidationError as error:
        raise ConfigurationError(f"{path}: " + "; ".join(describe_errors(error))) from error
