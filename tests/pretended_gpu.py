"""A GPU in pretence, where none is at hand: on which device tensors lie, who waits for whom, what a graph replays.

Tensors "on cuda:0" are tensors of the CPU whose storage is marked. Every operation is looked at as it is
dispatched, below autograd: operands on two devices raise, as they would on a GPU; a copy between devices, or a value
read on the host, is noted, and raises where a wait is forbidden or a graph is being recorded. A recorded graph holds
operations and the tensors they had; replaying does the operations again, into the same tensors, without a line of
Python of whoever recorded it. So a captured step that reads something from Python, or from a tensor that is replaced
later, goes wrong here as it would there.

spalign's own kernels run in Triton's interpreter, where asked for: on what lies on the device alone, and recorded as a
launch each.

What it cannot show: numbers of CUDA's kernels, times, memory, compiled code.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from operations import host_reads, is_view, name_of
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spalign import kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
EITHER = torch.device("meta")  # made inside an operation, which knows where; as good as what it meets

FACTORIES = (
    *("zeros", "ones", "empty", "full", "tensor", "as_tensor", "arange", "linspace", "eye", "empty_strided"),
    *("rand", "randn", "randint", "randperm", "scalar_tensor"),
)
# These write to running statistics, and their schemas do not say so.
HIDDEN_WRITES = {"native_batch_norm": (3, 4)}


def why_kernels_cannot_run() -> str:
    """Return why spalign's kernels cannot run in Triton's interpreter, ``""`` if they can."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which comes with torch's CUDA builds"

    def version(package: str) -> tuple[int, ...]:
        return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])

    if version("triton") < (3, 3):
        return "Triton's interpreter loses what is written in place before 3.3"
    if version("triton") < (3, 8) and version("numpy") >= (2, 4):
        return "Triton's interpreter fails with numpy 2.4 before 3.8"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton's interpreter is off, as where there is a GPU: it would run that one's kernels as well"
    return ""


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Marks:
    """What is known of storages, for as long as they live: their Python objects come and go before them."""

    def __init__(self) -> None:
        self._known: dict[StorageWeakRef, torch.device] = {}
        self._sweep = 10_000

    def __getitem__(self, storage: Any) -> torch.device:
        return self._known.get(StorageWeakRef(storage), CPU)

    def __setitem__(self, storage: Any, place: torch.device) -> None:
        self._known[StorageWeakRef(storage)] = place  # a reference held weakly keeps the address from being used again
        if len(self._known) > self._sweep:
            self._known = {reference: place for reference, place in self._known.items() if not reference.expired()}
            self._sweep = 2 * len(self._known) + 10_000


PLACES, PINNED = Marks(), Marks()


def lies_on(tensor: Tensor) -> torch.device:
    return PLACES[tensor.untyped_storage()]


T = TypeVar("T")


def put(tree: T, place: torch.device) -> T:
    for part in tensors_in(tree):
        PLACES[part.untyped_storage()] = place
    return tree


class PretendedGpu(TorchDispatchMode):
    """The device; a context in which it exists.

    Attributes:
        waits: what the host has waited for so far, by operation.
        launches: spalign's own kernels so far, by name.
        forbidden: whether waiting raises.
        recording: the graph that is being captured.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, own_kernels: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []
        self.launches: list[str] = []
        self.forbidden = False
        self.recording: Graph | None = None
        self._destination: torch.device | None = None  # of what is made or copied just now
        self._install(patch)
        patch.setattr(kernels, "_ready", {0: own_kernels})
        if own_kernels:
            code = kernels._code()
            patch.setattr(kernels, "_code", lambda: Kernels(self, code))

    def wait(self, what: str) -> None:
        """Note that the host waits for the device.

        Raises:
            RuntimeError: it must not.
        """
        self.waits.append(what)
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        if self.forbidden:
            raise RuntimeError(f"called a synchronizing operation: {what}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do one operation of the CPU, as one of the device that its operands are on."""
        kwargs = kwargs or {}
        name = name_of(func)
        operands = tensors_in((args, kwargs))
        places = {lies_on(operand) for operand in operands}
        on_gpu = GPU in places or self._destination == GPU
        if GPU in places and self._destination is None:
            self._check(func, args, operands)
        if self.recording is not None and (on_gpu or EITHER in places or not operands):
            out = self.recording.run(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        if self._destination is not None:
            return put(out, self._destination)
        if GPU in places and name != "copy":
            return put(out, GPU)
        if not operands or places == {EITHER}:
            return put(out, EITHER)
        return out

    def _check(self, func: Any, args: Any, operands: list[Tensor]) -> None:
        name = name_of(func)
        strangers = [operand for operand in operands if lies_on(operand) == CPU]
        if name == "copy":
            if strangers:
                self.wait("copy")
        elif any(stranger.dim() for stranger in strangers):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
        elif strangers and self.recording is not None:
            raise RuntimeError(f"{name}: a number of the host is recorded and never read again")
        for reason in host_reads(func, args):
            self.wait(reason)

    # --- what programs see --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _making(self, place: torch.device) -> Iterator[None]:
        before, self._destination = self._destination, place
        try:
            yield
        finally:
            self._destination = before

    def _install(self, patch: pytest.MonkeyPatch) -> None:
        for name in FACTORIES:
            patch.setattr(torch, name, self._factory(getattr(torch, name)))
        for name in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"):
            patch.setattr(torch, name, self._like(getattr(torch, name)))
        for name in ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"):
            patch.setattr(Tensor, name, self._like(getattr(Tensor, name)))
        self._install_on_tensors(patch)
        self._install_on_torch(patch)
        self._install_on_cuda(patch)
        self._install_on_data(patch)

    def _factory(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def made(*args: Any, device: Any = None, **kwargs: Any) -> Any:
            place = GPU if device is not None and torch.device(device).type == "cuda" else CPU
            source = args[0] if args and isinstance(args[0], Tensor) else None
            if source is not None and device is None:
                place = lies_on(source)
            of_host_values = source is None and real.__name__ in ("tensor", "as_tensor") and place == GPU
            if of_host_values or (source is not None and lies_on(source) != place):
                self.wait("copy")
            with self._making(place):
                return put(real(*args, **kwargs), place)

        return made

    def _like(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def made(source: Tensor, *args: Any, device: Any = None, **kwargs: Any) -> Any:
            place = lies_on(source) if device is None else torch.device(device)
            with self._making(GPU if place.type == "cuda" else place):
                return real(source, *args, **kwargs)

        return made

    def _moved(self, tensor: Tensor, device: Any, non_blocking: bool, **kwargs: Any) -> Tensor:
        place = tensor.device if device is None else torch.device(device)
        place = GPU if place.type == "cuda" else place
        if place == tensor.device:
            return self._real_to(tensor, **kwargs) if kwargs else tensor
        if not (non_blocking and PINNED[tensor.untyped_storage()] == GPU):
            self.wait("copy")
        with self._making(place):
            moved: Tensor = self._real_to(tensor, **{"dtype": tensor.dtype, **kwargs}, copy=True)
            return put(moved, place)

    def _install_on_tensors(self, patch: pytest.MonkeyPatch) -> None:
        self._real_to: Any = Tensor.to
        real_numpy, real_tolist = Tensor.numpy, Tensor.tolist

        def device(tensor: Tensor) -> torch.device:
            return CPU if lies_on(tensor) == CPU else GPU

        def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            non_blocking = kwargs.pop("non_blocking", False)
            place = kwargs.pop("device", None)
            for arg in args:
                if isinstance(arg, Tensor):
                    place, kwargs["dtype"] = arg.device, arg.dtype
                elif isinstance(arg, torch.dtype):
                    kwargs["dtype"] = arg
                elif isinstance(arg, (str, torch.device)):
                    place = arg
                elif isinstance(arg, bool):
                    non_blocking = arg
            return self._moved(tensor, place, non_blocking, **{k: v for k, v in kwargs.items() if v is not None})

        def numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if lies_on(tensor) != CPU:
                raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")
            return real_numpy(tensor, *args, **kwargs)

        def tolist(tensor: Tensor) -> Any:
            if lies_on(tensor) != CPU:
                self.wait("tolist")
            return real_tolist(tensor)

        def pin_memory(tensor: Tensor, *_: Any) -> Tensor:
            PINNED[tensor.untyped_storage()] = GPU
            return tensor

        patch.setattr(Tensor, "device", property(device), raising=False)
        patch.setattr(Tensor, "is_cuda", property(lambda tensor: device(tensor) == GPU), raising=False)
        patch.setattr(Tensor, "is_cpu", property(lambda tensor: device(tensor) == CPU), raising=False)
        patch.setattr(Tensor, "to", to)
        patch.setattr(Tensor, "cuda", lambda tensor, *_, **options: to(tensor, GPU, **options))
        patch.setattr(Tensor, "cpu", lambda tensor: to(tensor, CPU))
        patch.setattr(Tensor, "numpy", numpy)
        patch.setattr(Tensor, "__array__", lambda tensor, *args, **_: numpy(tensor).__array__(*args))
        patch.setattr(Tensor, "tolist", tolist)
        patch.setattr(Tensor, "pin_memory", pin_memory)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        real_copy: Any = torch.storage._StorageBase.__deepcopy__

        def copied(storage: Any, memo: Any) -> Any:
            out = real_copy(storage, memo)
            PLACES[out] = PLACES[storage]
            return out

        patch.setattr(torch.storage._StorageBase, "__deepcopy__", copied)

    def _install_on_torch(self, patch: pytest.MonkeyPatch) -> None:
        real_load: Any = torch.load
        real_autocast, real_one_hot = torch.autocast, torch.nn.functional.one_hot
        real_grouping: Any = torch._C._group_tensors_by_device_and_dtype

        def load(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
            place = GPU if map_location is not None and torch.device(map_location).type == "cuda" else CPU
            return put(real_load(*args, map_location=CPU, **kwargs), place)

        def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
            return real_autocast("cpu", *args, **kwargs)

        def one_hot(labels: Tensor, num_classes: int = -1) -> Tensor:
            if lies_on(labels) == CPU or num_classes < 0:
                return real_one_hot(labels, num_classes)
            # On the CPU the labels are checked on the host, on a GPU in the kernel.
            return labels.new_zeros((*labels.shape, num_classes)).scatter_(-1, labels.unsqueeze(-1), 1)

        def grouping(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            groups = real_grouping(tensors, *args, **kwargs)  # foreach and fused operations take what is on one device
            return {(found[0][0].device, dtype): (found, index) for (_, dtype), (found, index) in groups.items()}

        patch.setattr(torch, "load", load)
        patch.setattr(torch, "autocast", autocast)
        patch.setattr(torch.nn.functional, "one_hot", one_hot)
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouping)

    def _install_on_cuda(self, patch: pytest.MonkeyPatch) -> None:
        def set_device(device: Any) -> None:
            if isinstance(device, torch.device) and device.index is None:
                raise ValueError(f"expected a torch.device with a specified index or an integer, but got: {device}")

        def set_sync_debug_mode(mode: str) -> None:
            self.forbidden = mode == "error"

        for name, what in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": set_device,
            "synchronize": lambda device=None: None,
            "get_device_name": lambda device=None: "pretended GPU",
            "device": lambda device: contextlib.nullcontext(),
            "set_sync_debug_mode": set_sync_debug_mode,
            "is_current_stream_capturing": lambda: self.recording is not None,
            "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda state, device=None: None,
            "manual_seed_all": lambda seed: None,
            "reset_peak_memory_stats": lambda device=None: None,
            "max_memory_allocated": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "empty_cache": lambda: None,
            "Stream": Stream,
            "Event": Event,
            "current_stream": lambda device=None: Stream(),
            "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": functools.partial(Graph, self),
            "graph": self._capture,
        }.items():
            patch.setattr(torch.cuda, name, what)

    def _install_on_data(self, patch: pytest.MonkeyPatch) -> None:
        loaders = torch.utils.data.dataloader
        real_init, real_iterator = loaders.DataLoader.__init__, loaders.DataLoader._get_iterator
        real_next = loaders._BaseDataLoaderIter.__next__

        def init(loader: Any, *args: Any, pin_memory: bool = False, **kwargs: Any) -> None:
            real_init(loader, *args, **kwargs)
            loader.pretends_to_pin = pin_memory

        def iterator(loader: Any) -> Any:
            made: Any = real_iterator(loader)
            made.pretends_to_pin = loader.pretends_to_pin
            return made

        def following(made: Any) -> Any:
            batch = real_next(made)
            return torch.utils.data._utils.pin_memory.pin_memory(batch) if made.pretends_to_pin else batch

        patch.setattr(loaders.DataLoader, "__init__", init)
        patch.setattr(loaders.DataLoader, "_get_iterator", iterator)
        patch.setattr(loaders._BaseDataLoaderIter, "__next__", following)
        if "torchvision" in sys.modules:
            io = importlib.import_module("torchvision.io")
            real_decode = io.decode_jpeg

            def decode_jpeg(files: Any, *args: Any, device: Any = "cpu", **kwargs: Any) -> Any:
                decoded = real_decode(files, *args, **kwargs)
                return put(decoded, GPU) if torch.device(device).type == "cuda" else decoded

            patch.setattr(io, "decode_jpeg", decode_jpeg)

    @contextlib.contextmanager
    def _capture(self, graph: Graph, **_: Any) -> Iterator[None]:
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None
            graph.end_capture()


class Graph:
    """Operations in the order of their capture, with the tensors they had. Capturing leaves no trace in those."""

    def __init__(self, device: PretendedGpu) -> None:
        self._device = device
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self._known: set[int] = set()  # storages made or saved during the capture

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do an operation and record it."""
        for tensor in self._written(func, args, kwargs):
            self._save(tensor)
        out = func(*args, **kwargs)
        returns = func._schema.returns
        if not is_view(func):
            self._calls.append((func, args, kwargs, out))
        for r, tensor in zip(returns, out if isinstance(out, (tuple, list)) else [out], strict=False):
            if r.alias_info is None:
                self._known |= {part.untyped_storage()._cdata for part in tensors_in(tensor)}
        return out

    def launch(self, kernel: Callable[[], None], tensors: list[Tensor]) -> None:
        """Run a kernel, which may write to any of its tensors, and record it."""
        for tensor in tensors:
            self._save(tensor)
        kernel()
        self._calls.append((kernel, (), {}, ()))

    def end_capture(self) -> None:
        """Give tensors that were there before the values that they had."""
        with torch.utils._python_dispatch._disable_current_modes():
            for whole, values in self._before:
                whole.copy_(values)
        self._before, self._known = [], set()

    def replay(self) -> None:
        """Do the operations again, with the same tensors."""
        with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
            for func, args, kwargs, out in self._calls:
                again = func(*args, **kwargs)
                for old, new in zip(tensors_in(out), tensors_in(again), strict=True):
                    if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        old.copy_(new)

    def _written(self, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        hidden = HIDDEN_WRITES.get(name_of(func), ())
        written = []
        for number, argument in enumerate(func._schema.arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            info = argument.alias_info
            if number in hidden or (info is not None and info.is_write):
                written += tensors_in(value)
        return written

    def _save(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        with torch.utils._python_dispatch._disable_current_modes():
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._before.append((whole, whole.clone()))


class Kernels:
    """A module of Triton kernels that run in the interpreter, as on the device: ``module.name[grid](...)``."""

    def __init__(self, device: PretendedGpu, code: Any) -> None:
        self._device, self._code = device, code

    def __getattr__(self, name: str) -> Any:
        return Launcher(self._device, name, getattr(self._code, name))


class Launcher:
    """One kernel, and with its grid, one launch."""

    def __init__(self, device: PretendedGpu, name: str, kernel: Any) -> None:
        self._device, self._name, self._kernel = device, name, kernel

    def __getitem__(self, grid: Any) -> Launcher:
        return Launcher(self._device, self._name, self._kernel[grid])

    def __call__(self, *args: Any, **options: Any) -> None:
        tensors = tensors_in((args, options))
        if any(lies_on(tensor) == CPU for tensor in tensors):
            raise ValueError(f"pointer argument of {self._name} cannot be accessed from Triton (cpu tensor?)")

        def run() -> None:
            # A GPU does not tell of a division by zero, or of overflow.
            with torch.utils._python_dispatch._disable_current_modes(), np.errstate(all="ignore"):
                self._kernel(*args, **options)

        self._device.launches.append(self._name)
        if self._device.recording is not None:
            self._device.recording.launch(run, tensors)
        else:
            run()


class Stream:
    """Of work that is done as it is asked for."""

    def __init__(self, device: Any = None) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def synchronize(self) -> None: ...


class Event:
    """A moment."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end._at - self._at)


@contextlib.contextmanager
def pretended_gpu(*, own_kernels: bool = False) -> Iterator[PretendedGpu]:
    """Let the device exist for as long as the context, with or without spalign's own kernels, which are slow here."""
    with pytest.MonkeyPatch.context() as patch, PretendedGpu(patch, own_kernels=own_kernels) as device:
        yield device
