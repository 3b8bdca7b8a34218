"""Rows through a file that is mapped: the same rows, and no copy of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factories import make_rows, make_tokenizer
from finetune_trainer.contract import DataConfig
from finetune_trainer.data import Row, Rows, collate, load_tokenizer, open_rows
from finetune_trainer.data.mapped import map_rows, write_rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = os.memfd_create("rows")
    yield descriptor
    os.close(descriptor)


def through(rows: Rows, file: int) -> Rows:
    with open(file, "wb", closefd=False) as stream:
        outline = write_rows(rows, stream)
    return map_rows(file, outline)


@pytest.mark.parametrize("fields", [{}, {"packing": True, "max_length": 256}])
def test_mapped_rows_are_the_rows_that_were_written(tokenizer: Any, tmp_path: Path, file: int, fields: dict[str, Any]) -> None:
    written = open_rows(DataConfig(dataset=[f"{make_rows(tmp_path, 31)}#70"], **fields), tokenizer)
    rows = through(written, file)
    assert (rows.counts, rows.digest, rows.lengths) == (written.counts, written.digest, [len(row) for row in written.rows])
    assert [row.lengths for row in rows.rows] == [row.lengths for row in written.rows]
    assert all(np.array_equal(ours.input_ids, theirs.input_ids) for ours, theirs in zip(rows.rows, written.rows, strict=True))
    assert all(np.array_equal(ours.labelled, theirs.labelled) for ours, theirs in zip(rows.rows, written.rows, strict=True))
    assert Rows(rows.rows, rows.counts).digest == written.digest, "nothing that counts is lost, in type or value"


def test_a_batch_of_mapped_rows_is_that_of_the_rows(tokenizer: Any, tmp_path: Path, file: int) -> None:
    written = open_rows(DataConfig(dataset=[str(make_rows(tmp_path, 12))], packing=True, max_length=256), tokenizer)
    ours, theirs = collate(through(written, file).rows[:2], 8, "cpu"), collate(written.rows[:2], 8, "cpu")
    assert all(getattr(ours, name).equal(getattr(theirs, name)) for name in ("tokens", "labelled", "labels", "position_ids", "cu_seqlens"))


def test_rows_are_views_of_one_mapping_that_nobody_can_write(tokenizer: Any, tmp_path: Path, file: int) -> None:
    rows = through(open_rows(DataConfig(dataset=[str(make_rows(tmp_path, 5))]), tokenizer), file).rows
    first, again = rows[0], rows[0]
    assert np.shares_memory(first.input_ids, again.input_ids)
    assert np.shares_memory(first.labelled, again.labelled)
    with pytest.raises(ValueError, match="read-only"):
        first.input_ids[0] = 1


def test_a_row_that_is_taken_again_is_in_the_file_once(file: int) -> None:
    row = Row(np.arange(5000, dtype=np.int32), np.ones(5000, dtype=bool))
    rows = through(Rows([row] * 40, {"trained": 40}), file)
    assert (len(rows.rows), rows.lengths) == (40, [5000] * 40)
    assert os.fstat(file).st_size < 2 * 5000 * 5


def test_rows_are_a_sequence(file: int) -> None:
    rows = through(Rows([Row(np.arange(length, dtype=np.int32), np.ones(length, dtype=bool)) for length in (3, 5, 2)], {}), file).rows
    assert [len(row) for row in (rows[-1], *rows[1:], rows[0])] == [2, 5, 2, 3]
    with pytest.raises(IndexError):
        rows[3]


def test_the_file_may_be_closed_while_it_is_mapped() -> None:
    descriptor = os.memfd_create("rows")
    rows = through(Rows([Row(np.array([7, 8], dtype=np.int32), np.array([False, True]))], {}), descriptor)
    os.close(descriptor)
    assert rows.rows[0].input_ids.tolist() == [7, 8]
