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


def many_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no classifier count as one of few classes, and few programs for its rows."""
    monkeypatch.setattr(kernels, "FEW_ELEMENTS", 0)
    monkeypatch.setattr(kernels, "MOST_PROGRAMS", 4)  # several rows for each


@runs
@pytest.mark.parametrize("how", ["of state", "few", "many"])
@pytest.mark.parametrize("size", [*SIZES[:2], *SIZES[3:], (7, 20, 600)])  # the last has more than a tile of rows
@pytest.mark.parametrize("kind", ["with strangers", "soft"])
def test_the_loss_and_its_gradients_equal_the_reference(
    size: tuple[int, int, int], kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, c, d = size
    if how == "many":
        many_classes(monkeypatch)
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
    of_state = how == "of state"
    rows = device(w), state[0], *(state[1:] if of_state else (alignable_C, center_D))
    loss, terms = kernels.alignment_terms(*rows, by_weight=True, by_mean=True, of_state=of_state)
    gradients = F._gradients if class_N is None else kernels.pull_back
    half = torch.tensor(0.5, device=DEVICE)
    by_weight, by_features = gradients(terms, half, rate, class_N, torch.float32, torch.float32)
    mean, _ = reference.update_class_means(to_numpy(p.mean), before, to_numpy(h), want_targets, 0.1)
    seen = to_bools(alignable_C.cpu())
    q_NC = reference.label_weights(to_numpy(h), want_targets, c)
    rate_NC = q_NC * reference.update_rates(before, q_NC.sum(0), 0.1)
    nw = to_numpy(w)
    assert by_weight is not None
    assert by_features is not None
    np.testing.assert_allclose(loss.item(), reference.alignment_loss(nw, mean, seen), **SINGLE)
    np.testing.assert_allclose(numpy(by_weight), 0.5 * reference.alignment_loss_grad_weight(nw, mean, seen), **SINGLE)
    want = 0.5 * rate_NC @ reference.alignment_loss_grad_mean(nw, mean, seen)
    np.testing.assert_allclose(numpy(by_features), want, **SINGLE)
    alone, nothing = kernels.alignment_terms(*rows, by_weight=False, by_mean=False, of_state=of_state)
    assert torch.equal(alone, loss)
    assert nothing == (None, None, None, None)


@runs
@pytest.mark.parametrize("seen", [0, 1, 2, 5])
def test_the_state_is_added_up_afresh_where_it_is_asked_for(seen: int) -> None:
    """Who reads the regularizer alone writes nothing; and a single class lies on the global mean."""
    c, d = 5, 7
    mean, weight, mean_sum = zeros(c, d)
    mean[:seen] = torch.randn(seen, d).to(DEVICE)
    weight[:seen] = 0.5
    w = torch.randn(c, d)
    for write_sum in (False, True):
        loss, terms = kernels.alignment_terms(
            device(w), mean, weight, mean_sum, by_weight=True, by_mean=True, of_state=True, write_sum=write_sum
        )
        want = mean.double().sum(0) if write_sum else torch.zeros_like(mean_sum)
        torch.testing.assert_close(mean_sum, want, rtol=1e-14, atol=1e-14)  # float64, in another order
    seen_C = np.arange(c) < seen
    np.testing.assert_allclose(loss.item(), reference.alignment_loss(to_numpy(w), numpy(mean), seen_C), **SINGLE)
    assert terms.by_weight is not None
    assert terms.share is not None
    assert terms.by_weight.any(1).tolist() == (seen_C & (seen > 1)).tolist()
    np.testing.assert_allclose(numpy(terms.share), (seen_C & (seen > 1)) / max(seen, 1), rtol=1e-6)


@runs
@pytest.mark.parametrize("asked", ["both", "features", "weight", "no sample"])
@pytest.mark.parametrize("gradients", [kernels.pull_back, F._gradients])
def test_gradients_meet_the_factor_before_they_lose_bits(gradients: Any, asked: str) -> None:
    """float16 has nothing between 0 and 6e-8; of what is not asked for nothing is made."""
    p = make_problem(1, num_classes=5, dim=6, dtype=torch.float32, unseen=())
    rows = device(1e8 * p.w), device(1e8 * p.mean), device(p.seen), device(1e8 * p.mean.mean(0))
    y = device(torch.arange(0 if asked == "no sample" else 8) % 5)
    rate, factor = torch.full((len(y),), 0.25, device=DEVICE), torch.tensor(2.0**20, device=DEVICE)
    _, terms = kernels.alignment_terms(*rows, by_weight=asked != "features", by_mean=asked != "weight")
    by_weight, by_features = gradients(terms, factor, rate, y, torch.float16, torch.float16)
    assert (by_weight is None) == (asked == "features")
    assert (by_features is None) == (asked == "weight")
    for made in (by_weight, by_features):
        if made is not None and made.numel():
            assert made.dtype == torch.float16
            assert 1e-5 < made.abs().max() < 1e-2, "a millionth of it is nothing in float16"


@runs
@pytest.mark.parametrize("many", [False, True])
def test_rows_without_a_direction_add_nothing_to_the_loss(many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zero row, one too short to square, one that is no number, a mean on the global mean, no class seen."""
    if many:
        many_classes(monkeypatch)
    p = make_problem(1, num_classes=6, dim=8, dtype=torch.float32, unseen=())
    center_D = p.mean.mean(0)
    p.w[0], p.w[1], p.w[2, 3] = 0.0, 1e-30, torch.nan
    p.mean[3] = center_D
    for seen in (p.seen, torch.zeros_like(p.seen)):
        loss, (by_weight, *_) = kernels.alignment_terms(
            device(p.w), device(p.mean), device(seen), device(center_D), by_weight=True, by_mean=False
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
    state = device(p.w), device(mean), 0.1 * device(p.seen), device(mean.double().sum(0))
    for g in (device(p.g), device(p.g).t().contiguous().t()):
        out = torch.empty(shape, dtype=dtype, device=DEVICE)
        kernels.project_gradient(out, g, *rows, gamma=0.3, paper=radial == "paper")
        np.testing.assert_allclose(numpy(out), want, **tolerance)
        kernels.project_gradient(out, g, *state, gamma=0.3, paper=radial == "paper", of_state=True)
        np.testing.assert_allclose(numpy(out), want, **tolerance)
        kernels.project_gradient(out, g, *rows, gamma=0.3, paper=radial == "paper")
        kernels.project_gradient(g, g, *rows, gamma=0.3, paper=radial == "paper")
        assert torch.equal(g, out), "in place"


@runs
@pytest.mark.parametrize("seen", [0, 1, 2])
def test_the_projection_finds_what_the_geometry_is(seen: int) -> None:
    """Of a single class, which lies on the global mean, and of none, nothing is projected."""
    p = make_problem(3, num_classes=5, dim=8, dtype=torch.float32, unseen=())
    mean, weight, _ = zeros(5, 8)
    mean[:seen], weight[:seen] = p.mean[:seen].to(DEVICE), 0.5
    mean_sum = 1.00001 * mean.double().sum(0)  # as far away as rounding would not take it
    g, w, out, want = device(p.g), device(p.w), torch.empty_like(mean), torch.empty_like(mean)
    kernels.project_gradient(out, g, w, mean, weight, mean_sum, gamma=0.3, paper=True, of_state=True)
    kernels.project_gradient(want, g, w, mean, *kernels.geometry(weight, mean_sum), gamma=0.3, paper=True)
    assert torch.equal(out, want)
    assert (out != g).any(1).tolist() == [seen > 1 and i < seen for i in range(5)]


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


MOVES = {"hard": ["move_means"], "soft": ["soft_weights", "move_soft_means"]}


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("kind", MOVES)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_projection_take_few_launches_and_give_what_the_cpu_gives(
    kind: str, head: str, many: bool, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the step of a strategy costs a GPU: a kernel each, and the little that is left to torch's operations."""
    n, c, d = 12, 5, 6
    loss_term, projection = ["align_rows"], ["project"]
    if many:
        many_classes(monkeypatch)
        loss_term, projection = ["add_deltas", "geometry", "align_rows", "add_terms"], ["geometry", "project"]
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
            names = [*MOVES[kind], *loss_term, "pull_back"]
            if place == "cuda":
                assert gpu.launches == names
            with Count() as step:
                optimizer.step()
        if place == "cuda":
            if "norm" in head:  # rows may point against their leaf; lengths are one of their own, with a gradient
                projection = ["geometry", "project", "geometry"]
            assert gpu.launches == [*names, *projection]
            if head == "linear":
                # Of many classes the number of those seen; SGD's update of the weight.
                assert len(forward.operations) <= many, forward.operations
                assert len(step.operations) <= 1, step.operations
        assert features.grad is not None
        states.append([*parameters, *state_of(tracker).values(), features.grad, loss])
    for here, there in zip(*states, strict=True):
        # Two steps of sums of 12 values of O(10), in another order.
        torch.testing.assert_close(there.detach().cpu(), here.detach(), rtol=1e-4, atol=1e-5)


def test_the_gradient_is_of_the_state_that_the_loss_was_of(gpu: PretendedGpu) -> None:
    """Whatever is taken in before backward, and as often as it is asked for."""
    h, y = (x.to(GPU) for x in make_batch(1, 12, 5, 6))
    classifier, (weight, *_) = head_on(GPU, "linear", 5, 6)
    spareg = spalign.SpARegLoss(classifier)
    h.requires_grad_()
    loss = spareg(h, y)
    inputs = weight, h
    want = torch.autograd.grad(loss, inputs, retain_graph=True)
    spareg.tracker.update(h + 1.0, y.flip(0))
    with torch.no_grad():
        weight.mul_(-1.0)
    gpu.launches.clear()
    assert all(map(torch.equal, torch.autograd.grad(loss, inputs, retain_graph=True), want))
    assert gpu.launches == ["pull_back"]
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, inputs, create_graph=True)


@runs
def test_gradients_for_several_factors_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for all of them has no memory that a kernel could read."""
    p = make_problem(1, num_classes=5, dim=6, dtype=torch.float32)
    h, y = (device(x) for x in make_batch(1, 12, 5, 6))
    w, mean, weight, mean_sum = device(p.w).requires_grad_(), device(p.mean), device(p.seen).float(), device(p.mean[0])
    share = F.BatchShare(torch.rand(12, device=DEVICE), y)
    loss = F._loss_by_kernels(w, mean, weight, mean_sum, h.requires_grad_(), share, of_state=True)
    want = torch.autograd.grad(loss, (w, h), retain_graph=True)
    factors = torch.arange(3.0, device=DEVICE)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: True))
    batched = torch.autograd.grad(loss, (w, h), factors, is_grads_batched=True)
    for many, one in zip(batched, want, strict=True):
        torch.testing.assert_close(many, factors[:, None, None] * one)


def test_a_loss_is_the_users_to_write_to_and_needs_no_gradient(
    gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    h, y = (x.to(GPU) for x in make_batch(1, 12, 5, 6))
    spareg = spalign.SpARegLoss(head_on(GPU, "linear", 5, 6)[0])
    h.requires_grad_()
    loss = spareg(h, y)
    value = loss.item()
    loss += 1.0
    loss.backward()
    assert loss.item() == value + 1.0
    asked: list[Any] = []
    real = kernels.alignment_terms

    def spied(*args: Any, **how: Any) -> Any:
        asked.append(how)
        return real(*args, **how)

    monkeypatch.setattr(kernels, "alignment_terms", spied)
    with torch.no_grad():
        assert not spareg(h, y).requires_grad
    assert [(how["by_weight"], how["by_mean"]) for how in asked] == [(False, False)], "nothing is made for gradients"
    state = state_of(spareg.eval().tracker)
    spareg.tracker.mean_sum.zero_()
    assert spareg(h, y).requires_grad, "by the classifier"
    assert not spareg.tracker.mean_sum.any(), "reading writes nothing"
    assert all(torch.equal(x, state[name]) for name, x in state_of(spareg.tracker).items() if name != "mean_sum")


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
    of_state = mean, mean, weight, mean_sum, mean
    assert kernels.can_align(*of_state, of_state=True)
    assert not kernels.can_align(*of_state)
    assert not kernels.can_align(*rows, of_state=True)
    for place, other in (
        (1, torch.zeros(5, 7)),
        (2, torch.zeros(4)),
        (2, weight.double()),
        (2, torch.zeros(5, 2)[:, 0]),
        (3, torch.zeros(7, dtype=torch.float64)),
        (3, torch.zeros(6, 2, dtype=torch.float64)[:, 0]),
        (4, negated(mean)),
    ):
        assert not kernels.can_align(*of_state[:place], other, *of_state[place + 1 :], of_state=True)
    for c, d, few in ((1024, 32, True), (1025, 1, False), (4, 8192, True), (5, 8192, False)):
        state = torch.zeros(c, d), torch.zeros(c), torch.zeros(d, dtype=torch.float64)
        assert kernels.can_align(state[0], *state, of_state=True) == few
    for factor in (torch.ones(2), torch.ones((), dtype=torch.float64), torch.ones((), device="meta")):
        assert not kernels.can_pull_back(factor, mean)
    assert kernels.can_pull_back(torch.ones(()), mean, None)
    answers = []

    def asks(g: Tensor) -> Tensor:
        answers.append(kernels.can_align(mean, mean, seen, center, g))
        return g

    torch.func.vmap(asks)(mean.expand(2, 5, 6))
    assert answers == [False], "what stands for the examples has no memory"


def test_shapes_that_do_not_fit_are_refused_before_anything_starts(gpu: PretendedGpu) -> None:
    p = make_problem(1, num_classes=5, dim=6, dtype=torch.float32, unseen=())
    w, g, mean, seen, center = (x.to(GPU) for x in (p.w, p.g, p.mean, p.seen, p.mean.mean(0)))
    with pytest.raises(ValueError, match=r"other tensors \(4, 6\)"):
        F.alignment_loss(w[:4], mean, seen, center_D=center)
    with pytest.raises(ValueError, match=r"other tensors \(5, 6\), \(5, 4\)"):
        F.project_gradient(g[:, :4], w, mean, seen, gamma=0.3, center_D=center)
    with pytest.raises(ValueError, match=r"center_D \(1,\)"):
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
    _, terms = kernels.alignment_terms(*rows, by_weight=False, by_mean=True)
    one, rate, labels_N = torch.ones((), device=DEVICE), device(rate), device(labels_N)
    _, of_all = kernels.pull_back(terms, one, rate, labels_N, None, torch.float32)
    _, of_some = kernels.pull_back(terms, one, rate[::2], labels_N[::2], None, torch.float32)
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
        ("align_rows", "sum of the means, afresh"),
        ("align_rows", "gradient by the classifier (soft labels)"),
        ("geometry", "global mean"),
        ("add_terms", "loss"),
        ("pull_back", "gradient by the classifier (hard labels)"),
        ("pull_back", "gradient by the features (soft labels)"),
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
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *args, **options: real(x, *args, **options).fill_(3))
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
    **dict.fromkeys(("owner_N", "owner_C", "alignable_C", "seen_C"), "*i8"),
    **dict.fromkeys(("class_N", "count"), "*i64"),
    **dict.fromkeys(("ignore_index", "num_samples", "num_classes", "dim", "programs"), "i32"),
    **dict.fromkeys(("momentum", "gamma", "floor_squared", "tiny", "least"), "fp32"),
    "mean_sum_D": "*fp64", "features": "*bf16", "targets_N": "*i64",
}
NOTHING = dict.fromkeys(("by_weight_CD", "e_CD", "e_sum_PD", "e_sum_D", "share_C"))  # what is not asked for
NO_SAMPLES = dict.fromkeys(("by_features_ND", "e_CD", "e_sum_D", "share_C", "rate_N", "class_N"))
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
    given = {"OF_STATE": False, "WRITE_SUM": False, "BLOCK_R": 1, "BLOCK_C": 1, "mean_sum_D": None}
    state = {"OF_STATE": True, "seen_C": "*fp32", "count": None, "programs": 1, "BLOCK_R": max(8192 // block, 1)}
    written, read = {"WRITE_SUM": True, "center_D": None}, {"WRITE_SUM": False, "center_D": None, "mean_sum_D": None}
    for name, options, warps in (
        ("move_means", {"CUMULATIVE": False, "BLOCK_R": block_r, "BLOCK_N": kernels.MOST_SAMPLES}, 4),
        ("move_means", {"CUMULATIVE": True, "BLOCK_R": block_r, "BLOCK_N": 16}, 4),
        ("soft_weights", {"BLOCK_C": block}, 1),
        ("move_soft_means", {"CUMULATIVE": True, "BLOCK_R": block_r}, 4),
        ("move_soft_means", {"CUMULATIVE": False, "BLOCK_R": block_r}, 4),
        ("add_deltas", {"BLOCK_R": 32, "BLOCK_D": 64}, 4),
        ("geometry", {"BLOCK_C": 1024, "BLOCK_D": min(block, 1024)}, 4),
        ("align_rows", {"BY_WEIGHT": True, "BY_MEAN": True, **given}, 1),
        ("align_rows", {"BY_WEIGHT": False, "BY_MEAN": False, **given, **NOTHING}, 1),
        ("align_rows", {"BY_WEIGHT": True, "BY_MEAN": True, **state, **written}, 16),
        ("align_rows", {"BY_WEIGHT": False, "BY_MEAN": False, **state, **read, **NOTHING}, 16),
        ("add_terms", {"BY_MEAN": True, "BLOCK_P": 32, "BLOCK_D": 64}, 4),
        ("add_terms", {"BY_MEAN": False, "BLOCK_P": 32, "BLOCK_D": 64, **NOTHING}, 4),
        ("pull_back", {"BY_FEATURES": True, "BY_WEIGHT": True, "by_features_ND": "*bf16"}, 1),
        ("pull_back", {"BY_FEATURES": False, "BY_WEIGHT": True, "num_samples": 0, **NO_SAMPLES}, 1),
        ("project", {"PAPER": True, **given}, 1),
        ("project", {"PAPER": False, **given}, 1),
        ("project", {"PAPER": True, **state, "BLOCK_C": kernels.FEW_CLASSES, "center_D": "*fp64"}, 1),
    ):
        kernel = getattr(code, name)
        ones = {argument: 1 for argument in kernel.arg_names if argument in ONES or argument.endswith("_stride")}
        known = {"BLOCK_D": block, **options, **(ones if dim == 1 else {})}
        known = {key: value for key, value in known.items() if key in kernel.arg_names}
        types = {**TYPES, **{key: value for key, value in known.items() if isinstance(value, str)}}
        constants = {key: value for key, value in known.items() if not isinstance(value, str)}
        signature = {}
        for argument in kernel.arg_names:
            if argument not in constants:
                default = "i32" if argument.endswith("_stride") else "*fp32"
                signature[argument] = types.get(argument, default)
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
    assert len(built) == 4 * 18 * len(architectures)
    for name, (size, shared, races, narrow) in built.items():
        assert size > 1000, name
        assert races == [], f"{name}: stored without waiting for the threads that load it"
        assert narrow == [], f"{name}: places that overflow"
        assert shared <= 48 * 1024, f"{name}: more shared memory than every GPU gives without asking"
