#!/usr/bin/env python3
"""timm: its optimizer factory, schedule, Mixup with soft labels, loss and EMA.

    pip install timm scikit-learn
    python examples/integrations/timm_loop.py

Lines marked `# +` are what a user adds. Besides imports and constructors:

      images, labels = mixup(images, labels)                    # (N, 10) soft labels
      loss = criterion(model(images), labels)
    + loss = loss + 0.3 * spareg(features(), labels)            # takes them as they are
      ...
      scheduler.step(epoch + 1)
    + slerp.step()

A mixed image counts for both of its classes by weight; what label smoothing spreads over every class is ignored. The
loss term lives beside the model, so ModelEmaV3 has nothing to average there.
"""

from __future__ import annotations

from typing import cast

from digits import NUM_CLASSES, Network, Strengths, compare, train_loader
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import spalign  # +


def train(
    strengths: Strengths, epochs: int, *, opt: str = "momentum", lr: float = 0.1, smoothing: float = 0.1
) -> Network:
    """Train and return the averaged network; `opt` is any name that timm knows."""
    network = Network()
    ema = ModelEmaV3(network, decay=0.9)
    optimizer = create_optimizer_v2(network, opt=opt, lr=lr, weight_decay=5e-4)
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=smoothing, num_classes=NUM_CLASSES)
    criterion = SoftTargetCrossEntropy()
    spareg = spalign.SpARegLoss(network.fc)  # +
    features = spalign.FeatureCapture(network.fc)  # +
    slerp = spalign.SpASlerp(  # +
        network.fc, spareg.tracker, total_steps=epochs, alpha_max=strengths.alpha_max, threshold=0.95
    )
    optimizer = spalign.SpAProj(optimizer, network.fc, spareg.tracker, gamma=strengths.gamma)  # +
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs)
    loader = train_loader()
    for epoch in range(epochs):
        for images, labels in loader:
            images, labels = mixup(images, labels)
            loss = criterion(network(images), labels)
            loss = loss + strengths.lam * spareg(features(), labels)  # +
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(network)
        scheduler.step(epoch + 1)
        slerp.step()  # +
    return cast(Network, ema.module)


if __name__ == "__main__":
    compare(__doc__, train)
