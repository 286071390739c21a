"""Training on ImageNet-LT by any number of ranks: epochs, evaluation, checkpoints, stops.

What is random is a function of the seed, the epoch and the place in it, so a run goes on exactly where it was stopped,
in the middle of an epoch too, and the images of a global batch do not depend on how many ranks share it.

Shapes: N images of a micro-batch, S steps of an epoch, R pixels a side, C classes.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..alignment import Alignment
from ..augment import mix
from ..baseline import Batch
from ..checkpoint import FolderLock, save_checkpoint
from ..engine import AMP_DTYPES, TrainingError, environment
from ..glmc import Pairs, mix_pairs, sampling_weights
from ..networks import store_channels_last
from ..parallel import Spread, Stop, World
from ..recipes import Schedule
from ..reporting import Figures, Reporter, accuracy_figures, closing_table, group_means, write_result
from ..settings import check_same, choose_algorithms
from ..sharded import full_weights, load_sharded, newest_checkpoint, read_state, save_sharded
from .images import Normalise
from .lists import ImageList, class_counts, read_list, scan, shot_groups
from .loader import EpochOrder, EvalLoader, LoadedBatch, Plan, SyntheticEvalLoader, SyntheticLoader, TrainLoader
from .methods import balances_batch, build, glmc_options
from .settings import ImageNetSettings

SYNTHETIC_PER_CLASS = 5  # test images


class EpochDraws:
    """An epoch's random numbers and class counts, on the device: what a step reads of them needs no copy.

    Shares and boxes are equal on all ranks; partners are this rank's own, within its micro-batches.
    """

    def __init__(
        self,
        settings: ImageNetSettings,
        plan: Plan,
        epoch: int,
        labels_N: Tensor,
        num_classes: int,
        device: torch.device,
    ) -> None:
        recipe, mixes = settings.recipe, settings.method == "glmc"
        rng = np.random.default_rng([settings.seed, epoch, 1])
        alpha = 1.0 if mixes else recipe.mixup
        share = rng.beta(alpha, alpha, plan.steps) if alpha else np.ones(plan.steps)
        self.share_S = torch.from_numpy(share).float().to(device)
        self.middle_S2 = torch.from_numpy(rng.integers(recipe.resolution, size=(plan.steps, 2))).to(device)
        self.partners: list[list[Tensor]] = []
        if recipe.mixup:
            own = np.random.default_rng([settings.seed, epoch, 2, plan.ranks, plan.rank])
            sizes = [[len(part) for part in plan.parts(step)] for step in range(plan.steps)]
            drawn = np.concatenate([own.permutation(size) for step in sizes for size in step])
            chunks = iter(torch.from_numpy(drawn).to(device).split([size for step in sizes for size in step]))
            self.partners = [[next(chunks) for _ in step] for step in sizes]
        self.counts_SC: Tensor | None = None
        if balances_batch(settings):
            step_N = torch.repeat_interleave(
                torch.arange(plan.steps), torch.tensor([plan.global_size(step) for step in range(plan.steps)])
            )
            counts_SC = torch.zeros(plan.steps, num_classes)
            counts_SC.index_put_((step_N, labels_N), torch.ones(len(labels_N)), accumulate=True)
            self.counts_SC = counts_SC.to(device)


class Trainer:
    """One run of one baseline with any of the strategies, on this rank.

    Raises:
        ValueError: options, lists, files or checkpoint do not fit.
        OSError: a file is missing or cannot be written.
    """

    def __init__(self, settings: ImageNetSettings, world: World) -> None:
        self.settings, self.world, self.device = settings, world, world.device
        recipe = settings.recipe
        choose_algorithms(self.device, deterministic=settings.deterministic)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        if settings.sync_bn and self.device.type == "cpu":
            raise ValueError("--sync-bn works on GPUs alone: leave it out")
        if settings.fsdp and not world.grouped:
            raise ValueError("--fsdp shards over the ranks of a process group: start with torchrun")
        self.folder = settings.output_dir
        self.checkpoints = self.folder / "checkpoints"
        self.resumes = settings.resume or world.restarted
        newest = newest_checkpoint(self.checkpoints, world)
        if newest is not None and not (self.resumes or settings.overwrite):
            raise ValueError(f"{self.folder} holds a run: pass --resume, --overwrite, or another --output-dir")

        self.train_images, self.eval_sets = self._load_data()
        self.counts = class_counts(self.train_images.labels_N, self.num_classes)
        self.groups = shot_groups(self.counts)
        self.plan = Plan(len(self.train_images), recipe.batch_size, world.size, world.rank, settings.accumulate)
        torch.manual_seed(settings.seed)
        self.baseline, backbone = build(settings, self.counts, self._place)
        blocks = backbone.blocks()
        self.spread = Spread(world, self.baseline, blocks, fsdp=settings.fsdp)
        self.parameters = [parameter for parameter in self.baseline.model.parameters() if parameter.requires_grad]
        sgd = torch.optim.SGD(
            self.parameters, lr=recipe.lr, momentum=recipe.sgd_momentum, weight_decay=recipe.weight_decay
        )
        hard = not recipe.mixup and settings.method != "glmc"
        self.alignment = Alignment(
            self.baseline.classifier,
            settings.alignment,
            epochs=recipe.epochs,
            batch_size=self.plan.largest_part if hard else None,
        )
        self.optimizer = self.alignment.wrap(sgd)
        self.schedule = Schedule(recipe.lr, recipe.epochs, recipe.warmup_epochs, recipe.schedule)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.amp_dtype = AMP_DTYPES[settings.amp]
        self.normalise = Normalise(self.device)
        self.loader = self._loader()
        self.outcome = {**settings.outcome(), "fingerprint": fingerprint(self.train_images)}
        # Sums over this rank's images: loss, penalty, correct predictions, predictions, images.
        self.totals = torch.zeros(5, dtype=torch.float64, device=self.device)
        self.epoch, self.step = 0, 0  # epochs done, steps done of the next
        self.seconds, self.epoch_seconds, self.waited = 0.0, 0.0, 0.0
        self.best: dict[str, float] = {}
        self.record: dict[str, Any] = {}

        self.lock: FolderLock | None = None
        error = None
        if world.first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = FolderLock(self.folder)
            except OSError as caught:
                error = caught
        world.raise_together(error)
        self.environment = {**environment(self.device), "ranks": world.size}
        note = self._resume(newest) if newest is not None and self.resumes else self._start_fresh()
        self.reporter: Reporter | None = None
        if world.first:
            self.reporter = Reporter(
                self.folder,
                epochs=recipe.epochs,
                start_epoch=self.epoch,
                tensorboard=settings.tensorboard,
                quiet=settings.quiet,
            )
        self._note(note)
        skipped = sum(images.skipped for images in (self.train_images, *self.eval_sets.values()))
        if skipped:
            self._note(f"left out {skipped} bad lines or files")

    # --- building -----------------------------------------------------------------------------------------------------

    def _load_data(self) -> tuple[ImageList, dict[str, ImageList]]:
        """Read and scan the lists on the first rank, and give them to all: training, then what is evaluated."""
        settings, lists, error = self.settings, None, None
        if settings.data == "synthetic":
            train, test = synthetic_lists(settings.num_synthetic, settings.num_synthetic_classes)
            self.num_classes = settings.num_synthetic_classes
            return train, {"test": test}
        if self.world.first:
            try:
                lists = self._read_lists()
            except (ValueError, OSError) as caught:
                error = caught
        self.world.raise_together(error)
        lists = self.world.from_first(lists)
        assert lists is not None
        self.num_classes = int(lists["train"].labels_N.max()) + 1
        return lists.pop("train"), lists

    def _read_lists(self) -> dict[str, ImageList]:
        settings = self.settings
        skip: dict[str, Any] = {"skip_bad": settings.skip_bad}
        train = read_list(settings.train_list, settings.data_dir, **skip)
        num_classes = int(train.labels_N.max()) + 1
        class_counts(train.labels_N, num_classes)  # refuses a class without images
        lists = {"train": train}
        for name, path in (("validation", settings.val_list), ("test", settings.test_list)):
            if path is not None:
                lists[name] = read_list(path, settings.data_dir, num_classes=num_classes, **skip)
        workers = max(settings.workers, 1)
        return {
            name: scan(images, level=settings.scan, workers=workers, **skip)  # type: ignore[arg-type]
            for name, images in lists.items()
        }

    def _place(self, model: nn.Module) -> nn.Module:
        model.to(self.device)
        if self.settings.channels_last and not self.settings.fsdp:  # FSDP2 shards contiguous parameters alone
            store_channels_last(model)
        if self.settings.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if self.settings.compile:
            # Batches have two or three sizes, and a kernel for each is quicker than one for all.
            model.get_submodule("backbone").compile(dynamic=False)
        return model

    def _loader(self) -> TrainLoader | SyntheticLoader:
        settings, recipe = self.settings, self.settings.recipe
        weights_N = None
        if settings.method == "glmc":
            weights_N = sampling_weights(self.train_images.labels_N, self.counts, glmc_options(settings).resample)
        shared: dict[str, Any] = {
            "seed": settings.seed,
            "kind": "glmc" if settings.method == "glmc" else "standard",  # looks and augmentation go with the method
            "resolution": recipe.resolution,
            "device": self.device,
            "other_weights_N": weights_N,
        }
        if settings.data == "synthetic":
            return SyntheticLoader(self.counts, self.plan, **shared)
        decode: Any = settings.decode
        return TrainLoader(self.train_images, self.plan, workers=settings.workers, decode=decode, **shared)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def _note(self, text: str) -> None:
        if self.reporter is not None:
            self.reporter.note(text)

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any] | None:
        """Train to the last epoch and return the result, which is also in `result.json`; None when stopped early.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        epochs = self.settings.recipe.epochs
        end = epochs if self.settings.stop_after_epochs is None else self.epoch + self.settings.stop_after_epochs
        try:
            with Stop(self.world) as stop:
                while self.epoch < min(end, epochs):
                    if self._run_epoch(stop):
                        break
        finally:
            self.loader.close()
            if self.reporter is not None:
                self.reporter.close()
            if self.lock is not None:
                self.lock.release()
        if self.epoch < epochs:
            place = f"step {self.step} of epoch {self.epoch + 1}" if self.step else f"epoch {self.epoch}"
            self._note(f"stopped after {place} of {epochs}; continue with --resume")
            return None
        result, weights = self._result(), full_weights(self.baseline.model)
        if self.world.first:
            save_checkpoint(self.folder / "model.pt", weights)
            write_result(self.folder / "result.json", result)
            self._note(summary(result))
        return result

    def _run_epoch(self, stop: Stop) -> bool:
        """Train and evaluate one epoch, or what is left of it; return whether to stop."""
        start, before = time.perf_counter(), self.epoch_seconds
        self.baseline.begin_epoch(self.epoch)
        order_N = EpochOrder(len(self.train_images)).order(self.settings.seed, self.epoch)
        labels_N = self.train_images.labels_N[order_N]
        draws = EpochDraws(self.settings, self.plan, self.epoch, labels_N, self.num_classes, self.device)
        steps = range(self.step, self.plan.steps)
        bar = None if self.reporter is None else self.reporter.steps(steps, self.epoch)
        waited, seen = self.waited, 0
        self.loader.waited_seconds = 0.0
        for step, parts in zip(steps, self.loader.epoch(self.epoch, self.step), strict=True):
            self._train_step(step, parts, draws)
            self.step = step + 1
            self.waited, self.epoch_seconds = waited + self.loader.waited_seconds, before + time.perf_counter() - start
            seen += self.plan.global_size(step)
            if bar is not None:
                elapsed = time.perf_counter() - start
                wait = self.loader.waited_seconds / elapsed
                bar.set_postfix_str(f"{seen / elapsed:.0f} images/s, {wait:.0%} waiting for data", refresh=False)
                bar.update()
            if self.step < self.plan.steps:
                every = self.settings.checkpoint_steps
                if stop.agreed():
                    self._save()
                    if bar is not None:
                        bar.close()
                    return True
                if every and self.step % every == 0:
                    self._save()
        if bar is not None:
            bar.close()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        train_seconds = before + time.perf_counter() - start
        record: dict[str, Any] = {"epoch": self.epoch + 1, **self._training_figures()}
        record["images_per_second"] = round(self.plan.num_images / train_seconds, 1)
        record["data_wait_share"] = round(self.waited / train_seconds, 4)
        self.alignment.end_epoch()
        self.baseline.end_epoch()
        last = self.epoch + 1 == self.settings.recipe.epochs
        every_epoch = "validation" if "validation" in self.eval_sets else "test"
        record["evaluated_on"] = every_epoch
        record["accuracy"] = self._evaluate(every_epoch)
        if last and every_epoch != "test":
            record["accuracy_test"] = self._evaluate("test")
        record["alignment"] = self._alignment_figures()
        record["alpha"] = self.alignment.alpha
        self.epoch, self.step = self.epoch + 1, 0
        self.totals.zero_()
        if record["accuracy"]["balanced"] > self.best.get("balanced", -1.0):
            self.best = {name: record["accuracy"][name] for name in ("all", "balanced")} | {"epoch": self.epoch}
        record["seconds"] = before + time.perf_counter() - start
        self.seconds += record["seconds"]
        self.epoch_seconds = self.waited = 0.0
        self.record = record
        if self.reporter is not None:
            self.reporter.epoch(record)
        self._save()
        return stop.settle() and not last

    def _train_step(self, step: int, parts: tuple[LoadedBatch, ...], draws: EpochDraws) -> None:
        optimizer, scaler, world = self.optimizer, self.scaler, self.world
        rate = self.schedule(self.epoch, step, self.plan.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            batch = self._batch(part, step, number, draws)
            with self.spread.accumulating(last=last):
                with self._autocast():
                    out = self.spread.step(batch, last=last)
                # Gradients are averaged over ranks: so scaled, they are those of the mean over the global batch.
                loss = out.loss * (len(batch) * world.size / self.plan.global_size(step))
                penalty = self.alignment.penalty(out.features, out.targets)
                if penalty is not None:
                    loss = loss + self.settings.alignment.spareg / len(parts) * penalty
                scaler.scale(loss).backward()
            with torch.no_grad():
                # Of a mixed label, the class with the larger share counts as the right one.
                targets_N = out.targets if out.targets.ndim == 1 else out.targets.argmax(1)
                correct = (out.logits.argmax(1) == targets_N).sum()
                value = torch.zeros_like(out.loss) if penalty is None else penalty
                sums = torch.stack([out.loss.double(), value.double()]) * len(batch)
                self.totals[:2] += sums
                self.totals[2] += correct
                self.totals[3] += len(targets_N)
                self.totals[4] += len(batch)
        if self.settings.clip_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        scaler.step(optimizer)
        scaler.update()

    def _batch(self, part: LoadedBatch, step: int, number: int, draws: EpochDraws) -> Batch:
        looks = [self.normalise(look) for look in part.looks]
        share = draws.share_S[step]
        if self.settings.method == "glmc":
            pairs = Pairs(*looks, *part.labels)
            unadjusted = self.settings.method_options.unadjusted_cutmix
            return mix_pairs(pairs, self.num_classes, share.view(1), draws.middle_S2[step], unadjusted=unadjusted)
        (images_N3RR,), (targets,) = looks, part.labels
        if self.settings.recipe.mixup:
            one_hot_NC = F.one_hot(targets, self.num_classes).float()
            images_N3RR, targets = mix(images_N3RR, one_hot_NC, draws.partners[step][number], share)
        return Batch(images_N3RR, targets, counts=None if draws.counts_SC is None else draws.counts_SC[step])

    def _training_figures(self) -> dict[str, float | None]:
        totals = self.world.sum_(self.totals.clone())
        loss, penalty, correct, predictions, images = totals.tolist()
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in local(self.parameters)]).all()
        bad = self.world.sum_((~finite).to(torch.int64).reshape(1))
        if not np.isfinite(loss + penalty) or int(bad):
            raise TrainingError(
                f"the loss or a weight is no longer finite in epoch {self.epoch + 1} (mean loss {loss / images}, "
                f"SpA-Reg {penalty / images}): lower --lr, lengthen --warmup-epochs or set --clip-norm; the checkpoint "
                "before is kept"
            )
        return {
            "lr": self.schedule(self.epoch, self.plan.steps - 1, self.plan.steps),
            "loss": loss / images,
            "spareg": penalty / images if self.alignment.spareg is not None else None,
            "train_accuracy": round(100 * correct / predictions, 6),
            "images": int(images),
        }

    @torch.no_grad()
    def _evaluate(self, name: str) -> Figures:
        """Return accuracies on a set, every image counted once by one rank, in full precision."""
        settings, world, images = self.settings, self.world, self.eval_sets[name]
        self.baseline.model.eval()
        self.spread.share_buffers()
        shared: dict[str, Any] = {
            "rank": world.rank,
            "ranks": world.size,
            "batch_size": max(2, min(256, settings.recipe.batch_size)),
            "resolution": settings.recipe.resolution,
            "device": self.device,
        }
        loader = (
            SyntheticEvalLoader(self.num_classes, SYNTHETIC_PER_CLASS, **shared)
            if settings.data == "synthetic"
            else EvalLoader(images, workers=settings.workers, **shared)
        )
        correct_C = torch.zeros(self.num_classes, dtype=torch.int64, device=self.device)
        count_C = torch.zeros_like(correct_C)
        done, wanted = 0, -(-len(images) // (shared["batch_size"] * world.size))
        for pixels, labels_N in loader:
            logits_NC, _ = self.spread.predict(self.normalise(pixels))
            correct_C.index_add_(0, labels_N, (logits_NC.argmax(1) == labels_N).to(torch.int64))
            count_C.index_add_(0, labels_N, torch.ones_like(labels_N))
            done += 1
        if self.spread.sharded:  # all ranks have to gather the parameters equally often
            for _ in range(done, wanted):
                side = settings.recipe.resolution
                self.spread.predict(torch.zeros(1, 3, side, side, device=self.device))
        world.sum_(correct_C)
        world.sum_(count_C)
        return accuracy_figures(correct_C, count_C, self.groups)

    def _alignment_figures(self) -> Figures:
        cosine_C, defined_C = self.alignment.cosines()
        return group_means(cosine_C, defined_C, self.groups)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.spread.share_buffers()
        state = {
            "options": self.outcome,
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "epoch_seconds": self.epoch_seconds,
            "waited": self.waited,
            "totals": self.world.sum_(self.totals.clone()).cpu(),
            "best": self.best,
            "record": self.record,
            "alignment": self.alignment.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        save_sharded(self.checkpoints, self.world, self.spread.module, self.optimizer, state, keep=self.settings.keep)

    def _start_fresh(self) -> str:
        """Remove what another run left, or else a run killed in its first epoch would go on from that one's state."""
        if self.world.first:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            written = (self.folder / name for name in ("result.json", "model.pt"))
            for path in (*written, *self.folder.glob("tensorboard/events.out.*")):
                path.unlink(missing_ok=True)
        self.world.barrier()
        return f"no checkpoint in {self.folder}: starting fresh" if self.resumes else f"writing to {self.folder}"

    def _resume(self, path: Path) -> str:
        state = read_state(path, self.device)
        check_same(self.outcome, state["options"])
        load_sharded(path, self.spread.module, self.optimizer)
        self.alignment.load_state_dict(state["alignment"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds, self.epoch_seconds, self.waited = state["seconds"], state["epoch_seconds"], state["waited"]
        self.best, self.record = state["best"], state["record"]
        if self.world.first:  # the sum over ranks
            self.totals.copy_(state["totals"])
        return f"resuming after epoch {self.epoch} of {self.settings.recipe.epochs}, step {self.step}"

    def _result(self) -> dict[str, Any]:
        settings, record = self.settings, self.record
        return {
            "dataset": "imagenet-lt" if settings.data == "files" else settings.data,
            "method": self.baseline.name,
            "network": settings.recipe.network,
            "strategies": settings.alignment.names,
            "seed": settings.seed,
            "epochs": settings.recipe.epochs,
            "evaluated_on": "test",
            "accuracy_last": record.get("accuracy_test", record["accuracy"]),
            "best_on": record["evaluated_on"],
            "accuracy_best": self.best,
            "train_accuracy_augmented": record["train_accuracy"],
            "alignment": record["alignment"],
            "images_per_second": record["images_per_second"],
            "data_wait_share": record["data_wait_share"],
            "seconds": round(self.seconds, 3),
            "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "options": self.outcome,
            "counts": list(self.counts),
            "environment": self.environment,
        }


def local(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return what this rank holds of parameters."""
    return [p.to_local() if hasattr(p, "to_local") else p for p in parameters]


def fingerprint(images: ImageList) -> str:
    """Return a checksum of what is in a list: paths and labels, in order."""
    lines = (f"{file} {label}\n" for file, label in zip(images.files, images.labels_N.tolist(), strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def synthetic_lists(num_images: int, num_classes: int) -> tuple[ImageList, ImageList]:
    """Return lists without files: training labels of ImageNet-LT's imbalance, and a few test labels a class."""
    share_C = 256.0 ** -(torch.arange(num_classes) / max(num_classes - 1, 1))
    counts_C = 1 + (share_C / share_C.sum() * (num_images - num_classes)).long()
    counts_C[0] += num_images - counts_C.sum()
    labels_N = torch.repeat_interleave(torch.arange(num_classes), counts_C)
    test_N = torch.arange(num_classes).repeat_interleave(SYNTHETIC_PER_CLASS)

    def without_files(name: str, labels: Tensor) -> ImageList:
        numbers = range(1, len(labels) + 1)
        return ImageList(Path(name), Path(), tuple(map(str, numbers)), labels, tuple(numbers))

    return without_files("synthetic", labels_N), without_files("synthetic-test", test_N)


def summary(result: dict[str, Any]) -> str:
    """Format a result: the last epoch first, the best epoch only beside it."""
    name, best = " + ".join([result["method"], *result["strategies"]]), result["accuracy_best"]
    return closing_table(
        f"{result['dataset']}, {result['network']}, {name}, seed {result['seed']}, {result['epochs']} epochs, "
        f"{result['seconds']:.0f} s, {result['images_per_second']:.0f} images/s",
        [
            ("test accuracy, last epoch", result["accuracy_last"], ".2f"),
            ("alignment, running means", result["alignment"], ".4f"),
        ],
        f"best on {result['best_on']} {best['balanced']:.2f}, epoch {best['epoch']}",
    )
