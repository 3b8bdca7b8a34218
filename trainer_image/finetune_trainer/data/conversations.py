"""From the text of a data file to checked conversations: the shapes of rows that are understood, and what is said of a row that is not.

Pure: text in, conversations out. Where a conversation was read is kept with it (``place``, for example ``rows.jsonl:7``), so that whatever is wrong with it later can be named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune_trainer.contract import DataError

SHAPES = (
    '`messages` (a list of {"role", "content"}), `conversations` (a list of {"from", "value"}), `query` and `response`, or `instruction`, `input` and `output`'
)
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
NOT_TEXT = ("tools", "images", "videos", "audios", "tool_calls")
SEPARATION = re.compile(r"[\s,]*")
NOTHING = ("", "[]", "{}", "null")  # what a column of text holds where a row has no tools


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; ``loss`` says whether an assistant's turn is learned."""

    role: str
    content: str
    loss: bool = True

    def as_dict(self) -> dict[str, str]:
        """What a chat template reads."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a data set: an optional system message, then user and assistant in turn, the assistant last."""

    place: str
    messages: tuple[Message, ...]


def parse_rows(content: bytes, name: str) -> Iterator[tuple[str, Any]]:
    """The JSON values of a file with their places: one a line (JSONL), or the items of one array; raises DataError where the text is neither."""
    text = _decode(content, name)
    if text.lstrip().startswith("["):
        yield from _parse_array(text, name)
        return
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): a string may hold U+2028
        if line.strip():
            yield f"{name}:{number}", _parse(line, name, number, f"one JSON object with {SHAPES}")


def make_conversation(value: Any, place: str) -> Conversation:
    """The checked conversation of one row; raises DataError: place, what was found, what was expected."""
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: found {_kind(value)}, expected an object with {SHAPES}")
    for key in NOT_TEXT:
        if _is_something(value.get(key)):
            raise DataError(f"{place}: found `{key}`, which are not supported; expected a row of text only")
    messages = _messages(value, place)
    _check_order(messages, place)
    return Conversation(place, _with_own_system(messages, value.get("system"), place))


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with ``system`` as its system message, where it has none of its own."""
    if not system or conversation.messages[0].role == "system":
        return conversation
    return replace(conversation, messages=(Message("system", system), *conversation.messages))


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{number}: found bytes that are not UTF-8 (0x{content[error.start]:02x}), expected a file in UTF-8") from error


def _parse_array(text: str, name: str) -> Iterator[tuple[str, Any]]:
    for number, value in enumerate(_parse(text, name, 1, "one JSON object a line, or one JSON array of objects"), start=1):
        yield f"{name}: row {number}", value


def _parse(text: str, name: str, line: int, expected: str) -> Any:
    """The JSON value of a text that begins on ``line`` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{name}:{line + error.lineno - 1}"
        raise DataError(f"{place}: found text that is not JSON ({error.msg} at column {error.colno}), expected {expected}") from error
    except RecursionError as error:
        raise DataError(f"{name}:{line + _lines_before_failure(text)}: found JSON that is nested too deeply, expected {expected}") from error
    except ValueError as error:  # an integer of more digits than Python reads
        reason = str(error).partition(";")[0]
        raise DataError(f"{name}:{line + _lines_before_failure(text)}: found JSON that cannot be read ({reason}), expected {expected}") from error


def _lines_before_failure(text: str) -> int:
    """Line breaks before the first item of an array that cannot be read; 0 for a text of another kind."""
    start = len(text) - len(text.lstrip())
    if not text.startswith("[", start):
        return 0
    decoder = json.JSONDecoder()
    position = start + 1
    while True:
        rest = SEPARATION.match(text, position)
        position = rest.end() if rest else position
        try:
            _, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):  # at the closing bracket at the latest
            return text.count("\n", 0, position)


def _messages(row: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    if "messages" in row:
        return _from_list(row["messages"], "messages", "role", "content", place)
    if "conversations" in row:
        return _from_list(row["conversations"], "conversations", "from", "value", place)
    if "query" in row and "response" in row:
        return _from_pair(row, row["query"], row["response"], place)
    if "instruction" in row and "output" in row:
        parts = [_text(row.get(key) or "", key, place) for key in ("instruction", "input")]
        return _from_pair(row, "\n".join(part for part in parts if part), row["output"], place)
    found = ", ".join(f"`{key}`" for key in row) or "none"
    raise DataError(f"{place}: found an object with the keys {found}, expected {SHAPES}")


def _from_list(items: Any, field: str, role_key: str, content_key: str, place: str) -> tuple[Message, ...]:
    if not isinstance(items, list):
        raise DataError(f"{place}: `{field}` is {_kind(items)}, expected a list of objects with `{role_key}` and `{content_key}`")
    if not items:
        raise DataError(f"{place}: `{field}` is empty, expected at least one user and one assistant message")
    return tuple(_message(item, f"{field}[{index}]", role_key, content_key, place) for index, item in enumerate(items))


def _message(item: Any, field: str, role_key: str, content_key: str, place: str) -> Message:
    if not isinstance(item, Mapping) or role_key not in item or content_key not in item:
        found = "the keys " + ", ".join(f"`{key}`" for key in item) if isinstance(item, Mapping) and item else _kind(item)
        raise DataError(f"{place}: {field} is {found}, expected an object with `{role_key}` and `{content_key}`")
    if _is_something(item.get("tool_calls")):
        raise DataError(f"{place}: {field} has `tool_calls`, which are not supported; expected text only")
    known = SHAREGPT_ROLES if role_key == "from" else {name: name for name in ("system", "user", "assistant")}
    role = item[role_key]
    if not isinstance(role, str) or role not in known:
        raise DataError(f"{place}: {field} has the {role_key} {role!r}, expected one of {', '.join(known)}")
    content = _optional(item[content_key], f"{field} ({role})", place) if role == "system" else _filled(item[content_key], f"{field} ({role})", place)
    loss = item.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise DataError(f"{place}: {field} has the loss {loss!r}, expected true or false")
    return Message(known[role], content, loss is not False)


def _from_pair(row: Mapping[str, Any], query: Any, response: Any, place: str) -> tuple[Message, ...]:
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise DataError(f"{place}: `history` is not a list of pairs, expected [[question, answer], ...]")
    for number, (question, answer) in enumerate([*history, [query, response]]):
        where = f"`history`[{number}]" if number < len(history) else "the"
        messages.append(Message("user", _filled(question, f"{where} question", place)))
        messages.append(Message("assistant", _filled(answer, f"{where} answer", place)))
    return tuple(messages)


def _with_own_system(messages: tuple[Message, ...], system: Any, place: str) -> tuple[Message, ...]:
    """The messages with the row's ``system`` first; a system message without words, which much public data has, is dropped."""
    text = _optional(system, "`system`", place)
    if messages[0].role == "system":
        own, messages = messages[0].content, messages[1:]
        if own and text and own.strip() != text.strip():
            raise DataError(f"{place}: found `system` and a system message that says something else, expected one of them")
        text = own or text
    return (Message("system", text), *messages) if text else messages


def _is_something(value: Any) -> bool:
    return value.strip() not in NOTHING if isinstance(value, str) else bool(value)


def _optional(value: Any, field: str, place: str) -> str:
    """A text, or "" where there is none."""
    text = "" if value is None else _text(value, field, place)
    return text if text.strip() else ""


def _text(value: Any, field: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: the content of {field} is {_kind(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: {field} holds half of a surrogate pair (\\u{ord(value[error.start]):04x}), expected valid Unicode") from error
    return value


def _filled(value: Any, field: str, place: str) -> str:
    text = _text(value, field, place)
    if not text.strip():
        raise DataError(f"{place}: the content of {field} is empty, expected text")
    return text


def _check_order(messages: tuple[Message, ...], place: str) -> None:
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise DataError(f"{place}: found no assistant message (roles: {', '.join(roles)}), expected one at least: its words are what is learned")
    for index, role in enumerate(roles):
        before = roles[index - 1] if index else None
        expected = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}[before]
        if role not in expected:
            after = f"after {before}" if before else "first"
            raise DataError(
                f"{place}: messages[{index}] has the role {role} {after}, expected {' or '.join(expected)} (an optional system message, then user and assistant in turn)"
            )
    if roles[-1] != "assistant":
        raise DataError(f"{place}: the last message has the role {roles[-1]}, expected assistant")
    if not any(message.loss for message in messages if message.role == "assistant"):
        raise DataError(f"{place}: every assistant message has loss false, expected one at least to learn from")


def _kind(value: Any) -> str:
    names: dict[type, str] = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object", type(None): "null"}
    return names[type(value)]
