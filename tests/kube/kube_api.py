"""etcd, kube-apiserver and kube-controller-manager on this machine: a Kubernetes without nodes, ready in seconds, no root needed.

with start_api_server(tmp_path) as api:
    api.post("/api/v1/namespaces/default/configmaps", {"metadata": {"name": "a"}})
    api.kubectl("get", "configmaps")
"""

from __future__ import annotations

import random
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

import kube_packages
from kube_build import binaries
from kube_certificates import Authority
from kube_processes import KubeError, Processes, until

API_BINARIES = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
START_SECONDS = 120.0  # minutes of a busy machine; 4 s on a quiet one
SERVICE_RANGE = "10.96.0.0/16"
PATCH_TYPES = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "apply": "application/apply-patch+yaml",
}


class ApiError(Exception):
    """An answer of the API server that is not a success: `.status` (number), `.reason` (Kubernetes' word) and `.message`."""

    def __init__(self, response: requests.Response) -> None:
        try:
            body = response.json()
        except requests.JSONDecodeError:
            body = {"message": response.text}
        self.status = response.status_code
        self.reason = str(body.get("reason", response.reason))
        self.message = str(body.get("message", ""))
        super().__init__(f"{response.request.method} {response.request.path_url}: {self.status} {self.reason}: {self.message}")


def _session() -> requests.Session:
    """Asks again when the API server says so, as kubectl does: 429 with Retry-After, while a new custom resource is being set up."""
    session = requests.Session()
    session.trust_env = False
    busy = Retry(total=10, connect=0, read=0, status_forcelist=[429], allowed_methods=None, raise_on_status=False)
    session.mount("https://", HTTPAdapter(max_retries=busy))
    return session


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to outgoing connections: so they stay free while a server restarts."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = random.SystemRandom().sample(range(12000, first_ephemeral), min(2000, first_ephemeral - 12000))
    ports: list[int] = []
    for port in candidates:
        with socket.socket() as probe:
            if probe.connect_ex((address, port)) != 0:
                ports.append(port)
        if len(ports) == count:
            return ports
    raise KubeError(f"no {count} free ports on {address}")


class ApiServer:
    """A running API server with what it needs, and ways to talk to it. Made by `start_api_server`.

    Attributes: `server` (URL), `kubeconfig` (of an administrator), `state` (folder: certificates, etcd's data, logs), `processes`.
    """

    def __init__(self, state: Path, *, kcm_flags: Sequence[str] = (), apiserver_flags: Sequence[str] = (), die_with_parent: bool = True) -> None:
        self.state = state.resolve()
        self.state.mkdir(parents=True, exist_ok=True)
        self.binaries = self._binaries()
        self.kubeconfig = self.state / "admin.kubeconfig"
        self.address, self._etcd_port, self._peer_port, self._port = self._place()
        self.server = f"https://{self.address}:{self._port}"
        self.authority = Authority(self.state / "certificates")
        self.processes = Processes(self.state, self._prefix(), die_with_parent)
        self._kcm_flags, self._apiserver_flags = list(kcm_flags), list(apiserver_flags)
        self._session = _session()

    # What a cluster with nodes does otherwise.
    def _binaries(self) -> dict[str, Path]:
        return binaries(*API_BINARIES)

    def _place(self) -> tuple[str, int, int, int]:
        """Where to listen: address, etcd's client and peer port, the API server's port."""
        etcd, peer, port = free_ports(3)
        return "127.0.0.1", etcd, peer, port

    def _prefix(self) -> Sequence[str]:
        return ()

    def _place_flags(self) -> list[str]:
        return [f"--bind-address={self.address}", f"--advertise-address={self.address}", "--endpoint-reconciler-type=none"]

    def _controller_flags(self) -> list[str]:
        return []

    # Start and stop.
    def start(self) -> None:
        """Start everything and wait until objects, also pods, can be made in namespace `default`. Raises KubeError."""
        self._issue_certificates()
        self._start_etcd()
        self.start_apiserver()
        self._start_controller_manager()
        self.processes.until("kube-controller-manager", self._has_service_account, START_SECONDS, "service account default/default")

    def stop(self) -> None:
        """End every process of it."""
        self._session.close()
        self.processes.stop()

    def start_apiserver(self) -> None:
        """Start the API server (first, or anew after `stop_apiserver`: same address, same data) and wait until it is ready."""
        self.processes.start("kube-apiserver", [self.binaries["kube-apiserver"], *self._apiserver_command()])
        self.processes.until("kube-apiserver", self.is_ready, START_SECONDS, f"{self.server}/readyz")

    def stop_apiserver(self, grace_seconds: float = 3.0) -> None:
        """End the API server alone; with `grace_seconds=0` it is killed at once."""
        self.processes.stop("kube-apiserver", grace_seconds=grace_seconds)

    def restart_apiserver(self, grace_seconds: float = 3.0) -> None:
        self.stop_apiserver(grace_seconds)
        self.start_apiserver()

    def is_ready(self) -> bool:
        try:
            return self._session.get(f"{self.server}/readyz", timeout=5).ok
        except (requests.ConnectionError, requests.Timeout):
            return False

    def _issue_certificates(self) -> None:
        hosts = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "127.0.0.1", "10.96.0.1"]
        self.authority.issue("apiserver", "kube-apiserver", hosts=hosts if self.address in hosts else [*hosts, self.address])
        self.authority.issue("aggregator", "front-proxy")
        certificate = self.authority.folder / "admin.crt"
        self.authority.kubeconfig(self.kubeconfig, self.server, "admin", "admin", ["system:masters"])
        self._session.cert, self._session.verify = (str(certificate), str(self.authority.key("admin"))), str(self.authority.certificate)

    def _start_etcd(self) -> None:
        client, peer = (f"http://127.0.0.1:{port}" for port in (self._etcd_port, self._peer_port))
        flags = [f"--data-dir={self.state}/etcd", f"--listen-client-urls={client}", f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}"]
        advertised = [f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}"]
        self.processes.start("etcd", [self.binaries["etcd"], *flags, *advertised, "--unsafe-no-fsync", "--log-level=warn"])

    def _apiserver_command(self) -> list[str]:
        folder = self.authority.folder
        return [
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            f"--secure-port={self._port}",
            *self._place_flags(),
            f"--tls-cert-file={folder}/apiserver.crt",
            f"--tls-private-key-file={folder}/apiserver.key",
            f"--client-ca-file={self.authority.certificate}",
            f"--kubelet-client-certificate={folder}/admin.crt",
            f"--kubelet-client-key={folder}/admin.key",
            "--kubelet-preferred-address-types=InternalIP",
            f"--requestheader-client-ca-file={self.authority.certificate}",
            "--requestheader-allowed-names=front-proxy",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={folder}/aggregator.crt",
            f"--proxy-client-key-file={folder}/aggregator.key",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.authority.token_public_key}",
            f"--service-account-signing-key-file={self.authority.token_key}",
            "--authorization-mode=Node,RBAC",
            "--allow-privileged",
            "--enable-admission-plugins=NodeRestriction",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            *self._apiserver_flags,
        ]

    def _start_controller_manager(self) -> None:
        name = "kube-controller-manager"
        kubeconfig = self.user_kubeconfig(f"system:{name}", ["system:masters"])
        command: list[str | Path] = [
            self.binaries[name],
            f"--kubeconfig={kubeconfig}",
            "--leader-elect=false",
            "--use-service-account-credentials",
            "--secure-port=0",
            f"--service-account-private-key-file={self.authority.token_key}",
            f"--root-ca-file={self.authority.certificate}",
            f"--cluster-signing-cert-file={self.authority.certificate}",
            f"--cluster-signing-key-file={self.authority.key('ca')}",
            *self._controller_flags(),
            *self._kcm_flags,
        ]
        self.processes.start(name, command)

    def _has_service_account(self) -> bool:
        return any(item["metadata"]["name"] == "default" for item in self.get("/api/v1/namespaces/default/serviceaccounts")["items"])

    # Ways to talk to it.
    def user_kubeconfig(self, user: str, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig for a user of this name and these groups, who may do what RBAC says. Service accounts: `system:serviceaccount:<namespace>:<name>`."""
        name = user.replace(":", "-")
        return self.authority.kubeconfig(self.state / f"{name}.kubeconfig", self.server, name, user, groups)

    def kubectl(self, *arguments: str | Path, input: str | None = None, kubeconfig: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run kubectl as administrator (or as whom `kubeconfig` says). Raises KubeError with what kubectl said, unless check is False."""
        command = [self.binaries["kubectl"], f"--kubeconfig={kubeconfig or self.kubeconfig}", f"--cache-dir={self.state}/kubectl", *arguments]
        result = subprocess.run([str(word) for word in command], input=input, capture_output=True, text=True, check=False)
        if check and result.returncode != 0:
            raise KubeError(f"kubectl {' '.join(str(word) for word in arguments)}: exit code {result.returncode}: {result.stderr.strip()}")
        return result

    def request(self, method: str, path: str, body: Any = None, content_type: str = "application/json", query: Mapping[str, object] | None = None) -> Any:
        """One request as administrator; returns the decoded JSON (or text). Raises ApiError."""
        headers, parameters = {"Content-Type": content_type}, {key: str(value) for key, value in (query or {}).items()}
        response = self._session.request(method, self.server + path, json=body, headers=headers, params=parameters, timeout=30)
        if not response.ok:
            raise ApiError(response)
        return response.json() if response.headers.get("Content-Type", "").startswith("application/json") else response.text

    def get(self, path: str, **query: object) -> Any:
        return self.request("GET", path, query=query)

    def post(self, path: str, body: Any, **query: object) -> Any:
        return self.request("POST", path, body, query=query)

    def put(self, path: str, body: Any, **query: object) -> Any:
        return self.request("PUT", path, body, query=query)

    def patch(self, path: str, body: Any, kind: str = "merge", **query: object) -> Any:
        """PATCH; `kind` is merge, json, strategic or apply (which needs the parameter fieldManager)."""
        return self.request("PATCH", path, body, PATCH_TYPES[kind], query)

    def delete(self, path: str, body: Any = None, **query: object) -> Any:
        return self.request("DELETE", path, body, query=query)

    def find(self, path: str) -> Any:
        """An object, or None where there is none."""
        try:
            return self.get(path)
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    def create_namespace(self, name: str, labels: dict[str, str] | None = None) -> str:
        """Make a namespace, wait until pods can be made in it (its service account is there), and return its name."""
        self.post("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels or {}}})
        until(lambda: self.find(f"/api/v1/namespaces/{name}/serviceaccounts/default"), START_SECONDS, f"service account {name}/default")
        return name


@contextmanager
def start_api_server(folder: Path, *, kcm_flags: Sequence[str] = (), apiserver_flags: Sequence[str] = ()) -> Iterator[ApiServer]:
    """An API server of one's own with its state in `folder`; ended when the context is left."""
    kube_packages.install("openssl", "setpriv")
    api = ApiServer(folder, kcm_flags=kcm_flags, apiserver_flags=apiserver_flags)
    try:
        api.start()
        yield api
    finally:
        api.stop()
