"""The launchers of a run's nodes watch one another through node 0, so that all end when one does, with the reason of the one that failed first.

Node 0 listens on the port after MASTER_PORT, which is torch's own; every other launcher keeps one connection there, tries again until
node 0 answers, and says that it lives every few seconds. Messages are lines of JSON. A launcher whose ranks have failed tells node 0
why; node 0 waits a moment where that may only be what another node's end looks like from outside, then tells everybody the one failure
that counts. A connection that breaks without a word, and is not made again at once, is a node that is gone. The first launcher that is
asked to stop has the others ask their ranks too.

The watch only ever ends runs sooner: where the port cannot be had or reached, the run goes on without it, and torch's timeouts end it.
"""

from __future__ import annotations

import ipaddress
import queue
import selectors
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from finetune_trainer.contract import FailureReport, Reason, exit_for
from finetune_trainer.failures import Failure, choose_first, weigh

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 15.0
"""A connection on which nothing came for so long is taken for broken: its host is off, or the network between is."""
RETURN_SECONDS = 3.0
"""Time to make a broken connection again, and to reach node 0 with a failure where there is none yet."""
CAUSE_SECONDS = 6.0
"""Time that a failure which may be a consequence waits for its cause; longer than it takes to find out that a launcher is gone."""
ANSWER_SECONDS = 10.0
"""Time that a node with a failure waits to hear which one counts."""
FAREWELL_SECONDS = 3.0
"""Time that the last message has to be read before its connection is closed."""
UNREACHED_SECONDS = 60.0
"""After so long without node 0 a node says that it goes on unwatched, and still tries."""
CONNECT_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 1.0
"""Between two attempts to reach node 0; shorter than its farewell, so that a node that comes late hears that too."""
TICK_SECONDS = 0.5
MAX_LINE_BYTES = 2**16
MAX_MESSAGE_CHARACTERS = 8000
MAX_STRANGERS = 64
"""Connections that have not said which node they are."""


@dataclass(frozen=True)
class Seat:
    """Which launcher this is, of which gang."""

    gang: str
    """Of a restarted run it differs, so that what is left of an earlier attempt is not listened to."""
    node: int
    num_nodes: int
    master_address: str
    master_port: int

    @property
    def port(self) -> int:
        """Where node 0 listens."""
        return self.master_port + 1 if self.master_port < 65535 else self.master_port - 1


class News(Enum):
    """What a launcher learns from the others."""

    STOP = "stop"
    """Another node was asked to stop."""
    END = "end"
    """The gang has failed: nothing that the ranks compute counts any more."""


class Message(BaseModel):
    """One line between two launchers."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["hello", "beat", "stop", "failed", "end", "bye"]
    gang: str = ""
    node: int = -1
    host: str = ""
    failure: FailureReport | None = None


class Line:
    """One connection, as messages that come and go. Methods raise OSError when it is broken, closed or speaks another language."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.node: int | None = None
        """Who is at the other end, once it has said so."""
        self.heard = self.spoken = time.monotonic()
        self._received = b""
        self._unsent = b""

    def send(self, message: Message) -> None:
        """Send, or keep until ``flush``."""
        self.spoken = time.monotonic()
        self._unsent += message.model_dump_json(exclude_defaults=True).encode() + b"\n"
        if len(self._unsent) > 16 * MAX_LINE_BYTES:
            raise ConnectionAbortedError("the other end does not read")
        self.flush()

    def flush(self) -> None:
        """Send what is left, as far as it goes."""
        with suppress(BlockingIOError):
            while self._unsent:
                self._unsent = self._unsent[self.connection.send(self._unsent) :]

    def read(self) -> list[Message]:
        """The messages that have come."""
        with suppress(BlockingIOError):
            content = self.connection.recv(MAX_LINE_BYTES)
            if not content:
                raise ConnectionResetError("it was closed")
            self._received += content
        self.heard = time.monotonic()
        *lines, self._received = self._received.split(b"\n")
        if max(map(len, (*lines, self._received))) > MAX_LINE_BYTES:
            raise ConnectionAbortedError(f"a line is longer than {MAX_LINE_BYTES} bytes")
        try:
            return [Message.model_validate_json(line) for line in lines]
        except ValidationError as error:
            raise ConnectionAbortedError(f"it is not a launcher's: {error}") from error

    def keep_alive(self, now: float) -> None:
        """Say that this launcher lives; raises TimeoutError when the other has not for too long."""
        if now - self.heard > SILENCE_SECONDS:
            raise TimeoutError(f"nothing came for {SILENCE_SECONDS:g} s")
        if now - self.spoken > BEAT_SECONDS:
            self.send(Message(kind="beat"))
        self.flush()


class Watch:
    """What one launcher has to do with the others. This class is that of a node without others; a subclass runs in a thread of its own."""

    def start(self) -> None:
        """Begin to listen to the others."""

    def request_stop(self) -> None:
        """Tell the others that this node was asked to stop."""

    def agree(self, failure: FailureReport | None) -> FailureReport | None:
        """The failure that the gang ends with, given how this node has ended; None when nobody has failed."""
        return failure

    def close(self) -> None:
        """Take leave."""


def open_watch(seat: Seat, tell: Callable[[News], None], say: Callable[[str], None]) -> Watch:
    """The watch of a node; ``tell`` and ``say`` (a sentence for the user) are called from another thread."""
    if seat.num_nodes == 1:
        return Watch()
    return FirstNode(seat, tell, say) if seat.node == 0 else OtherNode(seat, tell, say)


class _Thread(Watch, ABC):
    """The thread that both kinds of node have: connections, and the launcher's own words, which come through a queue."""

    def __init__(self, seat: Seat, tell: Callable[[News], None], say: Callable[[str], None]) -> None:
        self._seat, self._tell, self._say = seat, tell, say
        self._verdict: FailureReport | None = None
        self._settled = threading.Event()
        """Set when there is a verdict, or nobody left to hear one from."""
        self._closing: float | None = None
        """Until when the last messages may take."""
        self._words: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._waked, self._wake = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._waked, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def request_stop(self) -> None:
        self._command(Message(kind="stop"))

    def agree(self, failure: FailureReport | None) -> FailureReport | None:
        if failure is not None and failure.reason is Reason.PREEMPTED:
            self.request_stop()  # and no waiting: a pod that was asked to stop has little time left to say why it ends
        elif failure is not None:
            self._command(Message(kind="failed", failure=_shorten(failure)))
            self._settled.wait(ANSWER_SECONDS)
        verdict = self._verdict
        return verdict if verdict is not None and (failure is None or weigh(verdict) <= weigh(failure)) else failure

    def close(self) -> None:
        self._command(Message(kind="bye"))
        self._thread.join(FAREWELL_SECONDS)

    def _command(self, message: Message) -> None:
        self._words.put(message)
        with suppress(OSError):  # the thread has ended
            self._wake.send(b"\0")

    def _settle(self, verdict: FailureReport | None) -> None:
        """Let the launcher know how the gang ends, or that this will not be heard."""
        self._verdict = self._verdict or verdict
        self._settled.set()
        if verdict is not None:
            self._tell(News.END)

    def _run(self) -> None:
        try:
            self._open()
            while not self._is_over():
                for key, _ in self._selector.select(TICK_SECONDS):
                    self._serve(key)
                while not self._words.empty():
                    self._obey(self._words.get())
                self._tick(time.monotonic())
        finally:
            self._settled.set()
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()
            self._wake.close()

    def _is_over(self) -> bool:
        return self._closing is not None and (not self._is_heard() or time.monotonic() > self._closing)

    def _serve(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._waked:
            self._waked.recv(4096)
        elif isinstance(key.data, Line):
            self._attend(key.data, lambda: self._hear_all(key.data))

    def _hear_all(self, line: Line) -> None:
        for message in line.read():
            self._hear(line, message)

    def _attend(self, line: Line, action: Callable[[], None]) -> None:
        """Do something with a connection, which may break by it."""
        try:
            action()
        except OSError:
            if self._drop(line):
                self._lose(line)

    def _add(self, connection: socket.socket) -> Line:
        line = Line(connection)
        self._selector.register(connection, selectors.EVENT_READ, line)
        return line

    def _drop(self, line: Line) -> bool:
        """Close a connection; whether it was open."""
        if line.connection.fileno() < 0:
            return False
        self._selector.unregister(line.connection)
        line.connection.close()
        return True

    def _lines(self) -> list[Line]:
        return [key.data for key in self._selector.get_map().values() if isinstance(key.data, Line)]

    @abstractmethod
    def _is_heard(self) -> bool:
        """Whether another launcher may still read what was said."""

    def _open(self) -> None:
        """Done first, in the thread."""

    @abstractmethod
    def _obey(self, message: Message) -> None:
        """The launcher's own word."""

    @abstractmethod
    def _hear(self, line: Line, message: Message) -> None:
        """Another launcher's word. Raises OSError to end the connection."""

    @abstractmethod
    def _lose(self, line: Line) -> None:
        """A connection broke without a word."""

    @abstractmethod
    def _tick(self, now: float) -> None:
        """What time brings."""


# Node 0


@dataclass
class _Other:
    """What node 0 knows of another node that has connected."""

    host: str
    line: Line | None = None
    gone_at: float | None = None
    """When it counts as gone, if it does not come back."""
    done: bool = False
    """Whether it has taken leave, or its failure is known."""


@dataclass
class Council:
    """The failures that node 0 has heard of, and which one counts. Pure: time is given."""

    num_nodes: int
    failures: list[Failure] = field(default_factory=list)
    silent: set[int] = field(default_factory=set)
    """Nodes that have nothing more to say."""

    def add(self, node: int, report: FailureReport, now: float) -> None:
        """A node ends because of this."""
        self.failures.append(Failure(report, now))
        self.silent.add(node)

    def decide(self, now: float) -> FailureReport | None:
        """The failure that all end with, once it is known to be a cause, or no other is to be expected."""
        if not self.failures:
            return None
        first = choose_first(self.failures)
        waited = now - min(failure.time for failure in self.failures)
        is_cause = weigh(first.report) == 0 or first.report.rank is None
        return first.report if is_cause or len(self.silent) == self.num_nodes or waited > CAUSE_SECONDS else None


class FirstNode(_Thread):
    """Node 0: every other launcher connects here, and here is decided which failure counts."""

    def __init__(self, seat: Seat, tell: Callable[[News], None], say: Callable[[str], None]) -> None:
        super().__init__(seat, tell, say)
        self._council = Council(seat.num_nodes)
        self._others: dict[int, _Other] = {}
        self._said: list[Message] = []
        """To all nodes; one that connects later hears it too."""
        self._listens = False

    def _open(self) -> None:
        try:
            listener = listen(self._seat)
        except OSError as error:
            self._say(
                f"node 0 cannot listen on port {self._seat.port}, the one after MASTER_PORT, for the other nodes' launchers ({error}); when one node fails, the others will notice later"
            )
            return
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._listens = True

    def _is_heard(self) -> bool:
        others = list(self._others.values())
        late = self._listens and len(others) < self._seat.num_nodes - 1 and any(message.kind != "bye" for message in self._said)
        return late or any(other.line is not None for other in others)

    def _serve(self, key: selectors.SelectorKey) -> None:
        if key.data is None and key.fileobj is not self._waked:
            self._accept(key.fileobj)  # type: ignore[arg-type]
        else:
            super()._serve(key)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # it has left again
            connection, _ = listener.accept()
            if sum(line.node is None for line in self._lines()) < MAX_STRANGERS:
                self._add(connection)
            else:
                connection.close()

    def _obey(self, message: Message) -> None:
        if message.kind == "failed" and message.failure is not None:
            self._council.add(0, message.failure, time.monotonic())
        elif message.kind == "stop":
            self._broadcast(message)
        elif message.kind == "bye":
            self._closing = time.monotonic() + FAREWELL_SECONDS
            if self._verdict is None:
                self._broadcast(message)

    def _hear(self, line: Line, message: Message) -> None:
        if line.node is None:
            self._welcome(line, message)
            return
        other = self._others[line.node]
        if message.kind == "failed" and message.failure is not None:
            self._council.add(line.node, message.failure, time.monotonic())
        elif message.kind == "stop":
            self._broadcast(message, but=line)
            self._tell(News.STOP)
        elif message.kind == "bye":
            other.done = True
            self._council.silent.add(line.node)
            raise ConnectionResetError("it has taken leave")

    def _welcome(self, line: Line, message: Message) -> None:
        if message.kind != "hello" or message.gang != self._seat.gang or not 0 < message.node < self._seat.num_nodes:
            raise ConnectionAbortedError("it is not one of this gang")
        other = self._others.setdefault(message.node, _Other(message.host))
        if other.line is not None:
            self._drop(other.line)
        line.node, other.line, other.gone_at = message.node, line, None
        for each in (Message(kind="hello", gang=self._seat.gang), *self._said):
            line.send(each)

    def _lose(self, line: Line) -> None:
        other = None if line.node is None else self._others[line.node]
        if other is not None and other.line is line:
            other.line = None
            other.gone_at = None if other.done or self._verdict is not None else time.monotonic() + RETURN_SECONDS

    def _tick(self, now: float) -> None:
        for line in self._lines():
            self._attend(line, lambda line=line: line.keep_alive(now))  # type: ignore[misc]
        for node, other in self._others.items():
            if other.gone_at is not None and now > other.gone_at and self._closing is None:
                other.gone_at = None
                self._council.add(node, describe_loss(node, other.host), now)
        verdict = self._council.decide(now)
        if verdict is not None and self._verdict is None:
            self._broadcast(Message(kind="end", failure=verdict))
            self._settle(verdict)

    def _broadcast(self, message: Message, but: Line | None = None) -> None:
        if message not in self._said:
            self._said.append(message)
        for line in self._lines():
            if line.node is not None and line is not but:
                self._attend(line, lambda line=line: line.send(message))  # type: ignore[misc]


def listen(seat: Seat) -> socket.socket:
    """Node 0's socket: on every address, or, where MASTER_ADDR is of this machine only, on that. Raises OSError."""
    if is_loopback(seat.master_address):
        return socket.create_server((seat.master_address, seat.port), family=socket.AF_INET6 if ":" in seat.master_address else socket.AF_INET)
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # the kernel knows IPv6, and this host has none
            return socket.create_server(("", seat.port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", seat.port))


def is_loopback(address: str) -> bool:
    """Whether an address reaches this machine only; of names, which may change, none but localhost is looked at."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def describe_loss(node: int, host: str) -> FailureReport:
    """The failure of a node that is gone."""
    message = f"node {node} ({host}) is gone: its launcher has ended without a word, or cannot be reached any more"
    return FailureReport(reason=Reason.DISTRIBUTED, message=message, node=host, exit_code=exit_for(Reason.DISTRIBUTED).code)


def _shorten(failure: FailureReport) -> FailureReport:
    """With a message that fits into a line."""
    return failure.model_copy(update={"message": failure.message[:MAX_MESSAGE_CHARACTERS]})


# The other nodes


class OtherNode(_Thread):
    """A node that is not the first: it knows node 0 only."""

    def __init__(self, seat: Seat, tell: Callable[[News], None], say: Callable[[str], None]) -> None:
        super().__init__(seat, tell, say)
        self._line: Line | None = None
        self._kept: list[Message] = []
        """What is to be told once node 0 answers."""
        self._opened = time.monotonic()
        self._deadline: float | None = None
        """When node 0 counts as gone, or as never reached, if it does not answer."""
        self._known = False
        """Whether node 0 has ever answered."""
        self._next_try, self._pause = 0.0, 0.1
        self._complained = False

    def _is_heard(self) -> bool:
        return self._line is not None or self._has_news()

    def _has_news(self) -> bool:
        """Whether node 0 still has to be told more than that this node ends."""
        return any(message.kind != "bye" for message in self._kept)

    def _obey(self, message: Message) -> None:
        if message.kind == "bye":
            self._closing = time.monotonic() + FAREWELL_SECONDS
        line = self._line
        if line is not None and line.node == 0:
            self._attend(line, lambda: line.send(message))
            return
        self._kept.append(message)
        if self._has_news() and not self._known:
            self._deadline = self._deadline or time.monotonic() + RETURN_SECONDS

    def _hear(self, line: Line, message: Message) -> None:
        if message.kind == "hello":
            if message.gang != self._seat.gang:
                raise ConnectionAbortedError("it is another gang's")
            line.node, self._known, self._deadline, self._pause = 0, True, None, 0.1
            kept, self._kept = self._kept, []
            for each in kept:
                line.send(each)
        elif message.kind == "stop":
            self._tell(News.STOP)
        elif message.kind in ("end", "bye"):
            self._drop(line)
            self._line = None
            self._closing = 0.0
            self._settle(message.failure)

    def _lose(self, line: Line) -> None:
        self._line = None
        if line.node == 0:
            self._deadline = time.monotonic() + RETURN_SECONDS

    def _tick(self, now: float) -> None:
        if self._line is not None:
            line = self._line
            self._attend(line, lambda: line.keep_alive(now))
        if self._closing is None and self._deadline is not None and now > self._deadline:
            self._closing = 0.0
            self._settle(describe_loss(0, self._seat.master_address) if self._known else None)
        if self._line is None and now > self._next_try and (self._closing is None or (self._has_news() and now < self._closing)):
            self._connect()
        if not self._complained and not self._known and now - self._opened > UNREACHED_SECONDS:
            self._complained = True
            where = f"{self._seat.master_address}, port {self._seat.port}, the one after MASTER_PORT"
            self._say(f"node 0's launcher has not answered at {where}, for {UNREACHED_SECONDS:g} s; until it does, this node notices later when another fails")

    def _connect(self) -> None:
        try:
            connection = socket.create_connection((self._seat.master_address, self._seat.port), timeout=CONNECT_SECONDS)
        except OSError:
            self._next_try, self._pause = time.monotonic() + self._pause, min(LONGEST_PAUSE_SECONDS, 1.5 * self._pause)
            return
        self._next_try = time.monotonic() + 1.0
        self._line = line = self._add(connection)
        self._attend(line, lambda: line.send(Message(kind="hello", gang=self._seat.gang, node=self._seat.node, host=socket.gethostname())))
