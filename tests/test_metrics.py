"""Neural collapse against the loops of reference.py: by functions, over any batches, and where numbers get hard.

C classes, D feature dimensions, N samples.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import make_batch, make_problem, rotation, to_numpy
from torch import Tensor, nn

import spalign
from spalign import metrics, theory
from spalign.metrics import NeuralCollapse, class_moments

C, D, N = 5, 8, 60

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"

# float64 against float64: some tens of terms in another order; the pseudo-inverse squares the condition of the means,
# which is some tens here.
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def problem(
    seed: int, n: int = N, num_classes: int = C, dim: int = D, dtype: torch.dtype = torch.float32
) -> tuple[nn.Linear, Tensor, Tensor]:
    """Return a head with a bias, and a long-tailed batch: class 0 has half of the samples, the last class none.

    The head is no stranger to the class means, so that it agrees with them on some samples.
    """
    h, y = make_batch(seed, n, num_classes, dim, dtype)
    y[::2] = 0
    y[y == num_classes - 1] = 1
    fc = nn.Linear(dim, num_classes)
    with torch.no_grad():
        fc.weight.copy_(make_problem(seed, num_classes=num_classes, dim=dim).w)
        for c in range(num_classes - 1):
            fc.weight[c] += 0.5 * h[y == c].float().mean(0)
    return fc, h, y


def tracked(fc: nn.Linear, h: Tensor, y: Tensor, ignore_index: int = -100) -> spalign.ClassMeanTracker:
    """Return the exact means of a first pass, in float64."""
    tracker = spalign.ClassMeanTracker.for_classifier(fc, momentum=None, ignore_index=ignore_index).double()
    tracker.update(h, y)
    return tracker


@torch.no_grad()
def logits_of(fc: nn.Linear, h: Tensor) -> Tensor:
    logits: Tensor = fc(h.float())
    return logits


def expect(found: dict[str, Tensor], want: dict[str, float], **tolerance: Any) -> None:
    """Every metric that was found is the reference's, and all of the reference's but ``nc1_pinv`` were found."""
    assert want.keys() - found.keys() <= {"nc1_pinv", "nc4"}
    for name, value in found.items():
        assert value.shape == ()
        assert value.dtype == torch.float64
        np.testing.assert_allclose(value.item(), want[name], err_msg=name, **{**TIGHT, **tolerance})


def reference_of(
    fc: nn.Linear, h: Tensor, y: Tensor, logits: Tensor | None = None, ignore_index: int = -100
) -> dict[str, float]:
    with np.errstate(invalid="ignore"):
        return reference.neural_collapse(
            to_numpy(h), y.numpy(), to_numpy(fc.weight), None if logits is None else to_numpy(logits), ignore_index
        )


# ----------------------------------------------------------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_classes", "dim"), [(5, 8), (12, 4), (3, 2)])
def test_random_problems_equal_the_reference(dtype: torch.dtype, num_classes: int, dim: int) -> None:
    """One class is unseen, one has half of the samples; more classes than dimensions, and fewer."""
    for seed in range(3):
        fc, h, y = problem(seed, 80, num_classes, dim, dtype)
        logits = logits_of(fc, h)
        collapse = NeuralCollapse(fc, tracked(fc, h, y), covariance=True)
        collapse.update(h, y, logits)
        found, want = collapse.compute(), reference_of(fc, h, y, logits)
        assert found.keys() == want.keys()
        expect(found, want)
        assert 0 < found["nc4"] < 1


def test_class_moments_equal_the_reference() -> None:
    _, h, y = problem(1)
    n, mean, scatter = reference.class_scatter(to_numpy(h), y.numpy(), C)
    full, traces = class_moments(h, y, C, covariance=True), class_moments(h, y, C)
    np.testing.assert_allclose(full.scatter, scatter, **TIGHT)
    np.testing.assert_allclose(traces.scatter, scatter.trace(axis1=1, axis2=2), **TIGHT)
    for moments in (full, traces):
        np.testing.assert_array_equal(moments.weight, n)
        np.testing.assert_allclose(moments.mean, mean, **TIGHT)
    assert metrics.nc1_trace(full).item() == pytest.approx(metrics.nc1_trace(traces).item(), rel=1e-12)


@pytest.mark.parametrize("dim", [3, 4, 7])
def test_collapsed_features_on_a_simplex_are_ideal(dim: int) -> None:
    """C - 1 = 3 dimensions are enough; an offset and scale of the features change nothing."""
    etf = theory.simplex_etf(4, dim, generator=torch.Generator().manual_seed(3))
    fc = nn.Linear(dim, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        fc.weight.copy_(2 * etf)
    y = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    h = 3 * etf[y] + 5
    collapse = NeuralCollapse(fc, tracked(fc, h, y), covariance=True)
    collapse.update(h, y, (h - 5) @ fc.weight.t())
    found = collapse.compute()
    ideal = dict.fromkeys(found, 0.0) | {"alignment": 1.0, "nc4": 1.0}
    expect(found, ideal, rtol=0.0, atol=1e-12)  # some hundred roundings of float64


def test_what_is_away_from_the_ideal_shows_in_its_metric_alone() -> None:
    """A longer mean shows in the norms, a turned classifier in NC3 and alignment, spread samples in NC1."""
    etf, y = theory.simplex_etf(4, 6, generator=torch.Generator().manual_seed(3)), torch.arange(4).repeat(2)
    turned = etf @ rotation(1, 6)
    spread = torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=torch.float64).unsqueeze(1) * rotation(2, 6)[:1]

    def measure(w: Tensor, h: Tensor) -> dict[str, float]:
        collapse = NeuralCollapse(w, covariance=True)
        collapse.update(h, y)
        return {k: v.item() for k, v in collapse.compute().items()}

    ideal = measure(etf, etf[y])
    for w, h, moved in (
        (turned, etf[y], {"nc3", "alignment"}),
        (etf, etf[y] + spread, {"nc1_trace", "nc1_pinv"}),
        (etf * torch.tensor([[1.0], [1.0], [1.0], [3.0]]), etf[y], {"nc2_norms_classifier", "nc3"}),
    ):
        now = measure(w, h)
        assert {k for k in now if abs(now[k] - ideal[k]) > 1e-5} == moved


def test_repeating_the_samples_of_a_class_changes_nothing() -> None:
    """Class-balanced, as Eq. 2 is once corrected; the plain mean over samples would move."""
    fc, h, y = problem(2)
    again = torch.cat([torch.arange(N), *[(y == 2).nonzero()[:, 0]] * 5])
    tracker = tracked(fc, h, y)
    found = []
    for index in (torch.arange(N), again):
        collapse = NeuralCollapse(fc, tracker, covariance=True)
        collapse.update(h[index], y[index], logits_of(fc, h[index]))
        found.append(collapse.compute())
    expect(found[1], {k: v.item() for k, v in found[0].items()})


def test_unseen_classes_count_nowhere() -> None:
    """Two more classes without samples: whatever their rows and logits, nothing changes."""
    fc, h, y = problem(3)
    wide = nn.Linear(D, C + 2)
    with torch.no_grad():
        wide.weight[:C], wide.bias[:C] = fc.weight, fc.bias
        wide.weight[C:], wide.bias[C:] = torch.nan, 1e4
    found = []
    for head in (fc, wide):
        collapse = NeuralCollapse(head, tracked(head, h, y), covariance=True)
        collapse.update(h, y, torch.nan_to_num(head(h).detach(), nan=1e4))
        found.append(collapse.compute())
    expect(found[1], {k: v.item() for k, v in found[0].items()})


@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_ignored_labels_and_rows_that_are_not_finite_change_nothing(ignore_index: int) -> None:
    fc, h, y = problem(4)
    y[5:9] = ignore_index
    h[10, 3], h[11, 0] = torch.inf, torch.nan
    logits = logits_of(fc, torch.nan_to_num(h))
    tracker = tracked(fc, h, y, ignore_index)
    collapse = NeuralCollapse(fc, tracker, covariance=True, ignore_index=ignore_index)
    collapse.update(h, y, logits)
    expect(collapse.compute(), reference_of(fc, h, y, logits, ignore_index))


@pytest.mark.parametrize("labels", [[], [-100, -100], [3, 3, 3]])
def test_fewer_than_two_classes_are_nan(labels: list[int]) -> None:
    fc = nn.Linear(D, C)
    h, y = torch.randn(len(labels), D), torch.tensor(labels, dtype=torch.int64)
    collapse = NeuralCollapse(fc, tracked(fc, h, y), covariance=True)
    for _ in range(2):
        assert all(value.isnan() for value in collapse.compute().values())
        collapse.update(h, y, fc(h))


# ----------------------------------------------------------------------------------------------------------------------
# Streams
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(60,), (30, 30), (1, 0, 7, 52), (1,) * 60])
def test_any_batches_equal_one(sizes: tuple[int, ...]) -> None:
    fc, h, y = problem(5)
    logits = logits_of(fc, h)
    collapse = NeuralCollapse(fc, tracked(fc, h, y), covariance=True)
    for part, labels, scores in zip(*(x.split(sizes) for x in (h, y, logits)), strict=True):
        collapse.update(part, labels, scores)
    expect(collapse.compute(), reference_of(fc, h, y, logits))
    # Computing keeps everything, resetting nothing.
    expect(collapse.compute(), reference_of(fc, h, y, logits))
    collapse.reset()
    assert collapse.compute()["nc3"].isnan()
    collapse.update(h[:20], y[:20])
    collapse.update(h[20:40], y[20:40])
    found = collapse.compute()
    assert found.pop("nc4").isnan()  # no logits came in
    expect(found, reference_of(fc, h[:40], y[:40]))


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_a_common_offset_does_not_cancel(offset: float) -> None:
    """Sums of squares of float32 features would lose everything: 1e8 or 1e12 against a spread of 1."""
    fc, h, y = problem(6)
    h = h + offset
    logits = logits_of(fc, h)
    collapse = NeuralCollapse(fc, tracked(fc, h, y), covariance=True)
    for part, labels, scores in zip(*(x.split(7) for x in (h, y, logits)), strict=True):
        collapse.update(part, labels, scores)
    # Means of float64 are exact to 1e-16 * offset, some hundreds of which add up against distances of about 1.
    expect(collapse.compute(), reference_of(fc, h, y, logits), rtol=1e-14 * offset + 1e-9, atol=1e-14 * offset)


def test_dense_predictions_are_their_positions() -> None:
    fc, h, y = problem(7)
    logits, tracker = logits_of(fc, h), tracked(fc, h, y)
    collapse = NeuralCollapse(fc, tracker, covariance=True)
    collapse.update(h.reshape(2, 5, 6, D).movedim(-1, 1), y.reshape(2, 5, 6), logits.reshape(2, 5, 6, C).movedim(-1, 1))
    expect(collapse.compute(), reference_of(fc, h, y, logits))


def test_nc4_waits_for_means() -> None:
    """Samples of classes that the tracker has not seen are not asked; those of the others are."""
    fc, h, y = problem(8)
    logits = logits_of(fc, h)
    tracker = spalign.ClassMeanTracker.for_classifier(fc, momentum=None)
    collapse = NeuralCollapse(fc, tracker)
    collapse.update(h, y, logits)
    assert collapse.compute()["nc4"].isnan()
    early = y < 2
    tracker.update(h[early], y[early])
    collapse.update(h, y, logits)
    alone = NeuralCollapse(fc, tracker)
    alone.update(h[early], y[early], logits[early])
    assert collapse.compute()["nc4"] == alone.compute()["nc4"]


def test_it_reads_and_registers_nothing_else() -> None:
    """The tracker is read alone, features are left as they are, no gradient flows; autocast changes no bit."""
    fc, h, y = problem(9)
    tracker, h = tracked(fc, h, y), h.double().requires_grad_()
    before, mean, logits = h.detach().clone(), tracker.mean.clone(), logits_of(fc, h)

    def refuse(x: Tensor) -> Tensor:
        raise AssertionError("something is kept for a backward pass")

    found = []
    for enabled in (False, True):
        collapse = NeuralCollapse(fc, tracker, covariance=True)
        saving = torch.autograd.graph.saved_tensors_hooks(refuse, lambda x: x)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), saving:
            collapse.update(h, y, logits)
            found.append(collapse.compute())
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    assert not any(value.requires_grad for value in found[0].values())
    assert torch.equal(h, before)
    assert torch.equal(tracker.mean, mean)


@pytest.mark.parametrize("chunk", [1, 1000])
def test_outer_products_are_formed_by_parts(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_MAX_ENTRIES", chunk)
    _, h, y = problem(1)
    _, _, scatter = reference.class_scatter(to_numpy(h), y.numpy(), C)
    np.testing.assert_allclose(class_moments(h, y, C, covariance=True).scatter, scatter, **TIGHT)


def test_angles_of_many_classes_are_formed_by_parts() -> None:
    """1500 classes are more than one part."""
    vectors, seen = torch.randn(1500, 3, dtype=torch.float64), torch.arange(1500) % 3 > 0
    unit = nn.functional.normalize(vectors[seen], dim=1)
    away = (unit @ unit.t() + 1 / 999).abs()
    want = (away.sum() - away.diagonal().sum()) / (1000 * 999)
    torch.testing.assert_close(metrics.nc2_angles(vectors, seen), want, rtol=1e-12, atol=0)


def test_it_follows_the_model_to_another_device_before_the_first_batch() -> None:
    fc, h, y = problem(1)
    collapse, alone = NeuralCollapse(fc), NeuralCollapse(fc)
    fc.to("meta")
    assert alone.compute()["nc3"].device.type == "meta"  # of a rank without samples
    collapse.update(h.to("meta"), y.to("meta"))
    assert collapse.compute()["nc3"].device.type == "meta"


def test_what_is_built_and_reset_in_inference_mode_works_outside() -> None:
    """As validation loops do, of which others run under no_grad alone."""
    fc, h, y = problem(1)
    tracker = spalign.ClassMeanTracker.for_classifier(fc)
    tracker.update(h, y)
    with torch.inference_mode():
        collapse = NeuralCollapse(fc, tracker)
        collapse.update(h, y, fc(h))
        collapse.reset()
        collapse.update(h, y, fc(h))
    collapse.update(h, y, fc(h))
    alone = NeuralCollapse(fc, tracker)
    for _ in range(2):
        alone.update(h, y, fc(h))
    got, want = collapse.compute(), alone.compute()
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.skipif(not PAGE.exists(), reason="the tests run without the documentation here")
def test_the_page_s_lines_run() -> None:
    ran: dict[str, Any] = {}
    exec(PAGE.read_text(encoding="utf-8").split("## Measuring")[1].split("```python\n")[1].split("```")[0], ran)
    log = ran["log"]
    assert 0 < log["nc1_trace"] < 1000
    assert all(name in log for name in ("nc2_norms", "nc2_angles", "nc3", "alignment"))


# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------


H, Y, L = torch.randn(4, D), torch.tensor([0, 1, 2, 3]), torch.randn(4, C)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.randn(4, 7), Y), ["(4, 7)", "(N, 8)"]),
        ((H, Y + 3), ["label 5", "0 to 4"]),
        ((H, torch.full((4, C), 0.2)), ["float32", "integer class indices", "not mixed"]),
        ((H, Y, L[:, :4]), ["(4, 4)", "(4, 5)"]),
        ((H, Y, L.long()), ["int64", "floats of shape"]),
        ((H, Y, L.to("meta")), ["logits are on meta", "cpu"]),
        ((H.to("meta"), Y), ["features are on meta", "cpu"]),
    ],
)
def test_bad_batches_name_value_and_fix_and_change_nothing(batch: tuple[Tensor, ...], words: list[str]) -> None:
    fc, h, y = problem(1)
    collapse = NeuralCollapse(fc, tracked(fc, h, y))
    collapse.update(h, y, fc(h))
    before = collapse.compute()
    with pytest.raises(ValueError, match="expected") as info:
        collapse.update(*batch)
    for word in words:
        assert word in str(info.value)
    assert all(torch.equal(value, before[k]) for k, value in collapse.compute().items())


def test_bad_arguments_name_value_and_fix() -> None:
    fc = nn.Linear(D, C)
    with pytest.raises(ValueError, match=r"does not fit a tracker of 3 classes.*expected equal sizes"):
        NeuralCollapse(fc, spalign.ClassMeanTracker(3, D))
    with pytest.raises(ValueError, match=r"ignore_index is 'x', expected an integer"):
        NeuralCollapse(fc, ignore_index="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"there is no tracker, expected .* or leave the logits out"):
        NeuralCollapse(fc).update(H, Y, L)
    with pytest.raises(ValueError, match=r"shape \(5,\), expected matrices .* or take nc1_trace"):
        metrics.nc1_pinv(class_moments(H, Y, C))
    with pytest.raises(ValueError, match=r"targets have dtype torch.float32, expected integer class indices"):
        class_moments(H, torch.ones(4, C), C)
