"""Every function of spalign.functional against the loops of reference.py, and its gradients."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import Problem, make_batch, make_problem, rotation, to_bools, to_numpy
from torch import Tensor

import spalign
from spalign import functional as F

# float64 against float64: the two sides add up some tens of terms of size <= 10 in different orders.
TIGHT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}
# The maths is float32 for inputs of at most 32 bits: a few roundings of 6e-8 on O(1) values, amplified by |mu| / |d|.
SINGLE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-6}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def assert_close(actual: Tensor, expected: reference.Array | float, rtol: float, atol: float) -> None:
    np.testing.assert_allclose(to_numpy(actual), expected, rtol=rtol, atol=atol)


def tolerance(dtype: torch.dtype) -> dict[str, Any]:
    """Return the rounding of the output dtype on top of that of the maths."""
    if dtype == torch.float64:
        return TIGHT
    eps = torch.finfo(dtype).eps
    return {"rtol": SINGLE["rtol"] + eps, "atol": SINGLE["atol"] + eps * 1e-2}


def soft_labels(seed: int, n: int, num_classes: int) -> Tensor:
    """Return mixed, smoothed labels; the last class is in no pair."""
    rng = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, num_classes - 1, (n,), generator=rng) for _ in range(2))
    lam = torch.rand(n, 1, generator=rng, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot
    mixed = lam * one_hot(a, num_classes) + (1 - lam) * one_hot(b, num_classes)
    return 0.9 * mixed + 0.1 / num_classes


# ----------------------------------------------------------------------------------------------------------------------
# Class means
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hard", "ignored", "soft"])
def test_class_statistics_equals_the_reference(kind: str) -> None:
    h, y = make_batch(1, 40, 5, 6, torch.float64)
    targets: Tensor = y
    if kind == "ignored":
        targets = torch.where(torch.arange(40) % 3 == 0, -100, y)
    if kind == "soft":
        targets = soft_labels(1, 40, 5)
    sums, weights = F.class_statistics(h, targets, 5)
    want_sums, want_weights = reference.class_statistics(h.numpy(), targets.numpy(), 5)
    assert_close(sums, want_sums, **TIGHT)
    assert_close(weights, want_weights, **TIGHT)


def test_class_statistics_of_a_large_batch_are_not_biased_by_rounding() -> None:
    """A collapsed class of 400 000 pixels: equal terms round alike, so one after the other they are off by 2e-3."""
    n, c = 450_000, 4
    y = torch.where(torch.arange(n) % 9 < 8, 0, torch.arange(n) % (c - 1) + 1)
    h = torch.full((n, 1), 1.1) + 0.3 * y.unsqueeze(1)
    sums, weights = F.class_statistics(h, y, c)
    count = np.bincount(y.numpy(), minlength=c)
    np.testing.assert_array_equal(to_numpy(weights), count)
    want = np.array([to_numpy(h)[y.numpy() == k].sum(0) for k in range(c)])
    # At most 4096 roundings of 6e-8 that all go the same way, half as many on average.
    np.testing.assert_allclose(to_numpy(sums), want, rtol=1.2e-4)


def test_class_statistics_of_parts_add_up() -> None:
    h, y = make_batch(2, 30, 4, 5, torch.float64)
    whole = F.class_statistics(h, y, 4)
    parts = [F.class_statistics(h[s], y[s], 4) for s in (slice(0, 7), slice(7, 7), slice(7, 30))]
    for k in (0, 1):
        torch.testing.assert_close(sum(p[k] for p in parts), whole[k], **TIGHT)


@pytest.mark.parametrize("momentum", [None, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("c", [5, 12])
def test_update_equals_the_reference_over_a_stream(momentum: float | None, soft: bool, c: int) -> None:
    """Of fewer classes than samples and of more, which take different ways."""
    mean, weight = torch.zeros(c, 6, dtype=torch.float64), torch.zeros(c, dtype=torch.float64)
    mean_sum = torch.zeros(6, dtype=torch.float64)
    want_mean, want_weight = mean.numpy().copy(), weight.numpy().copy()
    for step in range(6):
        h, y = make_batch(10 + step, 9, c, 6, torch.float64)
        targets = soft_labels(10 + step, 9, c) if soft else torch.where(y == 4, -100, y)
        F.update_class_means_(mean, weight, h, targets, momentum=momentum, mean_sum_D=mean_sum)
        want_mean, want_weight = reference.update_class_means(
            want_mean, want_weight, h.numpy(), targets.numpy(), momentum
        )
        assert_close(mean, want_mean, **TIGHT)
        assert_close(weight, want_weight, **TIGHT)
        seen = weight > 0
        assert soft or not seen[4]
        assert_close(mean_sum / seen.sum(), reference.global_mean(want_mean, to_bools(seen)), **TIGHT)


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_pure_update_equals_the_in_place_one_and_writes_nothing(momentum: float | None, soft: bool) -> None:
    p = make_problem(1)
    weight = p.seen.double() * 7
    h, y = make_batch(4, 12, 6, 8, torch.float64)
    targets = soft_labels(4, 12, 6) if soft else y
    mean_before, weight_before = p.mean.clone(), weight.clone()
    new_mean, new_weight = F.update_class_means(p.mean, weight, h, targets, momentum=momentum)
    assert torch.equal(p.mean, mean_before)
    assert torch.equal(weight, weight_before)
    F.update_class_means_(mean_before, weight_before, h, targets, momentum=momentum)
    assert torch.equal(new_mean, mean_before)
    assert torch.equal(new_weight, weight_before)


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_in_place_update_keeps_the_state_out_of_the_graph(momentum: float | None, soft: bool) -> None:
    """Features that require a gradient are taken in as numbers."""
    h, y = make_batch(4, 12, 6, 8, torch.float64)
    targets = soft_labels(4, 12, 6) if soft else y
    mean, weight = torch.zeros(6, 8, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    share = F.update_class_means_(mean, weight, h.clone().requires_grad_(), targets, momentum=momentum)
    assert not mean.requires_grad
    assert not share.rate.requires_grad
    assert torch.equal(mean, F.update_class_means(torch.zeros_like(mean), torch.zeros_like(weight), h, targets)[0])


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_gradcheck_of_the_means_by_the_features(momentum: float | None, soft: bool) -> None:
    p = make_problem(2)
    weight = p.seen.double() * 5
    h, y = make_batch(5, 8, 6, 8, torch.float64)
    targets = soft_labels(5, 8, 6) if soft else y

    def means(features: Tensor) -> Tensor:
        return F.update_class_means(p.mean, weight, features, targets, momentum=momentum)[0]

    assert torch.autograd.gradcheck(means, h.requires_grad_())


def test_the_stored_mean_is_never_part_of_the_graph() -> None:
    mean = torch.ones(2, 3, requires_grad=True)
    h = torch.randn(2, 3, requires_grad=True)
    new, _ = F.update_class_means(mean, torch.ones(2), h, torch.tensor([0, 1]))
    by_mean, by_h = torch.autograd.grad(new.sum(), (mean, h), allow_unused=True)
    assert by_mean is None
    assert by_h is not None


# ----------------------------------------------------------------------------------------------------------------------
# Alignment
# ----------------------------------------------------------------------------------------------------------------------

PROBLEMS = [make_problem(s, unseen=u) for s, u in ((1, ()), (2, (2,)), (3, (0, 4, 5)), (4, (0, 1, 2, 3, 4, 5)))]
IDS = ["all seen", "one unseen", "three unseen", "none seen"]
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)


@every_problem
@pytest.mark.parametrize("given_center", [False, True])
def test_directions_and_alignment_equal_the_reference(problem: Problem, given_center: bool) -> None:
    w, mean, seen, _ = problem
    nw, nmean, nseen, _ = problem.numpy()
    center = F.global_mean(mean, seen)
    assert_close(center, reference.global_mean(nmean, nseen), **TIGHT)
    given = center if given_center else None
    assert_close(F.directions(mean, seen, center_D=given), reference.directions(nmean, nseen), **TIGHT)
    assert_close(F.alignment(w, mean, seen, center_D=given), reference.alignment(nw, nmean, nseen), **TIGHT)


@every_problem
@pytest.mark.parametrize("given_center", [False, True])
def test_alignment_loss_equals_eq_15_with_both_gradients(problem: Problem, given_center: bool) -> None:
    nw, nmean, nseen, _ = problem.numpy()
    w, mean = problem.w.clone().requires_grad_(), problem.mean.clone().requires_grad_()
    center = F.global_mean(problem.mean, problem.seen) if given_center else None
    loss = F.alignment_loss(w, mean, problem.seen, center_D=center)
    by_w, by_mean = torch.autograd.grad(loss, (w, mean))
    assert_close(loss, reference.alignment_loss(nw, nmean, nseen), **TIGHT)
    assert_close(by_w, reference.alignment_loss_grad_weight(nw, nmean, nseen), **TIGHT)
    assert_close(by_mean, reference.alignment_loss_grad_mean(nw, nmean, nseen), **TIGHT)
    value, grad = F.alignment_loss_and_grad(problem.w, problem.mean, problem.seen, center_D=center)
    assert_close(value, reference.alignment_loss(nw, nmean, nseen), **TIGHT)
    assert_close(grad, reference.alignment_loss_grad_weight(nw, nmean, nseen), **TIGHT)


@every_problem
def test_gradcheck_of_the_loss_by_weight_and_means(problem: Problem) -> None:
    w, mean = problem.w.clone().requires_grad_(), problem.mean.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: F.alignment_loss(a, b, problem.seen), (w, mean))


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("n", [1, 4, 6, 13], ids=lambda n: f"{n} samples of 6 classes")
def test_gradcheck_of_the_loss_by_weight_and_features_through_the_update(
    momentum: float | None, soft: bool, n: int
) -> None:
    """Both ways to the features: through the means, and by the closed form, with fewer samples than classes or more."""
    p = make_problem(5)
    weight = p.seen.double() * 5
    h, y = make_batch(6, n, 6, 8, torch.float64)
    targets = soft_labels(6, n, 6) if soft else y

    def through_means(w: Tensor, features: Tensor) -> Tensor:
        mean, n = F.update_class_means(p.mean, weight, features, targets, momentum=momentum)
        return F.alignment_loss(w, mean, n > 0)

    def closed_form(w: Tensor, features: Tensor) -> Tensor:
        mean, n = p.mean.clone(), weight.clone()
        share = F.update_class_means_(mean, n, features.detach(), targets, momentum=momentum)
        return F.alignment_loss(w, mean, n > 0, features=features, share=share)

    inputs = (p.w.clone().requires_grad_(), h.requires_grad_())
    assert torch.autograd.gradcheck(through_means, inputs)
    assert torch.autograd.gradcheck(closed_form, inputs)
    assert torch.autograd.grad(closed_form(*inputs), inputs[1])[0].abs().max() > 1e-4, "no gradient to check"


def test_gradient_scales_with_the_upstream_gradient() -> None:
    p = make_problem(6)
    w = p.w.clone().requires_grad_()
    (one,) = torch.autograd.grad(F.alignment_loss(w, p.mean, p.seen), w)
    (scaled,) = torch.autograd.grad(F.alignment_loss(w, p.mean, p.seen) * -65536.0, w)
    assert torch.equal(scaled, one * -65536.0)  # a power of two is exact


def test_second_derivatives_are_refused_or_right() -> None:
    """The gradient is a closed form of first order; a silent 0 for the second derivative would be wrong."""
    p = make_problem(7)
    w = p.w.clone().requires_grad_()
    try:
        (g,) = torch.autograd.grad(F.alignment_loss(w, p.mean, p.seen) + (w**2).sum(), w, create_graph=True)
        (second,) = torch.autograd.grad(g.sum(), w)
    except RuntimeError:
        return
    assert not torch.equal(second, torch.full_like(second, 2.0)), "the loss had no part in the second derivative"


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of operations that vmap takes one by one
def test_vmap_of_the_pure_functions_equals_a_loop() -> None:
    p = make_problem(9)
    weights, seen = torch.stack([p.w, 2 * p.w + 1]), torch.stack([p.seen, p.seen.flip(0)])
    center = F.global_mean(p.mean, p.seen)
    functions: dict[str, Any] = {
        "loss": lambda w, s: F.alignment_loss(w, p.mean, s),
        "loss with center": lambda w, s: F.alignment_loss(w, p.mean, s, center_D=center),
        "gradient": lambda w, s: F.alignment_loss_and_grad(w, p.mean, s, center_D=center)[1],
        "alignment": lambda w, s: F.alignment(w, p.mean, s),
        "directions": F.directions,
        "slerp": lambda w, s: F.slerp(w, p.mean, s, alpha=0.5, threshold=0.9).weight,
        "projection": lambda w, s: F.project_gradient(p.g, w, p.mean, s, gamma=0.5),
    }
    for name, function in functions.items():
        for dims in ((0, 0), (0, None), (None, 0)):
            arguments = [x if dim == 0 else x[0] for x, dim in zip((weights, seen), dims, strict=True)]
            got = torch.func.vmap(function, in_dims=dims)(*arguments)
            for i in range(2):
                one = [x[i] if dim == 0 else x[0] for x, dim in zip((weights, seen), dims, strict=True)]
                torch.testing.assert_close(got[i], function(*one), **TIGHT, msg=f"{name} {dims}")


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of operations that vmap takes one by one
@pytest.mark.parametrize("soft", [False, True])
def test_vmap_of_the_pure_update_equals_a_loop(soft: bool) -> None:
    batches = [make_batch(i, 12, 4, 5, torch.float64) for i in range(2)]
    h, y = (torch.stack(x) for x in zip(*batches, strict=True))
    targets = torch.softmax(4 * torch.eye(4, dtype=h.dtype)[y], 2) if soft else y
    mean, weight = torch.randn(2, 4, 5, dtype=h.dtype), torch.ones(2, 4, dtype=h.dtype)
    got = torch.func.vmap(F.update_class_means)(mean, weight, h, targets)
    for i in range(2):
        want = F.update_class_means(mean[i], weight[i], h[i], targets[i])
        torch.testing.assert_close((got[0][i], got[1][i]), want, **TIGHT)


def test_derivatives_of_torch_func_name_what_to_use_instead() -> None:
    p = make_problem(9)
    center = F.global_mean(p.mean, p.seen)
    h, y = make_batch(0, 12, 6, 8)
    spareg = spalign.SpARegLoss(p.w)
    for loss, x in (
        (lambda w: F.alignment_loss(w, p.mean, p.seen), p.w),
        (lambda w: F.alignment_loss(w, p.mean, p.seen, center_D=center), p.w),
        (lambda x: F.update_class_means(p.mean.float(), p.seen.float(), x, y)[0].sum(), h),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad"):
            torch.func.grad(loss)(x)
    with pytest.raises(RuntimeError, match=r"outside of them"):
        torch.func.grad(lambda x: spareg(x, y))(h)
    assert not spareg.tracker.seen.any()


def test_features_go_with_their_share() -> None:
    p = make_problem(9)
    with pytest.raises(ValueError, match=r"\(12, 8\) came without a share.*update_class_means_"):
        F.alignment_loss(p.w, p.mean, p.seen, features=torch.zeros(12, 8, requires_grad=True))


def test_no_graph_where_nothing_asks_for_one() -> None:
    p = make_problem(8)
    assert not F.alignment_loss(p.w, p.mean, p.seen).requires_grad
    with torch.no_grad():
        assert not F.alignment_loss(p.w.clone().requires_grad_(), p.mean, p.seen).requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# SLERP
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "want"), [(0, 0.0), (1, 0.5 * 0.3 * (1 - math.cos(math.pi / 7))), (7, 0.3), (99, 0.3)])
def test_cosine_schedule(t: int, want: float) -> None:
    # One cosine: a rounding or two.
    assert F.cosine_schedule(t, 7, 0.3) == pytest.approx(want, rel=1e-14, abs=1e-16)
    assert F.cosine_schedule(t, 7, 0.3) == pytest.approx(reference.cosine_schedule(t, 7, 0.3), rel=1e-14, abs=1e-16)


@every_problem
@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("threshold", [-1.0, 0.1, 1.0])
def test_slerp_equals_the_reference(problem: Problem, alpha: float, threshold: float) -> None:
    w, mean, seen, _ = problem
    nw, nmean, nseen, _ = problem.numpy()
    new, rotated, antipodal = F.slerp(w, mean, seen, alpha=alpha, threshold=threshold)
    # atan2 and the sines of a generic angle cost a few more roundings than the sums.
    assert_close(new, reference.slerp(nw, nmean, nseen, alpha, threshold), rtol=1e-11, atol=1e-11)
    below = (reference.alignment(nw, nmean, nseen) < threshold) & nseen & (alpha != 0)
    assert rotated.tolist() == below.tolist()
    assert not antipodal.any()
    as_tensor = F.slerp(w, mean, seen, alpha=torch.tensor(alpha, dtype=torch.float64), threshold=threshold)
    assert torch.equal(as_tensor.weight, new)


def test_slerp_rows_at_or_above_the_threshold_keep_their_bits() -> None:
    p = make_problem(9, dtype=torch.float32)
    cos = F.alignment(p.w, p.mean, p.seen)
    threshold = cos[p.seen].median().item()
    new, rotated, _ = F.slerp(p.w, p.mean, p.seen, alpha=0.3, threshold=threshold)
    assert rotated.any()
    assert not rotated[p.seen].all()
    assert torch.equal(new[~rotated], p.w[~rotated])
    assert not (new[rotated] == p.w[rotated]).all(1).any()


# ----------------------------------------------------------------------------------------------------------------------
# Projection
# ----------------------------------------------------------------------------------------------------------------------


@every_problem
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("radial", ["paper", "keep"])
def test_projection_equals_eqs_17_to_20(problem: Problem, gamma: float, radial: F.Radial) -> None:
    nw, nmean, nseen, ng = problem.numpy()
    w, mean, seen, g = problem
    got = F.project_gradient(g, w, mean, seen, gamma=gamma, radial=radial)
    assert_close(got, reference.project_gradient(ng, nw, nmean, nseen, gamma, radial), **TIGHT)
    center = F.global_mean(mean, seen)
    given = F.project_gradient(g, w, mean, seen, gamma=gamma, radial=radial, center_D=center)
    assert torch.equal(given, got)


def test_an_unknown_radial_is_refused() -> None:
    p = make_problem(9)
    with pytest.raises(ValueError, match=r"radial is 'Paper', expected 'paper'.*'keep'"):
        F.project_gradient(p.g, p.w, p.mean, p.seen, gamma=0.5, radial="Paper")  # type: ignore[arg-type]


def test_projection_has_harmful_and_harmless_rows_in_the_test_problem() -> None:
    """Both branches of Eq. 19 are in what the test above compares."""
    nw, nmean, nseen, ng = PROBLEMS[0].numpy()
    kept = reference.project_gradient(ng, nw, nmean, nseen, 0.0, "keep")
    changed = (kept != ng).any(1)
    assert changed.any()
    assert not changed.all()


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_projection_of_a_row_on_its_mean_direction(gamma: float) -> None:
    """Such a row has no d_hat: p is 0, and only Eq. 20's radial part is scaled."""
    mean = torch.tensor([[3.0, 0.0, 0.0], [-3.0, 0.0, 0.0]], dtype=torch.float64)
    w = torch.tensor([[2.0, 0.0, 0.0], [-1.0, 0.0, 0.0]], dtype=torch.float64)
    g = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    seen = torch.tensor([True, True])
    assert torch.equal(F.project_gradient(g, w, mean, seen, gamma=gamma, radial="keep"), g)
    scaled = torch.stack([g[:, 0] * gamma, g[:, 1], g[:, 2]], 1)
    # Axis-aligned: the only rounding is one multiplication.
    torch.testing.assert_close(
        F.project_gradient(g, w, mean, seen, gamma=gamma, radial="paper"), scaled, rtol=1e-15, atol=1e-15
    )


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-4])
def test_projection_at_small_angles_in_single_precision(angle: float) -> None:
    """The tangent is formed from unit vectors that nearly cancel: its direction is good to eps / angle."""
    q = rotation(11, 6)
    d = torch.zeros(2, 6, dtype=torch.float64)
    d[0, 0], d[1, 0] = 1.0, -1.0
    w = torch.zeros(2, 6, dtype=torch.float64)
    w[:, 0] = d[:, 0] * math.cos(angle)
    w[:, 1] = math.sin(angle)
    g = torch.randn(2, 6, dtype=torch.float64)
    w32, d32, g32 = (x.float() for x in (w @ q, d @ q, g))
    got = F.project_gradient(g32, w32, d32, torch.tensor([True, True]), gamma=0.0, radial="keep")
    want = reference.project_gradient(to_numpy(g32), to_numpy(w32), to_numpy(d32), np.array([True, True]), 0.0, "keep")
    # float32 eps 6e-8, a dozen roundings, over the angle.
    np.testing.assert_allclose(to_numpy(got), want, atol=1e-6 / angle)


# ----------------------------------------------------------------------------------------------------------------------
# Dtypes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_in_and_the_promised_one_out(dtype: torch.dtype) -> None:
    """Against the reference at the rounded inputs, so that only the maths and the output rounding differ."""
    p = make_problem(12, dtype=dtype)
    nw, nmean, nseen, ng = p.numpy()
    w, mean, seen, g = p
    math_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tol = tolerance(dtype)

    value = F.alignment_loss(w.clone().requires_grad_(), mean, seen)
    assert value.dtype == math_dtype
    assert_close(value, reference.alignment_loss(nw, nmean, nseen), **tolerance(math_dtype))
    loss, grad = F.alignment_loss_and_grad(w, mean, seen)
    assert (loss.dtype, grad.dtype) == (math_dtype, dtype)
    assert_close(grad, reference.alignment_loss_grad_weight(nw, nmean, nseen), **tol)
    assert F.alignment(w, mean, seen).dtype == math_dtype
    assert F.directions(mean, seen).dtype == dtype
    assert_close(F.directions(mean, seen), reference.directions(nmean, nseen), **tol)
    new = F.slerp(w, mean, seen, alpha=0.3, threshold=1.0).weight
    assert new.dtype == dtype
    assert_close(new, reference.slerp(nw, nmean, nseen, 0.3, 1.0), **tol)
    projected = F.project_gradient(g, w, mean, seen, gamma=0.3)
    assert projected.dtype == dtype
    assert_close(projected, reference.project_gradient(ng, nw, nmean, nseen, 0.3), **tol)


def test_the_global_mean_of_many_half_precision_means() -> None:
    """Their sum is beyond float16, which ends at 65504."""
    mean, seen = torch.full((999, 2), 100.0, dtype=torch.float16), torch.ones(999, dtype=torch.bool)
    mean[:, 1] = torch.arange(999) % 7
    center = F.global_mean(mean, seen)
    assert center.dtype == torch.float16
    # One rounding to float16, 2^-11; the sums are exact in single precision.
    assert_close(center, to_numpy(mean).mean(0), rtol=2.0**-11, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_of_every_dtype_into_single_precision_means(dtype: torch.dtype) -> None:
    h, y = make_batch(7, 16, 5, 6, dtype)
    h.requires_grad_()
    mean, weight = F.update_class_means(torch.zeros(5, 6), torch.zeros(5), h, y, momentum=None)
    assert (mean.dtype, weight.dtype) == (torch.float32, torch.float32)
    want, _ = reference.update_class_means(np.zeros((5, 6)), np.zeros(5), to_numpy(h), y.numpy(), None)
    assert_close(mean, want, **SINGLE)
    assert torch.autograd.grad(mean.sum(), h)[0].dtype == dtype
    sums, _ = F.class_statistics(h, y, 5)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_come_back_in_the_dtype_of_their_inputs(dtype: torch.dtype) -> None:
    p = make_problem(13, dtype=dtype)
    w = p.w.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.alignment_loss(w, p.mean.float(), p.seen), w)
    assert grad.dtype == dtype
    nw, nmean, nseen, _ = p.numpy()
    assert_close(grad, reference.alignment_loss_grad_weight(nw, nmean, nseen), **tolerance(dtype))


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "loss": lambda w, m, s, g: F.alignment_loss(w, m, s),
    "loss_and_grad": lambda w, m, s, g: F.alignment_loss_and_grad(w, m, s)[1],
    "alignment": lambda w, m, s, g: F.alignment(w, m, s),
    "directions": lambda w, m, s, g: F.directions(m, s),
    "slerp": lambda w, m, s, g: F.slerp(w, m, s, alpha=0.2, threshold=1.0).weight,
    "project": lambda w, m, s, g: F.project_gradient(g, w, m, s, gamma=0.2),
    "statistics hard": lambda w, m, s, g: F.class_statistics(g, torch.arange(6), 6)[0],
    "statistics soft": lambda w, m, s, g: F.class_statistics(g, torch.softmax(3 * g[:, :6], 1), 6)[0],
    "update hard": lambda w, m, s, g: F.update_class_means(m, s.to(m.dtype), g, torch.arange(6))[0],
    "update soft": lambda w, m, s, g: F.update_class_means(m, s.to(m.dtype), g, torch.softmax(3 * g[:, :6], 1))[0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(name: str, dtype: torch.dtype, cast: torch.dtype) -> None:
    """The maths has its own precision whatever the autocast, forward and backward."""
    p = make_problem(14, dtype=dtype)

    def run(autocast: bool) -> tuple[Tensor, Tensor | None]:
        w, g = p.w.clone().requires_grad_(), p.g.clone().requires_grad_()
        with torch.autocast("cpu", cast, enabled=autocast):
            out = FUNCTIONS[name](w, p.mean, p.seen, g)
        grads = torch.autograd.grad(out.sum(), (w, g), allow_unused=True) if out.requires_grad else (None,)
        return out, next((x for x in grads if x is not None), None)

    want, want_grad = run(False)
    got, got_grad = run(True)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    assert (got_grad is None) == (want_grad is None)
    if got_grad is not None and want_grad is not None:
        assert torch.equal(got_grad, want_grad)


def test_mixed_precision_of_weight_and_means() -> None:
    """Half-precision weights meet float32 means; float64 on either side makes the maths float64."""
    p = make_problem(15)
    half = p.w.to(torch.bfloat16)
    nw, nmean, nseen, _ = to_numpy(half), to_numpy(p.mean), to_bools(p.seen), None
    assert_close(F.alignment_loss(half, p.mean, p.seen), reference.alignment_loss(nw, nmean, nseen), **TIGHT)
    loss = F.alignment_loss(half, p.mean.float(), p.seen)
    assert loss.dtype == torch.float32
    assert_close(loss, reference.alignment_loss(nw, nmean, nseen), **SINGLE)
