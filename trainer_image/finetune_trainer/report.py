"""The only mouth of a process: /progress and /metrics, the lines of the log, report.json, the loss curve, the termination message.

Rank 0 speaks; on every other rank a ``Report`` only keeps count. This module imports neither torch nor Megatron-core, so
that it can answer before they are imported.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import ValidationError

from finetune_trainer.contract import (
    Artifact,
    ConfigurationError,
    CurvePoint,
    FailureReport,
    Progress,
    Reason,
    RunConfig,
    RunReport,
    Stage,
    Verification,
    is_logged,
)
from finetune_trainer.streams import write_line

PROGRESS_FILE = "progress.json"
REPORT_FILE = "report.json"
CURVE_FILE = "loss.png"
EVERY_ADDRESS, EVERY_ADDRESS_OF_BOTH = "0.0.0.0", "::"
PACKAGES = ("mcore-finetune", "torch", "megatron-core", "transformers", "peft", "safetensors", "transformer-engine")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old or the new content, never a part; raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def format_step(point: CurvePoint, progress: Progress) -> str:
    """One line of the log."""
    width = len(str(progress.total_steps))
    return (
        f"step {point.step:>{width}}/{progress.total_steps}  loss {point.loss:.4f}  lr {point.learning_rate:.2e}  grad norm {point.gradient_norm:.4f}"
        f"  {progress.tokens_per_second or 0.0:.0f} tokens/s  {progress.remaining or '0s'} left"
    )


def describe_verification(verification: Verification) -> str:
    """A verification that has passed, in one line."""
    difference = verification.max_logit_difference
    return f"verified: {verification.level}" + (f", largest difference of two logits {difference:.2g}" if difference is not None else "")


@dataclass(frozen=True)
class Beginning:
    """Where training starts: the steps that are done already, how many of them changed the weights, and the curve up to there."""

    step: int
    total_steps: int
    updates: int = 0
    curve: tuple[CurvePoint, ...] = ()


class Report:
    """What is known of one run, from the start of the process to its end."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.config = config
        self.speaks = rank == 0
        self.curve: list[CurvePoint] = []
        self.start_time = datetime.now(UTC)
        self._start = time.monotonic()
        self._progress = Progress(last_heartbeat_time=self.start_time)
        self._notes: list[str] = []
        self._rows: dict[str, int] = {}
        self._resumed_from_step = 0
        self._result: dict[str, Any] = {}
        self._server: _Server | None = None

    @property
    def folder(self) -> Path:
        """The run's folder of results."""
        return Path(self.config.run.output_dir)

    def serve(self) -> None:
        """Make the run's folder, answer HTTP in a thread, and write the address to progress.json; nothing on ranks above 0.

        Raises ConfigurationError when the folder cannot be written or the port cannot be had.
        """
        if not self.speaks:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / f".{PROGRESS_FILE}.probe", b"\0" * 4096)
            (self.folder / f".{PROGRESS_FILE}.probe").unlink()
        except OSError as error:
            raise ConfigurationError(f"run.outputDir: the output folder {self.folder} cannot be written: {error.strerror or error}") from error
        address = self._listen()
        write_atomically(self.folder / PROGRESS_FILE, json.dumps({"address": address, "attempt": self.config.run.attempt}).encode())

    def _listen(self) -> str:
        host, port = self.config.run.progress_host, self.config.run.progress_port
        try:
            self._server = _serve_on(host, port, self)
        except OSError as error:
            raise ConfigurationError(
                f"run.progressPort: cannot serve progress on {host} port {port}: {error.strerror or error}; 0 takes a free port"
            ) from error
        threading.Thread(target=self._server.serve_forever, name="progress", daemon=True).start()
        return f"{host}:{self._server.server_address[1]}"

    def close(self) -> None:
        """Stop answering and remove progress.json, so that nobody takes the address for a living run's."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            remove_address(self.config)

    def progress(self) -> Progress:
        """What /progress answers now."""
        return self._progress.model_copy(update={"elapsed_seconds": round(time.monotonic() - self._start, 3)})

    def say(self, line: str) -> None:
        """One plain line on standard output, of rank 0 alone."""
        if self.speaks:
            write_line(line, sys.stdout)

    def note(self, sentence: str) -> None:
        """Say something once, and keep it for the report."""
        if sentence not in self._notes:
            self._notes.append(sentence)
            self.say(f"note: {sentence}")

    def stage(self, stage: Stage) -> None:
        """A new stage of the run; the end of the one before is a sign of life."""
        if stage != self._progress.stage:
            self._update(stage=stage)

    def heartbeat(self) -> None:
        """A piece of work has ended."""
        self._update()

    def resolved(self, chosen: Mapping[str, Any]) -> None:
        """What was chosen where the configuration was silent, by API name."""
        self._update(resolved=dict(chosen))
        if chosen:
            self.say("chosen: " + ", ".join(f"{name} {value}" for name, value in chosen.items()))

    def rows(self, counts: Mapping[str, int]) -> None:
        """Rows read, dropped and trained on."""
        self._rows = dict(counts)
        self.say("rows: " + ", ".join(f"{count} {name}" for name, count in counts.items()))

    def begin(self, beginning: Beginning) -> None:
        """Training starts, or goes on after a checkpoint."""
        self.curve = list(beginning.curve)
        self._resumed_from_step = beginning.step
        self._set(self._progress.at(beginning.step, beginning.total_steps).model_copy(update={"stage": "training"}))

    def step(self, point: CurvePoint) -> None:
        """One optimizer step is done."""
        self.curve.append(point)
        self._set(self._progress.after([*self._progress.recent, point]))
        if is_logged(point.step, self._progress.total_steps, self.config.training.logging_steps):
            self.say(format_step(point, self._progress))

    def _update(self, **changes: Any) -> None:
        self._set(self._progress.model_copy(update=changes))

    def _set(self, progress: Progress) -> None:
        # One assignment of an immutable object: the server's thread sees the old or the new one.
        self._progress = progress.model_copy(update={"last_heartbeat_time": datetime.now(UTC)})

    def result(self, artifacts: Sequence[Artifact], verification: Verification, peak_memory_gib: Sequence[float]) -> None:
        """What has come out, proven or not; it stands in the report either way."""
        self._result = {"artifacts": list(artifacts), "verification": verification, "peak_memory_gib": [round(each, 3) for each in peak_memory_gib]}
        self.heartbeat()

    def finish(self, identity: str) -> None:
        """The run has succeeded: leave the curve, the report and the termination message. Raises OSError."""
        self._update(stage="finished", eta_seconds=0.0, remaining="0s")
        if not self.speaks:
            return
        self.draw()
        report = self._report(identity, succeeded=True)
        leave_report(report, self.config)
        for artifact in report.artifacts:
            self.say(f"{artifact.format}: {artifact.path}")
        if report.verification is not None:
            self.say(describe_verification(report.verification))

    def fail(self, identity: str, failure: FailureReport) -> None:
        """The run has ended without success: leave the report and the termination message. Raises OSError.

        The curve is drawn only when the run was asked to stop: after a failure the launcher gives a rank a second.
        """
        if self.speaks:
            leave_report(self._report(identity, succeeded=False).model_copy(update={"failure": failure}), self.config)
            if failure.reason is Reason.PREEMPTED:
                self.draw()

    def _report(self, identity: str, *, succeeded: bool) -> RunReport:
        return RunReport(
            **describe_run(self.config, identity),
            succeeded=succeeded,
            start_time=self.start_time,
            completion_time=datetime.now(UTC),
            resumed_from_step=self._resumed_from_step,
            resolved=self._progress.resolved,
            notes=self._notes,
            rows=self._rows,
            curve=self.curve,
            versions=find_versions(),
            **self._result,
        )

    def draw(self) -> None:
        """Write loss.png, when there is a curve."""
        if self.curve:
            draw_curve(self.curve, self.config.run.name, self.folder / CURVE_FILE)


def describe_run(config: RunConfig, identity: str) -> dict[str, Any]:
    """The fields of a RunReport that say which run it is of."""
    run = config.run
    return {"name": run.name, "namespace": run.namespace, "uid": run.uid, "attempt": run.attempt, "identity": identity}


def remove_address(config: RunConfig) -> None:
    """Remove progress.json, unless a newer attempt has written it. Raises OSError."""
    path = Path(config.run.output_dir) / PROGRESS_FILE
    with contextlib.suppress(FileNotFoundError):  # it was never there, or a newer attempt removes it at this moment
        if json.loads(path.read_bytes())["attempt"] <= config.run.attempt:
            path.unlink()


def read_report(config: RunConfig) -> RunReport | None:
    """The report.json that stands in the run's folder, when there is one that can be read."""
    try:
        return RunReport.model_validate_json((Path(config.run.output_dir) / REPORT_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def leave_report(report: RunReport, config: RunConfig) -> None:
    """Write report.json, unless a newer attempt of the same job has, and the termination message where one is asked for. Raises OSError."""
    path = Path(config.run.output_dir) / REPORT_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = read_report(config)
        if found is None or found.uid != report.uid or found.attempt <= report.attempt:
            write_atomically(path, report.model_dump_json(indent=2).encode())
    finally:  # it lies on another disk, and says why where this one cannot be written
        leave_termination_message(report, config)


def leave_termination_message(report: RunReport, config: RunConfig) -> None:
    """Write the summary that Kubernetes reads; in place, since the file is a mount of its own. Raises OSError."""
    if config.run.termination_message_path is not None:
        Path(config.run.termination_message_path).write_text(report.summary(), encoding="utf-8")


def find_versions() -> dict[str, str]:
    """Versions of the installed packages that decide the result: of one that is there twice, that which Python imports."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():  # in the order of sys.path
        found.setdefault((distribution.metadata["Name"] or "").lower(), distribution.version)
    return {name: found[name] for name in PACKAGES if name in found}


def draw_curve(curve: Sequence[CurvePoint], title: str, path: Path) -> None:
    """Write the loss (left axis) and the learning rate (right axis) over the steps as a PNG. Raises OSError."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of its first look at the fonts of a machine
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [point.step for point in curve]
    axes.plot(steps, [point.loss for point in curve], color="tab:blue", linewidth=1.5, marker="." if len(curve) < 100 else "")
    axes.set(title=title, xlabel="step", ylabel="loss (mean over labelled tokens)")
    axes.grid(alpha=0.3)
    rates = axes.twinx()
    rates.plot(steps, [point.learning_rate for point in curve], color="tab:orange", linewidth=1, alpha=0.6)
    rates.set_ylabel("learning rate")
    partial = path.with_name(f".{path.name}")
    canvas.print_png(str(partial))
    partial.replace(path)


def _serve_on(host: str, port: int, report: Report) -> _Server:
    """A server on an address; 0.0.0.0 means all addresses, also those of IPv6 where this machine has it. Raises OSError."""
    if host == EVERY_ADDRESS:
        with contextlib.suppress(OSError):  # no IPv6 here, or the port is taken: then that is said of IPv4
            return _Server((EVERY_ADDRESS_OF_BOTH, port), report)
    return _Server((host, port), report)


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Not http.server's own: that one asks the name service for this host's name before it listens."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], report: Report) -> None:
        self.report = report
        self.registry = CollectorRegistry()
        self.registry.register(_Metrics(report))
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Answer)

    def server_bind(self) -> None:
        """Bind; an IPv6 socket for all addresses takes IPv4 too, whatever the machine's default is."""
        if self.server_address[0] == EVERY_ADDRESS_OF_BOTH:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that hangs up is no concern of the run's."""


class _Answer(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/progress":
            self._send(200, "application/json", self.server.report.progress().model_dump_json().encode())
        elif path == "/metrics":
            self._send(200, "text/plain; version=0.0.4; charset=utf-8", generate_latest(self.server.registry))
        else:
            self._send(404, "text/plain; charset=utf-8", b"there are /progress and /metrics\n")

    def _send(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


class _Metrics(Collector):
    """Progress as Prometheus metrics, read when they are asked for."""

    gauges: ClassVar[dict[str, tuple[str, str]]] = {
        "loss": ("finetune_loss", "Mean loss over the labelled tokens of the last step's batch."),
        "learning_rate": ("finetune_learning_rate", "Learning rate of the last step."),
        "gradient_norm": ("finetune_gradient_norm", "Norm of the last step's gradient, before clipping."),
        "tokens_per_second": ("finetune_tokens_per_second", "Tokens per second over all processes, padding not counted."),
        "elapsed_seconds": ("finetune_elapsed_seconds", "Seconds since the process started."),
        "eta_seconds": ("finetune_eta_seconds", "Seconds until the last step, estimated."),
        "step": ("finetune_step", "Optimizer steps that are done, of an earlier attempt too."),
        "total_steps": ("finetune_total_steps", "Optimizer steps of the whole run."),
    }

    def __init__(self, report: Report) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        progress, curve, run = self._report.progress(), self._report.curve, self._report.config.run
        labels, values = ["name", "namespace"], [run.name, run.namespace]
        for field, (name, help_text) in self.gauges.items():
            value = getattr(progress, field)
            if value is not None and math.isfinite(value):
                yield _gauge(name, help_text, labels, values, float(value))
        if curve:
            yield _gauge("finetune_step_seconds", "Seconds of the last step.", labels, values, curve[-1].seconds)
        tokens = CounterMetricFamily("finetune_tokens", "Tokens trained on, padding not counted.", labels=labels)
        tokens.add_metric(values, float(sum(point.tokens for point in list(curve))))
        yield tokens
        yield _gauge(
            "finetune_last_heartbeat_timestamp_seconds", "End of the last piece of work, Unix time.", labels, values, progress.last_heartbeat_time.timestamp()
        )
        yield _gauge("finetune_stage_info", "The stage of the run, as a label.", [*labels, "stage"], [*values, progress.stage], 1.0)


def _gauge(name: str, help_text: str, labels: list[str], values: list[str], value: float) -> Metric:
    gauge = GaugeMetricFamily(name, help_text, labels=labels)
    gauge.add_metric(values, value)
    return gauge
