#!/usr/bin/env python3
"""Lightning, automatic optimization: a loss term, a callback, a wrapped optimizer.

    pip install lightning scikit-learn
    python examples/integrations/lightning_callback.py

Lines marked `# +` are what a user adds. Besides imports, constructors and a class's
head:

          loss = F.cross_entropy(self.network(images), labels)
    +     loss = loss + 0.3 * self.spareg(self.features(), labels)

    + class SlerpCallback(spalign.SpASlerp, L.Callback):
    +     def on_train_epoch_end(self, trainer, pl_module):
    +         self.step()

As the module's attribute the loss term follows it to its device, and the class means ride in its checkpoints. The
callback is SpASlerp itself, so its `state_dict()` rides along as any callback's does.
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
    """The network, its loss and its optimizer."""

    def __init__(self, strengths: Strengths, epochs: int) -> None:
        super().__init__()
        self.strengths, self.epochs = strengths, epochs
        self.network = Network()
        self.spareg = spalign.SpARegLoss(self.network.fc)  # +
        self.features = spalign.FeatureCapture(self.network.fc)  # +

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        """Return the loss of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        loss = loss + self.strengths.lam * self.spareg(self.features(), labels)  # +
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule."""
        optimizer: torch.optim.Optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        optimizer = spalign.SpAProj(optimizer, self.network.fc, self.spareg.tracker, gamma=self.strengths.gamma)  # +
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


class SlerpCallback(spalign.SpASlerp, L.Callback):  # +
    """Rotates once per epoch, right before the epoch's checkpoint is written."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rotate."""
        self.step()


def train(strengths: Strengths, epochs: int, *, ckpt_path: str | None = None, **options: Any) -> Network:
    """Train, perhaps on from a checkpoint; `options` are the trainer's."""
    module = Classifier(strengths, epochs)
    options = {"logger": False, "enable_checkpointing": False, **options}
    network = module.network
    callbacks = options.pop("callbacks", [])
    callbacks += [  # +
        SlerpCallback(
            network.fc, module.spareg.tracker, total_steps=epochs, alpha_max=strengths.alpha_max, threshold=0.95
        )
    ]
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, **options)
    trainer.fit(module, train_loader(), ckpt_path=ckpt_path)
    return network


if __name__ == "__main__":
    compare(__doc__, train)
