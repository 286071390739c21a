"""Every baseline's loss against a float64 numpy loop, and what makes each of them itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cifar_lt
import numpy as np
import numpy.typing as npt
import pytest
import torch
from longtail import arb, etf_dr, glmc, max_norm
from longtail.augment import ImageSet
from longtail.baseline import Batch, batch_counts
from longtail.data import MEAN, STD, choose_images, long_tail_counts
from longtail.engine import Trainer
from longtail.networks import Backbone, CifarResNet
from longtail.recipes import Schedule, get_recipe, small_recipe
from torch import Tensor

Array = npt.NDArray[np.float64]
Options = Callable[..., list[str]]
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}  # float64 on both sides, a few hundred additions


def batch(seed: int, n: int = 9, c: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (N, C) float64, labels (N,) of which class 3 has none, and mixup labels (N, C)."""
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, c, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, 3, (n,), generator=rng)
    labels[0] = 4
    one_hot = torch.nn.functional.one_hot(labels, c).double()
    partner = torch.randperm(n, generator=rng)
    return logits, labels, 0.3 * one_hot + 0.7 * one_hot[partner]


def labelled(targets: Tensor) -> Batch:
    return Batch(torch.zeros(len(targets), 3, 8, 8), targets)


def log_softmax(z: Array) -> Array:
    return np.array([[v - math.log(sum(math.exp(u) for u in row)) for v in row] for row in z])


COUNTS = [8, 8, 8, 8, 8]


def tiny_images(num_classes: int = 5, n: int = 40, resolution: int = 8) -> ImageSet:
    images = np.random.default_rng(0).integers(0, 256, (n, 3, resolution, resolution)).astype(np.uint8)
    labels = torch.arange(n) % num_classes
    return ImageSet(torch.from_numpy(images), labels, device=torch.device("cpu"), mean=MEAN, std=STD)


def test_batch_counts_of_mixed_labels_are_those_before_mixing() -> None:
    _, labels, mixed = batch(0)
    want = torch.bincount(labels, minlength=5).float()
    assert torch.equal(batch_counts(labelled(labels), 5), want)
    torch.testing.assert_close(
        batch_counts(labelled(mixed.float()), 5), want, rtol=1e-6, atol=1e-6
    )  # float32 sums of 9


def test_a_part_of_a_batch_is_balanced_by_the_whole() -> None:
    """Micro-batches and ranks weigh their samples as the whole batch would."""
    logits, labels, _ = batch(4)
    whole, (first, second) = labelled(labels), labels.split([4, 5])
    counts = batch_counts(whole, 5)
    parts = [replace(labelled(part), counts=counts) for part in (first, second)]
    head = etf_dr.EtfDotRegression(etf_dr.EtfNet(Backbone(8, 1), 5))
    for part in parts:
        torch.testing.assert_close(head.energy(part), head.energy(whole))
    ce = arb.AttractionRepulsionBalanced(CifarResNet(5, depth=8), counts=None)
    losses = [ce.loss(z, part) * len(part) for z, part in zip(logits.float().split([4, 5]), parts, strict=True)]
    torch.testing.assert_close(losses[0] + losses[1], ce.loss(logits.float(), whole) * 9)


# --- ARB --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("clamp", [0.0, 2.0])
def test_balanced_softmax_is_the_published_ratio(soft: bool, clamp: float) -> None:
    """`-log(e^{z_y} / sum_j (n_j / n_y) e^{z_j})`, of mixed labels the mixture of both."""
    logits, labels, mixed = batch(1)
    counts = [50.0, 20.0, 7.0, 3.0, 1.0]
    z = np.clip(logits.numpy(), -clamp, clamp) if clamp else logits.numpy()
    weights = mixed.numpy() if soft else np.eye(5)[labels.numpy()]
    total = 0.0
    for i in range(len(z)):
        for y in range(5):
            if weights[i, y]:
                ratio = sum(counts[j] / counts[y] * math.exp(z[i, j]) for j in range(5))
                total -= weights[i, y] * math.log(math.exp(z[i, y]) / ratio)
    got = arb.balanced_softmax(
        logits, mixed if soft else labels, torch.tensor(counts, dtype=torch.float64), clamp=clamp
    )
    np.testing.assert_allclose(float(got), total / len(z), **EXACT)


def test_balanced_softmax_is_cross_entropy_of_shifted_logits() -> None:
    logits, labels, _ = batch(2)
    counts = torch.tensor([50.0, 20.0, 7.0, 3.0, 1.0], dtype=torch.float64)
    want = torch.nn.functional.cross_entropy(logits + counts.log(), labels)
    torch.testing.assert_close(arb.balanced_softmax(logits, labels, counts), want, **EXACT)


@pytest.mark.parametrize("soft", [False, True])
def test_a_class_absent_from_the_batch_is_not_pushed_away(soft: bool) -> None:
    logits, labels, mixed = batch(3)
    logits.requires_grad_()
    targets = mixed if soft else labels
    loss = arb.balanced_softmax(logits, targets, batch_counts(labelled(targets), 5).double())
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(loss)
    present = torch.bincount(labels, minlength=5) > 0
    assert torch.equal(logits.grad.any(0), present)
    assert not present[3]


def test_arb_counts_the_training_set_or_the_batch() -> None:
    model = CifarResNet(5, depth=8)
    logits, labels, _ = batch(4)
    counts = [50, 20, 7, 3, 1]
    whole = arb.AttractionRepulsionBalanced(model, counts=counts).loss(logits.float(), labelled(labels))
    part = arb.AttractionRepulsionBalanced(model, counts=None).loss(logits.float(), labelled(labels))
    torch.testing.assert_close(whole, arb.balanced_softmax(logits.float(), labels, torch.tensor(counts).float()))
    torch.testing.assert_close(part, arb.balanced_softmax(logits.float(), labels, batch_counts(labelled(labels), 5)))


# --- ETF-DR -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c", "d"), [(2, 1), (5, 4), (5, 5), (10, 64), (100, 99), (100, 128)])
def test_simplex_has_unit_rows_at_equal_angles(c: int, d: int) -> None:
    torch.manual_seed(0)
    etf = etf_dr.simplex_etf(c, d).double().numpy()
    want = np.full((c, c), -1 / (c - 1)) + np.eye(c) * (1 + 1 / (c - 1))
    np.testing.assert_allclose(etf @ etf.T, want, atol=3e-7)  # rounded once to float32
    np.testing.assert_allclose(etf.sum(0), 0, atol=1e-6)


@pytest.mark.parametrize(("c", "d"), [(100, 64), (5, 3), (1, 8)])
def test_no_simplex_in_too_few_dimensions(c: int, d: int) -> None:
    with pytest.raises(ValueError, match=rf"{c} classes fits into {d} feature dimensions.*--width 2"):
        etf_dr.simplex_etf(c, d)


def energy(labels: Array) -> list[float]:
    """gamma / n_c with gamma = B / classes present, as the published code computes E_W."""
    counts = [int((labels == c).sum()) for c in range(5)]
    present = sum(n > 0 for n in counts)
    return [len(labels) / present / n if n else 0.0 for n in counts]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("unit", [False, True])
def test_dot_regression_is_the_published_loss(soft: bool, unit: bool) -> None:
    """`1/(2B) sum_i (w_y' h - |w_y| |h|)^2 / |h|`, w_c = sqrt(gamma / n_c) m_c; mixup mixes two of them."""
    torch.manual_seed(0)
    _, labels, mixed = batch(5)
    m = etf_dr.simplex_etf(5, 6).double()
    h = torch.randn(9, 6, dtype=torch.float64)
    if unit:
        h = torch.nn.functional.normalize(h)
    e = energy(labels.numpy())
    weights = mixed.numpy() if soft else np.eye(5)[labels.numpy()]
    total = 0.0
    for i, x in enumerate(h.numpy()):
        norm = math.sqrt(sum(v * v for v in x))
        for y in range(5):
            w = math.sqrt(e[y]) * m.numpy()[y]
            total += weights[i, y] * (w @ x - math.sqrt(w @ w) * norm) ** 2 / norm / 2
    got = etf_dr.dot_regression(h, m, mixed if soft else labels, torch.tensor(e, dtype=torch.float64))
    # |m_c| is 1 to within its float32 rounding
    np.testing.assert_allclose(float(got), total / len(h), rtol=1e-6)


def test_dot_regression_pulls_along_the_vertex_alone() -> None:
    """With |h| constant the gradient of one sample is along its m_y: there are no negatives."""
    torch.manual_seed(0)
    m, h = etf_dr.simplex_etf(5, 6), torch.randn(1, 6, requires_grad=True)
    etf_dr.dot_regression(h, m, torch.tensor([2]), torch.ones(5)).backward()
    assert h.grad is not None
    cosine = torch.cosine_similarity(h.grad[0], m[2], dim=0)
    assert float(cosine) == pytest.approx(-1.0, abs=1e-6)


def test_etf_energy_balances_the_batch_the_set_or_nothing() -> None:
    torch.manual_seed(0)
    model = etf_dr.EtfNet(Backbone(8, 1), 5)
    _, labels, mixed = batch(6)
    want = torch.tensor(energy(labels.numpy())).float()
    by_batch = etf_dr.EtfDotRegression(model)
    torch.testing.assert_close(by_batch.energy(labelled(labels)), want)
    torch.testing.assert_close(by_batch.energy(labelled(mixed.float()))[want > 0], want[want > 0], rtol=1e-5, atol=0)
    assert torch.equal(etf_dr.EtfDotRegression(model, counts=None).energy(labelled(labels)), torch.ones(5))
    by_set = etf_dr.EtfDotRegression(model, counts=[50, 20, 10, 5, 5]).energy(labelled(labels))
    torch.testing.assert_close(by_set, torch.tensor([18 / 50, 18 / 20, 1.8, 3.6, 3.6]))


def test_etf_features_are_unit_vectors_and_logits_their_cosines() -> None:
    torch.manual_seed(0)
    baseline = etf_dr.EtfDotRegression(etf_dr.EtfNet(Backbone(8, 1), 5))
    baseline.begin_epoch(0)
    step = baseline.step(Batch(torch.randn(9, 3, 8, 8), torch.arange(9) % 5))
    torch.testing.assert_close(step.features.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(step.logits, step.features @ baseline.classifier.weight.t())
    assert not list(baseline.classifier.parameters(recurse=False)), "the simplex is a buffer"
    assert "classifier.weight" in baseline.model.state_dict()


# --- GLMC -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 1.0, 1.2])
def test_glmc_class_weights(power: float) -> None:
    counts = [50, 20, 7, 3, 1]
    want = [5 * n**-power / sum(m**-power for m in counts) for n in counts]
    np.testing.assert_allclose(glmc.class_weights(counts, power).numpy(), want, rtol=1e-6)  # float32


def test_weighted_cross_entropy() -> None:
    logits, _, mixed = batch(7)
    weight = torch.tensor([0.1, 0.5, 1.0, 1.4, 2.0], dtype=torch.float64)
    logs = log_softmax(logits.numpy())
    want = -np.mean([sum(weight[c] * mixed[i, c] * logs[i, c] for c in range(5)) for i in range(9)])
    np.testing.assert_allclose(float(glmc.weighted_cross_entropy(logits, mixed, weight)), want, **EXACT)


def test_disagreement_is_minus_the_mean_cosine_and_pulls_one_side() -> None:
    torch.manual_seed(0)
    p, z = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = glmc.disagreement(p, z)
    x, y = p.detach().numpy(), z.detach().numpy()
    want = -np.mean([a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(x, y, strict=True)])
    np.testing.assert_allclose(float(loss.detach()), want, **EXACT)
    loss.backward()
    assert p.grad is not None
    assert z.grad is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("row", "column"), [(4, 4), (0, 7), (7, 0)])
def test_cutmix_pastes_a_clipped_box(share: float, row: int, column: int) -> None:
    side = math.ceil(8 * math.sqrt(1 - share))
    top, left = row - side // 2, column - side // 2
    want = [[top <= r < top + side and left <= c < left + side for c in range(8)] for r in range(8)]
    got = glmc.cut_mask(8, torch.tensor([share], dtype=torch.float64), torch.tensor([row]), torch.tensor([column]))
    assert got.tolist() == want


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99, 1.0])
@pytest.mark.parametrize(("row", "column"), [(4, 4), (0, 7), (7, 0)])
def test_published_cutmix_goes_half_a_side_either_way(share: float, row: int, column: int) -> None:
    """So that a side of one pastes nothing."""
    half = math.ceil(8 * math.sqrt(1 - share)) // 2
    want = [[abs(r + 0.5 - row) < half and abs(c + 0.5 - column) < half for c in range(8)] for r in range(8)]
    at = torch.tensor([row]), torch.tensor([column])
    got = glmc.cut_mask(8, torch.tensor([share], dtype=torch.float64), *at, even=True)
    assert got.tolist() == want


def test_half_of_the_published_label_is_for_a_third_of_the_pixels() -> None:
    """The box over all its middles, for lambda from 0 to 1."""
    middles = torch.arange(32)
    pasted = []
    for share in torch.linspace(0, 1, 201, dtype=torch.float64)[:, None]:
        rows = torch.stack([glmc.cut_mask(32, share, at[None], at[None], even=True).diagonal() for at in middles])
        pasted.append(float(rows.double().mean()) ** 2)  # rows and columns are independent
    assert sum(pasted) / len(pasted) == pytest.approx(1 / 3, abs=0.02)


def glmc_baseline() -> glmc.Glmc:
    torch.manual_seed(0)
    model = glmc.GlmcNet(Backbone(8, 1), 5)
    return glmc.Glmc(model, COUNTS, epochs=10, options=glmc.GlmcOptions(0.5, 1.2, 4.0))


def glmc_batches(**options: Any) -> glmc.GlmcBatches:
    return glmc.GlmcBatches(tiny_images(), COUNTS, batch_size=16, resample=0.5, **options)


@pytest.mark.parametrize("epoch", [0, 6])
def test_glmc_step_is_the_formula(epoch: int) -> None:
    baseline = glmc_baseline()
    model = baseline.model.double().train()
    baseline.weight_C = baseline.weight_C.double()
    rng = torch.Generator().manual_seed(0)
    looks = [torch.randn(6, 3, 8, 8, generator=rng, dtype=torch.float64) for _ in range(2)]
    _, _, q = batch(8, n=6)
    _, _, r = batch(9, n=6)
    baseline.begin_epoch(epoch)
    step = baseline.step(Batch(looks[0], q, Batch(looks[1], r)))

    other = glmc_baseline().model.double().train()  # batch statistics make the passes separate
    features = [other.backbone(x) for x in looks]
    w = glmc.class_weights([8] * 5, 1.2).double().numpy()
    a = 1 - (epoch / 10) ** 2
    total = 0.0
    projected = [other.projection(f) for f in features]
    predicted = [other.prediction(z) for z in projected]
    for f, target in zip(features, (q.numpy(), r.numpy()), strict=True):
        plain = log_softmax(other.conventional(f).float().double().detach().numpy())
        balanced = log_softmax(other.rebalanced(f).float().double().detach().numpy())
        total += a * -(target * plain).sum(1).mean() + (1 - a) * -(w * target * balanced).sum(1).mean()
    for p, z in ((predicted[0], projected[1]), (predicted[1], projected[0])):
        total += 4.0 * float(glmc.disagreement(p, z).detach())
    # the losses see float32 logits
    assert float(step.loss.detach()) == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(step.features, torch.cat(features))
    assert torch.equal(step.targets, torch.cat([q, r]))
    assert model is baseline.model


def test_glmc_looks_mix_the_same_pairs() -> None:
    """A first look must be lambda own + (1 - lambda) other; labels of the second follow the pasted area."""
    batches = list(glmc_batches(augment=False).epoch(torch.Generator().manual_seed(0)))
    assert [len(one) for one in batches] == [16, 16, 8]
    for one in batches:
        assert one.second is not None
        for look in (one, one.second):
            torch.testing.assert_close(look.targets.sum(1), torch.ones(len(look)))
    unadjusted = list(glmc_batches(augment=False, unadjusted_cutmix=True).epoch(torch.Generator().manual_seed(0)))
    for one, other in zip(unadjusted, batches, strict=True):
        assert one.second is not None
        assert other.second is not None
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.second.targets, one.targets)
    assert any(not torch.equal(one.second.targets, one.targets) for one in batches if one.second is not None)


def test_glmc_pixels_and_labels_are_mixed_alike() -> None:
    """Both looks against their definition: by lambda, and by the box, whose area is the other label's share."""
    batches = glmc_batches(augment=False)
    images = batches.images
    pixels, labels = images.plain(torch.arange(40)).double(), torch.eye(5, dtype=torch.float64)[images.labels_N]
    draws = batches.draw(torch.Generator().manual_seed(1))
    for step in range(3):
        positions = torch.arange(40)[16 * step : 16 * (step + 1)]
        own, other = draws["own"][positions], draws["other"][positions]
        share = float(draws["step_share"][step])
        row, column = draws["step_middle"][step].tolist()
        got = batches.batch(draws, positions, torch.tensor([step]))
        assert got.second is not None
        # float32 interpolation of numbers below 3
        near: dict[str, Any] = {"rtol": 0, "atol": 2e-6}
        torch.testing.assert_close(got.images.double(), share * pixels[own] + (1 - share) * pixels[other], **near)
        torch.testing.assert_close(got.targets.double(), share * labels[own] + (1 - share) * labels[other], **near)
        side, want, area = math.ceil(8 * math.sqrt(1 - share)), pixels[own].clone(), 0
        for r in range(max(row - side // 2, 0), min(row - side // 2 + side, 8)):
            for c in range(max(column - side // 2, 0), min(column - side // 2 + side, 8)):
                want[:, :, r, c] = pixels[other][:, :, r, c]
                area += 1
        torch.testing.assert_close(got.second.images.double(), want, **near)
        left = 1 - area / 64
        torch.testing.assert_close(got.second.targets.double(), left * labels[own] + (1 - left) * labels[other], **near)


def test_glmc_loader_b_follows_its_law() -> None:
    """P(c) proportional to n_c^(1 - r): r = 1 is class-balanced, r = 0 the natural distribution."""
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([80, 16, 4]))
    images = ImageSet(
        torch.zeros(100, 3, 8, 8, dtype=torch.uint8), labels, device=torch.device("cpu"), mean=MEAN, std=STD
    )
    for r, want in ((0.0, [0.8, 0.16, 0.04]), (1.0, [1 / 3] * 3), (0.5, [8.944 / 14.944, 4 / 14.944, 2 / 14.944])):
        batches = glmc.GlmcBatches(images, [80, 16, 4], batch_size=10, resample=r)
        mass = batches.sampling_N / batches.sampling_N.sum()
        got = [float(mass[labels == c].sum()) for c in range(3)]
        assert got == pytest.approx(want, abs=1e-3)


def test_glmc_first_epoch_teaches_the_rebalanced_head_nothing() -> None:
    baseline = glmc_baseline()
    one = next(iter(glmc_batches().epoch(torch.Generator().manual_seed(0))))
    for epoch, taught in ((0, False), (1, True)):
        baseline.model.zero_grad()
        baseline.begin_epoch(epoch)
        baseline.step(one).loss.backward()
        grad = baseline.model.rebalanced.weight.grad
        assert grad is not None
        assert bool(grad.any()) == taught


def test_published_glmc_constants() -> None:
    cases = {
        ("cifar10", 200): (0.0, 1.2, 1.0),
        ("cifar10", 100): (0.0, 1.2, 1.0),
        ("cifar10", 50): (0.0, 1.2, 1.0),
        ("cifar10", 10): (0.2, 1.0, 2.0),
        ("cifar100", 200): (0.0, 1.2, 4.0),
        ("cifar100", 100): (0.0, 1.2, 4.0),
        ("cifar100", 50): (0.2, 1.2, 6.0),
        ("cifar100", 10): (0.2, 1.2, 4.0),
    }
    for (dataset, imbalance), want in cases.items():
        assert glmc.published_options(dataset, imbalance) == glmc.GlmcOptions(*want)


# --- MaxNorm ----------------------------------------------------------------------------------------------------------


def test_effective_number_weights() -> None:
    counts = [500, 50, 5]
    raw = [(1 - 0.9999) / (1 - 0.9999**n) for n in counts]
    want = [3 * w / sum(raw) for w in raw]
    np.testing.assert_allclose(max_norm.effective_weights(counts).numpy(), want, rtol=1e-6)  # float32


def test_binary_cross_entropy_on_softmax() -> None:
    logits, labels, _ = batch(10)
    weight = torch.tensor([0.1, 0.5, 1.0, 1.4, 2.0], dtype=torch.float64)
    p = np.exp(log_softmax(logits.numpy()))
    total = 0.0
    for i in range(9):
        for c in range(5):
            y = float(labels[i] == c)
            total -= float(weight[labels[i]]) * (y * math.log(p[i, c]) + (1 - y) * math.log(1 - p[i, c]))
    np.testing.assert_allclose(float(max_norm.binary_cross_entropy(logits, labels, weight)), total / 45, **EXACT)


def test_norms_are_limited_and_directions_kept() -> None:
    w = torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 1.2], [0.0, 0.0]])
    limit = max_norm.norm_limit(w[:3])
    assert float(limit) == pytest.approx(1.0 + 0.1 * 4.0)
    before = w.clone()
    max_norm.limit_norms_(w, limit)
    torch.testing.assert_close(w[0], before[0] * 1.4 / 5)
    assert torch.equal(w[1:], before[1:])


# --- in the trainer ---------------------------------------------------------------------------------------------------


def trainer(argv: list[str]) -> Trainer:
    return Trainer(cifar_lt.settings_from(cifar_lt.build_parser().parse_args(argv)))


METHODS = {
    "etf-dr": ("--method", "etf-dr", "--mixup", "1", "--spareg", "0.3"),
    "arb": ("--method", "arb", "--class-counts", "batch", "--spaslerp", "--spaproj"),
    "glmc": ("--method", "glmc", "--spareg", "0.3", "--spaproj"),
    "glmc on the other head": ("--method", "glmc", "--aligned-head", "conventional", "--spaslerp"),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_and_resumes_bit_for_bit(name: str, tiny_options: Options, tmp_path: Path) -> None:
    options = METHODS[name]
    straight = trainer(tiny_options("straight", *options)).run()
    assert straight is not None
    assert trainer(tiny_options("parts", *options, "--stop-after-epochs", "1")).run() is None
    parts = trainer(tiny_options("parts", *options, "--resume")).run()
    assert parts is not None
    for key in ("accuracy_last", "train_accuracy", "alignment", "alignment_exact"):
        assert straight[key] == parts[key]
    states = [
        torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)["model"] for folder in ("straight", "parts")
    ]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert straight["accuracy_last"]["balanced"] > 15  # ten classes, each of its own colour


def test_max_norm_follows_glmc(tiny_options: Options, tmp_path: Path) -> None:
    assert trainer(tiny_options("first", "--method", "glmc")).run() is not None
    start = ("--method", "glmc-maxnorm", "--first-stage", str(tmp_path / "first"))
    second = (*start, "--mixup", "0", "--warmup-epochs", "0")
    before = torch.load(tmp_path / "first" / "checkpoint.pt", weights_only=True)["model"]
    stage = trainer(tiny_options("second", *second, "--stop-after-epochs", "1"))
    limit = float(max_norm.norm_limit(before["rebalanced.weight"]))
    stage.run()
    resumed = trainer(tiny_options("second", *second, "--resume"))
    assert resumed.run() is not None
    after = resumed.baseline.model.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {"rebalanced.weight", "rebalanced.bias"}, "the rest is frozen, batch statistics too"
    assert float(after["norm_limit"]) == limit
    assert float(after["rebalanced.weight"].norm(dim=1).max()) <= limit * (1 + 1e-6)
    moving = trainer(tiny_options("moving", *second, "--moving-statistics"))
    moving.run()
    assert not torch.equal(
        moving.baseline.model.state_dict()["backbone.bn1.running_mean"], before["backbone.bn1.running_mean"]
    )


def test_max_norm_refuses_what_it_cannot_start_from(tiny_options: Options, tmp_path: Path) -> None:
    trainer(tiny_options("plain", "--stop-after-epochs", "1")).run()
    trainer(tiny_options("short", "--method", "glmc", "--stop-after-epochs", "1")).run()
    trainer(tiny_options("deep", "--method", "glmc", "--epochs", "2", "--depth", "14")).run()
    trainer(tiny_options("other", "--method", "glmc", "--epochs", "2", "--imbalance", "20")).run()

    def start(first: str) -> None:
        options = ("--method", "glmc-maxnorm", "--first-stage", str(tmp_path / first), "--warmup-epochs", "0")
        trainer(tiny_options("second", *options))

    for first, message in (
        ("plain", "holds a run of ce, expected one of glmc"),
        ("short", "1 of 3 epochs: finish it first"),
        ("deep", "another network"),
        ("none", "No such file"),
        ("other", "trained with --imbalance 20.0, not 10.0"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            start(first)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--method etf-dr --spaslerp", "fixed simplex"),
        ("--method etf-dr --spaproj", "fixed simplex"),
        ("--method etf-dr --spareg 1 --spareg-align classifier", "--spareg-align features"),
        ("--method arb --frozen-head", "--frozen-head belongs to ce, not to arb"),
        ("--method ce --class-counts batch", "--class-counts belongs to etf-dr, arb"),
        ("--method arb --class-counts none", "use --method ce"),
        ("--method glmc --contrast -1", "--contrast is -1.0"),
        ("--method glmc-maxnorm", "--first-stage"),
        ("--subset-replacement --validation 2", "with replacement"),
        ("--method glmc --mixup 1", "mixes by itself"),
        ("--method etf-dr --accumulate 2", "micro-batches"),
        ("--method arb --class-counts batch --accumulate 2", "micro-batches"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_options: Options, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    assert cifar_lt.main(tiny_options("run", *more.split())) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["ce", "etf-dr", "arb", "glmc"])
def test_variants_of_a_method_start_and_see_the_same(name: str, tiny_options: Options) -> None:
    """Pairing: equal weights, equal batches of the second epoch, after a first one in which the variant had its way."""
    seen = []
    for number, strategy in enumerate(((), ("--spareg", "1"))):
        one = trainer(tiny_options(f"run{number}", "--method", name, *strategy))
        tensors = [p.detach().clone() for p in one.baseline.model.parameters()]
        one._run_epoch()
        for drawn in one.batches.epoch(one.generator):
            tensors += [drawn.images, drawn.targets]
        seen.append(tensors)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_folder_is_of_one_process_at_a_time(tiny_options: Options) -> None:
    first = trainer(tiny_options("run"))
    with pytest.raises(OSError, match="in use by another process"):
        trainer(tiny_options("run"))
    first.run()
    assert trainer(tiny_options("run", "--resume")).epoch == 3


def test_a_checkpoint_of_before_an_option_existed_resumes(tiny_options: Options, tmp_path: Path) -> None:
    trainer(tiny_options("run", "--stop-after-epochs", "1")).run()
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["options"]["capture"]
    torch.save(state, path)
    assert trainer(tiny_options("run", "--resume")).epoch == 1


def test_an_etf_needs_a_wide_network() -> None:
    with pytest.raises(ValueError, match="--width 2 has 128"):
        etf_dr.EtfNet(Backbone(8, 1), 100)
    assert small_recipe("etf-dr", "cifar100").width == 2
    assert get_recipe("etfdr", "cifar100").width == 2
    assert get_recipe("etfdr", "cifar10").width == 1


def test_glmc_schedule_is_its_published_cosine() -> None:
    recipe = get_recipe("glmc", "cifar100")
    schedule = Schedule(recipe.lr, recipe.epochs, recipe.warmup_epochs, recipe.schedule)
    for epoch in (0, 1, 100, 199):
        want = 0.005 * (1 + math.cos(math.pi * epoch / 200))
        assert schedule(epoch, 3, 170) == pytest.approx(want)
    assert (recipe.width, recipe.batch_size, recipe.weight_decay) == (4, 64, 5e-3)


def test_drawing_with_replacement_repeats_a_quarter() -> None:
    """On CIFAR-100 at 100 about 79 % of the nominal images are distinct (the published code until May 2023)."""
    labels = np.repeat(np.arange(100), 500)
    counts = long_tail_counts(500, 100, 100)
    split = choose_images(labels, counts, replacement=True)
    assert np.bincount(labels[split.train], minlength=100).tolist() == counts
    distinct = len(np.unique(split.train)) / len(split.train)
    assert distinct == pytest.approx(8583 / 10847, abs=0.02)  # expectation; its deviation is 0.003
    assert len(split.held_out) == 0
