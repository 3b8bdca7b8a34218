"""Time marks that a measured rank leaves: one JSON object a line in a file of its own. Runs inside both sides' processes, so it needs the standard library only."""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


class Marks:
    """The marks of one rank, each in the file as soon as it is made."""

    def __init__(self) -> None:
        path = Path(os.environ["BENCH_MARKS"]) / f"rank-{int(os.environ['RANK'])}.jsonl"
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, mark: str, **values: Any) -> None:
        """One mark, with the time now."""
        self._file.write(json.dumps({"mark": mark, "time": time.time(), **values}) + "\n")

    def around(self, owner: Any, name: str, mark: str) -> None:
        """Have every call of ``owner.name`` leave a mark with its seconds; a function that is not there any more leaves none, and its figure is missing."""
        function = getattr(owner, name, None)
        if function is None:
            print(f"bench: {owner.__name__} has no {name}; {mark} is not measured", flush=True)
            return

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            began = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            self.write(mark, seconds=time.perf_counter() - began)
            return result

        setattr(owner, name, timed)


def synchronize() -> None:
    """Wait for the GPU, where this process uses one."""
    cuda = _cuda()
    if cuda is not None:
        cuda.synchronize()


def peak() -> dict[str, float]:
    """The most memory so far, GiB: of the GPU as allocated and as reserved, or of the process on a CPU."""
    cuda = _cuda()
    if cuda is None:
        return {"allocated_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    return {"allocated_gib": cuda.max_memory_allocated() / 2**30, "reserved_gib": cuda.max_memory_reserved() / 2**30}


def leave_fsync_out() -> None:
    """Writes end in the page cache on both sides: a disk's own speed is nobody's merit."""
    os.fsync = lambda _descriptor: None


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None
