"""Rows are read beside the imports: a process of its own does all for them that needs no torch, while the rank imports it.

It is forked, so a rank must have one thread only until then; numpy starts some when it is imported, which is why ``data`` is imported in functions here.

Of a node's ranks the first reads. What has come out, a file in memory (``data/mapped.py``) or an error, it hands on to the others through a socket in the folder of
their launcher, so that all map the same pages and end with the same error. They wait there and in no collective: reading may take longer than ``ddpTimeout``, though a node
that has read waits for the others no longer than that.
Ranks without our launcher read for themselves.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune_trainer import memory, resolve
from finetune_trainer.contract import DistributedError, EngineError, OutOfMemoryError, RunConfig
from finetune_trainer.launch import die_with_parent
from finetune_trainer.model_folder import find_model_folder, read_json

if TYPE_CHECKING:
    from finetune_trainer.data import Rows
    from finetune_trainer.data.mapped import Outline

SOCKET = "rows"
MESSAGE_BYTES = 2**17
"""More than an outline has, or an error's two texts at six bytes a character; a socket takes less than 2**18 at once."""
ERROR_CHARACTERS = 10_000
DOOR_SECONDS = 60.0
"""For the next rank to ask for the rows: all of them have started then, and ask at once."""


class Reading(Protocol):
    """Rows that are being read."""

    def rows(self, say: Callable[[str], None]) -> Rows:
        """Wait for the rows; raises the EngineError that reading has ended with, the same on every rank of the node.

        To be called once, by every rank of the node, when all of them are known to have started. ``say`` gets a line now and then on the rank that reads.
        """


def start(config: RunConfig, place: tuple[int, int], folder: Path | None) -> Reading:
    """Begin to read the rows of a run; to be called before torch is imported or a thread started.

    ``place`` is this process's number on its node and the number of processes there, ``folder`` their launcher's.
    """
    number, processes = place
    if folder is None or processes == 1:
        return Reader(config)
    return Reader(config, (folder, processes - 1)) if number == 0 else Receiver(folder)


def read_rows(config: RunConfig, say: Callable[[str], None]) -> Rows:
    """The rows of a run by its model's tokenizer, each with tokens that the model knows; raises ModelError, DataError or ConfigurationError."""
    from finetune_trainer import data

    folder = find_model_folder(config.model)
    facts = memory.read_facts(read_json(folder / "config.json"))
    filled = config.data.model_copy(update={"max_length": resolve.row_limit(config, facts)})
    rows = data.open_rows(filled, data.load_tokenizer(folder), say)
    data.check_vocabulary(rows, facts.vocab_size)
    return rows


class Reader:
    """The rank that has its node's rows read, by a process that does not outlive it."""

    def __init__(self, config: RunConfig, others: tuple[Path, int] | None = None) -> None:
        """``others``: the folder where the other ranks of the node ask for the rows, and how many they are."""
        self._file = os.memfd_create("rows")
        context = multiprocessing.get_context("fork")
        self._news, news = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(config, self._file, news, os.getpid()), name="rows", daemon=True)
        self._process.start()
        news.close()  # so that the pipe ends with the process
        self._door = _open_door(others[0]) if others else None
        self._others = others[1] if others else 0

    def rows(self, say: Callable[[str], None]) -> Rows:
        """See ``Reading``."""
        outcome = self._await(say)
        self._hand_on(outcome)
        return _take(outcome, self._file)

    def _await(self, say: Callable[[str], None]) -> Outline | EngineError:
        try:
            while isinstance(news := self._news.recv(), str):
                say(news)
        except (EOFError, OSError):  # OSError: in the middle of a message
            news = None
        self._process.join()
        outcome: Outline | EngineError = _describe_end(self._process.exitcode) if news is None else news
        return outcome

    def _hand_on(self, outcome: Outline | EngineError) -> None:
        if self._door is None:
            return
        with self._door:
            self._door.settimeout(DOOR_SECONDS)
            with contextlib.suppress(OSError):  # a rank that is gone, or could not ask: it says so itself
                for _ in range(self._others):
                    connection, _ = self._door.accept()
                    with connection, contextlib.suppress(OSError):
                        socket.send_fds(connection, [encode(outcome)], [self._file])


class Receiver:
    """A rank that gets what the first rank of its node has read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def rows(self, say: Callable[[str], None]) -> Rows:
        """See ``Reading``."""
        files: list[int] = []
        content = b""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection, _address(self._folder) as address:
                connection.connect(address)
                content, files, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 1)
        except OSError as error:
            raise DistributedError(f"the rows could not be had from the first rank of this node: {error}") from error
        if not content or not files:
            raise DistributedError("the first rank of this node ended before it had handed the rows on")
        return _take(decode(content), files[0])


def _take(outcome: Outline | EngineError, file: int) -> Rows:
    from finetune_trainer.data.mapped import map_rows

    try:
        if isinstance(outcome, EngineError):
            raise outcome
        return map_rows(file, outcome)
    finally:
        os.close(file)


# The socket


def encode(outcome: Outline | EngineError) -> bytes:
    """An outcome as JSON."""
    if isinstance(outcome, EngineError):
        content: dict[str, Any] = {"error": type(outcome).__name__, "message": str(outcome), "notes": getattr(outcome, "__notes__", [])}
    else:
        content = asdict(outcome)
    return json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace")  # a lone surrogate, of a file's name, stays valid JSON so


def decode(content: bytes) -> Outline | EngineError:
    """What ``encode`` was given."""
    from finetune_trainer.data.mapped import Outline

    fields = json.loads(content)
    if "error" not in fields:
        return Outline(**fields)
    kinds: list[type[EngineError]] = [EngineError, *EngineError.__subclasses__()]
    error = {kind.__name__: kind for kind in kinds}[fields["error"]](fields["message"])
    for note in fields["notes"]:
        error.add_note(note)
    return error


def _open_door(folder: Path) -> socket.socket:
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with _address(folder) as address:
        door.bind(address)
    door.listen(socket.SOMAXCONN)
    return door


@contextmanager
def _address(folder: Path) -> Iterator[str]:
    """The name of the socket, short enough for the kernel however long the folder's is."""
    descriptor = os.open(folder, os.O_PATH)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


# The process that reads


def _work(config: RunConfig, file: int, news: Connection[Any, Any], parent: int) -> None:
    die_with_parent(parent)
    _hide_torch()
    news.send(_read(config, file, news.send))


def _hide_torch() -> None:
    """Let transformers believe that there is no torch: it imports it for a tokenizer too, which takes seconds and needs nothing of it."""
    modules: dict[str, Any] = sys.modules
    modules.setdefault("torch", None)
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())


def _read(config: RunConfig, file: int, say: Callable[[str], None]) -> Outline | EngineError:
    from finetune_trainer.data.mapped import write_rows

    try:
        rows = read_rows(config, say)
        with open(file, "wb", closefd=False) as stream:
            return write_rows(rows, stream)
    except EngineError as error:
        return type(error)(str(error)[:ERROR_CHARACTERS])
    except Exception as error:  # noqa: BLE001 it crosses to the rank, which raises it
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.ENOSPC)):
            return OutOfMemoryError(
                f"out of memory: the rows do not fit into the memory of this machine while they are read ({str(error) or type(error).__name__})"
            )
        internal = EngineError(f"the rows could not be read: {type(error).__name__}: {error}"[:ERROR_CHARACTERS])
        internal.add_note("".join(traceback.format_exception(error))[-ERROR_CHARACTERS:])
        return internal


def _describe_end(code: int | None) -> EngineError:
    """Why a process that said nothing ended."""
    if code is None or code >= 0:
        return EngineError(f"the process that reads the rows ended with exit code {code} before it had read them")
    hint = "; the kernel does so when memory runs out" if -code == signal.SIGKILL else ""
    return EngineError(f"the process that reads the rows was killed by signal {signal.Signals(-code).name}{hint}")
