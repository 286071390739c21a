#!/usr/bin/env python3
"""Count what a training step launches on a GPU, without one: a captured step is as long as its kernels are many.

    python benchmarks/launches.py --data-dir DIR
    python benchmarks/launches.py --data-dir DIR --options "--method glmc --spareg 0.3"

A step of the published recipe with SpA-Reg and SpA-Proj, in float32 and bfloat16, three ways: with torch's operations
alone; with spalign's own kernels; with `--compile`, which has torch.compile write the kernels of everything but the
optimizer and SpA-Proj. Each is counted by parts of the step.

The first two run on a pretended GPU. Operations count as a kernel each, a convolution's backward pass and the fused
optimizer as two; what cuDNN and cuBLAS add to that (bfloat16 batch normalisation is three kernels forward, two
backward) shows on a GPU alone. The code of the third is written for an H200 and counted in what was written; the class
means are one node there, and count as what they launch by themselves.

Needs Triton, which comes with torch's CUDA builds. Writes `DATE-launches.json` and `.md` to the output folder.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # own kernels run in Triton's interpreter
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]
import cifar_lt  # noqa: E402
from longtail.engine import Trainer  # noqa: E402
from longtail.reporting import recorded_command, write_result  # noqa: E402
from longtail.training import environment  # noqa: E402
from operations import is_view, name_of  # noqa: E402
from pretended_gpu import pretended_gpu, why_kernels_cannot_run  # noqa: E402

from spalign import kernels  # noqa: E402

SEVERAL = {"convolution_backward": 2, "_fused_sgd": 2}
PARTS = ("augmentation", "network", "loss and figures", "class means", "SpA-Reg", "backward", "SpA-Proj", "optimizer")
COMPILED = ("augmentation", "network", "backward")  # the three graphs: the second is all of the forward pass
CLASS_MEANS = "torch.ops.spalign.update_class_means.default"


class Launches(TorchDispatchMode):
    """Counts operations by the part of the step that they belong to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.parts = ["rest"]

    def append(self, _: str) -> None:
        """Count a launch of an own kernel."""
        self.counts[self.parts[-1]] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, part = name_of(func), self.parts[-1]
        # Gradients are copied because a recorded graph holds them here, which a real one does not.
        nothing = ("empty", "new_empty", *(("copy", "clone") if part == "backward" else ()))
        if not is_view(func) and func.namespace == "aten" and not name.startswith(nothing):
            self.counts[part] += SEVERAL.get(name, 1)
        return func(*args, **(kwargs or {}))

    def label(self, owner: Any, method: str, part: str) -> None:
        """Count what the method does as a part of its own."""
        real: Callable[..., Any] = getattr(owner, method)

        def labelled(*args: Any, **kwargs: Any) -> Any:
            self.parts.append(part)
            try:
                return real(*args, **kwargs)
            finally:
                self.parts.pop()

        setattr(owner, method, labelled)


def trainer_of(options: list[str], *more: str) -> Trainer:
    """Return a trainer at the beginning of its first epoch."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--output-dir", folder, "--quiet", "--no-tensorboard", *options, *more]
        trainer = Trainer(cifar_lt.settings_from(cifar_lt.build_parser().parse_args(argv)))
    trainer._begin_epoch([1e-3] * trainer.steps_per_epoch)
    return trainer


def captured(options: list[str], *, own_kernels: bool) -> Counter[str]:
    """Count what the step launches as it is."""
    launches = Launches()
    with pretended_gpu(own_kernels=own_kernels) as gpu:
        trainer = trainer_of(options, "--device", "cuda", "--capture")
        size = trainer.batches.batch_size
        trainer._take_step(size)  # makes what an optimizer keeps
        for owner, method, part in (
            (trainer, "make_batch", "augmentation"),
            (trainer, "share_of_loss", "loss and figures"),
            (trainer.baseline.model.backbone, "forward", "network"),
            (trainer.alignment, "penalty", "SpA-Reg"),
            (trainer.alignment.tracker, "_absorb", "class means"),
            (trainer.scaler, "scale", "rest"),
            (torch.Tensor, "backward", "backward"),
            (trainer.optimizer, "step", "optimizer"),
        ):
            launches.label(owner, method, part)
        if trainer.settings.alignment.spaproj:
            launches.label(trainer.optimizer, "_project", "SpA-Proj")
        gpu.launches = launches  # type: ignore[assignment]
        with launches:
            trainer._take_step(size)
    return launches.counts


def class_means_alone(options: list[str]) -> int:
    """Count what class means launch that leave nothing to the kernels that follow."""
    with mock.patch.object(kernels, "FEW_ELEMENTS", 0):
        return captured(options, own_kernels=True)["class means"]


def compiled(options: list[str], around: Counter[str]) -> Counter[str]:
    """Count what the step launches with `--compile`, the rest of it as it is `around` it."""
    trainer = trainer_of(options, "--device", "cpu")
    with importlib.import_module("cuda_code").cuda_code() as codes:
        trainer.compile()
        trainer._take_step(trainer.batches.batch_size)
    counts = Counter({part: around[part] for part in ("SpA-Proj", "optimizer", "rest")})
    counts["class means"] = class_means_alone(options)
    for part, code in zip(COMPILED, codes, strict=True):
        names = Counter(code.launches)
        second = names["torch.ops.aten.convolution_backward.default"]
        counts[part] = names.total() + second - names[CLASS_MEANS]
    return counts


def table(results: dict[str, dict[str, dict[str, int]]]) -> str:
    """Format the counts, a column for each way and precision."""
    columns = [(f"{precision}, {way}", counts) for precision, ways in results.items() for way, counts in ways.items()]
    lines = ["| | " + " | ".join(name for name, _ in columns) + " |", "|---|" + "---|" * len(columns)]
    for part in (*PARTS, "rest"):
        cells = (str(counts.get(part, "")) or "" for _, counts in columns)
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    lines.append("| **sum** | " + " | ".join(f"**{sum(counts.values())}**" for _, counts in columns) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of the archives (default data)")
    parser.add_argument("--options", default="--spareg 0.3 --spaproj", help="of cifar_lt.py (default %(default)s)")
    parser.add_argument("--recipe", default="ldam", help="of cifar_lt.py (default %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    if why_kernels_cannot_run():
        parser.error(why_kernels_cannot_run())
    importlib.import_module("cuda_code")  # with Dynamo, which has to see PyTorch before the pretence does
    results: dict[str, dict[str, dict[str, int]]] = {}
    for precision in ("fp32", "bf16"):
        options = ["--dataset", "cifar100", "--recipe", args.recipe, "--data-dir", str(args.data_dir)]
        options += [*shlex.split(args.options), *(("--amp", "bf16") if precision == "bf16" else ())]
        own = captured(options, own_kernels=True)
        results[precision] = {
            "torch": dict(captured(options, own_kernels=False)),
            "own kernels": dict(own),
            "own kernels, --compile": dict(compiled(options, own)),
        }
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": recorded_command("benchmarks/launches.py", sys.argv[1:] if argv is None else argv),
        "environment": environment(torch.device("cpu")),
        "launches": results,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"{record['date']}-launches"
    write_result(stem.with_suffix(".json"), record)
    page = (
        f"# Launches of a captured training step\n\n{record['date']}, torch {torch.__version__}, commit "
        f"{record['environment']['commit']}:\n\n```sh\n{record['command']}\n```\n\n"
        "Counted without a GPU, not measured on one; how is said in the script. With `--compile` the network's row\n"
        "holds loss, figures and SpA-Reg as well. Of spalign's own kernels one, of the backward pass, counts there.\n\n"
        f"{table(results)}\n"
    )
    stem.with_suffix(".md").write_text(page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
