"""One optimizer step: batch, forward, loss, alignment, backward, update. On a GPU it can be captured and replayed.

The step reads everything that changes from tensors on the device: which batch it is, the epoch's random numbers, the
learning rate. So its operations are the same every time, and a CUDA graph of one step replays all of them, without
Python between kernels. Figures of the epoch are added up on the device and read at its end.

Shapes: N images of a batch, S steps of an epoch.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .alignment import Alignment
from .baseline import Baseline, Batch
from .batches import Batches, Draws

WARM_UP_STEPS = 3  # ordinary steps of a size before its capture, in which libraries choose their kernels


class TrainingStep:
    """Trains a baseline, with or without strategies, one step at a time.

    Args:
        baseline: what to train.
        batches: on what.
        alignment: the strategies.
        optimizer: of `parameters`; with `capture`, its learning rates are tensors and it reads them on the device.
        parameters: what may be clipped.
        autocast: returns the context of the forward pass.
        scaler: of the loss; disabled with `capture`, because it reads back whether gradients were finite.
        spareg: weight of the loss term.
        accumulate: micro-batches per step.
        clip_norm: largest gradient norm; 0 for no clipping.
        capture: replay the step as a CUDA graph; the smaller batch at an epoch's end is one of its own.
    """

    def __init__(
        self,
        baseline: Baseline,
        batches: Batches,
        alignment: Alignment,
        optimizer: Optimizer,
        parameters: Sequence[Tensor],
        *,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        scaler: torch.amp.GradScaler,
        spareg: float,
        accumulate: int = 1,
        clip_norm: float = 0.0,
        capture: bool = False,
    ) -> None:
        self.baseline, self.batches, self.alignment = baseline, batches, alignment
        self.optimizer, self.parameters = optimizer, parameters
        self.autocast, self.scaler, self.spareg = autocast, scaler, spareg
        self.accumulate, self.clip_norm, self.capture = accumulate, clip_norm, capture
        device = batches.device
        self.number = torch.zeros(1, dtype=torch.int64, device=device)
        self.range_N = torch.arange(batches.batch_size, device=device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.penalty_sum = torch.zeros_like(self.loss_sum)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.predictions = torch.zeros_like(self.correct)
        self.draws: Draws = {}
        self.rates: Sequence[float] = ()
        self.rate_S = torch.empty(0)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by size of the batch
        self.taken: Counter[int] = Counter()
        self.batch, self.loss = self._batch, self._loss

    def compile(self) -> None:
        """Have torch.compile write the kernels of batch, loss and figures, and of the backward pass.

        The smaller batch at an epoch's end gets code of its own, because sizes known in advance make faster kernels.
        Small kernels that do not wait for each other, such as the ends of sums, become one: a step has many, and to
        start one takes longer than its work.
        """
        options: dict[str, Any] = {"combo_kernels": True} if torch.__version__ >= "2.9" else {}  # a trial before
        self.batch = torch.compile(self._batch, dynamic=False, options=options)
        self.loss = torch.compile(self._loss, dynamic=False, options=options)

    def begin_epoch(self, draws: Draws, rates: Sequence[float]) -> None:
        """Set the epoch's random numbers and learning rates, one per step, and forget the figures of the last."""
        rate_S = torch.tensor(rates, dtype=torch.float32, device=self.number.device)
        if not self.draws:
            self.draws, self.rate_S = draws, rate_S
        else:  # in place: a captured step reads them where they are
            for name, value in draws.items():
                self.draws[name].copy_(value)
            self.rate_S.copy_(rate_S)
        self.rates = rates
        for total in (self.number, self.loss_sum, self.penalty_sum, self.correct, self.predictions):
            total.zero_()

    def __call__(self, step: int) -> None:
        """Take the 0-based `step` of the epoch; steps come in order."""
        size = min(self.batches.batch_size, len(self.batches) - step * self.batches.batch_size)
        if not self.capture:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rates[step]
            self._train(size)
        elif self.taken[size] < WARM_UP_STEPS:
            self.taken[size] += 1
            stream, current = torch.cuda.Stream(self.number.device), torch.cuda.current_stream(self.number.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                self._train(size)
            current.wait_stream(stream)
        else:
            if size not in self.graphs:
                self.optimizer.zero_grad(set_to_none=True)
                self.graphs[size] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graphs[size]):  # records without running
                    self._train(size)
            self.graphs[size].replay()

    def _train(self, size: int) -> None:
        scaler, optimizer = self.scaler, self.optimizer
        if self.capture:
            for group in optimizer.param_groups:
                group["lr"].copy_(self.rate_S[self.number].squeeze(0))
        batch = self.batch(size)
        optimizer.zero_grad(set_to_none=True)
        for part in batch.split(self.accumulate):
            scaler.scale(self.loss(part, len(part) / len(batch))).backward()
        if self.clip_norm:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        self.number.add_(1)

    def _batch(self, size: int) -> Batch:
        positions_N = self.number * self.batches.batch_size + self.range_N[:size]
        return self.batches.batch(self.draws, positions_N, self.number)

    def _loss(self, part: Batch, share: float) -> Tensor:
        """Return the micro-batch's share of the loss, and add it to the figures of the epoch."""
        with self.autocast():
            out = self.baseline.step(part)
        loss = out.loss
        penalty = self.alignment.penalty(out.features, out.targets)
        if penalty is not None:
            loss = loss + self.spareg * penalty
            self.penalty_sum.add_(penalty.detach() * len(part))
        self.loss_sum.add_(out.loss.detach() * len(part))
        # Of a mixed label, the class with the larger share counts as the right one.
        targets_N = out.targets if out.targets.ndim == 1 else out.targets.argmax(dim=1)
        self.correct.add_((out.logits.detach().argmax(dim=1) == targets_N).sum())
        self.predictions.add_(len(targets_N))
        return loss * share
