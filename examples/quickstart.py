#!/usr/bin/env python3
"""Train a small network on long-tailed digits, plain and with each of the three alignment strategies.

    python examples/quickstart.py

Needs no download and about a minute on a CPU. Prints accuracy (all, many, medium, few) and alignment, which is the mean
cosine between classifier rows and centred class means, and saves a figure of both over training.
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import spalign

mpl.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

VARIANTS = ("plain", "+Reg", "+SLERP", "+Proj")
N_MAX, IMBALANCE, NUM_TEST = 100, 50, 70  # training images of the largest class, largest / smallest, test images per class
COUNTS = [int(N_MAX * (1 / IMBALANCE) ** (c / 9)) for c in range(10)]  # 100, 64, 41, 27, 17, 11, 7, 4, 3, 2
GROUPS = {"many": range(0, 3), "medium": range(3, 6), "few": range(6, 10)}  # over 30, 10 to 30, under 10 images
LAMBDA = 1.0  # weight of the loss term beside cross-entropy
ALPHA_MAX, THRESHOLD = 0.1, 0.95  # rotate rows with a cosine under 0.95 by up to a tenth of the angle, once per epoch
GAMMA = 0.5  # share of the original gradient that the projection keeps


def split_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels (long-tailed), test images and labels (balanced), disjoint; images (N, 64)."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = [torch.nonzero(y == c)[:, 0] for c in range(10)]
    order = [i[torch.randperm(len(i), generator=generator)] for i in order]
    test = torch.cat([i[:NUM_TEST] for i in order])
    train = torch.cat([i[NUM_TEST:][:n] for i, n in zip(order, COUNTS, strict=True)])
    return x[train], y[train], x[test], y[test]


def train(variant: str, seed: int, epochs: int, bar: "tqdm[None]") -> Tensor:
    """Train one network; return accuracy in percent (all, many, medium, few) and alignment after each epoch, (E, 5)."""
    x_train, y_train, x_test, y_test = split_digits(seed)
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    classifier = nn.Linear(64, 10)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        [*backbone.parameters(), *classifier.parameters()], lr=0.1, momentum=0.9, weight_decay=5e-4
    )

    # Every strategy reads the running class means, which the tracker holds. One constructor each:
    tracker = spalign.ClassMeanTracker.for_classifier(classifier)
    spareg = spalign.SpARegLoss(classifier, tracker)
    slerp = spalign.SpASlerp(classifier, tracker, total_steps=epochs, alpha_max=ALPHA_MAX, threshold=THRESHOLD)
    if variant == "+Proj":
        optimizer = spalign.SpAProj(optimizer, classifier, tracker, gamma=GAMMA)  # +Proj: the one line

    history = []
    for _ in range(epochs):
        for batch in torch.randperm(len(y_train)).split(64):
            features, labels = backbone(x_train[batch]), y_train[batch]
            loss = F.cross_entropy(classifier(features), labels)
            if variant == "+Reg":
                loss = loss + LAMBDA * spareg(features, labels)  # +Reg: the one line; feeds the tracker
            else:
                tracker.update(features, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if variant == "+SLERP":
            slerp.step()  # +SLERP: the one line, once per epoch

        with torch.no_grad():
            correct = (classifier(backbone(x_test)).argmax(1) == y_test).float() * 100
            alignment = spalign.functional.alignment(classifier.weight, tracker.mean, tracker.seen).mean()
        by_class = correct.view(10, NUM_TEST).mean(1)
        groups = [by_class[list(group)].mean() for group in GROUPS.values()]
        history.append(torch.stack([correct.mean(), *groups, alignment]))
        bar.update()
    return torch.stack(history)
