"""Small FineTuneJobs for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from finetune_operator import job_file, schema
from finetune_operator.job_file import JobFile
from finetune_operator.schema import FineTuneJob


def job_value(**sections: Any) -> dict[str, Any]:
    """A FineTuneJob as JSON; ``sections`` are added to its spec."""
    spec = {"model": {"source": "org/model"}, "data": {"dataset": ["org/rows"]}, **sections}
    return {"apiVersion": "finetune.mcore.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "tiny"}, "spec": spec}


def make_job(**sections: Any) -> FineTuneJob:
    return schema.parse(job_value(**sections))


def write_job(folder: Path, name: str = "tiny", **sections: Any) -> Path:
    """Write a FineTuneJob as YAML; returns the file."""
    value = job_value(**sections)
    value["metadata"]["name"] = name
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def load_job(folder: Path, name: str = "tiny", **sections: Any) -> JobFile:
    return job_file.load(write_job(folder, name, **sections))
