"""The operator's own settings: pure data with defaults; nothing is read here."""

from __future__ import annotations

from pydantic import Field

from finetune_trainer.contract import Contract, Name, Positive


class Settings(Contract):
    """What an administrator decides once for all jobs."""

    cache_mount: Name = Field("/cache", description="Where the cache volume is mounted in a pod; HF_HOME is the folder huggingface in it.")
    work_mount: Name = Field("/work", description="Where the work volume is mounted in a pod.")
    work_claim: Name | None = Field(None, description="Claim for work where a job names none. Absent: a job in a cluster must name one.")
    run_file: Name = Field("/run/finetune/run.json", description="Where a pod finds its RunConfig.")
    termination_message_path: Name = Field("/dev/termination-log", description="Where a pod writes the summary of its report.")
    master_port: Positive = Field(29500, le=65535, description="Port of the gang's rendezvous on node 0.")
    progress_port: Positive = Field(8080, le=65535, description="Port of /metrics and /progress in a pod.")
    grace_seconds: Positive = Field(30, description="Time that ranks have to write a checkpoint after SIGTERM.")
