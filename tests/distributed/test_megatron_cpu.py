"""The redirections for CPUs reach Megatron-core and nobody else."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys

import torch

from finetune_trainer import megatron_cpu, parallel
from finetune_trainer.contract import ParallelismConfig, RunConfig
from gang import Gang


def test_torch_itself_is_unchanged(gang1: Gang) -> None:
    assert gang1.run(seen_outside_megatron) == [[]]


def seen_outside_megatron() -> list[str]:
    megatron_cpu.install()
    wrong = []
    if torch.tensor([1.0]).type() != "torch.FloatTensor":
        wrong.append("Tensor.type()")
    if torch.tensor([1]).type(torch.float32).dtype is not torch.float32:
        wrong.append("Tensor.type(dtype)")
    for name, call in {
        "Tensor.cuda": lambda: torch.zeros(1).cuda(),
        "device='cuda'": lambda: torch.zeros(1, device="cuda"),
        "current_device": torch.cuda.current_device,
    }.items():
        try:
            call()
            wrong.append(name)
        except (RuntimeError, AssertionError):
            pass
    return wrong


def test_transformer_engine_cannot_be_imported_where_no_gpu_is(gang1: Gang) -> None:
    assert gang1.run(has_transformer_engine) == [(True, None)]


def has_transformer_engine() -> tuple[bool, object]:
    megatron_cpu.install()
    return "transformer_engine" in sys.modules and sys.modules["transformer_engine"] is None, importlib.util.find_spec("transformer_engine")


def test_megatron_sees_the_cpu_as_its_device(gang1: Gang) -> None:
    assert gang1.run(seen_inside_megatron) == [("cpu", "torch.cuda.BFloat16Tensor", "cpu", False)]


def seen_inside_megatron() -> tuple[str, str, str, bool]:
    megatron_cpu.install()
    megatron_cpu.install()
    schedules = vars(sys.modules["megatron.core.pipeline_parallel.schedules"])
    names = {"__name__": "megatron.core.test", "tensor": torch.zeros(2, dtype=torch.bfloat16)}
    exec("kind = tensor.type(); device = str(tensor.cuda().device)", names)
    literal = schedules["torch"].zeros([], dtype=torch.int, device="cuda")
    return str(literal.device), names["kind"], names["device"], schedules["torch"].cuda.is_available()


def draw(seed: int) -> tuple[list[float], list[float], list[float], list[str]]:
    """Numbers of the default generator, of the tensor-parallel state, of the default generator again; what was logged."""
    from megatron.core import tensor_parallel

    config = RunConfig.model_validate({"model": {"source": "/m"}, "data": {"dataset": ["d"]}, "run": {"outputDir": "/o"}})
    parallel.open_process_group(config)
    parallel.initialize(ParallelismConfig(tensor_model_parallel_size=2), seed)
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    first = torch.rand(2).tolist()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        forked = torch.rand(2).tolist()
    logging.getLogger().removeHandler(handler)
    return first, forked, torch.rand(2).tolist(), logged


def test_random_states_differ_between_tensor_parallel_ranks_only_where_they_fork(gang2: Gang) -> None:
    (first, forked, after, logged), (other_first, other_forked, other_after, _) = gang2.run(draw, 5)
    assert first == other_first
    assert after == other_after
    assert forked != other_forked
    assert first != after
    assert logged == []
    assert gang2.run(draw, 5)[0][1] == forked, "a function of the seed"
    assert gang2.run(draw, 6)[0][1] != forked


# In a process of its own. Every function that torch.compile has made knows the one that it was made of.
COMPILED_FUNCTIONS = """
import json, sys, types
from finetune_trainer import train

def is_compiled(value):
    return isinstance(getattr(value, "_torchdynamo_orig_callable", None), types.FunctionType)

import torch
assert is_compiled(torch.compile(lambda number: number))
modules = [module for name, module in list(sys.modules.items()) if name.startswith("megatron.core")]
print(json.dumps([len(modules), [name for module in modules for name, value in vars(module).items() if is_compiled(value)]]))
"""


def test_no_function_of_megatron_is_compiled() -> None:
    output = subprocess.run([sys.executable, "-c", COMPILED_FUNCTIONS], capture_output=True, text=True, check=True).stdout
    modules, compiled = json.loads(output)
    assert modules > 100
    assert compiled == []
