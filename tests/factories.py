"""Small real things for tests: configurations, models with a tokenizer, data files. torch and transformers are imported when a model is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB_SIZE = 419
"""A prime, so that every tensor-parallel size needs padding."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}

_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3_SCALING,
        "head_dim": 16,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0, "use_sliding_window": False, "tie_word_embeddings": False},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "rope_theta": 1000000.0,
        "head_dim": 32,
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
}


def tiny_hf_config(family: str, **overrides: Any) -> dict[str, Any]:
    """A config.json as on the hub (`rope_theta`, `rope_scaling`, `torch_dtype`) of a model of a few hundred kilobytes; raises KeyError for a family without an entry."""
    return {"model_type": family, "torch_dtype": "float32", **_SHAPE, **_FAMILIES[family], **overrides}


def make_tiny_model(family: str, folder: Path, *, seed: int = 0, max_shard_size: str = "200KB", **overrides: Any) -> Path:
    """Save a model of random weights (biases and norms too) as several safetensors files, with a tokenizer and its chat template; returns ``folder``.

    ``overrides`` are fields of config.json; ``torch_dtype`` is the data type that the weights are saved in.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = tiny_hf_config(family, **overrides)
    dtype = getattr(torch, fields.pop("torch_dtype"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else 0.05 * noise)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> Path:
    """Save a byte-level BPE tokenizer of fewer than ``VOCAB_SIZE`` tokens with a ChatML template; returns ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([message["content"] for index in range(100) for message in _row(index)["messages"]], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


def make_rows(folder: Path, num_rows: int, name: str = "rows.jsonl") -> Path:
    """Write ``num_rows`` conversations (single- and multi-turn, with and without a system prompt, of varied lengths) as `messages` JSONL; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(_row(index), ensure_ascii=False) + "\n" for index in range(num_rows)), encoding="utf-8")
    return path


_SUBJECTS = ("the sea", "a mountain", "the moon", "bread", "a clock", "the wind", "a river", "snow", "a bridge", "music")
_QUESTIONS = ("What is {}?", "Tell me about {}.", "Why do people like {}?", "Write one sentence on {}.", "请用一句话介绍{}。")
_ANSWERS = (
    "I think that {} is older than it looks.",
    "There is much to say: {} changes with the season, and so does what we make of it.",
    "{}, in short, is worth a walk.",
)


def _row(index: int) -> dict[str, Any]:
    """Row ``index``; all rows differ."""
    messages = [{"role": "system", "content": "You answer in a few words."}] if index % 3 == 0 else []
    for turn in range(1 + index % 2):
        subject = _SUBJECTS[(index + turn) % len(_SUBJECTS)]
        messages.append({"role": "user", "content": f"{index}. " + _QUESTIONS[(index // 2 + turn) % len(_QUESTIONS)].format(subject)})
        messages.append({"role": "assistant", "content": " ".join([_ANSWERS[(index + turn) % len(_ANSWERS)].format(subject)] * (1 + index % 4))})
    return {"messages": messages}
