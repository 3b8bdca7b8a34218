"""Proof that what was exported is the trained model: files read back bitwise, logits compared with transformers and PEFT.

Three levels, each with the ones before it. ``Files``: every file's hash, every key and shape, and every value bitwise. ``Adapter``: the export
loaded by transformers (and PEFT) as a user would, its logits against the trainer's in the run's data type. ``Logits``: the same in float32, and
the imported base too. A difference names the first layer that shows it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune_trainer import checkpoint, convert, hf_files, lora, model
from finetune_trainer.agreement import from_every, from_first_however_long
from finetune_trainer.attention import SdpaAttention
from finetune_trainer.contract import ArtifactFormat, ConfigurationError, ModelError, RunConfig, Verification
from finetune_trainer.data import Row
from finetune_trainer.families import Family
from finetune_trainer.hf_files import HFModel
from finetune_trainer.parallel import Ranks

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

Artifacts = Sequence[tuple[ArtifactFormat, Path]]
Loaded = Any  # transformers' or PEFT's model

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference of two logits, as a fraction of the largest logit.

float32: sums of a few thousand products in another order. bfloat16 keeps 8 bits (2^-8 = 4e-3 a rounding) and float16 11; both sides round after
every layer in their own order, and such errors grow about with the root of the number of roundings.
"""

PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Comparison:
    """Two models' logits on the same rows."""

    difference: float
    largest_logit: float
    argmax_mismatches: int
    tolerance: float

    @property
    def agree(self) -> bool:
        """Whether the difference is within the tolerance and every prediction that is not a tie is the same; false for anything not finite."""
        return self.difference <= self.tolerance * self.largest_logit and self.argmax_mismatches == 0

    def describe(self) -> str:
        """The figures in one sentence."""
        return (
            f"the largest difference of two logits is {self.difference:.3g}, which is {self.difference / self.largest_logit:.2g} of the largest logit "
            f"(at most {self.tolerance:.2g} is allowed); {self.argmax_mismatches} predictions differ"
        )


def compare(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], tolerance: float) -> Comparison:
    """Compare logits row by row, ``[tokens, vocab]`` each; a prediction whose two best lie closer than the tolerance may differ."""
    difference = torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]).max().item()
    largest = max(b.abs().max().item() for b in theirs)
    mismatches = 0
    for a, b in zip(ours, theirs, strict=True):
        best = b.topk(2, dim=-1).values  # [tokens, 2]
        decided = best[:, 0] - best[:, 1] > tolerance * largest
        mismatches += int((decided & (a.argmax(-1) != b.argmax(-1))).sum())
    return Comparison(difference, largest, mismatches, tolerance)


def sample_prompts(rows: Sequence[Row], max_tokens: int) -> list[list[int]]:
    """Four prompts out of the training rows: the shortest, one from the middle, the longest, and rows joined up to ``max_tokens`` tokens; none is longer."""
    by_length = sorted((row.input_ids for row in rows), key=len)
    chosen = [by_length[0], by_length[len(by_length) // 2], by_length[-1]]
    joined: list[int] = []
    for ids in by_length:
        joined.extend(ids.tolist())
        if len(joined) >= max_tokens:
            break
    return [ids.tolist()[:max_tokens] for ids in chosen] + [joined[:max_tokens]]


def check(chunks: Sequence[GPTModel], family: Family, hf: HFModel, config: RunConfig, ranks: Ranks, rows: Sequence[Row], artifacts: Artifacts) -> Verification:
    """Verify the artifacts at ``output.verification``; the same result on every rank. Collective.

    The model is left as it was, but for level Logits in another type than float32: there it stays in float32.
    """
    level = config.output.verification
    problems = sorted({problem for one in from_every(_file_problems(chunks, family, hf, ranks, artifacts)) for problem in one})
    if problems:
        return Verification(level=level, passed=False, message="; ".join(problems))
    if level == "Files":
        return Verification(level=level, passed=True)
    prompts = sample_prompts(rows, min(PROMPT_TOKENS, int(hf.config["max_position_embeddings"])))
    loadable = [(kind, folder) for kind, folder in artifacts if kind != "megatron"]
    comparisons = [_compare_with(chunks, ranks, hf, kind, folder, prompts) for kind, folder in loadable]
    if level == "Logits":
        if config.model.torch_dtype != "float32":
            comparisons += _compare_in_float32(chunks, ranks, hf, loadable, prompts)
        if config.tuning.tuner_type == "lora":
            with _without_adapters(chunks):
                comparisons.append(_compare_with(chunks, ranks, hf, "huggingface", hf.folder, prompts))
    failures = [sentence for _, sentence in comparisons if sentence]
    return Verification(
        level=level,
        passed=not failures,
        max_logit_difference=max((difference for difference, _ in comparisons), default=None),
        message="; ".join(failures),
    )


def _file_problems(chunks: Sequence[GPTModel], family: Family, hf: HFModel, ranks: Ranks, artifacts: Artifacts) -> list[str]:
    """What is wrong with the files as this rank sees them: hashes (shared out over the ranks), keys, shapes, and its own share of every tensor bitwise."""
    problems = []
    for index, (kind, folder) in enumerate(artifacts):
        try:
            if index % ranks.world_size == ranks.rank:
                hf_files.check_manifest(folder)
            differing = _differing(chunks, family, hf, ranks, kind, folder)
        except ModelError as error:
            problems.append(str(error))
            continue
        if differing:
            problems.append(f"{folder}: not what was trained: {', '.join(differing[:8])}{' and more' if len(differing) > 8 else ''}")
    return problems


def _differing(chunks: Sequence[GPTModel], family: Family, hf: HFModel, ranks: Ranks, kind: ArtifactFormat, folder: Path) -> list[str]:
    if kind == "megatron":
        return checkpoint.differing_weights(chunks, folder)
    find = convert.differing_weights if kind == "huggingface" else convert.differing_adapters
    return find(chunks, family, hf, folder, ranks)


@dataclass(frozen=True)
class Trained:
    """The trainer's side of a comparison."""

    prompts: list[list[int]]
    logits: list[torch.Tensor]
    """Per prompt ``[tokens, vocab]``, float32."""
    states: Mapping[str, torch.Tensor]
    """Every layer's output for the first prompt (``model.hidden_states``)."""
    dtype: torch.dtype


def _compare_with(chunks: Sequence[GPTModel], ranks: Ranks, hf: HFModel, kind: ArtifactFormat, folder: Path, prompts: list[list[int]]) -> tuple[float, str]:
    """The largest difference to the artifact loaded by transformers and PEFT, and a sentence when they do not agree. Collective; rank 0 holds the loaded model."""
    dtype = next(iter(chunks[0].parameters())).dtype
    trained = Trained(prompts, model.logits(chunks, prompts, ranks), model.hidden_states(chunks, prompts[:1], ranks), dtype)
    return from_first_however_long(lambda: _find_difference(trained, hf, kind, folder, choose_device(hf, dtype, ranks.device)))


def _compare_in_float32(chunks: Sequence[GPTModel], ranks: Ranks, hf: HFModel, artifacts: Artifacts, prompts: list[list[int]]) -> list[tuple[float, str]]:
    """Compare as the files are: merged weights were rounded to the type of the run when they were written, so here they are too. Collective.

    Leaves the model in float32.
    """
    found = []
    with checkpoint.merged(chunks):
        _to_float32(chunks)
        found += [_compare_with(chunks, ranks, hf, kind, folder, prompts) for kind, folder in artifacts if kind == "huggingface"]
    _to_float32(chunks)
    return found + [_compare_with(chunks, ranks, hf, kind, folder, prompts) for kind, folder in artifacts if kind == "peft"]


def _find_difference(trained: Trained, hf: HFModel, kind: ArtifactFormat, folder: Path, device: torch.device) -> tuple[float, str]:
    tolerance = TOLERANCE[trained.dtype]
    loaded = load(hf.folder, folder, trained.dtype, device) if kind == "peft" else load(folder, None, trained.dtype, device)
    ours = [logits.to(device) for logits in trained.logits]
    results = [
        compare(ours, theirs, tolerance) for theirs in ([_one_row(loaded, prompt) for prompt in trained.prompts], _padded_batch(loaded, trained.prompts))
    ]
    worst = max(results, key=lambda result: (not result.agree, result.difference))
    sentence = ""
    if not worst.agree:
        reader, dtype = ("PEFT" if kind == "peft" else "transformers"), str(trained.dtype).removeprefix("torch.")
        where = first_difference(trained.states, loaded, trained.prompts[0], tolerance)
        sentence = f"{folder} loaded by {reader} is not the model in the trainer ({dtype}): {worst.describe()}; {where}"
    del loaded
    gc.collect()
    return max(result.difference for result in results), sentence


def needed_bytes(hf: HFModel, dtype: torch.dtype) -> int:
    """Memory of the model loaded by transformers in ``dtype``; its activations on the few prompts count a tenth."""
    return int(1.1 * dtype.itemsize * sum(math.prod(entry.shape) for entry in hf.entries.values()))


def choose_device(hf: HFModel, dtype: torch.dtype, device: torch.device) -> torch.device:
    """``device`` where it has room for the loaded model beside the trainer's, else the CPU."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < needed_bytes(hf, dtype):
        return torch.device("cpu")
    return device


def check_memory(hf: HFModel, config: RunConfig, host_bytes: float) -> None:
    """Raise ConfigurationError, before training, where this host cannot hold the model once more in the type that ``output.verification`` needs."""
    level = config.output.verification
    needed = needed_bytes(hf, torch.float32 if level == "Logits" else getattr(torch, config.model.torch_dtype or "float32"))
    if level != "Files" and needed > host_bytes:
        raise ConfigurationError(
            f"output.verification is {level}; it loads the model once more and needs {needed / 2**30:.1f} GiB of host memory, this host has {host_bytes / 2**30:.1f} GiB: "
            "Files needs none"
        )


def load(base: Path, adapter: Path | None, dtype: torch.dtype, device: torch.device) -> Loaded:
    """Load a model folder by transformers, and an adapter folder on it by PEFT, for evaluation; no remote code, no pickle, no network."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True, attn_implementation="sdpa"
    )
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter, use_safetensors=True, local_files_only=True)
    return loaded.to(device).eval()


@torch.no_grad()
def _one_row(loaded: Loaded, prompt: list[int]) -> torch.Tensor:
    """Logits ``[tokens, vocab]`` in float32."""
    logits: torch.Tensor = loaded(torch.tensor([prompt], device=loaded.device), use_cache=False).logits
    return logits[0].float()


@torch.no_grad()
def _padded_batch(loaded: Loaded, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The same rows as one batch, padded on the right and masked; the padding's logits are cut off."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=loaded.device)
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts], device=loaded.device)
    logits = loaded(tokens, attention_mask=mask, use_cache=False).logits.float()
    return [logits[index, : len(prompt)] for index, prompt in enumerate(prompts)]


@torch.no_grad()
def first_difference(states: Mapping[str, torch.Tensor], loaded: Loaded, prompt: list[int], tolerance: float) -> str:
    """Name the first of the trainer's layers (``model.hidden_states``) whose output is not the loaded model's on the same row."""
    theirs = loaded(torch.tensor([prompt], device=loaded.device), use_cache=False, output_hidden_states=True).hidden_states
    # transformers gives the embedding, every layer but the last, and the last layer after the final norm: the last layer itself is not to be had.
    names = [name for name in states if name != list(states)[-2]]
    for name, expected in zip(names, theirs, strict=True):
        difference = (states[name].to(expected.device) - expected[0].float()).abs().max().item()
        if not difference <= tolerance * expected.abs().max().item():
            where = f"{list(states)[-2]} or {name}" if name == names[-1] else name
            return f"the first layer that differs is {where} (by {difference:.3g})"
    return "every layer's output agrees: the difference is in the output layer"


def _to_float32(chunks: Sequence[GPTModel]) -> None:
    for chunk in chunks:
        chunk.float()
        for module in list(chunk.modules()):
            if hasattr(module, "core_attention"):
                # transformer-engine's flash and fused kernels, one of which the run may have chosen for good, have no float32.
                module.core_attention = SdpaAttention(module.config, module.layer_number, None, "self")
            if hasattr(module, "config"):
                module.config.params_dtype = module.config.pipeline_dtype = module.config.autocast_dtype = torch.float32


@contextmanager
def _without_adapters(chunks: Sequence[GPTModel]) -> Iterator[None]:
    scales = [(layer, layer.scale) for _, layer in lora.adapters(chunks)]
    for layer, _ in scales:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in scales:
            layer.scale = scale
