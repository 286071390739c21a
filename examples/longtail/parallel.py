"""Several ranks: who they are, how a model is spread over them, and how they agree to stop.

A rank is one process of `torchrun`; without it there is one.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .baseline import Baseline, Batch, Step
from .settings import torch_device


class SharedError(ValueError):
    """What is wrong on all ranks, or what all have been told of: the first one says it."""


@dataclass(frozen=True)
class World:
    """The ranks of a run.

    Attributes:
        rank, size: this process among all.
        device: this process's own.
        grouped: whether there is a process group.
        restarted: whether torchrun has started any rank anew, after a failure.
        launch: tells one call of torchrun from every other, and is the same after a restart.
    """

    rank: int
    size: int
    device: torch.device
    grouped: bool
    restarted: bool = False
    launch: str = ""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all ranks, in place."""
        if self.grouped:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.grouped:
            dist.barrier()

    def from_first(self, value: Any) -> Any:
        """Return the first rank's value on all."""
        if not self.grouped:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def raise_together(self, error: Exception | None) -> None:
        """Raise an error of any rank on all of them, so that none waits for one that is gone.

        Raises:
            SharedError: with the message of the first rank to have one; of a rank alone, its error itself.
        """
        if not self.grouped:
            if error is not None:
                raise error
            return
        errors: list[Exception | None] = [None] * self.size
        dist.all_gather_object(errors, error)
        for error in errors:
            if error is not None:
                raise SharedError(str(error)) from error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise on all ranks what any of them raises inside, where none may wait for another.

        Raises:
            SharedError, ValueError, OSError: as `raise_together` does.
        """
        error: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as caught:
            error = caught
        self.raise_together(error)

    def leave(self, code: int) -> None:
        """End this process now if it is one of a group.

        An orderly end of the group would wait for collectives that others are in, and they for this one, without end.
        torchrun ends them as soon as this process is gone.
        """
        if self.grouped:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def meet(store: Any, rank: int, size: int) -> str:
    """Return a name that all ranks of this start get, and no start before or after.

    torchrun offers the store of the first start to every later one, with addresses of processes that are gone. Which
    start it is, it does not say: its count of restarts goes up only on the machine whose worker failed.

    Raises:
        RuntimeError: not all ranks came in the store's time.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"newcomer-{rank}", own)
        name: str = store.get(f"answer-to-{own}").decode()  # waits
        store.add(f"{name}-met", 1)
        return name
    answered: set[str] = set()
    until = time.monotonic() + store.timeout.total_seconds()
    while store.add(f"{own}-met", 0) < size - 1:
        for key in (f"newcomer-{other}" for other in range(1, size)):
            # What an earlier start has left here is answered too, and nobody listens.
            if store.check([key]) and (newcomer := store.get(key).decode()) not in answered:
                store.set(f"answer-to-{newcomer}", own)
                answered.add(newcomer)
        if time.monotonic() > until:
            raise RuntimeError(f"of {size} ranks, {store.add(f'{own}-met', 0) + 1} came within {store.timeout}")
        time.sleep(0.02)
    return own


def _launch() -> str:
    """Return what tells the process that started this one from all others: torchrun's own, which outlives its restarts.

    Its run id does not: `--rdzv-id` may be the same for every run.
    """
    agent, boot, began = os.getppid(), "", ""
    with contextlib.suppress(OSError):  # where there is no /proc, the number has to do
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        began = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]  # clock ticks after the boot
    return " ".join((os.environ.get("TORCHELASTIC_RUN_ID", ""), boot, str(agent), began))


@contextlib.contextmanager
def world(device: str) -> Iterator[World]:
    """Join the ranks that torchrun has started, or be the only one.

    What is raised inside ends a process of a group at once, with exit code 1: see `World.leave`.

    Args:
        device: `auto`, `cpu`, or `cuda` for the GPU of this process's number on its machine.

    Raises:
        ValueError: there is no such device.
        RuntimeError: not all ranks came.
    """
    if "RANK" not in os.environ:
        chosen = torch_device(device)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        yield World(0, 1, chosen, grouped=False)
        return
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    chosen = torch_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    from torch.distributed.rendezvous import rendezvous  # not in every build of PyTorch, and one process needs none

    store, rank, size = next(iter(rendezvous("env://")))
    store = dist.PrefixStore(meet(store, rank, size), store)  # type: ignore[attr-defined]
    # Objects and the agreement to stop travel by gloo, so that no GPU has to be waited for.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    ranks = World(rank, size, chosen, grouped=True)
    try:
        restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
        dist.all_reduce(restarts, op=dist.ReduceOp.MAX)
        yield replace(ranks, restarted=int(restarts) > 0, launch=ranks.from_first(_launch()))
    except BaseException:
        traceback.print_exc()
        ranks.leave(1)
    dist.destroy_process_group()


class StepModule(nn.Module):
    """A baseline's step as the forward pass of a module, which is where DDP and FSDP2 do their part."""

    def __init__(self, baseline: Baseline) -> None:
        super().__init__()
        self.model = baseline.model
        self.baseline = baseline  # no module: it registers nothing

    def forward(
        self,
        images: Tensor,
        targets: Tensor | None = None,
        second: tuple[Tensor, Tensor] | None = None,
        counts: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return loss, logits, features and targets of `Baseline.step`; without targets logits and features."""
        if targets is None:
            return self.baseline.predict(images)
        step = self.baseline.step(Batch(images, targets, None if second is None else Batch(*second), counts))
        # FSDP2 warns of views, which torchvision's flattened features are.
        features = step.features.clone() if step.features._is_view() else step.features
        return step.loss, step.logits, features, step.targets


class Spread:
    """A baseline's model over all ranks.

    Args:
        world: the ranks.
        baseline: its model is on the rank's device; replaced in place where it is sharded.
        blocks: parts of the model that FSDP2 gathers one after the other.
        fsdp: shard parameters, gradients and optimizer state; otherwise every rank has all of them.
    """

    def __init__(self, world: World, baseline: Baseline, blocks: list[nn.Module], *, fsdp: bool) -> None:
        self.module = StepModule(baseline)
        self.sharded = fsdp
        self._wrapped: nn.Module = self.module
        if fsdp:
            from torch.distributed.fsdp import fully_shard

            for block in (*blocks, self.module):
                fully_shard(block)
        elif world.grouped:
            # Buffers are shared where they are read: all that differs is running statistics.
            takes = inspect.signature(DistributedDataParallel.__init__).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in takes else "broadcast_buffers"
            self._wrapped = DistributedDataParallel(self.module, **{name: False})  # type: ignore[arg-type]

    def step(self, batch: Batch, *, last: bool) -> Step:
        """Run the step of a micro-batch; `last` of an optimizer step, after which gradients are exchanged."""
        second = None if batch.second is None else (batch.second.images, batch.second.targets)
        if self.sharded:
            self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return Step(*self._wrapped(batch.images, batch.targets, second, batch.counts))

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context of a micro-batch's forward and backward pass."""
        if isinstance(self._wrapped, DistributedDataParallel) and not last:
            context: contextlib.AbstractContextManager[None] = self._wrapped.no_sync()
            return context
        return contextlib.nullcontext()

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return test-time logits and features; where sharded, all ranks have to call equally often."""
        logits_NC, features_ND = self.module(images)
        return logits_NC, features_ND

    def share_buffers(self) -> None:
        """Give every rank the first one's buffers: running statistics, of which each has its own."""
        if dist.is_initialized():
            for buffer in self.module.buffers():
                dist.broadcast(buffer, src=0)


class Stop:
    """Whether any rank was told to stop (SIGTERM), known to all of them at the same step, without waiting.

    An answer is that to the question before: it has had a step's time to travel.
    """

    def __init__(self, world: World) -> None:
        self.asked = False
        self._group = dist.new_group(backend="gloo") if world.grouped else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None

    def __enter__(self) -> Stop:
        self._before: Callable[[int, FrameType | None], Any] | int | None = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def agreed(self) -> bool:
        """Return whether all ranks stop now; to be called by all of them after every step."""
        if self._group is None:
            return self.asked
        answer = False
        if self._work is not None:
            self._work.wait()
            self._work, answer = None, bool(self._flag.item())
        if answer:
            return True
        self._flag.fill_(int(self.asked))
        self._work = dist.all_reduce(self._flag, group=self._group, async_op=True)
        return False

    def settle(self) -> bool:
        """Return whether any rank has been told to stop by now; to be called by all of them, and waits for them."""
        if self._group is None:
            return self.asked
        if self._work is not None:  # its answer is in what is asked now: nobody forgets
            self._work.wait()
            self._work = None
        self._flag.fill_(int(self.asked))
        dist.all_reduce(self._flag, group=self._group)
        return bool(self._flag.item())
