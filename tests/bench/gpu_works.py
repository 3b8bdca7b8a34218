"""What ``make bench-gpu`` measures: works by name, the jobs that they read their figures from, and the arithmetic that a job needs.

A job is a training run of both sides; works that need the same job share it. The flags are those of the reference job: what differs between the sides is named here.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Side = Literal["ours", "peer"]

SHARED = [
    *shlex.split("""
    --model_type qwen2 --save_safetensors true --global_batch_size 16 --finetune true --cross_entropy_loss_fusion true --lr_warmup_fraction 0.05
    --save_steps 100 --max_length 2048 --dataloader_num_workers 4 --no_save_optim true --no_save_rng true --dataset_num_proc 4 --split_dataset_ratio 0
    --check_model false --torch_dtype bfloat16 --model_author swift --model_name swift-robot
    """),
    "--system",
    "You are a helpful assistant.",
]
"""Of both sides. With ``--save_safetensors true`` the peer writes what ours writes, and would merge the adapter as well."""
OWN: Mapping[Side, list[str]] = {
    "ours": ["--verification", "Files", "--add_version", "false"],
    "peer": ["--template", "qwen2_5", "--merge_lora", "false"],
}
LORA = shlex.split("--tuner_type lora --lora_rank 8 --lora_alpha 32 --target_modules all-linear --lr 1e-4 --min_lr 1e-5 --lora_dropout")
FULL = shlex.split("--tuner_type full --lr 1e-5 --min_lr 1e-6")
GLOBAL_BATCH = 16
FEW_STEPS = 2
"""Of a job whose steps nobody counts."""

HIDDEN, FFN, VOCAB, LAYERS, QUERY, KEY_VALUE = 3584, 18944, 152064, 28, 3584, 512
"""The model of tests/gpu/reference_model.py."""


@dataclass(frozen=True)
class Layout:
    """How the work is cut over the GPUs."""

    name: str
    flags: str


REFERENCE = Layout(
    "TP2, recompute full, micro batch 16",
    "--tensor_model_parallel_size 2 --sequence_parallel true --micro_batch_size 16 --recompute_granularity full --recompute_method uniform "
    "--recompute_num_layers 1 --attention_backend flash",
)
CHOSEN = Layout("chosen by the engine", "")
PEER_LAYOUTS = (
    Layout("TP2, micro batch 16", "--tensor_model_parallel_size 2 --sequence_parallel true --micro_batch_size 16 --recompute_granularity none"),
    Layout("TP1xDP2, micro batch 4", "--tensor_model_parallel_size 1 --micro_batch_size 4 --recompute_granularity none"),
    Layout("TP1xDP2, micro batch 8", "--tensor_model_parallel_size 1 --micro_batch_size 8 --recompute_granularity none"),
)


@dataclass(frozen=True)
class Job:
    """One training run of each side; of the peer one for each of its layouts, of which the fastest counts."""

    name: str
    tuning: tuple[str, ...]
    data: str
    steps: int
    warm_up: int
    ours: tuple[Layout, ...]
    peer: tuple[Layout, ...]
    saves: bool = False
    """Whether what is saved at the end is measured; if not, the peer ends after its last step."""
    deadline_seconds: float = 200.0

    @property
    def is_full(self) -> bool:
        """Whether every weight is trained."""
        return "full" in self.tuning

    def layouts(self, side: Side) -> tuple[Layout, ...]:
        """Those that ``side`` tries."""
        return self.ours if side == "ours" else self.peer

    def flags(self, side: Side, layout: Layout) -> list[str]:
        """Everything but model, data and output folder."""
        return [*SHARED, *OWN[side], *self.tuning, *shlex.split(layout.flags), "--train_iters", str(self.steps)]


def _lora(name: str, data: str, *, best: bool, dropout: str = "0.05") -> Job:
    steps, warm_up = (16, 4) if data == "long2048" else (48, 8)
    return Job(
        name,
        (*LORA, dropout),
        data,
        steps,
        warm_up,
        ours=(CHOSEN if best else REFERENCE,),
        peer=PEER_LAYOUTS if best else (REFERENCE,),
        saves=not best and data == "long2048",
        deadline_seconds=300.0 if not best and data == "long2048" else 200.0,
    )


COLD = _lora("lora-long-reference", "long2048", best=False)
"""First of all, so that its kernel caches are empty."""
JOBS = (
    COLD,
    replace(COLD, name="lora-long-reference-warm", steps=FEW_STEPS, warm_up=0, saves=False),
    _lora("lora-long-best", "long2048", best=True),
    _lora("lora-short-best", "mixed1500", best=True),
    Job("full-long", tuple(FULL), "long2048", 16, 4, ours=(REFERENCE,), peer=(REFERENCE,), saves=True, deadline_seconds=240.0),
    _lora("lora-short-reference", "mixed1500", best=False),
    _lora("lora-long-best-no-dropout", "long2048", best=True, dropout="0"),
    _lora("lora-short-best-no-dropout", "mixed1500", best=True, dropout="0"),
)
"""In the order in which they run."""


@dataclass(frozen=True)
class Work:
    """What a name on the command line stands for: the steps of a job, its start, or the seconds of a phase that its ranks mark."""

    name: str
    reads: Literal["steps", "start", "mark"]
    job: str
    mark: str = ""

    @property
    def jobs(self) -> tuple[str, ...]:
        """The names of the jobs that have to run."""
        return (self.job, f"{self.job}-warm") if self.reads == "start" else (self.job,)


WORKS = {
    work.name: work
    for work in (
        *(Work(job.name, "steps", job.name) for job in JOBS if not job.name.endswith("-warm")),
        Work("start", "start", COLD.name),
        Work("load", "mark", COLD.name, "load"),
        Work("adapter-save", "mark", COLD.name, "adapter"),
        Work("export", "mark", "full-long", "export"),
    )
}


def find_works(names: str) -> list[Work]:
    """The works of a list with commas; raises ValueError for a name that is none."""
    found = [name for name in names.split(",") if name]
    unknown = [name for name in found if name not in WORKS]
    if unknown or not found:
        raise ValueError(f"WORK is {names!r}; it must be one or more, with commas, of {', '.join(WORKS)}")
    return [WORKS[name] for name in dict.fromkeys(found)]


def plan_jobs(works: Sequence[Work]) -> list[Job]:
    """Each job that is needed once, in the order of ``JOBS``; few steps where nobody counts them."""
    needed = {name for work in works for name in work.jobs}
    counted = {work.job for work in works if work.reads == "steps"}
    return [job if job.name in counted else replace(job, steps=FEW_STEPS, warm_up=0) for job in JOBS if job.name in needed]


def model_flops(tokens: float, *, full: bool) -> float:
    """Floating-point operations that one step of ``tokens`` tokens needs, forward and backward; nothing recomputed is counted.

    A matrix of P numbers takes 2·P a token forward and 2·P for the gradient of its input; the gradient of a weight, 2·P more, is needed where the weight is trained, so 4·P with
    LoRA and 6·P in full. The output layer is counted for every token, although ours leaves unlabelled ones out. Causal attention takes 6 · queries · length² a row and layer, rows taken as equally long.
    """
    layer = HIDDEN * (2 * QUERY + 2 * KEY_VALUE) + 3 * HIDDEN * FFN
    matrices = LAYERS * layer + HIDDEN * VOCAB
    attention = 6 * QUERY * LAYERS * tokens**2 / GLOBAL_BATCH
    return (6 if full else 4) * matrices * tokens + attention
