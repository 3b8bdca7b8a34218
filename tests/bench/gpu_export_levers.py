"""Switches for what makes an export fast: while one lasts, the engine of this process does without that lever."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock


def without_threads(_: Any) -> Any:
    """One thread writes, and two at most hash."""
    return mock.patch("finetune_trainer.hf_export.NUM_THREADS", 1)


def without_page_locked_memory(_: Any) -> Any:
    """Tensors come from the GPU whole, each into new memory that can be paged out, instead of piece by piece through some that cannot."""
    import torch

    from finetune_trainer import hf_export

    def host_bytes(self: Any, rows: Any, stream: Any) -> Any:
        with torch.cuda.stream(stream):
            yield hf_export._view(rows.reshape(-1).view(torch.uint8).cpu())

    return mock.patch.object(hf_export.FolderWriter, "_host_bytes", host_bytes)


def without_files_in_turn(_: Any) -> Any:
    """Tensors in the order of the model, which is that of the files."""
    return mock.patch("finetune_trainer.hf_export.files_in_turn", lambda plans, names: list(names))


@contextlib.contextmanager
def without_sharing(_: Any) -> Iterator[None]:
    """The first rank gets every tensor whole, and writes it."""
    with mock.patch("finetune_trainer.convert._own_rows", _rows_of_first_copy), mock.patch("finetune_trainer.convert._write", _write_by_first):
        yield


def _rows_of_first_copy(layout: Any, ranks: Any) -> Callable[[str], bool]:
    from finetune_trainer.pieces import EMBEDDING

    return lambda name: ranks.dp.rank == 0 and (name != EMBEDDING or ranks.is_first_stage)


def _write_by_first(writer: Any, piece: Any, number: int, ranks: Any) -> None:
    import torch
    from megatron.core import parallel_state

    from finetune_trainer.rules import Cut

    part, tp = piece.part(), ranks.tp
    if piece.cut is not Cut.WHOLE and tp.size > 1:
        if piece.cut is Cut.ROWS and tp.rank:  # the last share of a padded vocabulary is smaller than the others
            part = torch.cat([part, part.new_zeros(piece.slices[0].start // tp.rank - len(part), *part.shape[1:])])
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(tp.size)] if tp.rank == 0 else None
        torch.distributed.gather(part, parts, group=parallel_state.get_tensor_model_parallel_group(), group_dst=0)
        part = torch.cat(parts, dim=1 if piece.cut is Cut.COLUMNS else 0)[: piece.shape[0]] if parts else part
    if tp.rank == 0:
        writer.write(piece.name, 0, part)


LEVERS: dict[str, Callable[[Any], Any]] = {
    "nothing": contextlib.nullcontext,  # for the noise of the others
    "threads": without_threads,
    "page-locked memory": without_page_locked_memory,
    "going from file to file": without_files_in_turn,
    "every rank writing its share": without_sharing,
}
