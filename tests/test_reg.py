"""SpARegLoss: value and gradients of Eq. 15 through the tracker, which it feeds once per call."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import FIXED, HEADS, make_batch, make_problem, same_state, state_of, to_numpy
from torch import Tensor, nn

import spalign
from spalign import theory
from spalign.reg import Align

C, D = 5, 6
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
# float32 maths on O(1) values; weight norm and the centre add a few roundings.
SINGLE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-6}
every_head = pytest.mark.parametrize("kind", HEADS)


def expected(
    w: Tensor, batches: list[tuple[Tensor, Tensor]], momentum: float | None = 0.1
) -> tuple[float, reference.Array, reference.Array]:
    """Return loss and gradients by rows and by the last batch's features, from the loops of reference.py."""
    mean, weight = np.zeros((C, D)), np.zeros(C)
    rates = np.zeros(C)
    for h, y in batches:
        _, count = reference.class_statistics(to_numpy(h), y.numpy(), C)
        rates = reference.update_rates(weight, count, momentum)
        mean, weight = reference.update_class_means(mean, weight, to_numpy(h), y.numpy(), momentum)
    nw, seen = to_numpy(w), weight > 0
    by_mean = reference.alignment_loss_grad_mean(nw, mean, seen)
    by_h = np.stack([rates[c] * by_mean[c] for c in batches[-1][1].numpy()])
    return reference.alignment_loss(nw, mean, seen), reference.alignment_loss_grad_weight(nw, mean, seen), by_h


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return [make_batch(s, 12, C - 1, D, dtype) for s in range(3)]


@pytest.mark.parametrize("align", ["both", "classifier", "features"])
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_value_and_gradients_equal_the_reference(align: Align, momentum: float | None) -> None:
    w = make_problem(1, num_classes=C, dim=D).w
    p = nn.Parameter(w.clone())
    tracker = spalign.ClassMeanTracker(C, D, momentum=momentum).double()
    spareg = spalign.SpARegLoss(p, tracker, align=align)
    *before, (h, y) = batches()
    for a, b in before:
        spareg(a, b)
    h.requires_grad_()
    loss = spareg(h, y)
    by_w, by_h = torch.autograd.grad(loss, (p, h), allow_unused=True)
    want, want_w, want_h = expected(w, [*before, (h, y)], momentum)
    np.testing.assert_allclose(loss.item(), want, **TIGHT)
    if align == "features":
        assert by_w is None
    else:
        np.testing.assert_allclose(to_numpy(by_w), want_w, **TIGHT)
    if align == "classifier":
        assert by_h is None
    else:
        np.testing.assert_allclose(to_numpy(by_h), want_h, **TIGHT)


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kind_of_classifier(kind: str, dtype: torch.dtype) -> None:
    """The gradient by the parameters is that by the rows, pulled back by autograd through what the head does."""
    w = make_problem(1, num_classes=C, dim=D).w.to(dtype)
    head = HEADS[kind](w)
    spareg = spalign.SpARegLoss(head.classifier)
    data = batches(dtype)
    for a, b in data[:-1]:
        spareg(a, b)
    h, y = data[-1][0].requires_grad_(), data[-1][1]
    loss = spareg(h, y)
    want, want_rows, want_h = expected(w, data)
    assert loss.dtype == dtype
    np.testing.assert_allclose(loss.item(), want, **SINGLE)  # the tracker is float32 either way
    grads = torch.autograd.grad(loss, [*head.parameters, h])
    np.testing.assert_allclose(to_numpy(grads[-1]), want_h, **SINGLE)
    eye = torch.eye(D, dtype=dtype)
    # logits(eye) are the columns of the rows: a scalar whose gradient by the rows is want_rows.
    by_hand = (head.logits(eye).t() * torch.from_numpy(want_rows).to(dtype)).sum()
    for got, want_p in zip(grads[:-1], torch.autograd.grad(by_hand, head.parameters), strict=True):
        torch.testing.assert_close(got, want_p, **SINGLE)


@pytest.mark.parametrize("kind", FIXED)
def test_fixed_classifiers_receive_nothing_and_features_everything(kind: str) -> None:
    w = make_problem(1, num_classes=C, dim=D).w.float()
    classifier = FIXED[kind](w)
    spareg = spalign.SpARegLoss(classifier)
    data = batches(torch.float32)
    h, y = data[0][0].requires_grad_(), data[0][1]
    spareg(h, y).backward()
    assert h.grad is not None
    np.testing.assert_allclose(to_numpy(h.grad), expected(w, data[:1])[2], **SINGLE)
    rows = spalign.Classifier.of(classifier)._weight()
    assert rows.grad is None
    assert torch.equal(rows, w)


def test_etf_classifier_learns_features() -> None:
    """ETF-DR: the classifier is a fixed simplex; the term alone turns the encoder's class means onto it."""
    etf = theory.simplex_etf(4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    encoder = nn.Linear(5, 8)
    spareg = spalign.SpARegLoss(etf, align="features")
    x, y = make_batch(1, 64, 4, 5)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = spareg(encoder(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_registers_nothing_but_the_tracker() -> None:
    spareg = spalign.SpARegLoss(nn.Linear(D, C))
    assert isinstance(spareg, nn.Module)
    assert list(spareg.parameters()) == []
    assert set(spareg.state_dict()) == {f"tracker.{k}" for k in spareg.tracker.state_dict()}
    assert "weight" not in spareg.state_dict()


def test_default_tracker_fits_the_classifier_and_a_given_one_is_shared() -> None:
    fc = nn.Linear(D, C)
    assert spalign.SpARegLoss(fc).tracker.mean.shape == (C, D)
    tracker = spalign.ClassMeanTracker(C, D)
    assert spalign.SpARegLoss(fc, tracker).tracker is tracker


def test_forward_feeds_the_tracker_exactly_once_and_forward_without_a_batch_only_reads() -> None:
    spareg, twin = spalign.SpARegLoss(nn.Linear(D, C)), spalign.ClassMeanTracker(C, D)
    h, y = make_batch(1, 12, C, D)
    loss = spareg(h, y)
    twin.update(h, y)
    assert same_state(spareg.tracker, state_of(twin))
    assert torch.equal(spareg(), loss)
    assert same_state(spareg.tracker, state_of(twin))


def test_reading_gives_the_classifier_its_gradient() -> None:
    fc = nn.Linear(D, C)
    spareg = spalign.SpARegLoss(fc)
    spareg.tracker.update(*make_batch(1, 12, C, D))
    assert torch.autograd.grad(spareg(), fc.weight)[0].any()


def test_evaluation_mode_does_not_update() -> None:
    spareg = spalign.SpARegLoss(nn.Linear(D, C))
    spareg(*make_batch(1, 12, C, D))
    spareg.eval()
    before = state_of(spareg)
    h, y = make_batch(2, 12, C, D)
    loss = spareg(h, y)
    assert same_state(spareg, before)
    assert torch.equal(loss, spareg())


def test_two_losses_on_one_tracker_are_one_update_and_one_read() -> None:
    """Ownership: one feeds, the other only reads, and both see the same means."""
    tracker = spalign.ClassMeanTracker(C, D)
    a, b = nn.Linear(D, C), nn.Linear(D, C)
    feeding, reading = spalign.SpARegLoss(a, tracker), spalign.SpARegLoss(b, tracker)
    h, y = make_batch(1, 12, C, D)
    (feeding(h, y) + reading()).backward()
    assert tracker.weight.sum() == 12
    assert a.weight.grad is not None
    assert b.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_of_features_and_weight(dtype: torch.dtype) -> None:
    fc = nn.Linear(D, C, bias=False).to(dtype)
    spareg = spalign.SpARegLoss(fc)
    h, y = make_batch(1, 12, C, D, dtype)
    loss = spareg(h.requires_grad_(), y)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want, want_w, want_h = expected(fc.weight, [(h, y)])
    by_w, by_h = torch.autograd.grad(loss, (fc.weight, h))
    assert (by_w.dtype, by_h.dtype) == (dtype, dtype)
    eps = torch.finfo(dtype).eps  # the gradients are rounded to the dtype of their inputs
    np.testing.assert_allclose(loss.item(), want, **SINGLE)
    np.testing.assert_allclose(to_numpy(by_w), want_w, rtol=SINGLE["rtol"] + eps, atol=SINGLE["atol"] + eps * 1e-2)
    np.testing.assert_allclose(to_numpy(by_h), want_h, rtol=SINGLE["rtol"] + eps, atol=SINGLE["atol"] + eps * 1e-2)


def test_dense_prediction_equals_its_flat_form() -> None:
    conv, fc = HEADS["conv1x1"], HEADS["linear"]
    w = make_problem(1, num_classes=C, dim=D).w.float()
    h, y = make_batch(1, 24, C, D)
    dense_h = h.reshape(2, 3, 4, D).permute(0, 3, 1, 2).contiguous().requires_grad_()
    dense = spalign.SpARegLoss(conv(w).classifier)(dense_h, y.reshape(2, 3, 4))
    flat = spalign.SpARegLoss(fc(w).classifier)(h.requires_grad_(), y)
    assert torch.equal(dense, flat)
    (by_dense,), (by_flat,) = torch.autograd.grad(dense, dense_h), torch.autograd.grad(flat, h)
    assert torch.equal(by_dense.permute(0, 2, 3, 1).reshape(24, D), by_flat)


def test_soft_labels_reach_the_features() -> None:
    """Against numerical differences of a float64 run from the same state."""
    w = make_problem(1, num_classes=C, dim=D).w
    q = torch.softmax(3 * torch.randn(7, C, dtype=torch.float64), 1)
    start = spalign.ClassMeanTracker(C, D).double()
    start.update(*make_batch(1, 12, C, D, torch.float64))
    state = copy.deepcopy(start.state_dict())

    def run(h: Tensor) -> Tensor:
        start.load_state_dict(state)
        out: Tensor = spalign.SpARegLoss(w, start)(h, q)
        return out

    h = make_batch(2, 7, C, D, torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(run, h)


def test_autocast_changes_no_bit() -> None:
    fc = nn.Linear(D, C)
    h, y = make_batch(1, 12, C, D)
    plain = spalign.SpARegLoss(fc)(h, y)
    with torch.autocast("cpu", torch.bfloat16):
        cast = spalign.SpARegLoss(fc)(h, y)
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)


def test_copies_carry_the_classifier_and_the_state() -> None:
    spareg = spalign.SpARegLoss(nn.Linear(D, C))
    spareg(*make_batch(1, 12, C, D))
    value = spareg()
    for other in (copy.deepcopy(spareg), pickle.loads(pickle.dumps(spareg))):
        assert torch.equal(other(), value)
        other(*make_batch(2, 12, C, D))
        assert torch.equal(spareg(), value)
    both = copy.deepcopy(nn.ModuleDict({"fc": spareg.classifier.module, "spareg": spareg}))  # type: ignore[dict-item]
    copied = both["spareg"]
    assert isinstance(copied, spalign.SpARegLoss)
    assert copied.classifier.module is both["fc"]


def test_conversion_of_the_loss_leaves_the_classifier_alone() -> None:
    fc = nn.Linear(D, C)
    spareg = spalign.SpARegLoss(fc).half()
    assert fc.weight.dtype == torch.float32
    assert spareg.tracker.mean.dtype == torch.float32


def test_training_with_the_term_aligns_more_than_without() -> None:
    """The point of it all, in 40 steps."""
    x, y = make_batch(1, 64, C, D)
    cosines = []
    for lam in (0.0, 1.0):
        torch.manual_seed(3)
        fc = nn.Linear(D, C)
        tracker = spalign.ClassMeanTracker.for_classifier(fc)
        spareg = spalign.SpARegLoss(fc, tracker)
        optimizer = torch.optim.SGD(fc.parameters(), lr=0.1, momentum=0.9)
        for _ in range(40):
            optimizer.zero_grad()
            (nn.functional.cross_entropy(fc(x), y) + lam * spareg(x, y)).backward()
            optimizer.step()
        cosines.append(spalign.functional.alignment(fc.weight, tracker.mean, tracker.seen).mean().item())
    assert cosines[1] > cosines[0] + 0.01
