"""What launchers say to each other, and which failure node 0 lets count."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator

import pytest

from finetune_trainer import watch
from finetune_trainer.contract import FailureReport, Reason, exit_for
from finetune_trainer.ports import find_free_port
from finetune_trainer.watch import Council, FirstNode, Line, Message, News, OtherNode, Seat, Watch, describe_loss, listen, open_watch


def failure(reason: Reason, rank: int = 0, message: str = "") -> FailureReport:
    return FailureReport(reason=reason, message=message, rank=rank, node="n", exit_code=exit_for(reason).code)


def silent(_: object) -> None:
    pass


@pytest.fixture
def pair() -> Iterator[tuple[Line, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as theirs:
        ours, _ = server.accept()
        with ours:
            yield Line(ours), theirs


def read_all(line: Line, theirs: socket.socket, content: bytes) -> list[Message]:
    """Everything that comes before the other end is closed; raises what ``read`` does for content that is refused."""
    threading.Thread(target=lambda: (theirs.sendall(content), theirs.close()), daemon=True).start()
    line.connection.setblocking(True)
    found: list[Message] = []
    while True:
        try:
            found += line.read()
        except ConnectionResetError:
            return found


# Which failure counts


def test_a_ranks_own_failure_counts_at_once() -> None:
    council = Council(3)
    council.add(1, failure(Reason.DATA, 5), now=10.0)
    assert council.decide(10.0) == failure(Reason.DATA, 5)


def test_a_consequence_waits_for_its_cause() -> None:
    council = Council(3)
    council.add(0, failure(Reason.DISTRIBUTED), now=10.0)
    assert council.decide(10.0 + watch.CAUSE_SECONDS) is None
    council.add(2, failure(Reason.NUMERIC, 2), now=12.0)
    assert council.decide(12.0) == failure(Reason.NUMERIC, 2)


def test_a_consequence_whose_cause_nobody_tells_counts_in_the_end() -> None:
    council = Council(3)
    council.add(0, failure(Reason.HANG), now=10.0)
    assert council.decide(10.1 + watch.CAUSE_SECONDS) == failure(Reason.HANG)


def test_nobody_is_waited_for_when_every_node_has_spoken() -> None:
    council = Council(2)
    council.add(0, failure(Reason.DISTRIBUTED), now=10.0)
    council.add(1, failure(Reason.HANG, 1), now=10.1)
    assert council.decide(10.1) == failure(Reason.HANG, 1)


def test_a_node_that_is_gone_explains_broken_connections_and_is_found_before_they_count() -> None:
    council = Council(3)
    council.add(0, failure(Reason.DISTRIBUTED), now=10.0)
    council.add(2, describe_loss(2, "host-2"), now=10.0 + watch.RETURN_SECONDS)
    verdict = council.decide(10.0 + watch.RETURN_SECONDS)
    assert verdict is not None
    assert verdict.message.startswith("node 2 (host-2) is gone: ")
    assert watch.RETURN_SECONDS + watch.TICK_SECONDS < watch.CAUSE_SECONDS < watch.ANSWER_SECONDS


def test_a_host_that_goes_silent_is_found_within_half_a_minute() -> None:
    assert watch.SILENCE_SECONDS + watch.RETURN_SECONDS + watch.FAREWELL_SECONDS + 2 * watch.TICK_SECONDS < 30
    assert 2 * watch.BEAT_SECONDS < watch.SILENCE_SECONDS


# The line


def test_messages_that_come_in_pieces_or_together_are_read(pair: tuple[Line, socket.socket]) -> None:
    line, theirs = pair
    messages = [Message(kind="hello", gang="g", node=1, host="h"), Message(kind="failed", failure=failure(Reason.DATA, 3, "Zeile\nzwei ü"))]
    content = b"".join(message.model_dump_json().encode() + b"\n" for message in messages)
    assert read_all(line, theirs, content) == messages


@pytest.mark.parametrize("content", [b"GET / HTTP/1.1\r\n\r\n", b'{"kind": "obey"}\n', b'{"kind": "failed", "failure": {"reason": "Whim"}}\n', b"\xff\n"])
def test_what_no_launcher_says_ends_the_connection(pair: tuple[Line, socket.socket], content: bytes) -> None:
    with pytest.raises(ConnectionAbortedError, match="it is not a launcher's"):
        read_all(*pair, content)


def test_a_line_without_an_end_is_not_kept(pair: tuple[Line, socket.socket]) -> None:
    with pytest.raises(ConnectionAbortedError, match="a line is longer than 65536 bytes"):
        read_all(*pair, b"x" * (4 * watch.MAX_LINE_BYTES))


def test_an_end_that_does_not_read_ends_the_connection(pair: tuple[Line, socket.socket]) -> None:
    line, _ = pair
    long = Message(kind="failed", failure=failure(Reason.DATA, 0, "x" * 50_000))
    with pytest.raises(ConnectionAbortedError, match="does not read"):
        all(line.send(long) is None for _ in range(10_000))


def test_silence_ends_the_connection_and_a_beat_is_sent_before(pair: tuple[Line, socket.socket]) -> None:
    line, theirs = pair
    line.keep_alive(line.heard + watch.SILENCE_SECONDS)
    assert theirs.recv(100) == b'{"kind":"beat"}\n'
    with pytest.raises(TimeoutError, match="nothing came for 15 s"):
        line.keep_alive(line.heard + watch.SILENCE_SECONDS + 0.1)


def test_the_longest_message_of_a_failure_fits_into_a_line() -> None:
    shortened = watch._shorten(failure(Reason.INTERNAL, 0, "\U0001f600" * 50_000))
    assert len(Message(kind="failed", failure=shortened).model_dump_json()) < watch.MAX_LINE_BYTES


# Ports and strangers


def test_the_port_is_the_one_after_the_masters() -> None:
    assert Seat("g", 0, 2, "h", 29500).port == 29501
    assert Seat("g", 0, 2, "h", 65535).port == 65534


def test_a_master_of_this_machine_is_not_reached_from_others() -> None:
    with listen(Seat("g", 0, 2, "127.0.0.1", find_free_port(2))) as server:
        assert server.getsockname()[0] == "127.0.0.1"
    with listen(Seat("g", 0, 2, "job-0.job", find_free_port(2))) as server:
        assert server.getsockname()[0] in ("::", "0.0.0.0")


def test_a_node_alone_has_nobody_to_watch() -> None:
    alone = open_watch(Seat("g", 0, 1, "127.0.0.1", 1), silent, silent)
    assert type(alone) is Watch
    assert alone.agree(failure(Reason.DATA)) == failure(Reason.DATA)


@pytest.fixture
def seats() -> tuple[Seat, Seat]:
    port = find_free_port(2)
    return Seat("ns/job/uid/1/2/29500", 0, 2, "127.0.0.1", port), Seat("ns/job/uid/1/2/29500", 1, 2, "127.0.0.1", port)


def test_nodes_agree_on_the_first_nodes_word(seats: tuple[Seat, Seat]) -> None:
    news = threading.Event()
    first, other = FirstNode(seats[0], lambda _: news.set(), silent), OtherNode(seats[1], silent, silent)
    first.start()
    other.start()
    assert other.agree(failure(Reason.DATA, 1, "x")) == failure(Reason.DATA, 1, "x")
    assert news.wait(30)
    assert first.agree(None) == failure(Reason.DATA, 1, "x")
    assert first.agree(failure(Reason.DISTRIBUTED)) == failure(Reason.DATA, 1, "x")
    first.close()
    other.close()


def test_a_launcher_of_an_earlier_attempt_is_not_listened_to(seats: tuple[Seat, Seat], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "RETURN_SECONDS", 0.5)
    heard: list[News] = []
    first = FirstNode(seats[0], heard.append, silent)
    first.start()
    stale = OtherNode(Seat("ns/job/uid/0/2/29500", 1, 2, "127.0.0.1", seats[1].master_port), heard.append, silent)
    stale.start()
    assert stale.agree(failure(Reason.DATA, 1)) == failure(Reason.DATA, 1)
    assert first.agree(None) is None
    first.close()
    stale.close()
    assert heard == []


def test_what_a_node_had_to_say_before_node_0_answered_is_said_before_it_ends(seats: tuple[Seat, Seat]) -> None:
    """A pod may be asked to stop, and its ranks be done, in the moment between its launcher's call and node 0's answer."""
    other = OtherNode(seats[1], silent, silent)
    with listen(seats[0]) as server:
        other.start()
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as lines:
            assert Message.model_validate_json(lines.readline()).kind == "hello"
            other.request_stop()
            closing = threading.Thread(target=other.close)
            closing.start()
            connection.sendall(Message(kind="hello", gang=seats[0].gang).model_dump_json().encode() + b"\n")
            assert [Message.model_validate_json(lines.readline()).kind for _ in range(2)] == ["stop", "bye"]
        closing.join(30)
        assert not closing.is_alive()


def test_a_node_that_is_asked_to_stop_before_node_0_listens_still_tells_it(seats: tuple[Seat, Seat]) -> None:
    heard: queue.SimpleQueue[News] = queue.SimpleQueue()
    first, other = FirstNode(seats[0], heard.put, silent), OtherNode(seats[1], silent, silent)
    other.start()
    other.request_stop()
    closing = threading.Thread(target=other.close)
    closing.start()
    first.start()
    assert heard.get(timeout=30) is News.STOP
    closing.join(30)
    assert first.agree(failure(Reason.PREEMPTED)) == failure(Reason.PREEMPTED)
    first.close()
    assert heard.empty()


def test_a_node_that_has_given_up_does_not_call_again(seats: tuple[Seat, Seat], monkeypatch: pytest.MonkeyPatch) -> None:
    """Node 0 would greet it, lose it, and take it for gone: another failure than the one that it ends with."""
    monkeypatch.setattr(watch, "RETURN_SECONDS", 0.3)
    late: list[bool] = []

    class Caller(OtherNode):
        def _connect(self) -> None:
            late.append(self._closing is not None)
            super()._connect()

    other = Caller(seats[1], silent, silent)
    other.start()
    assert other.agree(failure(Reason.OUT_OF_MEMORY, 1)) == failure(Reason.OUT_OF_MEMORY, 1)
    other.close()
    assert late
    assert not any(late)


def test_a_node_that_does_not_reach_node_0_keeps_its_own_reason_and_says_so_once(seats: tuple[Seat, Seat], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "UNREACHED_SECONDS", 0.0)
    monkeypatch.setattr(watch, "RETURN_SECONDS", 0.5)
    said: list[str] = []
    told = threading.Event()
    other = OtherNode(seats[1], silent, lambda sentence: (said.append(sentence), told.set())[0])
    other.start()
    assert told.wait(30)
    assert other.agree(failure(Reason.NUMERIC, 1)) == failure(Reason.NUMERIC, 1)
    other.close()
    assert len(said) == 1
    assert said[0].startswith(f"node 0's launcher has not answered at 127.0.0.1, port {seats[1].port}, the one after MASTER_PORT, for 0 s; ")
