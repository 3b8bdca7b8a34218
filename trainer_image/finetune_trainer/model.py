"""Family and RunConfig -> Megatron-core's GPTModel, and its forward without a loss.

The border to Megatron's untyped modules: what leaves here is tensors, names and parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import distributed

from finetune_trainer import loss, megatron_cpu
from finetune_trainer.contract import ConfigurationError, ParallelismConfig, RunConfig, TrainingConfig
from finetune_trainer.families import Architecture, Family
from finetune_trainer.parallel import Ranks
from finetune_trainer.shards import padded_vocab_size
from finetune_trainer.swiglu import SwiGLU

megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402  (after the redirection)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.transformer import ModuleSpec, TransformerConfig  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build  # noqa: E402

from finetune_trainer.attention import SdpaAttention  # noqa: E402

Chunks = Sequence[torch.nn.Module]

# What the local layers call the norms that transformer-engine's linear layers contain.
CANONICAL = (("input_layernorm.", "self_attention.linear_qkv.layer_norm_"), ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"))


class RMSNorm(torch.nn.Module):
    """Megatron-core's ``WrappedTorchNorm`` without its refusal of sequence parallelism: the weight is marked, so that its gradient is summed."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device="cuda" if torch.cuda.is_available() else "cpu"))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


class SeparateRMSNorm(RMSNorm):
    """A norm that is a module of its own among transformer-engine's layers too; there it has an extra state, without which a checkpoint of ours could not be loaded on them."""

    def get_extra_state(self) -> None:
        """Nothing: only fp8 has any."""

    def set_extra_state(self, state: Any) -> None:
        """Nothing to keep."""


def build(family: Family, hf_config: Mapping[str, Any], config: RunConfig, ranks: Ranks) -> list[GPTModel]:
    """This rank's stage of the model on ``ranks.device``, in the run's type; every parameter holds NaN until ``convert.import_base`` fills it.

    Raises ConfigurationError for a combination of options that cannot be built.
    """
    architecture = family.architecture(hf_config)
    transformer = transformer_config(architecture, config, ranks.device)
    _check_recompute(transformer, ranks)
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=block_spec(architecture, transformer, ranks),
        vocab_size=padded_vocab_size(architecture.vocab_size, ranks.tp.size),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=ranks.is_first_stage,
        post_process=ranks.is_last_stage,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rotary_base,
    )
    model.rotary_pos_emb.inv_freq = rotary_frequencies(architecture).to(ranks.device)
    model.architecture = architecture
    if ranks.is_last_stage:
        loss.attach(model.output_layer, architecture.vocab_size, ranks.tp.size, ranks.tp.rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    return [model]


def transformer_config(architecture: Architecture, config: RunConfig, device: torch.device) -> TransformerConfig:
    """Megatron-core's configuration of a resolved run; raises ConfigurationError with Megatron-core's sentence where it refuses."""
    dtype = getattr(torch, config.model.torch_dtype or "float32")
    options: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.layernorm_epsilon,
        "qk_layernorm": architecture.qk_layernorm,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.add_qkv_bias,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "calculate_per_token_loss": True,
        "init_method": _leave_as_it_is,
        "output_layer_init_method": _leave_as_it_is,
        "persist_layer_norm": False,
        "cuda_graph_scope": [],
        **_fusions(config, device),
        **_parallel_options(config.parallelism),
        **_recompute_options(config.training),
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="If you are using transformer_engine")
            return TransformerConfig(**options)
    except (ValueError, AssertionError) as error:
        raise ConfigurationError(f"Megatron-core refuses this combination of options: {error}") from error


def _leave_as_it_is(tensor: torch.Tensor) -> None:
    """Initialisation of weights that ``build`` fills with NaN and the import with the checkpoint's."""


def _fusions(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Fused kernels: none that torch.compile makes when it first runs (the residual's addition is one kernel by itself, without bias and dropout)."""
    fused = device.type == "cuda"
    backend = config.training.attention_backend
    return {
        "use_te_activation_func": True,  # the activation is a module: SwiGLU, whatever the layers are
        "apply_rope_fusion": fused and has_transformer_engine(),
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "attention_backend": AttnBackend[backend] if backend and fused else AttnBackend.auto,
    }


def _parallel_options(parallelism: ParallelismConfig) -> dict[str, Any]:
    tensor, pipeline = parallelism.tensor_model_parallel_size or 1, parallelism.pipeline_model_parallel_size or 1
    options: dict[str, Any] = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "context_parallel_size": parallelism.context_parallel_size or 1,
        "sequence_parallel": parallelism.sequence_parallel and tensor > 1,
    }
    if pipeline > 1:
        options |= {
            "variable_seq_lengths": True,
            "moe_token_dispatcher_type": "alltoall",  # checked with variable lengths even in a model without experts
            "deallocate_pipeline_outputs": True,
            "num_layers_in_first_pipeline_stage": parallelism.decoder_first_pipeline_num_layers,
            "num_layers_in_last_pipeline_stage": parallelism.decoder_last_pipeline_num_layers,
        }
    return options


def _recompute_options(training: TrainingConfig) -> dict[str, Any]:
    if training.recompute_granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": training.recompute_method or "uniform",
            "recompute_num_layers": training.recompute_num_layers or 1,
        }
    if training.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(training.recompute_modules or ["core_attn"])}
    return {}


def _check_recompute(transformer: TransformerConfig, ranks: Ranks) -> None:
    if transformer.recompute_method != "uniform":
        return
    layers = get_num_layers_to_build(transformer, pp_rank=ranks.pp.rank)
    if layers % transformer.recompute_num_layers:
        raise ConfigurationError(
            f"training.recomputeNumLayers is {transformer.recompute_num_layers}; with recomputeMethod uniform it must divide the {layers} layers of a pipeline stage"
        )


def has_transformer_engine() -> bool:
    """Whether transformer-engine's layers can be used here."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def block_spec(architecture: Architecture, transformer: TransformerConfig, ranks: Ranks) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers of this stage: transformer-engine's where it is installed, else Megatron-core's local ones with our attention and norm.

    This is the one place where the module of a whole layer (``ModuleSpec.module``, a TransformerLayer) is chosen.
    """
    if has_transformer_engine() and transformer.attention_backend is not AttnBackend.local:
        from finetune_trainer.packed_attention import PackedAttention

        fused = _with_activation(get_gpt_layer_with_transformer_engine_spec(qk_layernorm=architecture.qk_layernorm))
        return _change(fused, self_attention=_change(fused.submodules.self_attention, core_attention=PackedAttention))
    spec = _with_activation(get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=architecture.qk_layernorm))
    qk_norm = {"q_layernorm": SeparateRMSNorm, "k_layernorm": SeparateRMSNorm} if architecture.qk_layernorm else {}
    attention = _change(spec.submodules.self_attention, core_attention=SdpaAttention, **qk_norm)
    layer = _change(spec, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm, self_attention=attention)
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(transformer, pp_rank=ranks.pp.rank), layer_norm=SeparateRMSNorm)


def _with_activation(layer: ModuleSpec) -> ModuleSpec:
    return _change(layer, mlp=_change(layer.submodules.mlp, activation_func=SwiGLU))


def _change(spec: ModuleSpec, **submodules: Any) -> ModuleSpec:
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, **submodules))


def rotary_frequencies(architecture: Architecture) -> torch.Tensor:
    """Inverse frequencies [head_dim / 2], float32, in transformers' order of operations (modeling_rope_utils.py) and so equal to the bit.

    Megatron-core's own llama3 scaling knows one factor only and takes the others for granted.
    """
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.int64).to(torch.float32) / architecture.head_dim
    frequencies = 1.0 / (architecture.rotary_base**exponents)
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > context / low, frequencies / scaling.factor, frequencies)
    smooth = (context / wavelengths - low) / (high - low)
    smoothed = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    is_medium = ~(wavelengths < context / high) * ~(wavelengths > context / low)
    return torch.where(is_medium, smoothed, scaled)


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def named_weights(chunks: Chunks) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Canonical global name and parameter of every weight of the base model on this rank.

    Layer numbers are global, ``.base.`` of a LoRA layer is left out and so are its own parameters, wrappers (DDP, Float16Module) are looked through; the tied copy of the
    embedding on the last stage is ``embedding.word_embeddings.weight`` too.
    """
    for chunk in chunks:
        model = unwrap(chunk)
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                continue
            canonical = canonical_name(model, name)
            if canonical == "output_layer.weight" and model.share_embeddings_and_output_weights:
                canonical = "embedding.word_embeddings.weight"
            yield canonical, parameter


def canonical_name(model: GPTModel, name: str) -> str:
    """The name that a parameter or module of this stage has in a whole model made of transformer-engine's layers."""
    name = name.replace(".base.", ".").removesuffix(".base")
    for local, canonical in CANONICAL:
        name = name.replace(local, canonical)
    match = re.match(r"decoder\.layers\.(\d+)(.*)", name)
    return f"decoder.layers.{model.decoder.layers[int(match[1])].layer_number - 1}{match[2]}" if match else name


def logits(chunks: Chunks, token_rows: list[list[int]], ranks: Ranks) -> list[torch.Tensor]:
    """Forward of whole rows without a loss, through all stages; per row float32 ``[tokens, vocab]`` (real vocabulary only), on every rank. Collective.

    Every data-parallel copy computes the same. Evaluation mode while it runs.
    """
    vocab_size = unwrap(chunks[0]).architecture.vocab_size
    outputs = _forward(chunks, token_rows, ranks)
    found = [output[0, : len(row), :vocab_size].float() for output, row in zip(outputs, token_rows, strict=True)] if ranks.is_last_stage else []
    if ranks.pp.size == 1:
        return found
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    result = found or [torch.empty(len(row), vocab_size, device=ranks.device) for row in token_rows]
    for tensor in result:
        distributed.broadcast(tensor.contiguous() if found else tensor, source, group=parallel_state.get_pipeline_model_parallel_group())
    return result


def hidden_states(chunks: Chunks, token_rows: list[list[int]], ranks: Ranks) -> dict[str, torch.Tensor]:
    """Output of the embedding, every layer and the final norm, by canonical module name in the order of computation: ``[tokens of all rows, hidden]`` float32. Collective."""
    captured: dict[str, list[torch.Tensor]] = {}
    with contextlib.ExitStack() as hooks:
        for chunk in chunks:
            model = unwrap(chunk)
            for name, module in _stations(model):
                rows = captured.setdefault(canonical_name(model, name), [])
                handle = module.register_forward_hook(_capture(rows, model.config.sequence_parallel))
                hooks.callback(handle.remove)
        _forward(chunks, token_rows, ranks)
    lengths = [len(row) for row in token_rows]
    mine = {name: torch.cat([output[:length] for output, length in zip(outputs, lengths, strict=True)]).cpu() for name, outputs in captured.items()}
    stages: list[dict[str, torch.Tensor] | None] = [None] * ranks.pp.size
    distributed.all_gather_object(stages, mine, group=parallel_state.get_pipeline_model_parallel_group())
    return {name: tensor for stage in stages if stage is not None for name, tensor in stage.items()}


def _stations(model: GPTModel) -> Iterator[tuple[str, torch.nn.Module]]:
    if model.pre_process:
        yield "embedding", model.embedding
    for index, layer in enumerate(model.decoder.layers):
        yield f"decoder.layers.{index}", layer
    if model.decoder.final_layernorm is not None:
        yield "decoder.final_layernorm", model.decoder.final_layernorm


def _capture(rows: list[torch.Tensor], sequence_parallel: bool) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        rows.append(hidden.detach()[:, 0].float())

    return hook


def packed_sequences(cu_seqlens: torch.Tensor, max_seqlen: int) -> PackedSeqParams:
    """Where the sequences of a micro batch [1, tokens] begin and end, for attention and rotary embedding."""
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_kv=max_seqlen)


def _forward(chunks: Chunks, token_rows: list[list[int]], ranks: Ranks) -> list[torch.Tensor]:
    """Logits [1, tokens, padded vocabulary] of each row on the last stage, an empty list elsewhere; a row is a micro batch of its own.

    Packed as in training, so that the same kernels compute. With sequence parallelism the end of a row is filled up to a multiple of the tensor size by a sequence of its own.
    """
    models = [unwrap(chunk) for chunk in chunks]
    multiple = ranks.tp.size if models[0].config.sequence_parallel else 1

    def forward_step(data_iterator: Iterator[list[int]], model: GPTModel) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
        row = next(data_iterator)
        filled = row + [0] * (-len(row) % multiple)
        tokens = torch.tensor([filled], device=ranks.device)
        positions = torch.arange(len(filled), device=ranks.device)[None]
        ends = [0, len(row), len(filled)] if len(filled) > len(row) else [0, len(row)]
        packed = packed_sequences(torch.tensor(ends, dtype=torch.int32, device=ranks.device), len(row))
        return model(tokens, positions, None, packed_seq_params=packed, runtime_gather_output=True), lambda output, non_loss_data: output

    was_training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            outputs: list[torch.Tensor] = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(token_rows) for _ in models] if len(models) > 1 else iter(token_rows),
                model=models if len(models) > 1 else models[0],
                num_microbatches=len(token_rows),
                seq_length=max(len(row) for row in token_rows),
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
    finally:
        for model, training in zip(models, was_training, strict=True):
            model.train(training)
    return outputs
