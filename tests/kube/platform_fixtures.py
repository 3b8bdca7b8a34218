"""The product on a cluster with a node: operator and trainer in images, installed by the chart, and a namespace for jobs.

No image builder runs here, so the images hold a Debian root and the product's code; the Python environment is mounted into the pods read-only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from kube_cluster import Cluster, PodEnvironment
from kube_processes import until

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "finetune-operator"
SYSTEM, TEAM = "finetune-system", "team"
OPERATOR_IMAGE, TRAINER_IMAGE = "localhost/finetune-operator:test", "localhost/finetune-trainer:test"
JOBS = f"/apis/finetune.mcore.dev/v1alpha1/namespaces/{TEAM}/finetunejobs"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
INSTALL_SECONDS = 180
SETTINGS = {
    "progressPollSeconds": 1,
    "progressWriteSeconds": 2,
    "causeWaitSeconds": 5,
    "leaseDurationSeconds": 5,
    "renewDeadlineSeconds": 4,
    "retryPeriodSeconds": 1,
}


@dataclass(frozen=True)
class Platform:
    """A cluster on which the operator runs."""

    cluster: Cluster
    environment: PodEnvironment
    """Of the trainers' pods."""
    work: Path
    """The folder of this machine that the jobs' work volume is."""

    def job(self, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """A job of two nodes with one process each, on CPUs; `spec` has its model, data and the rest."""
        container = {"name": "trainer", "env": self.environment.env, "volumeMounts": self.environment.volume_mounts}
        nodes = {
            "count": 2,
            "accelerator": {"type": "CPU"},
            "sharedMemory": "256Mi",
            "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
            "podTemplate": {"spec": {"volumes": self.environment.volumes, "containers": [container]}},
        }
        whole = {"nodes": nodes, "volumes": {"cache": {"claimName": "cache"}, "work": {"claimName": "work"}}, **spec}
        return {"apiVersion": "finetune.mcore.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name, "namespace": TEAM}, "spec": whole}

    def apply(self, job: Mapping[str, Any]) -> None:
        """`kubectl apply -f -`."""
        self.cluster.kubectl("apply", "-f", "-", input=yaml.safe_dump(job))

    def status(self, name: str) -> dict[str, Any]:
        """What the job's status says now."""
        status: dict[str, Any] = self.cluster.get(f"{JOBS}/{name}").get("status", {})
        return status

    def until_ended(self, name: str, seconds: float) -> dict[str, Any]:
        """The status of a job that has succeeded or failed."""

        def ended() -> dict[str, Any] | None:
            status = self.status(name)
            return status if status.get("phase") in ("Succeeded", "Failed") else None

        return until(ended, seconds, f"end of job {name}")

    def results(self, name: str) -> Path:
        """The folder of a job's results, on this machine."""
        return self.work / TEAM / name / self.cluster.get(f"{JOBS}/{name}")["metadata"]["uid"][:8]

    def describe(self, name: str) -> str:
        """Everything that tells why a job did not do what was expected."""
        pods = self.cluster.kubectl("-n", TEAM, "logs", "-l", f"finetune.mcore.dev/job-name={name}", "--tail=60", "--prefix", check=False).stdout
        operator = self.cluster.kubectl("-n", SYSTEM, "logs", "-l", "app.kubernetes.io/name=finetune-operator", "--tail=40", check=False).stdout
        return f"{json.dumps(self.status(name), indent=1)}\n{pods}\n{operator}"


@pytest.fixture(scope="session")
def platform(cluster: Cluster) -> Iterator[Platform]:
    """The operator, brought up by `helm install` under restricted Pod Security, and a namespace with claims for cache and work."""
    folders = {"/app/finetune_trainer": ROOT / "trainer_image" / "finetune_trainer", "/app/finetune_operator": ROOT / "operator" / "finetune_operator"}
    cluster.load_image(cluster.build_image(OPERATOR_IMAGE, folders, env={"PYTHONPATH": "/app"}))
    cluster.load_image(cluster.build_image(TRAINER_IMAGE, {"/app/finetune_trainer": folders["/app/finetune_trainer"]}, env={"PYTHONPATH": "/app"}))
    for namespace in (SYSTEM, TEAM):
        cluster.create_namespace(namespace, RESTRICTED)
    environment = cluster.environment_volumes(SYSTEM)
    values = {
        "image": {"repository": OPERATOR_IMAGE.rsplit(":", 1)[0], "tag": OPERATOR_IMAGE.rsplit(":", 1)[1], "pullPolicy": "Never"},
        "settings": {"trainerImage": TRAINER_IMAGE, **SETTINGS},
        "extraEnv": environment.env,
        "extraVolumes": environment.volumes,
        "extraVolumeMounts": environment.volume_mounts,
    }
    file = cluster.state / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    cluster.helm("install", "finetune-operator", CHART, "--namespace", SYSTEM, "--values", file, "--wait", f"--timeout={INSTALL_SECONDS}s")
    cluster.host_volume(TEAM, "cache")
    work = cluster.host_volume(TEAM, "work")
    yield Platform(cluster, cluster.environment_volumes(TEAM), work)
    cluster.helm("uninstall", "finetune-operator", "--namespace", SYSTEM)
