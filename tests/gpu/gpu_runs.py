"""What the GPU tests do in every rank."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import small_models
import small_runs
from finetune_trainer import convert, families, hf_files, model, parallel
from finetune_trainer.contract import RunConfig, Verification
from finetune_trainer.parallel import Ranks
from small_models import Layout
from small_runs import Job, Outcome


def run_command(command: Sequence[str], deadline_seconds: float, **environment: str) -> str:
    """Run a command to its end; its output, which is the message when it fails."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=deadline_seconds, check=False
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


def forget_attention_backend() -> None:
    """Undo what Megatron-core writes into the environment for a whole process, so that the next model may choose another kernel."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)
    chosen = sys.modules.get("transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention")
    if chosen is not None:
        chosen._attention_backends["backend_selection_requires_update"] = True


def compute_logits(layouts: list[Layout], rows: list[list[int]]) -> list[list[torch.Tensor]]:
    """Per model (all cut alike) and row [tokens, vocabulary], float32, on the CPU."""
    parallel.open_process_group(layouts[0].config)
    ranks = parallel.initialize(layouts[0].config.parallelism, 1)
    return [compute_logits_of(layout, ranks, rows) for layout in layouts]


def compute_logits_of(layout: Layout, ranks: Ranks, rows: list[list[int]]) -> list[torch.Tensor]:
    forget_attention_backend()
    hf = hf_files.open_model(layout.config.model)
    family = families.find(hf.config)
    chunks = model.build(family, hf.config, layout.config, ranks)
    convert.import_base(chunks, family, hf, ranks)
    return [logits.cpu() for logits in model.logits(chunks, rows, ranks)]


def transformers_logits(folder: Path, rows: list[list[int]], dtype: str) -> list[torch.Tensor]:
    """The same by transformers, computed in ``dtype`` where the engine computes."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").to(device).eval()
    with torch.no_grad():
        return [reference(torch.tensor([row], device=device), use_cache=False).logits[0].float().cpu() for row in rows]


def layers_of(layout: Layout) -> str:
    """Where the class of the first layer's first linear layer is from."""
    forget_attention_backend()
    built = small_models.build(layout)
    return type(built.chunks[0].decoder.layers[0].self_attention.linear_qkv).__module__


def train(job: Job, interfere: Callable[[Any], None] | None = None) -> Outcome:
    forget_attention_backend()
    return small_runs.train(job, interfere)


def export_megatron(job: Job, folder: Path, *, write: bool) -> list[str]:
    forget_attention_backend()
    return small_runs.export_megatron(job, folder, write=write)


@dataclass(frozen=True)
class PackedJob(Job):
    """The same with longer rows, packed when asked to."""

    packing: bool = False

    @property
    def config(self) -> RunConfig:
        config = super().config
        return config.model_copy(update={"data": config.data.model_copy(update={"max_length": 1024, "packing": self.packing})})


@dataclass(frozen=True)
class Verified:
    outcome: Outcome
    verification: Verification


def train_and_verify(job: Job, folder: Path, formats: list[str], level: str) -> Verified:
    """Train, export every format, verify at ``level``."""
    from finetune_trainer import __main__ as program
    from finetune_trainer import data, verify

    found: list[Verification] = []
    config = job.config
    training = {"attention_backend": config.training.attention_backend or "auto"}
    config = config.model_copy(
        update={
            "output": config.output.model_copy(update={"formats": formats, "verification": level}),
            "tuning": complete(config),
            "training": config.training.model_copy(update=training),
        }
    )

    def afterwards(chunks: Any, ranks: Any) -> None:
        hf = hf_files.open_model(config.model)
        family = families.find(hf.config)
        artifacts = [(kind, folder / kind) for kind in config.output.formats or []]
        for kind, target in artifacts:
            program.export(kind, target, chunks, family, hf, config, ranks, 6)
        rows = data.open_rows(config.data, data.load_tokenizer(hf.folder)).rows
        found.append(verify.check(chunks, family, hf, config, ranks, rows, artifacts))

    forget_attention_backend()
    outcome = small_runs.train(job, afterwards=afterwards)
    return Verified(outcome, found[0])


def complete(config: RunConfig) -> Any:
    if config.tuning.tuner_type == "full":
        return config.tuning
    return config.tuning.model_copy(
        update={"lora_rank": 8, "lora_alpha": 32.0, "lora_dropout": 0.0, "use_rslora": False, "target_modules": ["all-linear"]} | given(config)
    )


def given(config: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in config.tuning if value is not None and name != "tuner_type"}
