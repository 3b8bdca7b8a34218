"""Megatron-core's CUDA assumptions, handled where torch has no CUDA device (gloo processes on CPUs).

Nothing of torch changes for anybody else: inside Megatron-core's own modules the name ``torch`` is bound to a view of
torch whose factories take the device 'cuda' as the CPU and whose ``torch.cuda`` is a stand-in. Two methods of Tensor
cannot be reached that way; they behave differently only when Megatron-core is the caller.

On every device, Megatron-core's functions stay as they are written: nothing is compiled by torch. Compiling costs the first
step tens of seconds.

Line numbers are megatron-core 0.16.1's, below https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/.
The whole module can go when Megatron-core takes its device from the tensors or groups at hand; each redirection says
when it can go alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

# What the engine uses of Megatron-core; the redirection reaches modules that are loaded.
MODULES = (
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.rerun_state_machine",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.tensor_parallel.random",
)

FACTORIES = ("arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "rand", "randn", "tensor", "zeros", "zeros_like")

CPU = torch.device("cpu")


def install() -> None:
    """Make megatron.core usable on CPUs, and on every device leave its functions uncompiled; idempotent.

    Call it before the first import of megatron.core, and again when more of its modules have been imported.
    """
    _leave_functions_uncompiled()
    if not torch.cuda.is_available():
        _hide_transformer_engine()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one line for each of transformer-engine and Apex that is missing, per module
        for name in MODULES:
            importlib.import_module(name)
    _recompute_norms_without_fp8()
    if torch.cuda.is_available():
        return
    view = _make_view()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "__dict__", {}).get("torch") is torch:
            vars(module)["torch"] = view
    _redirect_random_state()
    _redirect_tensor_methods()


def _leave_functions_uncompiled() -> None:
    """Megatron-core decorates elementwise functions with torch.compile when it is imported: SwiGLU, bias and dropout, the native
    cross entropy. They would be compiled in the first step, on a CPU by a C++ compiler that may not be there.

    jit.py 21 (``jit_fuser = torch.compile``). ``disable_jit_fuser`` comes too late: importing it imports the functions.
    Remove when jit.py can be told before it is imported.
    """
    if "megatron.core.jit" in sys.modules:
        return
    plain = ModuleType("megatron.core.jit", "Stands in for Megatron-core's jit.py: functions stay as they are written.")

    def jit_fuser(function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    vars(plain).update(jit_fuser=jit_fuser, noop_decorator=jit_fuser, enable_jit_fuser=lambda: None, disable_jit_fuser=lambda: None)
    sys.modules["megatron.core.jit"] = plain


def _hide_transformer_engine() -> None:
    """Where transformer-engine is installed but no GPU is there, Megatron-core takes its optimizer and its kernels, which begin with a call of CUDA.

    optimizer/__init__.py 10-30, optimizer/optimizer.py 18-37, optimizer/clip_grads.py 14-40 and extensions/transformer_engine.py 20-60 ask
    only whether it can be imported. Remove when they ask for a GPU too.
    """
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    modules.setdefault("transformer_engine", None)


def _recompute_norms_without_fp8() -> None:
    """Recompute of single modules (``recomputeModules: [layernorm]``) asks transformer-engine whether fp8 is on, even where it is missing.

    tensor_parallel/random.py 635-636: the default False is taken for "given" (``fp8 is not None``). Remove when 636 reads ``bool(fp8)``.
    """
    random: Any = sys.modules["megatron.core.tensor_parallel.random"]
    if not random.HAVE_TE:
        random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)


@functools.cache
def _make_view() -> ModuleType:
    """A module that is torch, but for the device of its factories and ``torch.cuda``.

    ``device='cuda'`` literals: pipeline_parallel/schedules.py 596, 983, 2138; optimizer/optimizer.py 473-485, 907;
    optimizer/clip_grads.py 90-207; optimizer/grad_scaler.py 15-94; distributed/param_and_grad_buffer.py 768;
    dist_checkpointing/strategies/state_dict_saver.py 204. Remove when they ask for ``torch.cuda.current_device()``'s
    successor, the device of the model's parameters.
    """
    view = ModuleType("torch")
    vars(view).update(vars(torch))
    vars(view)["__getattr__"] = lambda name: getattr(torch, name)
    for name in FACTORIES:
        vars(view)[name] = _on_cpu(getattr(torch, name))
    vars(view)["cuda"] = _make_cuda()
    return view


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and torch.device(kwargs["device"] if kwargs["device"] is not None else "cpu").type == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


class _Stream:
    """A stream or event of a device that does everything at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _Stream:
        return _Stream()

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _make_cuda() -> ModuleType:
    """What Megatron-core's modules see as ``torch.cuda``: the CPU as current device, everything synchronous, one random state.

    ``current_device()``: models/common/embeddings/rotary_pos_embedding.py 162, tensor_parallel/layers.py 261, 552, 873,
    tensor_parallel/mappings.py 91-181, pipeline_parallel/p2p_communication.py 190-321, distributed/param_and_grad_buffer.py
    783-806, optimizer/distrib_optimizer.py 791, 1077. ``synchronize``, streams: pipeline_parallel/p2p_communication.py 242,
    distributed/param_and_grad_buffer.py 417-529, dist_checkpointing/strategies/filesystem_async.py 230, fully_parallel.py 272.
    Random state: tensor_parallel/random.py 235-238, 422, rerun_state_machine.py 957. Remove with the view.
    """
    cuda = ModuleType("torch.cuda")
    vars(cuda).update(vars(torch.cuda))
    vars(cuda).update(
        current_device=lambda: CPU,
        set_device=lambda device: None,
        device_count=lambda: 1,
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        current_stream=lambda device=None: _Stream(),
        default_stream=lambda device=None: _Stream(),
        stream=lambda stream: contextlib.nullcontext(),
        Stream=_Stream,
        Event=_Stream,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        manual_seed=torch.default_generator.manual_seed,
    )
    return cuda


def _redirect_random_state() -> None:
    """The tracker of random states (dropout in tensor-parallel regions, recompute) keeps the CPU generator's states.

    tensor_parallel/random.py 41-109 go to ``torch._C`` and ``torch.cuda.default_generators``; 264 warns that the CPU's state
    changed, which it now must. Remove when the tracker takes a generator.
    """
    random: Any = sys.modules["megatron.core.tensor_parallel.random"]
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    logger = logging.getLogger(random.__name__)
    if not logger.filters:
        logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _redirect_tensor_methods() -> None:
    """``Tensor.type()`` names the CUDA type and ``Tensor.cuda()`` returns the tensor, for callers in megatron.core only.

    optimizer/optimizer.py 671, 690, optimizer/distrib_optimizer.py 361, 420, 582 and optimizer/clip_grads.py 167 compare
    ``param.type()`` with 'torch.cuda.FloatTensor' and its like: remove when they compare ``param.dtype``.
    models/common/language_module/language_module.py 244, dist_checkpointing/exchange_utils.py 336, 499 call ``.cuda()``:
    remove when they use ``.to(device)``.
    """
    methods: Any = torch.Tensor
    if getattr(methods.cuda, "_megatron_cpu", False):
        return
    original_type, original_cuda = methods.type, methods.cuda

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original_type(self, *args, **kwargs)
        if not args and not kwargs and _caller_is_megatron() and not name.startswith("torch.cuda."):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    def tensor_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _caller_is_megatron():
            return self
        moved: torch.Tensor = original_cuda(self, *args, **kwargs)
        return moved

    tensor_cuda._megatron_cpu = True  # type: ignore[attr-defined]
    methods.type, methods.cuda = tensor_type, tensor_cuda


def _caller_is_megatron() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.core")
