"""Conversations into tokens and labels, by the model's own chat template.

The text that is tokenized is exactly what the template renders for the whole conversation; no special token is added to it. What is learned is what the model will have to say: from the end of the
generation prompt to the end-of-turn token, that token included, the line break after it not. A template that marks the assistant's words itself (``{% generation %}``) is believed. In any other the
words are found by rendering the conversation once more with two marks in each answer, at the first and at the last visible character, and by rendering what comes before each answer as
a prompt; so a default system message, reasoning that is kept in the last turn only, and trimmed text need no knowledge of the model.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray

from finetune_trainer.contract import DataError, ModelError
from finetune_trainer.data.conversations import Conversation, Message
from finetune_trainer.data.rows import Row, has_label

CHUNK = 512  # conversations tokenized at once: enough for every core, few enough to hold their offsets
SAY_SECONDS = 2
FIRST_MARK = 0xE000  # the private use area of Unicode: no text should hold these, and one that does gets the next two
THINKING_END = "</think>"


@dataclass(frozen=True, slots=True)
class Span:
    """Characters ``start`` to ``end`` of the rendered text."""

    start: int
    end: int


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; raises ModelError where there is none that can be used without running the model's own code."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a broken file makes the library raise, the user must hear which folder it was
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{folder}: the tokenizer cannot be loaded ({reason}); expected tokenizer.json and tokenizer_config.json of a Hugging Face model"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{folder}: the tokenizer has no tokenizer.json, which is needed to find an answer's tokens; save it once with transformers' fast tokenizer"
        )
    return tokenizer


def encode(tokenizer: Any, conversations: Sequence[Conversation], say: Callable[[str], None] = lambda line: None) -> list[Row]:
    """One Row for each conversation; raises DataError for one that the template refuses, ModelError for a template that cannot be used.

    Work of more than SAY_SECONDS says how far it is.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "the model's tokenizer has no chat template, so messages cannot be turned into text; expected chat_template in tokenizer_config.json or a file chat_template.jinja (instruct models have one)"
        )
    encoder = _Encoder(tokenizer)
    rows: list[Row] = []
    said = time.monotonic()
    for first in range(0, len(conversations), CHUNK):
        rows.extend(encoder.encode(conversations[first : first + CHUNK]))
        if time.monotonic() - said > SAY_SECONDS:
            say(f"tokenized {len(rows):,} of {len(conversations):,} rows")
            said = time.monotonic()
    return rows


class _Encoder:
    """A tokenizer with what is known of its template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = np.array(sorted(tokenizer.get_added_vocab().values()), dtype=np.int64)
        self._template = tokenizer.get_chat_template()
        self._marks_answers = re.search(r"{%-?\s*generation\s*-?%}", self._template) is not None
        self._writes_prompt: bool | None = None  # whether add_generation_prompt changes the text; known from the first conversation

    def encode(self, conversations: Sequence[Conversation]) -> Iterator[Row]:
        find = self._find_marked_answers if self._marks_answers else self._find_answers
        texts, answers = zip(*(find(conversation) for conversation in conversations), strict=True)
        encodings = self._tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        for number, conversation in enumerate(conversations):
            ids = np.array(encodings["input_ids"][number], dtype=np.int32)
            offsets = np.array(encodings["offset_mapping"][number], dtype=np.int64).reshape(-1, 2)
            spans = answers[number] if self._marks_answers else self._with_ends_of_turn(texts[number], answers[number], offsets[np.isin(ids, self._added)])
            row = Row(ids, _label(offsets, spans, _learned(conversation, spans)))
            if not has_label(row):
                raise DataError(f"{conversation.place}: the model's chat template renders no word of an assistant message that is to be learned")
            yield row

    def _find_marked_answers(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The rendered text, and what a template with {% generation %} marks in it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [message.as_dict() for message in conversation.messages]
        with _refusing(conversation):  # the mask of apply_chat_template would do, but it loses answers that begin or end with white space
            texts, marked = render_jinja_template(
                [messages], chat_template=self._template, return_assistant_tokens_mask=True, **self._tokenizer.special_tokens_map
            )
        return texts[0], [Span(start, end) for start, end in marked[0] if end > start]

    def _with_ends_of_turn(self, text: str, answers: Sequence[Span], added: NDArray[np.int64]) -> list[Span]:
        ending = text[answers[-1].end :].strip()
        return [Span(answer.start, _end_of_turn(text, answer.end, added, ending)) for answer in answers]

    def _find_answers(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The rendered text, and where the words of each answer stand in it."""
        text = self._render(conversation, conversation.messages)
        first_mark, last_mark = _choose_marks(text)
        marked = self._render(conversation, [_mark(message, first_mark, last_mark) for message in conversation.messages])
        if marked.replace(first_mark, "").replace(last_mark, "") != text:
            raise self._unfindable(conversation)
        visible = _positions(marked, first_mark, last_mark)
        answers = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
        if len(visible) != len(answers):
            raise self._unfindable(conversation)
        return text, [Span(self._find_start(conversation, text, index, begin), end) for index, (begin, end) in zip(answers, visible, strict=True)]

    def _find_start(self, conversation: Conversation, text: str, index: int, begin: int | None) -> int:
        """Where the words of message ``index`` start: at the end of the prompt, when the text goes on from it; else (the prompt is another one than this turn had) at the first visible character."""
        before = conversation.messages[:index]
        prompt = self._render(conversation, before, add_generation_prompt=True)
        if self._writes_prompt is None:
            self._writes_prompt = prompt != self._render(conversation, before)
        if self._writes_prompt and text.startswith(prompt):
            return len(prompt)
        if begin is None:
            raise self._unfindable(conversation)
        return begin

    def _render(self, conversation: Conversation, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        with _refusing(conversation):
            text: str = self._tokenizer.apply_chat_template(
                [message.as_dict() for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        return text

    def _unfindable(self, conversation: Conversation) -> ModelError:
        return ModelError(
            f"{conversation.place}: the model's chat template changes an assistant message so that its tokens cannot be found; mark the assistant's words in the template with {{% generation %}}"
        )


def _choose_marks(text: str) -> tuple[str, str]:
    first = next(code for code in range(FIRST_MARK, FIRST_MARK + 0x1800, 2) if chr(code) not in text and chr(code + 1) not in text)
    return chr(first), chr(first + 1)


def _mark(message: Message, first_mark: str, last_mark: str) -> Message:
    """An assistant's message with marks around its visible words: white space, which a template may trim, and reasoning, which it may strip, stay outside."""
    if message.role != "assistant":
        return message
    content = message.content
    thinking = content.rfind(THINKING_END)
    answer = thinking + len(THINKING_END) if thinking >= 0 else 0
    end = max(len(content.rstrip()), answer)
    begin = end - len(content[answer:end].lstrip())
    return replace(message, content=content[:begin] + first_mark + content[begin:end] + last_mark + content[end:])


def _positions(marked: str, first_mark: str, last_mark: str) -> list[tuple[int | None, int]]:
    """First (None when the template dropped its mark) and last character of each answer, counted without the marks."""
    positions: list[tuple[int | None, int]] = []
    begin: int | None = None
    for number, match in enumerate(re.finditer(f"[{first_mark}{last_mark}]", marked)):
        place = match.start() - number
        if match.group() == first_mark:
            begin = place
        else:
            positions.append((begin, place))
            begin = None
    return positions


def _end_of_turn(text: str, end: int, added: NDArray[np.int64], ending: str) -> int:
    """The character after the end-of-turn token of an answer whose words end at ``end``.

    That token is the first added token (``offsets`` of them all in ``added``) with only white space before it; where templates spell the end in plain text, it is ``ending``, what follows the
    conversation's last answer.
    """
    after = added[np.searchsorted(added[:, 0], end) :]
    if len(after) and not text[end : after[0, 0]].strip():
        return int(after[0, 1])
    rest = text[end:].lstrip()
    if ending and rest.startswith(ending):
        return len(text) - len(rest) + len(ending)
    return end


def _label(offsets: NDArray[np.int64], spans: Sequence[Span], learned: Sequence[bool]) -> NDArray[np.bool_]:
    """labelled ``[tokens]``: every token that shares a character with a learned span; ``offsets`` ``[tokens, 2]``."""
    labelled = np.zeros(len(offsets), dtype=bool)
    for span, is_learned in zip(spans, learned, strict=True):
        if is_learned:
            labelled |= (offsets[:, 1] > span.start) & (offsets[:, 0] < span.end)
    return labelled


def _learned(conversation: Conversation, spans: Sequence[Span]) -> list[bool]:
    """Which spans are learned: those of the answers that do not have loss false; raises DataError where spans and answers cannot be matched."""
    learned = [message.loss for message in conversation.messages if message.role == "assistant"]
    if all(learned):
        return [True] * len(spans)
    if len(learned) != len(spans):
        raise DataError(
            f"{conversation.place}: the model's chat template marks {len(spans)} pieces of {len(learned)} assistant messages, so the ones with loss false cannot be told"
        )
    return learned


@contextmanager
def _refusing(conversation: Conversation) -> Iterator[None]:
    """Says which row it was that the template refused."""
    try:
        yield
    except TemplateError as error:
        raise DataError(f"{conversation.place}: the model's chat template refuses this row: {error}") from error
