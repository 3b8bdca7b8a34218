"""A whole Kubernetes with one node, in a network namespace of its own. Root is needed; systemd, Docker and the internet are not.

with start_cluster() as cluster:
    cluster.load_image(cluster.build_image("localhost/tool:1", {"/app": Path("tool")}, entrypoint=["/app/run"]))
    cluster.helm("install", "tool", "charts/tool")
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import kube_images
import kube_packages
from kube_api import API_BINARIES, ApiServer
from kube_build import binaries, cache, locked
from kube_host import demolish, reserve
from kube_node import NODE_BINARIES, NODE_NAME, START_SECONDS, Node
from kube_processes import KubeError, until

CLUSTER_BINARIES = (*API_BINARIES, "kube-scheduler", "helm", *NODE_BINARIES)


class PodEnvironment(NamedTuple):
    """What to lay into a pod and its container so that it can run the programs of this Python environment."""

    volumes: list[dict[str, Any]]
    volume_mounts: list[dict[str, Any]]
    env: list[dict[str, str]]


class Cluster(ApiServer):
    """A running cluster: everything of ApiServer (`server` is reachable from the host too), and a node that runs pods. Made by `start_cluster`."""

    def _binaries(self) -> dict[str, Path]:
        return binaries(*CLUSTER_BINARIES)

    def _place(self) -> tuple[str, int, int, int]:
        with locked("place"):
            self.place = reserve(self.state)
        return self.place.node_address, 2379, 2380, 6443

    def _prefix(self) -> Sequence[str]:
        return self.place.enter

    def _controller_flags(self) -> list[str]:
        return ["--pvclaimbinder-sync-period=1s"]  # a claim made just after its volume waits for the next round, by default 15 s

    def _place_flags(self) -> list[str]:
        return [f"--advertise-address={self.address}"]

    def start(self) -> None:
        """Start everything and wait until the node is ready."""
        self._node = Node(self.state, self.binaries, self.place, self.processes)
        self._node.start_containerd()
        super().start()
        scheduler = self.user_kubeconfig("system:kube-scheduler")
        self.processes.start("kube-scheduler", [self.binaries["kube-scheduler"], f"--kubeconfig={scheduler}", "--leader-elect=false"])
        self.authority.issue("kubelet", NODE_NAME, hosts=[NODE_NAME, self.address])
        self._node.start_kubelet(self.user_kubeconfig(f"system:node:{NODE_NAME}", ["system:nodes"]))
        self._node.start_proxy(self.user_kubeconfig("system:kube-proxy"))
        self._node.start_dns(self.user_kubeconfig("cluster-dns", ["system:masters"]))
        self._node.wait_for_services()
        self.processes.until("kubelet", self._node_is_ready, START_SECONDS, f"node {NODE_NAME} Ready")

    def stop(self) -> None:
        """End everything and remove every trace, the state too."""
        self._session.close()
        demolish(self.state)

    def _node_is_ready(self) -> bool:
        node = self.find(f"/api/v1/nodes/{NODE_NAME}")
        conditions = node["status"].get("conditions", []) if node else []
        return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)

    def namespace_exec(self, *argv: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of this machine in the cluster's network: addresses of pods and Services are reachable there."""
        command = [*self.place.enter, *(str(word) for word in argv)]
        return subprocess.run(command, capture_output=True, text=True, check=check)

    def helm(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run helm as administrator. Raises KubeError with what helm said, unless check is False."""
        folders = {f"HELM_{name}_HOME": f"{self.state}/helm/{name.lower()}" for name in ("CACHE", "CONFIG", "DATA")}
        command = [str(word) for word in (self.binaries["helm"], *arguments)]
        environment = {**os.environ, **folders, "KUBECONFIG": str(self.kubeconfig)}
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if check and result.returncode != 0:
            raise KubeError(f"helm {' '.join(command[1:])}: exit code {result.returncode}: {result.stderr.strip()}")
        return result

    def build_image(
        self,
        name: str,
        folders: Mapping[str, Path],
        *,
        user: str = "65532:65532",
        entrypoint: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        workdir: str = "/",
    ) -> Path:
        """A docker archive of a Debian root with folders of this machine laid into it (path in the image -> folder here). Name it `localhost/...:tag`."""
        folder = self.state / "images"
        folder.mkdir(exist_ok=True)
        out = folder / f"{name.replace('/', '-').replace(':', '-')}.tar"
        base = kube_images.debian_layer()
        return kube_images.build_image(out, name, folders, layers=[base], user=user, entrypoint=entrypoint, env=env, workdir=workdir)

    def load_image(self, archive: Path) -> None:
        """Import a docker archive into the node. Pods use it with `imagePullPolicy: Never` or IfNotPresent."""
        self._node.load_image(archive)

    def host_volume(self, namespace: str, claim: str, folder: Path | None = None, *, read_only: bool = False) -> Path:
        """Make a folder of this machine (by default a new one that everybody may write to) a bound claim in a namespace; returns the folder."""
        name = f"{namespace}-{claim}"
        if folder is None:
            folder = self.state / "volumes" / name
            folder.mkdir(parents=True)
            folder.chmod(0o777)
        size, modes = {"storage": "1Gi"}, ["ReadOnlyMany" if read_only else "ReadWriteMany"]
        reference = {"namespace": namespace, "name": claim}
        volume = {"capacity": size, "accessModes": modes, "hostPath": {"path": str(folder), "type": "Directory"}, "claimRef": reference}
        self.post("/api/v1/persistentvolumes", {"metadata": {"name": name}, "spec": {**volume, "persistentVolumeReclaimPolicy": "Retain"}})
        wanted = {"accessModes": modes, "resources": {"requests": size}, "volumeName": name, "storageClassName": ""}
        claims = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"
        self.post(claims, {"metadata": {"name": claim}, "spec": wanted})
        until(lambda: self.get(f"{claims}/{claim}")["status"].get("phase") == "Bound", START_SECONDS, f"binding of claim {claim}")
        return folder

    def environment_volumes(self, namespace: str, *more: Path) -> PodEnvironment:
        """Make this Python environment (and more folders) readable in pods of a namespace, at the same paths as here."""
        paths = [*kube_images.environment_paths(), *more]
        claims = {f"environment-{number}": path for number, path in enumerate(paths)}
        for claim, path in claims.items():
            self.host_volume(namespace, claim, path, read_only=True)
        return PodEnvironment(
            [{"name": claim, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}} for claim in claims],
            [{"name": claim, "mountPath": str(path), "readOnly": True} for claim, path in claims.items()],
            [{"name": name, "value": value} for name, value in kube_images.environment_variables().items()],
        )


def states() -> Path:
    """The folder with the states of clusters. (Short: a socket's path has at most 107 characters, so pytest's folders will not do.)"""
    folder = cache() / "state"
    folder.mkdir(exist_ok=True)
    return folder


def check_machine() -> None:
    """Raises KubeError where no cluster can run; installs missing system packages."""
    if os.geteuid() != 0:
        raise KubeError("a cluster with a node needs root: network namespaces, mounts, control groups")
    kube_packages.install("ip", "iptables", "nft", "conntrack", "openssl", "nsenter", "setpriv", "mount", "sysctl", "debootstrap", "gcc", "libc")


def sweep() -> None:
    """Remove clusters whose owner was killed before it could do so. (A lock dies with its owner.)"""
    for owner in states().glob("*.owner"):
        with owner.open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            demolish(owner.with_suffix(""))
            owner.unlink()


PLAYGROUND = "playground"


def start_playground() -> Cluster:
    """A cluster that lives on after this process, until `remove_playground`; there is one at most."""
    check_machine()
    state = states() / PLAYGROUND
    if state.exists():
        raise KubeError(f"a cluster stands already: {state}/admin.kubeconfig; make cluster-down ends it")
    try:
        cluster = Cluster(state, die_with_parent=False)
        cluster.start()
    except BaseException:
        demolish(state)
        raise
    return cluster


def remove_playground() -> bool:
    """End it, and what killed tests may have left. Returns whether there was one."""
    sweep()
    state = states() / PLAYGROUND
    found = state.exists()
    demolish(state)
    return found


@contextmanager
def start_cluster(*, kcm_flags: Sequence[str] = (), apiserver_flags: Sequence[str] = ()) -> Iterator[Cluster]:
    """A cluster of one's own; when the context is left it is ended and leaves nothing."""
    check_machine()
    with locked("clusters"):
        sweep()
        state = Path(tempfile.mkdtemp(prefix="test-", dir=states()))
        owner = state.with_suffix(".owner").open("w")
        fcntl.flock(owner, fcntl.LOCK_EX)
    with owner:
        try:
            cluster = Cluster(state, kcm_flags=kcm_flags, apiserver_flags=apiserver_flags)
            cluster.start()
            yield cluster
        finally:
            demolish(state)
            state.with_suffix(".owner").unlink()
