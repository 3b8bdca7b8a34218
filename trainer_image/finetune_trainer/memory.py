"""What a model and a machine are to the resolver, and how much memory a process of a run needs.

Pure. **Memory of one process**, in bytes; ``t``, ``p``, ``d`` are the tensor, pipeline and data-parallel sizes, ``b`` the bytes of the
run's data type (4 or 2), and the stage of the pipeline that needs most counts::

    weights        b x P / t            P: the stage's layers, and the embedding on the first and the output layer on the last stage
                                        (tied: one matrix on a single stage, a copy on each of several)
    gradients      4 x T                T: trained parameters of the process: all of its share, or LoRA's
    main weights   4 x T / d            only where b is 2
    Adam           8 x T / d            sgd: 4; without the distributed optimizer d is 1
    LoRA's own     b x T                A (replicated for linear_qkv and linear_fc1, cut for the others) and B
    activations    b x tokens x (what the layers of the stage keep) x (micro batches in flight: at most p - stage)
    the larger of
      a layer      b x tokens x (3 f / t, and what full recomputation makes again of one group of layers): the gradients of one layer's MLP, at work
      the output   on the last stage: logits, in their place their gradient, and the gradient of its input. Frozen (LoRA): PIECE_BYTES of logits at a time;
                   trained: b x tokens x vocabulary / t, and the weight's gradient
    overhead       OVERHEAD_GIB         workspaces; on a CPU, where the process's whole memory counts, its libraries

What a GPU holds outside of the allocator (CUDA itself, NCCL's buffers, fragments) is in ``resolve``'s judgement of what fits.

A layer keeps, per token: ``4 h`` (its input, both norms' outputs, the sum between); of attention, over ``t``, on a GPU ``2 n_q + 2 n_kv`` (queries,
keys, values, the result), on a CPU ``6 n_q + n_kv`` (each head has its own copy of keys and values there, and results are put together again); of
the MLP, over ``t``, ``3 f`` (gate and up projection, the activation). LoRA's dropout keeps for each number of a linear layer's input whether it was dropped: one bit on a GPU up
to MAX_KERNEL_RANK, else a byte. Sequence parallelism cuts the ``h`` terms by ``t`` too. Full recomputation keeps ``h`` per group of layers; selective leaves out what its modules recompute. ``tokens`` is micro batch x
tokens of a row, all of them labelled.

Measured once on a CPU (SmolLM2-135M, float32, one process, LoRA, rows of 464 tokens), in GiB, with the estimate in brackets: micro batch 8: 10.2 (9.3), micro
batch 2: 4.7 (4.3), micro batch 8 with full recomputation: 3.2 (3.8). On a GPU: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from finetune_trainer.contract import ModelError, RunConfig, TorchDtype

OVERHEAD_GIB: Mapping[str, float] = {"cuda": 0.25, "cpu": 2.0}
PIECE_BYTES = 2**29
"""Logits that are in memory at a time while the output layer is frozen."""
MAX_KERNEL_RANK = 64
"""Of an adapter, on a GPU: the sums of a larger rank would not fit into its registers, so torch's functions take the place of kernels."""
GIB = 2.0**30

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class ModelFacts:
    """What a config.json says about sizes; names are Megatron-core's."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    torch_dtype: TorchDtype


@dataclass(frozen=True)
class Machine:
    """What a run has: its kind of device, its processes, and the memory of each in GiB (0: unknown, everything fits)."""

    device: Device
    world_size: int
    memory_gib: float


def read_facts(config_json: Mapping[str, Any]) -> ModelFacts:
    """The facts of a Hugging Face config.json; raises ModelError naming the key that is missing or wrong."""
    heads, hidden_size = _size(config_json, "num_attention_heads"), _size(config_json, "hidden_size")
    dtype = str(config_json.get("dtype") or config_json.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in get_args(TorchDtype):
        raise ModelError(f"config.json: torch_dtype is {dtype!r}; it must be one of {', '.join(get_args(TorchDtype))}")
    return ModelFacts(
        model_type=str(config_json.get("model_type", "")),
        num_layers=_size(config_json, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_query_groups=_size(config_json, "num_key_value_heads", heads),
        head_dim=_size(config_json, "head_dim", hidden_size // heads),
        ffn_hidden_size=_size(config_json, "intermediate_size"),
        vocab_size=_size(config_json, "vocab_size"),
        max_position_embeddings=_size(config_json, "max_position_embeddings"),
        tied_embeddings=bool(config_json.get("tie_word_embeddings", False)),
        torch_dtype=cast(TorchDtype, dtype),
    )


def _size(config_json: Mapping[str, Any], key: str, absent: int | None = None) -> int:
    value = config_json.get(key)
    value = absent if value is None else value
    if value is None:
        raise ModelError(f"config.json (model_type {config_json.get('model_type')!r}) has no {key}; a decoder-only language model has it")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json: {key} is {value!r}; it must be a whole number of at least 1")
    return value


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Copies of the model among ``world_size`` processes; a size that is still open counts as 1."""
    layout = config.parallelism
    return world_size // ((layout.tensor_model_parallel_size or 1) * (layout.pipeline_model_parallel_size or 1) * (layout.context_parallel_size or 1))


def stage_layers(config: RunConfig, num_layers: int) -> list[int]:
    """Layers of every pipeline stage; the sum differs from ``num_layers`` when they cannot be divided."""
    layout = config.parallelism
    stages = layout.pipeline_model_parallel_size or 1
    ends = (layout.decoder_first_pipeline_num_layers, layout.decoder_last_pipeline_num_layers)
    middle_stages = stages - sum(end is not None for end in ends)
    left = num_layers - sum(end or 0 for end in ends)
    middle = [left // middle_stages] * middle_stages if middle_stages > 0 and left > 0 else []
    return ([ends[0]] if ends[0] else []) + middle + ([ends[1]] if ends[1] else [])


def estimate_memory(config: RunConfig, facts: ModelFacts, machine: Machine, row_tokens: int) -> float:
    """GiB that a process of the neediest pipeline stage takes; the module's docstring gives the formula."""
    stages = len(stage_layers(config, facts.num_layers))
    return max(_stage_bytes(config, facts, machine, row_tokens, stage) for stage in range(stages)) / GIB + OVERHEAD_GIB[machine.device]


def _stage_bytes(config: RunConfig, facts: ModelFacts, machine: Machine, row_tokens: int, stage: int) -> float:
    width = 4 if config.model.torch_dtype == "float32" else 2
    tensor = config.parallelism.tensor_model_parallel_size or 1
    shares = stage_layers(config, facts.num_layers)
    layers, last = shares[stage], stage == len(shares) - 1
    tokens = (config.training.micro_batch_size or 1) * row_tokens
    vocab = -(-facts.vocab_size // tensor)
    base = layers * _layer_parameters(facts) / tensor + vocab * facts.hidden_size * _vocab_matrices(facts, stage, len(shares))
    lora = config.tuning.tuner_type == "lora"
    trained = layers * _lora_parameters(config, facts) if lora else base
    weights = width * (base + trained) if lora else width * base
    micro_batches = config.training.global_batch_size // (data_parallel_size(config, machine.world_size) * (config.training.micro_batch_size or 1))
    in_flight = max(1, min(len(shares) - stage, micro_batches))
    kept, working = _activations(config, facts, machine.device, width, layers)
    at_work = max(width * tokens * working, _output_bytes(config, facts, machine.device, width, tokens) if last else 0)
    return weights + trained * _state_bytes(config, width, machine.world_size) + width * tokens * kept * in_flight + at_work


def _output_bytes(config: RunConfig, facts: ModelFacts, device: Device, width: int, tokens: int) -> float:
    """Bytes of the output layer and its loss at work; on a CPU the softmax has a copy of the logits."""
    layout = config.parallelism
    vocab = -(-facts.vocab_size // (layout.tensor_model_parallel_size or 1))
    copies = 2 if device == "cpu" else 1
    inputs = (3 if layout.sequence_parallel else 2) * width * tokens * facts.hidden_size
    if config.tuning.tuner_type == "lora":
        return copies * min(PIECE_BYTES, width * tokens * vocab) + inputs
    return copies * width * tokens * vocab + width * vocab * facts.hidden_size + inputs


def _vocab_matrices(facts: ModelFacts, stage: int, stages: int) -> int:
    if stages == 1:
        return 1 if facts.tied_embeddings else 2
    return int(stage in (0, stages - 1))


def _layer_parameters(facts: ModelFacts) -> int:
    query, key_value = facts.num_attention_heads * facts.head_dim, facts.num_query_groups * facts.head_dim
    return facts.hidden_size * (2 * query + 2 * key_value + 3 * facts.ffn_hidden_size + 2)


def _lora_parameters(config: RunConfig, facts: ModelFacts) -> float:
    """LoRA parameters of one layer on one process."""
    tensor, rank, hidden = config.parallelism.tensor_model_parallel_size or 1, config.tuning.lora_rank or 0, facts.hidden_size
    query, key_value = facts.num_attention_heads * facts.head_dim, facts.num_query_groups * facts.head_dim
    sizes = {
        "linear_qkv": hidden + (query + 2 * key_value) / tensor,
        "linear_proj": query / tensor + hidden,
        "linear_fc1": hidden + 2 * facts.ffn_hidden_size / tensor,
        "linear_fc2": facts.ffn_hidden_size / tensor + hidden,
    }
    targets = config.tuning.target_modules or []
    return rank * sum(size for name, size in sizes.items() if "all-linear" in targets or name in targets)


def _state_bytes(config: RunConfig, width: int, world_size: int) -> float:
    """Bytes of gradient, main weight and optimizer state for one trained parameter."""
    moments = 8 if config.training.optimizer == "adam" else 4
    sharers = data_parallel_size(config, world_size) if config.parallelism.use_distributed_optimizer else 1
    return 4 + (moments + (4 if width == 2 else 0)) / sharers


def _activations(config: RunConfig, facts: ModelFacts, device: Device, width: int, layers: int) -> tuple[float, float]:
    """Numbers per token: what the layers of a stage keep for the backward pass, and what one of them has at work in it."""
    training, tensor = config.training, config.parallelism.tensor_model_parallel_size or 1
    hidden = facts.hidden_size / (tensor if config.parallelism.sequence_parallel else 1)
    query, key_value = facts.num_attention_heads * facts.head_dim / tensor, facts.num_query_groups * facts.head_dim / tensor
    mlp = 3 * facts.ffn_hidden_size / tensor
    attention = 6 * query + key_value if device == "cpu" else 2 * query + 2 * key_value
    mask_bytes = 1 / 8 if device == "cuda" and (config.tuning.lora_rank or 0) <= MAX_KERNEL_RANK else 1.0
    drops_out = config.tuning.tuner_type == "lora" and bool(config.tuning.lora_dropout)
    masks = mask_bytes / width * (2 * hidden + query + facts.ffn_hidden_size / tensor) if drops_out else 0.0
    layer = 4 * hidden + attention + mlp + masks
    if training.recompute_granularity == "full":
        group = training.recompute_num_layers or 1
        if training.recompute_method == "block":
            recomputed = min(group, layers)
            return recomputed * hidden + (layers - recomputed) * layer, layer + mlp
        return layers / group * hidden, min(group, layers) * layer + mlp
    saved = {"core_attn": query, "layernorm": 2 * hidden, "mlp": mlp}
    again = sum(saved[module] for module in training.recompute_modules or []) if training.recompute_granularity == "selective" else 0.0
    return layers * (layer - again), again + mlp
