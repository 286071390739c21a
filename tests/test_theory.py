"""Frames, rotations and error exponents against plain numpy, against sampled noise, and what docs/maths.md proves."""

import doctest
import importlib
import inspect
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import to_numpy
from reference import Array
from torch import Tensor

import spalign
from spalign import functional, theory

PAGE = Path(__file__).parents[1] / "docs" / "maths.md"

# Sums of some ten float64 products, each of size 1.
EXACT = 1e-12


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def beta(mean: Array, w: Array, b: Array | None = None) -> float:
    """Return the error exponent by :func:`spalign.theory.error_exponent`."""
    bias = None if b is None else torch.from_numpy(b)
    return float(theory.error_exponent(torch.from_numpy(mean), torch.from_numpy(w), bias))


# ----------------------------------------------------------------------------------------------------------------------
# Simplex frames
# ----------------------------------------------------------------------------------------------------------------------

SIZES = [(2, 1), (2, 2), (3, 2), (4, 3), (5, 8), (10, 9), (10, 64), (100, 99), (100, 128)]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("c", "d"), SIZES)
def test_simplex_has_the_gram_matrix_of_eq_3_and_the_sum_0(c: int, d: int, seed: int | None) -> None:
    etf = to_numpy(theory.simplex_etf(c, d, generator=None if seed is None else seeded(seed)))
    assert etf.shape == (c, d)
    np.testing.assert_allclose(etf @ etf.T, reference.simplex_gram(c), atol=EXACT)
    np.testing.assert_allclose(etf.sum(0), 0.0, atol=EXACT)


def test_simplex_is_eq_1_with_1_over_c() -> None:
    """Gram matrix, C / (C - 1) (I - 11'/C), is all that a rotation leaves; the printed bracket has another."""
    c = 3
    for divisor, length, cosine in ((c, 1.0, -1 / 2), (c - 1, 1.125, -1 / 3)):
        frame = math.sqrt(c / (c - 1)) * (np.eye(c) - np.ones((c, c)) / divisor)
        gram = frame.T @ frame
        np.testing.assert_allclose([gram[0, 0], gram[0, 1] / gram[0, 0]], [length, cosine], rtol=EXACT)


def test_without_a_generator_nothing_is_drawn_and_the_last_coordinates_are_zero() -> None:
    before = torch.get_rng_state()
    etf = theory.simplex_etf(4, 7)
    theory.isoclinic_rotation(4, 0.3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(etf, theory.simplex_etf(4, 7))
    assert torch.equal(etf[:, 3:], torch.zeros(4, 4, dtype=torch.float64))


def test_a_generator_decides_the_position() -> None:
    frames = [theory.simplex_etf(4, 6, generator=seeded(s)) for s in (1, 1, 2)]
    turns = [theory.isoclinic_rotation(6, 1.0, generator=seeded(s)) for s in (1, 1, 2)]
    for first, again, other in (frames, turns):
        assert torch.equal(first, again)
        assert not torch.allclose(first, other, atol=0.1)


def test_positions_are_uniform_in_what_qr_would_fix() -> None:
    """Two classes on a line have two simplices, the plane two senses of rotation: each about half the time."""
    line = sum(float(theory.simplex_etf(2, 1, generator=seeded(s))[0, 0]) > 0 for s in range(40))
    plane = sum(float(theory.isoclinic_rotation(2, 1.0, generator=seeded(s))[1, 0]) > 0 for s in range(40))
    # Of 40 fair coins, fewer than 8 heads or more than 32 fall once in 10,000 times.
    assert 8 <= line <= 32
    assert 8 <= plane <= 32


# ----------------------------------------------------------------------------------------------------------------------
# Rotations
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("angle", [0.0, 0.4, math.pi / 2, 2.0, math.pi])
@pytest.mark.parametrize("dim", [2, 4, 10])
def test_rotation_is_orthogonal_and_turns_every_vector_by_the_angle(dim: int, angle: float, seed: int | None) -> None:
    turn = to_numpy(theory.isoclinic_rotation(dim, angle, generator=None if seed is None else seeded(seed)))
    np.testing.assert_allclose(turn @ turn.T, np.eye(dim), atol=EXACT)
    np.testing.assert_allclose(np.linalg.det(turn), 1.0, rtol=EXACT)
    for x in np.random.default_rng(dim).normal(size=(20, dim)):
        # The square root in the angle, near 0 and pi, halves the digits of |a - b| and |a + b|.
        assert reference.angle(x, turn @ x) == pytest.approx(angle, abs=1e-7)


def test_rotation_is_cos_identity_plus_sin_a() -> None:
    """The same generator gives the same A, which is antisymmetric, squares to -I, and is what pi / 2 leaves."""
    a = to_numpy(theory.isoclinic_rotation(6, math.pi / 2, generator=seeded(1)))
    np.testing.assert_allclose(a, -a.T, atol=EXACT)
    np.testing.assert_allclose(a @ a, -np.eye(6), atol=EXACT)
    turn = to_numpy(theory.isoclinic_rotation(6, 0.7, generator=seeded(1)))
    np.testing.assert_allclose(turn, math.cos(0.7) * np.eye(6) + math.sin(0.7) * a, atol=EXACT)


def test_rotated_simplex_has_the_alignment_of_the_angle() -> None:
    """What the strategies measure of a classifier built so, cos(angle) for every class."""
    etf = theory.simplex_etf(5, 8, generator=seeded(1))
    w = etf @ theory.isoclinic_rotation(8, 0.8, generator=seeded(2)).T
    seen = torch.ones(5, dtype=torch.bool)
    np.testing.assert_allclose(to_numpy(functional.alignment(w, etf, seen)), math.cos(0.8), rtol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_device_are_as_asked_for(dtype: torch.dtype) -> None:
    exact = theory.simplex_etf(4, 4), theory.isoclinic_rotation(4, 0.3)
    cast = theory.simplex_etf(4, 4, dtype=dtype), theory.isoclinic_rotation(4, 0.3, dtype=dtype)
    for a, b in zip(exact, cast, strict=True):
        assert torch.equal(a.to(dtype), b)
    assert theory.simplex_etf(4, 4, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert theory.isoclinic_rotation(4, 0.3, generator=seeded(1)).device.type == "meta"


# ----------------------------------------------------------------------------------------------------------------------
# Error exponents
# ----------------------------------------------------------------------------------------------------------------------


def random_classifier(seed: int, num_classes: int = 4, dim: int = 3) -> tuple[Array, Array, Array]:
    """Return means, rows that fit them in part, and biases."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(num_classes, dim))
    return mean, mean + rng.normal(size=mean.shape, scale=0.4), rng.normal(size=num_classes, scale=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_pairwise_exponents_of_any_means_rows_and_biases(seed: int, dtype: torch.dtype) -> None:
    m, w, b = (torch.from_numpy(x).to(dtype) for x in random_classifier(seed))
    got = theory.pairwise_error_exponents(m, w, b)
    want = reference.pairwise_error_exponents(to_numpy(m), to_numpy(w), to_numpy(b))
    assert got.dtype == dtype
    # Margins of size 1 and some roundings; squared, below the last digit of 1.
    eps = 20 * torch.finfo(dtype).eps
    np.testing.assert_allclose(to_numpy(got), want, rtol=eps, atol=eps)
    assert float(theory.error_exponent(m, w, b)) == got.min()
    np.testing.assert_array_equal(
        to_numpy(theory.pairwise_error_exponents(m, w)), to_numpy(theory.pairwise_error_exponents(m, w, b * 0))
    )


def test_some_margins_of_the_random_classifiers_are_negative() -> None:
    """So that the tests around tell the positive part from the square."""
    zeros = sum((reference.pairwise_error_exponents(*random_classifier(seed)) == 0).sum() for seed in range(5))
    assert zeros >= 2


def test_equal_rows_leave_the_decision_to_the_biases() -> None:
    """Never an error for the favoured class, always for the other, and a tie is one."""
    w = torch.tensor([[1.0, 2.0, 3.0]]).expand(3, 3) * 0.1
    got = theory.pairwise_error_exponents(torch.randn(3, 3), w, torch.tensor([1.0, 0.0, 0.0]))
    inf = math.inf
    assert got.tolist() == [[inf, inf, inf], [0.0, inf, 0.0], [0.0, 0.0, inf]]


def test_what_rows_share_does_not_drown_what_they_differ_by() -> None:
    """In float32: all rows share a component of 1,000, and each is within 0.003 of another one."""
    rng = np.random.default_rng(0)
    m = rng.normal(size=(30, 8)).astype(np.float32)
    w = np.repeat(rng.integers(-8, 8, size=(15, 8)) / 4.0, 2, axis=0) + 2.0**-13 * rng.integers(-4, 4, size=(30, 8))
    shared = (w + 1000.0 * np.eye(8)[0]).astype(np.float32)
    np.testing.assert_array_equal(shared - 1000.0 * np.eye(8)[0], w)  # exact in float32 too
    got = theory.pairwise_error_exponents(torch.from_numpy(m), torch.from_numpy(shared))
    want = reference.pairwise_error_exponents(m.astype(np.float64), w, np.zeros(30))
    # Once the mean row is gone, products of size 10 are rounded by 1e-6, over distances of 1e-3. Measured by products,
    # the distances themselves would be lost.
    np.testing.assert_allclose(to_numpy(got), want, rtol=1e-2, atol=1e-2)


def test_exponents_do_not_see_what_the_decision_does_not() -> None:
    """A factor of the rows, and one vector added to all, change no answer."""
    m, w, _ = random_classifier(1)
    np.testing.assert_allclose(beta(m, 7.0 * w), beta(m, w), rtol=1e-10)
    np.testing.assert_allclose(beta(m, w + np.array([3.0, -2.0, 1.0])), beta(m, w), rtol=1e-10)
    np.testing.assert_allclose(beta(3.0 * m, w), 9.0 * beta(m, w), rtol=1e-10)


def test_a_common_component_costs_alignment_and_no_errors() -> None:
    """Why Eq. 14 says nothing of rows that are not centred, as trained ones need not be."""
    etf = theory.simplex_etf(4, 6)
    shifted = etf + 5.0 * torch.eye(6, dtype=torch.float64)[5]
    cosine = functional.alignment(shifted, etf, torch.ones(4, dtype=torch.bool))
    assert float(cosine.max()) < 0.2  # 1 / sqrt(1 + 25)
    np.testing.assert_allclose(float(theory.error_exponent(etf, shifted)), theory.optimal_error_exponent(4), rtol=EXACT)


def test_exponents_are_differentiable_by_means_rows_and_biases() -> None:
    inputs = [torch.from_numpy(x).requires_grad_() for x in random_classifier(2)]

    def finite(m: Tensor, w: Tensor, b: Tensor) -> Tensor:
        exponents = theory.pairwise_error_exponents(m, w, b)
        return exponents[exponents.isfinite()]

    assert torch.autograd.gradcheck(finite, inputs)
    grads = torch.autograd.grad(theory.error_exponent(*inputs), inputs)
    assert all(bool(g.isfinite().all()) for g in grads)


def test_autocast_changes_no_bit() -> None:
    m, w, _ = (torch.from_numpy(x).float() for x in random_classifier(3))
    want = theory.pairwise_error_exponents(m, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(theory.pairwise_error_exponents(m, w), want)


# ----------------------------------------------------------------------------------------------------------------------
# The theorems
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c", "d"), [(2, 1), (3, 2), (5, 4), (10, 9), (10, 16)])
def test_theorem_2_a_simplex_attains_the_optimum(c: int, d: int) -> None:
    etf = theory.simplex_etf(c, d, generator=seeded(1))
    np.testing.assert_allclose(float(theory.error_exponent(etf, etf)), c / (4 * (c - 1)), rtol=EXACT)
    assert theory.optimal_error_exponent(c) == c / (4 * (c - 1))


@pytest.mark.parametrize(("c", "d"), [(2, 2), (3, 2), (4, 3), (4, 6)])
def test_theorem_2_nothing_of_length_1_beats_the_optimum(c: int, d: int) -> None:
    """Around the optimum and far from it, means of length at most 1, any rows and biases."""
    rng, best = np.random.default_rng(0), c / (4 * (c - 1))
    etf = to_numpy(theory.simplex_etf(c, d, generator=seeded(1)))
    reached = []
    for scale in np.geomspace(1e-4, 10.0, 300):
        mean = etf + scale * rng.normal(size=(c, d))
        mean /= np.maximum(1.0, np.linalg.norm(mean, axis=1, keepdims=True))
        w, b = etf + scale * rng.normal(size=(c, d)), scale * rng.normal(size=c)
        for rows, biases in ((w, b), (mean, None), (mean, -0.5 * (mean**2).sum(1))):
            reached.append(beta(mean, rows, biases))
    assert max(reached) <= best + EXACT
    assert max(reached) > 0.99 * best  # the search comes near


def simplex_and_a(c: int, d: int, seed: int) -> tuple[Array, Array]:
    """Return a simplex in a random position and a random A of Lemma 3, made without spalign."""
    rng = np.random.default_rng(seed)
    vectors, values = np.linalg.eigh(np.eye(c) - 1.0 / c)[::-1]
    q = np.linalg.qr(rng.normal(size=(d, d)))[0]
    mean = math.sqrt(c / (c - 1)) * vectors[:, values > 0.5] @ q[:, : c - 1].T
    pairs, a = np.linalg.qr(rng.normal(size=(d, d)))[0], np.zeros((d, d))
    for i in range(0, d, 2):
        a += np.outer(pairs[:, i], pairs[:, i + 1]) - np.outer(pairs[:, i + 1], pairs[:, i])
    return mean, a


EVEN_SIZES = [(2, 2), (3, 2), (3, 4), (4, 4), (5, 4), (5, 8), (8, 14), (10, 10), (10, 30)]


@pytest.mark.parametrize(("c", "d"), EVEN_SIZES)
def test_theorem_5_holds_for_every_a_and_every_class(c: int, d: int) -> None:
    """20 random A a size, nine angles: the bound, its lower companion, the closed form, and descent with the angle."""
    for seed in range(20):
        mean, a = simplex_and_a(c, d, seed)
        skew = np.abs(mean @ a @ mean.T).max()
        before = math.inf
        for angle in np.linspace(0.0, math.pi / 2, 9):
            w = mean @ (math.cos(angle) * np.eye(d) + math.sin(angle) * a).T
            by_class = theory.pairwise_error_exponents(torch.from_numpy(mean), torch.from_numpy(w)).min(1).values
            exponent = beta(mean, w)
            assert float(by_class.max()) <= theory.misaligned_bound(c, angle) + EXACT
            margin = c / (c - 1) * math.cos(angle) - skew * math.sin(angle)
            np.testing.assert_allclose(exponent, (c - 1) / (4 * c) * max(0.0, margin) ** 2, atol=EXACT)
            least = c * math.cos(angle) - math.sqrt(c * (c - 2)) * math.sin(angle)
            assert exponent >= max(0.0, least) ** 2 / (4 * c * (c - 1)) - EXACT
            assert exponent <= before + EXACT
            before = exponent


def test_eq_14_as_printed_fails_where_every_mean_is_misclassified() -> None:
    """Three classes in the plane at 75 degrees: 0.0335 > 0.0251 with squares of negative margins, and exponent 0."""
    angle = math.radians(75)
    etf = theory.simplex_etf(3, 2)
    w = etf @ theory.isoclinic_rotation(2, angle).T
    mean, rows = to_numpy(etf), to_numpy(w)
    printed = min(
        ((rows[c] - rows[k]) @ mean[c]) ** 2 / (2 * np.sum((rows[c] - rows[k]) ** 2))
        for c in range(3)
        for k in range(3)
        if k != c
    )
    assert printed == pytest.approx(0.0335, abs=5e-5)
    assert theory.misaligned_bound(3, angle) == pytest.approx(0.0251, abs=5e-5)
    assert theory.error_exponent(etf, w) == 0
    assert all(int(c) != k for k, c in enumerate((rows @ mean.T).argmax(0)))


def test_eq_14_is_attained_where_a_leads_out_of_the_span_of_the_means() -> None:
    """In 2 (C - 1) dimensions; in fewer it is not."""
    for c in (2, 3, 5):
        n = c - 1
        a = np.block([[np.zeros((n, n)), -np.eye(n)], [np.eye(n), np.zeros((n, n))]])
        mean = to_numpy(theory.simplex_etf(c, 2 * n))
        for angle in (0.3, 1.0, 1.5):
            w = mean @ (math.cos(angle) * np.eye(2 * n) + math.sin(angle) * a).T
            np.testing.assert_allclose(beta(mean, w), theory.misaligned_bound(c, angle), rtol=1e-10)
        assert theory.misaligned_bound(c, 2.0) == 0 == beta(mean, -mean)
    for seed in range(20):
        mean, a = simplex_and_a(4, 4, seed)
        w = mean @ (math.cos(0.3) * np.eye(4) + math.sin(0.3) * a).T
        assert beta(mean, w) < 0.9 * theory.misaligned_bound(4, 0.3)


def test_one_angle_for_all_classes_is_not_always_an_isoclinic_rotation() -> None:
    """A tetrahedron turned about the z axis: the angle is common, the axis itself does not move; the bound holds."""
    mean = np.array([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]) / math.sqrt(3)
    for turn in (0.3, 1.0, 2.0):
        c, s = math.cos(turn), math.sin(turn)
        w = mean @ np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]).T
        cosines = (mean * w).sum(1)
        np.testing.assert_allclose(cosines, (1 + 2 * c) / 3, rtol=EXACT)
        assert beta(mean, w) <= theory.misaligned_bound(4, math.acos(cosines[0])) + EXACT


@pytest.mark.parametrize("seed", range(30))
def test_the_regularizer_bounds_the_exponent_of_a_simplex_classifier(seed: int) -> None:
    """beta <= (mean of |d_c| cos_c)^2 beta*, 0 if negative, for any means and biases; (1 - L)^2 beta* if |d_c| = 1."""
    c, d = 4, 5
    rng, every = np.random.default_rng(seed), np.ones(4, dtype=np.bool_)
    w = to_numpy(theory.simplex_etf(c, d, generator=seeded(seed)))
    spread = (0.1, 0.4, 2.0)[seed % 3]
    mean = w + spread * rng.normal(size=(c, d)) + rng.normal(size=d)
    # Biases that undo what the means share, or nearly.
    b = -w @ mean.mean(0) + 0.1 * spread * rng.normal(size=c)
    lengths = np.linalg.norm(mean - mean.mean(0), axis=1)
    terms = lengths * reference.alignment(w, mean, every)
    best = theory.optimal_error_exponent(c)
    assert beta(mean, w, b) <= max(0.0, terms.mean()) ** 2 * best + EXACT

    x, y = rng.normal(size=(2, d))
    unit = np.array([x, -x, y, -y]) / np.sqrt([x @ x, x @ x, y @ y, y @ y])[:, None]
    loss = functional.alignment_loss(torch.from_numpy(w), torch.from_numpy(unit), torch.from_numpy(every))
    assert beta(unit, w) <= max(0.0, 1.0 - float(loss)) ** 2 * best + EXACT


def test_a_padded_zero_matters_if_the_noise_does_not_fill_it() -> None:
    """Two classes on a line, turned into the plane: on the line the decision stays the best, whatever the angle."""
    mean = to_numpy(theory.simplex_etf(2, 2))
    assert not mean[:, 1].any()
    for angle in (0.5, 1.2):
        w = mean @ to_numpy(theory.isoclinic_rotation(2, angle)).T
        np.testing.assert_allclose(beta(mean, w), math.cos(angle) ** 2 / 2, rtol=EXACT)
        np.testing.assert_allclose(beta(mean[:, :1], w[:, :1]), 1 / 2, rtol=EXACT)


# ----------------------------------------------------------------------------------------------------------------------
# Noise
# ----------------------------------------------------------------------------------------------------------------------


def tail(t: float) -> float:
    """Return the probability that a standard normal variable exceeds t."""
    return 0.5 * math.erfc(t / math.sqrt(2))


def test_an_exponent_belongs_to_losing_to_a_class_and_not_to_its_being_the_answer() -> None:
    """Lemma 2: of means 0, 1, 2 on a line, the last outscores the first beyond 1 and is the answer beyond 1.5."""
    mean = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    bias = -0.5 * mean[:, 0].square()  # nearest mean
    exponents = theory.pairwise_error_exponents(mean, mean, bias)
    sigma = 0.05
    rates = {x: -(sigma**2) * math.log(tail(x / sigma)) for x in (0.5, 1.0, 1.5)}
    # Mills: -sigma^2 log tail(x / sigma) = x^2 / 2 + sigma^2 log(sqrt(2 pi) x / sigma) + ..., here less than 0.02.
    assert float(exponents[0, 2]) == pytest.approx(rates[1.0], abs=0.02)
    assert rates[1.5] > 1.0
    assert float(exponents[0].min()) == pytest.approx(rates[0.5], abs=0.02)


def fitting_classifier(seed: int, num_classes: int, dim: int) -> tuple[Array, Array, Array]:
    """Return means, and rows and biases near those of the nearest mean, which misclassify no mean."""
    mean, w, b = random_classifier(seed, num_classes, dim)
    return mean, mean + 0.3 * (w - mean), 0.3 * b - 0.5 * (mean * mean).sum(1)


def error_rate(mean: Array, w: Array, b: Array, sigma: float, draws: int = 20_000) -> float:
    """Return P(argmax <w, mu_c + z> + b != c), averaged over c, from noise drawn where errors are.

    For each class, noise around the nearest point at which each other class draws level, weighed by the density it
    should have had: unbiased whatever these points are.
    """
    rng, rates = np.random.default_rng(7), []
    for c, mu in enumerate(mean):
        others = [k for k in range(len(mean)) if k != c]
        v = w[c] - w[others]
        margin = np.maximum(0.0, v @ mu + b[c] - b[others])
        point = -(margin / (v * v).sum(1))[:, None] * v
        z = np.concatenate([p + sigma * rng.normal(size=(draws, mean.shape[1])) for p in point])
        log_ratio = (2 * z @ point.T - (point * point).sum(1)) / (2 * sigma**2)  # of the densities, drawn to right
        log_drawn = np.logaddexp.reduce(log_ratio, axis=1) - math.log(len(point))
        wrong = ((mu + z) @ w.T + b).argmax(1) != c
        rates.append(np.mean(wrong * np.exp(-log_drawn)))
    return float(np.mean(rates))


def test_the_estimate_of_the_error_rate_is_right_for_two_classes() -> None:
    """Against the closed form, the tail of the distance to the boundary along the difference of the rows."""
    m, w, b = fitting_classifier(1, 2, 3)
    v = w[0] - w[1]
    t = [sign * (v @ mu + b[0] - b[1]) / np.linalg.norm(v) for sign, mu in zip((1, -1), m, strict=True)]
    assert min(t) > 0.5
    for sigma in (0.5, 0.1):
        exact = np.mean([tail(x / sigma) for x in t])
        # Weights of such draws have a second moment of about sqrt(pi / 2) t / sigma in units of their mean squared:
        # with t / sigma < 15, three deviations of the mean of 20,000 are 9 %.
        assert max(t) / 0.1 < 15
        assert error_rate(m, w, b, sigma) == pytest.approx(exact, rel=0.09)


@pytest.mark.parametrize("seed", [0, 1, "simplex", "rotated"])
def test_errors_vanish_with_the_predicted_exponent(seed: int | str) -> None:
    """P is between the nearest boundary's tail by C and by C - 1, so -sigma^2 log P is within two known numbers."""
    if isinstance(seed, int):
        m, w, b = fitting_classifier(seed, 4, 6)
    else:
        m, b = to_numpy(theory.simplex_etf(4, 6, generator=seeded(1))), np.zeros(4)
        angle = 0.0 if seed == "simplex" else 0.6
        w = m @ to_numpy(theory.isoclinic_rotation(6, angle, generator=seeded(2))).T
    exponent, c = beta(m, w, b), len(m)
    for sigma in (0.3, 0.1, 0.04):
        nearest = tail(math.sqrt(2 * exponent) / sigma)
        rate = error_rate(m, w, b, sigma)
        # As above with t < 40, and where one boundary of one class is all that counts: three deviations are 15 %.
        assert nearest / c <= 1.15 * rate
        assert rate <= 1.15 * (c - 1) * nearest
    # What the brackets leave at the last sigma: sigma^2 log(C t sqrt(2 pi)) with t < 40, below 0.0016 * 6 = 0.01.
    assert math.sqrt(2 * exponent) / sigma < 40
    assert -(sigma**2) * math.log(rate) == pytest.approx(exponent, abs=0.01)


def test_an_exponent_of_0_is_an_error_rate_that_stays() -> None:
    """Three classes in the plane at 75 degrees; as printed, Eq. 13 has errors vanish like exp(-0.0335 / sigma^2)."""
    mean = to_numpy(theory.simplex_etf(3, 2))
    w = mean @ to_numpy(theory.isoclinic_rotation(2, math.radians(75))).T
    z = 0.05 * np.random.default_rng(0).normal(size=(1000, 2))
    for c in range(3):
        assert (((mean[c] + z) @ w.T).argmax(1) != c).mean() > 0.99
    assert math.exp(-0.0335 / 0.05**2) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# Errors, and the page
# ----------------------------------------------------------------------------------------------------------------------

M = torch.zeros(3, 4)
NO_INTEGER: Any = 2.5
NO_NUMBER: Any = "1"
BAD: dict[str, tuple[Any, list[str]]] = {
    # what is called, then what the message must say: the value, the expected one, the fix
    "one class": (lambda: theory.simplex_etf(1, 4), ["num_classes is 1", "at least 2"]),
    "classes no integer": (lambda: theory.simplex_etf(NO_INTEGER, 4), ["num_classes is 2.5", "integer"]),
    "classes a bool": (lambda: theory.simplex_etf(True, 4), ["num_classes is True", "integer"]),
    "no dimensions": (lambda: theory.simplex_etf(2, 0), ["dim is 0", "at least 1", "classifier's input"]),
    "too narrow": (lambda: theory.simplex_etf(100, 64), ["dim is 64", "at least 99", "100 classes", "wider"]),
    "frame of integers": (lambda: theory.simplex_etf(3, 2, dtype=torch.int64), ["torch.int64", "float"]),
    "odd": (lambda: theory.isoclinic_rotation(5, 0.1), ["dim is 5", "even", "pad(x, (0, 1))", "pass 6", "noise"]),
    "one dimension": (lambda: theory.isoclinic_rotation(1, 0.1), ["dim is 1", "at least 2"]),
    "degrees": (lambda: theory.isoclinic_rotation(4, 75), ["angle is 75", "radians", "math.radians"]),
    "negative angle": (lambda: theory.isoclinic_rotation(4, -0.1), ["angle is -0.1", "[0, pi]"]),
    "no angle": (lambda: theory.misaligned_bound(4, math.nan), ["angle is nan", "[0, pi]"]),
    "angle as text": (lambda: theory.misaligned_bound(4, NO_NUMBER), ["angle is '1'", "number"]),
    "bound of one class": (lambda: theory.misaligned_bound(1, 0.1), ["num_classes is 1", "at least 2"]),
    "optimum of one class": (lambda: theory.optimal_error_exponent(1), ["num_classes is 1", "at least 2"]),
    "means 1-D": (lambda: theory.error_exponent(M[0], M[0]), ["(4,)", "(C, D)"]),
    "rows transposed": (lambda: theory.error_exponent(M, M.T), ["(3, 4)", "(4, 3)", "one classifier row per class"]),
    "bias of each feature": (lambda: theory.error_exponent(M, M, torch.zeros(4)), ["(4,)", "(3,)", "one per class"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_value_expectation_and_fix(case: str) -> None:
    call, said = BAD[case]
    with pytest.raises(ValueError, match=".*".join(re.escape(s) for s in said)):
        call()


def test_the_package_shows_it() -> None:
    assert spalign.theory is theory
    own = [x.__name__ for x in vars(theory).values() if inspect.isfunction(x) and x.__module__ == theory.__name__]
    assert sorted(theory.__all__) == sorted(name for name in own if not name.startswith("_"))


@pytest.mark.skipif(not PAGE.exists(), reason="the tests run without the documentation here")
def test_the_page_of_maths_says_what_its_lines_print_and_names_what_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    examples = doctest.DocTestParser().get_doctest(lines, {}, PAGE.name, str(PAGE), 0)
    said: list[str] = []
    results = doctest.DocTestRunner().run(examples, out=said.append)
    assert results.attempted > 5
    assert not results.failed, "".join(said)
    names = re.findall(r"`(functional|theory|distributed)\.(\w+)`", text)
    assert {name for module, name in names if module == "theory"} == set(theory.__all__)
    for module, name in names:
        assert hasattr(importlib.import_module(f"spalign.{module}"), name), f"the page names {module}.{name}"
