"""What the scripts of this folder share: long-tailed digits, a small network, the strategies' strengths, a report.

Nothing here is needed to use spalign: copy from the scripts beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spalign

NUM_CLASSES, FEATURE_DIM, N_TEST, BATCH_SIZE = 10, 64, 70, 32  # N_TEST: test images per class
COUNTS = (100, 64, 41, 27, 17, 11, 7, 4, 3, 2)  # training images per class, imbalance 50


class Strengths(NamedTuple):
    """How strongly each strategy acts. These are strong, so that a short run shows it; the defaults are milder."""

    lam: float = 1.0  # weight of SpARegLoss beside cross-entropy
    alpha_max: float = 0.2  # SpASlerp: largest share of the angle that a row is rotated by
    gamma: float = 0.5  # SpAProj: share of the original gradient that is mixed back in


ALIGNED = Strengths()
PLAIN = Strengths(lam=0.0, alpha_max=0.0, gamma=1.0)  # bit for bit the script without its lines marked +


class Network(nn.Module):
    """Three convolutions and a classifier; returns logits alone, as most models do."""

    def __init__(self) -> None:
        super().__init__()

        def conv(in_planes: int, planes: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(in_planes, planes, 3, stride, padding=1), nn.BatchNorm2d(planes), nn.ReLU()]

        layers = [*conv(1, 16, 1), *conv(16, 32, 2), *conv(32, FEATURE_DIM, 2), nn.AvgPool2d(2), nn.Flatten()]
        self.backbone = nn.Sequential(*layers)
        self.fc = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.fc(self.backbone(images))
        return logits


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return a long-tailed training set and a balanced test set of real handwritten digits, (N, 1, 8, 8) and (N,)."""
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    of_class = [(y == c).nonzero()[:, 0] for c in range(NUM_CLASSES)]
    test = torch.cat([i[:N_TEST] for i in of_class])
    train = torch.cat([i[N_TEST : N_TEST + n] for i, n in zip(of_class, COUNTS, strict=True)])
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def train_loader(*, shuffle: bool = True) -> DataLoader[tuple[Tensor, ...]]:
    """Return the training set in 8 batches per epoch, all of one size."""
    return DataLoader(digits()[0], batch_size=BATCH_SIZE, shuffle=shuffle, drop_last=True)


@torch.no_grad()
def evaluate(network: Network) -> tuple[float, float]:
    """Return test accuracy in percent, and alignment: the mean cosine between rows and centred class means."""
    (x_train, y_train), (x_test, y_test) = (part.tensors for part in digits())
    network.cpu().eval()
    accuracy = 100.0 * (network(x_test).argmax(1) == y_test).float().mean().item()
    tracker = spalign.ClassMeanTracker.for_classifier(network.fc, momentum=None)
    tracker.update(network.backbone(x_train), y_train)
    return accuracy, spalign.functional.alignment(network.fc.weight, tracker.mean, tracker.seen).mean().item()


def compare(description: str | None, train: Callable[[Strengths, int], Network], epochs: int = 20) -> None:
    """Train plain and aligned from the same seed for `--epochs`, and print accuracy and alignment of both."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=epochs, help="default %(default)s")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs is {args.epochs}, expected at least 1")
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    rows = []
    for name, strengths in (("plain", PLAIN), ("aligned", ALIGNED)):
        torch.manual_seed(0)
        accuracy, alignment = evaluate(train(strengths, args.epochs))
        rows.append(f"{name:8}{accuracy:10.1f} %{alignment:12.3f}")
    print(f"{'':8}{'accuracy':>12}{'alignment':>12}", *rows, sep="\n")
    print("One run each: a few points of accuracy are noise. examples/quickstart.py averages over seeds.")
