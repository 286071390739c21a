#!/usr/bin/env python3
"""Lightning, manual optimization: the three strategies in `training_step`.

    pip install lightning scikit-learn
    python examples/integrations/lightning_manual.py

Lines marked `# +` are what a user adds. Besides imports and constructors:

          loss = F.cross_entropy(self.network(images), labels)
    +     loss = loss + 0.3 * self.spareg(self.features(), labels)
          ...
          if self.trainer.is_last_batch:
              self.lr_schedulers().step()
    +         self.slerp.step()

Two one-line hooks more keep the rotation's schedule in checkpoints; the class means ride there without any.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from digits import Network, Strengths, compare, train_loader
from torch import Tensor

import spalign  # +


class Classifier(L.LightningModule):
    """The network and its training."""

    def __init__(self, strengths: Strengths, epochs: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strengths, self.epochs = strengths, epochs
        self.network = Network()
        self.spareg = spalign.SpARegLoss(self.network.fc)  # +
        self.features = spalign.FeatureCapture(self.network.fc)  # +
        self.slerp = spalign.SpASlerp(  # +
            self.network.fc, self.spareg.tracker, total_steps=epochs, alpha_max=strengths.alpha_max, threshold=0.95
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Train on a batch."""
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        loss = loss + self.strengths.lam * self.spareg(self.features(), labels)  # +
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=5.0, gradient_clip_algorithm="norm")
        optimizer.step()
        if self.trainer.is_last_batch:
            scheduler: Any = self.lr_schedulers()
            scheduler.step()
            self.slerp.step()  # +

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule."""
        optimizer: torch.optim.Optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        optimizer = spalign.SpAProj(optimizer, self.network.fc, self.spareg.tracker, gamma=self.strengths.gamma)  # +
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what is not a module."""
        checkpoint["slerp"] = self.slerp.state_dict()  # + to resume

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what is not a module."""
        self.slerp.load_state_dict(checkpoint["slerp"])  # + to resume


def train(strengths: Strengths, epochs: int, *, ckpt_path: str | None = None, **options: Any) -> Network:
    """Train, perhaps on from a checkpoint; `options` are the trainer's."""
    module = Classifier(strengths, epochs)
    options = {"logger": False, "enable_checkpointing": False, **options}
    trainer = L.Trainer(max_epochs=epochs, **options)
    trainer.fit(module, train_loader(), ckpt_path=ckpt_path)
    return module.network


if __name__ == "__main__":
    compare(__doc__, train)
