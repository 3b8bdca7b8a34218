from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_trainer.contract import DataError
from finetune_trainer.data.conversations import Conversation, make_conversation, parse_rows, with_system

USER = {"role": "user", "content": "Who are you?"}
ASSISTANT = {"role": "assistant", "content": "A model."}
SYSTEM = {"role": "system", "content": "Be brief."}


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def make(value: Any) -> list[tuple[str, str]]:
    return turns(make_conversation(value, "rows.jsonl:7"))


def refused(value: Any) -> str:
    with pytest.raises(DataError) as caught:
        make_conversation(value, "rows.jsonl:7")
    return str(caught.value)


def test_messages_are_read_with_a_system_message_first_and_several_turns() -> None:
    value = {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT], "id": 3}
    assert make(value) == [("system", "Be brief."), *[("user", "Who are you?"), ("assistant", "A model.")] * 2]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"query": "q", "response": "r"}, [("user", "q"), ("assistant", "r")]),
        (
            {"query": "q", "response": "r", "system": "s", "history": [["a", "b"]]},
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "q"), ("assistant", "r")],
        ),
        ({"instruction": "i", "input": "x", "output": "o"}, [("user", "i\nx"), ("assistant", "o")]),
        ({"instruction": "i", "input": "", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"instruction": "i", "input": None, "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}, [("user", "q"), ("assistant", "r")]),
    ],
)
def test_other_shapes_of_rows_become_messages(value: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert make(value) == expected


SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"messages": [USER, ASSISTANT], "system": "Be kind."}, "Be kind."),
        ({"conversations": SHAREGPT, "system": "Be kind."}, "Be kind."),
        ({"instruction": "i", "output": "o", "system": "Be kind."}, "Be kind."),
        ({"messages": [SYSTEM, USER, ASSISTANT], "system": "Be brief.\n"}, "Be brief."),
        ({"messages": [SYSTEM, USER, ASSISTANT], "system": ""}, "Be brief."),
        ({"messages": [{"role": "system", "content": " "}, USER, ASSISTANT], "system": "Be kind."}, "Be kind."),
        ({"messages": [{"role": "system", "content": ""}, USER, ASSISTANT]}, None),
        ({"messages": [{"role": "system", "content": None}, USER, ASSISTANT]}, None),
        ({"conversations": [{"from": "system", "value": ""}, *SHAREGPT], "system": None}, None),
        ({"query": "q", "response": "r", "system": " "}, None),
    ],
)
def test_system_of_a_row_stands_beside_the_turns_or_among_them_and_an_empty_one_is_none(value: dict[str, Any], expected: str | None) -> None:
    roles = [("system", expected)] if expected else []
    assert make(value)[:-2] == roles


@pytest.mark.parametrize("tools", ["[]", " [] ", "", "null", [], None])
def test_row_without_tools_may_say_so(tools: Any) -> None:
    assert len(make({"messages": [USER, {**ASSISTANT, "tool_calls": tools}], "tools": tools})) == 2


def test_loss_of_a_turn_is_kept() -> None:
    conversation = make_conversation(
        {"messages": [USER, {**ASSISTANT, "loss": False}, USER, {**ASSISTANT, "loss": True}, USER, {**ASSISTANT, "loss": None}]}, "x:1"
    )
    assert [message.loss for message in conversation.messages if message.role == "assistant"] == [False, True, True]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "rows.jsonl:7: found a list, expected an object with `messages` (a list of"),
        ("text", "rows.jsonl:7: found a string, expected an object"),
        (None, "rows.jsonl:7: found null, expected an object"),
        ({}, "rows.jsonl:7: found an object with the keys none, expected `messages`"),
        ({"text": "a", "label": 1}, "rows.jsonl:7: found an object with the keys `text`, `label`, expected `messages`"),
        ({"messages": "hello"}, "rows.jsonl:7: `messages` is a string, expected a list of objects with `role` and `content`"),
        ({"messages": []}, "rows.jsonl:7: `messages` is empty, expected at least one user and one assistant message"),
        ({"messages": [USER, "hi"]}, "rows.jsonl:7: messages[1] is a string, expected an object with `role` and `content`"),
        ({"messages": [{"role": "user", "text": "a"}]}, "rows.jsonl:7: messages[0] is the keys `role`, `text`, expected an object with `role` and `content`"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "rows.jsonl:7: messages[0] has the role 'bot', expected one of system, user, assistant"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "rows.jsonl:7: messages[0] has the role ['user'], expected one of system, user, assistant"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "rows.jsonl:7: the content of messages[1] (assistant) is empty, expected text"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "rows.jsonl:7: the content of messages[1] (assistant) is null, expected a string"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]},
            "rows.jsonl:7: the content of messages[1] (assistant) is a list, expected a string",
        ),
        ({"messages": [USER, {**ASSISTANT, "loss": 1}]}, "rows.jsonl:7: messages[1] has the loss 1, expected true or false"),
        ({"messages": [USER, {**ASSISTANT, "loss": False}]}, "rows.jsonl:7: every assistant message has loss false, expected one at least to learn from"),
        ({"messages": [SYSTEM, USER]}, "rows.jsonl:7: found no assistant message (roles: system, user), expected one at least"),
        ({"messages": [ASSISTANT, USER]}, "rows.jsonl:7: messages[0] has the role assistant first, expected system or user"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "rows.jsonl:7: messages[1] has the role system after user, expected assistant"),
        ({"messages": [USER, USER, ASSISTANT]}, "rows.jsonl:7: messages[1] has the role user after user, expected assistant"),
        ({"messages": [SYSTEM, SYSTEM, USER, ASSISTANT]}, "rows.jsonl:7: messages[1] has the role system after system, expected user"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "rows.jsonl:7: messages[2] has the role assistant after assistant, expected user"),
        ({"messages": [USER, ASSISTANT, USER]}, "rows.jsonl:7: the last message has the role user, expected assistant"),
        ({"messages": [USER, ASSISTANT], "images": ["a.png"]}, "rows.jsonl:7: found `images`, which are not supported; expected a row of text only"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, "rows.jsonl:7: messages[1] has `tool_calls`, which are not supported; expected text only"),
        (
            {"messages": [USER, {"role": "assistant", "content": "\ud800"}]},
            "rows.jsonl:7: messages[1] (assistant) holds half of a surrogate pair (\\ud800), expected valid Unicode",
        ),
        ({"query": "", "response": "r"}, "rows.jsonl:7: the content of the question is empty, expected text"),
        (
            {"messages": [SYSTEM, USER, ASSISTANT], "system": "Be kind."},
            "rows.jsonl:7: found `system` and a system message that says something else, expected one of them",
        ),
        ({"messages": [USER, ASSISTANT], "system": 3}, "rows.jsonl:7: the content of `system` is a number, expected a string"),
        ({"messages": [USER, ASSISTANT], "tools": "[{}]"}, "rows.jsonl:7: found `tools`, which are not supported; expected a row of text only"),
        ({"messages": [{"role": "system", "content": ""}, ASSISTANT]}, "rows.jsonl:7: messages[1] has the role assistant after system, expected user"),
        ({"messages": [{"role": "system", "content": ""}]}, "rows.jsonl:7: found no assistant message (roles: system)"),
        ({"query": "q", "response": 3}, "rows.jsonl:7: the content of the answer is a number, expected a string"),
        ({"query": "q", "response": "r", "history": [["a"]]}, "rows.jsonl:7: `history` is not a list of pairs, expected [[question, answer], ...]"),
        ({"query": "q", "response": "r", "history": [["a", ""]]}, "rows.jsonl:7: the content of `history`[0] answer is empty, expected text"),
        ({"instruction": "", "input": "", "output": "o"}, "rows.jsonl:7: the content of the question is empty, expected text"),
        (
            {"conversations": [{"from": "robot", "value": "a"}]},
            "rows.jsonl:7: conversations[0] has the from 'robot', expected one of system, human, user, gpt, assistant",
        ),
    ],
)
def test_row_that_is_wrong_is_refused_with_its_place_and_what_was_expected(value: Any, message: str) -> None:
    assert refused(value).startswith(message)


def test_lines_are_numbered_from_one_and_blank_ones_are_passed_over() -> None:
    content = b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\r\n'
    assert list(parse_rows(content, "f.jsonl")) == [("f.jsonl:1", {"a": 1}), ("f.jsonl:3", {"a": 2})]


def test_line_separators_of_unicode_do_not_end_a_line() -> None:
    line = json.dumps({"a": "one\u2028two\x85three"}, ensure_ascii=False)
    assert list(parse_rows(line.encode(), "f.jsonl")) == [("f.jsonl:1", {"a": "one\u2028two\x85three"})]


def test_array_of_rows_is_read() -> None:
    assert list(parse_rows(b' [{"a": 1},\n {"a": 2}]', "f.json")) == [("f.json: row 1", {"a": 1}), ("f.json: row 2", {"a": 2})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "f.jsonl:2: found text that is not JSON (Expecting value at column 7), expected one JSON object with `messages`"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "f.jsonl:2: found bytes that are not UTF-8 (0xff), expected a file in UTF-8"),
        (
            b'[{"a": 1},\n{"a" 2}]',
            "f.jsonl:2: found text that is not JSON (Expecting ':' delimiter at column 6), expected one JSON object a line, or one JSON array of objects",
        ),
        (
            b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}\n",
            "f.jsonl:2: found JSON that cannot be read (Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits), expected one JSON object",
        ),
        (b'[{"a": 1},\n\n{"a": ' + b"1" * 5000 + b"}]", "f.jsonl:3: found JSON that cannot be read (Exceeds the limit (4300 digits)"),
        (b'{"a": 1}\n{"a": ' + b"[" * 100_000, "f.jsonl:2: found JSON that is nested too deeply, expected one JSON object"),
        (b'[\n{"a": 1},\n{"a": ' + b"[" * 100_000, "f.jsonl:3: found JSON that is nested too deeply, expected one JSON object a line, or one JSON array"),
        (b"[" * 100_000, "f.jsonl:1: found JSON that is nested too deeply"),
    ],
)
def test_text_that_is_not_json_is_refused_with_file_and_line(content: bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        list(parse_rows(content, "f.jsonl"))
    assert str(caught.value).startswith(message)


def test_system_option_is_for_rows_without_a_system_message_only() -> None:
    plain = make_conversation({"messages": [USER, ASSISTANT]}, "x:1")
    own = make_conversation({"messages": [SYSTEM, USER, ASSISTANT]}, "x:2")
    assert turns(with_system(plain, "Be kind."))[0] == ("system", "Be kind.")
    assert turns(with_system(own, "Be kind."))[0] == ("system", "Be brief.")
    assert with_system(plain, None) is plain
