"""The `megatron` command: folders, paths, config files, messages and exit codes. Nothing is launched."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from finetune_trainer import cli, flags, launch
from finetune_trainer.checkpoint_files import Manifest
from finetune_trainer.contract import ConfigurationError, RunConfig

NOW = datetime(2026, 1, 2, 3, 4, 5)
# A script in the older spelling, as users have them; only the model, the data and the folder differ.
OLD_SCRIPT = """
    --model {model}
    --load_safetensors true
    --save_safetensors true
    --merge_lora false
    --dataset {data}#500
              {data}#500
              usf_bios/self-cognition#500
    --train_type lora
    --lora_rank 8
    --lora_alpha 32
    --target_modules all-linear
    --tensor_model_parallel_size 2
    --sequence_parallel true
    --micro_batch_size 16
    --global_batch_size 16
    --recompute_granularity full
    --recompute_method uniform
    --recompute_num_layers 1
    --finetune true
    --cross_entropy_loss_fusion true
    --lr 1e-4
    --lr_warmup_fraction 0.05
    --min_lr 1e-5
    --max_epochs 1
    --save {out}
    --save_interval 100
    --max_length 2048
    --system You_are_a_helpful_assistant.
    --num_workers 4
    --no_save_optim true
    --no_save_rng true
    --dataset_num_proc 4
    --model_author usf
    --model_name usf-robot
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model and a data file."""
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*argv: str, now: datetime = NOW) -> RunConfig:
    return cli.make_run(flags.read(["--model", "model", "--dataset", "rows.jsonl", *argv]), now)


def test_a_script_in_the_older_spelling_gives_the_run_that_it_means(folder: Path) -> None:
    script = OLD_SCRIPT.format(model="model", data="rows.jsonl", out="out").split()
    config = cli.make_run(flags.read(script), NOW)
    rows = str(folder / "rows.jsonl")
    expected = {
        "model": {"source": str(folder / "model")},
        "data": {
            "dataset": [f"{rows}#500", f"{rows}#500", "usf_bios/self-cognition#500"],
            "system": "You_are_a_helpful_assistant.",
            "max_length": 2048,
            "model_name": ["usf-robot"],
            "model_author": ["usf"],
        },
        "tuning": {"tuner_type": "lora", "lora_rank": 8, "lora_alpha": 32.0, "target_modules": ["all-linear"]},
        "parallelism": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "training": {
            "micro_batch_size": 16,
            "global_batch_size": 16,
            "num_train_epochs": 1,
            "lr": 1e-4,
            "min_lr": 1e-5,
            "lr_warmup_fraction": 0.05,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
            "cross_entropy_loss_fusion": True,
        },
        "checkpoints": {"save_steps": 100, "resume": "never", "no_save_optim": True},
        "output": {"formats": ["peft"]},
        "run": {"output_dir": str(folder / "out" / "v0-20260102-030405"), "artifact_layout": "checkpoints"},
    }
    assert config == RunConfig.model_validate(expected)


# Paths


def test_an_existing_path_is_a_path_and_anything_else_an_id(folder: Path) -> None:
    config = make("--dataset", "rows.jsonl#3", "swift/self-cognition#500", "./missing.jsonl")
    assert config.model.source == str(folder / "model")
    assert config.data.dataset == [str(folder / "rows.jsonl"), f"{folder / 'rows.jsonl'}#3", "swift/self-cognition#500", str(folder / "missing.jsonl")]
    assert make("--model", "Qwen/Qwen2.5-7B-Instruct").model.source == "Qwen/Qwen2.5-7B-Instruct"


def test_a_system_prompt_that_ends_with_txt_is_a_file(folder: Path) -> None:
    (folder / "prompt.txt").write_text("Be terse.")
    assert make("--system", "prompt.txt").data.system == "Be terse."
    with pytest.raises(ConfigurationError, match=r"--system: cannot read no\.txt: No such file or directory; a prompt that ends with \.txt names a file"):
        make("--system", "no.txt")
    (folder / "latin.txt").write_bytes("Sé breve.".encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"--system: latin\.txt is not UTF-8 \(byte 1: .*\); a prompt must be text in UTF-8"):
        make("--system", "latin.txt")


def test_a_name_that_is_too_long_for_a_file_is_no_path(folder: Path) -> None:
    assert make("--model", "m" * 300).model.source == "m" * 300


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
        ("/models/tiny/", "tiny"),
        ("/cache/hub/models--Qwen--Qwen3-8B/snapshots/abc", "Qwen3-8B"),
    ],
)
def test_the_default_folder_is_named_after_the_model(source: str, name: str, folder: Path) -> None:
    assert cli.model_name(source) == name
    assert make("--model", source).run.output_dir == str(folder / "megatron_output" / name / "v0-20260102-030405")


# Versions and resume


def test_each_run_gets_the_next_version(folder: Path) -> None:
    for name in ("v0-20250101-000000", "v9-20250101-000000", "v10-20250101-000000", "v99-notes", "checkpoint-5"):
        (folder / "out" / name).mkdir(parents=True)
    assert make("--output_dir", "out").run.output_dir == str(folder / "out" / "v11-20260102-030405")


@pytest.mark.parametrize("argv", [("--add_version", "false"), ("--no_add_version",)])
def test_add_version_false_writes_to_the_folder_itself(folder: Path, argv: tuple[str, ...]) -> None:
    assert make("--output_dir", "out", *argv).run.output_dir == str(folder / "out")


def save_checkpoint(config: RunConfig) -> None:
    """What a whole checkpoint of ``config`` looks like from outside."""
    folder = Path(config.run.output_dir) / "checkpoints" / "step-5"
    folder.mkdir(parents=True)
    manifest = Manifest(
        identity=config.identity(),
        attempt=1,
        step=5,
        updates=5,
        with_optimizer=True,
        world_size=1,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        saved=NOW,
        curve=[],
        files={},
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json(by_alias=True))


def test_resume_auto_goes_on_in_the_newest_folder_that_has_a_checkpoint_of_the_same_run(folder: Path) -> None:
    def run(*argv: str) -> RunConfig:
        return make("--output_dir", "out", *argv)

    save_checkpoint(run("--lr", "1e-3"))
    save_checkpoint(run("--lr", "2e-3"))
    cli.write_run(run("--lr", "1e-3"))

    def name(*argv: str) -> str:
        return Path(run(*argv).run.output_dir).name.partition("-")[0]

    assert name("--resume", "auto", "--lr", "1e-3") == "v0"
    assert name("--resume", "auto", "--lr", "1e-3", "--micro_batch_size", "2") == "v0"
    assert name("--resume", "auto", "--lr", "2e-3") == "v1"
    assert name("--resume", "auto", "--lr", "3e-3") == "v3"
    assert name("--lr", "1e-3") == "v3"


def test_commands_that_begin_in_one_second_have_folders_of_their_own(folder: Path) -> None:
    configs = [make("--output_dir", "out", "--lr", rate) for rate in ("1e-3", "1e-4", "1e-5")]
    with ThreadPoolExecutor(3) as executor:
        claimed = list(executor.map(cli.claim_folder, configs))
    assert len({config.run.output_dir for config in configs}) == 1
    assert sorted(Path(config.run.output_dir).name.partition("-")[0] for config in claimed) == ["v0", "v1", "v2"]
    assert [config.training.lr for config in claimed] == [1e-3, 1e-4, 1e-5]


def test_a_run_that_goes_on_keeps_its_folder(folder: Path) -> None:
    config = make("--output_dir", "out", "--lr", "1e-3")
    save_checkpoint(config)
    again = make("--output_dir", "out", "--lr", "1e-3", "--resume", "auto")
    assert cli.claim_folder(again).run.output_dir == again.run.output_dir == config.run.output_dir


def test_run_json_is_the_run(folder: Path) -> None:
    config = make("--output_dir", "out")
    cli.write_run(config)
    assert RunConfig.load(Path(config.run.output_dir) / "run.json") == config
    assert [path.name for path in Path(config.run.output_dir).iterdir()] == ["run.json"]


def test_an_output_folder_that_cannot_be_made_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--output_dir: cannot write to .*rows\.jsonl.*: Not a directory"):
        cli.write_run(make("--output_dir", "rows.jsonl"))
    with pytest.raises(ConfigurationError, match=r"--output_dir: cannot write to .*/rows\.jsonl: File exists"):
        cli.claim_folder(make("--output_dir", "rows.jsonl"))
    (folder / "out").symlink_to("nowhere")
    with pytest.raises(ConfigurationError, match=r"--output_dir: cannot write to .*/out: File exists"):
        cli.claim_folder(make("--output_dir", "out"))


# Config files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "model: model\ndataset: [rows.jsonl, 'b#2']\nlr: 1e-4\nsequence_parallel: true\nsystem: null\n"),
        ("run.json", json.dumps({"model": "model", "dataset": ["rows.jsonl", "b#2"], "lr": 1e-4, "sequence_parallel": True, "system": None})),
    ],
)
def test_flags_may_come_from_a_file_first(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    config = flags.read(cli.expand_config_file([name, "--lr", "2e-4"])).config("/results")
    assert (config.model.source, config.data.dataset, config.training.lr) == ("model", ["rows.jsonl", "b#2"], 2e-4)
    assert config.parallelism.sequence_parallel
    assert config.data.system is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "it must be a mapping of flags to values"),
        ("a: [", "cannot read run.yaml"),
        ("ENV: {A: b}", "ENV is not supported; set the variables in the environment"),
    ],
)
def test_a_config_file_that_is_none_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "run.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        cli.expand_config_file(["run.yaml"])
    with pytest.raises(ConfigurationError, match=r"cannot read missing\.yaml"):
        cli.expand_config_file(["missing.yaml"])


# The command


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["export", "--to_hf", "true"], "megatron: `megatron export` is not built yet; this version has sft and launch\n"),
        (["pt"], "megatron: `megatron pt` is not built yet; this version has sft and launch\n"),
        (["stf"], "megatron: unknown command 'stf'; did you mean 'sft'?; see megatron --help\n"),
        (["launch"], "megatron: megatron launch needs one file, RUN.json (found 0)\n"),
        (["launch", "missing.json"], "megatron: cannot read the run's configuration: [Errno 2] No such file or directory: 'missing.json'\n"),
        (["sft", "--dataset", "rows.jsonl"], "megatron: --model is missing: "),
        (["sft", "--model", "m", "--lora_rang", "8"], "megatron: unknown flag --lora_rang; did you mean '--lora_rank'?\n"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
def test_a_refusal_is_a_sentence_and_the_exit_code_of_its_reason(folder: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 10
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (folder / "megatron_output").exists()


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--model", "./missing"], 12, "model.source: there is no folder {folder}/missing"),
        (["--model", "model"], 12, "model.source: {folder}/model is not a Hugging Face model folder: it has no config.json"),
        (["--model", "owner/name", "--dataset", "./missing.jsonl"], 11, "data.dataset: {folder}/missing.jsonl: no such file or folder"),
    ],
    ids=["model", "config", "data"],
)
def test_missing_inputs_are_refused_and_leave_no_folder(folder: Path, argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", "--dataset", "rows.jsonl", "--output_dir", "out", *argv]) == code
    assert capsys.readouterr().err == f"megatron: {message.format(folder=folder)}\n"
    assert not (folder / "out").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_node_writes_run_json_and_names_the_results(
    folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model" / "config.json").write_text("{}")
    for name, value in {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "launch", lambda config: 0)
    assert cli.main(["sft", "--model", "model", "--dataset", "rows.jsonl", "--output_dir", "out"]) == 0
    assert len(list(folder.glob("out/v0-*/run.json"))) == (1 if rank == 0 else 0)
    assert ("results:" in capsys.readouterr().err) == (rank == 0)


def test_a_refused_run_leaves_no_folder(folder: Path) -> None:
    assert cli.main(["sft", "--model", "model", "--dataset", "rows.jsonl", "--output_dir", "out", "--lr", "0"]) == 10
    assert not (folder / "out").exists()


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{option.name} " in text for option in flags.options())
    assert "formerly --train_type" in text
    assert max(map(len, text.splitlines())) <= 160


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.startswith("usage: megatron sft FLAGS")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"mcore-finetune \d+\.\d+.*\n", capsys.readouterr().out)
