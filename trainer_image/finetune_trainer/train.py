"""Training: Megatron-core's data parallelism, optimizer, schedule of the learning rate and pipeline, and the loop around them.

The loss of a step is the mean over the labelled tokens of its global batch, and so are the gradients, whatever the layout is.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from finetune_trainer import lora, loss, megatron_cpu, training_state
from finetune_trainer.checkpoint import Checkpoints
from finetune_trainer.contract import ConfigurationError, CurvePoint, NumericError, Preempted, RunConfig, TrainingConfig
from finetune_trainer.data import Batch, Rows, collate, micro_batches, order
from finetune_trainer.families import Family
from finetune_trainer.loss import Labelled
from finetune_trainer.model import packed_sequences, unwrap
from finetune_trainer.parallel import Ranks
from finetune_trainer.report import Beginning, Report
from finetune_trainer.training_state import TrainingState

megatron_cpu.install()

from megatron.core import tensor_parallel  # noqa: E402  (after the redirection)
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads  # noqa: E402
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

INITIAL_LOSS_SCALE = 2.0**8
"""For float16. Megatron-LM's 2**32 is for mean losses and long runs; here losses are sums over tokens, and each overflow costs a step that changes nothing."""
SEED_STRIDE = 1_000_003
"""A prime, so that the seeds of steps and of places do not meet."""


@dataclass(frozen=True)
class Trainer:
    """A model that is set up for training."""

    chunks: Sequence[DistributedDataParallel]
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    state: TrainingState
    training: TrainingConfig
    dropout: bool

    @property
    def learning_rate(self) -> float:
        """The rate that the next optimizer step uses."""
        return float(self.optimizer.param_groups[0]["lr"])


@dataclass(frozen=True)
class Sums:
    """What one step adds up over the whole gang."""

    loss: float
    labelled: int
    tokens: int
    stops: int
    """Ranks that were asked to stop."""


def prepare(chunks: Sequence[Any], family: Family, hf_config: Mapping[str, Any], config: RunConfig, ranks: Ranks, total_steps: int) -> Trainer:
    """Wrap the model for training; frozen parameters are in no buffer and in no optimizer.

    ``config`` is resolved, and its schedule checked.
    """
    architecture = family.architecture(hf_config)
    trained = training_state.find_trained(chunks, family, architecture, ranks)
    parallelism, training = config.parallelism, config.training
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallelism.overlap_grad_reduce,
        overlap_param_gather=parallelism.overlap_param_gather,
        use_distributed_optimizer=parallelism.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # the gradient's norm shows it, and names the step
    )
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    if not parallelism.overlap_grad_reduce:
        lora.add_gradients_in_place(wrapped)
    optimizer = get_megatron_optimizer(_optimizer_config(config), wrapped)
    _use_fast_loops(optimizer)
    for chunk in wrapped:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.grad_scale_func = optimizer.scale_loss if config.model.torch_dtype == "float16" else None
        chunk.config.no_sync_func = chunk.no_sync
    return Trainer(
        chunks=wrapped,
        optimizer=optimizer,
        scheduler=_make_scheduler(optimizer, training, total_steps),
        state=training_state.open_state(trained, optimizer, training, architecture, ranks),
        training=training,
        dropout=config.tuning.tuner_type == "lora" and bool(config.tuning.lora_dropout),
    )


def _optimizer_config(config: RunConfig) -> OptimizerConfig:
    training, dtype = config.training, getattr(torch, config.model.torch_dtype or "float32")
    return OptimizerConfig(
        optimizer=training.optimizer,
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        sgd_momentum=training.sgd_momentum,
        clip_grad=training.clip_grad,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        initial_loss_scale=INITIAL_LOSS_SCALE,
        hysteresis=1,
        use_distributed_optimizer=config.parallelism.use_distributed_optimizer,
        overlap_param_gather=config.parallelism.overlap_param_gather,
    )


def _use_fast_loops(optimizer: ChainedOptimizer) -> None:
    """Let torch's own optimizers update many small tensors at once; by default they do so on GPUs only."""
    for inner in optimizer.chained_optimizers:
        for group in inner.optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = True


# The schedule of the learning rate, as Megatron-LM's and Megatron-SWIFT's: counted in rows, so that its figures are theirs


def decay_steps(training: TrainingConfig, total_steps: int) -> int:
    """Steps over which the learning rate decays."""
    return training.lr_decay_iters or total_steps


def warmup_steps(training: TrainingConfig, total_steps: int) -> float:
    """Steps of linear warm-up; a fraction of a step is kept, as Megatron-LM keeps it."""
    if training.lr_warmup_fraction is not None:
        return training.lr_warmup_fraction * decay_steps(training, total_steps)
    return training.lr_warmup_iters


def check_schedule(training: TrainingConfig, total_steps: int) -> None:
    """Raise ConfigurationError for a warm-up that leaves no step to decay."""
    warmup, decay = warmup_steps(training, total_steps), decay_steps(training, total_steps)
    if warmup >= decay:
        field = "lrWarmupIters" if training.lr_warmup_fraction is None else "lrWarmupFraction"
        value = training.lr_warmup_iters if training.lr_warmup_fraction is None else training.lr_warmup_fraction
        raise ConfigurationError(
            f"training.{field} is {value}, a warm-up of {warmup:g} steps; it must be shorter than the {decay} steps over which the learning rate decays"
        )


def _make_scheduler(optimizer: ChainedOptimizer, training: TrainingConfig, total_steps: int) -> OptimizerParamScheduler:
    rows = training.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=training.lr_warmup_init,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=warmup_steps(training, total_steps) * rows,
        lr_decay_steps=decay_steps(training, total_steps) * rows,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=total_steps * rows,
        wd_incr_style="constant",
    )


# The loop


def fit(
    trainer: Trainer, rows: Rows, config: RunConfig, ranks: Ranks, report: Report, checkpoints: Checkpoints, beginning: Beginning, stop: Callable[[], bool]
) -> None:
    """Train from ``beginning`` to the last step, with checkpoints on the way and at the end. Collective.

    ``stop`` says whether this process was asked to end. Raises NumericError for a loss or gradient that is not finite, for a first gradient of zero
    and where no step has changed a weight, Preempted when any rank was asked to stop, its state saved.
    """
    training = config.training
    reading = order(len(rows.rows), training.seed, config.data.train_dataloader_shuffle)
    lengths = rows.lengths
    trainer.scheduler.step(beginning.updates * training.global_batch_size)
    report.begin(beginning)
    set_training(trainer, True)
    updates = beginning.updates
    for step in range(beginning.step, beginning.total_steps):
        began = time.perf_counter()
        numbers = micro_batches(reading, step, training.global_batch_size, training.micro_batch_size or 1, ranks.dp, lengths)
        batches = [collate([rows.rows[number] for number in some], _multiple(config, ranks), ranks.device) for some in numbers]
        seed_step(trainer, step, ranks)
        sums = sum_up(run_forward_backward(trainer, batches), batches, ranks, stop())
        rate = trainer.learning_rate
        gradient_norm, updated = update(trainer)
        updates += updated
        if not updated:
            report.note(describe_overflow(trainer, step + 1, in_vain=updates == 0 and step + 1 == beginning.total_steps))
        point = check_numbers(step + 1, sums, gradient_norm, rate, time.perf_counter() - began, first=updated and updates == beginning.updates + 1)
        report.step(point)
        keep(trainer, checkpoints, report, point.step, beginning.total_steps, updates, sums.stops > 0)
    checkpoints.close()
    settle(trainer)
    set_training(trainer, False)


def _multiple(config: RunConfig, ranks: Ranks) -> int:
    return ranks.tp.size if config.parallelism.sequence_parallel else 1


def keep(trainer: Trainer, checkpoints: Checkpoints, report: Report, step: int, total_steps: int, updates: int, stop: bool) -> None:
    """Save what is due after ``step``; raises Preempted when the gang was asked to stop before its last step."""
    if step == total_steps or stop or checkpoints.is_due(step):
        report.stage("saving")
        checkpoints.save(step, updates)
        report.stage("training")
    else:
        checkpoints.poll()
    if stop and step < total_steps:
        checkpoints.close()
        onward = (
            "with resume auto it goes on from there"
            if checkpoints.resumable
            else "noSaveOptim leaves the optimizer's state out, so training cannot go on from it and begins anew"
        )
        raise Preempted(f"the run was asked to stop and has saved step {step} of {total_steps}; {onward}")


def seed_step(trainer: Trainer, step: int, ranks: Ranks) -> None:
    """Make the random numbers of a step (dropout) a function of seed, step and place, so that a resumed run draws the same."""
    if trainer.dropout:
        place = (ranks.dp.rank * ranks.pp.size + ranks.pp.rank) * SEED_STRIDE
        seed = (trainer.training.seed + place + (step + 1) * SEED_STRIDE**2) % 2**31
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def run_forward_backward(trainer: Trainer, batches: Sequence[Batch]) -> list[Tensor]:
    """Forward and backward of all micro batches through all stages; on the last stage one ``[loss sum, labelled tokens]`` per micro batch."""
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    outputs: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=trainer.chunks[0],
        num_microbatches=len(batches),
        seq_length=max(batch.tokens.shape[1] for batch in batches),
        micro_batch_size=1,
        forward_only=False,
    )
    return outputs


def forward_step(batches: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """One micro batch through this stage: its output, and what makes a loss of it on the last stage."""
    batch = next(batches)
    model = unwrap(chunk)
    packed = packed_sequences(batch.cu_seqlens, batch.max_seqlen)
    learned = loss.labelled(model.output_layer, Labelled(batch.labelled, batch.labels)) if model.post_process else contextlib.nullcontext()
    with learned:
        output = chunk(input_ids=batch.tokens, position_ids=batch.position_ids, attention_mask=None, packed_seq_params=packed)
    return output, sum_loss


def sum_loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses of all labelled tokens, their number, and both together for the report."""
    labelled = torch.full((), losses.numel(), dtype=torch.int, device=losses.device)
    reported = torch.stack([losses.detach().sum(dtype=torch.float64), labelled.double()])
    return losses.sum(), labelled, reported


def sum_up(outputs: Sequence[Tensor], batches: Sequence[Batch], ranks: Ranks, stop: bool) -> Sums:
    """Add up loss and tokens over the gang; each micro batch is counted by one rank of those that computed it. Collective."""
    sums = torch.zeros(4, dtype=torch.float64)
    sums[3] = float(stop)
    if ranks.is_last_stage and ranks.tp.rank == 0:
        sums[2] = sum(batch.num_tokens for batch in batches)
        sums = sums.to(ranks.device)
        sums[:2] = torch.stack(list(outputs)).sum(dim=0)
    sums = sums.to(ranks.device)
    distributed.all_reduce(sums)
    loss, labelled, tokens, stops = sums.tolist()
    return Sums(loss, int(labelled), int(tokens), int(stops))


def update(trainer: Trainer) -> tuple[float, bool]:
    """One optimizer step: the gradient's norm before clipping, and whether weights were changed (float16's gradients may overflow)."""
    updated, norm, _ = trainer.optimizer.step()
    if updated:
        trainer.scheduler.step(trainer.training.global_batch_size)
    return float(norm or 0.0), bool(updated)


def describe_overflow(trainer: Trainer, step: int, *, in_vain: bool) -> str:
    """A sentence on a step whose float16 gradients overflowed; raises NumericError when no smaller loss scale can help, or when this was the last step and all were ``in_vain``."""
    if in_vain:
        raise NumericError(f"none of the {step} steps changed a weight: the gradients of each exceeded float16's range; model.torchDtype bfloat16 may help")
    scale = float(trainer.optimizer.get_loss_scale())
    if scale <= 1.0:
        raise NumericError(f"step {step}: the gradient is not finite, without any loss scale; a lower training.lr or model.torchDtype bfloat16 may help")
    return f"step {step} changed nothing: its gradients exceeded float16's range; the loss scale is {scale:g} now"


def check_numbers(step: int, sums: Sums, gradient_norm: float, rate: float, seconds: float, *, first: bool) -> CurvePoint:
    """The step's point of the curve; raises NumericError for a loss or gradient that is not finite and for a first gradient of zero."""
    if sums.labelled == 0:
        raise NumericError(f"step {step}: no token of the batch is labelled, so there is nothing to learn from it")
    loss = sums.loss / sums.labelled
    for name, value in (("loss", loss), ("norm of the gradient", gradient_norm)):
        if not math.isfinite(value):
            raise NumericError(
                f"step {step}: the {name} is {value}; a lower training.lr, a longer warm-up, or model.torchDtype bfloat16 instead of float16 may help"
            )
    if first and gradient_norm == 0.0:
        raise NumericError(
            f"step {step}: the first gradient is exactly zero, so nothing would be learned: no trained weight is reached by the loss "
            "(with recompute, a block whose input needs no gradient passes none on)"
        )
    return CurvePoint(step=step, loss=loss, learning_rate=rate, gradient_norm=gradient_norm, tokens=sums.tokens, seconds=seconds)


def set_training(trainer: Trainer, mode: bool) -> None:
    """Training or evaluation mode of the whole model."""
    for chunk in trainer.chunks:
        chunk.train(mode)


def settle(trainer: Trainer) -> None:
    """Have every parameter hold its last value: with overlapParamGather they are gathered only when the next forward pass begins."""
    for chunk in trainer.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.disable_forward_pre_hook(param_sync=True)
        unwrap(chunk).config.no_sync_func = None
