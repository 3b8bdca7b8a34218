"""Flags of Megatron-SWIFT, today's and older, that are not options of this engine: what happens when a script has them.

Three answers, so that nothing in a script is passed over in silence: ``NO_EFFECT`` is accepted and named in one line, with the
reason; ``FIXED`` is accepted with the one value that this version works with; ``REFUSED`` ends the command with its sentence.
``CONVERTED`` are older flags whose value reads differently today. When a feature is built, its row here becomes a field of the
contract.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fixed:
    """The values that this version works with anyway, why they change nothing, and the sentence for any other."""

    accepted: tuple[str, ...]
    note: str
    refusal: str


@dataclass(frozen=True)
class Converted:
    """How an older flag's text becomes (flag, text) of today; None: it says what is so anyway. ValueError: not a text of this flag."""

    convert: Callable[[str], tuple[str, str] | None]
    meaning: str


def _each(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


def _fixed(names: str, accepted: str, note: str, refusal: str) -> dict[str, Fixed]:
    return dict.fromkeys(names.split(), Fixed(tuple(accepted.split("|")), note, refusal))


def _unbuilt(names: str, accepted: str, what: str, instead: str = "") -> dict[str, Fixed]:
    return _fixed(names, accepted, "as it is anyway", f"this version does not have {what} yet{f'; write {instead}' if instead else ''}")


NO_EFFECT: dict[str, str] = {
    **_each("load_safetensors", "--model implies it"),
    **_each("model_type", "config.json says it"),
    **_each("attn_impl", "--attention_backend decides"),
    **_each("use_hf check_model download_mode local_repo_path", "hub ids are Hugging Face's"),
    **_each("enable_npu_model_patch", "of other hardware"),
    **_each(
        "masked_softmax_fusion no_masked_softmax_fusion bias_dropout_fusion no_bias_dropout_fusion bias_activation_fusion bias_swiglu_fusion no_bias_swiglu_fusion "
        "apply_rope_fusion no_rope_fusion gradient_accumulation_fusion no_gradient_accumulation_fusion",
        "the engine chooses fused kernels by itself",
    ),
    **_each("cross_entropy_fusion_impl", "output layer and loss are always one, on labelled tokens only"),
    **_each(
        "tp_comm_overlap overlap_p2p_comm batch_p2p_comm align_param_gather align_grad_reduce nccl_comm_warmup overlap_param_gather_with_optimizer_step",
        "Megatron-core's default is used",
    ),
    **_each("data_parallel_random_init te_rng_tracker use_cpu_initialization", "every weight is read from the model"),
    **_each("accumulate_allreduce_grads_in_fp32", "gradients are always added up in float32"),
    **_each("manual_gc manual_gc_interval manual_gc_steps manual_gc_eval", "garbage collection needs no hand"),
    **_each(
        "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context lazy_tokenize packing_num_proc data_sharding",
        "tokenized rows are held in memory and need no workers",
    ),
    **_each("padding_free padding_side mlp_padding_free", "rows are always packed without padding"),
    **_each("seq_length packing_length", "--max_length decides"),
    **_each("remove_unused_columns strict val_dataset_shuffle shuffle_buffer_size", "a malformed row is always an error, other columns are ignored"),
    **_each("eval_iters eval_interval eval_steps metric_for_best_model greater_is_better", "there is no validation set"),
    **_each(
        "auto_detect_ckpt_format exit_on_missing_checkpoint no_load_optim no_load_rng use_persistent_ckpt_worker load_args load_data_args",
        "training starts from --model, and --resume auto needs no hint",
    ),
    **_each(
        "dist_ckpt_save_pre_mcore_014 dist_ckpt_optim_fully_reshardable distrib_optim_fully_reshardable_mem_efficient strict_fsdp_dtensor_load",
        "checkpoints fit every layout",
    ),
    **_each("local_rank ddp_backend distributed_backend skip_megatron_init", "the launcher decides: nccl on GPUs, gloo on CPUs"),
    **_each("bridge_backend tuner_backend use_swift_lora", "conversion and adapters are the engine's own"),
    **_each(
        "log_params_norm log_throughput log_timers_to_tensorboard log_validation_ppl_to_tensorboard log_memory_to_tensorboard log_learning_rate_to_tensorboard "
        "log_loss_scale_to_tensorboard log_num_zeros_in_grad log_batch_size_to_tensorboard log_world_size_to_tensorboard logging_level tensorboard_dir "
        "tensorboard_log_interval tensorboard_queue_size wandb_project wandb_exp_name wandb_save_dir swanlab_project swanlab_exp_name",
        "metrics are served at /metrics and kept in report.json",
    ),
    **_each(
        "num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups max_position_embeddings position_embedding_type rotary_base "
        "rotary_percent normalization norm_epsilon swiglu untie_embeddings_and_output_weights disable_bias_linear add_qkv_bias attention_dropout hidden_dropout kv_channels "
        "qk_layernorm transformer_impl padded_vocab_size make_vocab_size_divisible_by num_experts moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_router_topk "
        "moe_router_pre_softmax kv_lora_rank q_lora_rank max_model_len vocab_size",
        "config.json says it",
    ),
    **_each(
        "moe_router_load_balancing_type moe_router_dtype moe_token_dispatcher_type moe_enable_deepep moe_grouped_gemm moe_permute_fusion moe_aux_loss_coeff moe_z_loss_coeff "
        "moe_shared_expert_overlap moe_layer_recompute moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy",
        "the models of this version have no experts",
    ),
    **_each(
        "freeze_vit freeze_aligner vit_gradient_checkpointing vit_gradient_checkpointing_kwargs vit_attn_impl vit_lr aligner_lr max_pixels norm_bbox language_model_only",
        "the models of this version read text only",
    ),
    **_each("optimizer_offload_fraction optimizer_cuda_graph", "the optimizer's state stays on the device"),
    **_each(
        "muon_momentum muon_split_qkv muon_use_nesterov muon_scale_mode muon_fp32_matmul_prec muon_coefficient_type muon_num_ns_steps muon_tp_mode",
        "--optimizer is not muon",
    ),
    **_each("muon_extra_scale_factor muon_scalar_optimizer muon_lr muon_min_lr", "--optimizer is not muon"),
    **_each("lr_wsd_decay_style lr_wsd_decay_iters", "--lr_decay_style is not WSD"),
    **_each("fp8_recipe fp8_param_gather fp8_amax_history_len fp8_amax_compute_algo fp4_recipe fp4_param_gather", "--fp8_format and --fp4_format are not set"),
    **_each("mtp_loss_scaling_factor mtp_decoder_input_detach mtp_shared_weights", "--mtp_num_layers is not set"),
    **_each("cp_comm_type cp_partition_mode sequence_packing_scheduler", "--context_parallel_size is 1"),
    **_each("microbatch_group_size_per_vp_stage", "--virtual_pipeline_model_parallel_size is 1"),
    **_each("data_parallel_sharding_strategy", "--use_megatron_fsdp is not set"),
    **_each(
        "dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss apply_dsa_kernel_fusion csa_dense_mode use_fused_mhc mhc_recompute_layer_num linear_decoupled_in_proj",
        "of other models",
    ),
    **_each("engram_tokenizer_map apply_wd_to_qk_layernorm experts_impl num_labels problem_type mrl_dims", "of other models"),
    **_each("bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_quant_storage hqq_axis", "--quant_method is not set"),
    **_each(
        "max_new_tokens temperature top_k top_p repetition_penalty num_beams stream stop_words logprobs top_logprobs structured_outputs_regex response_prefix enable_thinking "
        "template_backend",
        "training generates no text",
    ),
    **_each("device_map max_memory init_strategy offload_model offload_optimizer offload_bridge", "each process holds its own share of the model"),
    **_each("ray_exp_name device_groups", "--use_ray is not set"),
}

FIXED: dict[str, Fixed] = {
    **_fixed("finetune", "true", "training starts from --model", "to go on with an earlier run, write --resume auto instead"),
    **_fixed("perform_initialization", "false", "every weight is read from the model", "this version trains from a model's weights, not from random ones"),
    **_fixed("no_initialization", "true", "every weight is read from the model", "this version trains from a model's weights, not from random ones"),
    **_fixed("calculate_per_token_loss", "true", "as it is anyway", "the loss is always the mean over the labelled tokens of the global batch"),
    **_fixed("attention_softmax_in_fp32", "true", "as it is anyway", "attention's softmax is always taken in float32"),
    **_fixed(
        "dataloader_type", "cyclic", "--train_dataloader_shuffle true, the default, is the same", "write --train_dataloader_shuffle false for rows in order"
    ),
    **_fixed(
        "report_to",
        "tensorboard|none",
        "metrics are served at /metrics and kept in report.json",
        "metrics are served at /metrics (Prometheus) and kept in report.json only",
    ),
    **_fixed("ckpt_format", "torch_dist", "as it is anyway", "checkpoints are torch_dist"),
    **_fixed("loss_scale", "default", "as it is anyway", "the loss is on the assistant's tokens only"),
    **_fixed("task_type", "causal_lm", "as it is anyway", "this version trains causal language models only"),
    **_fixed("use_chat_template", "true", "as it is anyway", "rows are always rendered with the model's chat template"),
    **_fixed("load_in_8bit load_in_4bit", "false", "as it is anyway", "this version does not have quantized training"),
    **_unbuilt("split_dataset_ratio", "0", "a validation set"),
    **_unbuilt("streaming", "false", "streaming data sets"),
    **_unbuilt("packing_strategy", "binpack", "another packing"),
    **_unbuilt("group_by_length", "false", "batches of rows of like length"),
    **_unbuilt("disable_auto_column_mapping", "false", "other columns than messages"),
    **_unbuilt("decision_drop_instructions decision_subsample_options decision_state_as_text", "0", "decision tasks"),
    **_unbuilt("decision_shuffle_fields", "false", "decision tasks"),
    **_unbuilt("enable_dft_loss enable_channel_loss is_binary_loss_scale", "false", "this loss"),
    **_unbuilt("preserve_thinking disable_ignore_empty_think", "false", "this treatment of thinking"),
    **_unbuilt("add_non_thinking_prefix", "true", "another treatment of thinking"),
    **_unbuilt("optimizer_cpu_offload use_precision_aware_optimizer", "false", "this way of saving memory"),
    **_unbuilt("main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype", "fp32", "optimizer states of another type"),
    **_unbuilt("weight_decay_incr_style", "constant", "a weight decay that grows"),
    **_unbuilt("save_missing_weights", "false", "the copying of weights that Megatron-core does not model"),
    **_unbuilt("save_strategy", "steps", "checkpoints by epoch", "--save_steps"),
    **_unbuilt("create_checkpoint_symlink", "false", "links to checkpoints"),
    **_unbuilt("use_megatron_fsdp use_ray", "false", "this way of distributing work"),
    **_unbuilt("account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split", "false", "this split", "--decoder_first_pipeline_num_layers"),
    **_unbuilt("virtual_pipeline_model_parallel_size sequence_parallel_size", "1", "this way of distributing work"),
    **_unbuilt("apply_query_key_layer_scaling", "false", "query-key layer scaling"),
    **_unbuilt("freeze_llm", "false", "frozen parts", "--tuner_type lora"),
    **_unbuilt("freeze_parameters_ratio", "0", "frozen parts", "--tuner_type lora"),
    **_unbuilt("lora_bias", "none", "trained biases beside the adapters"),
    **_unbuilt("ignore_args_error", "false", "a way to pass over flags that it does not know"),
    **_unbuilt("deterministic_mode", "false", "a deterministic mode on GPUs"),
}

_LATER = "this version does not have it yet"
REFUSED: dict[str, str] = {
    **_each("mcore_model load", "training from a Megatron checkpoint is not built yet; give the Hugging Face folder with --model"),
    **_each(
        "mcore_adapter mcore_adapters adapter_load adapters", "training on from an adapter is not built yet; start from --model, or go on with --resume auto"
    ),
    **_each("mcore_ref_model mcore_ref_adapter ref_model ref_adapters", "a reference model belongs to preference training, which is not built yet"),
    **_each("resume_from_checkpoint", "write --resume auto: it finds the newest whole checkpoint of the same run below --output_dir"),
    **_each("hub_token", "a token on a command line is seen by others; set HF_TOKEN in the environment"),
    **_each("val_dataset cached_val_dataset", "a validation set is not built yet"),
    **_each("cached_dataset", "cached data sets are not built yet; give the files with --dataset"),
    **_each("columns custom_dataset_info", "rows have the column messages; other columns cannot be mapped yet"),
    **_each("template agent_template", "the model's own chat template is always used"),
    **_each("new_special_tokens", "the model's own tokenizer is always used"),
    **_each("external_plugins custom_register_path callbacks", "code from files is not run"),
    **_each("model_kwargs megatron_extra_kwargs rope_scaling pipeline_model_parallel_layout", _LATER),
    **_each("target_regex modules_to_save lora_dtype freeze_parameters freeze_parameters_regex trainable_parameters trainable_parameters_regex", _LATER),
    **_each("start_weight_decay end_weight_decay fp8_format fp4_format mtp_num_layers quant_method quant_bits", _LATER),
    **_each(
        "rlhf_type loss_type beta rpo_alpha reference_free label_smoothing f_divergence_type desirable_weight undesirable_weight calculate_KL center_rewards_coefficient "
        "teacher_model teacher_model_type teacher_model_revision teacher_model_server teacher_tag_key gkd_logits_topk lmbda seq_kd offload_teacher_model sft_alpha teacher_kl_coef "
        "generation_batch_size steps_per_generation num_generations num_generations_eval max_completion_length importance_sampling_level tau_pos tau_neg real_tau fipo_decay_rate "
        "fipo_clip_range fipo_clip_high_only fipo_safety_threshold epsilon epsilon_high delta use_vllm vllm_mode vllm_enable_prefix_caching vllm_gpu_memory_utilization "
        "vllm_tensor_parallel_size vllm_max_model_len vllm_enforce_eager vllm_limit_mm_per_prompt vllm_disable_cascade_attn vllm_max_num_seqs vllm_mm_processor_cache_gb "
        "vllm_engine_kwargs vllm_enable_lora sleep_level vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_server_group_port reward_funcs "
        "reward_weights cosine_min_len_value_wrong cosine_max_len_value_wrong cosine_min_len_value_correct cosine_max_len_value_correct cosine_max_len repetition_n_grams "
        "repetition_max_penalty soft_max_length soft_cache_length dynamic_sample max_resample_times overlong_filter scale_rewards advantage_estimator kl_in_reward "
        "wandb_log_unique_prompts log_completions rollout_importance_sampling_mode rollout_importance_sampling_threshold log_rollout_offpolicy_metrics "
        "off_policy_sequence_mask_delta log_entropy top_entropy_quantile router_replay_mode reward_model reward_model_plugin sync_ref_model ref_model_sync_steps "
        "ref_model_mixup_alpha async_generate move_model_batches multi_turn_scheduler max_turns completion_length_limit_scope vllm_server_pass_dataset use_gym_env gym_env "
        "num_iterations",
        "it belongs to `megatron rlhf`, which is not built yet",
    ),
    **_each("to_mcore to_hf test_convert_precision test_convert_dtype exist_ok", "it belongs to `megatron export`, which is not built yet"),
}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


CONVERTED: dict[str, Converted] = {
    "distributed_timeout_minutes": Converted(lambda text: ("ddp_timeout", str(int(text) * 60)), "minutes, a whole number"),
    "use_flash_attn": Converted(lambda text: ("attention_backend", "flash") if _boolean(text) else None, "true or false"),
    "bf16": Converted(lambda text: ("torch_dtype", "bfloat16") if _boolean(text) else None, "true or false"),
    "fp16": Converted(lambda text: ("torch_dtype", "float16") if _boolean(text) else None, "true or false"),
}
