"""What must hold for every input: equivariance, splits, norms, homogeneity (hypothesis draws the inputs)."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Problem, make_batch, make_problem, rotation, to_numpy
from torch import Tensor

import spalign
from spalign import functional as F

seeds = st.integers(0, 2**31 - 1)
# Everything is float64 and compared to float64: some tens of roundings of 1e-16 on values of size <= 100.
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


@st.composite
def problems(draw: st.DrawFn, least_seen: int = 2) -> Problem:
    """Any number of classes and dimensions, any of them unseen."""
    num_classes, dim = draw(st.integers(2, 9)), draw(st.integers(2, 12))
    unseen = draw(st.sets(st.integers(0, num_classes - 1), max_size=num_classes - least_seen))
    return make_problem(draw(seeds), num_classes=num_classes, dim=dim, unseen=tuple(sorted(unseen)))


def loss_and_grads(w: Tensor, mean: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w, mean = w.clone().requires_grad_(), mean.clone().requires_grad_()
    loss = F.alignment_loss(w, mean, seen)
    by_w, by_mean = torch.autograd.grad(loss, (w, mean))
    return loss.detach(), by_w, by_mean


def rotate_rows(p: Problem, alpha: float = 0.3, threshold: float = 1.0) -> Tensor:
    return F.slerp(p.w, p.mean, p.seen, alpha=alpha, threshold=threshold).weight


def project(p: Problem, gamma: float = 0.3, radial: F.Radial = "paper") -> Tensor:
    return F.project_gradient(p.g, p.w, p.mean, p.seen, gamma=gamma, radial=radial)


# ----------------------------------------------------------------------------------------------------------------------
# Scale
# ----------------------------------------------------------------------------------------------------------------------

# Far below 1 / sqrt(max float): norms are squared on the way.
scales = st.floats(-40, 40).map(lambda e: 10.0**e)


@given(problems(), scales, scales)
def test_scale_of_rows_and_means(p: Problem, a: float, b: float) -> None:
    """The loss and projection do not see scales; the loss gradients go as 1 / scale; a rotation keeps the scale."""
    per_row = a * torch.linspace(0.5, 2.0, len(p.w), dtype=torch.float64).unsqueeze(1)
    scaled = p._replace(w=p.w * per_row, mean=p.mean * b)
    loss, by_w, by_mean = loss_and_grads(p.w, p.mean, p.seen)
    loss2, by_w2, by_mean2 = loss_and_grads(scaled.w, scaled.mean, p.seen)
    torch.testing.assert_close(loss2, loss, **CLOSE)
    torch.testing.assert_close(by_w2 * per_row, by_w, **CLOSE)
    torch.testing.assert_close(by_mean2 * b, by_mean, **CLOSE)
    torch.testing.assert_close(rotate_rows(scaled) / per_row, rotate_rows(p), **CLOSE)
    torch.testing.assert_close(project(scaled), project(p), **CLOSE)


@given(problems(), st.floats(1e-6, 1e6), st.floats(0, 1), st.sampled_from(["paper", "keep"]))
def test_projection_is_positively_homogeneous(p: Problem, s: float, gamma: float, radial: F.Radial) -> None:
    scaled = project(p._replace(g=p.g * s), gamma, radial)
    torch.testing.assert_close(scaled / s, project(p, gamma, radial), **CLOSE)
    # Powers of two, which loss scales are, are exact.
    exact = project(p._replace(g=p.g * 2.0**16), gamma, radial)
    assert torch.equal(exact, project(p, gamma, radial) * 2.0**16)


# ----------------------------------------------------------------------------------------------------------------------
# Rotation, translation, permutation
# ----------------------------------------------------------------------------------------------------------------------


@given(problems(), seeds)
def test_rotating_the_space_rotates_the_results(p: Problem, seed: int) -> None:
    q = rotation(seed, p.w.shape[1])
    turned = Problem(p.w @ q, p.mean @ q, p.seen, p.g @ q)
    for plain, rotated in zip(loss_and_grads(*p[:3]), loss_and_grads(*turned[:3]), strict=True):
        torch.testing.assert_close(rotated, plain @ q if plain.ndim else plain, **CLOSE)
    torch.testing.assert_close(F.directions(turned.mean, p.seen), F.directions(p.mean, p.seen) @ q, **CLOSE)
    torch.testing.assert_close(rotate_rows(turned), rotate_rows(p) @ q, **CLOSE)
    torch.testing.assert_close(project(turned), project(p) @ q, **CLOSE)


@given(problems(), st.floats(-100, 100))
def test_moving_all_features_changes_nothing(p: Problem, shift: float) -> None:
    moved = p._replace(mean=torch.where(p.seen.unsqueeze(1), p.mean + shift, 0.0))
    torch.testing.assert_close(loss_and_grads(*moved[:3]), loss_and_grads(*p[:3]), **CLOSE)
    torch.testing.assert_close(rotate_rows(moved), rotate_rows(p), **CLOSE)
    torch.testing.assert_close(project(moved), project(p), **CLOSE)


@given(problems(), seeds)
def test_renaming_the_classes_renames_the_results(p: Problem, seed: int) -> None:
    order = torch.randperm(len(p.w), generator=torch.Generator().manual_seed(seed))
    renamed = Problem(*(x[order] for x in p))
    for plain, other in zip(loss_and_grads(*p[:3]), loss_and_grads(*renamed[:3]), strict=True):
        torch.testing.assert_close(other, plain[order] if plain.ndim else plain, **CLOSE)
    torch.testing.assert_close(rotate_rows(renamed), rotate_rows(p)[order], **CLOSE)
    torch.testing.assert_close(project(renamed), project(p)[order], **CLOSE)


@given(seeds, st.integers(1, 40), st.sampled_from([None, 0.1, 1.0]))
def test_renaming_classes_and_shuffling_samples_of_an_update(seed: int, n: int, momentum: float | None) -> None:
    h, y = make_batch(seed, n, 5, 4, torch.float64)
    rng = torch.Generator().manual_seed(seed)
    order, shuffle = torch.randperm(5, generator=rng), torch.randperm(n, generator=rng)
    mean, weight = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0.0, 3, 0, 1, 2], dtype=torch.float64)
    mean = mean * (weight > 0).unsqueeze(1)
    want_mean, want_weight = F.update_class_means(mean, weight, h, y, momentum=momentum)
    new_name = torch.argsort(order)
    got_mean, got_weight = F.update_class_means(
        mean[order], weight[order], h[shuffle], new_name[y[shuffle]], momentum=momentum
    )
    torch.testing.assert_close(got_mean, want_mean[order], **CLOSE)
    assert torch.equal(got_weight, want_weight[order])


# ----------------------------------------------------------------------------------------------------------------------
# Means
# ----------------------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(0, 60), st.lists(st.integers(0, 60), max_size=6), st.booleans())
def test_cumulative_mean_does_not_depend_on_the_split(seed: int, n: int, cuts: list[int], soft: bool) -> None:
    h, y = make_batch(seed, n, 4, 3, torch.float64)
    targets = torch.softmax(2 * h @ torch.ones(3, 4, dtype=torch.float64).tril(), 1) if soft else y
    edges = sorted({0, n, *(min(c, n) for c in cuts)})
    tracker = spalign.ClassMeanTracker(4, 3, momentum=None).double()
    for a, b in itertools.pairwise(edges):
        tracker.update(h[a:b], targets[a:b])
    sums, weights = reference.class_statistics(to_numpy(h), targets.numpy(), 4)
    seen = weights > 0
    np.testing.assert_allclose(to_numpy(tracker.weight), weights, rtol=1e-12)
    np.testing.assert_allclose(to_numpy(tracker.mean)[seen], (sums[seen].T / weights[seen]).T, rtol=1e-9, atol=1e-11)
    assert not tracker.mean[~tracker.seen].any()


@given(seeds, st.floats(0.01, 1.0), st.integers(1, 8))
def test_ema_is_a_convex_combination(seed: int, momentum: float, steps: int) -> None:
    """Means stay inside the box of the features seen."""
    tracker = spalign.ClassMeanTracker(3, 2, momentum=momentum).double()
    low, high = torch.full((3, 2), torch.inf).double(), torch.full((3, 2), -torch.inf).double()
    for step in range(steps):
        h, y = make_batch(seed + step, 5, 3, 2, torch.float64)
        tracker.update(h, y)
        for x, c in zip(h, y, strict=True):
            low[c], high[c] = torch.minimum(low[c], x), torch.maximum(high[c], x)
    seen = tracker.seen
    assert (tracker.mean[seen] >= low[seen] - 1e-12).all()  # a rounding beyond the box
    assert (tracker.mean[seen] <= high[seen] + 1e-12).all()


# ----------------------------------------------------------------------------------------------------------------------
# Loss
# ----------------------------------------------------------------------------------------------------------------------


@given(problems())
def test_loss_is_between_0_and_2_and_gradients_are_tangential(p: Problem) -> None:
    loss, by_w, by_mean = loss_and_grads(*p[:3])
    assert 0.0 <= loss <= 2.0
    # The loss does not depend on the length of a row, nor on a common shift of the means.
    torch.testing.assert_close((by_w * p.w).sum(1), torch.zeros(len(p.w), dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(by_mean.sum(0), torch.zeros(p.w.shape[1], dtype=torch.float64), atol=1e-12, rtol=0)
    assert not by_w[~p.seen].any()
    assert not by_mean[~p.seen].any()


@given(problems())
def test_a_small_step_against_the_gradient_lowers_the_loss(p: Problem) -> None:
    loss, by_w, _ = loss_and_grads(*p[:3])
    squared = (by_w**2).sum()
    if squared < 1e-10:  # nothing to gain
        return
    shortest = p.w[p.seen].norm(dim=1).min()
    step = 1e-4 * shortest**2  # the curvature is about 1 / |w|^2
    assert F.alignment_loss(p.w - step * by_w, p.mean, p.seen) < loss


@given(problems())
def test_a_perfectly_aligned_classifier_has_loss_0(p: Problem) -> None:
    aligned = F.directions(p.mean, p.seen) * 3.0
    loss, by_w, _ = loss_and_grads(aligned, p.mean, p.seen)
    assert loss.abs() < 1e-13  # 1 - cos, each good to a few roundings
    assert by_w.abs().max() < 1e-12


# ----------------------------------------------------------------------------------------------------------------------
# SLERP
# ----------------------------------------------------------------------------------------------------------------------


@given(problems(), st.floats(0, 1), st.floats(-1, 1))
def test_rotation_keeps_row_norms_and_shrinks_the_angle_by_its_share(p: Problem, alpha: float, tau: float) -> None:
    new, rotated, antipodal = F.slerp(p.w, p.mean, p.seen, alpha=alpha, threshold=tau)
    assert not (rotated & antipodal).any()
    assert torch.equal(new[~rotated], p.w[~rotated])
    # Near pi the two sines are divided by a small one.
    torch.testing.assert_close(new.norm(dim=1), p.w.norm(dim=1), rtol=1e-9, atol=0)
    mu_hat = F.directions(p.mean, p.seen)
    for c in range(len(p.w)):
        if rotated[c]:
            assert F.alignment(p.w, p.mean, p.seen)[c] < tau
            before, after = (reference.angle(to_numpy(x[c]), to_numpy(mu_hat[c])) for x in (p.w, new))
            assert after == pytest.approx((1 - alpha) * before, rel=1e-7, abs=1e-9)


@given(problems(), st.floats(0.05, 0.5), st.integers(2, 5))
def test_n_rotations_multiply_the_angle_by_1_minus_alpha_to_the_n(p: Problem, alpha: float, n: int) -> None:
    w = p.w
    for _ in range(n):
        w = F.slerp(w, p.mean, p.seen, alpha=alpha, threshold=1.0).weight
    at_once = F.slerp(p.w, p.mean, p.seen, alpha=1 - (1 - alpha) ** n, threshold=1.0).weight
    torch.testing.assert_close(w, at_once, rtol=1e-7, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Projection
# ----------------------------------------------------------------------------------------------------------------------


@given(problems(), st.floats(0, 1), st.sampled_from(["paper", "keep"]))
def test_projection_never_lengthens_and_never_pushes_away(p: Problem, gamma: float, radial: F.Radial) -> None:
    out = project(p, gamma, radial)
    assert (out.norm(dim=1) <= p.g.norm(dim=1) * (1 + 1e-12)).all()
    assert torch.equal(out[~p.seen], p.g[~p.seen])
    mu_hat = F.directions(p.mean, p.seen)
    w_hat = p.w / p.w.norm(dim=1, keepdim=True)
    d = mu_hat - (mu_hat * w_hat).sum(1, keepdim=True) * w_hat
    before, after = (p.g * d).sum(1), (out * d).sum(1)
    # Of what pushes away the share gamma is left; what pulls closer is left as it is.
    want = torch.where(before > 0, gamma * before, before)
    torch.testing.assert_close(after[p.seen], want[p.seen], rtol=1e-8, atol=1e-10)
    radial_share = gamma if radial == "paper" else 1.0
    torch.testing.assert_close(
        (out * w_hat).sum(1)[p.seen], radial_share * (p.g * w_hat).sum(1)[p.seen], rtol=1e-8, atol=1e-10
    )


@given(problems(), st.sampled_from(["paper", "keep"]))
def test_projection_at_the_ends_of_gamma(p: Problem, radial: F.Radial) -> None:
    assert torch.equal(project(p, 1.0, radial), p.g)
    once = project(p, 0.0, radial)
    torch.testing.assert_close(project(p._replace(g=once), 0.0, radial), once, **CLOSE)
    assert not project(p._replace(g=torch.zeros_like(p.g)), 0.0, radial).any()


@given(problems(), st.floats(0, 1), st.sampled_from(["paper", "keep"]))
def test_gamma_mixes_linearly(p: Problem, gamma: float, radial: F.Radial) -> None:
    """Eq. 20."""
    mixed = (1 - gamma) * project(p, 0.0, radial) + gamma * p.g
    torch.testing.assert_close(project(p, gamma, radial), mixed, **CLOSE)


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0, 1))
def test_schedule_grows_from_0_to_its_maximum(t: int, total: int, maximum: float) -> None:
    value = F.cosine_schedule(t, total, maximum)
    assert 0 <= F.cosine_schedule(t - 1, total, maximum) <= value <= maximum
    assert math.isclose(value, reference.cosine_schedule(t, total, maximum), rel_tol=1e-13, abs_tol=1e-16)
    assert F.cosine_schedule(total, total, maximum) == maximum
