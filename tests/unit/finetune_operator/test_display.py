"""What is shown while a run goes on."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from finetune_operator.display import open_display, step_lines
from finetune_trainer.contract import RECENT_STEPS, CurvePoint, Progress


def progress(step: int, **fields: Any) -> Progress:
    return Progress(stage="training", step=step, total_steps=20, steps=f"{step}/20", percent=5 * step, last_heartbeat_time=datetime.now(UTC), **fields)


def answer(step: int, first: int = 1, total: int = 20, **fields: Any) -> Progress:
    """What `/progress` answers after ``step`` steps of an attempt that began with step ``first``."""
    steps = [
        CurvePoint(step=each, loss=4.0 - each / 100, learning_rate=1e-3 * each, gradient_norm=1.0, tokens=50, seconds=0.5) for each in range(first, step + 1)
    ]
    known = Progress(stage="training", last_heartbeat_time=datetime.now(UTC)).at(step, total)
    return (known.after(steps) if steps else known).model_copy(update=fields)


def shown(*answers: Progress, logging_steps: int = 5) -> list[str]:
    """The lines of a display without a terminal that was told ``answers``."""
    target, file = console(terminal=False)
    display = open_display("default/tiny", logging_steps, target)
    for each in answers:
        display.update(each)
    return file.getvalue().splitlines()


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=120, highlight=False, soft_wrap=True, color_system=None), file


def test_without_a_terminal_there_are_plain_lines() -> None:
    target, file = console(terminal=False)
    display = open_display("default/tiny", 5, target)
    display.say("results: /runs/[x]")
    for step in range(13):
        display.update(answer(step, resolved={"training.lr": 1e-4}))
    display.close()
    assert file.getvalue().splitlines() == [
        "results: /runs/[x]",
        "chosen: training.lr 0.0001",
        "training",
        "step 1/20  loss 3.99  learning rate 0.001  100 tokens/s  10s left",
        "step 5/20  loss 3.95  learning rate 0.005  100 tokens/s  8s left",
        "step 10/20  loss 3.9  learning rate 0.01  100 tokens/s  5s left",
    ]


@pytest.mark.parametrize("looks", [(3, 3, 12, 20, 20), (20,), (0, 19, 20), tuple(range(21))], ids=str)
def test_each_logging_step_is_a_line_with_its_own_figures_however_seldom_one_looks(looks: tuple[int, ...]) -> None:
    assert [line for line in shown(*map(answer, looks)) if line.startswith("step")] == [
        "step 1/20  loss 3.99  learning rate 0.001  100 tokens/s  10s left",
        "step 5/20  loss 3.95  learning rate 0.005  100 tokens/s  8s left",
        "step 10/20  loss 3.9  learning rate 0.01  100 tokens/s  5s left",
        "step 15/20  loss 3.85  learning rate 0.015  100 tokens/s  2s left",
        "step 20/20  loss 3.8  learning rate 0.02  100 tokens/s  0s left",
    ]


def test_steps_of_answers_that_hold_only_the_newest_ones_are_shown_once() -> None:
    lines = shown(*(answer(step, total=200) for step in (60, 120, 121, 180, 200)), logging_steps=1)
    assert [line.split()[1] for line in lines[1:]] == [f"{step}/200" for step in range(1, 201)]


def test_steps_of_an_earlier_attempt_are_not_shown_again() -> None:
    assert [line.split()[1] for line in shown(answer(16, first=8))[1:]] == ["10/20", "15/20"]


def test_steps_stand_under_training_though_it_was_over_when_one_looked() -> None:
    lines = shown(answer(0, stage="loading"), answer(5, stage="saving"), answer(10, stage="saving"), answer(12), logging_steps=10)
    assert [line.split("  ")[0] for line in lines] == ["loading", "training", "step 1/20", "saving", "training", "step 10/20", "saving", "training"]


def test_no_line_is_made_of_steps_that_were_shown() -> None:
    assert step_lines(answer(20), 5, 20) == []
    assert len(answer(200, total=200).recent) == RECENT_STEPS


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
