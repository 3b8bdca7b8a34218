"""From a run's options, the facts of a model and the memory of a machine to every value that the options left open.

Pure: the contract and the standard library only, so that ``finetune plan`` can say beforehand what the trainer will choose.
Every rank computes the same. What cannot work is refused here, before a weight is read, with the field's API name and the
values that would do.

Of all layouts (tensor x pipeline) that the model and the batch allow, the one with the fewest processes per copy of the model
that fits in memory (``memory.py``) is chosen, tensor before pipeline; then no recomputation before full recomputation; then the
largest micro batch (a power of two). A size that was written is kept. When nothing fits, the smallest is taken and a note says
so: the estimate is not exact enough to refuse a run. A CPU's micro batch is at most ``CPU_MICRO_BATCH``. Where maxLength is
silent, it is the model's longest (as in Megatron-SWIFT: no row that the model can read is dropped). Memory is estimated with the
longest row there is; before rows are read, with rows of maxLength, or of ``ASSUMED_ROW_TOKENS`` where that is silent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any, cast

from pydantic.alias_generators import to_camel

from finetune_trainer.contract import ConfigurationError, Contract, Flag, ParallelismConfig, RunConfig, TrainingConfig, nearest
from finetune_trainer.memory import Machine, ModelFacts, data_parallel_size, estimate_memory, read_facts, stage_layers

__all__ = [
    "Machine",
    "ModelFacts",
    "Resolution",
    "data_parallel_size",
    "describe_shortage",
    "estimate_memory",
    "layout_problem",
    "read_facts",
    "resolve",
    "row_limit",
    "stage_layers",
    "total_steps",
]

ASSUMED_ROW_TOKENS = 2048
CPU_MICRO_BATCH = 8
USABLE_MEMORY = 0.9
OUTSIDE_GIB = {"cuda": 2.0, "cpu": 0.0}
"""What a GPU holds beside what the estimate counts: CUDA itself, NCCL's buffers."""
TARGET_MODULES = ("all-linear", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Resolution:
    """A whole RunConfig, what of it was chosen (by dotted API name), sentences to say once, GiB per process and the tokens of a row that they were estimated with."""

    config: RunConfig
    chosen: dict[str, Any]
    notes: tuple[str, ...]
    memory_gib: float
    row_tokens: int


def total_steps(config: RunConfig, num_rows: int) -> int:
    """Optimizer steps of a run over ``num_rows`` rows: the whole global batches of all epochs, at least one; without numTrainEpochs, trainIters."""
    if config.training.num_train_epochs is None and config.training.train_iters is not None:
        return config.training.train_iters
    return max(1, num_rows * (config.training.num_train_epochs or 1) // config.training.global_batch_size)


def row_limit(config: RunConfig, facts: ModelFacts) -> int:
    """The most tokens that a row may have: ``data.maxLength``, or where that is silent what the model can read."""
    return config.data.max_length or facts.max_position_embeddings


def resolve(config: RunConfig, facts: ModelFacts, machine: Machine, row_tokens: int | None = None) -> Resolution:
    """Fill every value that ``config`` leaves to the engine; raises ConfigurationError for what cannot work.

    ``row_tokens`` are those of the longest row, None before rows are read. What is refused, and every value that is not chosen by memory, is the same with it and without.
    """
    notes = _inert_notes(config)
    _refuse_unbuilt(config.parallelism)
    filled = _fill_tuning(_fill_training(_fill_data(config, facts, machine)))
    _check_options(filled)
    filled = _drop_without_effect(filled, machine, notes)
    tokens = _assumed_row_tokens(config, facts) if row_tokens is None else row_tokens
    resolved, memory = _choose_layout(filled, facts, machine, tokens)
    if not _fits(memory, machine):
        longest = f"rows of {tokens} tokens, as is assumed until they are read," if row_tokens is None else f"rows of at most {tokens} tokens"
        notes.append(f"about {memory:.1f} GiB a process are needed with {longest} and {machine.memory_gib:.1f} GiB are there: the run may end as OutOfMemory")
    if resolved.parallelism.sequence_parallel and resolved.parallelism.tensor_model_parallel_size == 1:
        resolved = _with(resolved, "parallelism", sequence_parallel=False)
        notes.append("parallelism.sequenceParallel has no effect: tensorModelParallelSize is 1")
    if config.training.train_iters is not None and config.training.num_train_epochs is not None:
        notes.append("training.trainIters has no effect: numTrainEpochs takes precedence")
    return Resolution(resolved, _chosen(config, resolved), tuple(notes), round(memory, 2), tokens)


# Values that need no search


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    part: Contract = getattr(config, section)
    return config.model_copy(update={section: part.model_copy(update=values)})


def _fill(config: RunConfig, section: str, **values: Any) -> RunConfig:
    part = getattr(config, section)
    return _with(config, section, **{name: value for name, value in values.items() if getattr(part, name) is None})


def _fill_data(config: RunConfig, facts: ModelFacts, machine: Machine) -> RunConfig:
    filled = _fill(config, "model", torch_dtype="float32" if machine.device == "cpu" else facts.torch_dtype)
    return _fill(filled, "data", max_length=row_limit(config, facts))


def _fill_tuning(config: RunConfig) -> RunConfig:
    if config.tuning.tuner_type == "full":
        return _fill(config, "output", formats=["huggingface"])
    filled = _fill(config, "output", formats=["peft"])
    return _fill(filled, "tuning", lora_rank=8, lora_alpha=32.0, lora_dropout=0.05, target_modules=["all-linear"], use_rslora=False)


def _fill_training(config: RunConfig) -> RunConfig:
    training = config.training
    filled = _fill(config, "training", lr=1e-4 if config.tuning.tuner_type == "lora" else 1e-5, min_lr=0.0)
    if training.train_iters is None:
        filled = _fill(filled, "training", num_train_epochs=1)
    if training.recompute_granularity == "full":
        filled = _fill(filled, "training", recompute_method="uniform", recompute_num_layers=1)
    if training.recompute_granularity == "selective":
        filled = _fill(filled, "training", recompute_modules=["core_attn"])
    return _fill(filled, "parallelism", context_parallel_size=1, expert_model_parallel_size=1, expert_tensor_parallel_size=1)


def _drop_without_effect(config: RunConfig, machine: Machine, notes: list[str]) -> RunConfig:
    """Switch off what has no meaning here, each with a note."""
    training = config.training
    if machine.device == "cpu":
        if training.attention_backend not in (None, "auto", "local"):
            notes.append(f"training.attentionBackend {training.attention_backend} has no effect: a CPU has one attention")
        config = _with(config, "training", attention_backend="local")
    if training.optimizer == "sgd" and config.parallelism.use_distributed_optimizer:
        config = _with(config, "parallelism", use_distributed_optimizer=False)
        notes.append("parallelism.useDistributedOptimizer has no effect: Megatron-core distributes the state of adam only")
    return _fill(config, "training", attention_backend="auto")


def _inert_notes(config: RunConfig) -> list[str]:
    notes = []
    for section in _sections(config):
        part = getattr(config, section)
        for name, field in type(part).model_fields.items():
            inert = next((item.inert for item in field.metadata if isinstance(item, Flag)), None)
            if inert and getattr(part, name) != field.default:
                notes.append(f"{section}.{to_camel(name)} has no effect: {inert}")
    return notes


def _sections(config: RunConfig) -> list[str]:
    return [name for name in type(config).model_fields if name != "run" and isinstance(getattr(config, name), Contract)]


def _chosen(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    chosen = {}
    for section in _sections(before):
        old, new = getattr(before, section), getattr(after, section)
        for name in type(old).model_fields:
            if getattr(old, name) is None and getattr(new, name) is not None:
                chosen[f"{section}.{to_camel(name)}"] = getattr(new, name)
    return chosen


# Refusals that need no layout


def _refuse_unbuilt(layout: ParallelismConfig) -> None:
    for name in ("context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"):
        if (getattr(layout, name) or 1) > 1:
            raise ConfigurationError(f"parallelism.{to_camel(name)} is {getattr(layout, name)}; this version supports 1 only")


def _check_options(config: RunConfig) -> None:
    """Refuse options that contradict each other; every value but the layout is filled."""
    training, formats = config.training, config.output.formats or []
    for module in config.tuning.target_modules or []:
        if module not in TARGET_MODULES:
            raise ConfigurationError(f"tuning.targetModules has {module!r}{nearest(module, list(TARGET_MODULES))}; it may have {', '.join(TARGET_MODULES)}")
    if config.tuning.tuner_type == "full" and "peft" in formats:
        raise ConfigurationError("output.formats has peft; it needs tuning.tunerType lora (found full)")
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(training, name) > cast(float, training.lr):
            raise ConfigurationError(f"training.{to_camel(name)} is {getattr(training, name):g}; it must be at most training.lr ({training.lr:g})")
    _check_warmup(training)
    if training.recompute_modules is not None and training.recompute_granularity != "selective":
        raise ConfigurationError(f"training.recomputeModules is set; it needs recomputeGranularity selective (found {training.recompute_granularity})")
    if training.recompute_num_layers is not None and training.recompute_granularity != "full":
        raise ConfigurationError(f"training.recomputeNumLayers is set; it needs recomputeGranularity full (found {training.recompute_granularity})")
    if config.parallelism.overlap_param_gather and not (config.parallelism.overlap_grad_reduce and config.parallelism.use_distributed_optimizer):
        raise ConfigurationError("parallelism.overlapParamGather is true; it needs overlapGradReduce and useDistributedOptimizer")


def _check_warmup(training: TrainingConfig) -> None:
    """What can be said about the warm-up before the rows are counted."""
    if training.lr_warmup_fraction is not None:
        if training.lr_warmup_fraction >= 1:
            raise ConfigurationError(f"training.lrWarmupFraction is {training.lr_warmup_fraction:g}; it must be less than 1, so that the rate can decay")
    elif training.lr_decay_iters is not None and training.lr_warmup_iters >= training.lr_decay_iters:
        raise ConfigurationError(f"training.lrWarmupIters is {training.lr_warmup_iters}; it must be less than lrDecayIters ({training.lr_decay_iters})")


# The layout


def _choose_layout(config: RunConfig, facts: ModelFacts, machine: Machine, row_tokens: int) -> tuple[RunConfig, float]:
    """The first candidate that fits in memory, else the smallest, with its GiB per process."""
    smallest: tuple[RunConfig, float] | None = None
    for candidate in _candidates(config, facts, machine):
        memory = estimate_memory(candidate, facts, machine, row_tokens)
        if _fits(memory, machine):
            return candidate, memory
        if smallest is None or memory < smallest[1]:
            smallest = candidate, memory
    assert smallest is not None, "_layouts gives at least one layout or raises"
    return smallest


def _fits(memory_gib: float, machine: Machine) -> bool:
    return machine.memory_gib <= 0 or memory_gib + OUTSIDE_GIB[machine.device] <= USABLE_MEMORY * machine.memory_gib


def _candidates(config: RunConfig, facts: ModelFacts, machine: Machine) -> Iterator[RunConfig]:
    for layout in _layouts(config, facts, machine.world_size):
        for recompute in _recomputes(layout):
            for micro_batch_size in _micro_batch_sizes(layout, machine):
                yield _with(layout, "training", micro_batch_size=micro_batch_size, **recompute)


def describe_shortage(config: RunConfig, facts: ModelFacts, machine: Machine, row_tokens: int) -> str:
    """What a resolved run that ran out of memory was to need with rows of ``row_tokens``, what was there, and the estimates of options that need less."""
    now = estimate_memory(config, facts, machine, row_tokens)
    needs = [(option, estimate_memory(candidate, facts, machine, tokens)) for option, candidate, tokens in _lighter(config, facts, machine, row_tokens)]
    ways = [f"{option} ({need:.1f} GiB)" for option, need in needs if need < now]
    advice = f"less is needed with {', '.join(ways)}" if ways else "no option needs less"
    return f"with rows of {row_tokens} tokens about {now:.1f} GiB a process were estimated, {machine.memory_gib:.1f} GiB were there; {advice}"


def _lighter(config: RunConfig, facts: ModelFacts, machine: Machine, row_tokens: int) -> Iterator[tuple[str, RunConfig, int]]:
    """Single changes of a resolved run that need less memory: the name of the option, the run, tokens of a row."""
    training, tensor = config.training, config.parallelism.tensor_model_parallel_size or 1
    if training.recompute_granularity != "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1, "recompute_modules": None}
        yield "training.recomputeGranularity full", _with(config, "training", **recompute), row_tokens
    if (training.micro_batch_size or 1) > 1:
        yield "training.microBatchSize 1", _with(config, "training", micro_batch_size=1), row_tokens
    for size in _divisors(_tensor_limit(facts)):
        wider = _with(config, "parallelism", tensor_model_parallel_size=size)
        if size > tensor and layout_problem(wider, facts, machine.world_size) is None:
            yield f"parallelism.tensorModelParallelSize {size}", wider, row_tokens
            break
    yield f"data.maxLength {row_tokens // 2}", config, row_tokens // 2


def _layouts(config: RunConfig, facts: ModelFacts, world_size: int) -> list[RunConfig]:
    """Every layout that the model, the processes and the batch allow, best first; raises what is wrong with the first when there is none."""
    layout = config.parallelism
    tensor_sizes = [layout.tensor_model_parallel_size] if layout.tensor_model_parallel_size else _divisors(_tensor_limit(facts))
    pipeline_sizes = [layout.pipeline_model_parallel_size] if layout.pipeline_model_parallel_size else _divisors(world_size)
    sizes = sorted(((tensor, pipeline) for tensor in tensor_sizes for pipeline in pipeline_sizes), key=lambda pair: (pair[0] * pair[1], pair[1]))
    configs = [_with(config, "parallelism", tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline) for tensor, pipeline in sizes]
    problems = [layout_problem(candidate, facts, world_size) for candidate in configs]
    possible = [candidate for candidate, problem in zip(configs, problems, strict=True) if problem is None]
    if not possible:
        raise ConfigurationError(str(problems[0]))
    return possible


def _recomputes(config: RunConfig) -> list[dict[str, Any]]:
    if config.training.recompute_granularity is not None:
        return [{}]
    return [{"recompute_granularity": "none"}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}]


def _micro_batch_sizes(config: RunConfig, machine: Machine) -> list[int]:
    """Powers of two that divide a data-parallel process's rows, largest first; with a pipeline, small enough to keep every stage busy."""
    if config.training.micro_batch_size is not None:
        return [config.training.micro_batch_size]
    rows = config.training.global_batch_size // data_parallel_size(config, machine.world_size)
    limit = max(1, rows // (config.parallelism.pipeline_model_parallel_size or 1))
    limit = min(limit, CPU_MICRO_BATCH) if machine.device == "cpu" else limit
    return [size for size in (2**power for power in range(rows.bit_length(), -1, -1)) if rows % size == 0 and size <= limit]


def layout_problem(config: RunConfig, facts: ModelFacts, world_size: int) -> str | None:
    """What is wrong with a layout whose tensor and pipeline sizes are filled, in a sentence that names values that would do; None when nothing is."""
    checks = (_tensor_problem(config, facts), _stages_problem(config, facts), _world_problem(config, world_size))
    problem = next((found for found in checks if found), None)
    return problem or _batch_problem(config, world_size) or _recompute_problem(config, facts)


def _tensor_limit(facts: ModelFacts) -> int:
    return gcd(facts.num_attention_heads, facts.num_query_groups, facts.ffn_hidden_size)


def _tensor_problem(config: RunConfig, facts: ModelFacts) -> str | None:
    size = cast(int, config.parallelism.tensor_model_parallel_size)
    if _tensor_limit(facts) % size == 0:
        return None
    whole = f"num_key_value_heads ({facts.num_query_groups}) and num_attention_heads ({facts.num_attention_heads})"
    if gcd(facts.num_query_groups, facts.num_attention_heads) % size == 0:
        whole = f"intermediate_size ({facts.ffn_hidden_size})"
    return f"parallelism.tensorModelParallelSize is {size}; it must divide {whole} of the model: {_either(_divisors(_tensor_limit(facts)))}"


def _stages_problem(config: RunConfig, facts: ModelFacts) -> str | None:
    layout = config.parallelism
    stages, total = layout.pipeline_model_parallel_size or 1, facts.num_layers
    ends = {name: getattr(layout, name) for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")}
    written = [f"parallelism.{to_camel(name)} {value}" for name, value in ends.items() if value is not None]
    if written and stages == 1:
        return f"{' and '.join(written)} {_is_are(written)} set; pipelineModelParallelSize must then be at least 2 (found 1)"
    shares = stage_layers(config, total)
    if sum(shares) == total and len(shares) == stages and min(shares) >= 1:
        return None
    if not written:
        wanted = f"it must divide num_hidden_layers ({total}) of the model: {_either(_divisors(total))}"
        return f"parallelism.pipelineModelParallelSize is {stages}; {wanted}; or write decoderFirstPipelineNumLayers or decoderLastPipelineNumLayers"
    middle = stages - len(written)
    wanted = f"a multiple of {middle}, at least {middle}, for the {middle} stages between" if middle else "none"
    left = total - sum(value or 0 for value in ends.values())
    return f"{' and '.join(written)} leave {left} of num_hidden_layers ({total}); with pipelineModelParallelSize {stages} they must leave {wanted}"


def _world_problem(config: RunConfig, world_size: int) -> str | None:
    tensor, pipeline = config.parallelism.tensor_model_parallel_size or 1, config.parallelism.pipeline_model_parallel_size or 1
    if world_size % (tensor * pipeline) == 0:
        return None
    product = f"parallelism.tensorModelParallelSize {tensor} x pipelineModelParallelSize {pipeline} = {tensor * pipeline}"
    return f"{product}; it must divide the number of processes ({world_size}): {_either(_divisors(world_size))}"


def _batch_problem(config: RunConfig, world_size: int) -> str | None:
    training, data_parallel = config.training, data_parallel_size(config, world_size)
    unit = (training.micro_batch_size or 1) * data_parallel
    batch = training.global_batch_size
    if batch % unit == 0:
        return None
    factors = f"the data-parallel size ({data_parallel})"
    if training.micro_batch_size is not None:
        factors = f"microBatchSize ({training.micro_batch_size}) x {factors} = {unit}"
    near = [value for value in (batch // unit * unit, (batch // unit + 1) * unit) if value]
    return f"training.globalBatchSize is {batch}; it must be a multiple of {factors}: {_either(near)}"


def _recompute_problem(config: RunConfig, facts: ModelFacts) -> str | None:
    training = config.training
    if training.recompute_method is None or training.recompute_num_layers is None:
        return None
    shares = stage_layers(config, facts.num_layers)
    limit = gcd(*shares)
    if training.recompute_method == "block" or limit % training.recompute_num_layers == 0:
        return None
    named = _either(sorted(set(shares)), "and")
    return f"training.recomputeNumLayers is {training.recompute_num_layers}; with uniform it must divide the layers of each stage ({named}): {_either(_divisors(limit))}"


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


def _either(values: list[int], word: str = "or") -> str:
    texts = [str(value) for value in values]
    return f"{', '.join(texts[:-1])} {word} {texts[-1]}" if len(texts) > 1 else texts[0]


def _is_are(items: list[str]) -> str:
    return "is" if len(items) == 1 else "are"


def _assumed_row_tokens(config: RunConfig, facts: ModelFacts) -> int:
    if config.data.max_length is not None:
        return config.data.max_length
    return facts.max_position_embeddings if config.data.packing else min(facts.max_position_embeddings, ASSUMED_ROW_TOKENS)
