"""What a person sees while a run goes on: a live panel in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import IO, Protocol, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_operator.describe import value_text
from finetune_trainer.contract import Progress, is_logged
from finetune_trainer.streams import Unfailing


class Display(Protocol):
    """Where a run's progress is shown."""

    def say(self, sentence: str) -> None:
        """Show a sentence that stays."""

    def update(self, progress: Progress) -> None:
        """Show the newest progress."""

    def catch_up(self, progress: Progress) -> None:
        """Show those of its recent steps that have a line and were not shown yet."""

    def close(self) -> None:
        """End the display; what it showed last stays."""


def open_display(title: str, logging_steps: int, console: Console | None = None) -> Display:
    """A live panel when standard output is a terminal, else lines: one for each stage that is seen and each step that the trainer's log has."""
    chosen = console or Console(file=cast("IO[str]", Unfailing(sys.stdout)), highlight=False, soft_wrap=True)
    if chosen.is_terminal and not chosen.is_dumb_terminal:
        return _Panel(title, chosen)
    return _Lines(chosen, logging_steps)


def step_text(progress: Progress) -> str:
    """`step 20/60  loss 1.234  learning rate 0.0008  512 tokens/s  31s left`."""
    parts = [f"step {progress.steps}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4g}")
    if progress.learning_rate is not None:
        parts.append(f"learning rate {progress.learning_rate:.3g}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:.0f} tokens/s")
    if progress.remaining is not None:
        parts.append(f"{progress.remaining} left")
    return "  ".join(parts)


def step_lines(progress: Progress, logging_steps: int, shown: int) -> list[str]:
    """A line for each of the recent steps above ``shown`` that the trainer's log has, with the figures of that step."""
    return [
        step_text(progress.after(progress.recent[:count]))
        for count, point in enumerate(progress.recent, start=1)
        if point.step > shown and is_logged(point.step, progress.total_steps, logging_steps)
    ]


class _Lines:
    def __init__(self, console: Console, logging_steps: int) -> None:
        self._console = console
        self._logging_steps = logging_steps
        self._stage = ""
        self._step = 0
        self._resolved_said = False

    def say(self, sentence: str) -> None:
        self._console.print(sentence, markup=False)

    def update(self, progress: Progress) -> None:
        if progress.resolved and not self._resolved_said:
            self._resolved_said = True
            self.say("chosen: " + ", ".join(f"{name} {value_text(value)}" for name, value in progress.resolved.items()))
        self.catch_up(progress)
        self._enter(progress.stage)

    def catch_up(self, progress: Progress) -> None:
        lines = step_lines(progress, self._logging_steps, self._step)
        if lines:
            self._enter("training")
            self._step = progress.recent[-1].step
        for line in lines:
            self.say(line)

    def _enter(self, stage: str) -> None:
        if stage != self._stage:
            self._stage = stage
            self.say(stage)

    def close(self) -> None:
        return


class _Panel:
    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._live = Live(Text(f"{title}: starting"), console=console, refresh_per_second=4)
        self._live.start()

    def say(self, sentence: str) -> None:
        self._live.console.print(sentence, markup=False)

    def update(self, progress: Progress) -> None:
        self._live.update(_panel(self._title, progress))

    def catch_up(self, progress: Progress) -> None:
        return

    def close(self) -> None:
        self._live.stop()


def _panel(title: str, progress: Progress) -> Group:
    head = Table.grid(padding=(0, 2))
    head.add_row(
        Text(title, style="bold"),
        Text(progress.stage, style="cyan"),
        ProgressBar(total=max(progress.total_steps, 1), completed=progress.step, width=40),
        f"{progress.percent} %",
    )
    numbers = Table.grid(padding=(0, 2))
    numbers.add_row(step_text(progress), f"{progress.elapsed_seconds:.0f}s so far")
    chosen = Table.grid(padding=(0, 2))
    for name, value in progress.resolved.items():
        chosen.add_row(Text(name, style="dim"), Text(value_text(value)))
    return Group(head, numbers, chosen)
