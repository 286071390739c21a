#!/usr/bin/env python3
"""Draw the figures of *Space Alignment Matters* from your own runs, and its toy example and theory from nothing.

    python examples/figures.py curves CE=runs/ce +Reg=runs/reg          # Figures 1(a) and 4
    python examples/figures.py groups "IF 100=runs/100" "IF 200=runs/200"   # Figure 2
    python examples/figures.py sphere                                   # Figure 3, trains for seconds
    python examples/figures.py exponents                                # Eq. 14

FOLDER is an output folder of `cifar_lt.py` or `imagenet_lt.py`, finished or not. Folders of one name are its seeds: the
line is their mean and the band one standard deviation, over the epochs that all have. For the misaligned model of
Figure 1(a) train with a negative weight, `cifar_lt.py --spareg -0.5`.

Shapes: C classes, D dimensions, E epochs, S seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spalign
from spalign import theory

mpl.use("Agg")
from matplotlib import pyplot as plt

GROUPS = ("many", "medium", "few")
COUNTS = (400, 100, 25, 6)  # training samples of the toy example's classes
SNAPSHOTS = (0, 10, 50, 200)  # its epochs that are drawn

Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # by measure: epochs (E,) and values (S, E)


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's epochs.

    Raises:
        ValueError: there are none, or a line is no record.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} holds no metrics.jsonl; expected an output folder of cifar_lt.py or imagenet_lt.py")
    records: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # the run is writing it
    try:
        records.extend(json.loads(line) for line in lines)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {len(records) + 1}, is no record of an epoch: {error}; remove it") from None
    if not records:
        raise ValueError(f"{path} is empty: the run has not finished an epoch yet; train on, or leave it out")
    return records


def measure(record: dict[str, Any], name: str) -> float | None:
    """Return `accuracy/all` and the like of one epoch; None where it was not evaluated."""
    kind, group = name.split("/")
    value = (record.get(kind) or {}).get(group)
    return None if value is None else float(value)


def curves_of(folders: Sequence[Path], measures: Sequence[str]) -> Curves:
    """Return each measure over the epochs that all runs have it of.

    Raises:
        ValueError: as `read_run`, or the runs share no epoch.
    """
    runs = [{record["epoch"]: record for record in read_run(folder)} for folder in folders]
    curves: Curves = {}
    for name in measures:
        values = [{epoch: v for epoch, r in run.items() if (v := measure(r, name)) is not None} for run in runs]
        epochs = sorted(set.intersection(*(set(run) for run in values)))
        if not epochs:
            where = ", ".join(str(folder) for folder in folders)
            raise ValueError(f"no epoch has {name} in all of {where}; train on, or leave one out")
        curves[name] = np.array(epochs), np.array([[run[epoch] for epoch in epochs] for run in values])
    return curves


def named_folders(pairs: Sequence[str]) -> dict[str, list[Path]]:
    """Return the folders of each name, in the order given.

    Raises:
        ValueError: a pair is not NAME=FOLDER.
    """
    named: dict[str, list[Path]] = {}
    for pair in pairs:
        name, equals, folder = pair.rpartition("=")
        if not (name and equals and folder):
            raise ValueError(f"{pair!r} is not NAME=FOLDER; write for example CE=runs/ce")
        named.setdefault(name, []).append(Path(folder))
    return named


def plot(axis: Any, epochs: np.ndarray, values_SE: np.ndarray, **how: Any) -> None:
    """Draw the mean over seeds, and a band of one standard deviation where there are several."""
    mean = values_SE.mean(0)
    (line,) = axis.plot(epochs, mean, marker="." if len(epochs) == 1 else "", linewidth=1.4, **how)
    if len(values_SE) > 1:
        spread = values_SE.std(0, ddof=1)
        axis.fill_between(epochs, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, linewidth=0)


def draw_curves(named: dict[str, list[Path]]) -> Any:
    """Draw accuracy and alignment by epoch, a line a name, and print the last values."""
    panels = {"accuracy/all": "accuracy (%)", "alignment/all": "alignment (mean cosine)"}
    curves = {name: curves_of(folders, list(panels)) for name, folders in named.items()}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (name_of_measure, label) in zip(axes, panels.items(), strict=True):
        for name, measured in curves.items():
            plot(axis, *measured[name_of_measure], label=name)
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right", fontsize="small")
    print(f"{'':24}{'accuracy (%)':>16}{'alignment':>16}   after epoch")
    for name, measured in curves.items():
        cells = []
        for key, digits in (("accuracy/all", 2), ("alignment/all", 3)):
            last_S = measured[key][1][:, -1]
            spread = f" ± {last_S.std(ddof=1):.{digits}f}" if len(last_S) > 1 else ""
            cells.append(f"{last_S.mean():.{digits}f}{spread}")
        print(f"{name:24}{cells[0]:>16}{cells[1]:>16}   {measured['accuracy/all'][0][-1]}")
    return figure


def draw_groups(named: dict[str, list[Path]]) -> Any:
    """Draw the alignment of many-, medium- and few-shot classes by epoch, a panel a name."""
    measures = [f"alignment/{group}" for group in GROUPS]
    curves = {name: curves_of(folders, measures) for name, folders in named.items()}
    figure, axes = plt.subplots(
        1, len(curves), figsize=(4.5 * len(curves), 3.6), layout="constrained", squeeze=False, sharey=True
    )
    for axis, (name, measured) in zip(axes[0], curves.items(), strict=True):
        for group, key in zip(GROUPS, measures, strict=True):
            plot(axis, *measured[key], label=group)
        axis.set(xlabel="epoch", title=name)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("alignment (mean cosine)")
    axes[0][0].legend(loc="lower right", fontsize="small")
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# The toy example
# ----------------------------------------------------------------------------------------------------------------------


def train_toy(weight: float, seed: int, epochs: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Train three features for four long-tailed classes with `weight` of SpA-Reg.

    Returns:
        of each epoch asked for the unit rows and unit centred class means, (C, D) each.
    """
    rng = torch.Generator().manual_seed(seed)
    centers_CD = torch.randn(len(COUNTS), 8, generator=rng)
    y = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    x = centers_CD[y] + 0.7 * torch.randn(len(y), 8, generator=rng)
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    fc = nn.Linear(3, len(COUNTS))
    optimizer = torch.optim.SGD([*backbone.parameters(), *fc.parameters()], lr=0.05, momentum=0.9, weight_decay=5e-4)
    spareg = spalign.SpARegLoss(fc)
    snapshots = {}
    for epoch in range(max(epochs) + 1):
        if epoch in epochs:
            exact = spalign.ClassMeanTracker.for_classifier(fc, momentum=None)
            with torch.no_grad():
                exact.update(backbone(x), y)
                snapshots[epoch] = F.normalize(fc.weight, dim=1).clone(), exact.directions()
        for batch in torch.randperm(len(y), generator=rng).split(64):
            h = backbone(x[batch])
            loss = F.cross_entropy(fc(h), y[batch]) + weight * spareg(h, y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return snapshots


def draw_sphere(weight: float, seed: int) -> Any:
    """Draw rows (red) and class means (black) on the sphere as training goes on, without and with SpA-Reg."""
    figure = plt.figure(figsize=(2.6 * len(SNAPSHOTS), 5.6), layout="constrained")
    u, v = np.meshgrid(np.linspace(0, 2 * math.pi, 25), np.linspace(0, math.pi, 13))
    globe = np.cos(u) * np.sin(v), np.sin(u) * np.sin(v), np.cos(v)
    print(f"cosine of row and class mean after epoch {SNAPSHOTS[-1]}, by class of {COUNTS} samples:")
    for row, (name, strength) in enumerate((("cross-entropy", 0.0), (f"+ {weight:g} SpA-Reg", weight))):
        snapshots = train_toy(strength, seed, SNAPSHOTS)
        for column, (epoch, (w_CD, m_CD)) in enumerate(snapshots.items()):
            place = row * len(SNAPSHOTS) + column + 1
            axis: Any = figure.add_subplot(2, len(SNAPSHOTS), place, projection="3d")
            axis.plot_wireframe(*globe, color="0.85", linewidth=0.4)
            for vectors_CD, color in ((m_CD, "black"), (w_CD, "#c00000")):
                axis.quiver(*np.zeros((3, len(COUNTS))), *vectors_CD.numpy().T, color=color, arrow_length_ratio=0.12)
                for c, vector in enumerate(vectors_CD.tolist()):
                    axis.text(*(1.15 * x for x in vector), str(c), fontsize=8, color=color)
            cosines_C = (w_CD * m_CD).sum(1)
            axis.set_title(f"{name}, epoch {epoch}\nmean cosine {cosines_C.mean():.2f}", fontsize=8)
            axis.set_axis_off()
            axis.set_box_aspect((1, 1, 1), zoom=1.5)
        print(f"  {name:18}" + "".join(f"{cosine:8.3f}" for cosine in cosines_C.tolist()))
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# The theory
# ----------------------------------------------------------------------------------------------------------------------


def printed_exponent(mean_CD: Tensor, weight_CD: Tensor) -> float:
    """Return Eq. 13 as printed, least over all pairs: the square of a negative margin counts as well."""
    apart_CCD = weight_CD.unsqueeze(1) - weight_CD
    margin_CC = (apart_CCD * mean_CD.unsqueeze(1)).sum(2)
    value_CC = margin_CC.square() / (2 * apart_CCD.square().sum(2))
    return value_CC[~torch.eye(len(mean_CD), dtype=torch.bool)].min().item()


def draw_exponents(seed: int) -> Any:
    """Draw the error exponent of a simplex and its rotated copy by their angle, and the bound of Eq. 14."""
    degrees = np.arange(0, 91, 2)
    angles = [math.radians(float(d)) for d in degrees]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (num_classes, dim) in zip(axes, ((3, 2), (10, 10)), strict=True):
        etf = theory.simplex_etf(num_classes, dim)
        for turn in range(1 if dim == 2 else 5):
            rows = []
            for angle in angles:
                rng = torch.Generator().manual_seed(seed + turn)  # the same A at every angle
                rows.append(etf @ theory.isoclinic_rotation(dim, angle, generator=rng).T)
            label = "simplex and its rotation" if turn == 0 else None
            axis.plot(degrees, [theory.error_exponent(etf, w) for w in rows], color="C0", linewidth=1, label=label)
        if dim == 2:
            axis.plot(degrees, [printed_exponent(etf, w) for w in rows], "C3:", label="Eq. 13 as printed")
        wide = theory.simplex_etf(num_classes, 2 * (num_classes - 1))
        # Coordinates are turned in pairs: with the frame in every second one, A takes it out of its own span.
        spread = torch.zeros_like(wide)
        spread[:, ::2] = wide[:, : num_classes - 1]
        best = [spread @ theory.isoclinic_rotation(wide.shape[1], angle).T for angle in angles]
        exponents = [theory.error_exponent(spread, w) for w in best]
        axis.plot(degrees, exponents, "C2--", label=f"the same in {wide.shape[1]} dimensions")
        bound = [theory.misaligned_bound(num_classes, angle) for angle in angles]
        axis.plot(degrees, bound, "k", linewidth=0.8, label="Eq. 14, the bound")
        axis.set(xlabel="angle between rows and means (degrees)", title=f"{num_classes} classes, {dim} dimensions")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error exponent")
    axes[0].legend(fontsize="small")
    return figure


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = parser.add_subparsers(dest="figure", required=True)
    for name, what in (
        ("curves", "accuracy and alignment by epoch"),
        ("groups", "alignment of many-, medium- and few-shot classes by epoch"),
        ("sphere", "three features of four long-tailed classes as they are trained"),
        ("exponents", "what misalignment costs in theory"),
    ):
        one = figures.add_parser(name, help=what, description=what)
        if name in ("curves", "groups"):
            one.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
        else:
            one.add_argument("--seed", type=int, default=0, help="default %(default)s")
        if name == "sphere":
            one.add_argument("--spareg", type=float, default=1.0, help="weight of the loss term (default %(default)s)")
        one.add_argument("--output", type=Path, help=f".png, .pdf or .svg (default {name}.png)")
    return parser


def draw(args: argparse.Namespace) -> Any:
    """Draw the figure asked for."""
    if args.figure == "sphere":
        return draw_sphere(args.spareg, args.seed)
    if args.figure == "exponents":
        return draw_exponents(args.seed)
    named = named_folders(args.runs)
    return draw_curves(named) if args.figure == "curves" else draw_groups(named)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "spalign"})  # text stays text, ids stay the same
    output = args.output or Path(f"{args.figure}.png")
    if output.suffix not in (".png", ".pdf", ".svg") or not output.parent.is_dir():
        parser.error(f"--output is {output}, expected a .png, .pdf or .svg file in a folder that exists")
    if not math.isfinite(getattr(args, "spareg", 0.0)):
        parser.error(f"--spareg is {args.spareg}, expected a finite weight")
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    try:
        figure = draw(args)
    except ValueError as error:
        parser.error(str(error))
    figure.savefig(output, dpi=150, metadata={"Date": None} if output.suffix == ".svg" else None)
    plt.close(figure)
    print(f"Figure: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
