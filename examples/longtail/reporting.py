"""Per-group figures, and where they go: JSON lines, TensorBoard, the terminal.

Shapes: C classes. Accuracies are in percent, alignments are cosines.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from .checkpoint import write_atomically

Groups = Mapping[str, Sequence[int]]
Figures = dict[str, float | None]


def group_means(values_C: Tensor, defined_C: Tensor, groups: Groups) -> Figures:
    """Average per-class values over all classes and over each shot group, leaving undefined classes out.

    Returns:
        `all` and one entry per group; None for a group without a defined class.
    """
    values, defined = values_C.double().tolist(), defined_C.tolist()
    figures: Figures = {}
    for name, classes in {"all": range(len(values)), **groups}.items():
        members = [values[c] for c in classes if defined[c]]
        figures[name] = sum(members) / len(members) if members else None
    return figures


def accuracy_figures(correct_C: Tensor, count_C: Tensor, groups: Groups) -> Figures:
    """Turn per-class counts into percent: `all` images, `balanced` = mean recall of the classes, mean per group.

    On a balanced test set `all` and `balanced` agree.
    """
    recall = group_means(100 * correct_C.double() / count_C.clamp(min=1), count_C > 0, groups)
    figures = {"all": 100 * float(correct_C.sum()) / float(count_C.sum()), "balanced": recall.pop("all"), **recall}
    # Rounded so that equal counts compare as equal, whatever the order of the sums.
    return {name: None if value is None else round(value, 6) for name, value in figures.items()}


def recorded_command(script: str, arguments: Sequence[str]) -> str:
    """Return a command as records hold it: absolute paths, which are one machine's own, as DIR."""
    words = []
    for word in arguments:
        name, equals, value = word.rpartition("=")
        words.append(f"{name}{equals}DIR" if Path(value).is_absolute() else word)
    return shlex.join(["python", script, *words])


class Reporter:
    """Writes the records of a run.

    Args:
        folder: gets `metrics.jsonl` and, with `tensorboard`, event files in `tensorboard/`.
        epochs: how many the run has.
        start_epoch: the epoch to continue from; later records of an interrupted run are removed.
        tensorboard: write event files.
        quiet: no progress bar, no lines on the terminal.
    """

    def __init__(self, folder: Path, *, epochs: int, start_epoch: int, tensorboard: bool, quiet: bool) -> None:
        self.epochs = epochs
        self.quiet = quiet
        self._path = folder / "metrics.jsonl"
        keep = [json.dumps(record) + "\n" for record in read_records(self._path) if record["epoch"] <= start_epoch]
        write_atomically(self._path, lambda file: file.write("".join(keep).encode()))
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What an interrupted run wrote after its last checkpoint is purged.
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_epoch + 1)

    def steps(self, steps: range, epoch: int) -> tqdm[int]:
        """Return the remaining steps of an epoch behind a progress bar, which shows where there is a terminal."""
        return tqdm(
            steps,
            f"epoch {epoch + 1}/{self.epochs}",
            total=steps.stop,
            initial=steps.start,
            leave=False,
            disable=True if self.quiet else None,  # None: only where stderr is a terminal
            mininterval=0.5,
            dynamic_ncols=True,
        )

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Write one epoch's record, whole or not at all as far as a reader is concerned."""
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._writer is not None:
            for name, value in flatten(record):
                if isinstance(value, int | float) and name != "epoch":
                    self._writer.add_scalar(name, value, record["epoch"])
            self._writer.flush()
        accuracy = f"accuracy {row(record['accuracy'], '.2f')}  " if "accuracy" in record else ""
        self.note(
            f"epoch {record['epoch']:3d}/{self.epochs}  loss {record['loss']:.4f}  "
            f"train {record['train_accuracy']:5.2f}  {accuracy}"
            f"alignment {row(record['alignment'], '.3f')}  {record['seconds']:.1f} s"
        )

    def note(self, text: str) -> None:
        """Print a line, unless quiet."""
        if not self.quiet:
            print(text, flush=True)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def row(figures: Mapping[str, float | None], form: str) -> str:
    """Format `all (many/medium/few)`, see `cells`."""
    first, *rest = cells(figures, form)
    return f"{first} ({'/'.join(rest)})"


def cells(figures: Mapping[str, float | None], form: str) -> list[str]:
    """Format all, many, medium, few; of accuracies, the balanced one stands for all (a test set has both equal)."""
    values = [figures.get("balanced", figures["all"]), *(figures[group] for group in ("many", "medium", "few"))]
    return ["-" if value is None else format(value, form) for value in values]


def flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (`group/name`, value) of a nested record."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; a last line that a kill cut short is dropped, a missing file is empty."""
    if not path.exists():
        return []
    complete, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in complete.splitlines()]


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write the summary of a run as JSON."""
    write_atomically(path, lambda file: file.write((json.dumps(result, indent=2) + "\n").encode()))


def closing_table(
    result: Mapping[str, Any], about: str, rows: Sequence[tuple[str, Figures, str]] = (), *, speed: str = ""
) -> str:
    """Format a result: the last epoch first, the best epoch only beside it.

    Args:
        result: of the run.
        about: of network or data, for the first line.
        rows: label, figures and format of further rows.
        speed: for the end of the first line.
    """
    name, best = " + ".join([result["method"], *result["strategies"]]), result["accuracy_best"]
    lines = [
        f"{result['dataset']}, {about}, {name}, seed {result['seed']}, {result['epochs']} epochs, "
        f"{result['seconds']:.0f} s{speed}",
        f"{'':32}{'all':>8}{'many':>8}{'medium':>8}{'few':>8}",
    ]
    rows = [
        (f"{result['evaluated_on']} accuracy, last epoch", result["accuracy_last"], ".2f"),
        ("alignment, running means", result["alignment"], ".4f"),
        *rows,
    ]
    lines += [f"{label:32}" + "".join(f"{cell:>8}" for cell in cells(figures, form)) for label, figures, form in rows]
    best_on = f" on {result['best_on']}" if "best_on" in result else ""
    lines[2] += f"   (best{best_on} {best['balanced']:.2f}, epoch {best['epoch']})"
    return "\n".join(lines)
