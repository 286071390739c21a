"""The training loop: epochs, evaluation, checkpoints. It knows baselines and strategies only by their interfaces.

Shapes: N images of a batch, C classes.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import spalign

from .alignment import Alignment
from .augment import ImageSet
from .checkpoint import FolderLock, load_checkpoint, save_checkpoint
from .data import MEAN, STD, Images, Labels, find_folder, load_dataset
from .methods import build
from .recipes import Schedule
from .reporting import Figures, Reporter, accuracy_figures, closing_table, group_means, write_result
from .settings import Settings, check_same, choose_algorithms, torch_device
from .step import TrainingStep

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(RuntimeError):
    """Training cannot go on."""


class Trainer:
    """One run of one baseline with any of the strategies.

    Everything random comes from `settings.seed`: initial weights from PyTorch's global generator, order and
    augmentation from one CPU generator. So two runs that differ only in their strategies start from the same weights
    and see the same batches.

    Checkpoint behaviour: `checkpoint.pt` in the output folder is replaced after every epoch that ends
    `settings.checkpoint_seconds` or more after the last time, and at the end of the call. It holds the model, the
    optimizer, the tracker, SpA-SLERP's count, the gradient scaler, both generators, the best epoch and the last record.
    On the CPU a resumed run continues bit for bit, at an equal number of threads.

    Raises:
        ValueError: options, archive or checkpoint do not fit.
        OSError: a file is missing or cannot be written.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        recipe = settings.recipe
        self.device = torch_device(settings.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a CUDA graph is captured on the current device
        choose_algorithms(self.device)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.folder = settings.output_dir
        self.checkpoint_path = self.folder / "checkpoint.pt"
        if not (settings.resume or settings.overwrite) and self.checkpoint_path.exists():
            raise ValueError(f"{self.folder} holds a run: pass --resume, --overwrite, or another --output-dir")

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
        self.baseline, self.batches = build(settings, self.train_set, self.data.counts)
        self.alignment = Alignment(self.baseline.classifier, settings.alignment, epochs=recipe.epochs)
        self.parameters = [parameter for parameter in self.baseline.model.parameters() if parameter.requires_grad]
        capture = settings.capture
        if capture and self.device.type != "cuda":
            raise ValueError(f"--capture records a CUDA graph, which {self.device} has not: leave it out")
        sgd = torch.optim.SGD(
            self.parameters,
            # Read on the device where the step is captured; only the fused optimizer does that.
            lr=torch.tensor(recipe.lr, device=self.device) if capture else recipe.lr,
            momentum=recipe.sgd_momentum,
            weight_decay=recipe.weight_decay,
            fused=True if capture else None,
        )
        self.optimizer = self.alignment.wrap(sgd)
        self.schedule = Schedule(
            recipe.lr, recipe.epochs, recipe.warmup_epochs, recipe.schedule, milestones=recipe.milestones
        )
        self.amp_dtype = AMP_DTYPES[settings.amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.training_step = TrainingStep(
            self.baseline,
            self.batches,
            self.alignment,
            self.optimizer,
            self.parameters,
            autocast=self._autocast,
            scaler=self.scaler,
            spareg=settings.alignment.spareg,
            accumulate=settings.accumulate,
            clip_norm=settings.clip_norm,
            capture=capture,
        )
        if settings.compile and self.device.type == "cuda":
            self.training_step.compile()  # of hundreds of small kernels; a CPU has none to merge
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.outcome = settings.outcome()
        self.epoch = 0  # epochs done
        self.seconds = 0.0
        self.best: dict[str, float] = {}
        self.record: dict[str, Any] = {}

        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FolderLock(self.folder)
        self.environment = environment(self.device)  # now: the files may change while the run is under way
        note = self._resume() if settings.resume and self.checkpoint_path.exists() else self._start_fresh()
        self.reporter = Reporter(
            self.folder,
            epochs=recipe.epochs,
            start_epoch=self.epoch,
            tensorboard=settings.tensorboard,
            quiet=settings.quiet,
        )
        self.reporter.note(note)

    # --- building -----------------------------------------------------------------------------------------------------

    def _image_set(self, images: Images, labels: Labels, padding: int | None = None) -> ImageSet:
        return ImageSet(
            torch.from_numpy(images), torch.from_numpy(labels), device=self.device, mean=MEAN, std=STD, padding=padding
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any] | None:
        """Train to the last epoch and return the result, which is also in `result.json`; None when stopped early.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        epochs = self.settings.recipe.epochs
        stop = epochs if self.settings.stop_after_epochs is None else self.epoch + self.settings.stop_after_epochs
        saved = time.monotonic()
        try:
            while self.epoch < min(stop, epochs):
                self._run_epoch()
                now = time.monotonic()
                # An epoch on a GPU may take less than writing to the disk.
                if now - saved >= self.settings.checkpoint_seconds or self.epoch >= min(stop, epochs):
                    save_checkpoint(self.checkpoint_path, self._state())
                    saved = now
        finally:
            self.reporter.close()
            self.lock.release()
        if self.epoch < epochs:
            self.reporter.note(f"stopped after epoch {self.epoch} of {epochs}; continue with --resume")
            return None
        result = self._result()
        write_result(self.folder / "result.json", result)
        self.reporter.note(summary(result))
        return result

    def _run_epoch(self) -> None:
        start = time.perf_counter()
        record: dict[str, Any] = {"epoch": self.epoch + 1, **self._train_epoch()}
        self.alignment.end_epoch()
        self.baseline.end_epoch()
        correct_C, count_C = self._evaluate(self.eval_set)
        record["accuracy"] = accuracy_figures(correct_C, count_C, self.data.groups)
        record["alignment"] = self._alignment_figures()
        record["alpha"] = self.alignment.alpha
        self.epoch += 1
        if record["accuracy"]["balanced"] > self.best.get("balanced", -1.0):
            self.best = {name: record["accuracy"][name] for name in ("all", "balanced")} | {"epoch": self.epoch}
        if self.epoch == self.settings.recipe.epochs:
            record |= self._closing_figures()
        record["seconds"] = time.perf_counter() - start
        self.seconds += record["seconds"]
        self.record = record
        self.reporter.epoch(record)

    def _train_epoch(self) -> dict[str, float | None]:
        baseline, training, steps = self.baseline, self.training_step, self.batches.steps_per_epoch
        baseline.begin_epoch(self.epoch)
        rates = [self.schedule(self.epoch, step, steps) for step in range(steps)]
        training.begin_epoch(self.batches.draw(self.generator), rates)
        for step in self.reporter.steps(range(steps), self.epoch):
            training(step)
        images = len(self.batches)
        loss_mean, penalty_mean = float(training.loss_sum) / images, float(training.penalty_sum) / images
        largest_weight = float(torch.nn.utils.get_total_norm(self.parameters, math.inf))
        if not np.isfinite(loss_mean + penalty_mean + largest_weight):
            raise TrainingError(
                f"the loss or a weight is no longer finite in epoch {self.epoch + 1} (mean loss {loss_mean}, SpA-Reg "
                f"{penalty_mean}): lower --lr, lengthen --warmup-epochs or set --clip-norm; the last checkpoint "
                "is kept"
            )
        return {
            "lr": rates[-1],
            "loss": loss_mean,
            "spareg": penalty_mean if self.alignment.spareg is not None else None,
            "train_accuracy": round(100 * int(training.correct) / int(training.predictions), 6),
        }

    @torch.no_grad()
    def _evaluate(self, images: ImageSet, tracker: spalign.ClassMeanTracker | None = None) -> tuple[Tensor, Tensor]:
        """Count correct predictions (C,) and images (C,) by class, in evaluation mode, without augmentation.

        In full precision: half-precision logits tie, and the tie goes to the lower index, the larger class.

        Args:
            images: what to predict.
            tracker: also feed these class means.
        """
        model = self.baseline.model
        model.eval()
        correct_C = torch.zeros(self.data.num_classes, dtype=torch.int64, device=self.device)
        # Small enough for a CPU's cache, large enough to keep a GPU busy.
        batch_size = 500 if self.device.type == "cpu" else 2500
        for index_N in torch.arange(len(images), device=self.device).split(batch_size):
            logits_NC, features_ND = self.baseline.predict(images.plain(index_N))
            labels_N = images.labels_N[index_N]
            correct_C.index_add_(0, labels_N, (logits_NC.argmax(dim=1) == labels_N).to(torch.int64))
            if tracker is not None:
                tracker.update(features_ND, labels_N)
        return correct_C, torch.bincount(images.labels_N, minlength=self.data.num_classes)

    def _alignment_figures(self, tracker: spalign.ClassMeanTracker | None = None) -> Figures:
        cosine_C, defined_C = self.alignment.cosines(tracker)
        return group_means(cosine_C, defined_C, self.data.groups)

    def _closing_figures(self) -> dict[str, Any]:
        """Training accuracy and exact alignment: one pass over the training set in evaluation mode."""
        exact = spalign.ClassMeanTracker.for_classifier(self.baseline.classifier, momentum=None)
        correct_C, count_C = self._evaluate(self.train_set, exact)
        return {
            "clean_train_accuracy": round(100 * float(correct_C.sum()) / float(count_C.sum()), 6),
            "alignment_exact": self._alignment_figures(exact),
        }

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "options": self.outcome,
            "fingerprint": self.data.fingerprint,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "best": self.best,
            "record": self.record,
            "model": self.baseline.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "alignment": self.alignment.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state(),
            "torch_generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def _start_fresh(self) -> str:
        """Remove what another run left, or else a run killed in its first epoch would resume from that one's state."""
        for path in (self.checkpoint_path, self.folder / "result.json", *self.folder.glob("tensorboard/events.out.*")):
            path.unlink(missing_ok=True)
        return (
            f"no checkpoint in {self.folder}: starting fresh" if self.settings.resume else f"writing to {self.folder}"
        )

    def _resume(self) -> str:
        settings, state = self.settings, load_checkpoint(self.checkpoint_path, self.device)
        # Checkpoints of before an option existed were made with its default.
        defaults = Settings(settings.recipe_name, settings.recipe, settings.data_dir, settings.output_dir).outcome()
        check_same(self.outcome, {**defaults, **state["options"]})
        if state["fingerprint"] != self.data.fingerprint:
            raise ValueError(
                f"the training images differ from those of {self.checkpoint_path}: set --data-dir to the same archive"
            )
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        self.best, self.record = state["best"], state["record"]
        self.baseline.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.alignment.load_state_dict(state["alignment"])
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["torch_generator"].cpu())
        if state["cuda_generator"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_generator"].cpu(), self.device)
        return f"resuming after epoch {self.epoch} of {self.settings.recipe.epochs}"

    def _result(self) -> dict[str, Any]:
        settings, record = self.settings, self.record
        return {
            "dataset": settings.dataset,
            "imbalance": settings.imbalance,
            "method": self.baseline.name,
            "strategies": settings.alignment.names,
            "seed": settings.seed,
            "epochs": settings.recipe.epochs,
            "evaluated_on": "validation" if settings.validation else "test",
            "accuracy_last": record["accuracy"],
            "accuracy_best": self.best,
            "train_accuracy": record["clean_train_accuracy"],
            "train_accuracy_augmented": record["train_accuracy"],
            "alignment": record["alignment"],
            "alignment_exact": record["alignment_exact"],
            "seconds": round(self.seconds, 3),
            "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "options": self.outcome,
            "counts": list(self.data.counts),
            "data_fingerprint": self.data.fingerprint,
            "environment": self.environment,
        }


def summary(result: dict[str, Any]) -> str:
    """Format a result: the last epoch first, the best epoch only beside it."""
    name, best = " + ".join([result["method"], *result["strategies"]]), result["accuracy_best"]
    table = closing_table(
        f"{result['dataset']}, imbalance {result['imbalance']:g}, {name}, seed {result['seed']}, "
        f"{result['epochs']} epochs, {result['seconds']:.0f} s",
        [
            (f"{result['evaluated_on']} accuracy, last epoch", result["accuracy_last"], ".2f"),
            ("alignment, running means", result["alignment"], ".4f"),
            ("alignment, exact means", result["alignment_exact"], ".4f"),
        ],
        f"best {best['balanced']:.2f}, epoch {best['epoch']}",
    )
    return f"{table}\ntraining accuracy, no augmentation: {result['train_accuracy']:.2f}"


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, the device's name and the git commit, which is None outside a repository."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "spalign": spalign.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": name,
        "threads": torch.get_num_threads(),
        "commit": git_commit(),
    }


def git_commit() -> str | None:
    """Return the commit of this repository, with `-dirty` when library or examples differ; None without git.

    A grid writes its records into the repository: those do not count.
    """
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(root), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    head = git("rev-parse", "HEAD")
    if head is None:
        return None
    return head + "-dirty" if git("status", "--porcelain", "--", "spalign", "examples") else head
