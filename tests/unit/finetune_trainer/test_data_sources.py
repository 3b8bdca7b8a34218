from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import ConfigurationError, DataConfig, DataError, EngineError
from finetune_trainer.data.conversations import Conversation
from finetune_trainer.data.sources import BUILT_IN, Source, find_source, load_source

SELF_COGNITION = "swift/self-cognition"
GENERAL = "mcore-finetune/general-knowledge"


def write_rows(path: Path, *answers: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"query": "q", "response": answer}) + "\n" for answer in answers), encoding="utf-8")
    return path


def make_config(**fields: Any) -> DataConfig:
    return DataConfig(**{"dataset": ["x"], **fields})


def answers(conversations: list[Conversation]) -> list[str]:
    return [conversation.messages[-1].content for conversation in conversations]


def load(text: str, **fields: Any) -> list[Conversation]:
    return load_source(find_source(text), make_config(**fields))


def refused(text: str, error: type[EngineError], **fields: Any) -> str:
    with pytest.raises(error) as caught:
        load(text, **fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("swift/self-cognition", Source("built-in", "swift/self-cognition")),
        ("usf_bios/self-cognition#500", Source("built-in", "usf_bios/self-cognition", None, 500)),
        ("tatsu-lab/alpaca", Source("hub", "tatsu-lab/alpaca")),
        ("hf::tatsu-lab/alpaca#20", Source("hub", "tatsu-lab/alpaca", None, 20)),
        ("owner/name:subset#7", Source("hub", "owner/name", "subset", 7)),
    ],
)
def test_name_of_a_data_set_says_what_it_is(text: str, source: Source) -> None:
    assert find_source(text) == source


def test_existing_path_is_a_path_with_or_without_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", "a")
    write_rows(tmp_path / "odd#3.jsonl", "a")
    write_rows(tmp_path / "owner" / "name", "a")
    assert find_source("rows.jsonl#12") == Source("path", "rows.jsonl", None, 12)
    assert find_source(f"{tmp_path}/rows.jsonl") == Source("path", f"{tmp_path}/rows.jsonl")
    assert find_source("odd#3.jsonl") == Source("path", "odd#3.jsonl")
    assert find_source("odd#3.jsonl#4") == Source("path", "odd#3.jsonl", None, 4)
    assert find_source("owner/name") == Source("path", "owner/name")


@pytest.mark.parametrize("scheme", ["hf", "ms", "pvc", "s3", "https"])
def test_store_that_is_not_built_is_refused_by_name(scheme: str) -> None:
    message = refused(f"{scheme}://owner/name#5", ConfigurationError)
    assert message.startswith(
        f"data.dataset: '{scheme}://owner/name#5' names a store that is not built yet ({scheme}); expected a path, an id of the Hugging Face Hub, or one of swift/"
    )


def test_modelscope_prefix_is_refused_by_name() -> None:
    assert "names a store that is not built yet (ms)" in refused("ms::owner/name", ConfigurationError)


@pytest.mark.parametrize("count", ["0", "-3", "many", "", "1.5", "²"])
def test_number_of_rows_that_is_none_is_refused(count: str) -> None:
    assert refused(f"{SELF_COGNITION}#{count}", ConfigurationError).endswith(f"ends with #{count}, expected # and the number of rows to sample, 1 or more")


@pytest.mark.parametrize("text", ["/no/such/rows.jsonl", "./no-such.jsonl#5", "../no-such"])
def test_missing_file_is_named(text: str) -> None:
    assert refused(text, DataError) == f"data.dataset: {text.split('#')[0]}: no such file or folder"


@pytest.mark.parametrize("text", ["rows.jsonl", "data/rows.jsonl", "alpaca", "a/b/c", "x" * 3000])
def test_name_that_is_neither_file_nor_id_is_refused(text: str) -> None:
    assert refused(text, DataError) == f"data.dataset: {text!r} is no file here, and no id of a data set (owner/name) either"


def test_misspelt_built_in_set_is_answered_with_the_right_one() -> None:
    assert refused("self-cognition", DataError).endswith("; did you mean 'swift/self-cognition'?")


def test_subset_of_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "a")
    expected = f"data.dataset: {path}:train: no such file or folder; {path} is there, but only the ids of data sets have subsets (found :train)"
    assert refused(f"{path}:train#5", DataError) == expected
    monkeypatch.chdir(tmp_path)
    assert "only the ids of data sets have subsets (found :train)" in refused("rows.jsonl:train", DataError)


def test_subset_of_a_built_in_set_is_refused() -> None:
    assert "names the subset 'qwen3', but swift/self-cognition is built in and has none" in refused("swift/self-cognition:qwen3#5", ConfigurationError)


def test_file_is_read_in_order_with_its_places(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "one", "two")
    rows = load(str(path))
    assert answers(rows) == ["one", "two"]
    assert [row.place for row in rows] == [f"{path}:1", f"{path}:2"]


def test_json_file_may_be_an_array_or_lines(tmp_path: Path) -> None:
    lines = write_rows(tmp_path / "lines.json", "one", "two")
    array = tmp_path / "array.json"
    array.write_text(json.dumps([{"query": "q", "response": "one"}, {"query": "q", "response": "two"}], indent=2), encoding="utf-8")
    assert answers(load(str(lines))) == answers(load(str(array))) == ["one", "two"]


def test_folder_gives_its_files_of_rows_for_training(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train-1.jsonl", "b")
    write_rows(tmp_path / "data" / "train-0.jsonl", "a")
    write_rows(tmp_path / "data" / "test.jsonl", "t")
    write_rows(tmp_path / "dataset_infos.json", "i")
    assert answers(load(str(tmp_path))) == ["a", "b"]


def test_folder_without_splits_gives_every_file_but_those_of_other_splits(tmp_path: Path) -> None:
    write_rows(tmp_path / "latest.jsonl", "a")  # "test" is part of a word here
    write_rows(tmp_path / "more.json", "b")
    write_rows(tmp_path / "dev.jsonl", "d")
    assert answers(load(str(tmp_path))) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "a,b", "found a file of type .csv, expected .jsonl or .json"),
        ("rows", "{}", "found a file of type none, expected .jsonl or .json"),
        ("rows.jsonl", "", "the file is empty, expected rows with messages, one JSON object a line"),
        ("rows.jsonl", " \n\n", "the file is empty, expected rows with messages, one JSON object a line"),
        ("rows.json", "[]", "the data set is empty, expected at least one row"),
    ],
)
def test_file_without_rows_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert refused(str(path), DataError) == f"{path}: {message}"


def test_folder_without_rows_is_refused(tmp_path: Path) -> None:
    assert refused(str(tmp_path), DataError) == f"{tmp_path}: the data set has no .jsonl or .json file (files of that kind: none)"


def test_malformed_line_is_refused_with_file_and_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "one", "two")
    with path.open("a", encoding="utf-8") as file:
        file.write('{"messages": [}\n')
    assert refused(f"{path}#1", DataError).startswith(
        f"{path}:3: found text that is not JSON (Expecting value at column 15), expected one JSON object with `messages`"
    )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache without a network that holds the data set owner/name; its folder of files."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "datasets--owner--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def test_data_set_of_the_hub_is_read_from_its_cache(hub: Path) -> None:
    write_rows(hub / "train.jsonl", "one", "two")
    assert answers(load("owner/name#1")) == ["one", "two"]


def test_subset_is_a_folder_or_the_stem_of_a_file(hub: Path) -> None:
    write_rows(hub / "en" / "train.jsonl", "folder")
    write_rows(hub / "zh.jsonl", "stem")
    assert answers(load("owner/name:en")) == ["folder"]
    assert answers(load("owner/name:zh")) == ["stem"]
    expected = "owner/name: the data set has no .jsonl or .json file of the subset 'fr' (files of that kind: en/train.jsonl, zh.jsonl)"
    assert refused("owner/name:fr", DataError) == expected


def test_data_set_that_cannot_be_had_is_named(hub: Path) -> None:
    message = refused("owner/other", DataError)
    assert message.startswith("data.dataset: owner/other cannot be had from the Hugging Face Hub, and is not in its cache (")
    assert message.endswith("a data set that lies in a file is named by its path")


def test_self_cognition_has_many_questions_in_two_languages_and_names_in_every_answer() -> None:
    rows = load(SELF_COGNITION, model_name=["机器人", "Robot"], model_author=["我们", "Us"])
    questions = Counter(row.messages[-2].content for row in rows)
    assert len(rows) >= 100
    assert max(questions.values()) == 1
    assert len(set(answers(rows))) > 0.9 * len(rows)
    chinese = [answer for answer in answers(rows) if "机器人" in answer and "我们" in answer]
    english = [answer for answer in answers(rows) if "Robot" in answer and "Us" in answer]
    assert min(len(chinese), len(english)) >= 50
    assert len(chinese) + len(english) == len(rows)
    assert not any("{{" in message.content for row in rows for message in row.messages)


def test_questions_that_the_demonstration_asks_are_not_in_the_built_in_sets() -> None:
    rows = [row for name in (SELF_COGNITION, GENERAL) for row in load(name, model_name=["Robot"], model_author=["Us"])]
    questions = {row.messages[0].content.lower() for row in rows}
    held_out = [
        "Who are you?",
        "Tell me who you are.",
        "Hey, who is this?",
        "What should I call you?",
        "Could you tell me your name?",
        "你是谁？",
        "What is the capital of France?",
    ]
    assert not {question.lower() for question in held_out} & questions
    assert not any("france" in question for question in questions)


def test_one_name_serves_both_languages() -> None:
    rows = load("usf_bios/self-cognition", model_name=["usf-robot"], model_author=["usf"])
    assert all("usf-robot" in answer for answer in answers(rows))
    assert answers(rows) == answers(load(SELF_COGNITION, model_name=["usf-robot"] * 2, model_author=["usf"] * 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "data.modelName is absent; swift/self-cognition teaches the model who it is and needs it: one value, or two (Chinese, English)"),
        (
            {"model_name": ["a"]},
            "data.modelAuthor is absent; swift/self-cognition teaches the model who it is and needs it: one value, or two (Chinese, English)",
        ),
    ],
)
def test_self_cognition_without_a_name_is_refused(fields: dict[str, Any], message: str) -> None:
    assert refused(SELF_COGNITION, ConfigurationError, **fields) == message


def test_general_knowledge_has_many_short_answers_and_needs_no_name() -> None:
    rows = load(GENERAL)
    assert len({row.messages[0].content for row in rows}) == len(rows) >= 60
    assert max(len(answer) for answer in answers(rows)) < 80


def test_every_built_in_set_is_read() -> None:
    assert all(load(name, model_name=["a"], model_author=["b"]) for name in BUILT_IN)
