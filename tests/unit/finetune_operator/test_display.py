"""What is shown while a run goes on."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from finetune_operator.display import open_display
from finetune_trainer.contract import Progress


def progress(step: int, **fields: Any) -> Progress:
    return Progress(stage="training", step=step, total_steps=20, steps=f"{step}/20", percent=5 * step, last_heartbeat_time=datetime.now(UTC), **fields)


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=120, highlight=False, soft_wrap=True, color_system=None), file


def test_without_a_terminal_there_are_plain_lines() -> None:
    target, file = console(terminal=False)
    display = open_display("default/tiny", 5, target)
    display.say("results: /runs/[x]")
    for step in range(1, 13):
        display.update(progress(step, loss=2.0, learning_rate=1e-3, tokens_per_second=100.0, remaining="9s", resolved={"training.lr": 1e-4}))
    display.close()
    assert file.getvalue().splitlines() == [
        "results: /runs/[x]",
        "chosen: training.lr 0.0001",
        "training",
        "step 1/20  loss 2  learning rate 0.001  100 tokens/s  9s left",
        "step 5/20  loss 2  learning rate 0.001  100 tokens/s  9s left",
        "step 10/20  loss 2  learning rate 0.001  100 tokens/s  9s left",
    ]


def test_steps_that_are_passed_between_two_looks_are_not_lost() -> None:
    target, file = console(terminal=False)
    display = open_display("default/tiny", 5, target)
    for step in (4, 4, 7, 8, 19, 20, 20):
        display.update(progress(step))
    assert [line for line in file.getvalue().splitlines() if line.startswith("step")] == ["step 4/20", "step 7/20", "step 19/20", "step 20/20"]


def test_a_new_stage_is_a_line() -> None:
    target, file = console(terminal=False)
    display = open_display("default/tiny", 5, target)
    for stage in ("loading", "loading", "training", "saving"):
        display.update(Progress(stage=stage, last_heartbeat_time=datetime.now(UTC)))
    assert file.getvalue().splitlines() == ["loading", "training", "saving"]


def test_in_a_terminal_a_panel_shows_the_newest_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    target, file = console(terminal=True)
    display = open_display("default/tiny", 5, target)
    display.update(progress(7, loss=1.5, learning_rate=1e-3, tokens_per_second=321.0, remaining="42s", resolved={"training.microBatchSize": 4}))
    display.close()
    shown = file.getvalue()
    for part in (
        "default/tiny",
        "training",
        "35 %",
        "step 7/20",
        "loss 1.5",
        "learning rate 0.001",
        "321 tokens/s",
        "42s left",
        "training.microBatchSize",
        "4",
    ):
        assert part in shown
