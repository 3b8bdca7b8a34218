"""Standard output and error of a process that has more to do than to speak: that nobody reads them must end no run, and lose no checkpoint."""

from __future__ import annotations

import os
from typing import Any, TextIO


class Unfailing:
    """A stream that can be written as long as the process lives: once its reader has ended, its terminal is closed or its disk is full, what is written goes nowhere.

    So does all that is written where there is no stream: Python has none for a descriptor that was closed before it started.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return len(text) if self._stream is None else self._stream.write(text)
        except BlockingIOError:  # its reader is slow, and another process has made it one that does not wait
            return len(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            if self._stream is not None:
                self._stream.flush()
        except BlockingIOError:
            return
        except OSError:
            self._give_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        """Put /dev/null in its place, also for what the stream still holds and Python writes at the end: that this fails would change the exit code."""
        assert self._stream is not None
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def write_line(text: str, stream: TextIO | None) -> None:
    """Write a line and flush; never raises OSError."""
    unfailing = Unfailing(stream)
    unfailing.write(f"{text}\n")  # at once too, so that lines of several processes do not mix
    unfailing.flush()
