"""The operator as a process of its own on a real API server, and a stand-in for trainers that only answers `/progress`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

from finetune_operator import names
from kube_api import ApiServer, free_ports
from kube_build import binaries
from kube_processes import run, until

ROOT = Path(__file__).parents[2]
DEFINITION = ROOT / "crds" / f"{names.GROUP}_{names.PLURAL}.yaml"
CHART = ROOT / "helm" / "finetune-operator"
SYSTEM_NAMESPACE = "finetune-system"
IMAGE = "registry.example/trainer:1"
START_SECONDS = 120.0  # of a busy machine; 2 s on a quiet one
SHORT_TIMES = {
    "leaseDurationSeconds": 300,
    "renewDeadlineSeconds": 120,
    "retryPeriodSeconds": 1,
    "progressPollSeconds": 0.2,
    "progressWriteSeconds": 1,
    "causeWaitSeconds": 1,
    "unansweredSeconds": 2,
    "uncountedDelaySeconds": 0.2,
    "uncountedDelayLimitSeconds": 1,
    "refusalRetrySeconds": 0.5,
    "leftoverRetrySeconds": 0.5,
}
"""A life in seconds that is minutes otherwise; but a Lease that outlasts every pause of a busy machine."""
SHORT_LEASE = {"leaseDurationSeconds": 4, "renewDeadlineSeconds": 3}
"""For what is about the end of a Lease; an operator that a busy machine keeps from renewing it in time ends."""


def install(api: ApiServer) -> Path:
    """Apply the CustomResourceDefinition and the chart's rights; returns a kubeconfig of its service account."""
    api.kubectl("apply", "--server-side", "--force-conflicts", "-f", DEFINITION)
    api.kubectl("wait", "--for=condition=Established", "--timeout=60s", f"crd/{names.PLURAL}.{names.GROUP}")
    if api.find(f"/api/v1/namespaces/{SYSTEM_NAMESPACE}") is None:
        api.create_namespace(SYSTEM_NAMESPACE)
    templates = [f"--show-only=templates/{name}.yaml" for name in ("serviceaccount", "rbac")]
    version = api.get("/version")["gitVersion"]
    rendered = run(binaries("helm")["helm"], "template", names.OPERATOR, CHART, f"--namespace={SYSTEM_NAMESPACE}", f"--kube-version={version}", *templates)
    api.kubectl("apply", "--server-side", f"--namespace={SYSTEM_NAMESPACE}", "-f", "-", input=rendered)
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{SYSTEM_NAMESPACE}"]
    return api.user_kubeconfig(f"system:serviceaccount:{SYSTEM_NAMESPACE}:{names.OPERATOR}", groups)


class Operator:
    """One replica. Start it from the main thread: it dies with the thread that started it."""

    def __init__(self, folder: Path, kubeconfig: Path, name: str = "operator-0", **settings: Any) -> None:
        (self.port,) = free_ports(1)
        self.name, self.url, self.log = name, f"http://127.0.0.1:{self.port}", folder / f"{name}.log"
        file = folder / f"{name}.json"
        file.write_text(json.dumps({"trainerImage": IMAGE, "httpPort": self.port, **SHORT_TIMES, **settings}))
        self._environment = {"KUBECONFIG": str(kubeconfig), "FINETUNE_SETTINGS": str(file), "POD_NAME": name, "POD_NAMESPACE": SYSTEM_NAMESPACE}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Operator:
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "finetune_operator"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **self._environment})
        return self

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """As a machine's end does: at once, nothing is written any more."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """As a kubelet does; returns the exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(START_SECONDS)

    def is_up(self) -> bool:
        try:
            return self.probe("/healthz")[0] == HTTPStatus.OK
        except (requests.ConnectionError, requests.Timeout):
            return False

    def leads(self) -> bool:
        return self.is_up() and self.metric("finetune_operator_leader") == 1 and self.probe("/readyz")[0] == HTTPStatus.OK

    def until_leading(self) -> Operator:
        """Wait until it acts and has begun to watch."""
        until(lambda: self.leads() or not self.runs, START_SECONDS, f"{self.name} leads")
        assert self.runs, self.log.read_text()
        return self

    def probe(self, path: str) -> tuple[int, str]:
        answer = requests.get(f"{self.url}{path}", timeout=5)
        return answer.status_code, answer.text

    def samples(self, name: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Every series of a metric, by its sorted labels."""
        families = text_string_to_metric_families(self.probe("/metrics")[1])
        return {tuple(sorted(sample.labels.items())): sample.value for family in families for sample in family.samples if sample.name == name}

    def metric(self, name: str, /, **labels: str) -> float:
        """The sum of the series that have these labels."""
        return sum(value for found, value in self.samples(name).items() if labels.items() <= dict(found).items())

    def writes(self) -> float:
        """Requests so far that were to change something; Leases, which another client writes, apart."""
        return sum(self.metric("rest_client_requests_total", method=method) for method in ("POST", "PUT", "PATCH", "DELETE"))


@contextmanager
def running_operator(folder: Path, kubeconfig: Path, name: str = "operator-0", **settings: Any) -> Iterator[Operator]:
    """An operator that leads; ended when the context is left, and the Lease released."""
    operator = Operator(folder, kubeconfig, name, **settings).start()
    try:
        yield operator.until_leading()
    finally:
        if operator.runs:
            operator.terminate()


@dataclass
class Trainers:
    """What rank 0 of each gang answers at /progress, by its address; on one port, as in a cluster."""

    port: int
    answers: dict[str, str]
    addresses: Iterator[str]

    def address(self) -> str:
        """An address of this machine that no other pod has."""
        return next(self.addresses)


def _addresses() -> Iterator[str]:
    return (f"127.1.{third}.{fourth}" for third in range(256) for fourth in range(1, 255))


@contextmanager
def running_trainers() -> Iterator[Trainers]:
    """An HTTP server on all loopback addresses; one without an answer says 503, as a trainer's that is just starting is not there."""
    trainers = Trainers(free_ports(1)[0], {}, _addresses())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = trainers.answers.get(self.connection.getsockname()[0], "") if self.path == "/progress" else ""
            self.send_response(HTTPStatus.OK if answer else HTTPStatus.SERVICE_UNAVAILABLE)
            self.send_header("Content-Length", str(len(answer.encode())))
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Silent: an operator that was killed while it asked takes no answer."""

    server = Server(("0.0.0.0", trainers.port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield trainers
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
