"""How long it takes to import a model, and to read its bytes: ``python importing.py RUN.json`` prints JSON, medians in seconds.

One process of one thread. *Read* is a plain read of the safetensors files into fresh memory, as any loader must do once; *reread* is the same into memory that the process has had
before. *Import* is everything from opening the folder to weights that have been checked, into a model that is already built: it takes no fresh memory, so *reread* is the stricter
bound. *Transformers* is from_pretrained and a sum of every weight: it builds the model too, but only maps the files, so that the sum is what reads them (import sums every weight to
find NaN). *Cold* drops the files from the page cache first.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM

from finetune_trainer import convert, families, hf_files, model, parallel, resolve
from finetune_trainer.contract import RunConfig

REPEATS = 9


def main() -> None:
    config = RunConfig.load(Path(sys.argv[1]))
    parallel.open_process_group(config)
    hf = hf_files.open_model(config.model)
    config = resolve.resolve(config, resolve.read_facts(hf.config), parallel.describe_machine()).config
    family = families.find(hf.config)
    ranks = parallel.initialize(config.parallelism, config.training.seed)
    torch.set_num_threads(1)  # the engine has chosen its own number by now
    chunks = model.build(family, hf.config, config, ranks)
    files = sorted(hf.folder.glob("*.safetensors"))
    num_bytes = sum(file.stat().st_size for file in files)
    kept = torch.ones(num_bytes, dtype=torch.uint8)

    def read() -> None:
        read_into(torch.empty(num_bytes, dtype=torch.uint8))

    def reread() -> None:
        read_into(kept)

    def read_into(buffer: torch.Tensor) -> None:
        view, place = memoryview(buffer.numpy()), 0
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(view[place:]):
                    place += count

    def import_base() -> None:
        convert.import_base(chunks, family, hf_files.open_model(config.model), ranks)

    def from_pretrained() -> None:
        for weight in AutoModelForCausalLM.from_pretrained(hf.folder, dtype=config.model.torch_dtype).parameters():
            weight.detach().sum()

    works = {"read": read, "reread": reread, "import": import_base, "transformers": from_pretrained}
    seconds = {f"{name} {state}": median(times) for state in ("warm", "cold") for name, times in measure(works, files if state == "cold" else []).items()}
    print(json.dumps({"bytes": num_bytes, "seconds": seconds}))
    parallel.shut_down()


def measure(works: Mapping[str, Callable[[], None]], cold_files: list[Path]) -> dict[str, list[float]]:
    """Times of some calls of each work after one that does not count; in turn, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(REPEATS + 1):
        for name, work in works.items():
            for file in cold_files:
                forget(file)
            begin = time.perf_counter()
            work()
            if repeat:
                times[name].append(time.perf_counter() - begin)
    return times


def forget(file: Path) -> None:
    """Ask the kernel to drop a file from its page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    main()
