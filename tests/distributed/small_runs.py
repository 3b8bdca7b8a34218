"""A run of the engine on a rank of a gang, from the configuration to the last step; without export and verification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.contract import RunConfig


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and how; the dictionaries are sections of a RunConfig."""

    model: Path
    rows: Path
    output: Path
    parallelism: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    checkpoints: dict[str, Any] | None = None
    attempt: int = 1
    stop_at: int | None = None
    """The step after which the run is asked to stop."""
    dtype: str = "float32"

    @property
    def config(self) -> RunConfig:
        """As a user would write it."""
        return RunConfig.model_validate(
            {
                "model": {"source": str(self.model), "torchDtype": self.dtype},
                "data": {"dataset": [str(self.rows)], "maxLength": 128},
                "tuning": {"loraDropout": 0, **(self.tuning or {})},
                "parallelism": self.parallelism or {},
                "training": {"globalBatchSize": 8, "microBatchSize": 2, "trainIters": 6, "lr": 5e-3, "loggingSteps": 1, **(self.training or {})},
                "checkpoints": {"saveSteps": 3, **(self.checkpoints or {})},
                "run": {"outputDir": str(self.output), "attempt": self.attempt},
            }
        )


@dataclass(frozen=True)
class Outcome:
    """What a rank knows in the end."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    tokens: list[int]
    notes: list[str]
    resumed_from: int
    buffered: int
    """Elements in gradient buffers on this rank."""


def train(job: Job, interfere: Callable[[Any], None] | None = None, afterwards: Callable[[Any, Any], None] | None = None) -> Outcome:
    """Train; ``interfere`` may change the trainer before the first step, ``afterwards`` gets the model and the ranks after the last."""
    from finetune_trainer import checkpoint, convert, data, families, hf_files, lora, memory, model, parallel, resolve
    from finetune_trainer import train as training
    from finetune_trainer.report import Report

    given = job.config
    report = Report(given, rank=1)  # keeps count and says nothing
    parallel.open_process_group(given)
    hf = hf_files.open_model(given.model)
    resolution = resolve.resolve(given, memory.read_facts(hf.config), parallel.describe_machine())
    config, family = resolution.config, families.find(hf.config)
    rows = data.open_rows(config.data, data.load_tokenizer(hf.folder))
    total_steps = resolve.total_steps(config, len(rows.rows))
    training.check_schedule(config.training, total_steps)
    ranks = parallel.initialize(config.parallelism, config.training.seed)
    chunks = model.build(family, hf.config, config, ranks)
    convert.import_base(chunks, family, hf, ranks)
    lora.attach(chunks, config.tuning, config.training.seed)
    trainer = training.prepare(chunks, family, hf.config, config, ranks, total_steps)
    checkpoints = checkpoint.Checkpoints(config, given.identity(), {"rows": rows.digest}, trainer.state, report)
    beginning = checkpoints.resume(total_steps)
    if interfere is not None:
        interfere(trainer)
    training.fit(
        trainer,
        rows,
        config,
        ranks,
        report,
        checkpoints,
        beginning,
        lambda: job.stop_at is not None and ranks.rank == 0 and len(report.curve) + 1 >= job.stop_at,
    )
    if afterwards is not None:
        afterwards(chunks, ranks)
    return Outcome(
        losses=[point.loss for point in report.curve],
        norms=[point.gradient_norm for point in report.curve],
        rates=[point.learning_rate for point in report.curve],
        tokens=[point.tokens for point in report.curve],
        notes=report._notes,
        resumed_from=beginning.step,
        buffered=sum(buffer.numel for chunk in trainer.chunks for buffer in chunk.buffers),
    )


def lose_the_gradient(trainer: Any) -> None:
    """Make a loss that does not depend on any weight."""
    for chunk in trainer.chunks:
        chunk.module.register_forward_hook(lambda module, inputs, output: output * 0.0)


def explode(trainer: Any) -> None:
    """Make the loss NaN after eight micro batches."""
    calls = []

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        calls.append(None)
        return output * (float("nan") if len(calls) > 8 else 1.0)

    for chunk in trainer.chunks:
        chunk.module.register_forward_hook(hook)


def raise_loss_scale(trainer: Any, scale: float) -> None:
    """Begin with another loss scale of float16."""
    for inner in trainer.optimizer.chained_optimizers:
        inner.grad_scaler._scale.fill_(scale)


def lose_finite_gradients(trainer: Any) -> None:
    """Make gradients infinite that no loss scale makes smaller, of a loss that is finite."""
    raise_loss_scale(trainer, 1.0)

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        output.register_hook(lambda gradient: gradient * float("inf"))

    for chunk in trainer.chunks:
        chunk.module.register_forward_hook(hook)


def expect_gradients_in_place(trainer: Any) -> None:
    """Fail unless each factor of an adapter adds its gradient to ``main_grad`` itself."""
    assert all(factor.sums is factor.weight.main_grad for factor in _factors(trainer))


def expect_gradients_of_autograd(trainer: Any) -> None:
    """Fail if a factor of an adapter adds its gradient anywhere itself."""
    assert all(factor.sums is None for factor in _factors(trainer))


def _factors(trainer: Any) -> list[Any]:
    from finetune_trainer import lora

    factors = [factor for _, layer in lora.adapters(trainer.chunks) for factor in (layer.lora_A, layer.lora_B)]
    assert factors
    return factors


def export_megatron(job: Job, folder: Path, *, write: bool) -> list[str]:
    """Train, write the megatron format when asked to, and read it back: names of weights that differ from the model's."""
    from finetune_trainer import checkpoint

    differing: list[str] = []

    def export(chunks: Any, ranks: Any) -> None:
        if write:
            checkpoint.save_model(chunks, ranks, folder, 3)
        differing.extend(checkpoint.differing_weights(chunks, folder))

    train(job, afterwards=export)
    return differing
