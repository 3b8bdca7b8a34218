"""From `kubectl apply` to a verified adapter, on a real cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from factories import make_rows, make_tiny_model
from kube_processes import until
from platform_fixtures import SYSTEM, TEAM, Platform

STEPS = 40
TRAINED_SECONDS = 300
CURVE = 1e-6


@pytest.fixture(scope="module")
def inputs(platform: Platform) -> Path:
    """A tiny model and its data on the work volume."""
    folder = platform.work / "inputs"
    make_tiny_model("llama", folder / "model")
    make_rows(folder, 48)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    return folder


def spec(**more: Any) -> dict[str, Any]:
    """Two processes that share every layer, with a checkpoint each five steps."""
    return {
        "model": {"source": "./inputs/model"},
        "data": {"dataset": ["./inputs/rows.jsonl"], "maxLength": 128},
        "tuning": {"loraRank": 4, "loraDropout": 0},
        "parallelism": {"tensorModelParallelSize": 2, "sequenceParallel": True},
        "training": {"trainIters": STEPS, "globalBatchSize": 4, "microBatchSize": 2, "lr": 1e-3, "loggingSteps": 5},
        "checkpoints": {"saveSteps": 5},
        "output": {"verification": "Logits"},
        **more,
    }


def watch(platform: Platform, name: str) -> subprocess.Popen[str]:
    """`kubectl get ftj NAME -w`, as a user has it on the screen."""
    command = [platform.cluster.binaries["kubectl"], f"--kubeconfig={platform.cluster.kubeconfig}", "-n", TEAM, "get", "ftj", name, "-w"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def undisturbed(platform: Platform, inputs: Path) -> str:
    """A job that nobody disturbs; its name, when it has ended. What kubectl has printed meanwhile is in `screen`."""
    name = "undisturbed"
    platform.apply(platform.job(name, spec()))
    screen = watch(platform, name)
    try:
        status = platform.until_ended(name, TRAINED_SECONDS)
        assert status["phase"] == "Succeeded", platform.describe(name)
    finally:
        screen.terminate()
        printed = screen.communicate()[0]
    (inputs / "screen.txt").write_text(printed)
    return name


def report(platform: Platform, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((platform.results(name) / "report.json").read_text())
    return found


def test_the_operator_runs_twice_under_restricted_pod_security(platform: Platform) -> None:
    pods = platform.cluster.get(f"/api/v1/namespaces/{SYSTEM}/pods")["items"]
    assert [pod["status"]["phase"] for pod in pods] == ["Running", "Running"]
    lease = platform.cluster.get(f"/apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases/finetune-operator")
    assert lease["spec"]["holderIdentity"] in {pod["metadata"]["name"] for pod in pods}


def test_a_job_of_two_nodes_ends_with_a_verified_adapter(platform: Platform, undisturbed: str) -> None:
    status = platform.status(undisturbed)
    assert (status["attempt"], status["pods"]["succeeded"]) == (1, 2)
    assert status["verification"]["passed"]
    assert status["verification"]["level"] == "Logits"
    assert [artifact["format"] for artifact in status["artifacts"]] == ["peft"]
    assert status["progress"]["steps"] == f"{STEPS}/{STEPS}"
    assert status["resolved"]
    assert {condition["type"]: condition["status"] for condition in status["conditions"]}["Succeeded"] == "True"


def test_progress_was_seen_in_kubectl_get(undisturbed: str, inputs: Path) -> None:
    screen = (inputs / "screen.txt").read_text()
    steps = [int(step) for step in re.findall(rf"(\d+)/{STEPS}", screen)]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 3, screen
    assert re.search(r"PHASE +STEPS +LOSS +REMAINING +ATTEMPT +AGE", screen)
    assert "Running" in screen


def test_the_adapter_loads_in_peft_and_has_learned(platform: Platform, undisturbed: str, inputs: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    rows = [json.loads(line)["messages"] for line in (inputs / "rows.jsonl").read_text().splitlines()[:8]]
    batches = [tokenizer.apply_chat_template(row, return_tensors="pt", return_dict=True)["input_ids"] for row in rows]

    def loss(model: Any) -> float:
        with torch.no_grad():
            return sum(float(model(input_ids=tokens, labels=tokens).loss) for tokens in batches) / len(batches)

    base = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32).eval()
    before = loss(base)
    assert loss(PeftModel.from_pretrained(base, platform.results(undisturbed) / "peft").eval()) < before


def test_the_command_line_tells_of_the_job(platform: Platform, undisturbed: str) -> None:
    finetune = [sys.executable, "-m", "finetune_operator.cli"]
    flags = ["-n", TEAM, "--kubeconfig", str(platform.cluster.kubeconfig)]
    status = subprocess.run([*finetune, "status", undisturbed, *flags], capture_output=True, text=True, check=True).stdout
    assert "Succeeded" in status
    logs = subprocess.run([*finetune, "logs", undisturbed, *flags], capture_output=True, text=True, check=True).stdout
    assert f"{STEPS}/{STEPS}" in logs


def test_a_pod_that_is_deleted_restarts_the_gang_and_the_curve_goes_on(platform: Platform, undisturbed: str) -> None:
    name = "disturbed"
    platform.apply(platform.job(name, spec()))
    until(lambda: platform.status(name).get("progress", {}).get("step", 0) >= 6, TRAINED_SECONDS, "six steps")
    platform.cluster.kubectl("-n", TEAM, "delete", "pod", f"{name}-1-1", "--wait=false")
    status = platform.until_ended(name, TRAINED_SECONDS)
    assert status["phase"] == "Succeeded", platform.describe(name)
    assert status["attempt"] == 2
    assert status["restarts"] == {"total": 1, "counted": 1, "reasons": [{"reason": "PodDeleted", "count": 1}]}
    whole, continued = report(platform, undisturbed), report(platform, name)
    assert continued["resumedFromStep"] >= 5
    curves = [[(point["step"], point["loss"]) for point in report["curve"]] for report in (whole, continued)]
    assert [step for step, _ in curves[1]] == list(range(1, STEPS + 1))
    assert max(abs(first - second) for (_, first), (_, second) in zip(*curves, strict=True)) <= CURVE


def test_a_model_that_is_not_there_fails_at_once_with_the_reason(platform: Platform, inputs: Path) -> None:
    name = "no-model"
    platform.apply(platform.job(name, spec(model={"source": "./inputs/modle"})))
    status = platform.until_ended(name, 120)
    assert (status["phase"], status["failure"]["reason"], status["attempt"]) == ("Failed", "Model", 1)
    assert "/work/inputs/modle" in status["failure"]["message"]
    assert "restarts" not in status


def test_deletion_leaves_the_results_and_nothing_else(platform: Platform, undisturbed: str) -> None:
    platform.cluster.kubectl("-n", TEAM, "delete", "ftj", "--all", "--wait=true", "--timeout=60s")
    for kind in ("pods", "services"):
        until(lambda kind=kind: not platform.cluster.get(f"/api/v1/namespaces/{TEAM}/{kind}")["items"], 90, f"no {kind} left")
    assert list((platform.work / TEAM / undisturbed).glob("*/peft/adapter_model.safetensors"))
