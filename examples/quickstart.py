#!/usr/bin/env python3
"""Train a small network on long-tailed digits, plain and with each of the three alignment strategies.

    python examples/quickstart.py

No download, about a minute on a CPU. Prints test accuracy after the last epoch (all, many, medium, few) and alignment,
the mean cosine between classifier rows and centred class means, and saves a figure of both over training.

Shapes: S seeds, E epochs, 5 measures (accuracy all, many, medium, few in percent; alignment).
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import spalign

mpl.use("Agg")
from matplotlib import pyplot as plt

COLORS = {"plain": "black", "+Reg": "#0072b2", "+SLERP": "#d55e00", "+Proj": "#009e73"}
N_TEST, N_MAX, IMBALANCE = 70, 100, 50  # images per class: test, largest in training, largest over smallest in training
COUNTS = [int(N_MAX * (1 / IMBALANCE) ** (c / 9)) for c in range(10)]  # 100, 64, 41, 27, 17, 11, 7, 4, 3, 2
GROUPS = {"many": slice(0, 3), "medium": slice(3, 6), "few": slice(6, 10)}  # over 30, 10 to 30, under 10 images
# Strong settings, so that it shows what each does to alignment; the library's defaults are milder.
LAMBDA = 1.0  # +Reg: weight of its term beside cross-entropy
ALPHA_MAX, THRESHOLD = 0.1, 0.95  # +SLERP: rotate rows whose cosine is under 0.95, by up to a tenth of the angle
GAMMA = 0.5  # +Proj: share of the original gradient that is mixed back in


def long_tailed_digits(seed: int) -> tuple[TensorDataset, Tensor, Tensor]:
    """Return a long-tailed training set, and test images (N, 1, 8, 8) and labels, balanced and sorted by class."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    rng = torch.Generator().manual_seed(seed)
    of_class = [(y == c).nonzero()[:, 0] for c in range(10)]
    of_class = [i[torch.randperm(len(i), generator=rng)] for i in of_class]
    test = torch.cat([i[:N_TEST] for i in of_class])
    train = torch.cat([i[N_TEST : N_TEST + n] for i, n in zip(of_class, COUNTS, strict=True)])
    return TensorDataset(x[train], y[train]), x[test], y[test]


def conv(in_planes: int, planes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_planes, planes, 3, stride, padding=1), nn.BatchNorm2d(planes), nn.ReLU())


def train(variant: str, seed: int, epochs: int, progress: tqdm) -> Tensor:  # type: ignore[type-arg]
    """Train one network and return the measures after each epoch, (E, 5)."""
    train_set, x_test, y_test = long_tailed_digits(seed)
    torch.manual_seed(seed)
    loader = DataLoader(train_set, batch_size=64, shuffle=True)
    backbone = nn.Sequential(conv(1, 16, 1), conv(16, 32, 2), conv(32, 64, 2), nn.AvgPool2d(2), nn.Flatten())
    fc = nn.Linear(64, 10)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        [*backbone.parameters(), *fc.parameters()], lr=0.1, momentum=0.9, weight_decay=5e-4
    )

    tracker = spalign.ClassMeanTracker.for_classifier(fc)  # running class means, which the strategies share
    spareg = spalign.SpARegLoss(fc, tracker)  # +Reg: the constructor
    slerp = spalign.SpASlerp(fc, tracker, total_steps=epochs, alpha_max=ALPHA_MAX, threshold=THRESHOLD)  # +SLERP: again
    if variant == "+Proj":
        optimizer = spalign.SpAProj(optimizer, fc, tracker, gamma=GAMMA)  # +Proj: the constructor is all
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    history = []
    for _ in range(epochs):
        backbone.train()
        for images, labels in loader:
            features = backbone(images)
            loss = F.cross_entropy(fc(features), labels)
            if variant == "+Reg":
                loss = loss + LAMBDA * spareg(features, labels)  # +Reg: the line; it feeds the tracker as well
            else:
                tracker.update(features, labels)  # else feed the tracker, once per batch
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        if variant == "+SLERP":
            slerp.step()  # +SLERP: the line, once per epoch

        backbone.eval()
        with torch.no_grad():
            right = 100.0 * (fc(backbone(x_test)).argmax(1) == y_test).float().view(10, N_TEST).mean(1)
            alignment = spalign.functional.alignment(fc.weight, tracker.mean, tracker.seen).mean()
        history.append(torch.stack([right.mean(), *(right[group].mean() for group in GROUPS.values()), alignment]))
        progress.update()
    return torch.stack(history)


def mean_and_spread(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over the first dimension, the seeds (0 for a single one)."""
    return values.mean(0), values.std(0, correction=min(1, len(values) - 1))


def print_table(results: dict[str, Tensor]) -> None:
    """Print the last epoch of (S, E, 5) results, and the difference to plain with seeds paired."""
    formats = ("{:.1f} ± {:.1f}",) * 4 + ("{:.3f} ± {:.3f}", "{:+.1f} ± {:.1f}")
    print(" " * 6 + "".join(f"{name:>16}" for name in ("all", *GROUPS, "alignment", "all - plain")))
    for variant, result in results.items():
        last = torch.cat([result[:, -1], (result - results["plain"])[:, -1, :1]], 1)
        cells = [f.format(m, s) for f, m, s in zip(formats, *mean_and_spread(last), strict=True)]
        print(f"{variant:6}" + "".join(f"{cell:>16}" for cell in cells))


def save_figure(results: dict[str, Tensor], path: Path) -> None:
    """Plot accuracy and alignment by epoch: mean over seeds, band of one standard deviation."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    panels = ((axes[0], 0, "test accuracy, all classes (%)"), (axes[1], 4, "alignment (mean cosine)"))
    for axis, measure, label in panels:
        for variant, result in results.items():
            mean, spread = mean_and_spread(result[:, :, measure])
            epoch = range(1, len(mean) + 1)
            axis.plot(epoch, mean, color=COLORS[variant], label=variant, marker="." if len(mean) == 1 else "")
            axis.fill_between(epoch, mean - spread, mean + spread, color=COLORS[variant], alpha=0.15, linewidth=0)
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="default %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each variant, default %(default)s")
    parser.add_argument("--output", type=Path, default=Path("quickstart.png"), help="figure, default %(default)s")
    args = parser.parse_args()
    for name, value in (("epochs", args.epochs), ("seeds", args.seeds)):
        if value < 1:
            parser.error(f"--{name} is {value}, expected at least 1")
    if args.output.suffix not in (".png", ".pdf", ".svg") or not args.output.parent.is_dir():
        parser.error(f"--output is {args.output}, expected a .png, .pdf or .svg file in a folder that exists")

    torch.set_num_threads(1)  # tensors this small gain nothing from more
    results = {}
    with tqdm(total=len(COLORS) * args.seeds * args.epochs, unit="epoch") as progress:
        for variant in COLORS:
            progress.set_description(variant)
            results[variant] = torch.stack([train(variant, s, args.epochs, progress) for s in range(args.seeds)])
    print(f"Accuracy (%) and alignment after epoch {args.epochs}, mean ± standard deviation over {args.seeds} seeds;")
    print("many: over 30 training images, medium: 10 to 30, few: under 10; last column: seeds paired.\n")
    print_table(results)
    save_figure(results, args.output)
    print(f"\nFigure: {args.output}")
    print("Every strategy is built to raise alignment; accuracy need not follow, and a difference within its spread is")
    print("noise. What longer runs on images gained, and what they did not: docs/results.md.")


if __name__ == "__main__":
    main()
