"""The cluster that the end-to-end tests run on is a real one, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import kube_playground
from kube_cluster import Cluster, PodEnvironment
from kube_processes import start_time, until

NAMESPACE = "cluster-test"
IMAGE = "localhost/cluster-test:1"
RESTRICTED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
POD_SECURITY = {"runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"}}


@pytest.fixture(scope="module")
def environment(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> PodEnvironment:
    """A namespace under restricted Pod Security with this Python environment to mount, and an image of a Debian root with one file more."""
    folder = tmp_path_factory.mktemp("image")
    (folder / "greeting").write_text("hello from the image\n")
    cluster.load_image(cluster.build_image(IMAGE, {"/app": folder}, workdir="/app"))
    cluster.create_namespace(NAMESPACE, {"pod-security.kubernetes.io/enforce": "restricted"})
    cluster.host_volume(NAMESPACE, "work")
    return cluster.environment_volumes(NAMESPACE)


def run_pod(cluster: Cluster, environment: PodEnvironment, name: str, *command: str, **more: Any) -> str:
    """Run a pod to its success and return what it wrote."""
    container = {
        "name": "main",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "command": list(command),
        "env": environment.env,
        "securityContext": RESTRICTED,
        "volumeMounts": [*environment.volume_mounts, {"name": "work", "mountPath": "/output"}],
    }
    volumes = [*environment.volumes, {"name": "work", "persistentVolumeClaim": {"claimName": "work"}}]
    spec = {"restartPolicy": "Never", "securityContext": POD_SECURITY, "containers": [container], "volumes": volumes, **more}
    pods = f"/api/v1/namespaces/{NAMESPACE}/pods"
    cluster.post(pods, {"metadata": {"name": name, "labels": {"app": name}}, "spec": spec})
    until(lambda: cluster.get(f"{pods}/{name}")["status"]["phase"] in ("Succeeded", "Failed"), 90, f"end of pod {name}")
    output = cluster.kubectl("-n", NAMESPACE, "logs", name).stdout
    assert cluster.get(f"{pods}/{name}")["status"]["phase"] == "Succeeded", output
    return output


def test_a_restricted_pod_runs_this_python_and_writes_to_a_claim(cluster: Cluster, environment: PodEnvironment) -> None:
    program = "import os, ssl, sqlite3, pydantic; print(open('greeting').read(), os.getuid()); open('/output/done', 'w').write('yes')"
    output = run_pod(cluster, environment, "python", "python", "-c", program)
    assert output == "hello from the image\n 65532\n"
    assert (cluster.state / "volumes" / f"{NAMESPACE}-work" / "done").read_text() == "yes"


def test_a_pod_has_its_name_in_a_headless_service_before_it_is_ready(cluster: Cluster, environment: PodEnvironment) -> None:
    service = {"clusterIP": "None", "selector": {"app": "named"}, "publishNotReadyAddresses": True}
    cluster.post(f"/api/v1/namespaces/{NAMESPACE}/services", {"metadata": {"name": "gang"}, "spec": service})
    host = f"gang-0.gang.{NAMESPACE}.svc.cluster.local"
    script = f"for _ in $(seq 300); do getent hosts {host} && exit; sleep 0.2; done; exit 1"
    assert host in run_pod(cluster, environment, "named", "sh", "-c", script, hostname="gang-0", subdomain="gang")


def test_a_service_account_reaches_the_api_server_with_its_token(cluster: Cluster, environment: PodEnvironment) -> None:
    program = """
import os, ssl, urllib.request
folder = "/var/run/secrets/kubernetes.io/serviceaccount/"
request = urllib.request.Request("https://kubernetes.default.svc/api", headers={"Authorization": "Bearer " + open(folder + "token").read()})
print(urllib.request.urlopen(request, context=ssl.create_default_context(cafile=folder + "ca.crt")).status)
"""
    assert run_pod(cluster, environment, "token", "python", "-c", program) == "200\n"


def test_helm_installs_a_chart(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "Chart.yaml").write_text("apiVersion: v2\nname: tiny\nversion: 0.1.0\n")
    (tmp_path / "templates" / "map.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: {{ .Release.Name }}\n")
    cluster.helm("install", "tiny", tmp_path)
    assert cluster.find("/api/v1/namespaces/default/configmaps/tiny")
    cluster.helm("uninstall", "tiny")


def traces(state: Path) -> list[str]:
    """Command lines and mounts that name this state."""
    commands = [words.replace(b"\0", b" ").decode(errors="replace") for words in command_lines()]
    mounts = Path("/proc/mounts").read_text().splitlines()
    return [line for line in (*commands, *mounts) if str(state) in line]


def command_lines() -> Iterator[bytes]:
    """Of the processes that run; any may end at this moment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if start_time(int(folder.name)):
                yield (folder / "cmdline").read_bytes()


def names_on_host() -> set[str]:
    """What clusters have names for on this machine: network namespaces, their cards, control groups, and files at fixed places."""
    devices = ("run/netns/*", "sys/class/net/ftk*", "sys/fs/cgroup/mcore-finetune-*", "sys/fs/cgroup/*/mcore-finetune-*")
    folders = ("run/containerd", "var/log/containers", "var/log/pods", "var/lib/cni", "var/lib/kubelet", "var/lib/containerd")
    files = {str(path) for folder in folders for path in Path("/", folder).rglob("*") if not path.is_dir()}
    return files | {str(path) for pattern in devices for path in Path("/").glob(pattern)}


def test_a_cluster_to_play_with_outlives_its_command_and_leaves_nothing_when_it_is_ended(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("c")
    (folder / "bin").mkdir()
    for name, program in cluster.binaries.items():
        (folder / "bin" / name).symlink_to(program)
    playground = [sys.executable, Path(kube_playground.__file__)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder), "KUBEBUILDER_ASSETS": str(folder / "bin")}
    before = names_on_host()
    told = subprocess.run([*playground, "up"], env=environment, capture_output=True, text=True, check=True).stdout
    state = folder / "mcore-finetune" / "kube" / "state" / "playground"
    try:
        assert f"export KUBECONFIG={state}/admin.kubeconfig" in told.splitlines()
        kubectl = [cluster.binaries["kubectl"], f"--kubeconfig={state}/admin.kubeconfig"]
        subprocess.run([*kubectl, "run", "pause", "--image=localhost/pause:1", "--image-pull-policy=Never"], check=True)
        subprocess.run([*kubectl, "wait", "pod/pause", "--for=condition=Ready", "--timeout=90s"], check=True)
        assert traces(state)
        assert names_on_host() - before
    finally:
        subprocess.run([*playground, "down"], env=environment, check=True)
    assert traces(state) == []
    assert names_on_host() - before == set()  # some of the other cluster's may have gone meanwhile
    assert not state.exists()
    assert cluster.kubectl("get", "nodes").stdout
