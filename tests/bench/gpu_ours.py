"""Our side of ``make bench-gpu``: ``megatron sft FLAGS`` unchanged, but for marks that its ranks leave.

``python gpu_ours.py sft FLAGS`` is the user's command; its launcher starts ``gpu_ours.py rank RUN.json`` where it starts ``-m finetune_trainer`` else.
"""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from gpu_marks import Marks, leave_fsync_out, peak


def launch_ranks(arguments: list[str]) -> int:
    """`megatron sft`."""
    from finetune_trainer import cli, launch

    launch.launch = functools.partial(launch.launch, program=(sys.executable, "-P", __file__, "rank"))
    return cli.main(arguments)


def run_rank(arguments: list[str]) -> None:
    """`python -m finetune_trainer RUN.json`."""
    marks = Marks()
    marks.write("started")
    from finetune_trainer import __main__ as program
    from finetune_trainer.report import Report

    leave_fsync_out()
    begin_stage, end_step = Report.stage, Report.step

    def stage(self: Any, name: Any) -> None:
        if name == "loading":
            mark_phases(marks, full=self.config.tuning.tuner_type == "full")
        begin_stage(self, name)
        marks.write(f"stage {name}")

    def step(self: Any, point: Any) -> None:
        """A step ends where the next one can begin: its line of the log is part of it."""
        end_step(self, point)
        marks.write("step", data_rank=0, tokens=point.tokens, loss=point.loss, seconds=point.seconds)
        if point.step == self.config.training.train_iters:
            marks.write("trained", **peak())

    Report.stage, Report.step = stage, step  # type: ignore[method-assign]
    program.end(program.main(arguments))


def mark_phases(marks: Marks, *, full: bool) -> None:
    """Time what loads and saves. The checkpoint at the end of a full run is left out: the peer writes none with these flags."""
    convert, checkpoint = (importlib.import_module(f"finetune_trainer.{name}") for name in ("convert", "checkpoint"))
    marks.around(convert, "import_base", "load")
    marks.around(convert, "export_adapter", "adapter")
    marks.around(convert, "export_huggingface", "export")
    if full:
        checkpoint.Checkpoints.save = lambda *_: None
    else:
        marks.around(checkpoint.Checkpoints, "save", "checkpoint")


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        run_rank(sys.argv[2:])
    else:
        sys.exit(launch_ranks(sys.argv[1:]))
