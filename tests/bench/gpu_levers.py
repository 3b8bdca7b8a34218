"""What each lever gives, alone: ``python gpu_levers.py [--what export|kernels] [--rounds N] [--steps N] [--only WORDS] [--record FILE] sft FLAGS`` sets a run up as ``megatron sft FLAGS`` does, and
then takes some steps (or exports) with everything and some without each lever, in turn, in one process for each GPU.

Prints a line for each; with ``--what kernels`` no levers, but what a step's kernels take by torch's profiler. Trains as it goes: losses are not to be compared. Writes end in the page cache.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

sys.path.append(str(Path(__file__).parent))
import gpu_export_levers
import gpu_step_levers
from gpu_marks import leave_fsync_out

WARM_UP = 1
"""Steps at the start of a visit that are not counted."""
LEVERS: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {"steps": gpu_step_levers.LEVERS, "export": gpu_export_levers.LEVERS}
"""By what is timed."""
SHOWN = 40
"""Kernels in the table of those that take longest."""


@dataclass(frozen=True)
class Duration:
    """Seconds of one step or export, and those in which a core of the host worked for this process, of a step in its forward and backward passes."""

    seconds: float
    host: float


@dataclass
class Visits:
    """What one lever's visits took, round by round; ``having`` are those with everything just before or after, in turn."""

    having: list[list[Duration]] = field(default_factory=list)
    without: list[list[Duration]] = field(default_factory=list)
    more_gib: float = 0.0
    """The most memory of the last visit without it, less that of the one with everything beside it."""

    def describe(self) -> str:
        all_of_it, host = (
            f"{name} {ratio:.3f} ± {error:.3f}" for name, ratio, error in [("seconds", *compare(self, "seconds")), ("host", *compare(self, "host"))]
        )
        middle = median(each.seconds for visit in self.having for each in visit)
        return f"{all_of_it}, {host} ({len(self.having)} rounds; {middle:.4f} s with everything), {self.more_gib:+.1f} GiB"


def compare(visits: Visits, name: str) -> tuple[float, float]:
    """What it takes without the lever over what it takes with everything, by ``name`` of Duration: geometric mean over the rounds of the ratio of medians, and its standard error."""
    logarithms = [
        math.log(median(getattr(each, name) for each in without) / median(getattr(each, name) for each in having))
        for having, without in zip(visits.having, visits.without, strict=True)
    ]
    ratio = math.exp(mean(logarithms))
    return ratio, ratio * stdev(logarithms) / math.sqrt(len(logarithms)) if len(logarithms) > 1 else math.nan


def is_wanted(name: str, only: list[str]) -> bool:
    """Whether a lever's name holds one of these words, if there are any."""
    return not only or any(words in name for words in only)


@dataclass(frozen=True)
class Loaded:
    """A run that is about to train."""

    job: Any
    chunks: Any
    trainer: Any
    ranks: Any


def launch_ranks(options: argparse.Namespace) -> int:
    """`megatron sft`."""
    from finetune_trainer import cli, launch

    how = json.dumps([options.what, options.rounds, options.steps, options.only, options.record and str(options.record.absolute())])
    launch.launch = functools.partial(launch.launch, program=(sys.executable, "-P", str(Path(__file__).resolve()), "rank", how))
    return cli.main(options.command)


def run_rank(how: str, arguments: list[str]) -> None:
    """`python -m finetune_trainer RUN.json`, with the measurement in the place of training."""
    from finetune_trainer import __main__ as program

    load = program.load

    def load_and_measure(job: Any, ranks: Any, report: Any) -> None:
        loaded = Loaded(job, *load(job, ranks, report), ranks)
        with program.collects_garbage():
            measure(loaded, *json.loads(how))

    program.load = load_and_measure  # type: ignore[assignment]
    program.end(program.main(arguments))


def measure(loaded: Loaded, what: str, rounds: int, num_steps: int, only: list[str], record: str | None) -> None:
    """Measure, tell, and end the process."""
    import torch

    from finetune_trainer import train

    train.set_training(loaded.trainer, True)
    leave_fsync_out()
    if what == "kernels":
        time_kernels(loaded, num_steps, record)
    else:
        visit_levers(loaded, what, rounds, num_steps, only, record)
    sys.stdout.flush()
    torch.distributed.barrier()
    os._exit(0)


def time_kernels(loaded: Loaded, num_steps: int, record: str | None) -> None:
    """The kernels of the first rank's steps (on a CPU: torch's functions), those that take longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    numbers = itertools.count()
    durations = [take_step(loaded, next(numbers)) for _ in range(num_steps)][WARM_UP if num_steps > WARM_UP else 0 :]
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(num_steps):
            take_step(loaded, next(numbers))
        torch.cuda.synchronize() if on_gpu else None
    times = {row.key: (row.self_device_time_total if on_gpu else row.self_cpu_time_total, row.count) for row in profiler.key_averages()}
    kernels = [
        {"kernel": name, "milliseconds": microseconds / num_steps / 1e3, "launches": count / num_steps}
        for name, (microseconds, count) in sorted(times.items(), key=lambda item: item[1], reverse=True)
        if microseconds
    ]
    if loaded.ranks.rank == 0:
        for each in kernels[:SHOWN]:
            print(f"{each['milliseconds']:9.3f} ms {each['launches']:7.1f} launches  {str(each['kernel'])[:150]}")
        print(
            f"{sum(each['milliseconds'] for each in kernels):.2f} ms of kernels; {median(each.seconds for each in durations):.4f} s a step without the profiler"
        )
        if record:
            Path(record).write_text(json.dumps({"steps": [asdict(each) for each in durations], "kernels": kernels}))


def visit_levers(loaded: Loaded, what: str, rounds: int, num_steps: int, only: list[str], record: str | None) -> None:
    """Steps or exports with and without each lever, in turn."""
    import torch

    levers = {name: lever for name, lever in LEVERS[what].items() if is_wanted(name, only)}
    visits = {name: Visits() for name in levers}
    numbers = itertools.count()
    do = take_step if what == "steps" else take_export

    def visit() -> tuple[list[Duration], float]:
        torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
        durations = [do(loaded, next(numbers)) for _ in range(num_steps)][WARM_UP if num_steps > WARM_UP else 0 :]
        return durations, torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0

    if what == "export":
        visit()  # into fresh memory, where the first one writes
    for turn in range(rounds):
        for name, without in levers.items():
            having = visit() if turn % 2 == 0 else None
            with without(loaded.trainer):
                lacking = visit()
            having = having or visit()
            visits[name].having.append(having[0])
            visits[name].without.append(lacking[0])
            visits[name].more_gib = lacking[1] - having[1]
        if loaded.ranks.rank == 0 and record:
            Path(record).write_text(json.dumps({name: asdict(of_lever) for name, of_lever in visits.items()}))
    if loaded.ranks.rank == 0:
        for name, of_lever in visits.items():
            print(f"without {name}: {of_lever.describe()}")


def take_step(loaded: Loaded, step: int) -> Duration:
    """One step of ``train.fit``."""
    from finetune_trainer import train

    trainer, rows, config, ranks = loaded.trainer, loaded.job.rows, loaded.job.config, loaded.ranks
    training = config.training
    began = time.perf_counter()
    reading = train.order(len(rows.rows), training.seed, config.data.train_dataloader_shuffle)
    numbers = train.micro_batches(reading, step, training.global_batch_size, gpu_step_levers.micro_batch_size(training), ranks.dp, rows.lengths)
    batches = [train.collate([rows.rows[number] for number in some], train._multiple(config, ranks), ranks.device) for some in numbers]
    train.seed_step(trainer, step, ranks)
    host = time.process_time()
    outputs = train.run_forward_backward(trainer, batches)
    host = time.process_time() - host
    train.sum_up(outputs, batches, ranks, False)
    norm, _ = train.update(trainer)
    assert norm > 0, "no gradient: a switch has cut something off"
    return Duration(time.perf_counter() - began, host)


def take_export(loaded: Loaded, number: int) -> Duration:
    """One Hugging Face export, the adapters merged, of which the page cache holds one at a time."""
    import torch

    from finetune_trainer import convert

    job, ranks = loaded.job, loaded.ranks
    folder = Path(job.config.run.output_dir) / "export"
    folder.parent.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    began, host = time.perf_counter(), time.process_time()
    convert.export_huggingface(loaded.chunks, job.family, job.hf, ranks, folder, job.config.output.max_shard_size)
    torch.distributed.barrier()
    duration = Duration(time.perf_counter() - began, time.process_time() - host)
    if ranks.rank == 0:
        shutil.rmtree(folder)
    return duration


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=["steps", "export", "kernels"], default="steps", help="what is timed, and by that which levers are visited")
    parser.add_argument("--rounds", type=int, default=2, help="how often every lever is visited")
    parser.add_argument("--steps", type=int, help="steps or exports of a visit, by default 6 and 1; the first is not counted where there are several")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="levers whose name holds one of these words, parted by commas")
    parser.add_argument("--record", type=Path, help="write the seconds of each to this file after each round, as JSON")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="sft FLAGS")
    options = parser.parse_args()
    if options.what in LEVERS and not any(is_wanted(name, options.only) for name in LEVERS[options.what]):
        parser.error(f"--only names none of {', '.join(LEVERS[options.what])}")
    options.steps = options.steps or (1 if options.what == "export" else 6)
    return options


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(launch_ranks(read_options()))
