"""What torch.compile writes for an H100 or H200, where there is none.

Autograd cannot run on tensors of a GPU that is not there, so programs are traced on the CPU, forward and backward.
Each graph is then told that its tensors are on `cuda:0` before Inductor turns it into kernels, and runs on the CPU as
it was traced. Triton and ptxas need no GPU to compile the kernels for one.

What it cannot show: numbers of CUDA's kernels, times, and what cuDNN and cuBLAS launch behind a call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, config
from torch._inductor.codecache import PyCodeCache
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._subclasses import fake_tensor
from torch.fx.node import map_aggregate
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _triton
from torch.utils._python_dispatch import _disable_current_modes

GPU = torch.device("cuda", 0)
HOPPER = SimpleNamespace(
    **{"name": "NVIDIA H200", "major": 9, "minor": 0, "warp_size": 32, "multi_processor_count": 132},
    **{"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024},
    **{"total_memory": 141 * 2**30, "gcnArchName": "", "L2_cache_size": 50 * 2**20},
)
# One a line in what Inductor writes: its own kernels by name, calls of libraries and custom operators, memory sets.
LAUNCH = re.compile(r"(triton_\w+)\.run\(|(extern_kernels\.\w+|torch\.ops\.[\w.]+)\(|\.(zero_|fill_|copy_)\(")


class TritonDriver:
    """What Triton asks about the device."""

    utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132})

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return GPU


@dataclass(frozen=True)
class Code:
    """What was written for a graph."""

    backward: bool
    source: str

    @functools.cached_property
    def launches(self) -> list[str]:
        """Names of what one call launches, in order."""
        call = self.source[self.source.index("def call(") :].split("\ndef ")[0]
        matches = (LAUNCH.search(line) for line in call.splitlines() if "assert_" not in line)
        return [next(filter(None, match.groups())) for match in matches if match]

    def compile(self) -> int:
        """Compile every kernel to machine code, and return how many there are."""
        kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", self.source, re.DOTALL)
        with hopper():
            for name, source in kernels:
                getattr(PyCodeCache.load(source), name).precompile(warm_cache_only=True)
        return len(kernels)


class _Written(BaseException):
    """Carries the source out of Inductor, before it is loaded."""


@contextlib.contextmanager
def hopper() -> Iterator[None]:
    """Let Inductor and Triton find the device."""
    from triton.runtime.driver import driver  # here, so that this file can be looked at where Triton is missing

    def written(source: str) -> None:
        raise _Written(source)

    def forget() -> None:  # what was found out of the machine
        for function in vars(_triton).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: HOPPER,
        "get_device_capability": lambda device=None: (9, 0),
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    with pytest.MonkeyPatch.context() as patch, config.patch(compile_threads=1, fx_graph_cache=False):
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
            if name != "is_available" and hasattr(CudaInterface, name):
                patch.setattr(CudaInterface, name, staticmethod(answer))
        patch.setattr(CudaInterface.Worker, "get_device_properties", staticmethod(answers["get_device_properties"]))
        patch.setattr(CudaInterface.Worker, "current_device", staticmethod(answers["current_device"]))
        patch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
        patch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
        patch.setattr(GraphLowering, "save_output_code", staticmethod(written))
        patch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", TritonDriver())
        forget()
        try:
            yield
        finally:
            forget()


def _to_gpu(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> tuple[torch.fx.GraphModule, list[Any]]:
    mode, graph = detect_fake_mode(inputs), copy.deepcopy(graph)
    assert mode is not None
    if hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        torch._C._ensureCUDADeviceGuardSet()
    with mode:
        moved = [
            torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=GPU) if isinstance(x, Tensor) else x
            for x in inputs
        ]
    for node in graph.graph.nodes:
        node.args, node.kwargs = (
            map_aggregate(arguments, lambda x: GPU if isinstance(x, torch.device) else x)
            for arguments in (node.args, node.kwargs)
        )
        node.meta.pop("val", None)
    graph.recompile()
    FakeTensorProp(graph, mode=mode).propagate(*moved)
    return graph, moved


def _layout(x: Tensor, weight: Tensor, _: object) -> torch.memory_format:
    """As cuDNN's convolutions; without a GPU, PyTorch takes them for others."""
    last = torch.channels_last
    either = any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, weight))
    return last if either else torch.contiguous_format


@contextlib.contextmanager
def cuda_code() -> Iterator[list[Code]]:
    """Let torch.compile write CUDA code of what is compiled in this context on the CPU; yields it as it is written."""
    codes: list[Code] = []
    real = compile_fx.compile_fx

    def lower(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        traced = copy.deepcopy(graph)
        options = {name: options[name] for name in ("is_backward", "static_input_idxs", "graph_id") if name in options}
        with _disable_current_modes(), hopper():
            try:
                compile_fx.compile_fx_inner(*_to_gpu(graph, inputs), **options)
            except _Written as written:
                codes.append(Code(options.get("is_backward", False), written.args[0]))

        def run(arguments: list[Any]) -> Any:
            return traced(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def compile_all(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        return real(graph, inputs, **{"inner_compile": lower, **options})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_fx, "compile_fx", compile_all)
        patch.setattr(torch._C, "_select_conv_backend", lambda *_, **__: None)
        patch.setattr(torch._C, "_conv_determine_backend_memory_format", _layout)
        torch._dynamo.reset()
        try:
            yield codes
        finally:
            torch._dynamo.reset()
