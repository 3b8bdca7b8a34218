"""The same LoRA job done by the engine and by transformers + PEFT: losses, gradients of every step, and the weights that come out.

Here q, k, v share one A, and gate and up do; so the reference's are tied too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from factories import make_rows, make_tiny_model
from finetune_trainer.contract import RunConfig
from finetune_trainer.data import Row, load_tokenizer, micro_batches, open_rows, order
from gang import Gang

STEPS = 10
TIED = {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}


def make_config(model: Path, data: Path, output: Path, **sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"source": str(model), "torchDtype": "float32"},
            "data": {"dataset": [str(data)], "maxLength": 512},
            "tuning": {"loraRank": 4, "loraAlpha": 16, "loraDropout": 0.0, "targetModules": ["all-linear"], "useRslora": False},
            "parallelism": {"tensorModelParallelSize": 1, "pipelineModelParallelSize": 1, **sections.get("parallelism", {})},
            "training": {
                "microBatchSize": 2,
                "globalBatchSize": 8,
                "trainIters": STEPS,
                "lr": 2e-3,
                "minLr": 1e-4,
                "lrWarmupIters": 3,
                "recomputeGranularity": "none",
            },
            "run": {"outputDir": str(output)},
        }
    )


@dataclass(frozen=True)
class Step:
    loss: float
    norm: float
    rate: float


def train_with_engine(config: RunConfig, initial: Path) -> list[Step]:
    """Ten steps; the adapter before them is left in ``initial``, the gradients of step N, as an adapter, in ``step-N`` beside it, and the result in ``final``."""
    from finetune_trainer import convert, families, hf_files, lora, model, parallel, train

    parallel.open_process_group(config)
    ranks = parallel.initialize(config.parallelism, config.training.seed)
    hf = hf_files.open_model(config.model)
    family = families.find(hf.config)
    rows = open_rows(config.data, load_tokenizer(hf.folder)).rows
    chunks = model.build(family, hf.config, config, ranks)
    convert.import_base(chunks, family, hf, ranks)
    lora.attach(chunks, config.tuning, config.training.seed)

    def export(folder: Path) -> None:
        convert.export_adapter(chunks, family, hf, ranks, folder, config.tuning, str(hf.folder))

    export(initial)
    trainer = train.prepare(chunks, family, hf.config, config, ranks, STEPS)
    trainer.scheduler.step(0)
    train.set_training(trainer, True)
    reading, steps = order(len(rows), config.training.seed, True), []
    for step in range(STEPS):
        numbers = micro_batches(reading, step, 8, 2, ranks.dp, [len(row) for row in rows])
        batches = [train.collate([rows[number] for number in some], ranks.tp.size, ranks.device) for some in numbers]
        sums = train.sum_up(train.run_forward_backward(trainer, batches), batches, ranks, False)
        factors = [factor.weight for _, layer in lora.adapters(chunks) for factor in (layer.lora_A, layer.lora_B)]
        values = [parameter.detach().clone() for parameter in factors]
        with torch.no_grad():
            for parameter in factors:
                parameter.copy_(parameter.main_grad)
            export(initial.with_name(f"step-{step}"))
            for parameter, value in zip(factors, values, strict=True):
                parameter.copy_(value)
        rate = trainer.learning_rate
        norm, _ = train.update(trainer)
        steps.append(Step(sums.loss / sums.labelled, norm, rate))
    export(initial.with_name("final"))
    return steps


def open_reference(model: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    reference = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    for module in reference.modules():
        for first, others in TIED.items():
            for other in others if hasattr(module, first) else ():
                getattr(module, other).lora_A["default"] = getattr(module, first).lora_A["default"]
    return reference.train()


def reference_loss(reference: Any, rows: list[Row]) -> torch.Tensor:
    """Mean cross entropy over the labelled tokens of a padded batch."""
    longest = max(len(row.input_ids) for row in rows)
    tokens, mask, labels = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
    labels.fill_(-100)
    for index, row in enumerate(rows):
        ids = torch.as_tensor(row.input_ids.astype("int64"))
        tokens[index, : len(ids)], mask[index, : len(ids)] = ids, 1
        labels[index, : len(ids)] = torch.where(torch.as_tensor(row.labelled), ids, -100)
    logits = reference(tokens, attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def gradients_of(reference: Any) -> dict[str, torch.Tensor]:
    """By the names of PEFT's files; a tied A appears under its first name only."""
    return {name.replace(".default", ""): parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}


def check_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """‖Δg‖/‖g‖ over all at most 1e-5, of each tensor at most 1e-3."""
    difference = torch.cat([(found[name] - gradient).flatten() for name, gradient in expected.items()]).norm()
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    assert difference <= 1e-5 * whole
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def check_job(model: Path, data: Path, folder: Path, gang: Gang, **sections: dict[str, Any]) -> None:
    config = make_config(model, data, folder / "run", **sections)
    initial = folder / "initial"
    steps = gang.run(train_with_engine, config, initial)[0]
    reference = open_reference(model, initial)
    rows = open_rows(config.data, load_tokenizer(model)).rows
    reading = order(len(rows), config.training.seed, True)
    optimizer = torch.optim.AdamW([each for each in reference.parameters() if each.requires_grad], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for number, step in enumerate(steps):
        loss = reference_loss(reference, [rows[reading[number * 8 + index]] for index in range(8)])
        optimizer.zero_grad()
        loss.backward()
        assert abs(loss.item() - step.loss) <= 1e-5 * loss.item()
        check_gradients(load_file(initial.with_name(f"step-{number}") / "adapter_model.safetensors"), gradients_of(reference))
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        assert abs(norm.item() - step.norm) <= 1e-4 * norm.item()
        for group in optimizer.param_groups:
            group["lr"] = step.rate
        optimizer.step()
    trained = load_file(folder / "final" / "adapter_model.safetensors")
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(trained[name.replace(".default", "")], parameter, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_losses_and_gradients_are_those_of_transformers_and_peft(family: str, gang1: Gang, tmp_path: Path) -> None:
    check_job(make_tiny_model(family, tmp_path / "model"), make_rows(tmp_path, 40), tmp_path, gang1)


TWO_PROCESSES = {
    "TP2+SP": {"tensorModelParallelSize": 2, "sequenceParallel": True},
    "PP2": {"pipelineModelParallelSize": 2},
    "DP2": {"useDistributedOptimizer": False},  # with it, a process has the sum of the gradients for its share of the weights alone
}


@pytest.mark.parametrize("parallelism", TWO_PROCESSES.values(), ids=TWO_PROCESSES)
def test_two_processes_find_the_same_gradients(parallelism: dict[str, Any], gang2: Gang, tmp_path: Path) -> None:
    check_job(make_tiny_model("qwen3", tmp_path / "model"), make_rows(tmp_path, 40), tmp_path, gang2, parallelism=parallelism)
