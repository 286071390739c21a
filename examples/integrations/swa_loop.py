#!/usr/bin/env python3
"""torch.optim.swa_utils: weights averaged over the last epochs, SWALR, BatchNorm statistics re-estimated.

    pip install scikit-learn
    python examples/integrations/swa_loop.py

Lines marked `# +` are what a user adds. Besides imports and constructors:

      loss = F.cross_entropy(network(images), labels)
    + loss = loss + 0.3 * spareg(features(), labels)
      ...
    + slerp.step()
      if epoch >= swa_start:
          averaged.update_parameters(network)

Rotate before averaging. AveragedModel copies the network and the capture in it, and `update_bn` runs without gradients:
neither feeds the class means of the training.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from digits import Network, Strengths, compare, train_loader
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

import spalign  # +


def train(strengths: Strengths, epochs: int) -> Network:
    """Train and return the averaged network."""
    network, loader = Network(), train_loader()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    spareg = spalign.SpARegLoss(network.fc)  # +
    features = spalign.FeatureCapture(network.fc)  # +
    slerp = spalign.SpASlerp(  # +
        network.fc, spareg.tracker, total_steps=epochs, alpha_max=strengths.alpha_max, threshold=0.95
    )
    optimizer = spalign.SpAProj(optimizer, network.fc, spareg.tracker, gamma=strengths.gamma)  # +
    averaged = AveragedModel(network)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    swa_scheduler, swa_start = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2), epochs // 2
    for epoch in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(network(images), labels)
            loss = loss + strengths.lam * spareg(features(), labels)  # +
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        slerp.step()  # +
        if epoch >= swa_start:
            averaged.update_parameters(network)
            swa_scheduler.step()
        else:
            scheduler.step()
    update_bn(loader, averaged)
    return cast(Network, averaged.module)


if __name__ == "__main__":
    compare(__doc__, train)
