"""The tiny models are what the other tests take them for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from factories import CHAT_TEMPLATE, VOCAB_SIZE, make_rows, make_tiny_model, tiny_hf_config
from finetune_trainer.families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_model_loads_with_its_tokenizer_and_its_facts(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_tiny_model(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert model.config.tie_word_embeddings == tiny_hf_config(family)["tie_word_embeddings"]
    assert len(tokenizer) < VOCAB_SIZE
    assert all(parameter.std() > 0.01 for parameter in model.parameters())
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = tokenizer.apply_chat_template([{"role": "user", "content": "海 Sea"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n海 Sea<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_llama_keeps_its_rope_scaling(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 8.0, 500000.0)


def test_rows_differ_and_alternate_roles(tmp_path: Path) -> None:
    rows = [json.loads(line)["messages"] for line in make_rows(tmp_path, 40).read_text(encoding="utf-8").splitlines()]
    assert len({json.dumps(row) for row in rows}) == 40
    for row in rows:
        roles = [message["role"] for message in row if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
