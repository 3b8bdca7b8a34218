"""Writing folders: the plan of files, ranks that write their own ranges, and what is left after a failure."""

from __future__ import annotations

import errno
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune_trainer.contract import ConfigurationError, EngineError
from finetune_trainer.hf_export import (
    FolderWriter,
    TensorSpec,
    check_output_folder,
    check_replaceable,
    disk_error,
    files_in_turn,
    index_json,
    model_config,
    plan_files,
    remove_partials,
    side_files,
)
from finetune_trainer.hf_files import HFModel, check_manifest, read_header

SPECS = [TensorSpec("a", (4, 6), torch.float32), TensorSpec("b", (3,), torch.bfloat16), TensorSpec("c", (8, 2), torch.float16)]


def write_all(writer: FolderWriter, tensors: dict[str, torch.Tensor]) -> None:
    writer.create({"config.json": "{}"}, {})
    for name, tensor in tensors.items():
        half = len(tensor) // 2
        writer.write(name, half, tensor[half:])
        writer.write(name, 0, tensor[:half])
    writer.close()
    writer.publish(writer.seal(0, 1))


def random_tensors() -> dict[str, torch.Tensor]:
    return {spec.name: torch.randn(spec.shape).to(spec.dtype) for spec in SPECS}


def test_one_file_holds_everything_where_it_may() -> None:
    (plan,) = plan_files(SPECS, "model", 10**6)
    assert plan.name == "model.safetensors"
    assert len(plan.header) % 8 == 0
    assert plan.size == len(plan.header) + 96 + 6 + 32
    assert index_json([plan], SPECS) is None


def test_files_stay_below_the_largest_size_and_a_larger_tensor_is_alone() -> None:
    plans = plan_files(SPECS, "model", 40)
    assert [(plan.name, list(plan.offsets)) for plan in plans] == [
        ("model-00001-of-00002.safetensors", ["a"]),
        ("model-00002-of-00002.safetensors", ["b", "c"]),
    ]
    index = json.loads(index_json(plans, SPECS) or "")
    assert index["weight_map"] == {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}
    assert index["metadata"] == {"total_size": 134, "total_parameters": 43}


def test_tensors_go_from_file_to_file() -> None:
    plans = plan_files([TensorSpec(name, (1,), torch.float32) for name in "abcdef"], "model", 12)
    assert [list(plan.offsets) for plan in plans] == [["a", "b", "c"], ["d", "e", "f"]]
    assert files_in_turn(plans, "abcdf") == ["a", "d", "b", "f", "c"]


@pytest.mark.parametrize("max_shard_size", [40, 10**6])
def test_ranges_written_in_any_order_make_safetensors_files(tmp_path: Path, max_shard_size: int) -> None:
    tensors = random_tensors()
    write_all(FolderWriter(tmp_path / "out", SPECS, plan_files(SPECS, "model", max_shard_size)), tensors)
    loaded = {name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items())
    for file in (tmp_path / "out").glob("*.safetensors"):
        read_header(file)
    assert len(check_manifest(tmp_path / "out")) == 64


def test_sealing_in_parts_covers_every_file(tmp_path: Path) -> None:
    writer = FolderWriter(tmp_path / "out", SPECS, plan_files(SPECS, "model", 40))
    writer.create({"config.json": "{}", "index.json": "{}"}, {})
    whole = writer.seal(0, 1)
    assert len(whole) == 4
    assert {**writer.seal(0, 3), **writer.seal(1, 3), **writer.seal(2, 3)} == whole


def test_nothing_bears_the_final_name_before_the_end(tmp_path: Path) -> None:
    writer = FolderWriter(tmp_path / "out", SPECS, plan_files(SPECS, "model"))
    writer.create({}, {})
    assert [path.name for path in tmp_path.iterdir()] == [".partial-out"]
    assert not (tmp_path / ".partial-out" / "manifest.json").exists()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def export_until_killed(folder: Path, call: str) -> None:
    """Export in a process that gets SIGKILL when it comes to ``call``: fsync of the first file, or the first or second rename."""
    process = os.fork()
    if process:
        _, status = os.waitpid(process, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        return
    try:
        name, number = call.split()
        left = [int(number)]
        owner, original = (os, os.fsync) if name == "fsync" else (Path, Path.rename)

        def kill_in_time(*arguments: object) -> object:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)  # type: ignore[arg-type]

        setattr(owner, name, kill_in_time)
        write_all(FolderWriter(folder, SPECS, plan_files(SPECS, "model")), random_tensors())
    finally:
        os._exit(1)


@pytest.mark.parametrize(("call", "earlier_stays"), [("fsync 1", True), ("rename 1", True), ("rename 2", False)])
def test_killed_export_leaves_no_half_of_a_result_and_the_next_run_removes_it(tmp_path: Path, call: str, earlier_stays: bool) -> None:
    folder = tmp_path / "out"
    write_all(FolderWriter(folder, SPECS, plan_files(SPECS, "model")), random_tensors())
    earlier = check_manifest(folder)
    export_until_killed(folder, call)
    assert any(path.name.startswith(".partial-") for path in tmp_path.iterdir())
    assert folder.exists() is earlier_stays
    if earlier_stays:
        assert check_manifest(folder) == earlier
    remove_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [folder] * earlier_stays
    write_all(FolderWriter(folder, SPECS, plan_files(SPECS, "model")), random_tensors())
    check_manifest(folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_folder_of_other_content_is_not_replaceable(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "new")
    check_replaceable(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=rf"{tmp_path} is not empty and holds no export of an earlier run \(no manifest\.json\)"):
        check_replaceable(tmp_path)


def test_failed_write_is_told_at_the_end_and_keeps_nothing_from_going_on(tmp_path: Path) -> None:
    writer = FolderWriter(tmp_path / "out", SPECS, plan_files(SPECS, "model"))
    writer.create({}, {})
    (tmp_path / ".partial-out" / "model.safetensors").unlink()
    writer.write("a", 0, torch.zeros(4, 6))
    writer.write("b", 0, torch.zeros(3))
    with pytest.raises(ConfigurationError, match=r"model\.safetensors: .*the output folder must be on a disk that every node shares"):
        writer.close()


def test_full_disk_is_told_at_the_end_with_the_file(tmp_path: Path) -> None:
    writer = FolderWriter(tmp_path / "out", SPECS, plan_files(SPECS, "model", 40), max_waiting_bytes=1)
    writer.create({}, {})
    file = tmp_path / ".partial-out" / "model-00002-of-00002.safetensors"
    file.unlink()
    file.symlink_to("/dev/full")
    for name, tensor in random_tensors().items():
        writer.write(name, 0, tensor)
    with pytest.raises(ConfigurationError, match=r"model-00002-of-00002\.safetensors: the disk is full"):
        writer.close()


def test_tensors_wait_for_room_while_the_disk_stands_still_and_its_failure_lets_them_go(tmp_path: Path) -> None:
    writer = FolderWriter(tmp_path / "out", SPECS, plan_files(SPECS, "model"), max_waiting_bytes=1)
    writer.create({}, {})
    file = tmp_path / ".partial-out" / "model.safetensors"
    file.unlink()
    os.mkfifo(file)  # to open one stands still until somebody reads, and no offset can be written to

    def write() -> None:
        for name, tensor in random_tensors().items():
            writer.write(name, 0, tensor)
        writer.close()

    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(write)
        os.close(os.open(file, os.O_RDONLY))
        with pytest.raises(ConfigurationError, match=r"model\.safetensors: cannot be written: .*Illegal seek"):
            writing.result()
    assert writer.waiting.most == SPECS[0].nbytes
    assert writer.waiting.count == 0


def test_what_waits_is_at_most_the_limit_and_one_tensor(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{number}", (1000, 100), torch.float32) for number in range(20)]
    tensors = {spec.name: torch.randn(spec.shape) for spec in specs}
    writer = FolderWriter(tmp_path / "out", specs, plan_files(specs, "model", 3_000_000), max_waiting_bytes=500_000)
    write_all(writer, tensors)
    assert 0 < writer.waiting.most < 500_000 + 200_000  # write_all hands over halves
    loaded = {name: tensor for path in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_file_in_the_way_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(ConfigurationError, match=rf"{tmp_path}/results/out: cannot be written: .*Not a directory"):
        FolderWriter(tmp_path / "results" / "out", SPECS, plan_files(SPECS, "model")).create({}, {})
    with pytest.raises(ConfigurationError, match=rf"{tmp_path}/results/out: cannot be written: .*Not a directory"):
        check_output_folder(tmp_path / "results" / "out", 1)


def test_output_folder_is_proven_before_it_is_needed(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "new" / "out", 1000)
    assert list((tmp_path / "new" / "out").iterdir()) == []
    with pytest.raises(ConfigurationError, match=rf"{tmp_path}: the disk is too full: the results need {10**18} bytes, \d+ are free"):
        check_output_folder(tmp_path, 10**18)


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, ConfigurationError, "/out: the disk is full (No space left on device); the weights need 7 bytes"),
        (errno.EROFS, ConfigurationError, "/out: cannot be written: [Errno 30] Read-only file system"),
        (errno.EACCES, ConfigurationError, "/out: cannot be written: [Errno 13] Permission denied"),
        (errno.EIO, EngineError, "/out: cannot be written: [Errno 5] Input/output error"),
    ],
)
def test_failures_of_the_disk_are_the_users_unless_trying_again_may_help(number: int, kind: type[EngineError], message: str) -> None:
    failure = disk_error(Path("/out"), OSError(number, os.strerror(number)), 7)
    assert type(failure) is kind
    assert str(failure) == message


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"a": 1}, {"a": 1, "torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float32", "a": 1}, {"a": 1, "torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
    ],
)
def test_config_names_the_type_that_was_written(source: dict[str, object], expected: dict[str, object]) -> None:
    assert model_config(source, torch.bfloat16) == expected


def test_tokenizer_and_templates_go_along_and_weights_do_not(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "pytorch_model.bin", "model.safetensors", "modeling_custom.py"):
        (tmp_path / name).write_text("x")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("x")
    assert sorted(side_files(HFModel(tmp_path, {}, {}))) == ["additional_chat_templates/tools.jinja", "chat_template.jinja", "merges.txt", "tokenizer.json"]
