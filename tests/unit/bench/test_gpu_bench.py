"""The pure parts of the benchmark on GPUs: which jobs run, what the marks say, what becomes a row."""

from __future__ import annotations

import ast
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import reference_model
from finetune_trainer import flags

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "tests" / "bench"))
from gpu_processes import name_outcome  # noqa: E402 they lie beside the benchmark
from gpu_results import Figures, Run, Step, choose_best, make_rows, merge_rows, ratio, read_figures, read_marks  # noqa: E402
from gpu_works import JOBS, WORKS, Job, Side, find_works, model_flops, plan_jobs  # noqa: E402


def marks_of(data_rank: int, tokens: list[int], *, late: float = 0.0, **last: Any) -> list[dict[str, Any]]:
    """Steps that end every two seconds from 110 on; a load, and what is left after the last step."""
    steps = [{"mark": "step", "time": 110.0 + 2 * index + late, "data_rank": data_rank, "tokens": count} for index, count in enumerate(tokens)]
    load = {"mark": "load", "time": 104.0, "seconds": 3.0 + late}
    return [load, *steps, {"mark": "trained", "time": 120.0, "allocated_gib": 10.0 + late, "reserved_gib": 12.0}, {"mark": "losses", "time": 120.0, **last}]


def run_of(job: str, side: Side, seconds: float, *, layout: str = "", outcome: str = "finished", **figures: Any) -> Run:
    """A run with steps of 100 tokens, or without figures where it did not finish."""
    found = Figures(5.0, tuple(Step(seconds, 100, 1.0) for _ in range(60)), 20.0, **figures) if outcome == "finished" else Figures()
    return Run(job_of(job), side, layout, [], {}, outcome, 60.0, found, [], None, "")


def job_of(name: str) -> Job:
    return next(job for job in JOBS if job.name == name)


def test_a_job_that_several_works_need_runs_once_and_the_one_with_cold_caches_first() -> None:
    jobs = plan_jobs(find_works("lora-long-best,start,load,adapter-save,lora-long-reference"))
    assert [job.name for job in jobs] == ["lora-long-reference", "lora-long-reference-warm", "lora-long-best"]
    assert [job.steps for job in jobs] == [16, 2, 16]


def test_steps_that_nobody_counts_are_few() -> None:
    assert [(job.name, job.steps, job.saves) for job in plan_jobs(find_works("export,load"))] == [("lora-long-reference", 2, True), ("full-long", 2, True)]


@pytest.mark.parametrize("names", ["", "lora-long", "load,lora-long-reference-warm"])
def test_a_work_that_is_none_is_refused_with_the_names_of_all(names: str) -> None:
    with pytest.raises(ValueError, match=r"WORK is .*lora-long-reference, .*export"):
        find_works(names)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_our_command_line_takes_the_flags_of_every_job(job: Job) -> None:
    for layout in job.ours:
        config = flags.read(["--model", "/model", "--dataset", "rows.jsonl", *job.flags("ours", layout)]).config(output_dir="/out")
        assert config.training.train_iters == job.steps
        assert config.tuning.lora_dropout == (None if job.is_full else 0.0 if job.name.endswith("no-dropout") else 0.05)
        assert config.training.micro_batch_size == (None if "best" in job.name else 16)


def test_the_phases_that_are_timed_are_functions_of_the_engine() -> None:
    convert = ast.parse((ROOT / "trainer_image/finetune_trainer/convert.py").read_text(encoding="utf-8"))
    assert {"import_base", "export_adapter", "export_huggingface"} <= {node.name for node in convert.body if isinstance(node, ast.FunctionDef)}


def test_tensor_parallel_ranks_have_the_same_batch_and_data_parallel_ones_add_up() -> None:
    values = [[[4.0, 2], [3.0, 1], [5.0, 5]], [[2.0, 1], [3.0, 1], [5.0, 5]]]
    same = [marks_of(0, [90, 100, 110], values=values[0]) for _ in range(2)]
    assert [step.tokens for step in read_figures(same, 100.0, 2).steps] == [100, 110]
    apart = [marks_of(rank, [90, 100, 110], values=values[rank]) for rank in range(2)]
    figures = read_figures(apart, 100.0, 2)
    assert [(step.seconds, step.tokens, step.loss) for step in figures.steps] == [(2.0, 200, 3.0), (2.0, 220, 1.0)]


def test_the_first_step_counts_from_the_launch_and_the_slowest_rank_counts_for_phases_and_memory() -> None:
    figures = read_figures([marks_of(0, [1, 1], values=[[1.0, 1]] * 2), marks_of(0, [1, 1], late=0.5)], 100.0, 2)
    assert (figures.first_step_seconds, figures.peak_gib, figures.peak_reserved_gib, figures.phases) == (10.0, 10.5, 12.0, {"load": 3.5})


def test_a_run_whose_rank_did_not_come_to_its_last_step_has_no_figures() -> None:
    whole, cut = marks_of(0, [1, 1], values=[]), marks_of(0, [1, 1])[:2]
    assert read_figures([whole, cut], 100.0, 2) == read_figures([whole], 100.0, 2) == read_figures([], 100.0, 2) == Figures()


def test_a_line_that_a_killed_rank_has_not_finished_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "rank-0.jsonl").write_text(json.dumps({"mark": "step"}) + '\n{"mark": "st', encoding="utf-8")
    assert read_marks(tmp_path) == [[{"mark": "step"}]]


def test_the_best_layout_that_ran_counts_and_the_steps_after_the_warm_up() -> None:
    runs = [
        run_of("lora-short-best", "ours", 0.5),
        run_of("lora-short-best", "peer", 2.0, layout="slow"),
        run_of("lora-short-best", "peer", 1.0, layout="fast"),
        run_of("lora-short-best", "peer", 0.1, layout="large", outcome="out of memory"),
    ]
    best = choose_best(runs[1:])
    assert best is not None
    assert (best.layout, len(best.counted())) == ("fast", 60 - 7)
    rows = make_rows(WORKS["lora-short-best"], runs, 2, "two GPUs", "2026-01-01")
    found = {row["metric"]: (row["ours"], row["peer"], row["ratio"]) for row in rows}
    assert found == {"tokens_per_second_per_gpu": (100.0, 50.0, 2.0), "seconds": (0.5, 1.0, 2.0), "peak_gib": (20.0, 20.0, 1.0)}


def test_a_side_that_failed_is_null_and_the_other_stays() -> None:
    runs = [run_of("lora-long-reference", "ours", 1.0, phases={"load": 2.0}), run_of("lora-long-reference", "peer", 1.0, outcome="failed")]
    (row,) = make_rows(WORKS["load"], runs, 2, "m", "d")
    assert (row["ours"], row["peer"], row["ratio"]) == (2.0, None, None)
    warm = run_of("lora-long-reference-warm", "ours", 1.0)
    assert [(row["metric"], row["ours"]) for row in make_rows(WORKS["start"], [*runs, warm], 2, "m", "d")] == [
        ("first_step_cold_seconds", 5.0),
        ("first_step_warm_seconds", 5.0),
    ]


def test_a_ratio_above_one_means_that_ours_is_better() -> None:
    assert (ratio("tokens_per_second_per_gpu", 200.0, 100.0), ratio("seconds", 1.0, 2.0), ratio("peak_gib", 4.0, 2.0)) == (2.0, 2.0, 0.5)
    assert ratio("seconds", None, 1.0) is None


def test_rows_of_the_same_work_metric_and_machine_are_replaced_in_their_place() -> None:
    def row(work: str, machine: str, ours: int) -> dict[str, Any]:
        return {"work": work, "metric": "seconds", "machine": machine, "ours": ours}

    old = [row("a", "x", 1), row("b", "x", 1)]
    assert merge_rows(old, [row("a", "x", 2), row("a", "y", 3)]) == [row("a", "x", 2), row("b", "x", 1), row("a", "y", 3)]


def test_the_flops_of_a_step_are_those_of_the_reference_model() -> None:
    matrices = sum(math.prod(shape) for name, shape in reference_model.shapes().items() if len(shape) == 2 and "embed_tokens" not in name)
    rows, length = 16, 2000
    attention = 3 * rows * reference_model.LAYERS * 2 * 2 * length**2 / 2 * 3584  # two products forward, four backward, half of each masked
    assert model_flops(rows * length, full=True) == pytest.approx(6 * matrices * rows * length + attention)
    assert model_flops(rows * length, full=False) == pytest.approx(4 * matrices * rows * length + attention)


def test_utilization_is_of_all_gpus() -> None:
    run = run_of("lora-long-best", "ours", 1.0)
    share = run.utilization(100.0, 2)
    assert share == pytest.approx(model_flops(100, full=False) / (2 * 100e12))


@pytest.mark.parametrize(
    ("code", "output", "outcome"),
    [
        (0, "CUDA out of memory", "finished"),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried", "out of memory"),
        (1, "ValueError", "failed"),
        (None, "", "deadline"),
    ],
)
def test_running_out_of_memory_is_told_from_other_failures(code: int | None, output: str, outcome: str) -> None:
    assert name_outcome(code, output) == outcome
