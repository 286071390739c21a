"""Every optimizer of ``torch.optim`` in every implementation it has, and runs of a small model to compare.

A run is plain, wrapped in SpAProj, or plain with the classifier's gradient projected by hand, with the float64
reference, between ``backward`` and ``step``. All of it is in float64, so that optimizers that divide by small numbers
do not blow a rounding up to something visible.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import reference
import torch
from problems import make_batch, to_bools, to_numpy
from torch import Tensor, nn
from torch.optim import Optimizer

import spalign

C, D, N = 5, 6, 8
GAMMA = 0.3
# Reference and library take the same float64 sums in other orders; a few steps of an adaptive optimizer magnify that.
ROUNDING: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10}

Mode: TypeAlias = Literal["plain", "wrapped", "by hand"]


class Row(NamedTuple):
    """An optimizer class and options for it."""

    make: Callable[..., Optimizer]
    options: dict[str, Any]
    variant: str = ""

    @property
    def name(self) -> str:
        """Name of the class."""
        return getattr(self.make, "__name__", str(self.make))

    @property
    def needs_closure(self) -> bool:
        """Whether ``step`` takes no other form."""
        return self.name == "LBFGS" or self.name.endswith("Closure")

    @property
    def sparse(self) -> bool:
        """Whether the classifier's gradient is to be sparse."""
        return self.name == "SparseAdam"


def _classes() -> list[type[Optimizer]]:
    found = (c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, Optimizer))
    return sorted((c for c in found if c is not Optimizer), key=lambda c: c.__name__)


def _rows() -> dict[str, Row]:
    """Return one row per class with usual options, and one more for each switch that the class has."""
    rows: dict[str, Row] = {}
    for make in _classes():
        parameters = inspect.signature(make).parameters
        usual = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01, "max_iter": 3}
        options = {name: value for name, value in usual.items() if name in parameters}
        switches: dict[str, dict[str, Any]] = {"": {}}
        for name, parameter in parameters.items():
            if isinstance(parameter.default, bool):
                switches[name] = {name: not parameter.default}
            elif name == "fused":
                switches[name] = {name: True}
            elif name == "foreach":
                switches |= {"foreach": {name: True}, "for-loop": {name: False}}
            elif name == "lr" and "Tensor" in str(parameter.annotation):
                switches["tensor lr"] = {name: torch.tensor(0.02, dtype=torch.float64)}
            elif name == "line_search_fn":
                switches["strong_wolfe"] = {name: "strong_wolfe"}
        for variant, more in switches.items():
            rows[f"{make.__name__} {variant}".strip()] = Row(make, {**options, **more}, variant)
    return rows


ROWS = _rows()
CLASSES = {name: row for name, row in ROWS.items() if not row.variant}
# Made for other devices (fused, capturable) or for parameters that are no leaves (differentiable).
MAY_REFUSE = ("fused", "capturable", "differentiable")


@functools.cache
def refusal(name: str) -> str | None:
    """Return why torch itself does not run a row on a model's parameters on the CPU, or None where it does."""
    if ROWS[name].variant in MAY_REFUSE:
        try:
            Run(ROWS[name], "plain").train(1)
        except (AssertionError, RuntimeError, ValueError) as error:
            return f"torch refuses: {str(error).splitlines()[0][:120]}"
    return None


class SampledRows(nn.Module):
    """Classifier rows looked up for the classes of a batch alone, which makes their gradient sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, D, dtype=torch.float64))

    def forward(self, h: Tensor, classes: Tensor) -> Tensor:
        """Return logits of ``classes``."""
        return h @ nn.functional.embedding(classes, self.weight, sparse=True).t()


class Run:
    """A two-layer model, its class means (one class is unseen) and an optimizer."""

    def __init__(self, row: Row, mode: Mode = "wrapped", gamma: float = GAMMA, seen: bool = True) -> None:
        torch.manual_seed(7)
        self.row, self.mode, self.gamma = row, mode, gamma
        bias = row.name != "Muon"  # which takes matrices alone
        self.encoder = nn.Linear(4, D, bias=bias, dtype=torch.float64)
        self.fc: Any = SampledRows() if row.sparse else nn.Linear(D, C, bias=bias, dtype=torch.float64)
        self.model = nn.ModuleDict({"encoder": self.encoder, "fc": self.fc})
        self.tracker = spalign.ClassMeanTracker.for_classifier(self.fc).double()
        if seen:
            self.tracker.update(*make_batch(1, 40, C - 1, D, torch.float64))
        self.inner = row.make(list((self.fc if row.sparse else self.model).parameters()), **copy.deepcopy(row.options))
        self.optimizer: Optimizer = self.wrap(self.inner) if mode == "wrapped" else self.inner

    def wrap(self, optimizer: Optimizer) -> spalign.SpAProj:
        """Return the optimizer with the projection in front."""
        return spalign.SpAProj(optimizer, self.fc, self.tracker, gamma=self.gamma)

    @property
    def ascending(self) -> bool:
        """Whether the optimizer maximizes."""
        return bool(self.row.options.get("maximize"))

    def loss(self, seed: int) -> Tensor:
        """Return the cross-entropy of a batch, negated for an optimizer that maximizes."""
        x, y = make_batch(seed, N, C, 4, torch.float64)
        h = torch.tanh(self.encoder(x))
        if self.row.sparse:
            classes, y = y.unique(return_inverse=True)
            logits = self.fc(h, classes)
        else:
            logits = self.fc(h)
        loss = nn.functional.cross_entropy(logits, y)
        return -loss if self.ascending else loss

    def project_by_hand(self) -> None:
        """Replace the classifier's gradient by that of Eq. 20."""
        grad, mean, seen = self.fc.weight.grad, to_numpy(self.tracker.mean), to_bools(self.tracker.seen)
        sign = -1.0 if self.ascending else 1.0
        g, w = sign * to_numpy(grad.to_dense()), to_numpy(self.fc.weight)
        projected = torch.from_numpy(sign * reference.project_gradient(g, w, mean, seen, self.gamma))
        self.fc.weight.grad = projected.sparse_mask(grad.coalesce()) if grad.is_sparse else projected

    def closure(self, seed: int) -> Callable[[], float]:
        """Return a closure for ``step`` that computes loss and gradients afresh."""

        def run() -> float:
            self.optimizer.zero_grad()
            loss = self.loss(seed)
            loss.backward()
            if self.mode == "by hand":
                self.project_by_hand()
            return loss.item()

        return run

    def train(self, steps: int, start: int = 0) -> "Run":
        """Take steps, one batch each."""
        for seed in range(start, start + steps):
            if self.row.needs_closure:
                self.optimizer.step(self.closure(seed))
            else:
                self.closure(seed)()
                self.optimizer.step()
        return self

    def train_mode(self) -> "Run":
        """Switch a schedule-free optimizer to training."""
        getattr(self.optimizer, "train", lambda: None)()
        return self

    def weights(self) -> list[Tensor]:
        """Return copies of all parameters."""
        return [p.detach().clone() for p in self.model.parameters()]


def same(a: Any, b: Any) -> bool:
    """Return whether nested containers have the same keys, lengths and types, and tensors the same bits."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def keys(x: Any) -> Any:
    """Return what a state dict consists of, without the values."""
    if isinstance(x, dict):
        return {k: keys(v) for k, v in x.items()}
    return [keys(v) for v in x] if isinstance(x, list) else type(x)


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    """Return whether weights agree up to float64 rounding."""
    return all(torch.allclose(x, y, **ROUNDING) for x, y in zip(a, b, strict=True))


def far(a: list[Tensor], b: list[Tensor]) -> bool:
    """Return whether weights differ by what no rounding explains."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) > 1e-6
