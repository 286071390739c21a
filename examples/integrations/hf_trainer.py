#!/usr/bin/env python3
"""Hugging Face Trainer: a term in `compute_loss`, a callback, a wrapped optimizer.

    pip install transformers accelerate scikit-learn
    python examples/integrations/hf_trainer.py

Lines marked `# +` are what a user adds. Besides imports, constructors and a class's
head:

      loss = F.cross_entropy(logits, labels)
    + loss = loss + 0.3 * self.model.spareg(self.features(), labels) if model.training else loss

    + class SlerpCallback(spalign.SpASlerp, TrainerCallback):
    +     def on_step_end(self, args, state, control, **kwargs):
    +         self.step() if state.epoch.is_integer() else None

The Trainer saves model, optimizer, scheduler and random numbers, but no loss: as the model's attribute the loss term
rides in its checkpoints. The rotation's schedule follows from the epoch, which the Trainer restores.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from digits import BATCH_SIZE, Network, Strengths, compare, digits
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import spalign  # +


class ImageTrainer(Trainer):
    """A Trainer with a loss of its own."""

    strengths: Strengths

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch, and the logits if they are asked for."""
        logits, labels, lam = model(inputs["images"]), inputs["labels"], self.strengths.lam
        loss = F.cross_entropy(logits, labels)
        loss = loss + lam * self.model.spareg(self.features(), labels) if model.training else loss  # +
        return (loss, {"logits": logits}) if return_outputs else loss


class SlerpCallback(spalign.SpASlerp, TrainerCallback):  # +
    """Rotates at the last step of each epoch, before any checkpoint of it is written."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Rotate; at `on_epoch_end` the checkpoint of the last step is written already (`save_strategy="steps"`)."""
        self.step() if state.epoch.is_integer() else None

    def on_train_begin(  # to resume
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on where the checkpoint was: one rotation per epoch."""
        self.load_state_dict({"last_step": int(state.epoch or 0)})


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return a batch."""
    images, labels = zip(*samples, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


def train(strengths: Strengths, epochs: int, *, resume_from_checkpoint: str | None = None, **options: Any) -> Network:
    """Train, perhaps on from a checkpoint; `options` are TrainingArguments'."""
    network = Network()
    options = {"output_dir": tempfile.gettempdir(), "save_strategy": "no", "disable_tqdm": True, **options}
    arguments = TrainingArguments(
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH_SIZE,
        dataloader_drop_last=True,
        learning_rate=0.01,
        weight_decay=5e-4,
        label_names=["labels"],
        report_to="none",
        **options,
    )
    network.spareg = spalign.SpARegLoss(network.fc)  # +
    callbacks: list[TrainerCallback] = []
    callbacks += [  # +
        SlerpCallback(
            network.fc, network.spareg.tracker, total_steps=epochs, alpha_max=strengths.alpha_max, threshold=0.95
        )
    ]
    train_set, test_set = digits()
    trainer = ImageTrainer(
        network,
        arguments,
        data_collator=collate,
        train_dataset=train_set,
        eval_dataset=test_set,
        callbacks=callbacks,
    )
    trainer.strengths = strengths
    trainer.features = spalign.FeatureCapture(network.fc)  # +
    trainer.optimizer = spalign.SpAProj(  # +
        trainer.create_optimizer(), network.fc, network.spareg.tracker, gamma=strengths.gamma
    )
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return network


if __name__ == "__main__":
    compare(__doc__, train)
