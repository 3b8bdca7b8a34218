"""A Plan executed on this machine: one launcher per node with the environment that pods get, watched until all have ended."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from pydantic import ValidationError

from finetune_operator import names, runs
from finetune_operator.describe import plan_text
from finetune_operator.display import Display, open_display
from finetune_operator.gang import Ending, Gang, Launcher
from finetune_operator.job_file import JobFile
from finetune_operator.machine import check_sources, find_config, missing_sources, this_machine, visible_gpus
from finetune_operator.plan import LAUNCHER, Identity, NodePlan, Place, Plan, cluster_only_fields, make_plan
from finetune_operator.runs import Run
from finetune_operator.settings import Settings
from finetune_trainer.contract import ConfigurationError, Progress, Reason, RunReport, exit_of
from finetune_trainer.ports import find_free_port
from finetune_trainer.resolve import read_facts, resolve
from finetune_trainer.streams import write_line

LOCAL_LAUNCHER = (sys.executable, "-P", "-m", "finetune_trainer.cli", "launch")
POLL_SECONDS = 0.5
ANSWER_SECONDS = 5.0
LOG_TAIL_LINES = 12
REPEAT_SECONDS = 1.0
"""A signal that comes so soon after the first one is the same request: `timeout` and a terminal that closes signal a process, and its group too. Longer than the launchers' own."""


def local_place(file: JobFile, work: Path, master_port: int = 0) -> Place:
    """Where launchers of this machine run."""
    return Place(
        kind="local",
        work=str(work.absolute()),
        relative_to=str(file.folder),
        run_file="{output_dir}/run.json",
        progress_host="127.0.0.1",
        progress_port=0,
        master_address="127.0.0.1",
        master_port=master_port,
    )


def run_job(file: JobFile, work: Path, resume: str | None, launcher: tuple[str, ...] = LOCAL_LAUNCHER) -> int:
    """Run a job to its end and return the run's exit code; raises ConfigurationError for what is refused before it starts."""
    policy = resume or file.job.spec.checkpoints.resume
    with file.locating():
        plan = _unclaimed_plan(file, work)
        check_sources(plan.config)
        _choose_devices(plan)
    port = find_free_port(2)  # the next one is for the launchers' watch of one another
    with file.locating(), runs.claim(file.job, Settings(), local_place(file, work, port), policy) as run:
        runs.write_run_file(run)
        return asyncio.run(_execute(file, work, run, launcher))


def describe_job(file: JobFile, work: Path, gpu_memory_gib: float | None) -> str:
    """What `run_job` would run, and what is chosen where the file is silent when the model's config.json is at hand."""
    with file.locating():
        plan = _unclaimed_plan(file, work)
        facts = find_config(plan.config, os.environ)
        machine = this_machine(plan, os.environ, gpu_memory_gib)
        resolution = resolve(plan.config, read_facts(facts), machine) if facts is not None else None
    absent = [f"{problem}; `finetune run` would refuse it on this machine" for problem in missing_sources(plan.config)]
    notes = [ignored_sentence(file), None if gpu_memory_gib else _devices_sentence(plan), *absent]
    return plan_text(plan, resolution, [note for note in notes if note], on_cpu=machine.device == "cpu")


def _unclaimed_plan(file: JobFile, work: Path) -> Plan:
    """What would run, without a folder of results of its own yet."""
    return make_plan(file.job, Settings(), local_place(file, work), Identity("<uid8>"))


# With which environment


def launchers(run: Run, launcher: tuple[str, ...], environment: Mapping[str, str], gpus: list[str]) -> list[Launcher]:
    """One launcher per node; ``gpus`` are the devices of the whole run, of which each node gets its own, empty for CPU processes."""
    command = (*launcher, *run.plan.command[len(LAUNCHER) :])
    return [
        Launcher(
            command,
            _node_environment(environment, node, _share(gpus, node.index, run.plan.processes_per_node)),
            run.folder,
            run.log_folder / f"{node.host}.log",
        )
        for node in run.plan.nodes
    ]


def _share(gpus: list[str], node: int, processes: int) -> list[str]:
    return gpus[node * processes : (node + 1) * processes]


def _node_environment(inherited: Mapping[str, str], node: NodePlan, gpus: list[str]) -> dict[str, str]:
    """This machine's environment without another gang's variables, and the node's own; `$(NAME)` is expanded as in a pod."""
    result = {name: value for name, value in inherited.items() if not names.is_gang_environment(name)}
    if "PYTHONPATH" in result:
        result["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in result["PYTHONPATH"].split(os.pathsep) if part)
    own: dict[str, str] = {}
    for variable in node.environment:
        if variable.value_from is None:
            own[variable.name] = _expand(variable.value or "", own)
    return {**result, **own, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def _expand(value: str, known: Mapping[str, str]) -> str:
    """Kubernetes' `$(NAME)`: names given before are replaced, unknown ones stay, `$$` is a dollar sign."""
    return re.sub(r"\$\$|\$\(([^()]+)\)", lambda match: "$" if match[0] == "$$" else known.get(match[1], match[0]), value)


# Running and watching


def ignored_sentence(file: JobFile) -> str | None:
    """One line with everything in the file that has no meaning without a cluster."""
    ignored = [*cluster_only_fields(file.job), *file.others]
    return f"ignored without a cluster: {', '.join(ignored)}" if ignored else None


async def _execute(file: JobFile, work: Path, run: Run, launcher: tuple[str, ...]) -> int:
    started = time.monotonic()
    gpus, without_gpus = _choose_devices(run.plan)
    display = open_display(f"{run.plan.job.namespace}/{run.plan.job.name}", run.plan.config.training.logging_steps)
    try:
        for sentence in filter(None, (ignored_sentence(file), without_gpus, *_opening(run))):
            display.say(sentence)
        ending = await _run_gang(run, launchers(run, launcher, os.environ, gpus), display)
    finally:
        display.close()
    return _conclude(file, work, run, ending, time.monotonic() - started)


def _choose_devices(plan: Plan) -> tuple[list[str], str | None]:
    """The GPUs of the run, or, on a machine without any, a sentence that says so; raises ConfigurationError where there are some, but too few."""
    if plan.accelerator is None:
        return [], None
    gpus, wanted = visible_gpus(os.environ), plan.world_size
    if len(gpus) >= wanted:
        return [name for name, _ in gpus[:wanted]], None
    if not gpus:
        return [], f"there is no GPU here: {wanted} {'process' if wanted == 1 else 'processes'} on the CPU"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    raise ConfigurationError(
        f"nodes: count {len(plan.nodes)} with processesPerNode {plan.processes_per_node} needs {wanted} GPUs, one per process; this machine shows {len(gpus)}{shown}; "
        "fewer processes, or nodes.accelerator.type CPU, would run here"
    )


def _devices_sentence(plan: Plan) -> str | None:
    """What is to be said about the GPUs of this machine before anything runs."""
    try:
        return _choose_devices(plan)[1]
    except ConfigurationError as error:
        return f"{error}; `finetune run` would refuse it on this machine"


def _opening(run: Run) -> list[str]:
    config = run.plan.config.run
    what = f"continuing run {config.uid[:8]} (attempt {config.attempt}; --resume never starts anew)" if run.continued else f"run {config.uid[:8]}"
    return [what, f"results: {run.folder}", f"output of the processes: {run.log_folder}"]


async def _run_gang(run: Run, nodes: list[Launcher], display: Display) -> Ending:
    gang = Gang(nodes, run.plan.config.run.grace_seconds)
    ended = asyncio.Event()
    watcher = asyncio.create_task(_watch(run, display, ended))
    with _stopping_on_signals(gang, display):
        try:
            return await gang.run()
        finally:
            ended.set()
            await watcher


@contextmanager
def _stopping_on_signals(gang: Gang, display: Display) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    asked: float | None = None

    def stop(number: int) -> None:
        nonlocal asked
        now = time.monotonic()
        if asked is not None and (number == signal.SIGHUP or now - asked < REPEAT_SECONDS):
            return
        gang.stop()
        display.say("stopping after a checkpoint; once more stops at once" if asked is None else "stopping at once")
        asked = asked or now

    # What a shell has told this process to ignore (nohup: SIGHUP) stays ignored.
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number in numbers:
            loop.remove_signal_handler(number)
            if asked is not None:
                signal.signal(number, signal.SIG_IGN)  # all has ended: the same request once more would only cut off the last words
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def _watch(run: Run, display: Display, ended: asyncio.Event) -> None:
    """Show rank 0's progress until the gang has ended, and then the steps of its report that came after the last answer."""
    address_file = run.folder / "progress.json"
    said, newest = False, None
    while not await _has_ended(ended):
        address = _read_address(address_file)
        if address is None:
            continue
        if not said:
            said = True
            display.say(f"progress: http://{address}/progress and /metrics")
        progress = await asyncio.to_thread(fetch_progress, address)
        if progress is not None:
            display.update(progress)
            newest = progress
    report = runs.read_report(run)
    if newest is not None and report is not None:
        display.catch_up(remaining_steps(newest, report))


def remaining_steps(newest: Progress, report: RunReport) -> Progress:
    """The last answer of an attempt with all steps of the attempt's report; with none where nobody has said of how many."""
    total = newest.total_steps or (report.curve[-1].step if report.succeeded and report.curve else 0)
    steps = [point for point in report.curve if total and point.step > report.resumed_from_step]
    return newest.model_copy(update={"recent": steps, "total_steps": total})


async def _has_ended(ended: asyncio.Event) -> bool:
    with suppress(TimeoutError):
        await asyncio.wait_for(ended.wait(), POLL_SECONDS)
    return ended.is_set()


def _read_address(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text())["address"])
    except (OSError, ValueError, KeyError):
        return None


def fetch_progress(address: str) -> Progress | None:
    """What rank 0 answers; None while nothing that can be read does. No proxy is asked."""
    connection = HTTPConnection(address, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/progress")
        return Progress.model_validate_json(connection.getresponse().read())
    except (OSError, HTTPException, ValidationError):
        return None
    finally:
        connection.close()


# The end


def _conclude(file: JobFile, work: Path, run: Run, ending: Ending, seconds: float) -> int:
    """Say how it ended: results on standard output, a failure in a sentence on standard error."""
    report = runs.read_report(run)
    if ending.code == 0:
        write_line(success_text(run.folder, report, seconds), sys.stdout)
        return 0
    failed = report is not None and report.failure is not None and report.failure.reason is not Reason.PREEMPTED
    if exit_of(ending.code).reason is Reason.PREEMPTED or (ending.asked and not failed):
        again = f"continue with: {continue_command(file.path, work)}" if runs.has_checkpoint(run.folder) else "there is no checkpoint yet"
        write_line(f"stopped after {_duration(seconds)}; {again}", sys.stderr)
        return ending.code
    write_line(failure_text(file, run, ending, report), sys.stderr)
    return ending.code


def continue_command(path: Path, work: Path) -> str:
    """The command that continues a stopped run, for a shell."""
    elsewhere = () if work == names.DEFAULT_WORK else ("--work", str(work))
    return shlex.join(("finetune", "run", "-f", str(path), *elsewhere, "--resume", "auto"))


def success_text(folder: Path, report: RunReport | None, seconds: float) -> str:
    """Where things are, first and last loss, verification, time."""
    if report is None:
        return f"finished in {_duration(seconds)}, without a report\nresults: {folder}"
    lines = [f"finished in {_duration(seconds)}"]
    if report.curve:
        lines[0] += f": loss {report.curve[0].loss:.4g} → {report.curve[-1].loss:.4g} in {report.curve[-1].step} steps"
    if report.verification is not None:
        difference = report.verification.max_logit_difference
        size = "" if difference is None else f", largest difference of a logit {difference:.2g}"
        lines.append(f"verified ({report.verification.level}{size})")
    lines += [f"{artifact.format}: {os.path.join(folder, artifact.path)}" for artifact in report.artifacts]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"{name}: {folder / name}" for name in ("report.json", "loss.png") if (folder / name).exists()]
    return "\n".join(lines)


def failure_text(file: JobFile, run: Run, ending: Ending, report: RunReport | None) -> str:
    """The reason in a sentence; where the trainer gave none, the end of the node's log."""
    failure = None if report is None else report.failure
    node = ending.node if failure is None or failure.rank is None else min(failure.rank // run.plan.processes_per_node, len(run.plan.nodes) - 1)
    host = run.plan.nodes[node].host
    log = run.log_folder / f"{host}.log"
    if failure is not None:
        rank = "" if failure.rank is None else f" (rank {failure.rank})"
        return f"{failure.reason.value}{rank}: {file.located(failure.message)}\nlog: {log}"
    tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:] if log.exists() else []
    return "\n".join([f"{exit_of(ending.code).reason.value}: {host} ended with exit code {ending.code}; the end of {log}:", *tail])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
