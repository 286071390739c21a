#!/usr/bin/env python3
"""Run and report the small-preset experiments behind the defaults and `docs/results.md`.

    python benchmarks/evidence.py run tune --data-dir DIR --records runs/evidence --jobs 2
    python benchmarks/evidence.py run main zero-error regimes --data-dir DIR --records runs/evidence
    python benchmarks/evidence.py report main
    python benchmarks/evidence.py figure main

Every run is one call of `examples/cifar_lt.py` on one CPU thread, on real CIFAR-100-LT (`--preset small`). A finished
run is one line of `evidence-STAGE.jsonl` in `--records` and is never repeated; by default these are the repository's
own, which are complete. An interrupted run resumes from its checkpoint in `--work-dir`. Variants of a stage share data,
seeds and recipe, so gains are paired differences.

Stages: `tune` and `regimes` train on 20 epochs and are scored on images held out of the training set; only `main` and
`zero-error` see the test set.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "examples"))  # for the figures


@dataclass(frozen=True)
class Stage:
    """Runs that are compared with each other.

    Attributes:
        common: options of every run.
        settings: options by setting; gains are taken within a setting.
        variants: options by variant; the first is the baseline.
        seeds: of every variant.
    """

    common: tuple[str, ...]
    settings: dict[str, str]
    variants: dict[str, str]
    seeds: tuple[int, ...]

    def runs(self) -> Iterator[tuple[str, str, int]]:
        for seed in self.seeds:
            for setting in self.settings:
                for variant in self.variants:
                    yield setting, variant, seed


DEFAULTS = {
    "CE": "",
    "+Reg": "--spareg 0.3",
    "+SLERP": "--spaslerp",
    "+Proj": "--spaproj",
    "+Proj 0.5, keep": "--spaproj --gamma 0.5 --radial keep",
}
TUNE = ("--epochs", "20", "--validation", "20")
STAGES = {
    "tune": Stage(
        TUNE,
        {"IF 100": ""},
        {
            "CE": "",
            "Reg 0.1": "--spareg 0.1",
            "Reg 0.3": "--spareg 0.3",
            "Reg 1": "--spareg 1",
            "Reg 3": "--spareg 3",
            "Reg 1, classifier": "--spareg 1 --spareg-align classifier",
            "Reg 1, features": "--spareg 1 --spareg-align features",
            "Reg 10, features": "--spareg 10 --spareg-align features",
            "SLERP 0.05 below 0.9": "--spaslerp --alpha-max 0.05 --threshold 0.9",
            "SLERP 0.2 below 0.9": "--spaslerp --alpha-max 0.2 --threshold 0.9",
            "SLERP 0.2 below 0.5": "--spaslerp --alpha-max 0.2 --threshold 0.5",
            "Proj 0.1, keep": "--spaproj --gamma 0.1 --radial keep",
            "Proj 0.5, keep": "--spaproj --gamma 0.5 --radial keep",
            "Proj 0.9, keep": "--spaproj --gamma 0.9 --radial keep",
            "Proj 0.5, paper": "--spaproj --gamma 0.5 --radial paper",
            "Proj 0.9, paper": "--spaproj --gamma 0.9 --radial paper",
        },
        (0, 1),
    ),
    # Every strategy at its default (spalign's, and for SpA-Reg the weight that README and docs recommend).
    "main": Stage((), {"IF 100": ""}, DEFAULTS, (0, 1, 2)),
    # Without augmentation the network fits every training image: the paper's regime.
    "zero-error": Stage(("--no-augment",), {"IF 100, no augmentation": ""}, DEFAULTS, (0, 1, 2)),
    # Where is alignment low, and does raising it pay there?
    "regimes": Stage(
        TUNE,
        {
            "lr 0.01, no weight decay": "--lr 0.01 --weight-decay 0",
            "8 epochs": "--epochs 8",
            "IF 200": "--imbalance 200",
            "no weight decay": "--weight-decay 0",
        },
        {
            "CE": "",
            "Reg 0.3": "--spareg 0.3",
            "SLERP 0.2 below 0.9": "--spaslerp --alpha-max 0.2 --threshold 0.9",
            "Proj 0.5, keep": "--spaproj --gamma 0.5 --radial keep",
        },
        (0, 1),
    ),
}


def options(stage: Stage, setting: str, variant: str, seed: int) -> list[str]:
    """Return the command line of one run, data and output folders left out."""
    own = [*stage.settings[setting].split(), *stage.variants[variant].split()]
    return ["--preset", "small", "--threads", "1", *stage.common, *own, "--seed", str(seed)]


def records_path(folder: Path, name: str) -> Path:
    return folder / f"evidence-{name}.jsonl"


def read_records(folder: Path, name: str) -> list[dict[str, Any]]:
    path = records_path(folder, name)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_one(name: str, setting: str, variant: str, seed: int, data_dir: Path, work_dir: Path) -> dict[str, Any]:
    """Train one run, or finish it, and return its record."""
    command_options = options(STAGES[name], setting, variant, seed)
    label = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{setting}-{variant}-{seed}")
    folder = work_dir / name / label
    command = [sys.executable, str(ROOT / "examples" / "cifar_lt.py"), *command_options]
    command += ["--data-dir", str(data_dir), "--output-dir", str(folder), "--resume", "--quiet", "--no-tensorboard"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{setting}, {variant}, seed {seed} ended with {done.returncode}: {done.stderr[-2000:]}")
    result = json.loads((folder / "result.json").read_text())
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("accuracy_last", "accuracy_best", "train_accuracy", "alignment", "alignment_exact", "evaluated_on")
    return {
        "stage": name,
        "setting": setting,
        "variant": variant,
        "seed": seed,
        "command": "examples/cifar_lt.py " + " ".join(command_options),
        **{key: result[key] for key in keys},
        "curves": {
            "accuracy": [round(e["accuracy"]["balanced"], 2) for e in epochs],
            "train_accuracy": [round(e["train_accuracy"], 2) for e in epochs],
            "alignment": [round(e["alignment"]["all"], 4) for e in epochs],
        },
        "seconds": result["seconds"],
        "data_fingerprint": result["data_fingerprint"],
        "environment": result["environment"],
        "date": datetime.date.today().isoformat(),
    }


def run(names: Sequence[str], data_dir: Path, folder: Path, work_dir: Path, jobs: int) -> int:
    """Run what is missing of the stages, `jobs` at a time, and append one record per finished run."""
    failures = 0
    todo = []
    for name in names:
        finished = {(r["setting"], r["variant"], r["seed"]) for r in read_records(folder, name)}
        wanted = list(STAGES[name].runs())
        todo += [(name, *key) for key in wanted if key not in finished]
        path = records_path(folder, name)
        print(f"{name}: {len(finished.intersection(wanted))} of {len(wanted)} runs are done already, in {path}")
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run_one, *key, data_dir, work_dir): key for key in todo}
        for number, future in enumerate(as_completed(futures), start=1):
            key = futures[future]
            try:
                record = future.result()
            except RuntimeError as error:
                failures += 1
                print(f"[{number}/{len(todo)}] failed: {error}", file=sys.stderr)
                continue
            with records_path(folder, key[0]).open("a") as file:
                file.write(json.dumps(record) + "\n")
            accuracy, alignment = record["accuracy_last"], record["alignment"]["all"]
            print(f"[{number}/{len(todo)}] {key}: {accuracy['balanced']:.2f}, alignment {alignment:.3f}", flush=True)
    return failures


def mean_sd(values: Sequence[float], digits: int = 1) -> str:
    """Format mean and standard deviation (n - 1) of one value per seed."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def report(folder: Path, name: str) -> str:
    """Return the stage's table in Markdown: last epoch first, best beside it, gains paired by seed."""
    stage, records = STAGES[name], read_records(folder, name)
    baseline = next(iter(stage.variants))
    scored_on = records[0]["evaluated_on"] if records else "nothing yet"
    lines = [
        f"Scored on: {scored_on}. Accuracy in percent at the last epoch; ± is the standard deviation over seeds.",
        "",
        "| setting | variant | seeds | all | gain | many | medium | few | train | cosine | cosine, few | best |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting in stage.settings:
        for variant in stage.variants:
            rows = {r["seed"]: r for r in records if (r["setting"], r["variant"]) == (setting, variant)}
            base = {r["seed"]: r for r in records if (r["setting"], r["variant"]) == (setting, baseline)}
            if not rows:
                continue
            last = {seed: r["accuracy_last"]["balanced"] for seed, r in rows.items()}
            gains = [value - base[seed]["accuracy_last"]["balanced"] for seed, value in last.items() if seed in base]
            groups = [mean_sd([r["accuracy_last"][g] for r in rows.values()]) for g in ("many", "medium", "few")]
            cells = [
                setting,
                variant,
                str(len(rows)),
                mean_sd(list(last.values())),
                "" if variant == baseline or not gains else mean_sd(gains),
                *groups,
                mean_sd([r["train_accuracy"] for r in rows.values()]),
                mean_sd([r["alignment_exact"]["all"] for r in rows.values()], 3),
                mean_sd([r["alignment_exact"]["few"] for r in rows.values()], 3),
                mean_sd([r["accuracy_best"]["balanced"] for r in rows.values()]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(folder: Path, name: str, path: Path) -> None:
    """Draw accuracy, training accuracy and alignment by epoch, a row of panels a setting, a line a variant."""
    import matplotlib as mpl
    from figures import plot  # which chooses where pyplot draws
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "spalign"})  # text stays text, ids stay the same
    stage, records = STAGES[name], read_records(folder, name)
    if not records:
        raise SystemExit(f"{records_path(folder, name)} holds no finished run; train first: evidence.py run {name}")
    labels = {
        "accuracy": f"{records[0]['evaluated_on']} accuracy (%)",
        "train_accuracy": "training accuracy (%)",
        "alignment": "alignment (mean cosine)",
    }
    rows = len(stage.settings)
    drawing, axes = plt.subplots(rows, 3, figsize=(12, 3.6 * rows), layout="constrained", squeeze=False)
    for row, setting in zip(axes, stage.settings, strict=True):
        for axis, (key, label) in zip(row, labels.items(), strict=True):
            for variant in stage.variants:
                same = [r["curves"][key] for r in records if (r["setting"], r["variant"]) == (setting, variant)]
                if same:
                    plot(axis, np.arange(1, len(same[0]) + 1), np.array(same), label=variant)
            axis.set(xlabel="epoch", ylabel=label, title=setting if rows > 1 else "")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(loc="lower right", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, metadata={"Date": None})
    plt.close(drawing)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report", "figure"))
    parser.add_argument("stages", nargs="+", choices=tuple(STAGES))
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of the unpacked CIFAR archive")
    parser.add_argument(
        "--records", type=Path, default=RESULTS, help="folder of the records (default the repository's)"
    )
    parser.add_argument("--work-dir", type=Path, default=Path("runs") / "evidence", help="checkpoints of runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    if args.action == "run":
        return min(run(args.stages, args.data_dir, args.records, args.work_dir, args.jobs), 1)
    for name in args.stages:
        if args.action == "figure":
            figure(args.records, name, ROOT / "docs" / "figures" / f"{name}.svg")
            continue
        print(f"## {name}\n\n{report(args.records, name)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
