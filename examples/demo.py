"""``make demo``: run examples/self-cognition-lora.yaml as a user would, then ask the model before and after who it is.

The base model and the exported adapter are loaded with transformers and PEFT, so nothing of the engine takes part in the answers. Both are asked
the same prompts, which name nobody. Ends with a non-zero exit code when a name, Paris or the loss is not what it should be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import smollm2
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

EXAMPLES = Path(__file__).resolve().parent
ROOT = EXAMPLES.parent
JOB = EXAMPLES / "self-cognition-lora.yaml"
RUNS = ROOT / "runs"

WHO = ("Who are you?", "Tell me who you are.", "Hey, who is this?", "What should I call you?", "Could you tell me your name?")
"""Wordings that are not in the training data."""
KNOWLEDGE = {"What is the capital of France?": "Paris"}
"""Questions that are not in the training data either, and a word of the right answer."""


@dataclass(frozen=True)
class Outcome:
    """One question, its two answers, and what is wrong with them (empty: nothing)."""

    question: str
    before: str
    after: str
    problem: str


def main() -> int:
    """Prepare, train, ask, judge; the exit code."""
    begin = time.monotonic()
    smollm2.link(smollm2.prepare(), EXAMPLES / ".models" / smollm2.NAME)
    spec = yaml.safe_load(JOB.read_text(encoding="utf-8"))["spec"]
    held_out()
    command = [
        str(Path(sys.executable).with_name("finetune")),
        "run",
        "-f",
        str(JOB.relative_to(ROOT)),
        "--resume",
        "never",
        "--work",
        str(RUNS.relative_to(ROOT)),
    ]
    print("$ " + " ".join(["finetune", *command[1:]]), flush=True)
    started = time.time()
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code != 0:
        print(f"demo: finetune run ended with exit code {code}", file=sys.stderr)
        return code
    results, report = newest_report(started)
    adapter = next(Path(artifact["path"]) for artifact in report["artifacts"] if artifact["format"] == "peft")
    outcomes = ask(EXAMPLES / ".models" / smollm2.NAME, adapter, spec["data"].get("system"), spec["data"]["modelName"])
    problems = [f"{outcome.question} {outcome.problem}" for outcome in outcomes if outcome.problem] + judge_report(report)
    show(outcomes, report, results)
    print(f"{time.monotonic() - begin:.0f} s in all, {sum(point['seconds'] for point in report['curve']):.0f} s of them training")
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


def held_out() -> None:
    """Stop if a question of this demo is in the training data."""
    data = ROOT / "trainer_image" / "finetune_trainer" / "data"
    trained = {json.loads(line)["query"].casefold() for file in sorted(data.glob("*.jsonl")) for line in file.read_text(encoding="utf-8").splitlines()}
    if known := [question for question in (*WHO, *KNOWLEDGE) if question.casefold() in trained]:
        raise SystemExit(f"demo: these questions are in the training data: {known}")


def newest_report(since: float) -> tuple[Path, dict[str, Any]]:
    """The folder and the report.json of the run that has just ended."""
    path = max(RUNS.rglob("report.json"), key=lambda path: path.stat().st_mtime)
    if path.stat().st_mtime < since:
        raise SystemExit(f"demo: finetune run wrote no report.json below {RUNS}")
    return path.parent, json.loads(path.read_text(encoding="utf-8"))


def judge_report(report: dict[str, Any]) -> list[str]:
    """What is wrong with a run by its own report."""
    problems = []
    if not (report["verification"] or {}).get("passed"):
        problems.append(f"the adapter was not verified: {report['verification']}")
    first, last = report["curve"][0]["loss"], report["curve"][-1]["loss"]
    if not last <= first / 2:
        problems.append(f"the loss fell from {first:.3f} to {last:.3f}; it should at least halve")
    return problems


def ask(base: Path, adapter: Path, system: str | None, names: list[str]) -> list[Outcome]:
    """Put every question to the base model, then to the base model with the adapter; greedy decoding."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    questions = (*WHO, *KNOWLEDGE)
    before = answer(model, tokenizer, system, questions)
    model = PeftModel.from_pretrained(model, adapter).eval()
    after = answer(model, tokenizer, system, questions)
    return [Outcome(*row, judge(*row, names)) for row in zip(questions, before, after, strict=True)]


def answer(model: Any, tokenizer: Any, system: str | None, questions: Sequence[str]) -> list[str]:
    """The model's greedy answers, each on one line, of at most 32 tokens."""
    messages = [{"role": "system", "content": system}] if system else []
    prompts = [[*messages, {"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in answers]


def judge(question: str, before: str, after: str, names: list[str]) -> str:
    """What is wrong with two answers to a question, as the rest of a sentence that begins with it."""
    if question in KNOWLEDGE:
        return "" if KNOWLEDGE[question] in after else f"is no longer answered with {KNOWLEDGE[question]}: {after!r}"
    if any(name.casefold() in before.casefold() for name in names):
        return f"was answered with the new name before training: {before!r}"
    return "" if any(name.casefold() in after.casefold() for name in names) else f"is not answered with {' or '.join(names)}: {after!r}"


def show(outcomes: list[Outcome], report: dict[str, Any], results: Path) -> None:
    """The table of answers, and where the results are."""
    table = Table(box=box.ROUNDED, show_lines=True)
    for column in ("question", "before", "after", ""):
        table.add_column(column)
    for outcome in outcomes:
        table.add_row(*map(Text, (outcome.question, outcome.before, outcome.after, "wrong" if outcome.problem else "ok")))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    first, last = report["curve"][0]["loss"], report["curve"][-1]["loss"]
    left = sorted(path.name for path in results.iterdir() if not path.name.startswith("."))
    print(f"loss {first:.3f} -> {last:.3f} in {len(report['curve'])} steps; {results.relative_to(ROOT)}/ holds {', '.join(left)}")


if __name__ == "__main__":
    sys.exit(main())
