"""A training step as a CUDA graph, which replays its operations without Python between kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch.optim import Optimizer

WARM_UP_STEPS = 3  # ordinary steps of a size before its capture, in which libraries choose their kernels


class CapturedStep:
    """Takes ordinary steps first, and then replays the graph of one; every size of a batch has its own.

    Args:
        take: takes a step on so many images. Its operations are the same every time: whatever changes between steps
            it reads from tensors on the device, which stay where they are.
        optimizer: whose gradients the step computes; it reads its learning rates on the device.
        device: a CUDA device.
    """

    def __init__(self, take: Callable[[int], None], optimizer: Optimizer, device: torch.device) -> None:
        self.take, self.optimizer, self.device = take, optimizer, device
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by size of the batch
        self.taken: Counter[int] = Counter()

    def __call__(self, size: int) -> None:
        """Take a step on so many images."""
        if self.taken[size] < WARM_UP_STEPS:
            self.taken[size] += 1
            stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                self.take(size)
            current.wait_stream(stream)
            return
        if size not in self.graphs:
            self.optimizer.zero_grad(set_to_none=True)
            self.graphs[size] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[size]):  # records without running
                self.take(size)
        self.graphs[size].replay()
