"""Every name that the operator gives or reserves: the API's identity, host names, environment variables, folders."""

from __future__ import annotations

import re
from pathlib import Path

GROUP = "finetune.mcore.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"

OPERATOR = "finetune-operator"
"""Field manager, reporting component and value of app.kubernetes.io/managed-by."""
JOB_LABEL = f"{GROUP}/job-name"
"""On every child: the watch of pods selects by it, and a retained claim is recognised by it."""
ATTEMPT_LABEL = f"{GROUP}/attempt"
NODE_LABEL = f"{GROUP}/node-rank"
UID_LABEL = f"{GROUP}/job-uid"
"""On every pod: the Service selects by it too, because a job of the same name may have been before."""
RUN_CONFIG_ANNOTATION = f"{GROUP}/run-config"
TRAINER_CONTAINER = "trainer"

PLACEHOLDER_UID = "00000000-0000-0000-0000-000000000000"
"""Uid of a job that no cluster knows."""
DEFAULT_WORK = Path("runs")
"""Folder of all results of `finetune run`."""

MAX_NAME_LENGTH = 52
NAME_RULE = (
    f"it must begin with a lower-case letter, have only lower-case letters, digits and `-`, not end with `-`, and have at most {MAX_NAME_LENGTH} characters"
)
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
ENVIRONMENT_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")

GANG_ENVIRONMENT = frozenset(
    (
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE"),
        *("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"),
    )
)
GANG_PREFIXES = ("PET_", "TORCHELASTIC_")


def is_job_name(name: str) -> bool:
    """Whether a job may have this name: it becomes a Service's and, with an index, host names (DNS-1035)."""
    return len(name) <= MAX_NAME_LENGTH and _NAME.fullmatch(name) is not None


def is_namespace(name: str) -> bool:
    """Whether this is a Kubernetes namespace's name (DNS-1123 label)."""
    return len(name) <= 63 and _NAMESPACE.fullmatch(name) is not None


def is_environment_name(name: str) -> bool:
    """Whether Kubernetes takes this as an environment variable's name."""
    return ENVIRONMENT_NAME.fullmatch(name) is not None


def is_gang_environment(name: str) -> bool:
    """Whether the gang sets this environment variable itself."""
    return name in GANG_ENVIRONMENT or name.startswith(GANG_PREFIXES)


def service(job: str) -> str:
    """The headless Service of a job's pods: their subdomain."""
    return job


def pod(job: str, attempt: int, node: int) -> str:
    """The pod of one node of one gang."""
    return f"{job}-{attempt}-{node}"


def claim(job: str) -> str:
    """The claim that is made from a job's template."""
    return f"{job}-work"


def child_labels(job: str) -> dict[str, str]:
    """Labels of every child; the job's own labels are never copied, because Argo CD and Kueue act on theirs."""
    return {"app.kubernetes.io/name": "finetune-trainer", "app.kubernetes.io/managed-by": OPERATOR, JOB_LABEL: job}


def selector(job: str, uid: str) -> dict[str, str]:
    """Labels that the pods of this job have, of every gang, and those of no other job of its name."""
    return {JOB_LABEL: job, UID_LABEL: uid[:8]}


def host(job: str, node: int) -> str:
    """Host name of one node of the gang, from 0."""
    return f"{job}-{node}"


def master_address(job: str) -> str:
    """Where node 0 is reached in a cluster: hostname.subdomain."""
    return f"{host(job, 0)}.{service(job)}"


def result_folder(work: str, namespace: str, job: str, uid: str) -> str:
    """Folder of one run's results: `<work>/<namespace>/<name>/<uid8>`."""
    return f"{work.rstrip('/')}/{namespace}/{job}/{uid[:8]}"
