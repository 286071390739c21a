"""No operation of update, loss, projection, rotation or metrics makes the host wait for the device (pitfall D1).

Three nets: the operations dispatched on the CPU are recorded, and none reads a value or sizes its result by one (with
the way that only CPU batches take closed, so that they go the way of a device's); the same steps run on the meta
device, whose tensors have no values to read; and the source holds no call that would read one. The CUDA check is in
gpu/test_gpu.py.
"""

import ast
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from operations import host_reads, name_of
from problems import HEADS, head_on, make_batch, make_problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import spalign
from spalign import functional as F


class Recorder(TorchDispatchMode):
    """Record the operations dispatched, and those that index by a boolean mask."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []
        self.syncs: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note its name."""
        self.operations.append(name_of(func))
        self.syncs += host_reads(func, args)
        return func(*args, **(kwargs or {}))


C, D, N = 5, 6, 12


def batch(device: str, kind: str) -> tuple[Tensor, Tensor]:
    h, y = make_batch(1, N, C, D)
    targets: Tensor = y
    if kind == "ignored":
        targets = torch.where(torch.arange(N) % 3 == 0, -100, y)
    if kind == "soft":
        targets = torch.softmax(3 * torch.randn(N, C), 1)
    if kind == "dense":
        h, targets = h.reshape(2, 6, D).movedim(-1, 1), y.reshape(2, 6)
    return h.to(device), targets.to(device)


def update(device: str, kind: str) -> None:
    tracker = spalign.ClassMeanTracker(C, D, device=device)
    for _ in range(2):
        tracker.update(*batch(device, kind))
    tracker.directions()
    tracker.eval()


def forward(device: str, kind: str) -> None:
    tracker = spalign.ClassMeanTracker(C, D, momentum=None, device=device)
    h, y = batch(device, kind)
    h.requires_grad_()
    torch.autograd.grad((tracker(h, y) ** 2).sum(), h)
    tracker.eval()(h, y)
    tracker.reset()


def loss(device: str, kind: str) -> None:
    classifier, _ = head_on(device, "linear", C, D)
    for align in ("both", "classifier", "features"):
        spareg = spalign.SpARegLoss(classifier, align=align)
        for _ in range(2):
            h, y = batch(device, kind)
            h.requires_grad_()
            spareg(h, y).backward()
        spareg.eval()(h, y)


def rotation(device: str, head: str) -> None:
    classifier, _ = head_on(device, head, C, D)
    tracker = spalign.ClassMeanTracker.for_classifier(classifier)
    tracker.update(*batch(device, "hard"))
    slerp = spalign.SpASlerp(classifier, tracker, total_steps=2, alpha_max=0.5, threshold=0.9)
    slerp.step()
    slerp.step()


def projection(device: str, head: str) -> None:
    for radial in ("paper", "keep"):
        classifier, parameters = head_on(device, head, C, D)
        tracker = spalign.ClassMeanTracker.for_classifier(classifier)
        tracker.update(*batch(device, "hard"))
        inner = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        optimizer = spalign.SpAProj(inner, classifier, tracker, gamma=0.3, radial=radial)
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.step()


def measure(device: str, kind: str) -> None:
    # Without NC1's pseudo-inverse, for which CUDA waits.
    classifier, _ = head_on(device, "linear", C, D)
    h, y = batch(device, kind)
    tracker = spalign.ClassMeanTracker.for_classifier(classifier)
    tracker.update(h, y)
    collapse = spalign.metrics.NeuralCollapse(classifier, tracker)
    for _ in range(2):
        collapse.update(h, y, h[:, :C])
    collapse.compute()
    collapse.reset()


BATCHES = ["hard", "ignored", "soft", "dense"]
STEPS: dict[str, Callable[[str], None]] = {
    **{f"update {k}": lambda d, k=k: update(d, k) for k in BATCHES},  # type: ignore[misc]
    **{f"forward {k}": lambda d, k=k: forward(d, k) for k in BATCHES},  # type: ignore[misc]
    **{f"loss {k}": lambda d, k=k: loss(d, k) for k in BATCHES},  # type: ignore[misc]
    **{f"measure {k}": lambda d, k=k: measure(d, k) for k in BATCHES if k != "soft"},  # type: ignore[misc]
    **{f"rotation {k}": lambda d, k=k: rotation(d, k) for k in HEADS},  # type: ignore[misc]
    **{f"projection {k}": lambda d, k=k: projection(d, k) for k in HEADS},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", STEPS)
def test_no_dispatched_operation_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spalign.host.can_read", lambda features: False)
    monkeypatch.setattr("spalign.host.can_align", lambda *_: False)
    STEPS[name]("cpu")  # what PyTorch imports at an optimizer's first step reads numbers (2.6)
    with Recorder() as recorder:
        STEPS[name]("cpu")
    assert len(recorder.operations) > 10
    assert recorder.syncs == []


@pytest.mark.parametrize("name", STEPS)
def test_every_step_runs_on_tensors_without_values(name: str) -> None:
    STEPS[name]("meta")


FUNCTIONALS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object]] = {
    "class_statistics": lambda w, m, s, g, y: F.class_statistics(g, y, C),
    "update_class_means": lambda w, m, s, g, y: F.update_class_means(m, s.float(), g, y),
    "directions": lambda w, m, s, g, y: F.directions(m, s),
    "global_mean": lambda w, m, s, g, y: F.global_mean(m, s),
    "alignment": lambda w, m, s, g, y: F.alignment(w, m, s),
    "alignment_loss": lambda w, m, s, g, y: F.alignment_loss(w.clone().requires_grad_(), m, s),
    "alignment_loss_and_grad": lambda w, m, s, g, y: F.alignment_loss_and_grad(w, m, s),
    "slerp": lambda w, m, s, g, y: F.slerp(w, m, s, alpha=0.1, threshold=0.9),
    "slerp by a tensor": lambda w, m, s, g, y: F.slerp(w, m, s, alpha=w.new_ones(()), threshold=0.9),
    "project_gradient": lambda w, m, s, g, y: F.project_gradient(g, w, m, s, gamma=0.3),
}


@pytest.mark.parametrize("name", FUNCTIONALS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_functionals(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spalign.host.can_read", lambda features: False)
    monkeypatch.setattr("spalign.host.can_align", lambda *_: False)
    p = make_problem(1, num_classes=C, dim=D, dtype=torch.float32)
    tensors = [x.to(device) for x in (*p, torch.arange(C))]
    with Recorder() as recorder:
        FUNCTIONALS[name](*tensors)
    assert recorder.operations
    assert recorder.syncs == []


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.long().abs().bincount(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.clone().__setitem__(x > 0, torch.ones(int((x > 0).sum()))),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_recorder_sees_what_it_is_there_for(sync: Callable[[Tensor], object]) -> None:
    with Recorder() as recorder:
        sync(torch.randn(8))
    assert recorder.syncs


READS = {"item", "tolist", "cpu", "nonzero", "unique", "bincount", "numpy", "masked_select", "allclose", "equal"}


def test_the_source_reads_no_tensor_value() -> None:
    """Methods that copy to the host; numpy's only read what is on the CPU already."""
    package = Path(inspect.getfile(sys.modules["spalign"])).parent
    found = []
    core = ("functional", "host", "tracker", "reg", "slerp", "proj", "metrics", "classifier", "distributed")
    for file in (package / f"{name}.py" for name in (*core, "kernels/__init__")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = node.func.attr
                if name in READS:
                    found.append((file.stem, name))
    # The kernels' comparison with torch's operations, once for each GPU, waits for its outcome.
    allowed = {("tracker", "numpy"), ("host", "numpy"), ("host", "bincount"), ("__init__", "allclose")}
    assert set(found) <= allowed, found
