"""One rank's program, but for the run itself: reasons and exit codes of failures, what nodes must agree on, names of folders."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import __main__ as program
from finetune_trainer.contract import ConfigurationError, DataError, ModelError, Reason, RunConfig, exit_for
from finetune_trainer.hf_files import HFModel, TensorEntry


def make_config(output_dir: str = "/out", **sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({"model": {"source": "/m"}, "data": {"dataset": ["/d"]}, "run": {"outputDir": output_dir}, **sections})


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (DataError("rows.jsonl:3: no messages"), Reason.DATA, "rows.jsonl:3: no messages"),
        (ModelError("x"), Reason.MODEL, "x"),
        (MemoryError("no"), Reason.OUT_OF_MEMORY, "out of memory: no. A smaller training.microBatchSize"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), Reason.OUT_OF_MEMORY, "out of memory: "),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), Reason.CONFIGURATION, "the disk is full: "),
        (KeyError("x"), Reason.INTERNAL, "KeyError: 'x'"),
        (RuntimeError("shape '[2]' is invalid"), Reason.INTERNAL, "RuntimeError: shape '[2]' is invalid"),
        (KeyboardInterrupt(), Reason.INTERNAL, "KeyboardInterrupt"),
    ],
)
def test_every_exception_has_a_reason_and_a_sentence(error: BaseException, reason: Reason, message: str) -> None:
    found = program.classify(error)
    assert found[0] is reason
    assert found[1].startswith(message)


def test_broken_and_silent_connections_are_told_apart() -> None:
    import torch.distributed

    closed = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5050")
    assert program.classify(closed)[0] is Reason.DISTRIBUTED
    silent = RuntimeError("[third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv operation to complete")
    assert program.classify(silent) == (Reason.HANG, f"a collective did not end within parallelism.ddpTimeout: {silent}")
    assert program.classify(torch.distributed.DistBackendError("NCCL error"))[0] is Reason.DISTRIBUTED
    assert program.classify(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))[0] is Reason.OUT_OF_MEMORY


def test_only_an_internal_failure_keeps_its_traceback() -> None:
    assert "KeyError" in program.describe(KeyError("x"), 3).trace
    failure = program.describe(DataError("x"), 3)
    assert (failure.trace, failure.report.rank, failure.report.exit_code) == ("", 3, 11)


def test_all_nodes_write_where_rank_0_does() -> None:
    ours, first = make_config("/out/v1-b"), make_config("/out/v0-a")
    agreed = program.agree(ours, [(first.model_dump(), "/out/v0-a"), (ours.model_dump(), "/out/v1-b")])
    assert agreed.run.output_dir == "/out/v0-a"


def test_nodes_started_with_other_options_are_refused_by_the_option() -> None:
    first, other = make_config(), make_config(training={"lr": 1e-3})
    with pytest.raises(ConfigurationError, match=r"training.lr is 0.001 on rank 1 and None on rank 0; every node must be started with the same options"):
        program.agree(other, [(first.model_dump(), "/out"), (other.model_dump(), "/out")])


def test_ranks_that_read_other_rows_are_refused() -> None:
    program.check_same_rows(["a", "a"])
    with pytest.raises(DataError, match=r"data.dataset: rank 2 has read other rows than rank 0"):
        program.check_same_rows(["a", "a", "b"])


def test_folders_of_the_formats() -> None:
    config = make_config(output={"formats": ["peft", "huggingface", "megatron"]})
    assert program.artifact_folders(config, Path("/out"), 7) == {
        "peft": Path("/out/peft"),
        "huggingface": Path("/out/huggingface"),
        "megatron": Path("/out/megatron"),
    }
    swift = config.model_copy(update={"run": config.run.model_copy(update={"artifact_layout": "checkpoints"})})
    assert {kind: folder.name for kind, folder in program.artifact_folders(swift, Path("/out"), 7).items()} == {
        "peft": "checkpoint-7",
        "huggingface": "checkpoint-7-merged",
        "megatron": "checkpoint-7-mcore",
    }


@pytest.mark.parametrize(("torch_dtype", "expected"), [("float32", 4 * 27), ("bfloat16", 2 * 27)])
def test_size_of_an_export_is_counted_in_the_data_type_of_the_run(tmp_path: Path, torch_dtype: str, expected: int) -> None:
    import torch

    entries = {"a": TensorEntry("x", torch.bfloat16, (4, 6), 0), "b": TensorEntry("x", torch.float32, (3,), 0)}
    config = make_config(model={"source": "/m", "torchDtype": torch_dtype})
    assert program.model_bytes(HFModel(tmp_path, {}, entries), config) == expected


@pytest.fixture
def alone() -> Iterator[None]:
    """This process is a gang of one."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["peft", "huggingface", "megatron"])
def test_a_result_that_could_not_be_written_is_refused_before_training(tmp_path: Path, kind: str) -> None:
    config = make_config(str(tmp_path), output={"formats": ["peft", "huggingface", "megatron"]})
    (tmp_path / kind).mkdir()
    (tmp_path / ".partial-checkpoint-7").mkdir()
    assert [name for name, _ in program.prepare_output(config, 7, 1)] == ["peft", "huggingface", "megatron"]
    assert [path.name for path in tmp_path.iterdir()] == [kind]
    (tmp_path / kind / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=rf"{tmp_path / kind} is not empty and holds no export"):
        program.prepare_output(config, 7, 1)
    assert (tmp_path / kind / "thesis.txt").read_text() == "mine"


def test_a_signal_ends_the_process_at_once_unless_training_is_under_way() -> None:
    code = """
import signal
from finetune_trainer.__main__ import Stop
stop = Stop()
with stop.waits():
    signal.raise_signal(signal.SIGTERM)
    print(stop.requested)
try:
    signal.raise_signal(signal.SIGTERM)
finally:
    print("swallowed")
"""
    paths = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run([sys.executable, "-u", "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=120)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "True\n")


def run_rank(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-m", "finetune_trainer", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        timeout=120,
    )


def test_a_rank_refuses_without_a_traceback(tmp_path: Path) -> None:
    result = run_rank(str(tmp_path / "missing.json"))
    assert (result.returncode, result.stdout) == (exit_for(Reason.CONFIGURATION).code, "")
    assert result.stderr.startswith("cannot read the run's configuration: ")
    assert result.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "run.json").write_text(make_config(str(tmp_path / "file" / "out")).dump())
    result = run_rank(str(tmp_path / "run.json"), PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == exit_for(Reason.CONFIGURATION).code
    assert "cannot be written: Not a directory" in result.stderr
    assert " torch\n" not in result.stderr


def test_a_rank_has_one_thread_until_its_rows_are_read_beside_it(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(make_config(str(tmp_path / "out")).dump())
    code = f"""
import os, sys
from finetune_trainer import __main__ as program, reading
def start(*given):
    print(len(os.listdir("/proc/self/task")), [name for name in ("numpy", "torch") if name in sys.modules], flush=True)
    os._exit(0)
reading.start = start
program.main([{str(tmp_path / "run.json")!r}])
"""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "4"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert (result.stdout, result.stderr) == ("1 []\n", "")


def test_a_model_is_another_when_its_configuration_or_a_tensor_is() -> None:
    import torch

    from finetune_trainer.hf_files import HFModel, TensorEntry

    def digest(config: dict[str, int], **changes: Any) -> str:
        entry = TensorEntry(**{"file": "model.safetensors", "dtype": torch.float32, "shape": (4, 8), "offset": 0, **changes})
        return program.model_digest(HFModel(Path("/m"), config, {"weight": entry}))

    same = digest({"a": 1, "b": 2})
    assert digest({"b": 2, "a": 1}, file="model-00001-of-00002.safetensors") == same
    assert len({same, digest({"a": 2, "b": 2}), digest({"a": 1, "b": 2}, shape=(8, 4)), digest({"a": 1, "b": 2}, dtype=torch.bfloat16)}) == 4
