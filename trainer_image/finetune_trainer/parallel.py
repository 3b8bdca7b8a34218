"""Process groups: who this process is, which device it owns, and the groups that Megatron-core cuts a model over.

The only reader of RANK, WORLD_SIZE and the other variables of a gang besides ``launch.py``. It reads them and never sets
them. Nothing here knows about models.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from finetune_trainer import megatron_cpu
from finetune_trainer.contract import ConfigurationError, DistributedError, ParallelismConfig, RunConfig
from finetune_trainer.resolve import Machine
from finetune_trainer.shards import Share

GIB = 2**30


@dataclass(frozen=True)
class Ranks:
    """This process's place in every group; ``initialize`` makes it."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tp: Share
    pp: Share
    dp: Share

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the embedding."""
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process computes the loss."""
        return self.pp.rank == self.pp.size - 1

    @property
    def is_writer(self) -> bool:
        """Whether this process writes what every tensor- and data-parallel copy of its pipeline stage holds alike."""
        return self.tp.rank == 0 and self.dp.rank == 0


@dataclass(frozen=True)
class Place:
    """What the launcher says about this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master: tuple[str, int] | None


def read_place(environment: Mapping[str, str]) -> Place:
    """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; raises ConfigurationError naming the variable."""
    rank, world_size = _read_number(environment, "RANK", 0), _read_number(environment, "WORLD_SIZE", 1)
    local_rank = _read_number(environment, "LOCAL_RANK", rank)
    local_world_size = _read_number(environment, "LOCAL_WORLD_SIZE", world_size)
    if rank >= world_size:
        raise ConfigurationError(f"RANK is {rank}; it must be below WORLD_SIZE ({world_size})")
    if local_rank >= local_world_size:
        raise ConfigurationError(f"LOCAL_RANK is {local_rank}; it must be below LOCAL_WORLD_SIZE ({local_world_size})")
    host = environment.get("MASTER_ADDR")
    if host is None and world_size > 1:
        raise ConfigurationError(f"MASTER_ADDR is not set; with WORLD_SIZE {world_size} it must name the host of rank 0")
    port = _read_number(environment, "MASTER_PORT", 29500)
    return Place(rank, world_size, local_rank, local_world_size, (host, port) if host and world_size > 1 else None)


def _read_number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise ConfigurationError(f"{name} is {text!r}; it must be a whole number")
    return int(text)


def current_device(place: Place) -> torch.device:
    """The accelerator of this process; raises ConfigurationError when the node has fewer than processes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if place.local_world_size > count:
        raise ConfigurationError(
            f"NPROC_PER_NODE is {place.local_world_size}; this node shows {count} GPU{'s' if count > 1 else ''} (CUDA_VISIBLE_DEVICES), so it may be at most {count}"
        )
    return torch.device("cuda", place.local_rank)


def open_process_group(config: RunConfig) -> None:
    """Join the gang: gloo on CPUs, nccl on GPUs; every collective, and the wait for the master, ends after ``ddpTimeout``.

    Raises ConfigurationError for a wrong environment and DistributedError when the master or a rank does not come.
    """
    place = read_place(os.environ)
    device = current_device(place)
    timeout = config.parallelism.ddp_timeout
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if place.master is None:
        store: Any = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        return
    if place.rank > 0:
        wait_for_master(place, time.monotonic() + timeout)
    try:
        distributed.init_process_group(backend, init_method="env://", rank=place.rank, world_size=place.world_size, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        host, port = place.master
        raise DistributedError(
            f"rank {place.rank} of {place.world_size} could not join the others at MASTER_ADDR {host}, MASTER_PORT {port}: {error}"
        ) from error


def wait_for_master(place: Place, deadline: float) -> None:
    """Return when the master's name resolves and its port answers; raises DistributedError at ``deadline`` (of ``time.monotonic``)."""
    assert place.master is not None
    host, port = place.master
    pause, started = 0.05, time.monotonic()
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))):
                return
        except OSError as error:
            if time.monotonic() + pause > deadline:
                waited = time.monotonic() - started
                raise DistributedError(f"rank {place.rank} waited {waited:.0f} s for the master at MASTER_ADDR {host}, MASTER_PORT {port}: {error}") from error
        time.sleep(pause)
        pause = min(2.0, pause * 1.5)


def describe_machine() -> Machine:
    """Device, world size and GiB of memory per process: the least over all processes, so that every rank decides alike. Collective."""
    place = read_place(os.environ)
    device = current_device(place)
    if device.type == "cuda":
        available = float(torch.cuda.get_device_properties(device).total_memory)
    else:
        available = host_memory() / place.local_world_size
    least = torch.tensor([available], dtype=torch.float64, device=device)
    distributed.all_reduce(least, op=distributed.ReduceOp.MIN)
    return Machine(device="cuda" if device.type == "cuda" else "cpu", world_size=distributed.get_world_size(), memory_gib=round(float(least.item()) / GIB, 2))


def host_memory() -> float:
    """Bytes of memory that this host, or the container's limit, allows."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (text := path.read_text().strip()).isdecimal():
            total = min(total, float(text))
    return total


def initialize(parallelism: ParallelismConfig, seed: int) -> Ranks:
    """Cut the gang into Megatron's groups and seed every random generator; sizes that are None count as 1. Collective."""
    megatron_cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    place = read_place(os.environ)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallelism.tensor_model_parallel_size or 1,
        pipeline_model_parallel_size=parallelism.pipeline_model_parallel_size or 1,
        context_parallel_size=parallelism.context_parallel_size or 1,
        expert_model_parallel_size=parallelism.expert_model_parallel_size or 1,
        expert_tensor_parallel_size=parallelism.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallelism.ddp_timeout / 60,
    )
    ranks = Ranks(
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        local_rank=place.local_rank,
        device=current_device(place),
        tp=Share(parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()),
        pp=Share(parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_world_size()),
        dp=Share(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()),
    )
    torch.manual_seed(seed + 100 * ranks.pp.rank)
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * ranks.pp.rank, force_reset_rng=True)
    return ranks


def shut_down() -> None:
    """Leave the gang and forget Megatron's global state, so that another layout can be set up in this process."""
    if "megatron.core.parallel_state" in sys.modules:
        from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine

        num_microbatches_calculator.unset_num_microbatches_calculator()
        rerun_state_machine.destroy_rerun_state_machine()
        parallel_state.destroy_model_parallel()
    if distributed.is_initialized():
        distributed.destroy_process_group()
