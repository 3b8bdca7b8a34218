"""What processes cost, from /proc, and the operator as a process."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kube_api import ApiServer, free_ports

NAMESPACE = "finetune-system"
NAME = "operator"
TICKS = os.sysconf("SC_CLK_TCK")
STEP_SECONDS, STILL_SECONDS, READY_SECONDS = 0.1, 4.0, 60.0

_REQUESTS = re.compile(r'^rest_client_requests_total\{code="(\d+)",method="(\w+)"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process in MiB: now, and its most so far."""

    resident: int
    peak: int


def cpu_seconds(pid: int) -> float:
    """CPU that a process has used so far, in user and in system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory(pid: int) -> Memory:
    """Of a process that runs."""
    values = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()))
    return Memory(int(values["VmRSS"]) // 1024, int(values["VmHWM"]) // 1024)


def busy_seconds() -> float:
    """CPU that all processes of the machine have used so far."""
    user, nice, system, _, _, interrupts, soft = (int(field) for field in Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + interrupts + soft) / TICKS


def own_seconds() -> float:
    """CPU that this process has used so far."""
    return sum(os.times()[:2])


class OperatorProcess:
    """The operator, started as it is in a pod but for its credentials, which are an administrator's (no limits of priority and fairness)."""

    def __init__(self, api: ApiServer) -> None:
        self.api = api
        (self.port,) = free_ports(1)
        self.settings = api.state / "operator.json"
        self.settings.write_text(json.dumps({"trainerImage": "localhost/trainer:1", "httpPort": self.port}))

    @property
    def pid(self) -> int:
        pid = self.api.processes.pid(NAME)
        if pid is None:
            raise SystemExit(f"the operator has ended; its log ends with:\n{self.api.processes.log_tail(NAME)}")
        return pid

    def start(self) -> None:
        """Start it; `ready` says when it serves."""
        environment = {"KUBECONFIG": str(self.api.kubeconfig), "FINETUNE_SETTINGS": str(self.settings), "POD_NAME": "operator-0", "POD_NAMESPACE": NAMESPACE}
        self.api.processes.start(NAME, [sys.executable, "-m", "finetune_operator"], environment)

    def wait_ready(self) -> None:
        """Until it leads and watches."""
        self.api.processes.until(NAME, self.is_ready, READY_SECONDS, "the operator's /readyz as leader")

    def stop(self) -> None:
        """As a kubelet does: SIGTERM, then half a minute."""
        self.api.processes.stop(NAME, grace_seconds=30)

    def is_ready(self) -> bool:
        try:
            return self._get("readyz") == "ok" and "finetune_operator_leader 1.0" in self._get("metrics")
        except urllib.error.URLError:
            return False

    def requests(self) -> Counter[tuple[str, str]]:
        """Requests to the API server that it has counted, by method and code: watches and its Lease left out, Events not."""
        return Counter({(method, code): int(float(count)) for code, method, count in _REQUESTS.findall(self._get("metrics"))})

    def rest(self, since: float) -> tuple[float, float | None]:
        """Wait until it uses no CPU; until when it did, and when it became ready (seconds after `since`, monotonic)."""
        used, changed, ready = 0.0, time.monotonic(), None
        while time.monotonic() - changed < STILL_SECONDS and time.monotonic() - since < READY_SECONDS:
            time.sleep(STEP_SECONDS)
            if (now := cpu_seconds(self.pid)) > used + 0.03:
                used, changed = now, time.monotonic()
            if ready is None and self.is_ready():
                ready = time.monotonic() - since
        return changed - since, ready

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=5) as answer:
            return str(answer.read().decode())
