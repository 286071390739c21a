#!/usr/bin/env python3
"""A plain loop whose step is captured as a CUDA graph and replayed: forward, loss term, backward, projection, update.

    pip install scikit-learn
    python examples/integrations/cuda_graph_loop.py     # needs a GPU

Lines marked `# +` are what a user adds. Besides imports and constructors:

      loss = F.cross_entropy(network(images), labels)
    + loss = loss + 0.3 * spareg(features(), labels)
      ...
    + slerp.step()                                              # between replays, once per epoch

No call waits for the device and all state is written in place, so a replay reads the means and rows of the moment. What
is a Python number (the strengths, a learning rate that is no tensor) stays as it was captured.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from digits import BATCH_SIZE, Network, Strengths, compare, train_loader

import spalign  # +

WARM_UP_STEPS = 3  # ordinary steps before the capture, in which libraries choose their kernels


def train(strengths: Strengths, epochs: int, *, device: str = "cuda", capture: bool = True) -> Network:
    """Train; without `capture` step by step, on any device."""
    network, loader = Network().to(device), train_loader()
    lr = torch.tensor(0.1, device=device)  # a tensor: a schedule may write into it
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=True
    )
    spareg = spalign.SpARegLoss(network.fc)  # +
    features = spalign.FeatureCapture(network.fc)  # +
    slerp = spalign.SpASlerp(  # +
        network.fc, spareg.tracker, total_steps=epochs, alpha_max=strengths.alpha_max, threshold=0.95
    )
    optimizer = spalign.SpAProj(optimizer, network.fc, spareg.tracker, gamma=strengths.gamma)  # +
    images = torch.zeros(BATCH_SIZE, 1, 8, 8, device=device)  # each batch is copied to where the graph reads it
    labels = torch.zeros(BATCH_SIZE, dtype=torch.int64, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(network(images), labels)
        loss = loss + strengths.lam * spareg(features(), labels)  # +
        loss.backward()
        optimizer.step()

    graph, taken = torch.cuda.CUDAGraph() if capture else None, 0
    for epoch in range(epochs):
        for batch in loader:
            images.copy_(batch[0])
            labels.copy_(batch[1])
            if graph is None:
                step()
            elif taken < WARM_UP_STEPS:
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    step()
                torch.cuda.current_stream().wait_stream(stream)
            else:
                if taken == WARM_UP_STEPS:
                    optimizer.zero_grad(set_to_none=True)
                    with torch.cuda.graph(graph):  # records without running
                        step()
                graph.replay()
            taken += 1
        slerp.step()  # +
        lr.fill_(0.1 * (1 - (epoch + 1) / epochs))
    return network


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("cuda_graph_loop.py needs a CUDA device, and torch sees none; the other scripts here run on a CPU")
    compare(__doc__, train)
