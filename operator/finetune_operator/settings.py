"""The operator's own settings: pure data with defaults; nothing is read here."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from finetune_trainer.contract import Contract, Name, Positive

Seconds = Annotated[float, Field(gt=0, le=86400)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Settings(Contract):
    """What an administrator decides once for all jobs."""

    cache_mount: Name = Field("/cache", description="Where the cache volume is mounted in a pod; HF_HOME is the folder huggingface in it.")
    work_mount: Name = Field("/work", description="Where the work volume is mounted in a pod.")
    trainer_image: Name | None = Field(None, description="Image of pods whose job names none. Absent: a job in a cluster must name one.")
    trainer_user: Positive = Field(65532, description="User id that the trainer runs as.")
    trainer_group: Positive = Field(65532, description="Group id that the trainer runs as, and that owns the volumes where Kubernetes can see to it (fsGroup).")
    allow_privileged_templates: bool = Field(
        False,
        description="Whether a job's nodes.podTemplate may ask for what is more than a trainer needs: the node's namespaces, folders and root, capabilities, a service-account token.",
    )
    shared_memory: Name = Field("8Gi", description="Most that /dev/shm may hold where a job says nothing; it is reserved nowhere.")
    work_claim: Name | None = Field(None, description="Claim for work where a job names none. Absent: a job in a cluster must name one.")
    run_file: Name = Field("/run/finetune/run.json", description="Where a pod finds its RunConfig.")
    termination_message_path: Name = Field("/dev/termination-log", description="Where a pod writes the summary of its report.")
    master_port: Port = Field(29500, description="Port of the gang's rendezvous on node 0; the launchers watch one another on the next one.")
    progress_port: Port = Field(8080, description="Port of /metrics and /progress in a pod.")
    grace_seconds: Positive = Field(30, description="Time that ranks have to write a checkpoint after SIGTERM.")
    watch_namespaces: list[Name] = Field([], max_length=256, description="Namespaces whose jobs are served. Empty: all.")
    lease_name: Name = Field("finetune-operator", description="Lease by which replicas agree on the one that acts.")
    lease_namespace: Name | None = Field(None, description="Its namespace. Absent: the operator's own.")
    lease_duration_seconds: Annotated[int, Field(ge=2, le=86400)] = Field(15, description="A leader that is silent for so long is replaced.")
    renew_deadline_seconds: Seconds = Field(10, ge=1.3, description="A leader that cannot renew the Lease for so long ends. Less than leaseDurationSeconds.")
    retry_period_seconds: Seconds = Field(2, ge=1, description="Time between two renewals or attempts to take the Lease. Less than renewDeadlineSeconds / 1.2.")
    http_port: Port = Field(8080, description="Port of the operator's /metrics, /healthz and /readyz.")
    requests_in_flight: Annotated[int, Field(ge=1, le=1024)] = Field(8, description="Requests to the API server at the same time.")
    resync_seconds: Seconds = Field(300, ge=1, description="Time between two comparisons of what watches have told with what there is.")
    progress_poll_seconds: Seconds = Field(5, ge=0.1, description="Time between two questions to a gang's /progress.")
    cause_wait_seconds: Seconds = Field(5, description="Time that is left for the cause to show when a gang's first failed pod tells only of a consequence.")
    progress_write_seconds: Seconds = Field(15, description="Least time between two writes of a job's progress into its status.")
    unanswered_seconds: Seconds = Field(60, description="Time that a trainer is asked in vain before the heartbeat in the job's status is taken for its last.")
    uncounted_delay_seconds: Seconds = Field(10, description="Wait before the first restart that is not counted; it doubles with each.")
    uncounted_delay_limit_seconds: Seconds = Field(300, description="The longest such wait.")
    refusal_retry_seconds: Seconds = Field(
        30, description="Wait before children that were refused are tried again, and before a pod that does not end is looked at again."
    )
    leftover_retry_seconds: Seconds = Field(3, description="Wait for children of an earlier job of the same name.")

    @model_validator(mode="after")
    def _lease_outlasts_its_renewal(self) -> Self:
        if not self.lease_duration_seconds > self.renew_deadline_seconds > 1.2 * self.retry_period_seconds:
            found = f"{self.lease_duration_seconds}, {self.renew_deadline_seconds:g}, {self.retry_period_seconds:g}"
            raise ValueError(f"leaseDurationSeconds must be above renewDeadlineSeconds, and that above 1.2 × retryPeriodSeconds (found {found})")
        return self
