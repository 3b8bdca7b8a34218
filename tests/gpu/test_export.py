"""Files are written from a GPU by threads: what is computed and handed over may be freed, and its memory used again, while it waits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune_trainer.hf_export import STAGED_BYTES, FolderWriter, TensorSpec, plan_files
from finetune_trainer.hf_files import check_manifest
from gang import Gang

COUNT = 40
ROWS, COLUMNS = 3 * STAGED_BYTES // 8192 + 5, 4096
"""In bfloat16, some more than three times the memory through which a thread copies."""


def made(number: int, device: str) -> torch.Tensor:
    """Exact in bfloat16, and different for every ``number``."""
    return ((torch.arange(ROWS * COLUMNS, device=device) + 7 * number) % 251).view(ROWS, COLUMNS).to(torch.bfloat16)


def write_from_gpu(folder: Path) -> tuple[list[int], int]:
    """The numbers of the tensors that are not in the files as they were made, and the most bytes that waited."""
    device = f"cuda:{torch.cuda.device_count() - 1}"
    torch.cuda.set_device(device)
    specs = [TensorSpec(f"t{number}", (ROWS, COLUMNS), torch.bfloat16) for number in range(COUNT)]
    writer = FolderWriter(folder, specs, plan_files(specs, "model", COUNT // 3 * specs[0].nbytes), max_waiting_bytes=2 * specs[0].nbytes)
    writer.create({}, {})
    for number, spec in enumerate(specs):
        rows = made(number, device)
        writer.write(spec.name, 0, rows[: ROWS // 2])
        writer.write(spec.name, ROWS // 2, rows[ROWS // 2 :].t().contiguous().t())  # to be made contiguous
        del rows
    writer.close()
    writer.publish(writer.seal(0, 1))
    check_manifest(folder)
    written = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return [number for number in range(COUNT) if not torch.equal(written[f"t{number}"], made(number, "cpu"))], writer.waiting.most


@pytest.mark.one_gpu
def test_tensors_of_a_gpu_arrive_whole(gpu1: Gang, tmp_path: Path) -> None:
    ((wrong, most),) = gpu1.run(write_from_gpu, tmp_path / "out")
    assert wrong == []
    assert most <= 3 * ROWS * COLUMNS * 2
