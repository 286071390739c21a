"""Count what a captured training step launches on a GPU, without one: as it is, and with `--compile`.

    python tests/kernel_counts.py --data-dir DIR --spareg 0.3 --spaproj [options of cifar_lt.py]

Operations count as a kernel each, a convolution's backward pass and the fused optimizer as two; what cuDNN and cuBLAS
add to that (bfloat16 batch normalisation is three kernels forward, two backward) shows on a GPU alone.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]
import cifar_lt  # noqa: E402
from longtail.engine import Trainer  # noqa: E402
from operations import name_of  # noqa: E402
from pretended_gpu import pretended_gpu  # noqa: E402

SEVERAL = {"convolution_backward": 2, "_fused_sgd": 2}


class Launches(TorchDispatchMode):
    """Counts operations by the part of the step that they belong to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.parts = ["rest"]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns, name, part = func._schema.returns, name_of(func), self.parts[-1]
        view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        # Gradients are copied because a recorded graph holds them here, which a real one does not.
        nothing = ("empty", "new_empty", *(("copy", "clone") if part == "backward" else ()))
        if not view and func.namespace == "aten" and not name.startswith(nothing):
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


def trainer_of(argv: list[str], *more: str) -> Trainer:
    with tempfile.TemporaryDirectory() as folder:
        options = ["--output-dir", folder, "--quiet", "--no-tensorboard", *argv, *more]
        trainer = Trainer(cifar_lt.settings_from(cifar_lt.build_parser().parse_args(options)))
    steps = trainer.batches.steps_per_epoch
    trainer.baseline.begin_epoch(0)
    trainer.training_step.begin_epoch(trainer.batches.draw(trainer.generator), [1e-3] * steps)
    return trainer


def eager_counts(argv: list[str]) -> Counter[str]:
    launches = Launches()
    with pretended_gpu():
        trainer = trainer_of(argv, "--device", "cuda", "--capture")
        step = trainer.training_step
        step(0)  # makes what an optimizer keeps
        for owner, method, part in (
            (step, "batch", "augmentation"),
            (step, "loss", "loss and figures"),
            (trainer.baseline.model.backbone, "forward", "network, forward"),
            (trainer.alignment, "penalty", "loss term"),
            (trainer.alignment.tracker, "_absorb", "class means"),
            (step.scaler, "scale", "rest"),
            (torch.Tensor, "backward", "backward"),
            (trainer.optimizer, "step", "optimizer"),
        ):
            launches.label(owner, method, part)
        if trainer.settings.alignment.spaproj:
            launches.label(trainer.optimizer, "_project", "projection")
        with launches:
            step(1)
    return launches.counts


def main(argv: list[str]) -> None:
    from cuda_code import cuda_code

    counts = eager_counts(argv)
    print("eager:", counts.total(), dict(counts))
    step = trainer_of(argv, "--device", "cpu").training_step
    with cuda_code() as codes:
        step.compile()
        step(0)
    for name, code in zip(("augmentation", "forward pass, loss, figures", "backward pass"), codes, strict=True):
        kinds = Counter("_".join(n.split("_")[:2]) if n.startswith("triton_") else n for n in code.launches)
        second = kinds["torch.ops.aten.convolution_backward.default"]
        print(f"compiled, {name}:", kinds.total() + second, dict(kinds))


if __name__ == "__main__":
    main(sys.argv[1:])
