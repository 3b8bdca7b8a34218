"""The command language: what each spelling means, what is refused, what is told."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from finetune_trainer import flags, swift_flags
from finetune_trainer.contract import ConfigurationError, RunConfig, RunContext
from finetune_trainer.flags import as_flags, bounds_text, default_text, options, read, spellings, type_text

BASE = ["--model", "m", "--dataset", "d"]


def as_id(part: Any) -> str | None:
    """A test's name: its command line."""
    return " ".join(part) if isinstance(part, list) else None


def config(*argv: str) -> RunConfig:
    return read([*BASE, *argv]).config("/results")


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(argv).config("/results")
    return str(caught.value)


def value(run: RunConfig, api: str) -> Any:
    section, _, name = api.partition(".")
    return getattr(run, section).model_dump(by_alias=True)[name]


# Completeness


def test_every_field_of_the_contract_is_a_flag_or_context_of_the_run() -> None:
    reachable = {(option.section, option.field) for option in options()}
    for section, field in RunConfig.model_fields.items():
        annotation = field.annotation
        if section != "version" and annotation is not RunContext:
            assert isinstance(annotation, type)
            assert {(section, name) for name in annotation.model_fields} <= reachable


def test_a_name_has_one_meaning() -> None:
    written = [name for option in options() for name in (option.name, *option.flag.old, *option.flag.inverted)]
    assert len(written) == len(set(written))
    tables = [set(spellings()), set(swift_flags.CONVERTED), set(swift_flags.NO_EFFECT), set(swift_flags.FIXED), set(swift_flags.REFUSED)]
    assert not [both for one, other in itertools.combinations(tables, 2) if (both := one & other)]


@pytest.mark.parametrize("option", options(), ids=lambda option: option.name)
def test_every_option_can_be_described(option: flags.Option) -> None:
    assert type_text(option)
    assert option.info.description
    assert isinstance(default_text(option), str)
    assert isinstance(bounds_text(option), str)


# Spellings: (older flag and texts, today's option, value). Older than Megatron-SWIFT 4, in the order of its documentation.
OLDER: list[tuple[list[str], str, Any]] = [
    (["--train_type", "lora"], "tuning.tunerType", "lora"),
    (["--max_epochs", "3"], "training.numTrainEpochs", 3),
    (["--save_interval", "50"], "checkpoints.saveSteps", 50),
    (["--log_interval", "1"], "training.loggingSteps", 1),
    (["--distributed_timeout_minutes", "60"], "parallelism.ddpTimeout", 3600),
    (["--use_flash_attn", "true"], "training.attentionBackend", "flash"),
    (["--use_flash_attn", "false"], "training.attentionBackend", None),
    (["--bf16", "true"], "model.torchDtype", "bfloat16"),
    (["--fp16"], "model.torchDtype", "float16"),
    (["--export_model_parallel_size", "1"], "parallelism.expertModelParallelSize", 1),
]
# Older or foreign flags that are accepted and told to be without effect.
ACCEPTED = [
    ["--load_safetensors", "true"],
    ["--num_workers", "4"],
    ["--dataloader_persistent_workers", "true"],
    ["--dataloader_prefetch_factor", "10"],
    ["--dataloader_type", "cyclic"],
    ["--seq_length", "2048"],
    ["--eval_interval", "100"],
    ["--eval_iters", "5"],
    ["--finetune", "true"],
    ["--finetune"],
    ["--no_load_optim", "true"],
    ["--no_load_rng", "true"],
    ["--no_save_rng", "true"],
    ["--ckpt_format", "torch_dist"],
    ["--auto_detect_ckpt_format", "true"],
    ["--exit_on_missing_checkpoint", "true"],
    ["--no_initialization", "true"],
    ["--use_cpu_initialization", "true"],
    ["--distributed_backend", "nccl"],
    ["--tp_comm_overlap", "true"],
    ["--no_masked_softmax_fusion", "true"],
    ["--no_bias_dropout_fusion", "true"],
    ["--no_bias_swiglu_fusion", "true"],
    ["--no_gradient_accumulation_fusion", "true"],
    ["--gradient_accumulation_fusion", "true"],
    ["--no_rope_fusion", "true"],
    ["--no_rope_fusion"],
    ["--manual_gc", "true"],
    ["--manual_gc_interval", "10"],
    ["--deterministic_mode", "false"],
    ["--log_params_norm", "true"],
    ["--log_throughput", "true"],
    ["--log_timers_to_tensorboard", "true"],
    ["--tensorboard_log_interval", "1"],
    ["--tensorboard_dir", "/logs"],
    ["--tensorboard_queue_size", "50"],
    ["--logging_level", "INFO"],
    ["--apply_query_key_layer_scaling", "false"],
    ["--attention_softmax_in_fp32", "true"],
    ["--num_layers", "28"],
    ["--qk_layernorm", "true"],
    ["--transformer_impl", "transformer_engine"],
    ["--padded_vocab_size", "152064"],
    ["--num_experts", "8"],
    ["--moe_router_pre_softmax", "true"],
    ["--moe_grouped_gemm", "true"],
    ["--moe_aux_loss_coeff", "1e-3"],
    ["--lazy_tokenize", "true"],
    ["--streaming", "false"],
    ["--split_dataset_ratio", "0"],
    ["--split_dataset_ratio", "0.0"],
    ["--dataset_num_proc", "8"],
    ["--load_from_cache_file", "true"],
    ["--freeze_llm", "false"],
    ["--freeze_vit", "true"],
    ["--freeze_aligner", "true"],
    ["--offload_bridge", "false"],
    ["--report_to", "tensorboard"],
    ["--stream", "true"],
    ["--temperature", "0"],
    ["--max_new_tokens", "2048"],
]
REFUSED = [
    (["--load", "ckpt"], "--load: training from a Megatron checkpoint is not built yet; give the Hugging Face folder with --model"),
    (["--mcore_model", "ckpt"], "--mcore_model: training from a Megatron checkpoint is not built yet"),
    (["--adapter_load", "a"], "--adapter_load: training on from an adapter is not built yet"),
    (["--mcore_adapters", "a"], "--mcore_adapters: training on from an adapter is not built yet"),
    (["--ref_model", "a"], "--ref_model: a reference model belongs to preference training"),
    (["--finetune", "false"], "--finetune false: to go on with an earlier run, write --resume auto instead"),
    (["--split_dataset_ratio", "0.01"], "--split_dataset_ratio 0.01: this version does not have a validation set yet"),
    (["--streaming"], "--streaming true: this version does not have streaming data sets yet"),
    (["--dataloader_type", "single"], "--dataloader_type single: write --train_dataloader_shuffle false for rows in order"),
    (["--ckpt_format", "torch"], "--ckpt_format torch: checkpoints are torch_dist"),
    (["--perform_initialization", "true"], "this version trains from a model's weights"),
    (["--freeze_llm", "true"], "this version does not have frozen parts yet; write --tuner_type lora"),
    (["--to_hf", "true"], "it belongs to `megatron export`"),
    (["--rlhf_type", "dpo"], "it belongs to `megatron rlhf`"),
    (["--hub_token", "secret"], "set HF_TOKEN in the environment"),
    (["--lr_decay_style", "WSD"], "--lr_decay_style: Input should be 'constant', 'linear', 'cosine' or 'inverse-square-root' (found 'WSD')"),
    (["--distributed_timeout_minutes", "soon"], "--distributed_timeout_minutes: minutes, a whole number (found 'soon')"),
    (["--bf16", "maybe"], "--bf16: true or false (found 'maybe')"),
    (["--finetune", "maybe"], "--finetune needs true or false (found 'maybe')"),
]


@pytest.mark.parametrize(("argv", "api", "expected"), OLDER, ids=as_id)
def test_an_older_spelling_works_and_says_what_it_is_called_now(argv: list[str], api: str, expected: Any) -> None:
    line = read([*BASE, *argv])
    assert value(line.config("/results"), api) == expected
    assert any(argv[0] in note for note in line.notes())


def test_older_spellings_are_told_in_one_line() -> None:
    line = read([*BASE, "--save", "out", "--max_epochs", "1"])
    assert line.notes() == ["older spellings: --save is now --output_dir, --max_epochs is now --num_train_epochs"]
    assert line.command().output_dir == "out"


@pytest.mark.parametrize("argv", ACCEPTED, ids=as_id)
def test_a_flag_without_effect_is_accepted_and_told(argv: list[str]) -> None:
    line = read([*BASE, *argv])
    assert line.config("/results") == config()
    (note,) = [note for note in line.notes() if note.startswith("no effect here")]
    renamed = {"--num_workers": "--dataloader_num_workers"}
    assert renamed.get(argv[0], argv[0]) in note
    assert "(" in note


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=as_id)
def test_a_flag_that_this_version_lacks_is_refused_with_a_sentence(argv: list[str], message: str) -> None:
    assert message in refusal(*BASE, *argv)


# Defaults: Megatron-SWIFT 4.6's; None where the engine chooses.
SWIFT_DEFAULTS = {
    "max_length": None,
    "truncation_strategy": "delete",
    "interleave_prob": None,
    "stopping_strategy": "first_exhausted",
    "dataset_shuffle": True,
    "train_dataloader_shuffle": True,
    "data_seed": 42,
    "packing": False,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 4,
    "load_from_cache_file": False,
    "tuner_type": "full",
    "sequence_parallel": False,
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "global_batch_size": 16,
    "num_train_epochs": None,
    "train_iters": None,
    "lr": None,
    "lr_decay_style": "cosine",
    "lr_decay_iters": None,
    "lr_warmup_iters": 0,
    "lr_warmup_fraction": None,
    "lr_warmup_init": 0.0,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "optimizer": "adam",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "sgd_momentum": 0.9,
    "seed": 42,
    "recompute_method": None,
    "recompute_num_layers": None,
    "cross_entropy_loss_fusion": True,
    "logging_steps": 5,
    "save_steps": 500,
    "save_total_limit": None,
    "no_save_optim": False,
    "no_save_rng": False,
    "async_save": False,
    "max_shard_size": 5_000_000_000,
    "add_version": True,
    "output_dir": None,
    "merge_lora": None,
    "model_name": None,
    "model_author": None,
    "model_revision": None,
    "torch_dtype": None,
    "system": None,
}
# The documented exceptions: absent, the engine chooses by model, memory or tuner; a hang ends after ten minutes; and what Megatron-SWIFT does not have.
OTHER_DEFAULTS = {
    "ddp_timeout": 600,
    "save_safetensors": None,
    "resume": "never",
    "verification": "Adapter",
    **dict.fromkeys(("micro_batch_size", "min_lr", "recompute_granularity", "recompute_modules", "attention_backend", "formats")),
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")),
    **dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")),
    **dict.fromkeys(("expert_model_parallel_size", "expert_tensor_parallel_size")),
}


def test_defaults_are_megatron_swifts_but_for_the_documented_ones() -> None:
    defaults = {option.name: option.default for option in options() if not option.info.is_required()}
    assert defaults == {**SWIFT_DEFAULTS, **OTHER_DEFAULTS}


def test_a_command_line_trains_every_weight_and_starts_anew() -> None:
    run = config()
    assert (run.tuning.tuner_type, run.checkpoints.resume, run.run.artifact_layout) == ("full", "never", "checkpoints")


# Values


@pytest.mark.parametrize(
    ("argv", "api", "expected"),
    [
        (["--lr", "1e-4"], "training.lr", 1e-4),
        (["--lr=1e-4"], "training.lr", 1e-4),
        (["--lr", "1e-3", "--lr", "1e-4"], "training.lr", 1e-4),
        (["--micro-batch-size", "4"], "training.microBatchSize", 4),
        (["--sequence_parallel"], "parallelism.sequenceParallel", True),
        (["--sequence_parallel", "true"], "parallelism.sequenceParallel", True),
        (["--sequence_parallel", "False"], "parallelism.sequenceParallel", False),
        (["--no_dataset_shuffle"], "data.datasetShuffle", False),
        (["--no_dataset_shuffle", "false"], "data.datasetShuffle", True),
        (["--model_name", "小黄", "Xiao Huang"], "data.modelName", ["小黄", "Xiao Huang"]),
        (["--model_name", '["a", "b"]'], "data.modelName", ["a", "b"]),
        (["--interleave_prob", "0.5", "0.5"], "data.interleaveProb", [0.5, 0.5]),
        (["--dataset", "e", "f#5", "--dataset", "g"], "data.dataset", ["d", "e", "f#5", "g"]),
        (["--system", "--- be terse"], "data.system", "--- be terse"),
        (["--system="], "data.system", ""),
        (["--system=a=b --lr 3"], "data.system", "a=b --lr 3"),
        (["--max_shard_size", "5GB"], "output.maxShardSize", 5_000_000_000),
        (["--max_shard_size", "512MiB"], "output.maxShardSize", 512 * 2**20),
        (["--max_shard_size", "1000"], "output.maxShardSize", 1000),
        (["--formats", "megatron", "huggingface"], "output.formats", ["megatron", "huggingface"]),
    ],
    ids=str,
)
def test_values_are_read(argv: list[str], api: str, expected: Any) -> None:
    assert value(config(*argv), api) == expected


@pytest.mark.parametrize(
    ("argv", "formats"),
    [
        ([], None),
        (["--save_safetensors", "true"], ["huggingface"]),
        (["--save_safetensors", "false"], ["megatron"]),
        (["--tuner_type", "lora"], None),
        (["--tuner_type", "lora", "--save_safetensors", "true"], ["peft"]),
        (["--tuner_type", "lora", "--save_safetensors", "true", "--merge_lora", "false"], ["peft"]),
        (["--tuner_type", "lora", "--merge_lora", "true"], ["huggingface"]),
        (["--tuner_type", "lora", "--save_safetensors", "false", "--merge_lora", "true"], ["megatron"]),
        (["--tuner_type", "lora", "--no_save_optim", "true"], None),
    ],
    ids=as_id,
)
def test_formats_follow_from_save_safetensors_and_merge_lora(argv: list[str], formats: list[str] | None) -> None:
    assert config(*argv).output.formats == formats


# Refusals


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*BASE, "--lora_rang", "8"], "unknown flag --lora_rang; did you mean '--lora_rank'?"),
        ([*BASE, "--xyzzy", "8"], "unknown flag --xyzzy"),
        ([*BASE, "--micro", "8"], "unknown flag --micro"),
        (["m", "--dataset", "d"], "unexpected argument 'm'; flags begin with --"),
        (["--dataset", "d"], "--model is missing: A Hugging Face model folder"),
        (["--model", "m"], "--dataset is missing"),
        ([*BASE, "--lr"], "--lr needs one value (found none): Highest learning rate"),
        ([*BASE, "--lr", "1", "2"], "--lr needs one value (found '1' '2')"),
        ([*BASE, "--model_name"], "--model_name needs at least one value"),
        ([*BASE, "--lr", "fast"], "--lr: Input should be a valid number, unable to parse string as a number (found 'fast')"),
        ([*BASE, "--lr", "-1"], "--lr: Input should be greater than 0 (found '-1')"),
        ([*BASE, "--sequence_parallel", "perhaps"], "--sequence_parallel: Input should be a valid boolean"),
        ([*BASE, "--no_add_version", "perhaps"], "--no_add_version needs true or false (found 'perhaps')"),
        ([*BASE, "--max_shard_size", "big"], "--max_shard_size: Input should be a valid integer"),
        ([*BASE, "--lora_rank", "8"], "--lora_rank is set; it needs --tuner_type lora (found full)"),
        ([*BASE, "--recompute_method", "uniform"], "--recompute_method is uniform; it needs --recompute_granularity full (found None)"),
        ([*BASE, "--formats", "peft", "--save_safetensors", "true"], "--formats says the same as --save_safetensors and --merge_lora; write either"),
    ],
    ids=as_id,
)
def test_what_cannot_be_read_is_refused_by_flag(argv: list[str], message: str) -> None:
    assert message in refusal(*argv)


def test_sentences_of_the_contract_speak_of_flags_on_the_command_line() -> None:
    assert as_flags("scaled by loraAlpha / loraRank; lr stays") == "scaled by --lora_alpha / --lora_rank; lr stays"
