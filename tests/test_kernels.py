"""The Triton kernels against the paper's formulas: on a GPU where there is one, in Triton's interpreter elsewhere.

The interpreter shows what a program computes and where it writes, one program after the other; that the kernels compile
for GPUs of several generations is shown by compiling them, which needs none.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from operations import is_view
from pretended_gpu import GPU, PretendedGpu, pretended_gpu, why_kernels_cannot_run
from problems import HEADS, head_on, make_batch, make_problem, state_of, to_bools, to_numpy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import spalign
from spalign import functional as F
from spalign import kernels

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which comes with torch's CUDA builds", allow_module_level=True)
VERSION = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
WHY_NOT = why_kernels_cannot_run()
runs = pytest.mark.skipif(bool(WHY_NOT) and not HAS_GPU, reason=WHY_NOT)
# numpy, which the interpreter computes with, tells of overflow, as a GPU does not, and of what it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
# float32 against float64: sums of up to 100 values of O(10), each rounded by 6e-8 of itself.
SINGLE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}
# (N, C, D): fewer and more samples than classes, dimensions that fill no block, one of each.
SIZES = [(24, 5, 6), (9, 40, 33), (1, 2, 1), (33, 3, 130)]


def device(x: Tensor) -> Tensor:
    return x.to(DEVICE)


def zeros(c: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a state of no class seen: means, weights, sum of the means."""
    return (
        torch.zeros(c, d, device=DEVICE),
        torch.zeros(c, device=DEVICE),
        torch.zeros(d, dtype=torch.float64, device=DEVICE),
    )


def numpy(x: Tensor) -> reference.Array:
    return to_numpy(x.cpu())


def labels(kind: str, seed: int, n: int, c: int) -> tuple[Tensor, reference.Array]:
    """Return targets of some kind and what they are in the reference, in float64 or as they are."""
    rng = torch.Generator().manual_seed(seed)
    if kind == "soft":
        q = torch.softmax(3 * torch.randn(n, c, generator=rng), 1)
        q[::4] = 1.0 / c  # say nothing
        q[1::5] = 0.0
        return q, to_numpy(q)
    y = torch.randint(0, c, (n,), generator=rng)
    if kind == "with strangers":
        y[::3] = torch.tensor([-100, -1, c, c + 7, 2**40])[torch.arange(len(y[::3])) % 5]
    return y, y.numpy()


# --- class means ------------------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("momentum", [None, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["hard", "with strangers", "soft"])
@pytest.mark.parametrize("size", SIZES)
def test_a_stream_equals_the_reference(momentum: float | None, kind: str, size: tuple[int, int, int]) -> None:
    n, c, d = size
    state = zeros(c, d)
    mean, weight = np.zeros((c, d)), np.zeros(c)
    for step in range(3):
        h, _ = make_batch(step, n, c, d)
        h[step % n, 0] = (torch.nan, torch.inf, -torch.inf)[step]
        h[-1, -1] = 3e38  # which cannot be squared
        usable = to_numpy(h)
        usable[-1, -1] = np.nan
        targets, want_targets = labels(kind, step, n, c)
        rate, class_N = kernels.update_class_means_(*state, device(h), device(targets), momentum, -100)
        before = weight
        mean, weight = reference.update_class_means(mean, weight, usable, want_targets, momentum)
        np.testing.assert_allclose(numpy(state[0]), mean, **SINGLE)
        np.testing.assert_allclose(numpy(state[1]), weight, rtol=1e-6)
        np.testing.assert_allclose(numpy(state[2]), mean.sum(0), rtol=1e-5, atol=1e-3)  # of up to 40 float32 means
        q_NC = reference.label_weights(usable, want_targets, c)
        rate_NC = q_NC * reference.update_rates(before, q_NC.sum(0), momentum)
        if class_N is None:
            np.testing.assert_allclose(numpy(rate), rate_NC, rtol=1e-4, atol=1e-7)  # weights of 1e-7 of a label's floor
        else:
            np.testing.assert_allclose(numpy(rate), rate_NC.sum(1), rtol=1e-6)
            assert class_N.tolist() == [int(row.argmax()) if row.any() else 0 for row in rate_NC]


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_dtypes_and_layouts(dtype: torch.dtype, index: torch.dtype) -> None:
    n, c, d = 12, 5, 7
    h, y = make_batch(1, n, c, d, dtype)
    for features, targets in (
        (h, y.to(index)),
        (h.t().contiguous().t(), y.to(index)),
        (torch.stack([h, h], 1)[:, 0], torch.stack([y, y], 1).to(index)[:, 0]),
    ):
        state = zeros(c, d)
        kernels.update_class_means_(*state, device(features), device(targets), 0.1, -100)
        want, _ = reference.update_class_means(np.zeros((c, d)), np.zeros(c), to_numpy(h), y.numpy(), 0.1)
        np.testing.assert_allclose(numpy(state[0]), want, **SINGLE)


@runs
def test_soft_labels_of_half_precision() -> None:
    n, c, d = 12, 5, 7
    h, _ = make_batch(1, n, c, d, torch.bfloat16)
    q = torch.softmax(torch.randn(n, c), 1).to(torch.bfloat16)
    state = zeros(c, d)
    kernels.update_class_means_(*state, device(h), device(q.t().contiguous().t()), None, -100)
    want, _ = reference.update_class_means(np.zeros((c, d)), np.zeros(c), to_numpy(h), to_numpy(q), None)
    np.testing.assert_allclose(numpy(state[0]), want, **SINGLE)


@runs
def test_a_label_to_ignore_within_the_classes() -> None:
    n, c, d = 12, 5, 7
    h, y = make_batch(1, n, c, d)
    state = zeros(c, d)
    kernels.update_class_means_(*state, device(h), device(y), 0.1, 3)
    want, weight = reference.update_class_means(np.zeros((c, d)), np.zeros(c), to_numpy(h), y.numpy(), 0.1, 3)
    np.testing.assert_allclose(numpy(state[0]), want, **SINGLE)
    assert state[1].tolist() == weight.tolist()
    assert weight[3] == 0
    assert (y == 3).any()


@runs
def test_without_a_sum_of_the_means() -> None:
    h, y = make_batch(1, 12, 5, 7)
    with_sum, without = zeros(5, 7), zeros(5, 7)
    kernels.update_class_means_(*with_sum, device(h), device(y), 0.1, -100)
    kernels.update_class_means_(*without[:2], None, device(h), device(y), 0.1, -100)
    assert torch.equal(with_sum[0], without[0])
    assert not without[2].any()


@runs
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_equal_arguments_give_equal_bits_and_autograd_sees_the_write(kind: str) -> None:
    n, c, d = 200, 3, 20
    h, _ = make_batch(1, n, c, d)
    targets, _ = labels(kind, 1, n, c)
    states = []
    for _ in range(2 if HAS_GPU else 1):
        state = zeros(c, d)
        versions = [x._version for x in state[:2]]
        kernels.update_class_means_(*state, device(h), device(targets), 0.1, -100)
        assert all(x._version > version for x, version in zip(state[:2], versions, strict=True))
        states.append(state)
    for other in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states[0], other, strict=True))


@runs
def test_means_that_have_converged_stay_and_so_does_their_sum() -> None:
    """Every sample lies on its mean: nothing moves, bit for bit, however often."""
    c, d = 3, 5
    mean = torch.arange(1.0, 1.0 + c * d).view(c, d)
    y = torch.arange(12) % c
    state = zeros(c, d)
    for _ in range(5):
        kernels.update_class_means_(*state, device(mean[y]), device(y), 0.1, -100)
        assert torch.equal(state[0].cpu(), mean)
        assert torch.equal(state[2].cpu(), mean.double().sum(0))


@runs
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_sum_of_the_means_follows_what_they_really_moved_by(kind: str) -> None:
    """A mean that a step rounds away does not move: adding up the steps it did not take would drift without bound."""
    c, d = 3, 5
    mean = 1000.0 + torch.arange(1.0, 1.0 + c * d).view(c, d)
    y = torch.arange(12) % c
    state = zeros(c, d)
    state[0].copy_(mean)
    state[1].fill_(1.0)
    state[2].copy_(state[0].double().sum(0))
    targets = y if kind == "hard" else nn.functional.one_hot(y, c).float()
    for _ in range(5):
        kernels.update_class_means_(*state, device(mean[y] + 1e-4), device(targets), 0.1, -100)
        assert torch.equal(state[0].cpu(), mean), "1e-5 of 1000 is less than a bit"
        assert torch.equal(state[2].cpu(), mean.double().sum(0))


@runs
@pytest.mark.parametrize("seen", [0, 1, 2, 5])
def test_the_global_mean_and_what_may_be_aligned(seen: int) -> None:
    c, d = 5, 1030  # two blocks of D
    mean, weight, _ = zeros(c, d)
    mean[:seen] = torch.randn(seen, d).to(DEVICE)
    weight[:seen] = 0.5
    alignable_C, center_D = kernels.geometry(weight, mean.double().sum(0))
    want = reference.global_mean(numpy(mean), np.arange(c) < seen)
    np.testing.assert_allclose(numpy(center_D), want, rtol=1e-6, atol=1e-7)
    assert alignable_C.tolist() == [seen > 1 and i < seen for i in range(c)]


# --- alignment --------------------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("size", SIZES[:2] + SIZES[3:])
@pytest.mark.parametrize("kind", ["with strangers", "soft"])
def test_the_loss_and_its_gradients_equal_the_reference(
    size: tuple[int, int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, c, d = size
    monkeypatch.setattr(kernels, "MOST_PROGRAMS", 4)  # several rows for each
    p = make_problem(1, num_classes=c, dim=d)
    w = p.w.float()
    state = zeros(c, d)
    state[0].copy_(p.mean)
    state[1].copy_(p.seen)
    state[2].copy_(state[0].double().sum(0))
    h, _ = make_batch(2, n, c, d)
    targets, want_targets = labels(kind, 2, n, c)
    before = numpy(state[1])
    rate, class_N = kernels.update_class_means_(*state, device(h), device(targets), 0.1, -100)
    alignable_C, center_D = kernels.geometry(state[1], state[2])
    loss, by_weight, by_features = kernels.alignment_terms(
        device(w), state[0], alignable_C, center_D, rate, class_N, by_weight=True
    )
    mean, _ = reference.update_class_means(to_numpy(p.mean), before, to_numpy(h), want_targets, 0.1)
    seen = to_bools(alignable_C.cpu())
    q_NC = reference.label_weights(to_numpy(h), want_targets, c)
    rate_NC = q_NC * reference.update_rates(before, q_NC.sum(0), 0.1)
    nw = to_numpy(w)
    assert by_weight is not None
    assert by_features is not None
    np.testing.assert_allclose(loss.item(), reference.alignment_loss(nw, mean, seen), **SINGLE)
    np.testing.assert_allclose(numpy(by_weight), reference.alignment_loss_grad_weight(nw, mean, seen), **SINGLE)
    want = rate_NC @ reference.alignment_loss_grad_mean(nw, mean, seen)
    np.testing.assert_allclose(numpy(by_features), want, **SINGLE)
    alone, nothing, nor_this = kernels.alignment_terms(
        device(w), state[0], alignable_C, center_D, None, None, by_weight=False
    )
    assert torch.equal(alone, loss)
    assert nothing is None
    assert nor_this is None


@runs
def test_rows_without_a_direction_add_nothing_to_the_loss() -> None:
    """A zero row, one too short to square, one that is no number, a mean on the global mean, no class seen."""
    p = make_problem(1, num_classes=6, dim=8, dtype=torch.float32, unseen=())
    center_D = p.mean.mean(0)
    p.w[0], p.w[1], p.w[2, 3] = 0.0, 1e-30, torch.nan
    p.mean[3] = center_D
    for seen in (p.seen, torch.zeros_like(p.seen)):
        loss, by_weight, _ = kernels.alignment_terms(
            device(p.w), device(p.mean), device(seen), device(center_D), None, None, by_weight=True
        )
        w, mean = p.w[4:].double().numpy(), (p.mean - center_D).double().numpy()[4:]
        cos = (w * mean).sum(1) / np.linalg.norm(w, axis=1) / np.linalg.norm(mean, axis=1)
        want = sum(1 - cos) / 6 if seen.any() else 0.0
        np.testing.assert_allclose(loss.item(), want, rtol=1e-5)
        assert by_weight is not None
        assert not by_weight[:4].any()
        assert by_weight[4:].any() == seen.any()


@runs
@pytest.mark.parametrize("radial", ["paper", "keep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 8), (3, 130)])
def test_the_projection_equals_the_reference(radial: F.Radial, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    p = make_problem(3, num_classes=shape[0], dim=shape[1], dtype=dtype, unseen=(1,))
    mean = p.mean.float()
    mean_, seen = to_numpy(mean), to_bools(p.seen)
    center_D = torch.from_numpy(reference.global_mean(mean_, seen)).float()
    want = reference.project_gradient(to_numpy(p.g), to_numpy(p.w), mean_, seen, 0.3, radial)
    # bfloat16 has 8 bits, and the result is one.
    tolerance = SINGLE if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    rows = device(p.w), device(mean), device(p.seen), device(center_D)
    for g in (device(p.g), device(p.g).t().contiguous().t()):
        out = torch.empty(shape, dtype=dtype, device=DEVICE)
        kernels.project_gradient(out, g, *rows, gamma=0.3, paper=radial == "paper")
        np.testing.assert_allclose(numpy(out), want, **tolerance)
        kernels.project_gradient(g, g, *rows, gamma=0.3, paper=radial == "paper")
        assert torch.equal(g, out), "in place"


@runs
def test_gradients_that_are_not_finite_stay_so_and_touch_no_other_row() -> None:
    p = make_problem(3, num_classes=4, dim=8, dtype=torch.float32, unseen=())
    rows = device(p.w), device(p.mean), device(p.seen), device(p.mean.mean(0))
    g = device(p.g)
    want = torch.empty_like(g)
    kernels.project_gradient(want, g, *rows, gamma=0.3, paper=True)
    g[1, 2], g[2, 3] = torch.nan, torch.inf
    kernels.project_gradient(g, g, *rows, gamma=0.3, paper=True)
    assert torch.equal(g[[0, 3]], want[[0, 3]])
    assert g[1].isnan().all(), "as in torch's operations, whose sums are no numbers either"
    assert not g[2].isfinite().all()


# --- which of them is used, and when ----------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    if HAS_GPU:
        pytest.skip("a pretended GPU is of use where there is none")
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    with pretended_gpu(own_kernels=True) as pretended:
        yield pretended


class Count(TorchDispatchMode):
    """Count torch's operations that are no views and no mere reservations of memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not is_view(func) and not any(word in func._schema.name for word in ("empty", "profiler")):
            self.operations.append(func._schema.name)
        return out


HARD = ["move_means", "add_deltas", "geometry", "align_rows", "add_terms", "pull_back"]
SOFT = ["soft_weights", "move_soft_means", "add_deltas", "geometry", "align_rows", "add_terms"]


@pytest.mark.parametrize(("kind", "names"), [("hard", HARD), ("soft", SOFT)])
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_projection_take_few_launches_and_give_what_the_cpu_gives(
    kind: str, names: list[str], head: str, gpu: PretendedGpu
) -> None:
    """What the step of a strategy costs a GPU: a kernel each, and the little that is left to torch's operations."""
    n, c, d = 12, 5, 6
    h, _ = make_batch(1, n, c, d)
    targets, _ = labels(kind, 1, n, c)
    states = []
    for place in ("cpu", "cuda"):
        classifier, parameters = head_on(place, head, c, d)
        tracker = spalign.ClassMeanTracker.for_classifier(classifier)
        spareg = spalign.SpARegLoss(classifier, tracker)
        optimizer = spalign.SpAProj(torch.optim.SGD(parameters, lr=0.1), classifier, tracker, gamma=0.3)
        features = h.clone().to(place).requires_grad_()
        there = targets.to(place)
        for _ in range(2):
            gpu.launches.clear()
            with Count() as forward:
                loss = spareg(features, there)
            loss.backward()
            if place == "cuda":
                assert gpu.launches == names
            with Count() as step:
                optimizer.step()
        if place == "cuda":
            lengths = ["geometry"] if "norm" in head else []  # a leaf of its own, whose gradient is scaled
            assert gpu.launches == [*names, "geometry", "project", *lengths]
            if head == "linear":
                # sum of the seen, clone of the loss; of soft labels the weighted sums; SGD's update of the weight.
                assert len(forward.operations) <= (4 if kind == "hard" else 9), forward.operations
                assert len(step.operations) <= 1, step.operations
        assert features.grad is not None
        states.append([*parameters, *state_of(tracker).values(), features.grad, loss])
    for here, there in zip(*states, strict=True):
        # Two steps of sums of 12 values of O(10), in another order.
        torch.testing.assert_close(there.detach().cpu(), here.detach(), rtol=1e-4, atol=1e-5)


def test_what_the_kernels_do_not_take_is_left_to_torch(gpu: PretendedGpu) -> None:
    """Other dtypes, more than fits, no samples: the same results, by no launch of ours."""
    h, y = make_batch(1, 12, 5, 6)

    def update(tracker: spalign.ClassMeanTracker, h: Tensor, y: Tensor) -> list[str]:
        gpu.launches.clear()
        tracker.to(GPU).update(h.to(GPU), y.to(GPU))
        return [name for name in gpu.launches if name != "add_deltas"]

    def tracker() -> spalign.ClassMeanTracker:
        return spalign.ClassMeanTracker(5, 6)

    assert update(tracker(), h, y) == ["move_means"]
    assert update(tracker(), h.double(), y) == []
    assert update(tracker().double(), h, y) == []
    assert update(tracker(), h[:0], y[:0]) == []
    assert update(tracker(), h.repeat(400, 1), y.repeat(400)) == []
    soft = nn.functional.one_hot(y, 5).float()
    assert update(tracker(), h, soft) == ["soft_weights", "move_soft_means"]
    assert update(tracker(), h, soft.double()) == []
    wide = spalign.ClassMeanTracker(5, 9000)
    assert update(wide, h.repeat(1, 1500), y) == []
    gpu.launches.clear()
    F.alignment(torch.ones(5, 6, device=GPU), tracker().to(GPU).mean, torch.ones(5, device=GPU) > 0)
    assert gpu.launches == []


def negated(x: Tensor) -> Tensor:
    """Return the same values, of which memory holds the negatives."""
    return torch.complex(x, -x).conj().imag


def test_a_kernel_gets_only_what_fits_together_and_lies_in_memory_as_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pointers know no shapes, strides, devices or signs: what does not fit would be read from elsewhere."""
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(kernels, "_ready", {None: True})
    h, y, soft = torch.ones(12, 6), torch.zeros(12, dtype=torch.int64), torch.ones(12, 5)
    state = torch.zeros(5, 6), torch.zeros(5), torch.zeros(6, dtype=torch.float64)
    mean, weight, mean_sum = state
    assert kernels.can_update(*state, h, y)
    assert kernels.can_update(*state, h, soft)
    for wrong in (
        (torch.zeros(5, 7), weight, mean_sum, h, y),
        (mean, torch.zeros(4), mean_sum, h, y),
        (mean, weight, torch.zeros(7, dtype=torch.float64), h, y),
        (mean, weight, torch.zeros(6, 2, dtype=torch.float64)[:, 0], h, y),
        (mean, weight, mean_sum, h[0], y),
        (mean, weight, mean_sum, h, y[:11]),
        (mean, weight, mean_sum, h, y[:, None]),
        (mean, weight, mean_sum, h, y > 0),
        (mean, weight, mean_sum, h, soft[:, :4]),
        (mean, weight, mean_sum, negated(h), y),
        (mean, weight, mean_sum, h, negated(soft)),
        (mean.to("meta"), weight, mean_sum, h, y),
    ):
        assert not kernels.can_update(*wrong)
    assert kernels.can_read(*state)
    assert not kernels.can_read(mean, weight, torch.zeros(6, 2, dtype=torch.float64)[:, 0])
    assert not kernels.can_read(mean, weight, mean_sum[:5])
    seen, center = weight == 0, torch.zeros(6)
    rows = mean, mean, seen, center, mean
    assert kernels.can_align(*rows)
    for place, other in (
        (0, torch.zeros(4, 6)),
        (0, negated(mean)),
        (0, mean.to("meta")),
        (2, weight),
        (2, seen[:4]),
        (3, torch.zeros(1)),
        (4, torch.zeros(5, 1)),
    ):
        assert not kernels.can_align(*rows[:place], other, *rows[place + 1 :])
    answers = []

    def asks(g: Tensor) -> Tensor:
        answers.append(kernels.can_align(mean, mean, seen, center, g))
        return g

    torch.func.vmap(asks)(mean.expand(2, 5, 6))
    assert answers == [False], "what stands for the examples has no memory"


def test_shapes_that_do_not_fit_raise_what_torch_raises_and_broadcast_as_there(gpu: PretendedGpu) -> None:
    p = make_problem(1, num_classes=5, dim=6, dtype=torch.float32, unseen=())
    w, g, mean, seen, center = (x.to(GPU) for x in (p.w, p.g, p.mean, p.seen, p.mean.mean(0)))
    with pytest.raises(RuntimeError, match="must match the size"):
        F.alignment_loss(w[:4], mean, seen, center_D=center)
    with pytest.raises(RuntimeError, match="must match the size"):
        F.project_gradient(g[:, :4], w, mean, seen, gamma=0.3, center_D=center)
    F.alignment_loss(w, mean, seen, center_D=center.new_zeros(1))
    assert gpu.launches == []


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_compiled_graph_gets_the_layout_that_it_was_promised(where: str, gpu: PretendedGpu) -> None:
    """Its code reads by the strides of the fake result, also of soft labels that lie class by class."""
    h, _ = make_batch(1, 12, 5, 6)
    q, y = torch.softmax(torch.randn(5, 12), 0).t(), torch.arange(12) % 5
    for targets in (q, y, torch.stack([y, y], 1)[:, 0]):
        arguments = [x.to(where) for x in (*(x.cpu() for x in zeros(5, 6)), h, targets)]
        assert arguments[-1].stride() != (5, 1)
        mean, weight, mean_sum, features, labels = arguments
        real = F.update_class_means_(mean, weight, features, labels, mean_sum_D=mean_sum).outputs()
        promised = F._empty_outputs(*arguments)
        assert [(x.shape, x.stride()) for x in real] == [(x.shape, x.stride()) for x in promised]


@runs
def test_numbers_that_triton_does_not_take() -> None:
    h, y = make_batch(1, 12, 5, 7)
    state, numbers_of_python = zeros(5, 7), zeros(5, 7)
    momentum: Any = np.float32(0.25)
    kernels.update_class_means_(*state, device(h), device(y), momentum, 2**70)
    kernels.update_class_means_(*numbers_of_python, device(h), device(y), 0.25, -100)
    assert torch.equal(state[0], numbers_of_python[0])


@runs
def test_rates_and_labels_of_every_other_sample() -> None:
    p = make_problem(1, num_classes=5, dim=6, dtype=torch.float32)
    rate, labels_N = torch.rand(8), torch.arange(8) % 5
    rows = device(p.w), device(p.mean), device(p.seen), device(p.mean.mean(0))
    _, _, of_all = kernels.alignment_terms(*rows, device(rate), device(labels_N), by_weight=False)
    _, _, of_some = kernels.alignment_terms(*rows, device(rate)[::2], device(labels_N)[::2], by_weight=False)
    assert of_all is not None
    assert of_some is not None
    assert torch.equal(of_some, of_all[::2])


@runs
def test_they_agree_with_torch_where_nothing_is_broken() -> None:
    assert kernels.disagreement(torch.device(DEVICE)) == ""


@runs
def test_they_agree_with_torch_where_its_products_are_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.set_float32_matmul_precision("high"): a GPU multiplies float32 matrices with 11 bits of each entry."""

    def rounded(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        bits = x.contiguous().view(torch.int32)
        return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)  # of 23 bits after the first, 10 stay

    real = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda x, y: real(rounded(x), rounded(y)))
    assert kernels.disagreement(torch.device(DEVICE)) == ""


@runs
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("move_means", "class means (hard labels)"),
        ("move_soft_means", "class means (soft labels)"),
        ("add_deltas", "sum of the means"),
        ("geometry", "global mean"),
        ("add_terms", "loss"),
        ("pull_back", "gradient by the features (hard labels)"),
        ("project", "projection"),
    ],
)
def test_a_kernel_that_does_nothing_is_found_out(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = kernels._code()

    class Lazy:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: None

    broken = types.SimpleNamespace(**{**vars(code), name: Lazy()})
    monkeypatch.setattr(kernels, "_code", lambda: broken)
    # Memory that nothing was written to holds anything, also what was to be written.
    real = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *args, **options: real(x, *args, **options).fill_(1))
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: torch.ones_like(x, **options))
    assert what in kernels.disagreement(torch.device(DEVICE))


def pretend(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Let no device be known yet, and have functions of the module or of torch.cuda do something else."""
    monkeypatch.setattr(kernels, "_ready", {})
    defaults = {"get_device_capability": lambda device: (9, 0), "get_sync_debug_mode": lambda: 0}
    for name, function in {**defaults, **functions}.items():
        monkeypatch.setattr(kernels if hasattr(kernels, name) else torch.cuda, name, function)


def test_kernels_that_differ_or_do_not_compile_are_not_used(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: Any) -> str:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")

    h, y = make_batch(1, 12, 5, 6)
    for disagreement, reason in (
        (fails, "RuntimeError: Failed to find C compiler"),
        (lambda device: "they differ in class means", "they differ in class means"),
    ):
        pretend(monkeypatch, disagreement=disagreement)
        tracker = spalign.ClassMeanTracker(5, 6, device=GPU)
        with pytest.warns(UserWarning, match=f"not used on cuda:0.*{reason}.*SPALIGN_KERNELS=0"):
            tracker.update(h.to(GPU), y.to(GPU))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            tracker.update(h.to(GPU), y.to(GPU))
        assert gpu.launches == []
        assert tracker.seen.any()


@pytest.mark.parametrize("told", [0, 2])
def test_they_are_compared_once_and_not_while_a_graph_is_captured(
    told: int, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[Any] = []

    def disagreement(device: Any) -> str:
        compared.append(device)
        torch.zeros(1, device=device).item()  # waits
        return ""

    pretend(monkeypatch, disagreement=disagreement, get_sync_debug_mode=lambda: told)
    h, y = (x.to(GPU) for x in make_batch(1, 12, 5, 6))
    tracker = spalign.ClassMeanTracker(5, 6, device=GPU)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        tracker.update(h, y)
    assert (compared, gpu.launches) == ([], [])
    numbered, current = torch.device("cuda", 0), torch.device("cuda")
    assert [kernels.in_use(device) for device in (numbered, current)] == [None, None]
    modes: list[Any] = []
    real = torch.cuda.set_sync_debug_mode

    def set_mode(mode: Any) -> None:
        modes.append(mode)
        real(mode)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    tracker.update(h, y)
    tracker.update(h, y)
    assert len(compared) == 1
    # Setting it warns of a prototype, so only for users who have set it.
    assert modes == (["default", told] if told else []), "waiting is allowed while comparing, and then as before"
    assert gpu.launches == ["move_means", "add_deltas"] * 2
    assert [kernels.in_use(device) for device in (numbered, current)] == [True, True]


@pytest.mark.parametrize("around", ["inference", "autocast", "float64", "deterministic"])
def test_they_are_compared_alike_whatever_is_set_around_their_first_use(
    around: str, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    x = torch.ones(1, device=GPU)
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if around == "inference":
            with torch.inference_mode():
                assert kernels.ready(x)
        elif around == "autocast":
            with torch.autocast("cuda", torch.bfloat16):
                assert kernels.ready(x)
        elif around == "float64":
            torch.set_default_dtype(torch.float64)
            try:
                assert kernels.ready(x)
            finally:
                torch.set_default_dtype(torch.float32)
        else:
            torch.use_deterministic_algorithms(True)
            try:
                assert kernels.ready(x)
            finally:
                torch.use_deterministic_algorithms(False)
    assert "pull_back" in gpu.launches
    assert torch.equal(torch.random.get_rng_state(), state), "the user's random numbers"


@pytest.mark.parametrize("reason", ["switched off", "no Triton", "an old GPU", "ROCm"])
def test_where_they_cannot_be_wanted_nothing_is_said(
    reason: str, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(device: Any) -> str:
        raise AssertionError

    pretend(monkeypatch, disagreement=never)
    if reason == "switched off":
        monkeypatch.setenv("SPALIGN_KERNELS", "0")
    if reason == "no Triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if reason == "an old GPU":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    if reason == "ROCm":
        monkeypatch.setattr(torch.version, "hip", "6.2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.ready(torch.ones(1, device=GPU))


# --- compiling --------------------------------------------------------------------------------------------------------

COMPILE = r"""
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spalign import kernels
code = kernels._code()
TYPES = {
    **dict.fromkeys(("owner_N", "owner_C", "alignable_C"), "*i8"),
    **dict.fromkeys(("class_N", "count"), "*i64"),
    **dict.fromkeys(("ignore_index", "num_samples", "num_classes", "dim", "programs"), "i32"),
    **dict.fromkeys(("momentum", "gamma", "floor_squared", "tiny", "least"), "fp32"),
    "mean_sum_D": "*fp64", "features": "*bf16", "targets_N": "*i64",
}
NOTHING = dict.fromkeys(("by_weight_CD", "e_CD", "e_sum_PD", "e_sum_D"))  # what is not asked for
ONES = ("num_samples", "num_classes", "dim", "programs")  # Triton makes a constant of an integer that is 1
def unordered(ttir):
    # What every thread loads, and one of them stores while others may still be about to load it.
    loaded = re.findall(r"tt\.load (%\w+) : !tt\.ptr", ttir)
    between = {x: re.findall(rf"tt\.load {x} :(.*?)tt\.store {x},", ttir, re.S) for x in loaded}
    return [x for x, texts in between.items() if any("barrier" not in text for text in texts)]
def narrow(ttir):
    # Products of 32 bits but by a constant, which is a block's size: places in large tensors do not fit.
    products = re.findall(r"arith\.muli (%\w+), (%\w+) : (?:i32|tensor<\w+xi32>)", ttir)
    return [product for product in products if not any(re.fullmatch(r"%c\d+_i32(_\d+)?", x) for x in product)]
built = {}
for dim in (1, 64, 2048, kernels.MOST_DIMENSIONS):
    block, block_r = kernels._block(dim), kernels._tile(kernels._block(dim))
    for name, options, warps in (
        ("move_means", {"CUMULATIVE": False, "BLOCK_R": block_r, "BLOCK_N": kernels.MOST_SAMPLES}, 4),
        ("move_means", {"CUMULATIVE": True, "BLOCK_R": block_r, "BLOCK_N": 16}, 4),
        ("soft_weights", {"BLOCK_C": block}, 1),
        ("move_soft_means", {"CUMULATIVE": True, "BLOCK_R": block_r}, 4),
        ("move_soft_means", {"CUMULATIVE": False, "BLOCK_R": block_r}, 4),
        ("add_deltas", {"BLOCK_R": 32, "BLOCK_D": 64}, 4),
        ("geometry", {"BLOCK_C": 1024, "BLOCK_D": min(block, 1024)}, 4),
        ("align_rows", {"BY_WEIGHT": True, "BY_MEAN": True}, 1),
        ("align_rows", {"BY_WEIGHT": False, "BY_MEAN": False, **NOTHING}, 1),
        ("add_terms", {"BY_MEAN": True, "BLOCK_P": 32, "BLOCK_D": 64}, 4),
        ("add_terms", {"BY_MEAN": False, "BLOCK_P": 32, "BLOCK_D": 64, **NOTHING}, 4),
        ("pull_back", {}, 1),
        ("project", {"PAPER": True}, 1),
        ("project", {"PAPER": False}, 1),
    ):
        kernel = getattr(code, name)
        ones = {argument: 1 for argument in kernel.arg_names if argument in ONES or argument.endswith("_stride")}
        known = {"BLOCK_D": block, **options, **(ones if dim == 1 else {})}
        constants = {key: value for key, value in known.items() if key in kernel.arg_names}
        signature = {}
        for argument in kernel.arg_names:
            if argument not in constants:
                default = "i32" if argument.endswith("_stride") else "*fp32"
                signature[argument] = TYPES.get(argument, default)
            elif "constexprs" in ASTSource.__init__.__code__.co_varnames:
                signature[argument] = "constexpr"
        if "BLOCK_D" not in options:
            warps = kernels._warps(block, warps)
        for arch in map(int, sys.argv[1:]):
            source = ASTSource(kernel, signature, constants)
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
            ttir = made.asm["ttir"]
            facts = len(made.asm["cubin"]), made.metadata.shared, unordered(ttir), narrow(ttir)
            built[f"{len(built)}: {name}, D {dim}, sm_{arch}"] = facts
print(json.dumps(built))
"""


def test_they_compile_for_three_generations_of_gpus(tmp_path: Path) -> None:
    """Ampere, Hopper and, where Triton knows it, Blackwell; without a GPU, in a process without the interpreter."""
    architectures = ["80", "90"] + (["100"] if VERSION >= (3, 3) else [])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, *architectures], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    built = json.loads(run.stdout)
    assert len(built) == 4 * 14 * len(architectures)
    for name, (size, shared, races, narrow) in built.items():
        assert size > 1000, name
        assert races == [], f"{name}: stored without waiting for the threads that load it"
        assert narrow == [], f"{name}: places that overflow"
        assert shared <= 48 * 1024, f"{name}: more shared memory than every GPU gives without asking"
