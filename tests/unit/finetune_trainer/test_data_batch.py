from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch

from finetune_trainer.data.batch import collate
from finetune_trainer.data.rows import Row, pack


def make_row(ids: list[int], labelled: list[int]) -> Row:
    return Row(np.array(ids, dtype=np.int32), np.array(labelled, dtype=bool))


ROWS = [make_row([11, 12, 13], [0, 1, 1]), make_row([21, 22], [1, 1])]


def test_rows_stand_one_after_another_and_labels_are_the_next_tokens_of_the_same_row() -> None:
    batch = collate(ROWS, 1, "cpu")
    assert batch.tokens.tolist() == [[11, 12, 13, 21, 22]]
    assert batch.labelled.tolist() == [0, 1, 3]
    assert batch.labels.tolist() == [12, 13, 22]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert (batch.max_seqlen, batch.num_tokens) == (3, 5)


def test_padding_is_a_sequence_of_its_own_that_counts_nowhere() -> None:
    batch = collate(ROWS, 8, "cpu")
    assert batch.tokens.tolist() == [[11, 12, 13, 21, 22, 0, 0, 0]]
    assert batch.labelled.tolist() == [0, 1, 3]
    assert batch.labels.tolist() == [12, 13, 22]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert (batch.max_seqlen, batch.num_tokens) == (3, 5)


def test_longest_sequence_may_be_the_padding() -> None:
    assert collate(ROWS[1:], 8, "cpu").max_seqlen == 6


def test_no_padding_where_none_is_needed() -> None:
    assert collate([*ROWS, make_row([31, 32, 33], [0, 0, 1])], 8, "cpu").cu_seqlens.tolist() == [0, 3, 5, 8]


def test_packed_row_gives_the_batch_of_its_rows() -> None:
    (packed,) = pack(ROWS, 5)
    alone, together = collate(ROWS, 4, "cpu"), collate([packed], 4, "cpu")
    for name in ("tokens", "labelled", "labels", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(alone, name), getattr(together, name)), name


def test_tensors_have_the_types_that_megatron_reads() -> None:
    batch = collate(ROWS, 2, torch.device("cpu"))
    assert {batch.tokens.dtype, batch.labelled.dtype, batch.labels.dtype, batch.position_ids.dtype} == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.tokens.device.type == "cpu"


def test_data_is_imported_without_torch() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, finetune_trainer.data; assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"], check=True
    )
