"""Random problems and every kind of classifier, for the tests.

C classes, D feature dimensions, N samples.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from reference import Array, Bools
from torch import Tensor, nn

import spalign
from spalign.classifier import ClassifierLike


def to_numpy(x: Tensor) -> Array:
    """Return a float64 numpy copy."""
    return np.asarray(x.detach().to(torch.float64).numpy().copy(), dtype=np.float64)


def to_bools(x: Tensor) -> Bools:
    """Return a numpy copy of a bool tensor."""
    return np.asarray(x.numpy().copy(), dtype=np.bool_)


class Problem(NamedTuple):
    """Classifier rows, class means and a gradient, with some classes unseen (their means are zero)."""

    w: Tensor
    mean: Tensor
    seen: Tensor
    g: Tensor

    def numpy(self) -> tuple[Array, Array, Bools, Array]:
        """Return w, mean, seen, g in float64."""
        return to_numpy(self.w), to_numpy(self.mean), to_bools(self.seen), to_numpy(self.g)


def make_problem(
    seed: int = 0,
    *,
    num_classes: int = 6,
    dim: int = 8,
    unseen: tuple[int, ...] = (2,),
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Return random rows and means in general position; the means share an offset, as features behind a ReLU do."""
    rng = torch.Generator().manual_seed(seed)
    w, mean, g = (torch.randn(num_classes, dim, generator=rng, dtype=torch.float64) for _ in range(3))
    seen = torch.ones(num_classes, dtype=torch.bool)
    seen[list(unseen)] = False
    mean = (mean * 2 + 1.5) * seen.unsqueeze(1)
    return Problem(w.to(dtype), mean.to(dtype), seen, g.to(dtype))


def make_batch(
    seed: int, n: int, num_classes: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return features around class centres, and labels."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, num_classes, (n,), generator=rng)
    centers = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    h = 0.5 + 2 * centers[y] + torch.randn(n, dim, generator=rng, dtype=torch.float64)
    return h.to(dtype), y


def rotation(seed: int, dim: int) -> Tensor:
    """Return a random orthogonal (D, D) float64 matrix."""
    rng = torch.Generator().manual_seed(seed)
    q: Tensor = torch.linalg.qr(torch.randn(dim, dim, generator=rng, dtype=torch.float64))[0]
    return q


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every buffer and parameter."""
    return {k: v.detach().clone() for k, v in (*module.named_buffers(), *module.named_parameters())}


def same_state(module: nn.Module, before: dict[str, Tensor]) -> bool:
    """Return whether every buffer and parameter holds the bits it held when ``before`` was taken."""
    now = state_of(module)
    return now.keys() == before.keys() and all(
        now[k].dtype == before[k].dtype and torch.equal(now[k], before[k]) for k in now
    )


class Rows(nn.Module):
    """A head with a weight of shape (C, D) and nothing else that spalign could know it by."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, h: Tensor) -> Tensor:
        """Return logits."""
        return h @ self.weight.t()


class Columns(nn.Module):
    """A head that stores a (D, C) weight under another name."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(weight.t().clone())

    def forward(self, h: Tensor) -> Tensor:
        """Return logits."""
        return h @ self.prototypes


class Head(NamedTuple):
    """A classifier of some kind, what to hand to spalign for it, and how it is used."""

    classifier: ClassifierLike
    parameters: list[nn.Parameter]
    logits: Callable[[Tensor], Tensor]

    def rows(self) -> Tensor:
        """Return the effective rows (C, D), read off the logits of unit vectors: what the next forward pass does."""
        dim = spalign.Classifier.of(self.classifier).feature_dim
        p = self.parameters[0]
        with torch.no_grad():
            return self.logits(torch.eye(dim, dtype=p.dtype, device=p.device)).t().clone()


def _linear(w: Tensor) -> nn.Linear:
    fc = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    with torch.no_grad():
        fc.weight.copy_(w)
    return fc


def _head(module: nn.Module, classifier: ClassifierLike | None = None) -> Head:
    return Head(module if classifier is None else classifier, list(module.parameters()), module)


def _conv(w: Tensor) -> Head:
    conv = nn.Conv2d(w.shape[1], w.shape[0], 1, bias=False, dtype=w.dtype)
    with torch.no_grad():
        conv.weight.copy_(w[:, :, None, None])

    def logits(h: Tensor) -> Tensor:
        out: Tensor = conv(h[:, :, None, None])
        return out[:, :, 0, 0]

    return Head(conv, list(conv.parameters()), logits)


def _weight_norm(w: Tensor) -> Head:
    head = nn.utils.parametrizations.weight_norm(_linear(w))
    _spread_norms(head.parametrizations["weight"].original1)
    return _head(head)


def _old_weight_norm(w: Tensor) -> Head:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated by torch, still in use
        head = nn.utils.weight_norm(_linear(w))
    _spread_norms(head.weight_v)
    return _head(head)


def _spread_norms(v: Any) -> None:
    """Make the norms of v differ from those of the rows, as they do after some training."""
    with torch.no_grad():
        v.mul_(torch.linspace(0.5, 2.0, len(v), dtype=v.dtype).unsqueeze(1))


def _columns(w: Tensor) -> Head:
    module = Columns(w)
    return _head(module, spalign.Classifier(module, weight="prototypes", class_dim=1))


def _parameter(w: Tensor) -> Head:
    p = nn.Parameter(w.clone())
    return Head(p, [p], lambda h: h @ p.t())


HEADS: dict[str, Callable[[Tensor], Head]] = {
    "linear": lambda w: _head(_linear(w)),
    "conv1x1": _conv,
    "module": lambda w: _head(Rows(w.clone())),
    "columns": _columns,
    "weight_norm": _weight_norm,
    "old_weight_norm": _old_weight_norm,
    "parameter": _parameter,
}
"""Every kind of trainable classifier of the design contract (a DTensor weight is in distributed/rank_parts.py)."""


def head_on(
    device: torch.device | str, kind: str, num_classes: int, dim: int
) -> tuple[ClassifierLike, list[nn.Parameter]]:
    """Return a float32 classifier of one of :data:`HEADS` on a device, and its parameters there."""
    head = HEADS[kind](make_problem(1, num_classes=num_classes, dim=dim).w.float())
    classifier = head.classifier
    if isinstance(classifier, Tensor):
        moved = nn.Parameter(classifier.detach().to(device))
        return moved, [moved]
    module = classifier.module if isinstance(classifier, spalign.Classifier) else classifier
    assert isinstance(module, nn.Module)
    return classifier, list(module.to(device).parameters())


class WithBuffer(nn.Module):
    """A fixed classifier in a buffer."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


def _frozen(w: Tensor) -> ClassifierLike:
    fc = _linear(w)
    fc.weight.requires_grad_(False)
    return fc


FIXED: dict[str, Callable[[Tensor], ClassifierLike]] = {
    "tensor": lambda w: w.clone(),
    "buffer": lambda w: WithBuffer(w.clone()),
    "frozen": _frozen,
}
"""Every kind of classifier that no optimizer moves."""
