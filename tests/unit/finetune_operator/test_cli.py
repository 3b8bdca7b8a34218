"""The command line: refusals, exit codes, and how little is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from factories import tiny_hf_config
from finetune_operator import cli, local
from jobs import write_job


def test_help_imports_nothing_heavy() -> None:
    program = "import sys; from finetune_operator import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\nprint(sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "run a FineTuneJob on this machine" in done.stdout
    loaded = set(eval(done.stderr))
    assert not loaded & {"pydantic", "yaml", "rich", "asyncio", "torch"}


def test_operator_never_imports_torch() -> None:
    program = "import pkgutil, importlib, sys, finetune_operator\nfor module in pkgutil.iter_modules(finetune_operator.__path__):\n    if module.name != '__main__': importlib.import_module(f'finetune_operator.{module.name}')\nprint(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "numpy", "transformers", "megatron"}


def test_running_a_job_here_needs_no_cluster_client() -> None:
    program = "import sys; import finetune_operator.local, finetune_operator.render; print(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"kubernetes", "kopf", "aiohttp", "torch"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "finetune: the following arguments are required: VERB; see finetune --help"),
        (["rum"], "finetune: argument VERB: invalid choice: 'rum' (choose from run, plan, render, status, logs); did you mean 'run'?; see finetune --help"),
        (["run", "--filname", "x.yaml"], "finetune run: unknown flag --filname; did you mean '--filename'?; see finetune run --help"),
        (["run", "--file", "x.yaml"], "finetune run: unknown flag --file; did you mean '--filename'?; see finetune run --help"),
        (["run", "-f", "x.yaml", "--wrok=x"], "finetune run: unknown flag --wrok; did you mean '--work'?; see finetune run --help"),
        (["run"], "finetune run: the following arguments are required: -f/--filename; see finetune run --help"),
        (["run", "-f", "x.yaml", "--resume", "yes"], "finetune run: argument --resume: invalid choice: 'yes'"),
        (["plan", "-f", "x.yaml", "--gpu-memory", "-3"], "finetune plan: argument --gpu-memory: it must be above 0 (found -3)"),
        (["plan", "-f", "x.yaml", "--gpu-memory", "lots"], "finetune plan: argument --gpu-memory: it must be a number above 0 (found lots)"),
    ],
)
def test_wrong_arguments_are_refused_with_the_code_of_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 10
    assert capsys.readouterr().err.startswith(message)


def test_bad_file_is_refused_on_standard_error_without_a_traceback(tmp_path: Path) -> None:
    path = write_job(tmp_path, training={"lr": "fast"})
    done = subprocess.run([sys.executable, "-m", "finetune_operator.cli", "run", "-f", str(path)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 10
    assert done.stdout == ""
    assert done.stderr == f'finetune: {path}:12: spec.training.lr: it must be a valid number (found "fast")\n'
    assert not (tmp_path / "runs").exists()


def test_plan_says_what_is_chosen_for_a_model_at_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(tiny_hf_config("llama", torch_dtype="bfloat16")))
    path = write_job(tmp_path, model={"source": "./model"}, nodes={"processesPerNode": 4})
    assert cli.main(["plan", "-f", str(path), "--gpu-memory", "24"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model.torchDtype", "bfloat16", "chosen"] in rows
    assert ["parallelism.tensorModelParallelSize", "1", "chosen"] in rows
    assert ["training.microBatchSize", "4", "chosen"] in rows
    assert ["tuning.loraRank", "8", "chosen"] in rows
    assert not (tmp_path / "runs").exists()


def test_plan_leaves_the_choice_to_the_trainer_without_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "-f", str(write_job(tmp_path))]) == 0
    assert "parallelism.tensorModelParallelSize    the fewest that fit in memory                    chosen by the trainer" in capsys.readouterr().out


def test_plan_refuses_what_the_model_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_hf_config("llama")))
    path = write_job(tmp_path, model={"source": "./"}, nodes={"processesPerNode": 4}, parallelism={"tensorModelParallelSize": 4})
    assert cli.main(["plan", "-f", str(path)]) == 10
    line = path.read_text().splitlines().index("    tensorModelParallelSize: 4") + 1
    where = f"{path}:{line}: spec.parallelism.tensorModelParallelSize"
    assert capsys.readouterr().err.startswith(f"finetune: {where} is 4; it must divide num_key_value_heads (2)")


def test_plan_says_what_is_not_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_job(tmp_path, model={"source": "./nowhere"})
    assert cli.main(["plan", "-f", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"model.source: there is no folder {tmp_path}/nowhere; `finetune run` would refuse it on this machine" in shown
    assert "chosen by the trainer" in shown


def test_missing_model_is_refused_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_job(tmp_path, model={"source": "./nowhere"})
    assert cli.main(["run", "-f", str(path), "--work", str(tmp_path / "runs")]) == 12
    line = path.read_text().splitlines().index("    source: ./nowhere") + 1
    assert capsys.readouterr().err == f"finetune: {path}:{line}: spec.model.source: there is no folder {tmp_path}/nowhere\n"
    assert not (tmp_path / "runs").exists()


def test_plan_without_gpus_says_cpu_only(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = write_job(tmp_path)
    assert cli.main(["plan", "-f", str(path)]) == 0
    assert "1 node × 1 process, CPU" in capsys.readouterr().out
    assert cli.main(["plan", "-f", str(path), "--gpu-memory", "80"]) == 0
    assert "1 node × 1 process, nvidia.com/gpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("work", "command"),
    [("runs", "finetune run -f 'my job.yaml' --resume auto"), ("/a b", "finetune run -f 'my job.yaml' --work '/a b' --resume auto")],
)
def test_command_that_continues_names_the_folder_of_results(work: str, command: str) -> None:
    assert local.continue_command(Path("my job.yaml"), Path(work)) == command
