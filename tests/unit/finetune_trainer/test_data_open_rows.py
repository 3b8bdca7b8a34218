from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from factories import make_rows, make_tokenizer
from finetune_trainer.contract import ConfigurationError, DataConfig, DataError
from finetune_trainer.data import Row, Rows, load_tokenizer, open_rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write_rows(path: Path, *questions: str) -> str:
    path.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]}) + "\n" for question in questions)
    )
    return str(path)


def open_config(tokenizer: Any, *dataset: str, **fields: Any) -> Rows:
    return open_rows(DataConfig(dataset=list(dataset), **fields), tokenizer)


def question(tokenizer: Any, row: Row) -> str:
    text: str = tokenizer.decode(row.input_ids)
    return text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]


def test_rows_of_a_file_are_tokenized_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = open_config(tokenizer, str(make_rows(tmp_path, 20)), dataset_shuffle=False)
    assert rows.counts == {"read": 20, "dropped": 0, "trained": 20}
    assert [question(tokenizer, row)[:3] for row in rows.rows[:3]] == ["0. ", "1. ", "2. "]
    assert all(row.labelled.any() and not row.labelled[0] for row in rows.rows)


def test_mixing_is_a_function_of_the_data_seed_alone(tokenizer: Any, tmp_path: Path) -> None:
    path = str(make_rows(tmp_path, 30))
    one, same, other, plain = (open_config(tokenizer, path, **fields) for fields in ({}, {}, {"data_seed": 7}, {"dataset_shuffle": False}))
    assert one.digest == same.digest
    assert len({one.digest, other.digest, plain.digest}) == 3
    assert sorted(question(tokenizer, row) for row in one.rows) == sorted(question(tokenizer, row) for row in plain.rows)


def test_same_data_set_twice_is_sampled_twice_and_read_once(tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *(f"Question {number}" for number in range(40)))
    rows = open_config(tokenizer, f"{path}#20", f"{path}#20", "usf_bios/self-cognition#150", model_name=["robot"], model_author=["us"])
    assert rows.counts == {"read": 190, "dropped": 0, "trained": 190}
    asked = [question(tokenizer, row) for row in rows.rows if question(tokenizer, row).startswith("Question")]
    assert len(asked) == 40
    assert 20 < len(set(asked)) < 40, "the two samples are drawn apart"
    assert len({id(row) for row in rows.rows}) < 190, "a row that is taken again is tokenized once"


def test_system_option_fills_rows_that_have_none(tokenizer: Any, tmp_path: Path) -> None:
    rows = open_config(tokenizer, str(make_rows(tmp_path, 6)), system="Be kind.", dataset_shuffle=False)
    systems = [tokenizer.decode(row.input_ids).split("<|im_start|>user")[0] for row in rows.rows]
    own, given = "<|im_start|>system\nYou answer in a few words.<|im_end|>\n", "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert systems == [own, given, given, own, given, given]


def test_long_rows_are_dropped_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "a", "b " * 200, "c")
    rows = open_config(tokenizer, f"{path}#6", max_length=100, dataset_shuffle=False)
    assert rows.counts == {"read": 6, "dropped": 2, "trained": 4}
    assert [question(tokenizer, row) for row in rows.rows] == ["a", "c", "a", "c"]


def test_long_rows_are_cut_where_the_strategy_says(tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "a", "b " * 200)
    left = open_config(tokenizer, path, max_length=100, truncation_strategy="left")
    assert left.counts == {"read": 2, "dropped": 0, "trained": 2}
    assert max(len(row) for row in left.rows) == 100
    right = open_config(tokenizer, path, max_length=100, truncation_strategy="right")
    assert right.counts == {"read": 2, "dropped": 1, "trained": 1}


def test_nothing_left_to_train_on_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "a", "b")
    with pytest.raises(
        DataError,
        match=r"none of the 2 rows can be trained on within data.maxLength \(5 tokens\): the shortest has \d+ tokens, and truncationStrategy is delete",
    ):
        open_config(tokenizer, path, max_length=5)


def test_packed_rows_keep_their_boundaries(tokenizer: Any, tmp_path: Path) -> None:
    path = str(make_rows(tmp_path, 30))
    plain, packed = open_config(tokenizer, path), open_config(tokenizer, path, packing=True, max_length=1024)
    assert len(packed.rows) < len(plain.rows)
    assert packed.counts == {"read": 30, "dropped": 0, "trained": 30}
    assert sorted(length for row in packed.rows for length in row.segments) == sorted(len(row) for row in plain.rows)


def test_packing_without_a_length_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="data.packing is true, which needs data.maxLength"):
        open_config(tokenizer, str(make_rows(tmp_path, 3)), packing=True)


def test_interleaving_draws_by_probability_and_stops_by_strategy(tokenizer: Any, tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", *(f"one {number}" for number in range(30)))
    two = write_rows(tmp_path / "two.jsonl", *(f"two {number}" for number in range(30)))
    first = open_config(tokenizer, one, two, interleave_prob=[0.9, 0.1], dataset_shuffle=False)
    asked = [question(tokenizer, row) for row in first.rows]
    assert [text for text in asked if text.startswith("one")] == [f"one {number}" for number in range(30)]
    assert asked[-1] == "one 29"
    assert 0 < sum(text.startswith("two") for text in asked) < 15
    everything = open_config(tokenizer, one, two, interleave_prob=[0.9, 0.1], stopping_strategy="all_exhausted", dataset_shuffle=False)
    assert len({question(tokenizer, row) for row in everything.rows}) == 60
    assert everything.counts["read"] > 150


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [([1.0], "data.interleaveProb has 1 values, expected one for each of the 2 data sets"), ([0.5, 0.4], "data.interleaveProb sums to 0.9, expected 1")],
)
def test_probabilities_that_do_not_fit_are_refused(tokenizer: Any, tmp_path: Path, probabilities: list[float], message: str) -> None:
    path = str(make_rows(tmp_path, 3))
    with pytest.raises(ConfigurationError, match=message):
        open_config(tokenizer, path, path, interleave_prob=probabilities)
