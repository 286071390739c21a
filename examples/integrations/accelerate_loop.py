#!/usr/bin/env python3
"""Accelerate: the plain loop, with the strategies built before `prepare`.

    pip install accelerate scikit-learn
    python examples/integrations/accelerate_loop.py

Lines marked `# +` are what a user adds. Besides imports and constructors:

    + accelerator.register_for_checkpointing(spareg, slerp)
      for epoch in range(epochs):
          for images, labels in loader:
              loss = F.cross_entropy(model(images), labels)
    +         loss = loss + 0.3 * spareg(features(), labels)
              ...
    +     slerp.step()

Wrap the optimizer before `prepare`, and prepare what the wrapper returned: AcceleratedOptimizer then decides when to
step, so projection happens once per optimizer step, after accumulation, unscaling and clipping.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from digits import Network, Strengths, compare, train_loader

import spalign  # +


def train(
    strengths: Strengths, epochs: int, *, folder: Path | None = None, resume: int = 0, clip: float = 5.0, **options: Any
) -> Network:
    """Train, saving each epoch in a folder if there is one, or on from one of those; `options` are Accelerator's."""
    accelerator = Accelerator(**options)
    network, loader = Network(), train_loader()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    spareg = spalign.SpARegLoss(network.fc).to(accelerator.device)  # +
    features = spalign.FeatureCapture(network.fc)  # +
    slerp = spalign.SpASlerp(  # +
        network.fc, spareg.tracker, total_steps=epochs, alpha_max=strengths.alpha_max, threshold=0.95
    )
    optimizer = spalign.SpAProj(optimizer, network.fc, spareg.tracker, gamma=strengths.gamma)  # +
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model, optimizer, loader, scheduler = accelerator.prepare(network, optimizer, loader, scheduler)
    accelerator.register_for_checkpointing(spareg, slerp)  # +
    if folder is not None and resume:
        accelerator.load_state(str(folder / f"epoch-{resume}"))

    for epoch in range(resume, epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                loss = loss + strengths.lam * spareg(features(), labels)  # +
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        slerp.step()  # +
        if folder is not None:
            accelerator.save_state(str(folder / f"epoch-{epoch + 1}"))
    return network


if __name__ == "__main__":
    compare(__doc__, train)
