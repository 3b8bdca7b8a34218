"""What the operator and the trainer promise each other, and every option of a run, declared once.

``RunConfig`` goes in; ``Progress`` and ``RunReport`` come out. Each option is a field here and nowhere else: its name is
Megatron-SWIFT's in snake_case, its camelCase alias is the name in the FineTuneJob, and its ``Flag`` says how the command
line spells it today and how it used to. The flags, the CRD and the documentation are made from these fields.

This module imports pydantic and the standard library only. It holds no defaults that depend on a model or a machine:
``None`` means that the engine chooses (``resolve.py``).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

VERSION: Final = "v1alpha1"


@dataclass(frozen=True)
class Flag:
    """How the command line spells an option whose field carries this in its ``Annotated`` metadata.

    ``name`` replaces the field's own name; ``old`` are earlier spellings; ``inverted`` are earlier spellings of the
    opposite sense; ``unit`` is for the documentation. ``inert`` says why an accepted option changes nothing.
    """

    name: str | None = None
    old: tuple[str, ...] = ()
    inverted: tuple[str, ...] = ()
    unit: str | None = None
    inert: str | None = None


class Contract(BaseModel):
    """Base of all models here: frozen, camelCase outside, snake_case inside, unknown fields refused with the nearest name."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, value: Any) -> Any:
        if isinstance(value, dict):
            known = _spellings(cls)
            unknown = [key for key in value if key not in known]
            if unknown:
                camel = sorted(to_camel(name) for name in cls.model_fields)
                raise ValueError("; ".join(f"unknown field {key!r}{nearest(str(key), camel)}" for key in unknown))
        return value


@cache
def _spellings(model: type[Contract]) -> frozenset[str]:
    """Every name that a field may be written by."""
    return frozenset((*model.model_fields, *map(to_camel, model.model_fields)))


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to ``name``, or the empty string when none is close."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def describe_errors(error: ValidationError, prefix: str = "") -> list[str]:
    """One sentence per problem of a pydantic error: the field's API path, what was found, what would be right."""
    sentences = []
    for problem in error.errors():
        path = ".".join(str(to_camel(part) if isinstance(part, str) else part) for part in problem["loc"])
        field = ".".join(part for part in (prefix, path) if part)
        found = "" if problem["type"] in ("missing", "value_error") else f" (found {problem['input']!r})"
        message = problem["msg"].removeprefix("Value error, ")
        sentences.append(f"{field}: {message}{found}" if field else f"{message}{found}")
    return sentences


Name = Annotated[str, Field(min_length=1, max_length=4096)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Natural = Annotated[int, Field(ge=0, le=2**31 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
TorchDtype = Literal["float32", "bfloat16", "float16"]
ArtifactFormat = Literal["peft", "huggingface", "megatron"]
VerificationLevel = Literal["Files", "Adapter", "Logits"]


class ModelConfig(Contract):
    """The model to start from."""

    source: Annotated[Name, Flag(name="model")] = Field(description="A Hugging Face model folder (a path that begins with / or ./) or a hub id.")
    revision: Annotated[Name | None, Flag(name="model_revision")] = Field(None, description="Branch, tag or commit of a hub id.")
    torch_dtype: TorchDtype | None = Field(None, description="Data type of weights and computation. Absent: the checkpoint's own on a GPU, float32 on a CPU.")


class DataConfig(Contract):
    """What to train on."""

    dataset: list[Name] = Field(
        min_length=1,
        max_length=256,
        description="Data sets, each `id` or `path`, with `#N` to sample N rows (more than there are: rows repeat). Files are JSONL with `messages`. "
        "`swift/self-cognition` is built in.",
    )
    system: Annotated[str, Field(max_length=65536)] | None = Field(None, description="System prompt for rows that have none.")
    max_length: Annotated[Positive | None, Flag(unit="tokens")] = Field(
        None, description="Longest row in tokens; see truncationStrategy. Absent: what the model was trained for."
    )
    truncation_strategy: Literal["delete", "left", "right"] = Field(
        "delete", description="What happens to a row longer than maxLength: dropped and counted, or cut on that side."
    )
    model_name: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        None, min_length=1, max_length=2, description="Fills {{NAME}} in swift/self-cognition: Chinese and English name, or one for both."
    )
    model_author: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        None, min_length=1, max_length=2, description="Fills {{AUTHOR}} in swift/self-cognition: Chinese and English name, or one for both."
    )
    interleave_prob: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="Draw rows from the data sets with these probabilities, one each, summing to 1. Absent: they are concatenated.",
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        "first_exhausted", description="With interleaveProb: stop when the first or when every data set is used up."
    )
    dataset_shuffle: bool = Field(True, description="Sample and mix the rows at random (a function of dataSeed); otherwise in the order of the files.")
    train_dataloader_shuffle: bool = Field(True, description="Shuffle the rows anew in each epoch (a function of seed and epoch).")
    data_seed: Natural = Field(42, description="Seed of sampling and mixing.")
    packing: bool = Field(False, description="Pack rows into sequences of maxLength tokens; attention stays within a row.")
    dataset_num_proc: Annotated[Positive, Flag(inert="rows are tokenized in one pass that uses every core by itself")] = Field(
        1, description="Accepted for Megatron-SWIFT's scripts."
    )
    dataloader_num_workers: Annotated[Natural, Flag(old=("num_workers",), inert="tokenized rows are held in memory and need no workers")] = Field(
        4, description="Accepted for Megatron-SWIFT's scripts."
    )
    load_from_cache_file: Annotated[bool, Flag(inert="rows are tokenized at every start; it takes seconds")] = Field(
        False, description="Accepted for Megatron-SWIFT's scripts."
    )


class TuningConfig(Contract):
    """Which weights are trained."""

    tuner_type: Annotated[Literal["lora", "full"], Flag(old=("train_type",))] = Field("lora", description="Low-rank adapters, or every weight.")
    lora_rank: Positive | None = Field(None, le=4096, description="Rank of the adapters. Absent: 8.")
    lora_alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="The adapter's output is scaled by loraAlpha / loraRank. Absent: 32.")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="Dropout on the adapter's input. Absent: 0.05.")
    target_modules: list[Name] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="Layers that get an adapter: all-linear, or of linear_qkv, linear_proj, linear_fc1, linear_fc2. Absent: all-linear.",
    )
    use_rslora: bool | None = Field(None, description="Scale by loraAlpha / sqrt(loraRank) instead. Absent: false.")

    @model_validator(mode="after")
    def _lora_fields_need_lora(self) -> Self:
        if self.tuner_type == "full":
            for name in ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{to_camel(name)} is set; it needs tunerType lora (found full)")
        return self


class ParallelismConfig(Contract):
    """How the model is cut over processes."""

    tensor_model_parallel_size: Positive | None = Field(None, description="Processes that share each layer. Absent: the fewest that fit in memory.")
    pipeline_model_parallel_size: Positive | None = Field(
        None, description="Processes that share the stack of layers. Absent: 1, or more where memory needs it."
    )
    context_parallel_size: Positive | None = Field(None, description="Processes that share each sequence. Absent: 1.")
    expert_model_parallel_size: Annotated[Positive | None, Flag(old=("export_model_parallel_size",))] = Field(
        None, description="Processes that share the experts. Absent: 1."
    )
    expert_tensor_parallel_size: Positive | None = Field(None, description="Processes that share each expert. Absent: 1.")
    sequence_parallel: bool = Field(False, description="Cut activations between tensor-parallel regions along the sequence. No effect with tensor size 1.")
    use_distributed_optimizer: bool = Field(True, description="Each data-parallel process keeps its share of the optimizer's state.")
    overlap_grad_reduce: bool = Field(False, description="Reduce gradients while the backward pass still runs.")
    overlap_param_gather: bool = Field(False, description="Gather updated parameters while the forward pass already runs.")
    decoder_first_pipeline_num_layers: Positive | None = Field(None, description="Layers of the first pipeline stage. Absent: an even share.")
    decoder_last_pipeline_num_layers: Positive | None = Field(None, description="Layers of the last pipeline stage. Absent: an even share.")
    ddp_timeout: Annotated[Positive, Flag(unit="seconds")] = Field(600, description="A collective that takes longer is a hang and ends the run.")


class TrainingConfig(Contract):
    """How it is trained."""

    micro_batch_size: Positive | None = Field(None, description="Rows per forward pass and data-parallel process. Absent: what fits in memory.")
    global_batch_size: Positive = Field(16, description="Rows per optimizer step, over all processes.")
    num_train_epochs: Annotated[Positive | None, Flag(old=("max_epochs",))] = Field(
        None, description="Passes over the data; takes precedence over trainIters. Absent, and trainIters absent too: 1."
    )
    train_iters: Positive | None = Field(None, description="Optimizer steps, where numTrainEpochs is absent.")
    lr: Annotated[float, Field(gt=0)] | None = Field(None, description="Highest learning rate. Absent: 1e-4 with lora, 1e-5 with full.")
    min_lr: Annotated[float, Field(ge=0)] | None = Field(None, description="Learning rate at the end of the decay. Absent: 0.")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = Field("cosine", description="Shape of the decay.")
    lr_decay_iters: Positive | None = Field(None, description="Steps over which the rate decays. Absent: all.")
    lr_warmup_iters: Natural = Field(0, description="Steps of linear warm-up.")
    lr_warmup_fraction: Fraction | None = Field(None, description="Warm-up as a fraction of the decay's steps; takes precedence over lrWarmupIters.")
    lr_warmup_init: Annotated[float, Field(ge=0)] = Field(0.0, description="Rate at the start of the warm-up.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="Decoupled weight decay.")
    clip_grad: Annotated[float, Field(ge=0)] = Field(1.0, description="Largest norm of the gradient; 0 does not clip.")
    optimizer: Literal["adam", "sgd"] = Field("adam", description="adam is AdamW.")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Decay of the first moment.")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="Decay of the second moment.")
    adam_eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Added to the root of the second moment.")
    sgd_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Momentum of sgd.")
    seed: Natural = Field(42, description="Seed of the order of rows, of new weights and of dropout.")
    recompute_granularity: Literal["selective", "full", "none"] | None = Field(
        None, description="What the backward pass computes again instead of keeping. Absent: what memory needs."
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        None, description="With full: uniform recomputes groups of recomputeNumLayers, block the first recomputeNumLayers layers."
    )
    recompute_num_layers: Positive | None = Field(None, description="See recomputeMethod.")
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp"]] | None = Field(
        None, min_length=1, max_length=8, description="With selective: what is recomputed. Absent: core_attn."
    )
    cross_entropy_loss_fusion: Annotated[bool, Flag(inert="output layer and loss are always one, on labelled tokens only, and the softmax is float32")] = Field(
        True, description="Accepted for Megatron-SWIFT's scripts."
    )
    attention_backend: Literal["flash", "fused", "unfused", "local", "auto"] | None = Field(
        None, description="Attention kernel of transformer-engine. Absent: its own choice. A CPU has one only."
    )
    logging_steps: Annotated[Positive, Flag(old=("log_interval",))] = Field(
        5, description="Steps between two lines of the log; metrics and progress are fresh at every step."
    )

    @model_validator(mode="after")
    def _recompute_method_needs_full(self) -> Self:
        if self.recompute_method is not None and self.recompute_granularity != "full":
            raise ValueError(f"recomputeMethod is {self.recompute_method}; it needs recomputeGranularity full (found {self.recompute_granularity})")
        return self


class CheckpointsConfig(Contract):
    """When training state is kept, and whether a run continues from it."""

    save_steps: Annotated[Positive, Flag(old=("save_interval",))] = Field(
        500, description="Steps between checkpoints; one is written at the end and on SIGTERM too."
    )
    save_total_limit: Positive | None = Field(None, description="Keep only the newest N checkpoints. Absent: all.")
    resume: Literal["auto", "never"] = Field("auto", description="auto continues this run from its newest whole checkpoint, when there is one.")
    no_save_optim: bool = Field(False, description="Leave the optimizer's state out of checkpoints (such a checkpoint cannot be resumed from).")
    no_save_rng: Annotated[bool, Flag(inert="randomness is a function of seed and step, so checkpoints hold no random state")] = Field(
        False, description="Accepted for Megatron-SWIFT's scripts."
    )
    async_save: bool = Field(False, description="Write checkpoints while training goes on.")


class OutputConfig(Contract):
    """What is left when the run has ended."""

    formats: list[ArtifactFormat] | None = Field(
        None,
        min_length=1,
        max_length=3,
        description="peft: the adapter; huggingface: full (LoRA: merged) weights; megatron: Megatron-core's torch_dist. Absent: peft with lora, huggingface with full.",
    )
    verification: VerificationLevel = Field(
        "Adapter",
        description="Files: keys, shapes, bitwise round trip. Adapter: also the result loaded again and compared on sampled rows. Logits: also float32 against transformers.",
    )
    max_shard_size: Annotated[int, Field(ge=1), Flag(unit="bytes")] = Field(5_000_000_000, le=2**40, description="Largest safetensors file of an export.")


class RunContext(Contract):
    """Who this run is and where it reads and writes; filled by the command line or the operator, never by a user's YAML."""

    name: Name = Field("run", description="Name of the FineTuneJob.")
    namespace: Name = Field("default", description="Namespace of the FineTuneJob.")
    uid: str = Field("", max_length=64, description="Identity of the job; empty on the engine's command line.")
    attempt: Positive = Field(1, description="Rises with every new gang of processes.")
    output_dir: Name = Field(description="Absolute folder of this run's results.")
    artifact_layout: Literal["formats", "checkpoints"] = Field(
        "formats", description="Folder names of exports below outputDir: peft, huggingface, megatron; or checkpoint-<step> as Megatron-SWIFT's."
    )
    progress_host: Name = Field("127.0.0.1", description="Address on which rank 0 serves /metrics and /progress.")
    progress_port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="Its port; 0: a free one, written to the file progress.json in outputDir.")
    termination_message_path: str | None = Field(None, max_length=4096, description="File for the summary that Kubernetes reads.")
    grace_seconds: Positive = Field(30, description="Time that ranks have to write a checkpoint after SIGTERM.")


class RunConfig(Contract):
    """One run of the engine, whole."""

    version: Literal["v1alpha1"] = VERSION
    model: ModelConfig
    data: DataConfig
    tuning: TuningConfig = TuningConfig()
    parallelism: ParallelismConfig = ParallelismConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    output: OutputConfig = OutputConfig()
    run: RunContext

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a RunConfig from a JSON file; raises ConfigurationError with every problem, one a line."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ConfigurationError(f"{path}: " + "\n".join(describe_errors(error))) from error
        except OSError as error:
            raise ConfigurationError(f"cannot read the run's configuration: {error}") from error

    def dump(self, *, one_line: bool = False) -> str:
        """This configuration as JSON with camelCase names: what was written, without defaults; ``load`` reads it back equal."""
        written = {**self.model_dump(mode="json", exclude_unset=True, exclude_none=True), "version": self.version}
        return json.dumps(written, ensure_ascii=False, **({"separators": (",", ":")} if one_line else {"indent": 2}))

    def identity(self) -> str:
        """Hash of what decides the result (model, data, tuning, training, and the uid where there is one), 16 hexadecimal digits.

        Parallel sizes, micro batch, recompute and logging change how a result is computed, not which: they are left out, so that a run can continue on another layout;
        options without effect are left out too.
        """
        how = {
            "micro_batch_size",
            "recompute_granularity",
            "recompute_method",
            "recompute_num_layers",
            "recompute_modules",
            "attention_backend",
            "logging_steps",
        }
        decisive = {
            "model": self.model.model_dump(),
            "data": self.data.model_dump(exclude=_inert_fields(DataConfig)),
            "tuning": self.tuning.model_dump(),
            "training": self.training.model_dump(exclude=how),
            "uid": self.run.uid,
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _inert_fields(model: type[Contract]) -> set[str]:
    return {name for name, info in model.model_fields.items() if any(isinstance(item, Flag) and item.inert for item in info.metadata)}


class Reason(StrEnum):
    """Why a run ended without success: the trainer's part of the closed list."""

    CONFIGURATION = "Configuration"
    DATA = "Data"
    MODEL = "Model"
    VERIFICATION = "Verification"
    NUMERIC = "Numeric"
    OUT_OF_MEMORY = "OutOfMemory"
    DISTRIBUTED = "Distributed"
    HANG = "Hang"
    INTERNAL = "Internal"
    PREEMPTED = "Preempted"


class Consequence(StrEnum):
    """What the operator does about a reason: give up, try again and count it, or try again without counting."""

    PERMANENT = "permanent"
    RETRY = "retry"
    UNCOUNTED = "uncounted"


@dataclass(frozen=True)
class Exit:
    """One row of the table of exit codes."""

    code: int
    reason: Reason
    consequence: Consequence


EXITS: tuple[Exit, ...] = (
    Exit(1, Reason.INTERNAL, Consequence.RETRY),
    Exit(10, Reason.CONFIGURATION, Consequence.PERMANENT),
    Exit(11, Reason.DATA, Consequence.PERMANENT),
    Exit(12, Reason.MODEL, Consequence.PERMANENT),
    Exit(13, Reason.VERIFICATION, Consequence.PERMANENT),
    Exit(14, Reason.NUMERIC, Consequence.PERMANENT),
    Exit(15, Reason.OUT_OF_MEMORY, Consequence.PERMANENT),
    Exit(20, Reason.DISTRIBUTED, Consequence.RETRY),
    Exit(21, Reason.HANG, Consequence.RETRY),
    Exit(143, Reason.PREEMPTED, Consequence.UNCOUNTED),
)


def exit_for(reason: Reason) -> Exit:
    """The row of a reason."""
    return next(row for row in EXITS if row.reason is reason)


def exit_of(code: int) -> Exit:
    """The row of a process's exit code; a code that no row has is an Internal failure."""
    return next((row for row in EXITS if row.code == code), exit_for(Reason.INTERNAL))


class EngineError(Exception):
    """A failure with a reason; the message is for the user: the field or file, what was found, what would be right."""

    reason = Reason.INTERNAL


class ConfigurationError(EngineError):
    reason = Reason.CONFIGURATION


class DataError(EngineError):
    reason = Reason.DATA


class ModelError(EngineError):
    reason = Reason.MODEL


class VerificationError(EngineError):
    reason = Reason.VERIFICATION


class NumericError(EngineError):
    reason = Reason.NUMERIC


class OutOfMemoryError(EngineError):
    reason = Reason.OUT_OF_MEMORY


class DistributedError(EngineError):
    reason = Reason.DISTRIBUTED


class Preempted(EngineError):
    """The run was asked to stop; its state is saved."""

    reason = Reason.PREEMPTED


Stage = Literal["starting", "loading", "training", "saving", "exporting", "verifying", "finished"]


AVERAGED_STEPS = 20
"""Steps over which tokens per second and the time left are averaged."""

RECENT_STEPS = 64
"""Steps that an answer of `/progress` holds, so that a reader who asks twice a second misses none."""


def format_duration(seconds: float) -> str:
    """Seconds for reading: `31s`, `4m10s`, `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


def is_logged(step: int, total_steps: int, logging_steps: int) -> bool:
    """Whether a step has a line in the log: the first, the last, and every ``logging_steps``."""
    return step % logging_steps == 0 or step in (1, total_steps)


class CurvePoint(Contract):
    """One optimizer step."""

    step: Natural
    loss: float = Field(description="mean over the labelled tokens of the global batch")
    learning_rate: float
    gradient_norm: float
    tokens: Natural = Field(description="tokens of the global batch, padding not counted")
    seconds: float


class Progress(Contract):
    """What `/progress` answers, at any time of a run."""

    stage: Stage = "starting"
    step: Natural = 0
    total_steps: Natural = 0
    steps: str = Field("0/0", description="step/totalSteps, for printing")
    percent: Annotated[int, Field(ge=0, le=100)] = 0
    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens_per_second: float | None = Field(None, description="over all processes, padding not counted")
    elapsed_seconds: float = 0.0
    eta_seconds: float | None = None
    remaining: str | None = Field(None, description="etaSeconds for printing: 31s, 4m10s, 2h05m")
    last_heartbeat_time: datetime = Field(description="end of the last piece of work, never the time of the answer")
    resolved: dict[str, Any] = Field({}, description="what was chosen where the spec was silent, by API name")
    recent: list[CurvePoint] = Field([], max_length=RECENT_STEPS, description=f"the newest steps of this attempt, at most {RECENT_STEPS}, the oldest first")

    def at(self, step: int, total_steps: int) -> Progress:
        """This progress when ``step`` of ``total_steps`` steps are done."""
        percent = 100 * step // total_steps if total_steps else 0
        return self.model_copy(update={"step": step, "total_steps": total_steps, "steps": f"{step}/{total_steps}", "percent": percent})

    def after(self, steps: Sequence[CurvePoint]) -> Progress:
        """This progress when the last of ``steps`` has just been done, with the figures of that step; the ones before it are for averages."""
        newest, averaged = steps[-1], steps[-AVERAGED_STEPS:]
        spent = sum(each.seconds for each in averaged)
        left = (self.total_steps - newest.step) * spent / len(averaged)
        figures = {
            "loss": newest.loss,
            "learning_rate": newest.learning_rate,
            "gradient_norm": newest.gradient_norm,
            "tokens_per_second": round(sum(each.tokens for each in averaged) / spent, 1) if spent > 0 else None,
            "eta_seconds": round(left, 1),
            "remaining": format_duration(left),
            "recent": list(steps[-RECENT_STEPS:]),
        }
        return self.at(newest.step, self.total_steps).model_copy(update=figures)


class Artifact(Contract):
    """One exported result."""

    format: ArtifactFormat = Field(description="peft, huggingface or megatron.")
    path: str = Field(max_length=4096, description="Its folder, as the trainer's pods see it.")
    sha256: str = Field(max_length=64, description="of the artifact's manifest, which lists the sha256 of every file")


class Verification(Contract):
    """What was proven about the artifacts."""

    level: VerificationLevel = Field(description="How deep was looked: Files, Adapter or Logits.")
    passed: bool = Field(description="Whether the artifacts give the trainer's results.")
    max_logit_difference: float | None = Field(None, description="Largest difference of a logit from the trainer's, over the sampled rows.")
    message: str = Field("", description="What was compared, and what differs.")


class FailureReport(Contract):
    """Why the run ended, from the rank that failed first."""

    reason: Reason
    message: str
    rank: Natural | None = None
    node: str | None = None
    exit_code: int


class RunReport(Contract):
    """`report.json`: the whole result of a run; its summary is the termination message."""

    version: Literal["v1alpha1"] = VERSION
    name: str
    namespace: str
    uid: str
    attempt: Positive
    identity: str
    succeeded: bool
    failure: FailureReport | None = None
    start_time: datetime
    completion_time: datetime
    resumed_from_step: Natural = 0
    resolved: dict[str, Any] = {}
    notes: list[str] = Field([], description="what was said once: options without effect, choices made")
    rows: dict[str, int] = Field({}, description="rows read, dropped as too long, trained on")
    curve: list[CurvePoint] = []
    peak_memory_gib: list[float] = Field([], description="per rank")
    artifacts: list[Artifact] = []
    verification: Verification | None = None
    versions: dict[str, str] = Field({}, description="of the packages that decide the result")

    def summary(self, limit: int = 4096) -> str:
        """The termination message: JSON of at most ``limit`` bytes, without the curve, the longest texts cut."""
        body = self.model_dump(mode="json", by_alias=True, exclude={"curve", "notes", "versions"}, exclude_none=True)
        text = json.dumps(body, ensure_ascii=False)
        width = limit
        while len(text.encode()) > limit and width > 8:
            width //= 2
            text = json.dumps(_cut(body, width), ensure_ascii=False)
        return text


def _cut(value: Any, width: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= width else value[: width - 1] + "…"
    if isinstance(value, dict):
        return {key: _cut(item, width) for key, item in value.items()}
    if isinstance(value, list):
        return [_cut(item, width) for item in value[:width]]
    return value
