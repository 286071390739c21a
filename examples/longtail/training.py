"""What the training scripts share: what a run consists of, its figures, and its bookkeeping around the epochs.

The engines, `engine.py` for CIFAR and `imagenet/engine.py`, add where images come from, how a step runs, and where
network and optimizer are kept.

Shapes: N images of a batch or micro-batch, C classes, D feature dimensions.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import platform
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import spalign
from spalign import kernels

from .alignment import Alignment
from .baseline import Baseline, Step
from .checkpoint import FolderLock
from .parallel import SharedError, World
from .recipes import Schedule
from .reporting import Figures, Groups, Reporter, accuracy_figures, group_means, write_result
from .settings import choose_algorithms

if TYPE_CHECKING:
    from .imagenet.settings import ImageNetSettings
    from .settings import Settings

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LAUNCH = ".launch"  # in a run's folder: which launch of torchrun has begun it or gone on with it


class TrainingError(RuntimeError):
    """Training cannot go on."""


class Run(ABC):
    """One run of one baseline with any of the strategies, on one rank of possibly many.

    An engine's constructor calls this one, loads data and builds a baseline, calls `_set_up`, and at its end `_open`.
    A step calls `_measure` for every micro-batch and then `_update`; an epoch ends with `_training_figures` and
    `_end_epoch`.

    Attributes:
        written: names in the output folder that a run goes on from, or that say it is finished.
        sum_dtype: in which a mean over a micro-batch is multiplied by its images.
    """

    written: ClassVar[tuple[str, ...]]
    sum_dtype: ClassVar[torch.dtype] = torch.float64

    def __init__(self, settings: Settings | ImageNetSettings, world: World, *, deterministic: bool = False) -> None:
        self.settings, self.world, self.device = settings, world, world.device
        with world.together():
            choose_algorithms(self.device, deterministic=deterministic)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.folder = settings.output_dir
        self.resumes = settings.resume or (world.restarted and self._is_ours())
        if self._newest_checkpoint() is not None and not (self.resumes or settings.overwrite):
            raise SharedError(f"{self.folder} holds a run: pass --resume, --overwrite, or another --output-dir")
        self.outcome = settings.outcome()
        self.amp_dtype = AMP_DTYPES[settings.amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        # Of the epoch, over this rank's images: loss, penalty, correct predictions, predictions, images.
        self.totals = torch.zeros(5, dtype=torch.float64, device=self.device)
        self.epoch, self.step = 0, 0  # epochs done, steps done of the next
        self.seconds = 0.0
        self.best: dict[str, float] = {}
        self.record: dict[str, Any] = {}
        self.lock: FolderLock | None = None
        self.reporter: Reporter | None = None

    # --- building -----------------------------------------------------------------------------------------------------

    def _set_up(
        self,
        baseline: Baseline,
        counts: Sequence[int],
        groups: Groups,
        steps_per_epoch: int,
        *,
        batch_size: int | None = None,
        milestones: tuple[tuple[int, float], ...] = (),
        **sgd: Any,
    ) -> None:
        """Set up strategies, optimizer and schedule.

        Args:
            baseline: what to train, where and how it is trained.
            counts: training images per class.
            groups: classes by shot group.
            steps_per_epoch: of the schedule.
            batch_size: see `Alignment`.
            milestones: see `Schedule`.
            sgd: options of the optimizer, instead of the recipe's or beside them.
        """
        settings, recipe = self.settings, self.settings.recipe
        self.baseline, self.counts, self.groups, self.steps_per_epoch = baseline, counts, groups, steps_per_epoch
        self.parameters = [parameter for parameter in baseline.model.parameters() if parameter.requires_grad]
        self.alignment = Alignment(baseline.classifier, settings.alignment, epochs=recipe.epochs, batch_size=batch_size)
        options = {"lr": recipe.lr, "momentum": recipe.sgd_momentum, "weight_decay": recipe.weight_decay, **sgd}
        self.optimizer = self.alignment.wrap(torch.optim.SGD(self.parameters, **options))
        self.schedule = Schedule(recipe.lr, recipe.epochs, recipe.warmup_epochs, recipe.schedule, milestones=milestones)

    def _open(self) -> None:
        """Take the run's folder, and go on from its newest checkpoint or start afresh."""
        settings = self.settings
        with self.world.together():
            if self.world.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = FolderLock(self.folder)
        self.environment = environment(self.device)  # now: the files may change while the run is under way
        newest = self._newest_checkpoint() if self.resumes else None
        note = self._start_fresh() if newest is None else self._resume(newest)
        if self.world.first:
            if self.world.launch:
                (self.folder / LAUNCH).write_text(self.world.launch)
            self.reporter = Reporter(
                self.folder,
                epochs=settings.recipe.epochs,
                start_epoch=self.epoch,
                tensorboard=settings.tensorboard,
                quiet=settings.quiet,
            )
        self._note(note)

    def _note(self, text: str) -> None:
        if self.reporter is not None:
            self.reporter.note(text)

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any] | None:
        """Train to the last epoch and return the result, which is also in `result.json`; None when stopped early.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        epochs, more = self.settings.recipe.epochs, self.settings.stop_after_epochs
        try:
            self._train_until(epochs if more is None else min(self.epoch + more, epochs))
        finally:
            if self.reporter is not None:
                self.reporter.close()
            if self.lock is not None:
                self.lock.release()
        if self.epoch < epochs:
            place = f"step {self.step} of epoch {self.epoch + 1}" if self.step else f"epoch {self.epoch}"
            self._note(f"stopped after {place} of {epochs}; continue with --resume")
            return None
        result = self._result()
        if self.world.first:
            write_result(self.folder / "result.json", result)
            self._note(self._summary(result))
        return result

    @abstractmethod
    def _train_until(self, end: int) -> None:
        """Train until so many epochs are done, or until told to stop, and write checkpoints."""

    def _steps(self) -> tqdm[int]:
        """Return the remaining steps of the epoch behind a progress bar."""
        steps = range(self.step, self.steps_per_epoch)
        return tqdm(steps, disable=True) if self.reporter is None else self.reporter.steps(steps, self.epoch)

    # --- a step -------------------------------------------------------------------------------------------------------

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def _measure(self, out: Step, images: int) -> Tensor | None:
        """Feed the class means a micro-batch, add up its figures, and return SpA-Reg's value as `Alignment` does."""
        penalty = self.alignment.penalty(out.features, out.targets)
        loss_sum, penalty_sum, correct, predictions, seen = self.totals.unbind()
        loss_sum.add_(out.loss.detach().to(self.sum_dtype) * images)
        if penalty is not None:
            penalty_sum.add_(penalty.detach().to(self.sum_dtype) * images)
        # Of a mixed label, the class with the larger share counts as the right one.
        targets_N = out.targets if out.targets.ndim == 1 else out.targets.argmax(dim=1)
        correct.add_((out.logits.detach().argmax(dim=1) == targets_N).sum())
        predictions.add_(len(targets_N))
        seen.add_(images)
        return penalty

    def _update(self) -> None:
        """Clip the accumulated gradients and let the optimizer step."""
        if self.settings.clip_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    # --- an epoch's end -----------------------------------------------------------------------------------------------

    def _training_figures(self) -> dict[str, Any]:
        """Return the epoch's means over the images of all ranks, whose sums `totals` then has.

        Raises:
            TrainingError: the loss or a weight is no longer finite.
        """
        loss, penalty, correct, predictions, images = self.world.sum_(self.totals).tolist()
        mine = [p.to_local() if hasattr(p, "to_local") else p for p in self.parameters]  # FSDP2 may leave a rank none
        largest = torch.nn.utils.get_total_norm([p.detach() for p in mine if p.numel()], math.inf)
        largest = self.world.sum_(largest.to(self.device, torch.float64))
        if not np.isfinite(loss + penalty + float(largest)):
            raise TrainingError(
                f"the loss or a weight is no longer finite in epoch {self.epoch + 1} (mean loss {loss / images}, "
                f"SpA-Reg {penalty / images}): lower --lr, lengthen --warmup-epochs or set --clip-norm; the last "
                "checkpoint is kept"
            )
        return {
            "lr": self.schedule(self.epoch, self.steps_per_epoch - 1, self.steps_per_epoch),
            "loss": loss / images,
            "spareg": penalty / images if self.alignment.spareg is not None else None,
            "train_accuracy": round(100 * correct / predictions, 6),
        }

    def _end_epoch(self, figures: Mapping[str, Any], began: float) -> None:
        """Let strategies and baseline act, evaluate where this epoch's turn has come, and write the epoch's record.

        Args:
            figures: of the epoch's training.
            began: the moment of `time.perf_counter` at which it began.
        """
        self.alignment.end_epoch()
        self.baseline.end_epoch()
        record: dict[str, Any] = {"epoch": self.epoch + 1, **figures}
        if self._last_epoch or (self.epoch + 1) % self.settings.evaluate_every == 0:
            record |= self._evaluate()
        record["alignment"] = self._alignment_figures()
        record["alpha"] = self.alignment.alpha
        self.epoch, self.step = self.epoch + 1, 0
        self.totals.zero_()
        if "accuracy" in record and record["accuracy"]["balanced"] > self.best.get("balanced", -1.0):
            self.best = {name: record["accuracy"][name] for name in ("all", "balanced")} | {"epoch": self.epoch}
        record["seconds"] = time.perf_counter() - began
        self.seconds += record["seconds"]
        self.record = record
        if self.reporter is not None:
            self.reporter.epoch(record)

    @property
    def _last_epoch(self) -> bool:
        return self.epoch + 1 == self.settings.recipe.epochs

    @abstractmethod
    def _evaluate(self) -> dict[str, Any]:
        """Return what the record says of the network after an epoch that is evaluated, `accuracy` among it."""

    @torch.no_grad()
    def _accuracy(
        self, predictions: Iterable[tuple[Tensor, Tensor, Tensor]], *readers: Callable[[Tensor, Tensor], None]
    ) -> Figures:
        """Return accuracies in evaluation mode, over the images of all ranks.

        In full precision: half-precision logits tie, and the tie goes to the lower index, the larger class.

        Args:
            predictions: logits (N, C), features (N, D) and labels (N,), made only when they are asked for.
            readers: also get features and labels.
        """
        self.baseline.model.eval()
        correct_C = torch.zeros(len(self.counts), dtype=torch.int64, device=self.device)
        count_C = torch.zeros_like(correct_C)
        for logits_NC, features_ND, labels_N in predictions:
            correct_C.index_add_(0, labels_N, (logits_NC.argmax(dim=1) == labels_N).to(torch.int64))
            count_C.index_add_(0, labels_N, torch.ones_like(labels_N))
            for read in readers:
                read(features_ND, labels_N)
        return accuracy_figures(self.world.sum_(correct_C), self.world.sum_(count_C), self.groups)

    def _alignment_figures(self, tracker: spalign.ClassMeanTracker | None = None) -> Figures:
        cosine_C, defined_C = self.alignment.cosines(tracker)
        return group_means(cosine_C, defined_C, self.groups)

    # --- checkpoints and result ---------------------------------------------------------------------------------------

    @abstractmethod
    def _newest_checkpoint(self) -> Path | None:
        """Return what to go on from, the same on all ranks; None where there is nothing."""

    @abstractmethod
    def _resume(self, path: Path) -> str:
        """Go on from a checkpoint, and return a line that says from where."""

    def _is_ours(self) -> bool:
        """Return whether an attempt of this very launch has had the folder: a restart goes on from nothing else."""
        ours = False
        if self.world.first:
            with contextlib.suppress(OSError):  # it never came to have it
                ours = (self.folder / LAUNCH).read_text() == self.world.launch
        return bool(self.world.from_first(ours))

    def _start_fresh(self) -> str:
        """Remove what another run left, or else a run killed in its first epoch would go on from that one's state."""
        if self.world.first:
            names = (self.folder / name for name in (*self.written, LAUNCH))
            for path in (*names, *self.folder.glob("tensorboard/events.out.*")):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        self.world.barrier()
        return f"no checkpoint in {self.folder}: starting fresh" if self.resumes else f"writing to {self.folder}"

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside network and optimizer."""
        return {
            "options": self.outcome,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "best": self.best,
            "record": self.record,
            "alignment": self.alignment.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        self.best, self.record = state["best"], state["record"]
        self.alignment.load_state_dict(state["alignment"])
        self.scaler.load_state_dict(state["scaler"])

    def _result(self) -> dict[str, Any]:
        settings, record = self.settings, self.record
        self.environment |= gpu_facts(self.device)
        return {
            "method": self.baseline.name,
            "strategies": settings.alignment.names,
            "seed": settings.seed,
            "epochs": settings.recipe.epochs,
            "accuracy_last": record["accuracy"],
            "accuracy_best": self.best,
            "train_accuracy_augmented": record["train_accuracy"],
            "alignment": record["alignment"],
            "seconds": round(self.seconds, 3),
            "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "options": self.outcome,
            "counts": list(self.counts),
            "environment": self.environment,
        }

    @abstractmethod
    def _summary(self, result: dict[str, Any]) -> str:
        """Format a result for the terminal."""


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


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Return what else decides numbers on a GPU, once it has been used: spalign's kernels, and TF32 in float32."""
    if device.type != "cuda":
        return {}
    backends = torch.backends
    return {
        "own_kernels": kernels.in_use(device),
        "tf32_convolutions": backends.cudnn.allow_tf32,
        "tf32_matmul": backends.cuda.matmul.allow_tf32,
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
