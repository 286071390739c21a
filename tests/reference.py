"""The formulas of *Space Alignment Matters*, corrected, as plain float64 numpy loops over classes and samples.

Written from the paper and the design contract, never from the code under test; slow and literal on purpose. Equation
numbers are the paper's. Shapes: N samples, C classes, D feature dimensions. ``d_c = mu_c - mu_G`` everywhere.
"""

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Ints: TypeAlias = NDArray[np.int64]

# Rows closer to the antipode than this have no unique shortest path and stay (design contract, radians).
ANTIPODAL_MARGIN = 1e-3


def soft_weights(q_C: Array) -> Array:
    """Subtract a soft label's floor and rescale to its sum (pitfall D8); all zero where nothing rises above it."""
    excess = q_C - q_C.min()
    if not np.all(np.isfinite(q_C)) or excess.sum() <= 1e-6 * q_C.sum():
        return np.zeros_like(q_C)
    return np.asarray(excess * (q_C.sum() / excess.sum()), dtype=np.float64)


def label_weights(h_ND: Array, targets: Array | Ints, num_classes: int, ignore_index: int = -100) -> Array:
    """Return q (N, C), how much each sample counts for each class; a zero row for samples that change nothing."""
    q_NC = np.zeros((len(h_ND), num_classes))
    for i, h in enumerate(h_ND):
        if not np.all(np.isfinite(h)):
            continue
        if targets.ndim == 1:
            y = int(targets[i])
            if y != ignore_index and 0 <= y < num_classes:
                q_NC[i, y] = 1.0
        else:
            q_NC[i] = soft_weights(np.asarray(targets[i], dtype=np.float64))
    return q_NC


def class_statistics(
    h_ND: Array, targets: Array | Ints, num_classes: int, ignore_index: int = -100
) -> tuple[Array, Array]:
    """Return sum_i q_ic h_i (C, D) and sum_i q_ic (C,)."""
    q_NC = label_weights(h_ND, targets, num_classes, ignore_index)
    sums, weights = np.zeros((num_classes, h_ND.shape[1])), np.zeros(num_classes)
    for i in range(len(h_ND)):
        for c in range(num_classes):
            if q_NC[i, c] > 0:
                sums[c] += q_NC[i, c] * h_ND[i]
                weights[c] += q_NC[i, c]
    return sums, weights


def update_rates(weight_C: Array, batch_C: Array, momentum: float | None) -> Array:
    """Return r_c: 1 / (N_c + n_c) cumulative, momentum / n_c for EMA, 1 / n_c at the first observation."""
    r = np.zeros_like(weight_C)
    for c, n in enumerate(batch_C):
        if n > 0:
            if weight_C[c] == 0:
                r[c] = 1.0 / n
            elif momentum is None:
                r[c] = 1.0 / (weight_C[c] + n)
            else:
                r[c] = momentum / n
    return r


def update_class_means(
    mean_CD: Array,
    weight_C: Array,
    h_ND: Array,
    targets: Array | Ints,
    momentum: float | None,
    ignore_index: int = -100,
) -> tuple[Array, Array]:
    """Return means and weights after a batch: mu'_c = mu_c + r_c sum_i q_ic (h_i - mu_c)."""
    q_NC = label_weights(h_ND, targets, len(mean_CD), ignore_index)
    batch_C = np.array([sum(q_NC[:, c]) for c in range(len(mean_CD))])
    r_C = update_rates(weight_C, batch_C, momentum)
    mean = mean_CD.copy()
    for c in range(len(mean_CD)):
        for i in range(len(h_ND)):
            if q_NC[i, c] > 0:
                mean[c] += r_C[c] * q_NC[i, c] * (h_ND[i] - mean_CD[c])
    return mean, weight_C + batch_C


def global_mean(mean_CD: Array, seen_C: Bools) -> Array:
    """Return mu_G, the mean of the class means over the classes seen (Eq. 2, class balanced)."""
    seen = [mean_CD[c] for c in range(len(mean_CD)) if seen_C[c]]
    return np.mean(seen, axis=0) if seen else np.zeros(mean_CD.shape[1])


def _unit(x: Array) -> Array | None:
    norm = math.sqrt(float(x @ x))
    return None if norm == 0 else x / norm


def directions(mean_CD: Array, seen_C: Bools) -> Array:
    """Return mu_hat_c = unit(mu_c - mu_G); zero rows where there is no direction."""
    center, out = global_mean(mean_CD, seen_C), np.zeros_like(mean_CD)
    for c in range(len(mean_CD)):
        d = mean_CD[c] - center
        # A difference of the size of float64 rounding of its terms points nowhere.
        if seen_C[c] and np.linalg.norm(d) > 1e-14 * np.linalg.norm(center):
            out[c] = d / np.linalg.norm(d)
    return out


def alignment(w_CD: Array, mean_CD: Array, seen_C: Bools) -> Array:
    """Return cos(w_hat_c, mu_hat_c), 0 where one of the two does not exist."""
    mu_hat, out = directions(mean_CD, seen_C), np.zeros(len(w_CD))
    for c in range(len(w_CD)):
        w_hat = _unit(w_CD[c])
        if w_hat is not None:
            out[c] = w_hat @ mu_hat[c]
    return out


def _aligned_pairs(w_CD: Array, mean_CD: Array, seen_C: Bools) -> list[tuple[int, Array, Array]]:
    mu_hat, pairs = directions(mean_CD, seen_C), []
    for c in range(len(w_CD)):
        w_hat = _unit(w_CD[c])
        if w_hat is not None and np.any(mu_hat[c]):
            pairs.append((c, w_hat, mu_hat[c]))
    return pairs


def alignment_loss(w_CD: Array, mean_CD: Array, seen_C: Bools) -> float:
    """Eq. 15 over the classes seen; a pair with nothing to align adds 0."""
    terms = [1.0 - float(w_hat @ mu_hat) for _, w_hat, mu_hat in _aligned_pairs(w_CD, mean_CD, seen_C)]
    return sum(terms) / max(int(seen_C.sum()), 1)


def alignment_loss_grad_weight(w_CD: Array, mean_CD: Array, seen_C: Bools) -> Array:
    """Return the gradient of Eq. 15 by w: -(mu_hat - cos w_hat) / (S |w|), S the number of classes seen."""
    grad = np.zeros_like(w_CD)
    for c, w_hat, mu_hat in _aligned_pairs(w_CD, mean_CD, seen_C):
        grad[c] = -(mu_hat - (w_hat @ mu_hat) * w_hat) / np.linalg.norm(w_CD[c]) / seen_C.sum()
    return grad


def alignment_loss_grad_mean(w_CD: Array, mean_CD: Array, seen_C: Bools) -> Array:
    """Return the gradient of Eq. 15 by mu, through mu_G too."""
    center = global_mean(mean_CD, seen_C)
    by_d = np.zeros_like(mean_CD)
    for c, w_hat, mu_hat in _aligned_pairs(w_CD, mean_CD, seen_C):
        by_d[c] = -(w_hat - (w_hat @ mu_hat) * mu_hat) / np.linalg.norm(mean_CD[c] - center) / seen_C.sum()
    grad = np.zeros_like(mean_CD)
    for c in range(len(mean_CD)):
        if seen_C[c]:
            # d_k holds +mu_c where k = c and -mu_c / S in every seen k.
            grad[c] = by_d[c] - by_d.sum(0) / seen_C.sum()
    return grad


def cosine_schedule(t: int, total: int, alpha_max: float) -> float:
    """Return alpha_t = alpha_max (1 - cos(pi t / T)) / 2, t clamped to T (unnumbered)."""
    return alpha_max * (1.0 - math.cos(math.pi * min(t, total) / total)) / 2.0


def angle(a: Array, b: Array) -> float:
    """Return the angle between two vectors by 2 atan2(|a - b|, |a + b|) of their units."""
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return 2.0 * math.atan2(float(np.linalg.norm(a - b)), float(np.linalg.norm(a + b)))


def slerp(w_CD: Array, mean_CD: Array, seen_C: Bools, alpha: float, threshold: float) -> Array:
    """Rotate by the SLERP equation (unnumbered), with the angle from atan2 and the limits at 0 and pi."""
    out: Array = w_CD.copy()
    for c, w_hat, mu_hat in _aligned_pairs(w_CD, mean_CD, seen_C):
        theta = angle(w_CD[c], mu_hat)
        if float(w_hat @ mu_hat) >= threshold or theta > math.pi - ANTIPODAL_MARGIN or alpha == 0:
            continue
        if theta < 1e-7:  # the limit of the coefficients; exact to float64 rounding here
            a, b = 1.0 - alpha, alpha
        else:
            a, b = math.sin((1 - alpha) * theta) / math.sin(theta), math.sin(alpha * theta) / math.sin(theta)
        out[c] = np.linalg.norm(w_CD[c]) * (a * w_hat + b * mu_hat)
    return out


def project_gradient(
    g_CD: Array, w_CD: Array, mean_CD: Array, seen_C: Bools, gamma: float, radial: str = "paper"
) -> Array:
    """Eqs. 17 to 20, with <mu_hat, w_hat> in Eq. 18 where the paper prints <g, w_hat>."""
    out: Array = g_CD.copy()
    for c, w_hat, mu_hat in _aligned_pairs(w_CD, mean_CD, seen_C):
        g = g_CD[c]
        g_rad = (g @ w_hat) * w_hat  # Eq. 17
        g_tan = g - g_rad
        d = mu_hat - (mu_hat @ w_hat) * w_hat  # Eq. 18, corrected
        if np.linalg.norm(d) > 1e-14:
            d_hat = d / np.linalg.norm(d)
            p = g_tan @ d_hat
        else:
            d_hat, p = np.zeros_like(d), np.float64(0.0)
        if radial == "keep":
            out[c] = g - (1 - gamma) * max(p, 0.0) * d_hat
        else:
            g_safe = g_tan - p * d_hat if p > 0 else g_tan  # Eq. 19
            out[c] = (1 - gamma) * g_safe + gamma * g  # Eq. 20
    return out


def class_scatter(h_ND: Array, y_N: Ints, num_classes: int, ignore_index: int = -100) -> tuple[Array, Array, Array]:
    """Return n_c (C,), mu_c (C, D) and sum_i (h_i - mu_c)(h_i - mu_c)' (C, D, D)."""
    q_NC, dim = label_weights(h_ND, y_N, num_classes, ignore_index), h_ND.shape[1]
    n, mean, scatter = np.zeros(num_classes), np.zeros((num_classes, dim)), np.zeros((num_classes, dim, dim))
    for c in range(num_classes):
        rows = [h for h, q in zip(h_ND, q_NC, strict=True) if q[c] > 0]
        if rows:
            n[c], mean[c] = len(rows), np.mean(rows, axis=0)
            scatter[c] = sum(np.outer(h - mean[c], h - mean[c]) for h in rows)
    return n, mean, scatter


def neural_collapse(
    h_ND: Array, y_N: Ints, w_CD: Array, logits_NC: Array | None = None, ignore_index: int = -100
) -> dict[str, float]:
    """Return NC1 to NC4 and alignment over the classes seen: Eqs. 2 to 5, corrected, and Papyan et al. (2020).

    NC4 compares with the means of these samples, and averages over classes.
    """
    n, mean, scatter = class_scatter(h_ND, y_N, len(w_CD), ignore_index)
    seen = [c for c in range(len(w_CD)) if n[c] > 0]
    s = len(seen)
    mu_g = sum(mean[c] for c in seen) / s
    d, w = [mean[c] - mu_g for c in seen], [w_CD[c] for c in seen]
    within = sum(scatter[c] / n[c] for c in seen) / s
    between = sum(np.outer(x, x) for x in d) / s
    found = {"nc1_trace": float(np.trace(within) / np.trace(between))}
    # The rank is at most s - 1; what is left of the other eigenvalues is rounding, here below 1e-10 of the largest.
    found["nc1_pinv"] = float(np.trace(within @ np.linalg.pinv(between, rcond=1e-10, hermitian=True)) / s)
    for suffix, vectors in (("", d), ("_classifier", w)):
        norms = [float(np.linalg.norm(x)) for x in vectors]
        found["nc2_norms" + suffix] = float(np.std(norms) / np.mean(norms))
        cosines = [float(vectors[i] @ vectors[j]) / (norms[i] * norms[j]) for i in range(s) for j in range(s) if i != j]
        found["nc2_angles" + suffix] = float(np.mean([abs(cos + 1 / (s - 1)) for cos in cosines]))
    big_w, big_d = np.array(w), np.array(d)
    found["nc3"] = float(np.linalg.norm(big_w / np.linalg.norm(big_w) - big_d / np.linalg.norm(big_d)))
    found["alignment"] = float(np.mean([alignment(w_CD, mean, n > 0)[c] for c in seen]))
    if logits_NC is not None:
        q_NC = label_weights(h_ND, y_N, len(w_CD), ignore_index)
        shares = []
        for c in seen:
            agree = []
            for i in range(len(h_ND)):
                if q_NC[i, c] > 0:
                    nearest = min(seen, key=lambda k: float(np.linalg.norm(h_ND[i] - mean[k])))
                    agree.append(nearest == max(seen, key=lambda k: logits_NC[i, k]))
            shares.append(np.mean(agree))
        found["nc4"] = float(np.mean(shares))
    return found


def simplex_gram(num_classes: int) -> Array:
    """Return the cosines of a simplex equiangular tight frame, 1 and -1 / (C - 1) (Eq. 3)."""
    out = np.ones((num_classes, num_classes))
    for c in range(num_classes):
        for k in range(num_classes):
            if k != c:
                out[c, k] = -1.0 / (num_classes - 1)
    return out


def pairwise_error_exponents(mean_CD: Array, w_CD: Array, b_C: Array) -> Array:
    """Lemmas 1 and 2, corrected: half the squared distance from mu_c to where class k scores at least as high."""
    out = np.full((len(mean_CD), len(mean_CD)), math.inf)
    for c, mu in enumerate(mean_CD):
        for k in range(len(mean_CD)):
            v, margin = w_CD[c] - w_CD[k], w_CD[c] @ mu + b_C[c] - w_CD[k] @ mu - b_C[k]
            if k == c:
                continue
            if margin <= 0:  # z = 0 is an error already
                out[c, k] = 0.0
            elif v @ v > 0:
                z = -margin / (v @ v) * v  # of all z with v'(mu + z) + b_c - b_k <= 0 the shortest
                out[c, k] = 0.5 * z @ z
    return out
