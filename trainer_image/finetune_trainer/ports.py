"""Ports of this machine that are chosen before the process that will listen there is started."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

from finetune_trainer.contract import ConfigurationError

EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The ports that the kernel gives to connections, and to who asks for port 0 (ip(7))."""
LOWEST_PORT, HIGHEST_PORT = 1024, 65535
ATTEMPTS = 1000


def find_free_port(count: int = 1) -> int:
    """The first of ``count`` ports in a row on which nobody listens, at whatever address. Raises ConfigurationError where there are none.

    They lie below the kernel's ephemeral ports where that leaves any: one of those could become some connection's before the process that wants it listens there,
    even that of a rank which asks whether somebody does: TCP lets a socket that is given the port which it asks for connect to itself.
    """
    low, high = _candidates(_first_ephemeral_port(), count)
    for _ in range(ATTEMPTS):
        port = random.SystemRandom().randint(low, high)  # not the seeded generator: runs that start with one seed would want the same port
        if _are_free(range(port, port + count)):
            return port
    raise ConfigurationError(f"in {ATTEMPTS} attempts no {count} free ports in a row were found between {low} and {high + count - 1}")


def _candidates(first_ephemeral: int, count: int) -> tuple[int, int]:
    """The least and the greatest first port."""
    highest = first_ephemeral - count
    return (max(LOWEST_PORT, first_ephemeral // 2), highest) if highest >= 2 * LOWEST_PORT else (LOWEST_PORT, HIGHEST_PORT + 1 - count)


def _first_ephemeral_port() -> int:
    with suppress(OSError, ValueError, IndexError):  # a sandbox's kernel need not tell
        return int(EPHEMERAL_RANGE.read_text().split()[0])
    return 32768  # Linux' default


def _are_free(ports: range) -> bool:
    with ExitStack() as stack, suppress(OSError):
        for port in ports:
            stack.enter_context(socket.socket()).bind(("", port))
        return True
    return False
