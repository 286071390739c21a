"""Load the scripts of examples/integrations, with and without the lines that a user adds, and count what they do."""

from __future__ import annotations

import ast
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import spalign

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "integrations"
MARK = "# +"
QUIET_LIGHTNING: dict[str, Any] = {
    "accelerator": "cpu",
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
}
FOREIGN_WARNINGS = [  # what the packages say of themselves and of these tiny runs
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "`isinstance.treespec, LeafSpec.` is deprecated",
        "The number of training batches",
        ".*does not have many workers",
        "'pin_memory' argument is set",
        "The dirpath has changed",
        "`torch.cpu.amp.autocast",
    )
]
STRATEGIES = {
    "reg": {"lam": 1.0, "alpha_max": 0.0, "gamma": 1.0},
    "slerp": {"lam": 0.0, "alpha_max": 0.2, "gamma": 1.0},
    "proj": {"lam": 0.0, "alpha_max": 0.0, "gamma": 0.5},
    "all": {"lam": 1.0, "alpha_max": 0.2, "gamma": 0.5},
    "off": {"lam": 0.0, "alpha_max": 0.0, "gamma": 1.0},
}


def available(*packages: str) -> None:
    """Skip the calling test module unless the packages are installed and the scripts are beside the tests."""
    if not FOLDER.is_dir():
        pytest.skip("the examples are not beside the tests", allow_module_level=True)
    for package in ("sklearn", *packages):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[integrations]'")
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))


def strengths(name: str) -> Any:
    """Return the strengths of one strategy, of all, or none."""
    from digits import Strengths

    return Strengths(**STRATEGIES[name])


def source(name: str) -> str:
    """Return the text of a script."""
    return (FOLDER / f"{name}.py").read_text()


def _execute(name: str, tree: ast.Module) -> Any:
    module = types.ModuleType(name)
    module.__file__ = str(FOLDER / f"{name.removesuffix('_plain')}.py")
    sys.modules[name] = module  # where pickle and dataclasses look classes up
    exec(compile(tree, module.__file__, "exec"), module.__dict__)
    return module


def script(name: str) -> Any:
    """Return a script as a module."""
    return _execute(name, ast.parse(source(name)))


def plain(name: str) -> Any:
    """Return a script without the statements whose first line is marked ``# +``: what a user had before."""
    remover = _Remover(source(name).splitlines())
    tree = remover.visit(ast.parse(source(name)))
    assert remover.removed, f"nothing in {name} is marked {MARK}"
    return _execute(f"{name}_plain", ast.fix_missing_locations(tree))


def added(name: str) -> list[ast.stmt]:
    """Return the marked statements of a script."""
    remover = _Remover(source(name).splitlines())
    remover.visit(ast.parse(source(name)))
    return remover.removed


class _Remover(ast.NodeTransformer):
    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.removed: list[ast.stmt] = []

    def generic_visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.stmt) and MARK in self.lines[node.lineno - 1]:
            self.removed.append(node)
            return None
        return super().generic_visit(node)


@dataclass
class Counts:
    """How often each part acted, and the rotations that were built."""

    fed: int = 0
    projected: int = 0
    rotated: int = 0
    steps: int = 0
    slerps: list[spalign.SpASlerp] = field(default_factory=list)
    trackers: list[spalign.ClassMeanTracker] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    seen_at_first: list[int] = field(default_factory=list)


@contextmanager
def counting() -> Iterator[Counts]:
    """Count feeds of trackers, projections, rotations and optimizer steps, whoever makes them."""
    counts = Counts()
    absorb, step = spalign.ClassMeanTracker._absorb, spalign.SpASlerp.step
    project = spalign.functional._project

    def counted_absorb(self: spalign.ClassMeanTracker, *args: Any, **how: Any) -> Any:
        counts.fed += 1
        if not any(known is self for known in counts.trackers):
            counts.trackers.append(self)
            counts.seen_at_first.append(int(self.seen.sum()))
        return absorb(self, *args, **how)

    def counted_project(*args: Any, **kwargs: Any) -> Tensor:
        counts.projected += 1
        return project(*args, **kwargs)

    def counted_rotation(self: spalign.SpASlerp) -> None:
        counts.rotated += 1
        if not any(known is self for known in counts.slerps):
            counts.slerps.append(self)
        step(self)

    def counted_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        counts.steps += 1
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        counts.gradient_norms.append(torch.stack([g.norm() for g in grads]).norm().item())

    handle = register_optimizer_step_post_hook(counted_step)
    with (
        mock.patch.object(spalign.ClassMeanTracker, "_absorb", counted_absorb),
        mock.patch.object(spalign.SpASlerp, "step", counted_rotation),
        mock.patch.object(spalign.functional, "_project", counted_project),
    ):
        try:
            yield counts
        finally:
            handle.remove()


def seeded(train: Any, *args: Any, **options: Any) -> Any:
    """Train from seed 0, which the network and the order of the data follow from."""
    import random

    import numpy as np

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (what timm's Mixup draws from)
    torch.manual_seed(0)
    return train(*args, **options)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Return whether both have the same parameters and buffers bit for bit, those of spalign left out."""
    of_a, of_b = ({k: v for k, v in m.state_dict().items() if not k.startswith("spareg.")} for m in (a, b))
    return of_a.keys() == of_b.keys() and all(torch.equal(of_a[k], of_b[k]) for k in of_a)
