"""The paper's Table 2 beside what finished runs have measured.

Accuracies are of the last epoch on the test list, in percent, which holds equally many images of every class.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..table import SUFFIXES, TITLES, Spread

# Top-1 accuracy, Space Alignment Matters, Table 2: rows of the methods here, each with the strategies it can take.
PAPER: dict[str, dict[str, float]] = {
    "ce": {"none": 44.3, "reg": 44.8, "slerp": 44.7, "proj": 44.8},
    "etf-dr": {"none": 44.7, "reg": 45.3},
    "arb": {"none": 52.8, "reg": 53.2, "slerp": 53.1, "proj": 53.6},
    "glmc": {"none": 56.3, "reg": 56.7, "slerp": 56.5, "proj": 56.7},
}
HEADER = ("method", "paper", "gain", "last epoch", "gain", "many", "medium", "few", "best", "runs")
# What tells runs apart that are compared: everything but the seed and the strategies.
ALIGNMENT = ("spareg", "spareg-align", "spaslerp", "alpha-max", "threshold", "spaproj", "gamma", "radial", "momentum")


def read_results(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read `result.json` of each folder.

    Raises:
        ValueError: a folder has none, two runs are the same, runs of one method differ in more than seed and
            strategies, or runs of one row in the strategies' hyper-parameters.
    """
    results: list[dict[str, Any]] = []
    first: dict[tuple[str, ...], tuple[Path, dict[str, Any]]] = {}
    seen: dict[tuple[Any, ...], Path] = {}
    for folder in folders:
        path = folder / "result.json"
        if not path.exists():
            raise ValueError(f"{folder} has no result.json: the run has not finished, or this is no run's folder")
        result = json.loads(path.read_text())
        method, strategies, options = result["method"], result["strategies"], result["options"]
        recipe = {name: value for name, value in options.items() if name not in (*ALIGNMENT, "seed")}
        compared = [((method,), recipe, "a baseline and its variants share the recipe")]
        if strategies:
            chosen = {name: options.get(name) for name in ALIGNMENT}
            compared.append(((method, *strategies), chosen, "a row has one choice of hyper-parameters"))
        for group, values, rule in compared:
            other, expected = first.setdefault(group, (folder, values))
            differing = [name for name in {**expected, **values} if values.get(name) != expected.get(name)]
            if differing:
                raise ValueError(
                    f"{folder} and {other} differ in --{', --'.join(differing)}: {rule}; report them apart"
                )
        key = (method, "+".join(strategies), result["seed"])
        if key in seen:
            raise ValueError(f"{folder} and {seen[key]} hold the same run, {key}: leave one out")
        seen[key] = folder
        results.append(result)
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the table as Markdown; rows without runs stay empty."""
    by_row: dict[tuple[str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for result in results:
        by_row[result["method"], "+".join(result["strategies"]) or "none"][result["seed"]] = result
    rows = [(method, strategy) for method, strategies in PAPER.items() for strategy in strategies]
    rows += [row for row in by_row if row not in rows]
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    for method, strategy in rows:
        suffix = SUFFIXES.get(strategy) or "".join(SUFFIXES[one] for one in strategy.split("+"))
        cells = [TITLES[method] + suffix, *_paper(method, strategy), *_measured(by_row, method, strategy)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _paper(method: str, strategy: str) -> list[str]:
    value = PAPER.get(method, {}).get(strategy)
    if value is None:
        return ["", ""]
    return [f"{value:.1f}", "" if strategy == "none" else f"{value - PAPER[method]['none']:+.1f}"]


def _measured(by_row: dict[tuple[str, str], dict[int, dict[str, Any]]], method: str, strategy: str) -> list[str]:
    runs, baseline = by_row.get((method, strategy), {}), by_row.get((method, "none"), {})
    if not runs:
        return [""] * 7
    last = {seed: run["accuracy_last"] for seed, run in runs.items()}
    gain = ""
    common = [seed for seed in runs if seed in baseline] if strategy != "none" else []
    if common:
        gains = [last[seed]["balanced"] - baseline[seed]["accuracy_last"]["balanced"] for seed in common]
        gain = Spread.of(gains).difference()
    cells = [Spread.of([figures["balanced"] for figures in last.values()]).text(), gain]
    for group in ("many", "medium", "few"):
        values = [figures[group] for figures in last.values() if figures[group] is not None]
        cells.append(Spread.of(values).text() if values else "-")
    best_on = {run["best_on"] for run in runs.values()}
    best = Spread.of([run["accuracy_best"]["balanced"] for run in runs.values()]).text()
    return [*cells, f"{best} ({'/'.join(sorted(best_on))})", str(len(runs))]


def report(argv: Sequence[str]) -> int:
    """Print the table of the runs in these folders and return the exit code."""
    parser = argparse.ArgumentParser(prog="imagenet_lt.py report", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="output folders of finished runs")
    args = parser.parse_args(argv)
    try:
        results = read_results(args.folders)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(table(results))
    return 0
