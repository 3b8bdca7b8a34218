"""What the engine chooses, refuses and estimates."""

from __future__ import annotations

import re
from typing import Any

import pytest

from finetune_trainer.contract import ConfigurationError, ModelError, RunConfig
from finetune_trainer.memory import OVERHEAD_GIB
from finetune_trainer.resolve import (
    Machine,
    Resolution,
    data_parallel_size,
    describe_shortage,
    estimate_memory,
    read_facts,
    resolve,
    row_limit,
    stage_layers,
    total_steps,
)

SMOLLM2 = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
QWEN25_7B = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
TWO_CPUS = Machine("cpu", 2, 100.0)
ONE_BY_ONE = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}


def make_config(**sections: dict[str, Any]) -> RunConfig:
    data = {"dataset": ["rows.jsonl"], **sections.pop("data", {})}
    model = {"source": "model", **sections.pop("model", {})}
    return RunConfig.model_validate({"model": model, "data": data, "run": {"output_dir": "/results"}, **sections})


def run(machine: Machine = TWO_CPUS, facts: dict[str, Any] = SMOLLM2, **sections: dict[str, Any]) -> Resolution:
    return resolve(make_config(**sections), read_facts(facts), machine)


def refusal(machine: Machine = TWO_CPUS, facts: dict[str, Any] = SMOLLM2, **sections: dict[str, Any]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        run(machine, facts, **sections)
    return str(caught.value)


# Facts


def test_facts_are_read_from_a_config_json() -> None:
    facts = read_facts(SMOLLM2)
    assert (facts.num_query_groups, facts.head_dim, facts.ffn_hidden_size, facts.tied_embeddings, facts.torch_dtype) == (3, 64, 1536, True, "bfloat16")
    assert read_facts(QWEN25_7B).torch_dtype == "bfloat16"


def test_facts_that_older_configs_leave_out_have_their_customary_values() -> None:
    old = {key: value for key, value in SMOLLM2.items() if key not in ("num_key_value_heads", "tie_word_embeddings", "torch_dtype")}
    facts = read_facts(old)
    assert (facts.num_query_groups, facts.tied_embeddings, facts.torch_dtype) == (9, False, "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "config.json (model_type 'llama') has no num_hidden_layers"),
        ({"vocab_size": "many"}, "config.json: vocab_size is 'many'; it must be a whole number of at least 1"),
        ({"hidden_size": 0}, "config.json: hidden_size is 0"),
        ({"torch_dtype": "int8"}, "config.json: torch_dtype is 'int8'; it must be one of float32, bfloat16, float16"),
    ],
)
def test_a_missing_or_wrong_fact_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_facts({**SMOLLM2, **change})
    assert message in str(caught.value)


# Choices


def test_everything_silent_is_chosen_and_told_by_api_name() -> None:
    resolution = run()
    chosen = resolution.chosen
    assert chosen["model.torchDtype"] == "float32"
    assert chosen["data.maxLength"] == 8192
    assert (chosen["parallelism.tensorModelParallelSize"], chosen["parallelism.pipelineModelParallelSize"]) == (1, 1)
    assert (chosen["training.lr"], chosen["training.minLr"], chosen["training.numTrainEpochs"]) == (1e-4, 0.0, 1)
    assert (chosen["tuning.loraRank"], chosen["tuning.loraAlpha"], chosen["tuning.loraDropout"], chosen["tuning.targetModules"]) == (
        8,
        32.0,
        0.05,
        ["all-linear"],
    )
    assert (chosen["training.microBatchSize"], chosen["training.recomputeGranularity"], chosen["output.formats"]) == (8, "none", ["peft"])
    assert resolution.config.training.micro_batch_size == 8
    assert resolution.config.run == make_config().run


def test_what_was_written_is_kept_and_not_told_as_chosen() -> None:
    resolution = run(model={"torch_dtype": "bfloat16"}, training={"micro_batch_size": 2, "lr": 3e-4}, output={"formats": ["megatron"]})
    assert resolution.config.model.torch_dtype == "bfloat16"
    assert (resolution.config.training.micro_batch_size, resolution.config.training.lr) == (2, 3e-4)
    assert not {"model.torchDtype", "training.microBatchSize", "training.lr", "output.formats"} & set(resolution.chosen)


def test_full_tuning_has_its_own_rate_and_format_and_no_lora() -> None:
    resolution = run(tuning={"tuner_type": "full"})
    assert (resolution.config.training.lr, resolution.config.output.formats) == (1e-5, ["huggingface"])
    assert not [name for name in resolution.chosen if name.startswith("tuning.")]


def test_a_gpu_trains_in_the_checkpoints_type() -> None:
    assert run(Machine("cuda", 1, 80.0)).config.model.torch_dtype == "bfloat16"


def test_epochs_take_precedence_over_steps() -> None:
    resolution = run(training={"train_iters": 10, "num_train_epochs": 3})
    assert "training.trainIters has no effect: numTrainEpochs takes precedence" in resolution.notes
    assert run(training={"train_iters": 10}).config.training.num_train_epochs is None


def test_a_resolved_run_resolves_to_itself() -> None:
    first = run()
    second = resolve(first.config, read_facts(SMOLLM2), TWO_CPUS)
    assert second.config == first.config
    assert second.chosen == {}


@pytest.mark.parametrize(("granularity", "filled"), [("full", ("uniform", 1, None)), ("selective", (None, None, ["core_attn"])), ("none", (None, None, None))])
def test_the_rest_of_a_written_recomputation_is_filled(granularity: str, filled: tuple[Any, ...]) -> None:
    training = run(training={"recompute_granularity": granularity}).config.training
    assert (training.recompute_method, training.recompute_num_layers, training.recompute_modules) == filled


# Layout by memory


def test_more_memory_needs_fewer_processes_per_copy() -> None:
    def tensor(memory_gib: float) -> int | None:
        return run(Machine("cuda", 4, memory_gib), QWEN25_7B, tuning={"tuner_type": "full"}).config.parallelism.tensor_model_parallel_size

    assert (tensor(80.0), tensor(40.0)) == (1, 4)


def test_recomputation_comes_before_another_layout() -> None:
    parts = run(Machine("cuda", 2, 24.0), QWEN25_7B).config
    assert (parts.parallelism.tensor_model_parallel_size, parts.training.recompute_granularity, parts.training.recompute_method) == (1, "full", "uniform")


def test_rows_that_are_known_are_not_taken_for_longer_ones() -> None:
    machine, config, facts = Machine("cuda", 1, 80.0), make_config(data={"max_length": 2048}, training={"micro_batch_size": 16}), read_facts(QWEN25_7B)
    assumed, found = resolve(config, facts, machine), resolve(config, facts, machine, 398)
    assert (assumed.row_tokens, assumed.config.training.recompute_granularity) == (2048, "full")
    assert (found.row_tokens, found.config.training.recompute_granularity) == (398, "none")
    assert found.memory_gib == pytest.approx(estimate_memory(found.config, facts, machine, 398), abs=0.01)
    assert found.config.data.max_length == 2048


def test_rows_that_are_longer_than_assumed_are_reckoned_with() -> None:
    machine, facts = Machine("cuda", 1, 80.0), read_facts(QWEN25_7B)
    assumed, found = resolve(make_config(), facts, machine), resolve(make_config(), facts, machine, 30000)
    assert (assumed.row_tokens, assumed.config.training.recompute_granularity) == (2048, "none")
    assert found.config.training.recompute_granularity == "full"


@pytest.mark.parametrize("row_tokens", [None, 100, 30000])
def test_what_was_written_is_kept_however_long_rows_are(row_tokens: int | None) -> None:
    written = {"micro_batch_size": 2, "recompute_granularity": "full"}
    config = resolve(make_config(training=written, parallelism=ONE_BY_ONE), read_facts(QWEN25_7B), Machine("cuda", 2, 80.0), row_tokens).config
    assert (config.training.micro_batch_size, config.training.recompute_granularity) == (2, "full")
    assert (config.parallelism.tensor_model_parallel_size, config.parallelism.pipeline_model_parallel_size) == (1, 1)


def test_the_limit_of_a_row_is_the_models_where_none_is_written() -> None:
    facts = read_facts(SMOLLM2)
    assert (row_limit(make_config(), facts), row_limit(make_config(data={"max_length": 300}), facts)) == (8192, 300)


def test_pipeline_is_chosen_where_the_heads_forbid_tensor() -> None:
    layout = run(Machine("cuda", 2, 2.8), training={"micro_batch_size": 1}).config.parallelism
    assert (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size) == (1, 2)


def test_a_batch_that_the_copies_cannot_share_leads_to_another_layout() -> None:
    layout = run(training={"global_batch_size": 1}).config.parallelism
    assert (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size) == (1, 2)


def test_nothing_fits_is_a_note_not_a_refusal() -> None:
    resolution = run(Machine("cuda", 1, 4.0), QWEN25_7B)
    note = r"about \d+\.\d GiB a process are needed with rows of 2048 tokens, as is assumed until they are read, and 4\.0 GiB are there: the run may end as OutOfMemory"
    assert [re.fullmatch(note, each) is not None for each in resolution.notes] == [True]
    found = resolve(make_config(), read_facts(QWEN25_7B), Machine("cuda", 1, 4.0), 398)
    assert "are needed with rows of at most 398 tokens and 4.0 GiB are there" in found.notes[0]
    assert resolution.config.training.micro_batch_size == 1
    assert resolution.config.training.recompute_granularity == "full"


def test_running_out_of_memory_is_explained_with_options_that_need_less() -> None:
    machine = Machine("cuda", 2, 79.0)
    config = run(machine, QWEN25_7B, training={"micro_batch_size": 8, "recompute_granularity": "none"}, parallelism=ONE_BY_ONE).config
    text = describe_shortage(config, read_facts(QWEN25_7B), machine, 4096)
    assert re.match(r"with rows of 4096 tokens about \d+\.\d GiB a process were estimated, 79\.0 GiB were there; less is needed with ", text)
    needs = dict(re.findall(r"([a-zA-Z.]+ (?:full|\d+)) \((\d+\.\d) GiB\)", text))
    assert list(needs) == [
        "training.recomputeGranularity full",
        "training.microBatchSize 1",
        "parallelism.tensorModelParallelSize 2",
        "data.maxLength 2048",
    ]
    least = run(machine, QWEN25_7B, training={"micro_batch_size": 1, "recompute_granularity": "full"}, parallelism={"tensor_model_parallel_size": 2}).config
    assert "microBatchSize" not in describe_shortage(least, read_facts(QWEN25_7B), machine, 4096)


def test_unknown_memory_limits_nothing() -> None:
    assert run(Machine("cuda", 1, 0.0), QWEN25_7B).config.training.micro_batch_size == 16


@pytest.mark.parametrize(("batch", "micro"), [(2, 1), (16, 8), (24, 4), (6, 1), (64, 8)])
def test_micro_batch_on_a_cpu_is_a_power_of_two_that_divides_and_at_most_eight(batch: int, micro: int) -> None:
    assert run(training={"global_batch_size": batch}).config.training.micro_batch_size == micro


def test_a_pipeline_gets_a_micro_batch_for_every_stage() -> None:
    assert run(parallelism={"pipeline_model_parallel_size": 2}, training={"global_batch_size": 8}).config.training.micro_batch_size == 4


# Refusals


def test_tensor_size_that_does_not_divide_the_groups_is_refused_with_the_sizes_that_do() -> None:
    expected = "parallelism.tensorModelParallelSize is 2; it must divide num_key_value_heads (3) and num_attention_heads (9) of the model: 1 or 3"
    assert refusal(parallelism={"tensor_model_parallel_size": 2}) == expected


def test_tensor_size_that_does_not_divide_the_intermediate_size_is_refused() -> None:
    facts = {**SMOLLM2, "intermediate_size": 1535}
    assert refusal(parallelism={"tensor_model_parallel_size": 3}, facts=facts).endswith("must divide intermediate_size (1535) of the model: 1")


def test_layout_larger_than_the_processes_is_refused() -> None:
    expected = "parallelism.tensorModelParallelSize 3 x pipelineModelParallelSize 1 = 3; it must divide the number of processes (2): 1 or 2"
    assert refusal(parallelism={"tensor_model_parallel_size": 3}) == expected


def test_stages_that_do_not_divide_the_layers_are_refused() -> None:
    message = refusal(Machine("cpu", 4, 100.0), parallelism={"pipeline_model_parallel_size": 4})
    assert message.startswith("parallelism.pipelineModelParallelSize is 4; it must divide num_hidden_layers (30) of the model: 1, 2, 3, 5, 6, 10, 15 or 30")


@pytest.mark.parametrize(
    ("ends", "shares"),
    [((8, 8), [8, 7, 7, 8]), ((9, None), [9, 7, 7, 7]), ((None, 3), [9, 9, 9, 3])],
)
def test_uneven_stages_are_accepted(ends: tuple[int | None, int | None], shares: list[int]) -> None:
    layout = {"pipeline_model_parallel_size": 4, "decoder_first_pipeline_num_layers": ends[0], "decoder_last_pipeline_num_layers": ends[1]}
    assert stage_layers(run(Machine("cpu", 4, 100.0), parallelism=layout).config, 30) == shares


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            {"decoder_first_pipeline_num_layers": 8},
            "decoderFirstPipelineNumLayers 8 leave 22 of num_hidden_layers (30); with pipelineModelParallelSize 4 they must leave a multiple of 3",
        ),
        ({"decoder_first_pipeline_num_layers": 29}, "leave 1 of num_hidden_layers (30)"),
        ({"decoder_first_pipeline_num_layers": 16, "decoder_last_pipeline_num_layers": 16}, "leave -2 of num_hidden_layers (30)"),
    ],
)
def test_ends_that_leave_no_even_middle_are_refused(layout: dict[str, int], message: str) -> None:
    assert message in refusal(Machine("cpu", 4, 100.0), parallelism={"pipeline_model_parallel_size": 4, **layout})


def test_two_ends_must_be_all_of_a_two_stage_pipeline() -> None:
    ends = {"decoder_first_pipeline_num_layers": 10, "decoder_last_pipeline_num_layers": 10}
    assert "with pipelineModelParallelSize 2 they must leave none" in refusal(parallelism={"pipeline_model_parallel_size": 2, **ends})


def test_ends_without_a_pipeline_are_refused() -> None:
    message = refusal(parallelism={"pipeline_model_parallel_size": 1, "decoder_last_pipeline_num_layers": 10})
    assert message == "parallelism.decoderLastPipelineNumLayers 10 is set; pipelineModelParallelSize must then be at least 2 (found 1)"


def test_global_batch_that_is_no_multiple_is_refused_with_its_neighbours() -> None:
    one_stage = {"pipeline_model_parallel_size": 1}
    message = refusal(parallelism=one_stage, training={"global_batch_size": 15, "micro_batch_size": 4})
    assert message == "training.globalBatchSize is 15; it must be a multiple of microBatchSize (4) x the data-parallel size (2) = 8: 8 or 16"
    message = refusal(parallelism=one_stage, training={"global_batch_size": 1})
    assert message == "training.globalBatchSize is 1; it must be a multiple of the data-parallel size (2): 2"


@pytest.mark.parametrize("name", ["context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"])
def test_sizes_that_are_not_built_are_refused(name: str) -> None:
    assert "is 2; this version supports 1 only" in refusal(parallelism={name: 2})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tuning": {"target_modules": ["linear_qk"]}}, "tuning.targetModules has 'linear_qk'; did you mean 'linear_qkv'?"),
        ({"tuning": {"tuner_type": "full"}, "output": {"formats": ["peft"]}}, "output.formats has peft; it needs tuning.tunerType lora (found full)"),
        ({"training": {"min_lr": 1e-3}}, "training.minLr is 0.001; it must be at most training.lr (0.0001)"),
        ({"training": {"lr_warmup_init": 1.0}}, "training.lrWarmupInit is 1; it must be at most training.lr (0.0001)"),
        ({"training": {"lr_warmup_fraction": 1.0}}, "training.lrWarmupFraction is 1; it must be less than 1"),
        ({"training": {"lr_warmup_iters": 5, "lr_decay_iters": 5}}, "training.lrWarmupIters is 5; it must be less than lrDecayIters (5)"),
        ({"training": {"recompute_modules": ["mlp"]}}, "training.recomputeModules is set; it needs recomputeGranularity selective (found None)"),
        ({"training": {"recompute_num_layers": 2}}, "training.recomputeNumLayers is set; it needs recomputeGranularity full (found None)"),
        (
            {"training": {"recompute_granularity": "full", "recompute_num_layers": 4}},
            "training.recomputeNumLayers is 4; with uniform it must divide the layers of each stage (30)",
        ),
        ({"parallelism": {"overlap_param_gather": True}}, "parallelism.overlapParamGather is true; it needs overlapGradReduce and useDistributedOptimizer"),
    ],
)
def test_options_that_contradict_each_other_are_refused(sections: dict[str, dict[str, Any]], message: str) -> None:
    assert message in refusal(**sections)


# What has no effect


def test_a_default_without_effect_is_not_spoken_of() -> None:
    resolution = run()
    assert not [note for note in resolution.notes if "crossEntropyLossFusion" in note]


def test_options_without_meaning_are_switched_off_and_said() -> None:
    written = {"attention_backend": "flash", "optimizer": "sgd", "cross_entropy_loss_fusion": False}
    resolution = run(parallelism={"sequence_parallel": True}, training=written, data={"dataset_num_proc": 4})
    config = resolution.config
    assert (config.parallelism.sequence_parallel, config.training.attention_backend) == (False, "local")
    assert config.parallelism.use_distributed_optimizer is False
    named = [note.split(" has no effect")[0] for note in resolution.notes]
    assert sorted(named) == [
        "data.datasetNumProc",
        "parallelism.sequenceParallel",
        "parallelism.useDistributedOptimizer",
        "training.attentionBackend flash",
        "training.crossEntropyLossFusion",
    ]


def test_a_gpu_run_in_bfloat16_has_nothing_to_say() -> None:
    resolution = run(Machine("cuda", 2, 80.0), QWEN25_7B, parallelism={"tensor_model_parallel_size": 2, "sequence_parallel": True})
    assert resolution.notes == ()
    assert resolution.config.parallelism.sequence_parallel


# Arithmetic


@pytest.mark.parametrize(
    ("training", "rows", "steps"),
    [({"num_train_epochs": 2}, 100, 12), ({"train_iters": 7}, 100, 7), ({"train_iters": 7, "num_train_epochs": 1}, 100, 6), ({}, 33, 2), ({}, 3, 1)],
)
def test_total_steps(training: dict[str, int], rows: int, steps: int) -> None:
    assert total_steps(make_config(training=training), rows) == steps


def test_data_parallel_size() -> None:
    assert data_parallel_size(make_config(), 4) == 4
    assert data_parallel_size(make_config(parallelism={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}), 8) == 2


# Memory


def estimate(machine: Machine, facts: dict[str, Any], row_tokens: int = 1, **sections: dict[str, Any]) -> float:
    filled = resolve(make_config(**sections), read_facts(facts), machine).config
    return estimate_memory(filled, read_facts(facts), machine, row_tokens) - OVERHEAD_GIB[machine.device]


@pytest.mark.parametrize(("device", "rank", "bits"), [("cuda", 64, 1), ("cuda", 65, 8), ("cpu", 8, 8)])
def test_dropout_keeps_a_bit_for_each_number_where_kernels_are_and_a_byte_elsewhere(device: Any, rank: int, bits: int) -> None:
    def gib(dropout: float) -> float:
        tuning = {"lora_rank": rank, "lora_dropout": dropout}
        training = {"micro_batch_size": 1, "recompute_granularity": "none"}
        return estimate(Machine(device, 1, 0.0), QWEN25_7B, row_tokens=1000, tuning=tuning, training=training)

    hidden, ffn, layers = 3584, 18944, 28
    assert (gib(0.05) - gib(0.0)) * 2**30 == pytest.approx(bits / 8 * 1000 * layers * (3 * hidden + ffn), rel=1e-6)


TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
TP2_PP2 = {**TP2, "pipeline_model_parallel_size": 2}
RECOMPUTES = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
KEEPS = {"recompute_granularity": "none"}
LORA_R8 = {"lora_rank": 8, "lora_dropout": 0.05}
WEIGHTS = {"tuner_type": "full", "lora_dropout": None}


@pytest.mark.parametrize(
    ("gpus", "parallelism", "training", "tuning", "micro_batch", "row_tokens", "measured"),
    [
        (2, {"tensor_model_parallel_size": 1}, KEEPS, LORA_R8, 8, 2034, 84.8),
        (2, {"tensor_model_parallel_size": 1}, KEEPS, LORA_R8, 8, 257, 23.7),
        (2, TP2, RECOMPUTES, LORA_R8, 16, 2034, 14.1),
        (2, TP2, RECOMPUTES, LORA_R8, 16, 257, 8.2),
        (2, TP2, RECOMPUTES, WEIGHTS, 16, 2034, 71.9),
        (4, {"tensor_model_parallel_size": 1}, KEEPS, LORA_R8, 8, 2034, 84.7),
        (4, {**TP2, "tensor_model_parallel_size": 4}, KEEPS, LORA_R8, 16, 2034, 39.8),
        (4, TP2_PP2, KEEPS, LORA_R8, 4, 2034, 21.2),
    ],
)
def test_the_formula_is_within_a_twentieth_of_what_was_measured_on_h200(
    gpus: int, parallelism: dict[str, Any], training: dict[str, Any], tuning: dict[str, Any], micro_batch: int, row_tokens: int, measured: float
) -> None:
    """docs/performance.md has the runs; rows of 257 tokens are a mean of the largest micro batch."""
    sizes = {"micro_batch_size": micro_batch, "global_batch_size": 32}
    gib = estimate(Machine("cuda", gpus, 140.0), QWEN25_7B, row_tokens, parallelism=parallelism, training={**training, **sizes}, tuning=tuning)
    assert gib == pytest.approx(measured, rel=0.05)


def test_full_bfloat16_training_takes_eighteen_bytes_a_parameter() -> None:
    parameters = 7_615_000_000  # Qwen2.5-7B, its biases left out
    gib = estimate(Machine("cuda", 1, 0.0), QWEN25_7B, tuning={"tuner_type": "full"}, training={"micro_batch_size": 1})
    assert gib == pytest.approx(18 * parameters / 2**30, rel=0.01)


def test_the_distributed_optimizer_shares_its_state() -> None:
    sections: dict[str, dict[str, Any]] = {"tuning": {"tuner_type": "full"}, "training": {"micro_batch_size": 1}}
    shared = estimate(Machine("cuda", 2, 0.0), QWEN25_7B, **sections)
    alone = estimate(Machine("cuda", 2, 0.0), QWEN25_7B, **sections, parallelism={"use_distributed_optimizer": False})
    assert alone - shared == pytest.approx(6 * 7.615e9 / 2**30, rel=0.01)


def test_lora_takes_the_weights_and_little_more() -> None:
    gib = estimate(Machine("cuda", 1, 0.0), QWEN25_7B, training={"micro_batch_size": 1})
    assert 2 * 7.615e9 / 2**30 < gib < 2.3 * 7.615e9 / 2**30


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"recompute_granularity": "full"}},
        {"training": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 10}},
        {"training": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}},
        {"training": {"micro_batch_size": 1}},
        {"parallelism": {"tensor_model_parallel_size": 2}},
        {"tuning": {"lora_dropout": 0.0}},
    ],
)
def test_what_saves_memory_lowers_the_estimate(change: dict[str, dict[str, Any]]) -> None:
    base: dict[str, dict[str, Any]] = {
        "training": {"micro_batch_size": 4, "recompute_granularity": "none"},
        "parallelism": {"tensor_model_parallel_size": 1},
        "tuning": {},
    }
    saving = {section: {**values, **change.get(section, {})} for section, values in base.items()}
    machine = Machine("cuda", 2, 0.0)
    assert estimate(machine, QWEN25_7B, 2048, **saving) < estimate(machine, QWEN25_7B, 2048, **base)


def test_sequence_parallel_lowers_the_estimate() -> None:
    machine = Machine("cuda", 2, 0.0)
    tensor = {"tensor_model_parallel_size": 2}
    assert estimate(machine, QWEN25_7B, 2048, parallelism={**tensor, "sequence_parallel": True}) < estimate(machine, QWEN25_7B, 2048, parallelism=tensor)
