"""Make a folder with random weights in the shape of Qwen2.5-7B-Instruct: ``python reference_model.py FOLDER TOKENIZER_FOLDER``.

15.2 GB of bfloat16 in four files, made on a GPU in half a minute. The tokenizer may have fewer tokens than the model has embeddings.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, FFN, VOCAB, LAYERS, HEADS, GROUPS, HEAD_DIM, NUM_FILES = 3584, 18944, 152064, 28, 28, 4, 128, 4
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": FFN,
    "max_position_embeddings": 32768,
    "max_window_layers": LAYERS,
    "model_type": "qwen2",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": GROUPS,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, in the order of the layers."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found[prefix + "input_layernorm.weight"] = (HIDDEN,)
        for name, rows in (("q", HEADS * HEAD_DIM), ("k", GROUPS * HEAD_DIM), ("v", GROUPS * HEAD_DIM)):
            found[prefix + f"self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            found[prefix + f"self_attn.{name}_proj.bias"] = (rows,)
        found[prefix + "self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        found[prefix + "post_attention_layernorm.weight"] = (HIDDEN,)
        found |= {prefix + f"mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        found[prefix + "mlp.down_proj.weight"] = (HIDDEN, FFN)
    return {**found, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms around one, everything else of standard deviation 0.02."""
    values = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    if name.endswith("norm.weight"):
        return values.normal_(1.0, 0.05, generator=generator).cpu()
    return values.normal_(0.0, 0.02, generator=generator).cpu()


def make(folder: Path, tokenizer: Path) -> None:
    """Write model and tokenizer."""
    folder.mkdir(parents=True)
    for file in tokenizer.iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    generator = torch.Generator("cuda").manual_seed(1)
    every = list(shapes().items())
    share = -(-len(every) // NUM_FILES)
    files = {f"model-{number + 1:05}-of-{NUM_FILES:05}.safetensors": every[number * share : (number + 1) * share] for number in range(NUM_FILES)}
    with ThreadPoolExecutor() as pool:
        writes = [
            pool.submit(save_file, {name: draw(name, shape, generator) for name, shape in tensors}, folder / file, metadata={"format": "pt"})
            for file, tensors in files.items()
        ]
    for write in writes:
        write.result()
    total = sum(2 * math.prod(shape) for _, shape in every)
    index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, tensors in files.items() for name, _ in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
