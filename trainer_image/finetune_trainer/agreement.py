"""All ranks go on, or all stop: what one rank alone finds out becomes known to every rank."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from finetune_trainer.contract import DistributedError, EngineError

Result = TypeVar("Result")
PAUSE_SECONDS = 0.1
_NUMBERS = itertools.count()


def together(action: Callable[[], Result]) -> Result:
    """Do ``action`` on every rank; where it fails on one, every rank raises that error. Collective, but ``action`` must not be.

    The rank on which it failed raises its own exception. The others raise the same EngineError, or, for an exception of
    another kind, a DistributedError.
    """
    own: Exception | None = None
    result: Any = None
    try:
        result = action()
    except Exception as error:  # noqa: BLE001 raised again below, once the others know
        own = error
    problems: list[EngineError | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(problems, _share(own))
    if own is not None:
        raise own
    for problem in problems:
        if problem is not None:
            raise problem
    return result  # type: ignore[no-any-return]


def _share(error: Exception | None) -> EngineError | None:
    if error is None or isinstance(error, EngineError):
        return error
    return DistributedError(f"rank {distributed.get_rank()} stopped: {type(error).__name__}: {error}")


def from_first(make: Callable[[], Result]) -> Result:
    """Do ``make`` on rank 0 alone; its result, or its error, on every rank. Collective."""
    return _from_first(make, lambda: None)


def from_first_however_long(make: Callable[[], Result]) -> Result:
    """As ``from_first``, for work that may take rank 0 longer than ``ddpTimeout``: the others wait for it in no collective, as long as it takes. Collective."""
    store = distributed.distributed_c10d._get_default_store()  # where rank 0 ends, its launcher ends those who wait
    ended = f"mcore-finetune/ended/{from_first(lambda: next(_NUMBERS))}"

    def make_and_tell() -> Result:
        try:
            return make()
        finally:
            store.set(ended, "")

    def wait() -> None:
        while not store.check([ended]):  # no store.wait: it would keep NCCL's own threads from the store
            time.sleep(PAUSE_SECONDS)

    return _from_first(make_and_tell, wait)


def _from_first(make: Callable[[], Result], meanwhile: Callable[[], None]) -> Result:
    """``meanwhile`` is what the other ranks do."""
    value = together(lambda: make() if distributed.get_rank() == 0 else meanwhile())
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def from_every(value: Result) -> list[Result]:
    """Every rank's value, by rank, on every rank. Collective."""
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
