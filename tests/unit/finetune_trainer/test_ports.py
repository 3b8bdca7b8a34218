from __future__ import annotations

import socket
from pathlib import Path

import pytest

from finetune_trainer import ports
from finetune_trainer.contract import ConfigurationError


@pytest.fixture
def ephemeral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's range of ephemeral ports, as a file that a test can write."""
    monkeypatch.setattr(ports, "EPHEMERAL_RANGE", tmp_path / "range")
    return tmp_path / "range"


def test_no_connection_can_take_a_found_port_before_its_listener(ephemeral: Path) -> None:
    ephemeral.write_text("32768\t60999\n")
    assert all(ports.LOWEST_PORT <= ports.find_free_port(2) < 32767 for _ in range(100))


def test_ports_that_somebody_listens_on_are_passed_over_at_whatever_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("", 0)) as other:
        taken = {server.getsockname()[1], other.getsockname()[1]}
        for port in taken:
            assert not ports._are_free(range(port, port + 1))
            assert not ports._are_free(range(port - 1, port + 1))


def test_a_kernel_that_gives_away_all_ports_or_does_not_tell_still_leaves_free_ones(ephemeral: Path) -> None:
    for text in ("1024\t65535\n", "", "none"):
        ephemeral.write_text(text)
        port = ports.find_free_port()
        with socket.create_server(("127.0.0.1", port)) as server:
            assert server.getsockname()[1] == port


@pytest.mark.parametrize(
    ("first_ephemeral", "count", "expected"),
    [
        (32768, 1, (16384, 32767)),
        (32768, 2, (16384, 32766)),
        (15000, 1, (7500, 14999)),
        (2050, 2, (1025, 2048)),
        (2049, 2, (1024, 65534)),
        (1024, 1, (1024, 65535)),
    ],
)
def test_the_ports_below_the_ephemeral_ones_are_tried_where_there_are_many(first_ephemeral: int, count: int, expected: tuple[int, int]) -> None:
    assert ports._candidates(first_ephemeral, count) == expected


def test_where_no_port_is_free_the_error_says_between_which(monkeypatch: pytest.MonkeyPatch, ephemeral: Path) -> None:
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        monkeypatch.setattr(ports, "_candidates", lambda _first, _count: (taken, taken))
        with pytest.raises(ConfigurationError, match=f"between {taken} and {taken}"):
            ports.find_free_port()
