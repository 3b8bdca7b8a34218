"""What one rank hands on to the others of its node, as JSON: the rows' outline or the error, whatever its words are."""

from __future__ import annotations

import pytest

from finetune_trainer.contract import EngineError
from finetune_trainer.data.mapped import Outline
from finetune_trainer.reading import ERROR_CHARACTERS, MESSAGE_BYTES, decode, encode

KINDS = [EngineError, *EngineError.__subclasses__()]


def test_an_outline_arrives_as_it_was() -> None:
    outline = Outline(rows=5, distinct=4, conversations=3, tokens=2**40, counts={"read": 7, "dropped": 2}, digest="0a")
    assert decode(encode(outline)) == outline


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_arrives_with_its_kind_words_and_notes(kind: type[EngineError]) -> None:
    sent = kind("rows/\udcff.jsonl:3: naïve 🦜\n")
    sent.add_note('Traceback: "…"')
    found = decode(encode(sent))
    assert isinstance(found, EngineError)
    assert (type(found), str(found), found.__notes__, found.reason) == (kind, str(sent), sent.__notes__, sent.reason)


@pytest.mark.parametrize("character", ["a", "\0", "🦜", "\udcff"])
def test_the_longest_error_fits_into_a_message(character: str) -> None:
    error = EngineError(character * ERROR_CHARACTERS)
    error.add_note(character * ERROR_CHARACTERS)
    assert len(encode(error)) < MESSAGE_BYTES
