"""Every example in, its plan as text out: in a cluster, and on this machine. `--update-golden` writes the files anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_operator import job_file
from finetune_operator.describe import plan_text
from finetune_operator.plan import Identity, Place, cluster_only_fields, cluster_place, make_plan
from finetune_operator.settings import Settings
from finetune_trainer.resolve import Machine, read_facts, resolve

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
SETTINGS = Settings(work_claim="results")
LOCAL = Place("local", "/home/me/runs", "/home/me/examples", "{output_dir}/run.json", "127.0.0.1", 0, 40001, "127.0.0.1")
PLACES = {"cluster": cluster_place(SETTINGS), "local": LOCAL}
IDENTITY = Identity("0f8e7d6c-1111-2222-3333-444444444444")

QWEN25_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def compare(name: str, text: str, update: bool) -> None:
    path = Path(__file__).with_name("plan") / f"{name}.txt"
    if update:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_plan_of_an_example(example: Path, place: str, update_golden: bool) -> None:
    job = job_file.load(example).job
    notes = [f"for a cluster only: {field}" for field in cluster_only_fields(job)]
    compare(f"{example.stem}.{place}", plan_text(make_plan(job, SETTINGS, PLACES[place], IDENTITY), None, notes), update_golden)


@pytest.mark.parametrize("memory_gib", [24, 80])
def test_choices_for_the_smallest_job(memory_gib: int, update_golden: bool) -> None:
    plan = make_plan(job_file.load(ROOT / "examples" / "smallest.yaml").job, SETTINGS, LOCAL, IDENTITY)
    resolution = resolve(plan.config, read_facts(QWEN25_7B), Machine("cuda", plan.world_size, memory_gib))
    compare(f"smallest.{memory_gib}gib", plan_text(plan, resolution), update_golden)
