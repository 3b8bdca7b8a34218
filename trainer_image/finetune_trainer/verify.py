"""Proof that what was exported is the trained model: files read back bitwise, logits compared with transformers and PEFT.

Three levels, each with the ones before it. ``Files``: every file's hash, every key and shape, and every value bitwise. ``Adapter``: the export
loaded by transformers (and PEFT) as a user would, its logits against the trainer's in the run's data type. ``Logits``: the same in float32, and
the imported base too. A difference names the first layer that shows it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, TypeVar

import torch
from torch import distributed

from finetune_trainer import checkpoint, convert, hf_files, lora, model
from finetune_trainer.contract import ArtifactFormat, EngineError, RunConfig, Verification
from finetune_trainer.data import Row
from finetune_trainer.families import Family
from finetune_trainer.hf_files import HFModel
from finetune_trainer.parallel import Ranks

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from transformers import PreTrainedModel

Artifacts = Sequence[tuple[ArtifactFormat, Path]]
Outcome = TypeVar("Outcome")

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference of two logits, as a fraction of the largest logit.

float32: sums of a few thousand products in another order. bfloat16 keeps 8 bits (2^-8 = 4e-3 a rounding) and float16 11; both sides round after
every layer in their own order, and such errors grow about with the root of the number of roundings.
"""

PROMPT_TOKENS = 512
NUM_PROMPTS = 4


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
        decided = best[:, 0] - best[:, 1] > 2 * tolerance * largest
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


def check(
    chunks: Sequence[GPTModel], family: Family, hf: HFModel, config: RunConfig, ranks: Ranks, rows: Sequence[Row], artifacts: Artifacts
) -> Verification:
    """Verify the artifacts at ``output.verification``; the same result on every rank. Collective.

    The model is left as it was, but for level Logits in another type than float32: there it stays in float32.
    """
    level = config.output.verification
    problems = _gather(ranks, _file_problems(chunks, family, hf, ranks, artifacts))
    if problems:
        return Verification(level=level, passed=False, message="; ".join(problems))
    if level == "Files":
        return Verification(level=level, passed=True)
    prompts = sample_prompts(rows, min(PROMPT_TOKENS, int(hf.config["max_position_embeddings"])))
    loadable = [(kind, folder) for kind, folder in artifacts if kind != "megatron"]
    comparisons = [_compare_with(chunks, ranks, hf, kind, folder, prompts) for kind, folder in loadable]
    if level == "Logits":
        _to_float32(chunks)
        comparisons += [_compare_with(chunks, ranks, hf, kind, folder, prompts) for kind, folder in loadable]
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


def _gather(ranks: Ranks, problems: list[str]) -> list[str]:
    """Every rank's problems, without repetition, on every rank."""
    everyone: list[Any] = [None] * ranks.world_size
    distributed.all_gather_object(everyone, problems)
    return sorted({problem for one in everyone for problem in one})


def _file_problems(chunks: Sequence[GPTModel], family: Family, hf: HFModel, ranks: Ranks, artifacts: Artifacts) -> list[str]:
    """What is wrong with the files as this rank sees them: hashes (shared out over the ranks), keys, shapes, and its own share of every tensor bitwise."""
    problems = []
    for index, (kind, folder) in enumerate(artifacts):
        if index % ranks.world_size == ranks.rank:
            problems += _problem_of(lambda folder=folder: hf_files.check_manifest(folder))
        if kind == "huggingface":
            differing = convert.differing_weights(chunks, family, hf, folder, ranks)
        elif kind == "peft":
            differing = convert.differing_adapters(chunks, family, hf, folder, ranks)
        else:
            differing = checkpoint.differing_weights(chunks, folder)
        if differing:
            problems.append(f"{folder}: not what was trained: {', '.join(differing[:8])}{' and more' if len(differing) > 8 else ''}")
    return problems


def _problem_of(step: Callable[[], object]) -> list[str]:
    try:
        step()
    except EngineError as error:
        return [str(error)]
    return []


def _compare_with(chunks: Sequence[GPTModel], ranks: Ranks, hf: HFModel, kind: ArtifactFormat, folder: Path, prompts: list[list[int]]) -> tuple[float, str]:
    """The largest difference to the artifact loaded by transformers and PEFT, and a sentence when they do not agree. Collective; rank 0 holds the loaded model."""
    ours = model.logits(chunks, prompts, ranks)
    states = model.hidden_states(chunks, prompts[:1], ranks)
    dtype = next(iter(chunks[0].parameters())).dtype
    return _on_first_rank(ranks, lambda: _difference(hf, kind, folder, prompts, ours or [], states, dtype, ranks.device))


def _difference(
    hf: HFModel, kind: ArtifactFormat, folder: Path, prompts: list[list[int]], ours: list[torch.Tensor], states: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[float, str]:
    theirs = load(hf.folder, folder if kind == "peft" else None, dtype, device) if kind == "peft" else load(folder, None, dtype, device)
    rows = [_one_row(theirs, prompt) for prompt in prompts]
    padded = _padded_batch(theirs, prompts)
    results = [compare([a.to(b.device) for a, b in zip(ours, batch, strict=True)], batch, TOLERANCE[dtype]) for batch in (rows, padded)]
    worst = max(results, key=lambda result: (not result.agree, result.difference))
    sentence = ""
    if not worst.agree:
        sentence = f"{folder} loaded by {'PEFT' if kind == 'peft' else 'transformers'} is not the trained model ({str(dtype).removeprefix('torch.')}): {worst.describe()}; "
        sentence += first_difference(states, theirs, prompts[0], TOLERANCE[dtype])
    del theirs
    gc.collect()
    return max(result.difference for result in results), sentence


def load(base: Path, adapter: Path | None, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a model folder by transformers, and an adapter folder on it by PEFT, for evaluation; no remote code, no pickle, no network."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True, attn_implementation="sdpa")
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter, use_safetensors=True, local_files_only=True)
    return loaded.to(device).eval()


@torch.no_grad()
def _one_row(loaded: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """Logits ``[tokens, vocab]`` in float32."""
    return loaded(torch.tensor([prompt], device=loaded.device), use_cache=False).logits[0].float()


@torch.no_grad()
def _padded_batch(loaded: PreTrainedModel, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The same rows as one batch, padded on the right and masked; the padding's logits are cut off."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=loaded.device)
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts], device=loaded.device)
    logits = loaded(tokens, attention_mask=mask, use_cache=False).logits.float()
    return [logits[index, : len(prompt)] for index, prompt in enumerate(prompts)]


@torch.no_grad()
def first_difference(states: Mapping[str, torch.Tensor], loaded: PreTrainedModel, prompt: list[int], tolerance: float) -> str:
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
        for module in chunk.modules():
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


def _on_first_rank(ranks: Ranks, work: Callable[[], Outcome]) -> Outcome:
    """Run ``work`` on rank 0 and give its result, or its error, to every rank, so that no rank waits for one that has failed."""
    box: list[Any] = [None, None]
    if ranks.rank == 0:
        try:
            box[0] = work()
        except Exception as error:  # raised again below, on every rank
            box[1] = error
    distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
