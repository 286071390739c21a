"""Training on ImageNet-LT by any number of ranks: loaders, sharded checkpoints, stops in the middle of an epoch.

What is random is a function of the seed, the epoch and the place in it, so a run goes on exactly where it was stopped,
in the middle of an epoch too, and the images of a global batch do not depend on how many ranks share it.

Shapes: N images of a micro-batch, S steps of an epoch, R pixels a side, C classes, D feature dimensions.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..augment import mix
from ..baseline import Batch
from ..checkpoint import save_checkpoint
from ..glmc import Pairs, mix_pairs, sampling_weights
from ..networks import store_channels_last
from ..parallel import SharedError, Spread, Stop, World
from ..reporting import closing_table
from ..settings import check_same
from ..sharded import full_weights, load_sharded, newest_checkpoint, read_state, save_sharded
from ..training import Run
from .images import Normalise
from .lists import ImageList, class_counts, read_list, scan, shot_groups
from .loader import (
    EpochOrder,
    EvalLoader,
    LoadedBatch,
    Plan,
    SyntheticEvalLoader,
    SyntheticLoader,
    TrainLoader,
    check_shared_memory,
)
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


class Trainer(Run):
    """One run of one baseline with any of the strategies, on this rank.

    Raises:
        ValueError: options, lists, files or checkpoint do not fit.
        OSError: a file is missing or cannot be written.
    """

    settings: ImageNetSettings
    written = ("checkpoints", "model.pt", "result.json")

    def __init__(self, settings: ImageNetSettings, world: World) -> None:
        super().__init__(settings, world, deterministic=settings.deterministic)
        recipe = settings.recipe
        if settings.sync_bn and self.device.type == "cpu":
            raise SharedError("--sync-bn works on GPUs alone: leave it out")
        if settings.fsdp and not world.grouped:
            raise ValueError("--fsdp shards over the ranks of a process group: start with torchrun")
        self.train_images, self.eval_sets = self._load_data()
        self.outcome["fingerprint"] = fingerprint(self.train_images)
        counts = class_counts(self.train_images.labels_N, self.num_classes)
        with world.together():
            self.plan = Plan(len(self.train_images), recipe.batch_size, world.size, world.rank, settings.accumulate)
            self.eval_batch_size = max(2, min(256, recipe.batch_size))
            self._check_memory()
            torch.manual_seed(settings.seed)
            baseline, backbone = build(settings, counts, self._place)
        self.spread = Spread(world, baseline, backbone.blocks(), fsdp=settings.fsdp)
        hard = not recipe.mixup and settings.method != "glmc"
        self._set_up(
            baseline,
            counts,
            shot_groups(counts),
            self.plan.steps,
            batch_size=self.plan.largest_part if hard else None,
        )
        self.normalise = Normalise(self.device)
        with world.together():
            self.loader = self._loader()
        self.epoch_seconds = self.waited = 0.0  # of the epoch under way: in all, and for data
        self._open()
        skipped = sum(images.skipped for images in (self.train_images, *self.eval_sets.values()))
        if skipped:
            self._note(f"left out {skipped} bad lines or files")

    # --- building -----------------------------------------------------------------------------------------------------

    def _load_data(self) -> tuple[ImageList, dict[str, ImageList]]:
        """Read and scan the lists on the first rank, and give them to all: training, then what is evaluated."""
        settings, lists = self.settings, None
        if settings.data == "synthetic":
            train, test = synthetic_lists(settings.num_synthetic, settings.num_synthetic_classes)
            self.num_classes = settings.num_synthetic_classes
            return train, {"test": test}
        with self.world.together():
            if self.world.first:
                lists = self._read_lists()
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

    def _check_memory(self) -> None:
        settings = self.settings
        if settings.data == "files":
            # Files in place of pixels are of much the same size.
            looks = 1 if settings.method != "glmc" else 4 if settings.decode == "cpu" else 2
            check_shared_memory(
                [(self.plan.largest_part, looks), (self.eval_batch_size, 1)],
                settings.recipe.resolution,
                workers=settings.workers,
                processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            )

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
        files: dict[str, Any] = {"workers": settings.workers, "epochs": recipe.epochs, "decode": decode}
        return TrainLoader(self.train_images, self.plan, **files, **shared)

    # --- training -----------------------------------------------------------------------------------------------------

    def _train_until(self, end: int) -> None:
        with contextlib.closing(self.loader), Stop(self.world) as stop:
            while self.epoch < end and not self._run_epoch(stop):
                pass
        if self.epoch == self.settings.recipe.epochs:
            weights = full_weights(self.baseline.model)
            if self.world.first:
                save_checkpoint(self.folder / "model.pt", weights)

    def _run_epoch(self, stop: Stop) -> bool:
        """Train and evaluate one epoch, or what is left of it; return whether to stop."""
        start, waited, seen = time.perf_counter(), self.waited, 0
        began = start - self.epoch_seconds
        self.baseline.begin_epoch(self.epoch)
        order_N = EpochOrder(len(self.train_images)).order(self.settings.seed, self.epoch)
        labels_N = self.train_images.labels_N[order_N]
        draws = EpochDraws(self.settings, self.plan, self.epoch, labels_N, self.num_classes, self.device)
        self.loader.waited_seconds = 0.0
        every = self.settings.checkpoint_steps
        with self._steps() as bar:
            for step, parts in zip(bar, self.loader.epoch(self.epoch, self.step), strict=True):
                self._train_step(step, parts, draws)
                self.step = step + 1
                seen += self.plan.global_size(step)
                now = time.perf_counter()
                self.waited, self.epoch_seconds = waited + self.loader.waited_seconds, now - began
                wait = self.loader.waited_seconds / (now - start)
                bar.set_postfix_str(f"{seen / (now - start):.0f} images/s, {wait:.0%} waiting for data", refresh=False)
                if self.step < self.plan.steps:
                    if stop.agreed():
                        self._save()
                        return True
                    if every and self.step % every == 0:
                        self._save()
        if stop.settle():  # before an evaluation that may take longer than there is time for
            self._save()
            return True
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        figures = self._training_figures()
        figures["images"] = int(self.totals[4])
        figures["images_per_second"] = round(self.plan.num_images / seconds, 1)
        figures["data_wait_share"] = round(self.waited / seconds, 4)
        self._end_epoch(figures, began)
        self.epoch_seconds = self.waited = 0.0
        self._save()
        return stop.settle()

    def _train_step(self, step: int, parts: tuple[LoadedBatch, ...], draws: EpochDraws) -> None:
        rate = self.schedule(self.epoch, step, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            batch = self._batch(part, step, number, draws)
            with self.spread.accumulating(last=last):
                with self._autocast():
                    out = self.spread.step(batch, last=last)
                # Gradients are averaged over ranks: so scaled, they are those of the mean over the global batch.
                loss = out.loss * (len(batch) * self.world.size / self.plan.global_size(step))
                penalty = self._measure(out, len(batch))
                if penalty is not None:
                    loss = loss + self.settings.alignment.spareg / len(parts) * penalty
                self.scaler.scale(loss).backward()
        self._update()

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

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, Any]:
        """Return accuracies on the validation set where there is one, and then on the test set after the last epoch."""
        every_epoch = "validation" if "validation" in self.eval_sets else "test"
        figures = {"evaluated_on": every_epoch, "accuracy": self._accuracy(self._predictions(every_epoch))}
        if self._last_epoch and every_epoch != "test":
            figures["accuracy_test"] = self._accuracy(self._predictions("test"))
        return figures

    def _predictions(self, name: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield logits (N, C), features (N, D) and labels (N,) of this rank's share of a set."""
        settings, world, images = self.settings, self.world, self.eval_sets[name]
        self.spread.share_buffers()
        shared: dict[str, Any] = {
            "rank": world.rank,
            "ranks": world.size,
            "batch_size": self.eval_batch_size,
            "resolution": settings.recipe.resolution,
            "device": self.device,
        }
        loader = (
            SyntheticEvalLoader(self.num_classes, SYNTHETIC_PER_CLASS, **shared)
            if settings.data == "synthetic"
            else EvalLoader(images, workers=settings.workers, **shared)
        )
        done, wanted = 0, -(-len(images) // (shared["batch_size"] * world.size))
        for pixels, labels_N in loader:
            yield *self.spread.predict(self.normalise(pixels)), labels_N
            done += 1
        if self.spread.sharded:  # all ranks have to gather the parameters equally often
            for _ in range(done, wanted):
                side = settings.recipe.resolution
                self.spread.predict(torch.zeros(1, 3, side, side, device=self.device))

    # --- checkpoints and result ---------------------------------------------------------------------------------------

    def _newest_checkpoint(self) -> Path | None:
        return newest_checkpoint(self.folder / "checkpoints", self.world)

    def _state(self) -> dict[str, Any]:
        return {
            **super()._state(),
            "step": self.step,
            "epoch_seconds": self.epoch_seconds,
            "waited": self.waited,
            "totals": self.world.sum_(self.totals.clone()).cpu(),
        }

    def _save(self) -> None:
        self.spread.share_buffers()
        folder, keep = self.folder / "checkpoints", self.settings.keep
        save_sharded(folder, self.world, self.spread.module, self.optimizer, self._state(), keep=keep)

    def _resume(self, path: Path) -> str:
        settings = self.settings
        with self.world.together():
            state = read_state(path, self.device)
            # Checkpoints of before an option existed were made with its default.
            defaults = ImageNetSettings(settings.recipe_name, settings.recipe, settings.output_dir).outcome()
            check_same(self.outcome, {**defaults, **state["options"]})
        self._load_state(state)
        load_sharded(path, self.spread.module, self.optimizer)
        self.step, self.epoch_seconds, self.waited = state["step"], state["epoch_seconds"], state["waited"]
        if self.world.first:  # the sum over ranks
            self.totals.copy_(state["totals"])
        return f"resuming after epoch {self.epoch} of {settings.recipe.epochs}, step {self.step}"

    def _result(self) -> dict[str, Any]:
        settings, record = self.settings, self.record
        return {
            "dataset": "imagenet-lt" if settings.data == "files" else settings.data,
            "network": settings.recipe.network,
            "evaluated_on": "test",
            **super()._result(),
            "accuracy_last": record.get("accuracy_test", record["accuracy"]),
            "best_on": record["evaluated_on"],
            "images_per_second": record["images_per_second"],
            "data_wait_share": record["data_wait_share"],
            "environment": {**self.environment, "ranks": self.world.size},
        }

    def _summary(self, result: dict[str, Any]) -> str:
        return closing_table(result, result["network"], speed=f", {result['images_per_second']:.0f} images/s")


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
