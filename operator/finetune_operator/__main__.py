"""`python -m finetune_operator`: one replica of the operator."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys

import uvloop
from kubernetes.aio import client
from kubernetes.aio.config import ConfigException

from finetune_operator import connection, metrics, probes, settings_load
from finetune_operator.cluster import NotServed, StartAnew
from finetune_operator.handlers import Operator
from finetune_operator.leader import LeadershipLost, Lock, lead
from finetune_operator.settings import Settings
from finetune_operator.settings_load import Replica
from finetune_trainer.contract import ConfigurationError

COLLECT_EVERY = (20_000, 20, 20)
"""Rarer than Python's own (700, 10, 10), which takes a fifth of the CPU in a burst of a thousand jobs; 4 MiB more."""

logger = logging.getLogger("finetune_operator")


def main() -> int:
    """Run until asked to stop; 0 then, 1 when the replica must be started anew, 2 when it is wrongly set up."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("kopf").setLevel(logging.WARNING)
    try:
        settings, replica = settings_load.load()
        gc.set_threshold(*COLLECT_EVERY)
        gc.freeze()  # what was imported stays: the garbage collector need not look at it again
        uvloop.run(_run(settings, replica))
    except (ConfigurationError, ConfigException) as error:
        logger.error("%s", error)
        return 2
    except (LeadershipLost, NotServed, StartAnew) as error:
        logger.error("%s", error)
        return 1
    return 0


async def _run(settings: Settings, replica: Replica) -> None:
    configuration = await connection.load_configuration()
    async with client.ApiClient(configuration) as api:
        lock = Lock(settings, replica, api)
        operator = Operator(settings, configuration)
        metrics.JobCollector(operator.store.samples, operator.depth, lambda: max(operator.stuck_seconds(), operator.longest_seconds()))
        async with probes.serve(settings.http_port, lambda: _stuck(operator), lambda: _unready(lock, operator)):
            await _until_stopped(lock, settings, operator)


async def _until_stopped(lock: Lock, settings: Settings, operator: Operator) -> None:
    """Lead, or wait to; SIGTERM and SIGINT end the waiting here, and the leading by kopf."""
    leading = asyncio.create_task(lead(lock, settings, operator.run))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leading.cancel)
    await asyncio.wait({leading})
    if not leading.cancelled():
        leading.result()


def _stuck(operator: Operator) -> str | None:
    waited, worked = operator.stuck_seconds(), operator.longest_seconds()
    if waited > probes.WAITING_SECONDS:
        return f"a job has waited {waited:.0f} s for a decision"
    return f"a job has been decided about for {worked:.0f} s" if worked > probes.WORKING_SECONDS else None


def _unready(lock: Lock, operator: Operator) -> str | None:
    """A replica that waits is ready when the API server answers it; the one that leads, when it watches."""
    if lock.leading:
        return None if operator.watching.is_set() else "the watches have not begun"
    return None if lock.reached else "the API server does not answer"


if __name__ == "__main__":
    sys.exit(main())
