"""What each lever of the start gives, alone: ``python gpu_start_levers.py [--rounds N] [--only WORDS] [--record FILE] sft FLAGS`` runs ``megatron sft FLAGS --train_iters 1`` with everything and without
each lever, in turn, and prints the seconds from launch to the end of the first step.

Every file that is read is in the page cache: a first run is not counted.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

MARK = "BENCH_FIRST_STEP"
"""Names the file in which the first rank leaves the time at which the first step ended."""
EVERYTHING = "nothing"
"""Left out: a run as it is."""


@dataclass(frozen=True)
class Lever:
    """How a run does without it."""

    environment: Callable[[Path], Mapping[str, str]] = lambda folder: {}
    """Of the run, which may use an empty folder."""
    before: Callable[[], None] = lambda: None
    """In each rank, before anything else."""
    while_reading: Callable[[], None] = lambda: None
    """In each rank, once rows are being read and before the engine is imported."""


def import_everything() -> None:
    """All that a rank of ours imports in any case; the process that reads rows is then forked from one that has torch."""
    import finetune_trainer.checkpoint
    import finetune_trainer.convert
    import finetune_trainer.train
    import finetune_trainer.verify  # noqa: F401


def import_more() -> None:
    """What an engine imports that has transformers' Trainer or PEFT at the top of its files."""
    import peft  # noqa: F401
    from transformers import Trainer  # noqa: F401


def let_functions_be_compiled() -> None:
    """Megatron-core's decorator as it is."""
    from finetune_trainer import megatron_cpu

    megatron_cpu._leave_functions_uncompiled = lambda: None


LEVERS = {
    EVERYTHING: Lever(),
    "reading rows beside the imports": Lever(before=import_everything),
    "ranks without transformers' Trainer and PEFT": Lever(while_reading=import_more),
    "leaving functions uncompiled": Lever(
        environment=lambda folder: {"NVTE_TORCH_COMPILE": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder)},
        while_reading=let_functions_be_compiled,
    ),
    "keeping compiled kernels": Lever(environment=lambda folder: {"TRITON_CACHE_DIR": str(folder)}),
    "bytecode": Lever(environment=lambda folder: {"PYTHONPYCACHEPREFIX": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}),
}


def launch_ranks(name: str, arguments: list[str]) -> int:
    """`megatron sft`."""
    from finetune_trainer import cli, launch

    launch.launch = functools.partial(launch.launch, program=(sys.executable, "-P", str(Path(__file__).resolve()), "rank", name))
    return cli.main(arguments)


def run_rank(name: str, arguments: list[str]) -> None:
    """`python -m finetune_trainer RUN.json`, without one lever."""
    lever = LEVERS[name]
    lever.before()
    from finetune_trainer import __main__ as program
    from finetune_trainer.report import Report

    run, end_step = program.run, Report.step

    def run_without(*given: Any) -> None:
        lever.while_reading()
        run(*given)

    def step(self: Report, point: object) -> None:
        end_step(self, point)  # type: ignore[arg-type]
        if self.speaks:
            Path(os.environ[MARK]).write_text(str(time.time()))

    program.run, Report.step = run_without, step  # type: ignore[assignment, method-assign]
    program.end(program.main(arguments))


def time_start(name: str, arguments: list[str]) -> float:
    """Seconds from launch to the end of the first step; raises SystemExit with what the run said where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "own"
        own.mkdir()
        mark = Path(folder) / "mark"
        command = [sys.executable, __file__, "launch", name, *arguments, "--train_iters", "1", "--output_dir", f"{folder}/out"]
        began = time.time()
        done = subprocess.run(command, env={**os.environ, MARK: str(mark), **LEVERS[name].environment(own)}, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"without {name}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return float(mark.read_text()) - began


def describe(seconds: Mapping[str, list[float]], name: str) -> str:
    """A line of the table: the median, and by how many seconds a start is longer without it, round by round, with its standard error."""
    if name == EVERYTHING:
        return f"with everything: {median(seconds[name]):.1f} s"
    longer = [without - having for without, having in zip(seconds[name], seconds[EVERYTHING], strict=True)]
    error = f" ± {stdev(longer) / math.sqrt(len(longer)):.1f}" if len(longer) > 1 else ""
    return f"without {name}: {median(seconds[name]):.1f} s, {mean(longer):+.1f}{error} s ({len(longer)} rounds)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="how often every lever is visited")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="levers whose name holds one of these words, parted by commas")
    parser.add_argument("--record", type=Path, help="write the seconds of each start to this file after each round, as JSON")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="sft FLAGS")
    options = parser.parse_args()
    names = [name for name in LEVERS if name == EVERYTHING or not options.only or any(words in name for words in options.only)]
    if names == [EVERYTHING]:
        parser.error(f"--only names none of {', '.join(LEVERS)}")
    print(f"the first: {time_start(EVERYTHING, options.command):.2f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            seconds[name].append(time_start(name, options.command))
            print(f"without {name}: {seconds[name][-1]:.2f} s", flush=True)
        if options.record:
            options.record.write_text(json.dumps(seconds))
    print("\n".join(describe(seconds, name) for name in names))


if __name__ == "__main__":
    if sys.argv[1:2] == ["launch"]:
        sys.exit(launch_ranks(sys.argv[2], sys.argv[3:]))
    elif sys.argv[1:2] == ["rank"]:
        run_rank(sys.argv[2], sys.argv[3:])
    else:
        main()
