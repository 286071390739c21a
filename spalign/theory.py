"""Simplex frames, rotations and error exponents: the theory of *Space Alignment Matters*, to compute and to try out.

A linear classifier sees ``h = mu_c + z`` with Gaussian noise of covariance ``sigma^2 I`` and answers
``argmax_c <w_c, h> + b_c``. As sigma falls its error vanishes like ``exp(-beta / sigma^2)``; the exponent beta (Eq. 6)
is what the paper's theorems are about. ``docs/maths.md`` derives every statement made here.

Shapes: C classes, D feature dimensions. ``mean_CD`` class means, ``weight_CD`` classifier rows, ``bias_C`` biases;
``x_CC[c, k]`` is of a sample of class c being taken for class k.

Equation numbers are the paper's; where the printed formula is wrong the docstring says so.
"""

import math

import torch
from torch import Tensor

from spalign.functional import _is_count, _is_number_in, _math_dtype, _no_autocast

__all__ = [
    "error_exponent",
    "isoclinic_rotation",
    "misaligned_bound",
    "optimal_error_exponent",
    "pairwise_error_exponents",
    "simplex_etf",
]

# ----------------------------------------------------------------------------------------------------------------------
# Geometry
# ----------------------------------------------------------------------------------------------------------------------


def _check_count(name: str, value: int, least: int, fix: str) -> None:
    if not _is_count(value, least):
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}; {fix}")


def _check_angle(angle: float) -> None:
    if not _is_number_in(angle, 0.0, math.pi):
        raise ValueError(f"angle is {angle!r}, expected radians in [0, pi], as a number; convert with math.radians")


def _orthonormal(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """Return orthonormal columns, uniformly distributed; without a generator, the first of the identity."""
    if generator is None:
        return torch.eye(rows, columns, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(
        torch.randn(rows, columns, dtype=torch.float64, device=generator.device, generator=generator)
    )
    # The signs that QR leaves would fix the determinant, and in two dimensions every rotation would go one way.
    columns_RC: Tensor = q * r.diagonal().sign()
    return columns_RC


def _placed(x: Tensor, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}, expected a float dtype, which can hold a direction; leave it at float64")
    return x.to(device=torch.empty(0).device if device is None else device, dtype=dtype)


def simplex_etf(
    num_classes: int,
    dim: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return a simplex equiangular tight frame, one unit row per class, any two at the cosine ``-1 / (C - 1)`` (Eq. 1).

    ``sqrt(C / (C - 1)) (I - 11' / C) B R'`` with R (D, C - 1) of orthonormal columns, and B (C, C - 1) an orthonormal
    basis of the vectors that sum to 0. The paper prints ``1 / (C - 1)`` for ``1 / C``, which is no projection (for
    C = 3 vectors of squared length 1.125 at the cosine -1/3), and asks for D >= C; C - 1 dimensions are enough.

    Args:
        num_classes: C, at least 2.
        dim: D, at least C - 1.
        generator: turns the frame to a random position, uniform over all of them. Without it R is the first columns of
            the identity, so the entries beyond C - 1 are 0.
        dtype: of the result; it is computed in float64.
        device: where the result lies. The same generator gives the same frame on each.

    Returns:
        (C, D).

    Raises:
        ValueError: D < C - 1, where there is no such frame, or an argument is no count or no float dtype.

    Example:
        >>> etf = simplex_etf(3, 2)
        >>> (etf @ etf.T).round(decimals=3).tolist()
        [[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]
    """
    _check_count("num_classes", num_classes, 2, "a single vector has no angles")
    _check_count("dim", dim, 1, "pass the width of the classifier's input")
    if dim < num_classes - 1:
        raise ValueError(
            f"dim is {dim}, expected at least {num_classes - 1} for a simplex of {num_classes} classes; use wider "
            "features or fewer classes"
        )
    # Helmert's basis: column k is k ones and then -k, scaled.
    size = torch.arange(1, num_classes, dtype=torch.float64, device="cpu")
    basis = torch.triu(torch.ones(num_classes, num_classes - 1, dtype=torch.float64, device="cpu"))
    basis[range(1, num_classes), range(num_classes - 1)] = -size
    basis = math.sqrt(num_classes / (num_classes - 1)) * (basis / (size * (size + 1)).sqrt())
    rotation = _orthonormal(dim, num_classes - 1, generator)
    return _placed(basis.to(rotation.device) @ rotation.t(), dtype, device)


def isoclinic_rotation(
    dim: int,
    angle: float,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return a rotation that turns every vector by the same angle, ``R = cos(a) I + sin(a) A`` (Lemma 3).

    ``A' = -A`` and ``A^2 = -I``, so ``<x, R x> = cos(a) |x|^2`` for all x: what Lemma 3 assumes of the class means
    follows. ``mean_CD @ R.T`` is a classifier at the angle a to class means, each row to its own.

    Args:
        dim: D, even: an antisymmetric A of odd size is singular.
        angle: a, radians in [0, pi].
        generator: chooses A uniformly among all. Without it R turns coordinates (0, 1), (2, 3), ... counterclockwise.
        dtype: of the result; it is computed in float64.
        device: where the result lies. The same generator gives the same rotation on each.

    Returns:
        (D, D) orthogonal.

    Raises:
        ValueError: D is odd or no count, the angle is out of range, or the dtype is no float dtype.

    Example:
        >>> import math
        >>> isoclinic_rotation(2, math.pi / 3).round(decimals=3).tolist()
        [[0.5, -0.866], [0.866, 0.5]]
    """
    _check_count("dim", dim, 2, "pass the width of the classifier's input")
    if dim % 2:
        raise ValueError(
            f"dim is {dim}, expected an even number, as no A of odd size has A^2 = -I; append a zero to the features, "
            f"torch.nn.functional.pad(x, (0, 1)), and pass {dim + 1} (noise has to fill the new dimension too)"
        )
    _check_angle(angle)
    q = _orthonormal(dim, dim, generator)
    planes = q[:, 1::2] @ q[:, ::2].t()
    turn = math.sin(angle) * (planes - planes.t())
    turn.diagonal().add_(math.cos(angle))
    return _placed(turn, dtype, device)


# ----------------------------------------------------------------------------------------------------------------------
# Error exponents
# ----------------------------------------------------------------------------------------------------------------------


def pairwise_error_exponents(mean_CD: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Return how fast each class stops losing to each other one as noise falls (Eq. 10, with biases).

    ``beta_ck = max(0, m)^2 / (2 |w_c - w_k|^2)`` with the margin ``m = <w_c - w_k, mu_c> + b_c - b_k``, which is half
    the squared distance from mu_c to where class k draws level. Departures from print: the positive part, because with
    a negative margin the mean itself is taken for class k, at any noise, and the exponent is 0; the biases; and the
    event, which is "k scores at least as high as c": the exponent of "k is the answer", as Lemma 2 has it, can be
    larger where a third class lies between. The minimum over k is that of an error of class c in either reading.

    Means, rows and biases are those of the classifier as it is used: neither centred nor normalized here.
    Differentiable by all three.

    Args:
        mean_CD: (C, D), any float dtype.
        weight_CD: (C, D).
        bias_C: (C,), zeros if not given.

    Returns:
        (C, C), row c of samples of class c; float32 (float64 if means or rows are). Infinite on the diagonal, and
        between equal rows whose biases favour c; 0 between equal rows otherwise, equal biases included: a tie is
        counted as an error, as everywhere on the boundary.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> import torch
        >>> mean = torch.tensor([[1., 0.], [-1., 0.]])
        >>> pairwise_error_exponents(mean, mean).tolist()
        [[inf, 0.5], [0.5, inf]]
        >>> pairwise_error_exponents(mean, mean, torch.tensor([0.5, -0.5])).tolist()
        [[inf, 1.125], [0.125, inf]]
        >>> pairwise_error_exponents(mean, -mean).tolist()
        [[inf, 0.0], [0.0, inf]]
    """
    if mean_CD.ndim != 2 or weight_CD.shape != mean_CD.shape:
        raise ValueError(
            f"means and rows have shapes {tuple(mean_CD.shape)} and {tuple(weight_CD.shape)}, expected (C, D) twice; "
            "pass one mean and one classifier row per class"
        )
    if bias_C is not None and bias_C.shape != mean_CD.shape[:1]:
        raise ValueError(
            f"biases have shape {tuple(bias_C.shape)}, expected {tuple(mean_CD.shape[:1])}; pass one per class"
        )
    dtype = _math_dtype(mean_CD, weight_CD)
    mean_CD, weight_CD = mean_CD.to(dtype), weight_CD.to(dtype)
    weight_CD = weight_CD - weight_CD.mean(0)  # what rows share decides nothing, and would drown what they differ by
    bias_C = weight_CD.new_zeros(len(weight_CD)) if bias_C is None else bias_C.to(dtype)
    with _no_autocast(mean_CD):
        score_CC = mean_CD @ weight_CD.t()
        # Near rows would lose their difference in |w_c|^2 + |w_k|^2 - 2 <w_c, w_k>, which is how cdist multiplies.
        distance_CC = torch.cdist(weight_CD, weight_CD, compute_mode="donot_use_mm_for_euclid_dist")
    equal_CC = distance_CC == 0
    gap_CC = bias_C.unsqueeze(1) - bias_C
    # Of equal rows, the products may differ by rounding.
    margin_CC = torch.where(equal_CC, 0.0, score_CC.diagonal().unsqueeze(1) - score_CC) + gap_CC
    root_CC = margin_CC.clamp(min=0.0) / torch.where(equal_CC, 1.0, distance_CC)
    never_CC = equal_CC & (margin_CC > 0) | torch.eye(len(mean_CD), dtype=torch.bool, device=mean_CD.device)
    return (0.5 * root_CC.square()).masked_fill(never_CC, math.inf)


def error_exponent(mean_CD: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Return the error exponent of a classifier, ``beta = lim -sigma^2 log P(error)`` (Eq. 6), for any prior.

    The minimum of :func:`pairwise_error_exponents` over all ordered pairs, because the most likely error outlasts all
    others. Eq. 14 prints the minimum over the second class alone, which is one class's exponent.

    Args:
        mean_CD: (C, D), any float dtype.
        weight_CD: (C, D).
        bias_C: (C,), zeros if not given.

    Returns:
        Scalar, float32 (float64 if means or rows are).

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> import math
        >>> etf = simplex_etf(3, 2)
        >>> for degrees in (0, 30, 60, 75):
        ...     rotated = etf @ isoclinic_rotation(2, math.radians(degrees)).T
        ...     print(f"{error_exponent(etf, rotated):.3f} <= {misaligned_bound(3, math.radians(degrees)):.3f}")
        0.375 <= 0.375
        0.125 <= 0.281
        0.000 <= 0.094
        0.000 <= 0.025
    """
    return pairwise_error_exponents(mean_CD, weight_CD, bias_C).min()


def optimal_error_exponent(num_classes: int) -> float:
    """Return ``C / (4 (C - 1))``, the largest error exponent of C classes with means of length at most 1 (Theorem 2).

    A simplex of means that is its own classifier attains it; no means, rows and biases in any dimension exceed it.

    Raises:
        ValueError: fewer than two classes.

    Example:
        >>> optimal_error_exponent(2), optimal_error_exponent(10)
        (0.5, 0.2777777777777778)
    """
    _check_count("num_classes", num_classes, 2, "a single class has no errors")
    return num_classes / (4.0 * (num_classes - 1))


def misaligned_bound(num_classes: int, angle: float) -> float:
    """Return ``max(0, cos a)^2 C / (4 (C - 1))``, what a simplex classifier at the angle a can reach at most (Eq. 14).

    With the positive part in Eq. 10 it holds for every A of Lemma 3 and, whatever the biases, for all rows that are a
    simplex and means of length at most 1 at the angle a to their rows; without biases for each class alone. For
    0 < a < pi / 2 it is attained if and only if ``<mu_c, A mu_k> = 0`` for all pairs, which takes D >= 2 (C - 1).

    As printed, with squares of negative margins, Eq. 14 is wrong: for C = 3 in the plane at 75 degrees Eq. 13 gives
    0.0335 > 0.0251, where every class mean is taken for another class and the exponent is 0. It says nothing of rows
    that share a component, which costs alignment and no errors.

    Args:
        num_classes: C, at least 2.
        angle: a, radians in [0, pi].

    Raises:
        ValueError: fewer than two classes, or the angle is out of range.

    Example:
        >>> import math
        >>> round(misaligned_bound(3, math.radians(75)), 4)
        0.0251
    """
    _check_angle(angle)
    return max(0.0, math.cos(angle)) ** 2 * optimal_error_exponent(num_classes)
