"""YAML as kubectl reads it; the expected values were taken from `kubectl label --local -o json`."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator import kubeyaml

READ_AS = {
    "1e-4": 0.0001,
    "1E5": 100000,
    ".5": 0.5,
    "+.5": 0.5,
    "-.5": -0.5,
    ".5e3": 500,
    "1.": 1,
    "1.e5": 100000,
    "1e+3": 1000,
    "1_0.5": 10.5,
    "1e1_0": 10000000000,
    "1.0": 1,
    "0.1": 0.1,
    "1_000": 1000,
    "1__0": 10,
    "5_": 5,
    "_5": "_5",
    "+1": 1,
    "-0": 0,
    "00": 0,
    "0x1F": 31,
    "0X1F": 31,
    "-0x1F": -31,
    "+0x1f": 31,
    "0x_1f": 31,
    "0x": "0x",
    "0xg": "0xg",
    "0x1p-2": "0x1p-2",
    "0o17": 15,
    "017": 15,
    "-017": -15,
    "0_7": 7,
    "08": 8,
    "0o8": "0o8",
    "0b101": 5,
    "0B11": 3,
    "-0b11": -3,
    "0b2": "0b2",
    "0xffffffffffffffffff": "0xffffffffffffffffff",
    "18446744073709551615": 18446744073709551615,
    "1e400": "1e400",
    "on": True,
    "Yes": True,
    "y": True,
    "TRUE": True,
    "Off": False,
    "n": False,
    "tRue": "tRue",
    "~": None,
    "Null": None,
    "2020-01-01": "2020-01-01",
    "2020-01-01T00:00:00Z": "2020-01-01T00:00:00Z",
    "1:30": "1:30",
    "1.5.2": "1.5.2",
    "1e": "1e",
    "+": "+",
    ".": ".",
    "=": "=",
    '"on"': "on",
    "'5'": "5",
    "!!str 5": "5",
    '!!int "5"': 5,
    "!!float 5": 5,
    '!!float "1e-4"': 0.0001,
    "!!bool yes": True,
    "!!timestamp 2020-01-01": "2020-01-01",
    "!!binary aGVsbG8=": "hello",
    "!unknown 1": "1",
}


def read_one(text: str) -> Any:
    (document,) = kubeyaml.read(text.encode())
    return document.value


@pytest.mark.parametrize(("text", "expected"), READ_AS.items(), ids=READ_AS)
def test_scalar_is_read_as_kubectl_does(text: str, expected: Any) -> None:
    found = read_one(f"a: {text}\n")["a"]
    assert found == expected
    assert type(found) is type(expected)


def test_keys_are_text_as_in_json() -> None:
    assert read_one("1: a\nyes: b\n1.5: c\n2020-01-01: d\n") == {"1": "a", "true": "b", "1.5": "c", "2020-01-01": "d"}


def test_merge_keys_and_aliases_are_resolved() -> None:
    assert read_one("base: &b {p: 1, q: 2}\nuse: {<<: *b, q: 3}\nlist: {<<: [{p: 1}, {p: 2, r: 4}]}\n") == {
        "base": {"p": 1, "q": 2},
        "use": {"p": 1, "q": 3},
        "list": {"p": 1, "r": 4},
    }


def test_every_field_knows_its_line() -> None:
    (document,) = kubeyaml.read(b"spec:\n  data:\n    dataset:\n    - a\n    - b\n")
    assert document.line(("spec", "data", "dataset", 1)) == 5
    assert document.line(("spec", "data", "missing")) == 2
    assert document.line(("other",)) == 1


def test_several_documents_are_read_and_empty_ones_are_not() -> None:
    assert [document.value for document in kubeyaml.read(b"---\na: 1\n---\n# nothing\n---\nb: 2\n---\n")] == [{"a": 1}, {"b": 2}]


def test_json_with_tabs_is_read() -> None:
    assert read_one('{\n\t"a": 1e-4,\n\t"b": "on"\n}') == {"a": 0.0001, "b": "on"}


REFUSED = {
    "a: 1\na: 2\n": "line 2: a is written twice (first on line 1)",
    "m: {b: 1,\n  b: 2}\n": "line 2: m.b is written twice (first on line 1)",
    '{\t"a": 1, "a": 2}': "a is written twice",
    "a: .inf\n": "line 1: .inf is not a finite number",
    "a: .nan\n": "line 1: .nan is not a finite number",
    "a: !!int x\n": "line 1: 'x' is not a !!int",
    "a: !!int 1.5\n": "line 1: '1.5' is not a !!int",
    "~: 1\n": "line 1: a key must be text",
    "[1, 2]: 1\n": "line 1: a key must be text",
    "a: 1\n\tb: 2\n": "line 2: not valid YAML: found character '\\t' that cannot start any token",
    "a: &x [*x]\n": "line 1: an anchor contains itself",
    "a: {<<: 1}\n": "line 1: << takes a mapping or a list of mappings",
    "[" * 1500: "nested too deeply to be a FineTuneJob",
    "a: !!binary '%'\n": "line 1: !!binary is not base64 of UTF-8 text",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items(), ids=[message[:40] for message in REFUSED.values()])
def test_what_cannot_be_json_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(kubeyaml.InvalidYAML) as error:
        kubeyaml.read(text.encode())
    assert str(error.value).startswith(message)


def test_aliases_that_multiply_are_refused() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    with pytest.raises(kubeyaml.InvalidYAML, match="more than 100,000 values"):
        kubeyaml.read(bomb.encode())


def test_bytes_that_are_not_text_are_refused() -> None:
    with pytest.raises(kubeyaml.InvalidYAML, match="not valid YAML"):
        kubeyaml.read(b"a: \xff\xfe\x00")
