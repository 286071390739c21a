"""Lightning: closures, manual steps, precision, accumulation, clipping, and exact resume through its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import integration_scripts as scripts
import pytest
import torch
from torch import nn

import spalign

scripts.available("lightning")

import lightning as L  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # noqa: E402

pytestmark = scripts.FOREIGN_WARNINGS
QUIET = scripts.QUIET_LIGHTNING
both_scripts = pytest.mark.parametrize("name", ["lightning_callback", "lightning_manual"])
each_strategy = pytest.mark.parametrize("strategy", ["reg", "slerp", "proj", "all"])


def in_order(module: Any) -> Any:
    """Let a script read its data in a fixed order: Lightning does not restore random numbers."""
    load = module.train_loader
    module.train_loader = lambda: load(shuffle=False)
    return module


def saving(folder: Path, **options: Any) -> dict[str, Any]:
    """Return trainer options that save every epoch."""
    checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **options)
    return {**QUIET, "enable_checkpointing": True, "callbacks": [checkpoint]}


def with_validation(module: Any) -> Any:
    """Give a script's module a validation loop."""

    class Validated(module.Classifier):
        def val_dataloader(self) -> Any:
            return module.train_loader()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert not self.spareg.training
            self.network(batch[0])

    module.Classifier = Validated
    return module


def trackers_equal(a: scripts.Counts, b: scripts.Counts) -> bool:
    (x,), (y,) = a.trackers, b.trackers
    return all(torch.equal(p, q) for p, q in zip(x.buffers(), y.buffers(), strict=True))


@both_scripts
@each_strategy
def test_resume_is_bit_equal(name: str, strategy: str, tmp_path: Path) -> None:
    """10 steps, save, load into fresh objects, 10 more: 20 uninterrupted, means and rotation included (C12)."""
    amounts = scripts.strengths(strategy)
    with scripts.counting() as straight:
        want = scripts.seeded(
            in_order(scripts.script(name)).train, amounts, 4, limit_train_batches=5, **saving(tmp_path)
        )
    with scripts.counting() as resumed:
        torch.manual_seed(99)  # a fresh network that shares nothing with the first
        got = in_order(scripts.script(name)).train(
            amounts, 4, limit_train_batches=5, ckpt_path=str(tmp_path / "epoch=1.ckpt"), **saving(tmp_path / "resumed")
        )
    assert (straight.steps, resumed.steps) == (20, 10)
    assert scripts.same_weights(got, want)
    assert trackers_equal(resumed, straight)
    assert resumed.slerps[0].last_step == straight.slerps[0].last_step == 4


@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_resume_from_a_checkpoint_beside_validation_is_bit_equal(at_epoch_end: bool, tmp_path: Path) -> None:
    """C12: saved after validation, a checkpoint lacks the epoch's rotation, and Lightning runs the hook on resume."""
    amounts = scripts.strengths("all")
    when = {"save_on_train_epoch_end": at_epoch_end}
    with scripts.counting() as straight:
        want = scripts.seeded(
            with_validation(in_order(scripts.script("lightning_callback"))).train,
            amounts,
            4,
            limit_train_batches=5,
            **saving(tmp_path, **when),
        )
    path = tmp_path / "epoch=1.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["callbacks"]["SlerpCallback"]["last_step"] == (2 if at_epoch_end else 1)
    with scripts.counting() as resumed:
        torch.manual_seed(99)
        got = with_validation(in_order(scripts.script("lightning_callback"))).train(
            amounts, 4, limit_train_batches=5, ckpt_path=str(path), **saving(tmp_path / "resumed", **when)
        )
    assert (straight.fed, resumed.fed) == (20, 10), "validation feeds nothing"
    assert scripts.same_weights(got, want)
    assert trackers_equal(resumed, straight)


def test_automatic_equals_manual_optimization() -> None:
    """A7, A18: inside Lightning's closure the projection sees this step's clipped gradient, not the last one's."""
    runs = []
    for name, more in (("lightning_callback", {"gradient_clip_val": 5.0}), ("lightning_manual", {})):
        with scripts.counting() as counts:
            runs.append(scripts.seeded(scripts.script(name).train, scripts.strengths("all"), 2, **QUIET, **more))
        assert counts.projected == counts.steps == 16
    assert scripts.same_weights(*runs)


def test_accumulation_and_clipping() -> None:
    """A16, A18: one projection per optimizer step, and what is stepped is within the clipped norm."""
    with scripts.counting() as counts:
        scripts.seeded(
            scripts.script("lightning_callback").train,
            scripts.strengths("all"),
            2,
            accumulate_grad_batches=2,
            gradient_clip_val=0.05,
            **QUIET,
        )
    assert (counts.fed, counts.projected, counts.steps, counts.rotated) == (16, 8, 8, 2)
    # Clipping divides by the norm plus 1e-6, and projecting only shrinks.
    assert max(counts.gradient_norms) <= 0.05 * (1 + 1e-5)


@both_scripts
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision(name: str, precision: str) -> None:
    """D4: state of at least single precision, and the same acts; alignment rises over the plain twin's."""
    from digits import evaluate

    networks = []
    for strategy in ("off", "all"):
        with scripts.counting() as counts:
            networks.append(
                scripts.seeded(scripts.script(name).train, scripts.strengths(strategy), 3, precision=precision, **QUIET)
            )
        assert (counts.fed, counts.projected, counts.rotated) == (24, 24, 3)
        wanted = torch.float64 if precision == "64-true" else torch.float32
        assert counts.trackers[0].mean.dtype == wanted
    off, aligned = (evaluate(network.float()) for network in networks)
    assert aligned[1] > off[1]


def test_a_plain_checkpoint_goes_on_aligned(tmp_path: Path) -> None:
    """C12: without tracker state every class is unseen and the term exactly 0; Lightning must be told not to mind."""
    scripts.seeded(scripts.plain("lightning_callback").train, scripts.strengths("all"), 2, **saving(tmp_path))
    path = str(tmp_path / "epoch=0.ckpt")
    module: Any = scripts.script("lightning_callback")
    with pytest.raises(RuntimeError, match=r"Missing key.*spareg\.tracker\.mean"):
        module.train(scripts.strengths("all"), 2, ckpt_path=path, **saving(tmp_path / "strict"))

    class Lenient(module.Classifier):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.strict_loading = False

    terms = []

    class Look(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            before = pl_module.network.fc.weight.clone()
            spalign.SpASlerp(
                pl_module.network.fc, pl_module.spareg.tracker, total_steps=1, alpha_max=1.0, threshold=1.0
            ).step()
            terms.append((pl_module.spareg().item(), torch.equal(pl_module.network.fc.weight, before)))

    module.Classifier = Lenient
    with scripts.counting() as counts:
        options = saving(tmp_path / "lenient")
        options["callbacks"].append(Look())
        network = module.train(scripts.strengths("all"), 2, ckpt_path=path, **options)
    assert terms == [(0.0, True)]
    assert counts.seen_at_first == [0]
    assert counts.steps == 8
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_an_aligned_checkpoint_goes_on_plain(tmp_path: Path) -> None:
    """A8, A9: the optimizer's state has nothing of spalign in it."""
    scripts.seeded(scripts.script("lightning_callback").train, scripts.strengths("all"), 2, **saving(tmp_path))
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    reference = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9).state_dict()
    assert checkpoint["optimizer_states"][0].keys() == reference.keys()
    assert checkpoint["callbacks"]["SlerpCallback"] == {"last_step": 1}


def test_the_rotation_is_no_scheduler_to_lightning() -> None:
    """B11: handed to it as one it is refused, so it cannot be stepped behind the user's back."""
    module: Any = scripts.script("lightning_callback")

    class Wrong(module.Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [spalign.SpASlerp(self.network.fc, self.spareg.tracker, total_steps=2)]

    module.Classifier = Wrong
    with pytest.raises((MisconfigurationException, AttributeError), match="SpASlerp"):
        module.train(scripts.strengths("all"), 1, **QUIET)
