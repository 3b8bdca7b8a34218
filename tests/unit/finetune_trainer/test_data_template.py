"""Labels by the chat templates of real models, shortened to what shapes the text; the tokenizers are trained here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factories import make_tokenizer
from finetune_trainer.contract import DataError, ModelError
from finetune_trainer.data.conversations import Conversation, make_conversation
from finetune_trainer.data.rows import Row
from finetune_trainer.data.template import encode, load_tokenizer

LLAMA3 = (
    "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{{- 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' }}{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' or not loop.first %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN3 = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(last_query_index=messages|length - 1, searching=true) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.searching and message.role == 'user' %}{%- set ns.searching = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'user' %}{{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set reasoning_content = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
PHI4 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GLM4 = "[gMASK]{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
PLAIN = (  # an end of turn in plain text, with an added token in front of the next turn
    "{% for message in messages %}{{ bos_token }}### {{ message['role'] }}:\n{{ message['content'] | trim }}\n###END\n\n{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}### assistant:\n{% endif %}"
)

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATES: dict[str, tuple[str, tuple[str, ...], str]] = {  # template, special tokens (the first is bos, the last eos), what ends an answer
    "llama3": (LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "qwen2.5": (QWEN25, CHATML, "<|im_end|>"),
    "qwen3": (QWEN3, CHATML, "<|im_end|>"),
    "smollm2": (SMOLLM2, CHATML, "<|im_end|>"),
    "generation": (GENERATION, CHATML, "<|im_end|>"),
    "deepseek-r1": (DEEPSEEK_R1, ("<|begin|>", "<|User|>", "<|Assistant|>", "<|end|>"), "<|end|>"),
    "phi4": (PHI4, ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), "<|end|>"),
    "mistral": (MISTRAL, ("<s>", "</s>"), "</s>"),
    "plain": (PLAIN, ("<s>", "</s>"), "\n###END"),
}

TEXTS = [
    "Who are you? I am a model, 42 years of age.",
    "The capital of France is Paris.",
    "你好，世界。",
    "<think>\nreason\n</think>\n\n",
    "system user assistant",
]


def build_tokenizer(template: str, special: tuple[str, ...], *, trim_offsets: bool = False) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False))
    bos = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=trim_offsets), bos]
    )  # as Llama 3's: adds the bos token unless told not to
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[-1])
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: build_tokenizer(template, special) for name, (template, special, _) in TEMPLATES.items()}


def conversation(*turns: str, system: str | None = None, **last: Any) -> Conversation:
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]
    messages[-1].update(last)
    return make_conversation({"messages": messages}, "rows.jsonl:1")


def learned(tokenizer: Any, row: Row) -> list[str]:
    """The text of each run of labelled tokens."""
    edges = np.flatnonzero(np.diff(row.labelled.astype(int), prepend=0, append=0))
    return [tokenizer.decode(row.input_ids[begin:end]) for begin, end in edges.reshape(-1, 2)]


def encode_one(tokenizer: Any, row: Conversation) -> tuple[Row, list[str]]:
    (encoded,) = encode(tokenizer, [row])
    return encoded, learned(tokenizer, encoded)


CASES = {
    "one turn": conversation("Who are you?", "I am a model."),
    "two turns": conversation("Who are you?", "I am a model.", "And the capital?", "Paris."),
    "three turns": conversation("a", "The capital", "b", "of France", "c", "is Paris."),
    "repeated answers": conversation("Paris.", "Paris.", "Paris.", "Paris."),
    "Chinese and emoji": conversation("你好", "你好，世界。🙂", "🙂", "🙂"),
    "system": conversation("Who are you?", "I am a model.", system="You are terse."),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_the_templates_own_and_labels_are_the_answers_with_their_end_of_turn(tokenizers: dict[str, Any], name: str, case: str) -> None:
    tokenizer, ending, row = tokenizers[name], TEMPLATES[name][2], CASES[case]
    if case == "system" and name in ("mistral", "deepseek-r1"):
        row = CASES["one turn"]
    messages = [message.as_dict() for message in row.messages]
    encoded, texts = encode_one(tokenizer, row)

    assert encoded.input_ids.tolist() == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert encoded.input_ids.dtype == np.int32
    answers = [message.content for message in row.messages if message.role == "assistant"]
    space = " " if name == "mistral" else ""
    expected = [space + answer + ending for answer in answers]
    if name == "qwen3":
        expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
    assert [text.removeprefix(space) for text in texts] == [text.removeprefix(space) for text in expected]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("name", ["qwen2.5", "generation"])
def test_white_space_of_an_answer_is_learned_as_the_template_renders_it(name: str, trim_offsets: bool) -> None:
    template, special, _ = TEMPLATES[name]
    _, texts = encode_one(build_tokenizer(template, special, trim_offsets=trim_offsets), conversation("a", " \n  I am  \n", "b", "  two  "))
    assert texts == [" \n  I am  \n<|im_end|>", "  two  <|im_end|>"]


def test_trimmed_answer_is_learned_without_its_white_space(tokenizers: dict[str, Any]) -> None:
    _, texts = encode_one(tokenizers["llama3"], conversation(" a ", " \n I am \n", "b", "two  "))
    assert texts == ["I am<|eot_id|>", "two<|eot_id|>"]


def test_begin_of_text_stands_once(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["llama3"]
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id, "this tokenizer adds the token by itself"
    row, _ = encode_one(tokenizer, CASES["two turns"])
    assert row.input_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_default_system_message_is_in_the_text_and_not_learned(tokenizers: dict[str, Any]) -> None:
    row, texts = encode_one(tokenizers["smollm2"], CASES["two turns"])
    assert tokenizers["smollm2"].decode(row.input_ids).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert texts == ["I am a model.<|im_end|>", "Paris.<|im_end|>"]


def test_reasoning_is_learned_in_the_last_turn_and_gone_from_earlier_ones(tokenizers: dict[str, Any]) -> None:
    thought = "<think>\nreason\n</think>\n\n"
    row, texts = encode_one(tokenizers["qwen3"], conversation("a", thought + "First.", "b", thought + "Second."))
    assert texts == ["First.<|im_end|>", thought + "Second.<|im_end|>"]
    assert tokenizers["qwen3"].decode(row.input_ids).count("reason") == 1


def test_prompt_that_opens_reasoning_which_the_row_has_not_starts_the_answer_at_its_first_character(tokenizers: dict[str, Any]) -> None:
    _, texts = encode_one(tokenizers["deepseek-r1"], conversation("a", "<thin ice", "b", "<think>why</think>Second."))
    assert texts == ["<thin ice<|end|>", "Second.<|end|>"]


def test_header_is_not_learned_where_the_template_ignores_the_generation_prompt() -> None:
    template, special, _ = TEMPLATES["qwen2.5"]
    tokenizer = build_tokenizer(template.split("{%- if add_generation_prompt")[0], special)
    _, texts = encode_one(tokenizer, CASES["two turns"])
    assert texts == ["I am a model.<|im_end|>", "Paris.<|im_end|>"]


def test_answer_that_ends_where_the_next_role_begins_learns_that_role_token() -> None:
    tokenizer = build_tokenizer(GLM4, ("[gMASK]", "<|system|>", "<|assistant|>", "<|user|>"))
    _, texts = encode_one(tokenizer, CASES["two turns"])
    assert texts == ["I am a model.<|user|>", "Paris."]


def test_answer_that_quotes_the_end_of_turn_is_learned_to_its_own_end(tokenizers: dict[str, Any]) -> None:
    _, texts = encode_one(tokenizers["qwen2.5"], conversation("a", "It is <|im_end|> and goes on.", "b", "Paris."))
    assert texts == ["It is <|im_end|> and goes on.<|im_end|>", "Paris.<|im_end|>"]


def test_text_that_holds_the_marks_is_kept(tokenizers: dict[str, Any]) -> None:
    _, texts = encode_one(tokenizers["qwen2.5"], conversation("\ue000", "\ue001 a \ue000", "\ue002", "Paris."))
    assert texts == ["\ue001 a \ue000<|im_end|>", "Paris.<|im_end|>"]


@pytest.mark.parametrize("name", ["llama3", "generation"])
def test_turn_with_loss_false_is_not_learned(tokenizers: dict[str, Any], name: str) -> None:
    row = make_conversation(
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "One.", "loss": False},
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "Two.", "loss": True},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "Three."},
            ]
        },
        "rows.jsonl:1",
    )
    _, texts = encode_one(tokenizers[name], row)
    assert texts == ["Two." + TEMPLATES[name][2], "Three." + TEMPLATES[name][2]]


def test_rows_are_the_same_whatever_stands_beside_them(tokenizers: dict[str, Any]) -> None:
    rows = [CASES["one turn"], CASES["two turns"], CASES["Chinese and emoji"]] * 400
    encoded = encode(tokenizers["qwen3"], rows)
    assert len(encoded) == 1200
    for number in (0, 1, 2, 1197, 1198, 1199):
        alone, _ = encode_one(tokenizers["qwen3"], rows[number])
        assert alone.input_ids.tolist() == encoded[number].input_ids.tolist()
        assert alone.labelled.tolist() == encoded[number].labelled.tolist()


def test_loss_false_is_refused_where_the_marks_of_the_template_are_not_the_answers() -> None:
    twice = GENERATION.replace("{% generation %}", "{% generation %}Well: {% endgeneration %}, {% generation %}")
    tokenizer = build_tokenizer(twice, CHATML)
    _, texts = encode_one(tokenizer, CASES["one turn"])
    assert texts == ["Well: ", " I am a model.<|im_end|>"]
    row = conversation("a", "b", "c", "d", loss=False)
    with pytest.raises(
        DataError, match="rows.jsonl:1: the model's chat template marks 4 pieces of 2 assistant messages, so the ones with loss false cannot be told"
    ):
        encode(tokenizer, [row])


def test_tokenizer_without_template_is_refused(tokenizers: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(QWEN25, CHATML)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has no chat template, so messages cannot be turned into text; expected chat_template in tokenizer_config.json"):
        encode(tokenizer, [CASES["one turn"]])


def test_row_that_the_template_refuses_is_named(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: the model's chat template refuses this row: roles must alternate user/assistant"):
        encode(tokenizers["mistral"], [CASES["one turn"], CASES["system"]])


def test_template_that_changes_the_answers_is_refused() -> None:
    template = "{% for message in messages %}<|im_start|>{{ message['content'] | length }}: {{ message['content'] }}<|im_end|>{% endfor %}"
    with pytest.raises(
        ModelError,
        match=r"rows.jsonl:1: the model's chat template changes an assistant message .* mark the assistant's words in the template with \{% generation %\}",
    ):
        encode(build_tokenizer(template, CHATML), [CASES["one turn"]])


def test_template_that_drops_the_answers_is_refused() -> None:
    template = "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
    with pytest.raises(ModelError, match="rows.jsonl:1: the model's chat template changes an assistant message"):
        encode(build_tokenizer(template, CHATML), [CASES["one turn"]])


def test_template_whose_generation_mark_is_empty_is_refused() -> None:
    template = "<|im_start|>{% generation %}{% endgeneration %}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="rows.jsonl:1: the model's chat template renders no word of an assistant message that is to be learned"):
        encode(build_tokenizer(template, CHATML), [CASES["one turn"]])


def test_long_work_says_how_far_it_is(tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr("finetune_trainer.data.template.time.monotonic", lambda: next(clock))
    encode(tokenizers["qwen2.5"], [CASES["one turn"]] * 1100, said.append)
    assert said == [
        "tokenized 512 of 1,100 rows",
        "tokenized 1,024 of 1,100 rows",
        "tokenized 1,100 of 1,100 rows",
    ]


def test_tokenizer_of_a_model_folder_is_loaded(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path))
    _, texts = encode_one(tokenizer, CASES["two turns"])
    assert texts == ["I am a model.<|im_end|>", "Paris.<|im_end|>"]


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{tmp_path}: the tokenizer cannot be loaded .*; expected tokenizer.json and tokenizer_config.json"):
        load_tokenizer(tmp_path)
