"""Hugging Face Trainer: accumulation, clipping, precision, evaluation within training, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import integration_scripts as scripts
import pytest
import torch

scripts.available("transformers", "accelerate")

pytestmark = scripts.FOREIGN_WARNINGS


def train(folder: Path, strategy: str, epochs: int, *, module: Any = None, **options: Any) -> Any:
    module = module or scripts.script("hf_trainer")
    options = {"output_dir": str(folder), "use_cpu": True, **options}
    return scripts.seeded(module.train, scripts.strengths(strategy), epochs, **options)


@pytest.mark.parametrize("strategy", ["reg", "slerp", "proj", "all"])
def test_resume_is_bit_equal(strategy: str, tmp_path: Path) -> None:
    """C12: 16 steps, save, load into fresh objects, 16 more: 32 uninterrupted; the means ride in the model."""
    with scripts.counting() as straight:
        want = train(tmp_path, strategy, 4, save_strategy="epoch")
    with scripts.counting() as resumed:
        got = train(tmp_path, strategy, 4, save_strategy="epoch", resume_from_checkpoint=tmp_path / "checkpoint-16")
    assert (straight.steps, resumed.steps) == (32, 16)
    assert scripts.same_weights(got, want)
    for a, b in zip(straight.trackers[0].buffers(), resumed.trackers[0].buffers(), strict=True):
        assert torch.equal(a, b)
    assert resumed.slerps[0].last_step == straight.slerps[0].last_step == 4


@pytest.mark.parametrize("saved", [12, 16], ids=["within an epoch", "at an epoch's last step"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_resume_from_a_checkpoint_of_some_step_is_bit_equal(saved: int, accumulated: int, tmp_path: Path) -> None:
    """B12, C12: a checkpoint of an epoch's last step, written before the epoch ends, has its rotation."""
    options = {"gradient_accumulation_steps": accumulated, "save_strategy": "steps", "save_steps": 1}
    steps = -(-8 // accumulated)  # of an epoch; three micro-batches and three, and the two that are left
    checkpoint = tmp_path / f"checkpoint-{saved * steps // 8}"
    with scripts.counting() as straight:
        want = train(tmp_path, "all", 4, **options)
    with scripts.counting() as resumed:
        got = train(tmp_path, "all", 4, resume_from_checkpoint=checkpoint, **options)
    assert (straight.steps, resumed.steps) == (4 * steps, 4 * steps - saved * steps // 8)
    assert (straight.rotated, resumed.rotated) == (4, 4 - saved // 8)
    assert scripts.same_weights(got, want)
    assert resumed.slerps[0].last_step == straight.slerps[0].last_step == 4


def test_accumulation_and_clipping(tmp_path: Path) -> None:
    """A16, A18: one projection per optimizer step, and what is stepped is within the clipped norm."""
    with scripts.counting() as counts:
        train(tmp_path, "all", 2, gradient_accumulation_steps=2, max_grad_norm=0.05)
    assert (counts.fed, counts.projected, counts.steps, counts.rotated) == (16, 8, 8, 2)
    # Clipping divides by the norm plus 1e-6, and projecting only shrinks.
    assert max(counts.gradient_norms) <= 0.05 * (1 + 1e-5)


def test_bf16(tmp_path: Path) -> None:
    """D4: single-precision state and the same acts under the Trainer's autocast."""
    with scripts.counting() as counts:
        network = train(tmp_path, "all", 2, bf16=True)
    assert (counts.fed, counts.projected, counts.rotated) == (16, 16, 2)
    assert counts.trackers[0].mean.dtype == torch.float32
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_evaluation_within_training_feeds_nothing(tmp_path: Path) -> None:
    """C10: `compute_loss` runs for evaluation too, where there are no features to read and none to take in."""
    want = train(tmp_path, "all", 2)
    with scripts.counting() as counts:
        got = train(tmp_path, "all", 2, eval_strategy="epoch")
    assert counts.fed == 16
    assert scripts.same_weights(got, want)


def test_a_plain_checkpoint_goes_on_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C12: the Trainer loads what there is; without means every class is unseen, and training goes on finite."""
    from digits import Network

    # To report keys that are missing, the Trainer reads an attribute that every PreTrainedModel has.
    monkeypatch.setattr(Network, "_keys_to_ignore_on_save", None, raising=False)
    train(tmp_path, "all", 2, module=scripts.plain("hf_trainer"), save_strategy="epoch")
    with scripts.counting() as counts:
        network = train(tmp_path, "all", 2, resume_from_checkpoint=tmp_path / "checkpoint-8")
    assert counts.seen_at_first == [0]
    assert (counts.steps, counts.slerps[0].last_step) == (8, 2)
    assert all(torch.isfinite(p).all() for p in network.parameters())
