"""A launcher for tests: speaks the contract (run.json in; progress.json, /progress and report.json out) and trains nothing.

BEHAVIOUR in its environment, which a job's nodes.env can set, says how it ends; files named after the node say what it has seen.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from finetune_trainer.contract import CurvePoint, FailureReport, Progress, Reason, RunConfig, RunReport, Verification

NOW = datetime.now(UTC)
CURVE = [CurvePoint(step=step, loss=4.0 / step, learning_rate=1e-4, gradient_norm=1.0, tokens=512, seconds=1.0) for step in range(1, 7)]
PROGRESS = Progress(stage="training", last_heartbeat_time=NOW, resolved={"training.microBatchSize": 4}).at(0, 6).after(CURVE[:3])
"""Steps 1 to 3; what comes after them is in the report only."""


class Answers(BaseHTTPRequestHandler):
    asked = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(PROGRESS.model_dump_json().encode())
        if self.path == "/progress":
            self.asked.set()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def main() -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    config = RunConfig.load(Path(sys.argv[1]))
    node = int(os.environ["NODE_RANK"])
    folder = Path(config.run.output_dir)
    (folder / f"environment-{node}.json").write_text(json.dumps(dict(os.environ)))
    print(f"node {node} starts", flush=True)
    if node == 0:
        serve(folder)
    return BEHAVIOURS[os.environ.get("BEHAVIOUR", "finish")](config, folder, node)


def wait_for_sigterm() -> None:
    """Awaited, not handled: a handler that sets an event or releases a semaphore can come while the main thread holds its lock, and waits for ever."""
    signal.sigwait({signal.SIGTERM})


def serve(folder: Path) -> None:
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (folder / "progress.json").write_text(json.dumps({"address": f"127.0.0.1:{server.server_port}"}))


def report(config: RunConfig, **fields: object) -> RunReport:
    run = config.run
    known = {
        "name": run.name,
        "namespace": run.namespace,
        "uid": run.uid,
        "attempt": run.attempt,
        "identity": config.identity(),
        "start_time": NOW,
        "completion_time": NOW,
    }
    return RunReport(**{**known, **fields})


def finish(config: RunConfig, folder: Path, node: int) -> int:
    if node == 0:
        assert Answers.asked.wait(timeout=60), "nobody asked for /progress"
        verification = Verification(level="Adapter", passed=True, max_logit_difference=1.5e-6)
        (folder / "report.json").write_text(report(config, succeeded=True, curve=CURVE, verification=verification).model_dump_json())
    return 0


def fail(config: RunConfig, folder: Path, node: int) -> int:
    """Node 1 fails as the trainer would; the others wait to be ended."""
    if node == 1:
        await_nodes(folder)
        failure = FailureReport(reason=Reason.MODEL, message=os.environ.get("MESSAGE", "model.safetensors is truncated"), rank=1, exit_code=12)
        (folder / "report.json").write_text(report(config, succeeded=False, failure=failure).model_dump_json())
        return 12
    wait_for_sigterm()
    (folder / f"ended-{node}").touch()
    return 143


def await_nodes(folder: Path) -> None:
    """Return when every node listens for signals (it has written its environment since); one that is ended before leaves no trace."""
    paths = [folder / f"environment-{node}.json" for node in range(int(os.environ["NNODES"]))]
    while not all(path.exists() for path in paths):
        threading.Event().wait(0.05)


def crash(config: RunConfig, folder: Path, node: int) -> int:
    raise RuntimeError("the launcher itself is broken")


def stop(config: RunConfig, folder: Path, node: int) -> int:
    """Checkpoints when it is asked to stop; an attempt above the first finishes."""
    if config.run.attempt > 1:
        return finish(config, folder, node)
    wait_for_sigterm()
    (folder / "checkpoints" / "step-3").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "step-3" / "manifest.json").write_text("{}")
    return 143


def slow(config: RunConfig, folder: Path, node: int) -> int:
    """Checkpoints when it is asked to stop, once there is a file `go`."""
    wait_for_sigterm()
    while not (folder / "go").exists():
        threading.Event().wait(0.05)
    (folder / "checkpoints" / "step-3").mkdir(parents=True, exist_ok=True)
    return 143


def full(config: RunConfig, folder: Path, node: int) -> int:
    """Is asked to stop, and cannot save."""
    wait_for_sigterm()
    failure = FailureReport(reason=Reason.CONFIGURATION, message="checkpoints: the disk is full", rank=0, exit_code=10)
    (folder / "report.json").write_text(report(config, succeeded=False, failure=failure).model_dump_json())
    return 10


def stubborn(config: RunConfig, folder: Path, node: int) -> int:
    """Needs to be asked twice."""
    wait_for_sigterm()
    (folder / f"asked-{node}").touch()
    wait_for_sigterm()
    return 143


BEHAVIOURS = {"finish": finish, "fail": fail, "crash": crash, "stop": stop, "full": full, "slow": slow, "stubborn": stubborn}

if __name__ == "__main__":
    sys.exit(main())
