"""`finetune status`: prints jobs once, or anew whenever they change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from finetune_operator.page import job_page, jobs_table
from finetune_operator.reading import Reader

REFRESH_SECONDS = 10
"""Pods and ages are shown anew so often where the job itself does not change."""
WIDTH_OF_FILES = 200

Look = Callable[[], tuple[RenderableType, str, bool]]
"""What there is to see, the resource version that it was read at, and whether it will not change any more."""


def show_jobs(reader: Reader, namespace: str | None, *, watch: bool, console: Console | None = None) -> None:
    """A table of the jobs of a namespace, or (None) of all. Raises ClusterError."""

    def look() -> tuple[RenderableType, str, bool]:
        jobs, version = reader.jobs(namespace)
        if not jobs and not watch:
            return Text("no FineTuneJobs" + (f" in namespace {namespace}" if namespace else "")), version, True
        return jobs_table(jobs, datetime.now(UTC), namespaces=namespace is None), version, False

    _show(look, lambda version: reader.wait_for_change(namespace, None, version, REFRESH_SECONDS), watch, console)


def show_job(reader: Reader, namespace: str, name: str, *, watch: bool, console: Console | None = None) -> None:
    """The page of one job; watched until it has ended. Raises ClusterError."""

    def look() -> tuple[RenderableType, str, bool]:
        job, version = reader.job(namespace, name)
        return job_page(job, datetime.now(UTC)), version, job.ended

    _show(look, lambda version: reader.wait_for_change(namespace, name, version, REFRESH_SECONDS), watch, console)


def _show(look: Look, wait: Callable[[str], None], watch: bool, console: Console | None) -> None:
    console = console or _console()
    if not watch:
        console.print(look()[0])
        return
    views = _views(look, wait)
    if not console.is_terminal or console.is_dumb_terminal:
        for view in views:
            console.print(view, Text())
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for view in views:
            live.update(view, refresh=True)


def _views(look: Look, wait: Callable[[str], None]) -> Iterator[RenderableType]:
    while True:
        view, version, ended = look()
        yield view
        if ended:
            return
        wait(version)


def _console() -> Console:
    """Standard output; lines of a file or pipe are not broken at the width of a terminal that there is none of."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH_OF_FILES)
