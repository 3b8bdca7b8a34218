"""What must not go wrong around a run on GPUs: a hang ends it, nodes of one machine share no card, too many processes and too little memory are told in a sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from factories import make_rows
from finetune_trainer.contract import Reason, RunReport

START_SECONDS = 200.0
"""Until a run must have done its first steps; measured: 15."""
DDP_TIMEOUT, END_SECONDS = 20, 30
"""A hang ends the run at most END_SECONDS after DDP_TIMEOUT: this is required of the engine, and tested here."""
CONTEXT_MIB = 100
"""Less than what CUDA alone takes of a card for a process (about 500)."""
JOB = """
apiVersion: finetune.mcore.dev/v1alpha1
kind: FineTuneJob
metadata: {name: cards, namespace: team-a}
spec:
  model: {source: %(model)s}
  data: {dataset: [%(rows)s], maxLength: 128}
  training: {globalBatchSize: 8, microBatchSize: 2, trainIters: 300, lr: 1e-3, loggingSteps: 1}
  tuning: {loraDropout: 0}
  checkpoints: {saveSteps: 1000}
  nodes: {count: 2, processesPerNode: 1}
"""
Models = dict[tuple[str, str], Path]
Note = Callable[..., None]


class Run:
    """A command that runs, and what it has said so far."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        """Where the launcher says why it ends."""
        return (self.said.splitlines() or [""])[-1]

    def await_step(self, step: int) -> None:
        """Return when the line of this step is there."""
        deadline = time.monotonic() + START_SECONDS
        while not any(line.startswith("step ") and line.split()[1].startswith(f"{step}/") for line in self.said.splitlines()):
            assert self.process.poll() is None, f"ended with {self.process.returncode} before step {step}\n{self.said[-6000:]}"
            assert time.monotonic() < deadline, f"step {step} is not done after {START_SECONDS:g} s\n{self.said[-6000:]}"
            threading.Event().wait(0.05)

    def end(self, deadline_seconds: float) -> int:
        """The exit code."""
        try:
            return self.process.wait(deadline_seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it still runs after {deadline_seconds:g} s\n{self.said[-6000:]}")

    def ranks(self) -> dict[int, psutil.Process]:
        """The oldest process of each rank: what a rank has started has its environment too."""
        found: dict[int, psutil.Process] = {}
        for each in sorted(psutil.Process(self.process.pid).children(recursive=True), key=psutil.Process.create_time):
            with suppress(psutil.NoSuchProcess):
                environment = each.environ()
                if "LOCAL_RANK" in environment:
                    found.setdefault(int(environment["RANK"]), each)
        return found


@contextmanager
def started(command: Sequence[str], log: Path, **environment: str) -> Iterator[Run]:
    """A command that is ended, with its ranks, when the test is done with it."""
    run = Run(command, log, environment)
    try:
        yield run
    finally:
        left = [] if run.process.poll() is not None else psutil.Process(run.process.pid).children(recursive=True)
        run.process.kill()
        run.process.wait()
        for each in left:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def sft(model: Path, rows: Path, output: Path, **flags: object) -> list[str]:
    """`megatron sft` with what all tests here want."""
    common = {"model": model, "dataset": rows, "save": output, "tuner_type": "lora", "lora_dropout": 0, "lr": "1e-3", "max_length": 128, "logging_steps": 1}
    return [sys.executable, "-m", "finetune_trainer.cli", "sft", *(word for name, value in {**common, **flags}.items() for word in (f"--{name}", str(value)))]


def report_below(folder: Path) -> RunReport:
    (path,) = folder.glob("**/report.json")
    return RunReport.model_validate_json(path.read_bytes())


@pytest.mark.gpu2
def test_a_rank_that_hangs_ends_the_run_soon_after_the_timeout(models: Models, rows: Path, tmp_path: Path, note: Note) -> None:
    command = sft(
        models["qwen2", "bfloat16"],
        rows,
        tmp_path / "out",
        micro_batch_size=2,
        global_batch_size=8,
        train_iters=100_000,
        save_interval=100_000,
        ddp_timeout=DDP_TIMEOUT,
    )
    with started(command, tmp_path / "log", NPROC_PER_NODE="2") as run:
        run.await_step(3)
        ranks = run.ranks()
        assert sorted(ranks) == [0, 1]
        ranks[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        code = run.end(DDP_TIMEOUT + END_SECONDS)
        seconds = time.monotonic() - began
        left = [rank for rank, process in ranks.items() if process.is_running()]
    note(seconds_to_the_end=seconds, ddp_timeout=DDP_TIMEOUT, sentence=run.last_line)
    assert code == 21, run.said[-6000:]
    assert run.last_line.startswith("megatron: a collective did not end within parallelism.ddpTimeout: ")
    assert left == []
    failure = report_below(tmp_path / "out").failure
    assert failure is not None
    assert (failure.reason, failure.rank) == (Reason.HANG, 0)


def memory_used(cards: Sequence[str]) -> dict[str, int]:
    """MiB, by card: its index or UUID."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return {card: int(subprocess.run([*query, f"--id={card}"], capture_output=True, text=True, check=True, timeout=60).stdout) for card in cards}


def visible_cards() -> list[str]:
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(torch.cuda.device_count())] if given is None else [name.strip() for name in given.split(",")]


@pytest.mark.gpu2
def test_each_node_of_a_run_on_one_machine_has_its_own_card(models: Models, rows: Path, tmp_path: Path, note: Note) -> None:
    """What the nodes are given, and what is used: the memory of either card grows."""
    (tmp_path / "job.yaml").write_text(JOB % {"model": models["qwen2", "bfloat16"], "rows": rows})
    command = [sys.executable, "-m", "finetune_operator.cli", "run", "-f", str(tmp_path / "job.yaml"), "--work", str(tmp_path / "results")]
    cards = visible_cards()[:2]
    before = memory_used(cards)
    with started(command, tmp_path / "log") as run:
        run.await_step(2)
        given = {rank: process.environ()["CUDA_VISIBLE_DEVICES"] for rank, process in run.ranks().items()}
        during = memory_used(cards)
        code = run.end(START_SECONDS)
    grown = {card: during[card] - before[card] for card in cards}
    note(cards_of_the_ranks=given, memory_grown_mib=grown)
    assert code == 0, run.said[-6000:]
    assert given == {0: cards[0], 1: cards[1]}
    assert all(mebibytes > CONTEXT_MIB for mebibytes in grown.values()), grown
    report = report_below(tmp_path / "results")
    assert report.succeeded
    assert report.verification is not None
    assert report.verification.passed
    assert len(report.curve) == 300


@pytest.mark.one_gpu
@pytest.mark.parametrize("hidden", [False, True], ids=["all-cards", "one-card"])
def test_more_processes_than_cards_are_refused_with_both_numbers(hidden: bool, models: Models, rows: Path, tmp_path: Path) -> None:
    cards = visible_cards()
    shown = cards[:1] if hidden else cards
    environment = {"CUDA_VISIBLE_DEVICES": shown[0]} if hidden else {}
    command = sft(models["qwen2", "bfloat16"], rows, tmp_path / "out", train_iters=2)
    with started(command, tmp_path / "log", NPROC_PER_NODE=str(len(shown) + 1), **environment) as run:
        code = run.end(60)
    assert code == 10, run.said[-6000:]
    sentence = run.last_line
    assert sentence.startswith(f"megatron: NPROC_PER_NODE is {len(shown) + 1}; this node shows {len(shown)} GPU")
    assert f", so it may be at most {len(shown)}; an empty CUDA_VISIBLE_DEVICES runs the processes on the CPU" in sentence


@pytest.mark.one_gpu
def test_a_card_without_enough_memory_is_told_with_the_estimate_and_what_needs_less(models: Models, tmp_path: Path, note: Note) -> None:
    """No small model fills a card: torch is given a hundredth of it, of which the resolver knows nothing."""
    micro_batch = 2048  # several GiB
    command = sft(
        models["qwen2", "bfloat16"],
        make_rows(tmp_path, 2 * micro_batch),
        tmp_path / "out",
        micro_batch_size=micro_batch,
        global_batch_size=micro_batch,
        train_iters=2,
        recompute_granularity="none",
    )
    with started(command, tmp_path / "log", NPROC_PER_NODE="1", PYTORCH_CUDA_ALLOC_CONF="per_process_memory_fraction:0.01") as run:
        code = run.end(START_SECONDS)
    sentence = run.last_line
    note(sentence=sentence)
    assert code == 15, run.said[-6000:]
    assert sentence.startswith("megatron: out of memory: CUDA out of memory")
    assert " GiB a process were estimated, " in sentence
    assert "training.microBatchSize 1 (" in sentence
    assert "Traceback" not in run.said
    failure = report_below(tmp_path / "out").failure
    assert failure is not None
    assert failure.reason is Reason.OUT_OF_MEMORY
