"""Training on CIFAR: images and random numbers on the device, steps that can be captured, one file as checkpoint.

Shapes: N images of a batch, S steps of an epoch, C classes, D feature dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import spalign

from .augment import ImageSet
from .baseline import Batch
from .batches import Draws
from .capture import CapturedStep
from .checkpoint import load_checkpoint, save_checkpoint
from .data import MEAN, STD, Images, Labels, find_folder, load_dataset
from .methods import build
from .parallel import World
from .reporting import Figures, closing_table
from .settings import Settings, check_same, torch_device
from .training import Run

# Small enough for a CPU's cache, large enough to keep a GPU busy.
EVAL_BATCH = {"cpu": 500, "cuda": 2500}


class Trainer(Run):
    """One run of one baseline with any of the strategies.

    Everything random comes from `settings.seed`: initial weights from PyTorch's global generator, order and
    augmentation from one CPU generator. So two runs that differ only in their strategies start from the same weights
    and see the same batches.

    Checkpoint behaviour: `checkpoint.pt` in the output folder is replaced after every epoch that ends
    `settings.checkpoint_seconds` or more after the last time, and at the end of the call. It holds the model, the
    optimizer, the tracker, SpA-SLERP's count, the gradient scaler, both generators, the best epoch and the last record.
    On the CPU a resumed run continues bit for bit, at an equal number of threads. Device, `compile` and `capture` may
    change from call to call; the run is then the same but for rounding.

    Raises:
        ValueError: options, archive or checkpoint do not fit.
        OSError: a file is missing or cannot be written.
    """

    settings: Settings
    written = ("checkpoint.pt", "result.json")
    sum_dtype = torch.float32  # that of a loss: no conversion in the captured step

    def __init__(self, settings: Settings) -> None:
        device, recipe, capture = torch_device(settings.device), settings.recipe, settings.capture
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a CUDA graph is captured on the current device
        elif capture:
            raise ValueError(f"--capture records a CUDA graph, which {device} has not: leave it out")
        super().__init__(settings, World(0, 1, device, grouped=False))
        self.data = load_dataset(
            settings.dataset,
            find_folder(settings.dataset, settings.data_dir),
            imbalance=settings.imbalance,
            subset_seed=settings.subset_seed,
            replacement=settings.subset_replacement,
            hold_out=settings.validation,
            resolution=recipe.resolution,
        )
        self.train_set = self._image_set(self.data.train_images, self.data.train_labels)
        self.eval_set = self._image_set(self.data.eval_images, self.data.eval_labels, padding=0)
        torch.manual_seed(settings.seed)
        baseline, self.batches = build(settings, self.train_set, self.data.counts)
        # Read on the device where the step is captured; only the fused optimizer does that.
        lr = torch.tensor(recipe.lr, device=device) if capture else recipe.lr
        self.sgd: dict[str, Any] = {"lr": lr, "fused": capture or None}
        self._set_up(
            baseline,
            self.data.counts,
            self.data.groups,
            self.batches.steps_per_epoch,
            milestones=recipe.milestones,
            **self.sgd,
        )
        self.make_batch, self.share_of_loss, self.predict = self._make_batch, self._share_of_loss, baseline.predict
        if settings.compile and device.type == "cuda":
            self.compile()  # of hundreds of small kernels; a CPU has none to merge
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.number = torch.zeros(1, dtype=torch.int64, device=device)  # of the step, for its operations to read
        self.range_N = torch.arange(recipe.batch_size, device=device)
        self.rates: Sequence[float] = ()
        self.rate_S = torch.empty(0)
        self.draws: Draws = {}
        self.captured = CapturedStep(self._take_step, self.optimizer, device) if capture else None
        self._open()

    def _image_set(self, images: Images, labels: Labels, padding: int | None = None) -> ImageSet:
        return ImageSet(
            torch.from_numpy(images), torch.from_numpy(labels), device=self.device, mean=MEAN, std=STD, padding=padding
        )

    def compile(self) -> None:
        """Have torch.compile write the kernels of batch, loss and figures, of the backward pass, and of evaluation.

        The smaller batch at an epoch's end gets code of its own, because sizes known in advance make faster kernels.
        Small kernels that do not wait for each other, such as the ends of sums, become one: a step has many, and to
        start one takes longer than its work.
        """
        options: dict[str, Any] = {"combo_kernels": True} if torch.__version__ >= "2.9" else {}  # a trial before
        self.make_batch = torch.compile(self._make_batch, dynamic=False, options=options)
        self.share_of_loss = torch.compile(self._share_of_loss, dynamic=False, options=options)
        self.predict = torch.compile(self.baseline.predict, dynamic=False, options=options)

    # --- training -----------------------------------------------------------------------------------------------------

    def _train_until(self, end: int) -> None:
        saved = time.monotonic()
        while self.epoch < end:
            self._run_epoch()
            now = time.monotonic()
            # An epoch on a GPU may take less than writing to the disk.
            if now - saved >= self.settings.checkpoint_seconds or self.epoch == end:
                save_checkpoint(self.folder / "checkpoint.pt", self._state())
                saved = now

    def _run_epoch(self) -> None:
        began, steps = time.perf_counter(), self.steps_per_epoch
        self._begin_epoch([self.schedule(self.epoch, step, steps) for step in range(steps)])
        for step in self._steps():
            self._train_step(step)
        self._end_epoch(self._training_figures(), began)

    def _begin_epoch(self, rates: Sequence[float]) -> None:
        """Draw the epoch's random numbers, and put them and its learning rates, one per step, on the device."""
        self.baseline.begin_epoch(self.epoch)
        draws, self.rates = self.batches.draw(self.generator), rates
        rate_S = torch.tensor(rates, dtype=torch.float32, device=self.device)
        if not self.draws:
            self.draws, self.rate_S = draws, rate_S
        else:  # in place: a captured step reads them where they are
            for name, value in draws.items():
                self.draws[name].copy_(value)
            self.rate_S.copy_(rate_S)
        self.number.zero_()

    def _train_step(self, step: int) -> None:
        """Take the 0-based `step` of the epoch; steps come in order."""
        size = min(self.batches.batch_size, len(self.batches) - step * self.batches.batch_size)
        if self.captured is not None:
            self.captured(size)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[step]
        self._take_step(size)

    def _take_step(self, size: int) -> None:
        """Take the next step, on so many images.

        All that changes from step to step is read on the device, so that a graph of one step replays to any other.
        """
        if self.captured is not None:
            for group in self.optimizer.param_groups:
                group["lr"].copy_(self.rate_S[self.number].squeeze(0))
        batch = self.make_batch(size)
        self.optimizer.zero_grad(set_to_none=True)
        for part in batch.split(self.settings.accumulate):
            self.scaler.scale(self.share_of_loss(part, len(part) / len(batch))).backward()
        self._update()
        self.number.add_(1)

    def _make_batch(self, size: int) -> Batch:
        positions_N = self.number * self.batches.batch_size + self.range_N[:size]
        return self.batches.batch(self.draws, positions_N, self.number)

    def _share_of_loss(self, part: Batch, share: float) -> Tensor:
        """Return what a micro-batch adds to the loss, and add up its figures."""
        with self._autocast():
            out = self.baseline.step(part)
        penalty = self._measure(out, len(part))
        loss = out.loss if penalty is None else out.loss + self.settings.alignment.spareg * penalty
        return loss * share

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, Any]:
        """Return accuracies; after the last epoch also what the training set says exactly, and other readouts."""
        figures: dict[str, Any] = {"accuracy": self._accuracy(self._predictions(self.eval_set))}
        if self._last_epoch:
            exact = spalign.ClassMeanTracker.for_classifier(self.baseline.classifier, momentum=None)
            collapse = spalign.metrics.NeuralCollapse(self.baseline.classifier, covariance=True)
            accuracy = self._accuracy(self._predictions(self.train_set), exact.update, collapse.update)
            figures["clean_train_accuracy"] = accuracy["all"]
            figures["alignment_exact"] = self._alignment_figures(exact)
            figures["neural_collapse"] = {name: float(value) for name, value in collapse.compute().items()}
            figures["readouts"] = self._readouts(exact.mean)
        return figures

    @torch.no_grad()
    def _readouts(self, mean_CD: Tensor) -> dict[str, Figures]:
        """Return the accuracies of nearest class means (C, D) and of heads that do not predict.

        They tell whether it is features or classifier that a method, or a strategy, has improved.
        """
        kept = [(features_ND, labels_N) for _, features_ND, labels_N in self._predictions(self.eval_set)]

        def near(features_ND: Tensor) -> Tensor:  # half of what the squared distance lacks to the feature's own length
            return F.linear(features_ND, mean_CD, -0.5 * mean_CD.square().sum(1))

        readers: dict[str, Callable[[Tensor], Tensor]] = {"nearest class mean": near, **self.baseline.other_heads()}
        return {name: self._accuracy((read(h_ND), h_ND, y_N) for h_ND, y_N in kept) for name, read in readers.items()}

    def _predictions(self, images: ImageSet) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield logits (N, C), features (N, D) and labels (N,) of images without augmentation."""
        batch_size = EVAL_BATCH.get(self.device.type, EVAL_BATCH["cuda"])
        for index_N in torch.arange(len(images), device=self.device).split(batch_size):
            # One smaller batch is not worth compiling for.
            predict = self.predict if len(index_N) == batch_size else self.baseline.predict
            yield *predict(images.plain(index_N)), images.labels_N[index_N]

    # --- checkpoints and result ---------------------------------------------------------------------------------------

    def _newest_checkpoint(self) -> Path | None:
        path = self.folder / "checkpoint.pt"
        return path if path.exists() else None

    def _state(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            **super()._state(),
            "fingerprint": self.data.fingerprint,
            "model": self.baseline.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "torch_generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def _resume(self, path: Path) -> str:
        settings, state = self.settings, load_checkpoint(path, self.device)
        # Checkpoints of before an option existed were made with its default.
        defaults = Settings(settings.recipe_name, settings.recipe, settings.data_dir, settings.output_dir).outcome()
        check_same(self.outcome, {**defaults, **state["options"]})
        if state["fingerprint"] != self.data.fingerprint:
            raise ValueError(f"the training images differ from those of {path}: set --data-dir to the same archive")
        self._load_state(state)
        self.baseline.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group.update(self.sgd)
        self.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["torch_generator"].cpu())
        if state["cuda_generator"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_generator"].cpu(), self.device)
        return f"resuming after epoch {self.epoch} of {settings.recipe.epochs}"

    def _result(self) -> dict[str, Any]:
        return {
            "dataset": self.settings.dataset,
            "imbalance": self.settings.imbalance,
            "evaluated_on": "validation" if self.settings.validation else "test",
            **super()._result(),
            "train_accuracy": self.record["clean_train_accuracy"],
            "alignment_exact": self.record["alignment_exact"],
            "neural_collapse": self.record["neural_collapse"],
            "readouts": self.record["readouts"],
            "data_fingerprint": self.data.fingerprint,
        }

    def _summary(self, result: dict[str, Any]) -> str:
        on = result["evaluated_on"]
        rows = [(f"{on}, by {name}", figures, ".2f") for name, figures in result["readouts"].items()]
        rows.append(("alignment, exact means", result["alignment_exact"], ".4f"))
        table = closing_table(result, f"imbalance {result['imbalance']:g}", rows)
        return f"{table}\ntraining accuracy, no augmentation: {result['train_accuracy']:.2f}"
