"""Random calls, right and wrong: each does what the float64 reference says, or raises ValueError and changes nothing.

A world is a classifier of some kind with tracker, loss, rotation and projection; calls are drawn at random, as are
their shapes, dtypes, labels, values and layouts. What is right is decided here, by the few lines of :func:`is_batch`
and :func:`has_labels`: a right call must not raise, a wrong one must. Before each call the reference starts from the
state the objects hold, so that its tolerance is that of one call. Reproduce a failure by its seed: the message names
the world and the call.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import FIXED, HEADS, Head, same_state, state_of, to_bools, to_numpy
from reference import Array, Bools
from torch import Tensor

import spalign
from spalign import functional as F
from spalign import host

WORLDS, CALLS = 75, 50
# The update where the host can read the batch, of few elements and of many, and that of every other device.
WAYS = ("few", "many", "general")
SEED = 20261124

FLOATS = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint64]
NO_FEATURES = [torch.int64, torch.bool, torch.complex64]
NO_TARGETS = [torch.bool, torch.complex64]
# From below float32's smallest normal number to above its largest; squares overflow from 1e19, float16 from 1e5.
SCALES = [1.0, 1.0, 1.0, 1.0, 1e-3, 1e3, 1e-42, 1e-25, 1e12, 1e30, 1e300]
SPATIAL: list[tuple[int, ...]] = [(), (), (), (), (2,), (2, 3), (1, 1), (0,)]

# Roundings of the maths that add up in one call: sums over at most 24 samples, dots over at most 7 entries.
ROUNDINGS = 64


def is_batch(h: Tensor, y: Tensor, c: int, d: int) -> bool:
    """Return whether shapes and dtypes are those of the contract."""
    if h.ndim < 2 or h.shape[1] != d or h.dtype not in FLOATS or y.dtype in NO_TARGETS:
        return False
    n, spatial = h.shape[0], tuple(h.shape[2:])
    return tuple(y.shape) == ((n, c, *spatial) if y.dtype in FLOATS else (n, *spatial))


def has_labels(y: Tensor, c: int, ignored: int) -> bool:
    """Return whether no label is out of range and no weight is negative."""
    values = y.detach().double().flatten().tolist() if y.dtype in FLOATS else y.flatten().tolist()
    return not any(v < 0 if y.dtype in FLOATS else v != ignored and not 0 <= v < c for v in values)


def as_rows(x: Tensor, dtype: torch.dtype) -> Array:
    """Return (N, K) float64 of (N, K, ...), rounded to the dtype of the maths."""
    flat = np.moveaxis(to_numpy(x.detach().to(dtype).resolve_neg()), 1, -1)
    return flat.reshape(int(np.prod(flat.shape[:-1])), flat.shape[-1])


class Expected:
    """What a batch does to a state, by the reference."""

    def __init__(self, tracker: spalign.ClassMeanTracker, h: Tensor, y: Tensor) -> None:
        dtype = tracker.mean.dtype
        self.eps, self.smallest = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
        mean, weight = to_numpy(tracker.mean), to_numpy(tracker.weight)
        h_ND = as_rows(h, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            squared_N = (h_ND * h_ND).sum(1)
            # Rows that no direction could be computed of count as not finite.
            h_ND[~(squared_N <= torch.finfo(dtype).max)] = np.nan
            if y.is_floating_point():
                targets: Any = as_rows(y, dtype)
                targets[targets < torch.finfo(dtype).tiny / self.eps] = 0.0  # too little to divide by
                # Nor may the weighted row.
                total_N = targets.sum(1)
                h_ND[~(total_N * total_N * squared_N <= torch.finfo(dtype).max)] = np.nan
                targets[~(total_N * total_N <= torch.finfo(dtype).max)] = np.nan
            else:
                targets = np.array(y.flatten().tolist(), dtype=object)
        self.q_NC = reference.label_weights(h_ND, targets, len(mean), tracker.ignore_index)
        self.mean, self.weight = reference.update_class_means(
            mean, weight, h_ND, targets, tracker.momentum, tracker.ignore_index
        )
        self.batch_C = self.q_NC.sum(0)
        self.rate_C = reference.update_rates(weight, self.batch_C, tracker.momentum)
        self.before = mean
        usable = np.where((self.q_NC > 0).any(1, keepdims=True), h_ND, 0.0)
        self.scale = max(1e-300, np.abs(mean).max(), np.abs(usable).max(initial=0.0))
        self.sums = self.q_NC.T @ usable

    def check(self, mean: Tensor, weight: Tensor) -> None:
        """Compare a state."""
        got = to_numpy(mean)
        np.testing.assert_allclose(got, self.mean, rtol=0, atol=ROUNDINGS * (self.eps * self.scale + self.smallest))
        np.testing.assert_allclose(to_numpy(weight), self.weight, rtol=ROUNDINGS * self.eps)
        absent = self.batch_C == 0
        assert np.array_equal(got[absent], self.before[absent]), "a class that is not in the batch moved"

    def pulled_back(self, grad_CD: Array) -> Array:
        """Return the gradient by the features (N, D), flattened."""
        return np.asarray((self.q_NC * self.rate_C) @ grad_CD, dtype=np.float64)


class Rows:
    """Rows against centred means, float64, with how much their roundings are magnified."""

    def __init__(self, w: Array, mean: Array, seen: Bools) -> None:
        self.w, self.mean, self.seen = w, mean, seen
        center = reference.global_mean(mean, seen)
        d, r = np.linalg.norm(mean - center, axis=1), np.linalg.norm(w, axis=1)
        self.length = r
        self.cos = reference.alignment(w, mean, seen)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            # Subtracting the centre leaves the rounding of what is subtracted.
            self.magnified = np.where(seen, (d + np.abs(mean).max(initial=0) * len(w)) / d, 1.0)
            self.sine = np.sqrt(np.clip(1 - self.cos**2, 0, None))
        # Which of these count as zero is a matter of rounding, or of the range of float32; both have their own tests.
        self.clear_C = (self.magnified < 1e3) & ((d > 1e-15) | ~seen) & ((r > 1e-15) | (r == 0))

    @property
    def clear(self) -> bool:
        """Whether nothing about the problem hangs on a rounding."""
        return bool(self.clear_C.all())


class World:
    """A classifier of some kind and all that reads or feeds its tracker."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.c, self.d = int(rng.integers(1, 7)), int(rng.integers(1, 8))
        dtype = self.pick(FLOATS)
        rows = torch.from_numpy(rng.normal(size=(self.c, self.d))).to(dtype)
        trainable = bool(rng.random() < 0.75)
        kind = self.pick(list(HEADS if trainable else FIXED))
        if "weight_norm" not in kind and rng.random() < 0.2:
            rows[0] = 0.0
        self.head: Head | None = HEADS[kind](rows) if trainable else None
        classifier = self.head.classifier if self.head is not None else FIXED[kind](rows)
        self.adapter = spalign.Classifier.of(classifier)
        self.tracker = spalign.ClassMeanTracker(
            self.c,
            self.d,
            momentum=self.pick([None, 0.1, 1.0]),
            ignore_index=self.pick([-100, -100, 255, self.c - 1]),
        )
        if rng.random() < 0.2:
            self.tracker.double()
        align = self.pick(["both", "features", "classifier"] if trainable else ["both", "features"])
        self.spareg = spalign.SpARegLoss(classifier, self.tracker, align=align)
        self.parameters = self.head.parameters if self.head is not None else []
        self.gamma, self.radial = float(rng.random()), self.pick(["paper", "keep"])
        self.threshold = float(rng.uniform(-1, 1))
        if self.head is not None:
            self.slerp = spalign.SpASlerp(
                classifier, self.tracker, total_steps=3, alpha_max=0.3, threshold=self.threshold
            )
            inner = torch.optim.SGD(self.parameters, lr=0.0)
            self.optimizer = spalign.SpAProj(inner, classifier, self.tracker, gamma=self.gamma, radial=self.radial)
        self.largest = 0.0  # of the means since the sum over classes was last formed afresh

    def pick(self, options: list[Any]) -> Any:
        """Return one of a list."""
        return options[int(self.rng.integers(len(options)))]

    def chance(self, p: float) -> bool:
        """Return True with probability p."""
        return bool(self.rng.random() < p)

    # ------------------------------------------------------------------------------------------------------------------
    # Inputs
    # ------------------------------------------------------------------------------------------------------------------

    def batch(self, wrong: float = 0.15) -> tuple[Tensor, Tensor]:
        """Return features and targets, some of them wrong in shape, dtype or content."""
        n, spatial = int(self.rng.integers(0, 13)), self.pick(SPATIAL)
        soft = self.chance(0.3)
        h_shape: list[int] = [n, self.d, *spatial]
        y_shape: list[int] = [n, self.c, *spatial] if soft else [n, *spatial]
        if self.chance(wrong):
            shape = self.pick([h_shape, y_shape])
            for _ in range(int(self.rng.integers(1, 3))):
                at = int(self.rng.integers(0, len(shape) + 1))
                change = self.pick(["insert", "remove", "resize", "swap"])
                if change == "insert":
                    shape.insert(at, int(self.rng.integers(0, 4)))
                elif shape and change == "remove":
                    shape.pop(at - 1)
                elif shape and change == "resize":
                    shape[at - 1] = int(self.rng.integers(0, 8))
                elif shape:
                    shape.reverse()
        h_dtype = self.pick(NO_FEATURES) if self.chance(wrong / 3) else self.pick(FLOATS)
        y_dtype = self.pick(NO_TARGETS) if self.chance(wrong / 3) else self.pick(FLOATS if soft else INTEGERS)
        return self.features(tuple(h_shape), h_dtype), self.targets(tuple(y_shape), y_dtype, wrong)

    def features(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return features of any size, some not finite, in any layout, with or without gradient."""
        x = self.rng.normal(size=shape) + self.rng.normal()
        if self.chance(0.5):
            x = x * self.pick(SCALES)
        elif len(shape) and self.chance(0.3):  # each sample of another size
            scales = [self.pick(SCALES) for _ in range(shape[0])]
            x = x * np.array(scales).reshape(-1, *[1] * (len(shape) - 1))
        x = np.asarray(x)
        if x.size and self.chance(0.3):
            for _ in range(int(self.rng.integers(1, 4))):
                x.flat[int(self.rng.integers(x.size))] = self.pick([np.nan, np.inf, -np.inf, 0.0, 3e38])
        h = torch.from_numpy(x).to(dtype)
        h = self.layout(h)
        if dtype in FLOATS and self.chance(0.5):
            h = h.requires_grad_() if self.chance(0.5) else h.detach().requires_grad_() * 1.0
        return h

    def layout(self, x: Tensor) -> Tensor:
        """Return the same values, or a repetition of the first ones, laid out in some other way."""
        way = self.pick(["plain"] * 4 + ["transposed", "strided", "expanded", "negated"])
        if way == "transposed" and x.ndim >= 2:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if way == "strided" and x.ndim >= 1:
            return torch.stack([x, x], -1)[..., 0]
        if way == "expanded" and x.ndim >= 1 and x.shape[0] > 0:
            return x[:1].expand(x.shape)
        if way == "negated" and x.is_floating_point():
            view: Tensor = torch._neg_view(-x)
            return view
        return x

    def targets(self, shape: tuple[int, ...], dtype: torch.dtype, wrong: float) -> Tensor:
        """Return labels or soft labels, most of them right."""
        if dtype in FLOATS:
            return self.layout(torch.from_numpy(self.soft_labels(shape, wrong)).to(dtype))
        y = self.rng.integers(0, self.c, size=shape)
        if dtype in NO_TARGETS:
            return torch.from_numpy(np.asarray(y)).to(dtype)
        limits = torch.iinfo(dtype)
        odd = [self.tracker.ignore_index]
        if self.chance(wrong):
            odd += [-1, -7, self.c, self.c + 3, 127, 255, -100, limits.min, limits.max]
        values = np.asarray(y).astype(object)
        if values.size and self.chance(0.4):
            for _ in range(int(self.rng.integers(1, 4))):
                values.flat[int(self.rng.integers(values.size))] = self.pick(odd)
        if self.chance(0.05):
            values[...] = self.tracker.ignore_index
        # Labels that the type cannot hold would be other labels.
        fits = [v if limits.min <= v <= limits.max else 0 for v in values.flatten().tolist()]
        numpy_dtype = str(dtype).removeprefix("torch.")
        return self.layout(torch.from_numpy(np.array(fits, dtype=numpy_dtype).reshape(shape)))

    def soft_labels(self, shape: tuple[int, ...], wrong: float) -> Array:
        """Return softmaxes, smoothed and mixed labels, counts; rows of zeros, uniform, not finite; some negative."""
        q = np.asarray(self.rng.random(shape))
        if len(shape) < 2 or q.size == 0:
            return q
        q = np.moveaxis(q, 1, -1)
        one_hot = np.eye(shape[1])[self.rng.integers(0, shape[1], size=q.shape[:-1])]
        other = np.eye(shape[1])[self.rng.integers(0, shape[1], size=q.shape[:-1])]
        kind = self.pick(["softmax", "smoothed", "mixed", "counts", "peaked"])
        if kind == "softmax":
            q = np.exp(3 * q) / np.exp(3 * q).sum(-1, keepdims=True)
        elif kind == "smoothed":
            q = 0.8 * one_hot + 0.2 / shape[1]
        elif kind == "mixed":
            q = 0.25 * one_hot + 0.75 * other
        elif kind == "counts":
            q = np.floor(q * 4)
        else:
            q = one_hot + self.pick([1e-3, 1e-42, 1e-300]) * other
        flat = q.reshape(-1, shape[1])
        for _ in range(int(self.rng.integers(0, 4))):
            row = self.pick([0.0, 1 / 4, np.nan, np.inf, 1e-42, 1e12, 1e30, 1e300])
            at = int(self.rng.integers(len(flat)))
            if self.chance(0.5):
                flat[at] = row
            else:
                flat[at, int(self.rng.integers(shape[1]))] = row
        if self.chance(wrong):
            flat[int(self.rng.integers(len(flat))), 0] = self.pick([-1.0, -1e-3, -np.inf, -0.0])
        return np.moveaxis(q, -1, 1)

    @contextlib.contextmanager
    def surroundings(self) -> Any:
        """Autocast or not, gradients or not."""
        with contextlib.ExitStack() as stack:
            if self.chance(0.3):
                stack.enter_context(torch.autocast("cpu", self.pick([torch.bfloat16, torch.float16])))
            if self.chance(0.1):
                stack.enter_context(self.pick([torch.no_grad, torch.inference_mode])())
            yield

    # ------------------------------------------------------------------------------------------------------------------
    # Calls
    # ------------------------------------------------------------------------------------------------------------------

    def feed(self, call: Callable[[Tensor, Tensor], Tensor | None], updates: bool) -> str:
        """Make a call that takes a batch, and compare all it does."""
        h, y = self.batch()
        right = is_batch(h, y, self.c, self.d) and has_labels(y, self.c, self.tracker.ignore_index)
        state, weights = state_of(self.tracker), [p.detach().clone() for p in self.parameters]
        refusal = ""
        try:
            with self.surroundings():
                out = call(h, y)
        except ValueError as error:
            refusal = str(error)
        if refusal:
            assert not right, f"refused a right batch: {refusal}"
            assert "expected" in refusal
            assert same_state(self.tracker, state)
            assert all(torch.equal(p, w) for p, w in zip(self.parameters, weights, strict=True))
            return "refused"
        assert right, f"took features {tuple(h.shape)} {h.dtype} with targets {tuple(y.shape)} {y.dtype}"
        if updates:
            old = spalign.ClassMeanTracker(
                self.c, self.d, momentum=self.tracker.momentum, ignore_index=self.tracker.ignore_index
            ).to(self.tracker.mean.dtype)
            old.load_state_dict(state)
            want = Expected(old, h, y)
            want.check(self.tracker.mean, self.tracker.weight)
        else:
            want = None
            assert same_state(self.tracker, state)
        assert all(torch.equal(p, w) for p, w in zip(self.parameters, weights, strict=True))
        if out is not None and out.ndim == 2:
            self.check_means(out, h, want)
        elif out is not None:
            self.check_loss(out, h, want)
        return "done"

    def update(self) -> str:
        """ClassMeanTracker.update."""
        return self.feed(self.tracker.update, True)

    def forward(self) -> str:
        """ClassMeanTracker.forward."""
        return self.feed(self.tracker, self.tracker.training)

    def loss(self) -> str:
        """SpARegLoss.forward with a batch."""
        return self.feed(self.spareg, self.spareg.training)

    def read(self) -> str:
        """SpARegLoss.forward without one, and what else reads."""
        state = state_of(self.tracker)
        with self.surroundings():
            loss = self.spareg()
        self.check_loss(loss, None, None)
        assert same_state(self.tracker, state)
        assert torch.isfinite(self.tracker.directions()).all()
        assert torch.isfinite(self.tracker.center).all()
        return "done"

    def check_means(self, out: Tensor, h: Tensor, want: Expected | None) -> None:
        """Compare the result of the tracker's forward pass, and its gradient."""
        assert torch.equal(out, self.tracker.mean)
        if not out.requires_grad:
            return
        assert want is not None
        grad_CD = torch.from_numpy(self.rng.normal(size=out.shape)).to(out.dtype)
        (by_h,) = torch.autograd.grad(out, h, grad_CD)
        assert (by_h.shape, by_h.dtype) == (h.shape, h.dtype)
        got, exact = as_rows(by_h, torch.float64), want.pulled_back(to_numpy(grad_CD))
        if np.abs(exact).max(initial=0.0) <= torch.finfo(h.dtype).max:
            eps = ROUNDINGS * want.eps + torch.finfo(h.dtype).eps
            smallest = torch.finfo(h.dtype).tiny
            np.testing.assert_allclose(got, exact, rtol=eps, atol=eps * np.abs(exact).max(initial=0.0) + smallest)

    def geometry(self) -> tuple[Rows, float]:
        """Return the problem as it stands, and the rounding of its maths."""
        rows = to_numpy(self.adapter.rows())
        dtype = torch.float64 if torch.float64 in (self.tracker.mean.dtype, self.adapter.rows().dtype) else None
        # A tracker of float32 centres in float32, whatever the classifier.
        eps = torch.finfo(self.tracker.mean.dtype if dtype else torch.float32).eps
        return Rows(rows, to_numpy(self.tracker.mean), to_bools(self.tracker.seen)), eps

    def check_loss(self, loss: Tensor, h: Tensor | None, want: Expected | None) -> None:
        """Compare a loss with Eq. 15 at the state it left, and its gradients."""
        assert loss.ndim == 0
        assert torch.isfinite(loss)
        assert -1e-5 <= loss <= 2 + 1e-5  # a rounding of a cosine
        p, eps = self.geometry()
        tolerance = ROUNDINGS * eps * float(np.where(p.clear_C, p.magnified, 1).max(initial=1))
        clear = p.clear and self.largest * eps * ROUNDINGS < 1e-3 * self.nearest(p)
        if clear:
            np.testing.assert_allclose(loss.item(), reference.alignment_loss(p.w, p.mean, p.seen), atol=tolerance)
        if not loss.requires_grad:
            return
        leaves: list[Tensor] = [*self.parameters, *([h] if h is not None and h.requires_grad else [])]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        by_h = grads[-1] if len(leaves) > len(self.parameters) else None
        for leaf, g in zip(leaves, grads, strict=True):
            # What features of fewer bits than the means cannot hold of a gradient is infinite, the loss scale's matter.
            narrow = leaf is h and h.dtype not in (torch.bfloat16, torch.float64, self.tracker.mean.dtype)
            assert g is None or narrow or leaf.dtype is torch.float16 or torch.isfinite(g).all()
        if self.spareg.align == "features":
            assert all(g is None for g in grads[: len(self.parameters)])
        if not clear:
            return
        if self.head is not None and self.spareg.align != "features" and len(self.parameters) == 1:
            assert grads[0] is not None
            got = to_numpy(self.adapter.as_rows(grads[0]))
            exact = reference.alignment_loss_grad_weight(p.w, p.mean, p.seen)
            self.close(got, exact, tolerance * float((1 / p.length[p.length > 0]).max(initial=0)), grads[0].dtype)
        if by_h is not None and want is not None and self.spareg.align != "classifier" and h is not None:
            exact = want.pulled_back(reference.alignment_loss_grad_mean(p.w, p.mean, p.seen))
            size = want.pulled_back(np.ones_like(p.mean)).max(initial=0.0) / self.nearest(p)
            self.close(as_rows(by_h, torch.float64), exact, tolerance * size, h.dtype)

    def nearest(self, p: Rows) -> float:
        """Return the least distance of a class mean from the centre, 0 where there is none."""
        center = reference.global_mean(p.mean, p.seen)
        return float(np.linalg.norm(p.mean[p.seen] - center, axis=1).min(initial=np.inf)) if p.seen.any() else np.inf

    def close(self, got: Array, exact: Array, tolerance: float, dtype: torch.dtype) -> None:
        """Compare gradients, unless their type cannot hold them."""
        largest = np.abs(exact).max(initial=0.0)
        if largest <= torch.finfo(dtype).max:
            tolerance += torch.finfo(dtype).eps * largest + torch.finfo(dtype).tiny
            np.testing.assert_allclose(got, exact, rtol=0, atol=tolerance)

    def rotate(self) -> str:
        """SpASlerp.step, and the functional at the same state."""
        if self.head is None:
            return "not there"
        p, eps = self.geometry()
        state, before = state_of(self.tracker), self.head.rows()
        t = self.slerp.last_step + 1
        self.slerp.step()
        assert same_state(self.tracker, state)
        assert self.slerp.last_step == t
        after = self.head.rows()
        assert torch.isfinite(after).all()
        dtype = self.parameters[0].dtype
        # Weight norm adds a few roundings of its dtype, on top of the rotation's one.
        tolerance = 8 * torch.finfo(dtype).eps + ROUNDINGS * eps
        r = np.linalg.norm(p.w, axis=1)
        np.testing.assert_allclose(np.linalg.norm(to_numpy(after), axis=1), r, rtol=tolerance)
        want = reference.slerp(p.w, p.mean, p.seen, reference.cosine_schedule(t, 3, 0.3), self.threshold)
        error = np.linalg.norm(to_numpy(after) - want, axis=1)
        sharp = p.clear_C & (np.abs(p.cos - self.threshold) > 1e-2) & (p.sine > 1e-2)
        if self.largest * eps * ROUNDINGS < 1e-3 * self.nearest(p):
            assert (error <= r * (tolerance + ROUNDINGS * eps * p.magnified / np.maximum(p.sine, 1e-2)))[sharp].all()
        untouched = ~p.seen
        assert torch.equal(after[torch.from_numpy(untouched)], before[torch.from_numpy(untouched)])
        return "done"

    def project(self) -> str:
        """SpAProj.step, with gradients of any size and some that are not finite."""
        if self.head is None:
            return "not there"
        state, weights = state_of(self.tracker), [q.detach().clone() for q in self.parameters]
        for q in self.parameters:
            # With all gradients missing, a step does nothing.
            q.grad = None
        if self.chance(0.9):
            scale, bad = self.pick([1.0, 1e-4, 4096.0, 1e-30]), int(self.rng.integers(self.c))
            for q in self.parameters:
                q.grad = torch.from_numpy(self.rng.normal(size=q.shape) * scale).to(q.dtype)
            direction = self.adapter.leaves().direction
            assert direction.grad is not None
            spoiled = self.chance(0.2)
            if spoiled:
                self.adapter.as_rows(direction.grad)[bad, 0] = self.pick([math.nan, math.inf, -math.inf])
            raw = to_numpy(self.adapter.as_rows(direction.grad))
            self.optimizer.step()
            got = to_numpy(self.adapter.as_rows(direction.grad))
            kept = np.arange(self.c) != bad if spoiled else np.ones(self.c, dtype=bool)
            assert np.isfinite(got[kept]).all()
            assert np.isfinite(got[~kept]).all(1).sum() == 0
            if len(self.parameters) == 1:
                self.check_projected(got, raw, kept, direction.dtype)
        else:
            self.optimizer.step()
        assert same_state(self.tracker, state)
        for q, w in zip(self.parameters, weights, strict=True):
            # The learning rate is 0, and 0 * nan is nan: of the spoiled row only.
            same = (q.detach() == w) | (q.grad is not None and ~torch.isfinite(q.grad))
            assert bool(torch.as_tensor(same).all())
            with torch.no_grad():
                q.copy_(w)
            q.grad = None
        return "done"

    def check_projected(self, got: Array, raw: Array, kept: Bools, dtype: torch.dtype) -> None:
        """Compare with Eqs. 17 to 20, where no row hangs on a rounding."""
        p, eps = self.geometry()
        if not self.largest * eps * ROUNDINGS < 1e-3 * self.nearest(p):
            return
        got, raw = np.where(kept[:, None], got, 0.0), np.where(kept[:, None], raw, 0.0)
        want = reference.project_gradient(raw, p.w, p.mean, p.seen, self.gamma, self.radial)
        length, error = np.linalg.norm(raw, axis=1), np.linalg.norm(got - want, axis=1)
        rounding = ROUNDINGS * eps * p.magnified / np.maximum(p.sine, 1e-2) + 2 * torch.finfo(dtype).eps
        sharp = p.clear_C & kept & (p.sine > 1e-2)
        # Below its smallest normal number a float has no relative precision: of <g, d> / |d|^2 that leaves an error.
        smallest = torch.finfo(dtype).tiny * max(1.0, self.largest * torch.finfo(torch.float32).eps)
        assert (error <= length * rounding + 8 * smallest)[sharp].all()

    def functionals(self) -> str:
        """The pure functions, which take right shapes and labels of any value."""
        while True:
            h, y = self.batch(0.1)
            negative = y.dtype in FLOATS and not has_labels(y, self.c, -100)
            if is_batch(h, y, self.c, self.d) and h.ndim == 2 and not negative:
                break
        tracker = self.tracker
        state, want = state_of(tracker), Expected(tracker, h, y)
        with self.surroundings():
            mean, weight = F.update_class_means(
                tracker.mean, tracker.weight, h, y, momentum=tracker.momentum, ignore_index=tracker.ignore_index
            )
            sums, counts = F.class_statistics(h, y, self.c, ignore_index=tracker.ignore_index)
        want.check(mean, weight)
        if tracker.mean.dtype == (torch.float64 if h.dtype == torch.float64 else torch.float32):
            size = np.abs(want.sums).max(initial=0.0) + want.scale * want.batch_C.max(initial=0.0)
            np.testing.assert_allclose(
                to_numpy(sums), want.sums, rtol=0, atol=ROUNDINGS * (want.eps * size + want.smallest)
            )
            np.testing.assert_allclose(to_numpy(counts), want.batch_C, rtol=ROUNDINGS * want.eps)
        p, eps = self.geometry()
        arguments = (self.adapter.rows(), tracker.mean, tracker.seen)
        value, by_w = F.alignment_loss_and_grad(*arguments)
        assert torch.isfinite(value)
        assert by_w.dtype is torch.float16 or torch.isfinite(by_w).all()
        if p.clear:  # which does not depend on the running sum
            tolerance = ROUNDINGS * eps * float(p.magnified.max(initial=1))
            np.testing.assert_allclose(value.item(), reference.alignment_loss(p.w, p.mean, p.seen), atol=tolerance)
        assert torch.isfinite(F.slerp(*arguments, alpha=0.3, threshold=1.0).weight).all()
        assert torch.isfinite(F.project_gradient(torch.ones_like(arguments[0]), *arguments, gamma=0.2)).all()
        assert same_state(tracker, state)
        return "done"

    def mode(self) -> str:
        """Switch between training and evaluation."""
        self.spareg.train(not self.spareg.training)
        if not self.spareg.training:
            self.largest = 0.0
        return "done"

    def reset(self) -> str:
        """Forget every class."""
        self.tracker.reset()
        assert not any(b.any() for b in self.tracker.buffers())
        self.largest = 0.0
        return "done"

    def check_state(self) -> None:
        """Everything is finite, and the running sum is that of the means."""
        assert all(torch.isfinite(b).all() for b in self.tracker.buffers()), "the state is poisoned"
        assert all(torch.isfinite(p).all() for p in self.parameters), "the classifier is poisoned"
        assert not self.tracker.mean[~self.tracker.seen].any()
        mean = to_numpy(self.tracker.mean)
        self.largest = max(self.largest, np.abs(mean).max())
        # It is kept incrementally, so roundings of all that passed add up until it is formed afresh.
        bound = ROUNDINGS * CALLS * torch.finfo(self.tracker.mean.dtype).eps * self.largest
        np.testing.assert_allclose(to_numpy(self.tracker.mean_sum), mean.sum(0), rtol=0, atol=bound + 1e-300)


CHOICES: list[tuple[Callable[[World], str], float]] = [
    (World.update, 0.33),
    (World.forward, 0.15),
    (World.loss, 0.22),
    (World.read, 0.04),
    (World.rotate, 0.06),
    (World.project, 0.08),
    (World.functionals, 0.06),
    (World.mode, 0.05),
    (World.reset, 0.01),
]


def test_the_number_of_calls() -> None:
    """At least ten thousand."""
    assert len(WAYS) * WORLDS * CALLS >= 10_000


@pytest.mark.parametrize("way", WAYS)
def test_random_calls(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfalls C5, D2, D3, D4, D6, D8, D12: no crash, no poisoned state, no half update, whatever comes in."""
    if way == "many":
        monkeypatch.setattr(host, "_FEW", 0)
        monkeypatch.setattr(host, "_BLOCK", 8)
    elif way == "general":
        monkeypatch.setattr(host, "can_read", lambda features: False)
        monkeypatch.setattr(host, "can_align", lambda *_: False)
    weights = np.array([p for _, p in CHOICES])
    counts: Counter[str] = Counter()
    for number in range(WORLDS):
        seed = [SEED, WAYS.index(way), number]
        rng = np.random.default_rng(seed)
        world = World(rng)
        for call in range(CALLS):
            choice = CHOICES[int(rng.choice(len(CHOICES), p=weights / weights.sum()))][0]
            try:
                outcome = choice(world)
                world.check_state()
            except BaseException as error:
                error.add_note(f"seed {seed}, call {call}: {choice.__name__}") if hasattr(error, "add_note") else None
                print(f"seed {seed}, call {call}: {choice.__name__}")
                raise
            counts[f"{choice.__name__} {outcome}"] += 1
    # Both ends of every branch were there.
    assert sum(counts.values()) == WORLDS * CALLS
    for name in ("update", "forward", "loss"):
        assert min(counts[f"{name} done"], counts[f"{name} refused"]) > 50
    assert min(counts["rotate done"], counts["project done"], counts["functionals done"], counts["read done"]) > 50
