"""What a person sees while a run goes on: a live panel in a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_operator.describe import value_text
from finetune_trainer.contract import Progress


class Display(Protocol):
    """Where a run's progress is shown."""

    def say(self, sentence: str) -> None:
        """Show a sentence that stays."""

    def update(self, progress: Progress) -> None:
        """Show the newest progress."""

    def close(self) -> None:
        """End the display; what it showed last stays."""


def open_display(title: str, logging_steps: int, console: Console | None = None) -> Display:
    """A live panel when standard output is a terminal, else lines: one for each stage and every ``logging_steps`` steps."""
    chosen = console or Console(highlight=False, soft_wrap=True)
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
        if progress.stage != self._stage:
            self._stage = progress.stage
            self.say(progress.stage)
        due = progress.step // self._logging_steps > self._step // self._logging_steps or progress.step == progress.total_steps
        if progress.step > self._step and (due or self._step == 0):
            self._step = progress.step
            self.say(step_text(progress))

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
