"""Bad input raises an error that names the value, what was expected and the fix, and leaves every state untouched."""

import contextlib
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from problems import FIXED, WithBuffer, make_batch, same_state, state_of
from torch import Tensor, nn

import spalign
from spalign import functional

C, D = 5, 6


def fed() -> spalign.ClassMeanTracker:
    tracker = spalign.ClassMeanTracker(C, D)
    tracker.update(*make_batch(1, 12, C, D))
    return tracker


H, Y = torch.randn(4, D), torch.tensor([0, 1, 2, 3])
Q = torch.full((4, C), 1.0 / C)

BAD_BATCHES: dict[str, tuple[Any, Any, list[str]]] = {
    # what is passed, then what the message must say: the value, the expected one
    "feature width": (torch.randn(4, 7), Y, ["(4, 7)", "(N, 6)"]),
    "features 1-D": (torch.randn(D), Y[:1], ["(6,)", "(N, 6)"]),
    "features channels last": (torch.randn(2, 3, 4, D), torch.zeros(2, 3, 4).long(), ["(2, 3, 4, 6)", "second"]),
    "integer features": (torch.ones(4, D, dtype=torch.int64), Y, ["int64", "float"]),
    "complex features": (torch.ones(4, D, dtype=torch.complex64), Y, ["complex64", "float"]),
    "too few targets": (H, Y[:3], ["(3,)", "(4,)"]),
    "targets 2-D": (H, Y.unsqueeze(1), ["(4, 1)", "(4,)"]),
    "float class indices": (H, Y.float(), ["float32", "(4, 5)", "integer"]),
    "soft width": (H, torch.ones(4, 3), ["(4, 3)", "(4, 5)"]),
    "pooled features": (H[:, :, None, None], Y, ["(4,)", "(4, 1, 1)", "features.flatten(1)"]),
    "pooled features and soft targets": (H[:, :, None, None], Q, ["(4, 5)", "(4, 5, 1, 1)", "features.flatten(1)"]),
    "dense targets": (torch.randn(2, D, 3), torch.zeros(2, 4).long(), ["(2, 4)", "(2, 3)"]),
    "bool targets": (H, Y > 1, ["bool", "integer"]),
    "complex targets": (H, Y.to(torch.complex64), ["complex64", "integer"]),
    "label too large": (H, torch.tensor([0, 1, 2, 5]), ["5", "0 to 4", "-100"]),
    "label negative": (H, torch.tensor([0, -1, 2, 3]), ["-1", "0 to 4", "-100"]),
    "label in the dense form": (torch.randn(1, D, 2), torch.tensor([[0, 77]]), ["77", "0 to 4"]),
    "label 255 without ignore_index": (H, torch.tensor([0, 1, 255, 3], dtype=torch.uint8), ["255", "0 to 4"]),
    "negative soft label": (H, Q - torch.eye(4, C), ["-0.8", "at least 0"]),
    "features on another device": (H.to("meta"), Y, ["meta", "cpu", ".to("]),
    "targets on another device": (H, Y.to("meta"), ["meta", "cpu", ".to("]),
    "soft targets on another device": (H, Q.to("meta"), ["meta", "cpu", ".to("]),
}


def feed_update(t: spalign.ClassMeanTracker, h: Tensor, y: Tensor) -> None:
    t.update(h, y)


def feed_forward(t: spalign.ClassMeanTracker, h: Tensor, y: Tensor) -> None:
    t(h, y)


def feed_eval(t: spalign.ClassMeanTracker, h: Tensor, y: Tensor) -> None:
    t.eval()(h, y)


def feed_loss(t: spalign.ClassMeanTracker, h: Tensor, y: Tensor) -> None:
    spalign.SpARegLoss(nn.Linear(D, C), t)(h, y)


@pytest.mark.parametrize("feed", [feed_update, feed_forward, feed_loss])
@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches(name: str, feed: Callable[[spalign.ClassMeanTracker, Any, Any], None]) -> None:
    h, y, words = BAD_BATCHES[name]
    tracker = fed()
    before = state_of(tracker)
    with pytest.raises(ValueError, match=r"expected") as info:
        feed(tracker, h, y)
    for word in words:
        assert word in str(info.value)
    assert same_state(tracker, before)


def test_bad_batches_are_refused_in_evaluation_too() -> None:
    with pytest.raises(ValueError, match=r"\(4, 7\)"):
        feed_eval(fed(), torch.randn(4, 7), Y)


def test_labels_are_not_checked_where_that_would_wait_for_the_device() -> None:
    tracker = spalign.ClassMeanTracker(C, D, device="meta")
    tracker.update(torch.empty(4, D, device="meta"), torch.empty(4, dtype=torch.int64, device="meta"))
    tracker.update(torch.empty(4, D, device="meta"), torch.empty(4, C, device="meta"))


# Where a number is expected: what a configuration file, an argument parser or a slip of the hand leaves instead.
NOT_NUMBERS: list[Any] = ["0.5", None, [0.5], {}, 0.5 + 0j, True, torch.tensor(0.5)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_classes": 0}, "num_classes is 0, expected a positive integer"),
        ({"feature_dim": -3}, "feature_dim is -3, expected a positive integer"),
        ({"num_classes": 2.5}, "num_classes is 2.5"),
        ({"num_classes": True}, "num_classes is True"),
        ({"momentum": 0.0}, "momentum is 0.0"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"momentum": float("nan")}, "momentum is nan"),
        ({"batch_size": 0}, "batch_size is 0, expected a positive integer"),
        ({"batch_size": 8.0}, "batch_size is 8.0"),
        ({"feature_dtype": torch.int64}, "feature_dtype is torch.int64, expected a float dtype"),
        ({"process_group": 0}, "process_group is 0, expected a process group"),
        *(({"momentum": x}, f"momentum is {x!r}, expected a number in (0, 1]") for x in NOT_NUMBERS if x is not None),
        *(({"ignore_index": x}, f"ignore_index is {x!r}, expected an integer") for x in (None, "255", 0.5)),
    ],
)
def test_bad_tracker_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        spalign.ClassMeanTracker(**{"num_classes": C, "feature_dim": D, **arguments})


def test_integers_of_numpy_are_counts() -> None:
    """As `labels.max() + 1` gives them."""
    c, d, n = np.int64(C), np.int32(D), np.int64(8)
    tracker = spalign.ClassMeanTracker(c, d, batch_size=n)
    assert [type(x) for x in (tracker.num_classes, tracker.feature_dim, tracker.batch_size)] == [int, int, int]
    tracker.update(*make_batch(1, 8, C, D))
    assert spalign.theory.simplex_etf(c, d).shape == (C, D)


def build_reg(classifier: Any, tracker: Any = None) -> spalign.SpARegLoss:
    return spalign.SpARegLoss(classifier, tracker)


def build_slerp(classifier: Any, tracker: Any, **kw: Any) -> spalign.SpASlerp:
    return spalign.SpASlerp(classifier, tracker, **{"total_steps": 5, "alpha_max": 0.1, "threshold": 0.9, **kw})


def build_proj(classifier: Any, tracker: Any, **kw: Any) -> spalign.SpAProj:
    p = nn.Parameter(torch.ones(1))
    return spalign.SpAProj(torch.optim.SGD([p], lr=0.1), classifier, tracker, **{"gamma": 0.5, **kw})


BUILDERS: list[Callable[..., object]] = [build_reg, build_slerp, build_proj]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(("c", "d"), [(C + 1, D), (C, D + 1), (D, C)])
def test_sizes_of_classifier_and_tracker_must_agree(build: Callable[..., object], c: int, d: int) -> None:
    tracker = fed()
    before = state_of(tracker)
    with pytest.raises(ValueError, match=rf"{c} classes x {d} features.*{C} classes x {D} features") as info:
        build(nn.Linear(d, c), tracker)
    assert "for_classifier" in str(info.value)
    assert "class_dim=1" in str(info.value), "the one fix for a transposed head"
    assert same_state(tracker, before)


class NoWeight(nn.Module):
    """Has a weight that is no tensor."""

    weight = None


BAD_CLASSIFIERS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "no weight": (nn.ReLU, ["ReLU", "weight", "model.fc"]),
    "a whole model": (lambda: nn.Sequential(nn.Linear(D, C)), ["Sequential", "weight", "model.fc"]),
    "weight None": (NoWeight, ["None", "(C, D)"]),
    "1-D weight": (lambda: nn.BatchNorm1d(D), ["(6,)", "(C, D)"]),
    "0-D weight": (lambda: nn.Parameter(torch.ones(())), ["()", "(C, D)"]),
    "3x3 convolution": (lambda: nn.Conv2d(D, C, 3), ["(5, 6, 3, 3)", "1x1"]),
    "integer weight": (lambda: WithBuffer(torch.ones(C, D, dtype=torch.int64)), ["int64", "float"]),
    "lazy": (lambda: nn.LazyLinear(C), ["uninitialized", "forward pass"]),
    "empty": (lambda: torch.empty(0, D), ["(0, 6)", "at least one class"]),
    "a name": (lambda: "fc", ["str", "module"]),
    "an optimizer": (lambda: torch.optim.SGD([torch.ones(1)], lr=1.0), ["SGD", "module"]),
    "None": (lambda: None, ["NoneType", "module"]),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name", BAD_CLASSIFIERS)
def test_modules_without_a_usable_weight(name: str) -> None:
    make, words = BAD_CLASSIFIERS[name]
    tracker = fed()
    for build in (
        spalign.Classifier,
        spalign.ClassMeanTracker.for_classifier,
        build_reg,
        lambda c: build_slerp(c, tracker),
        lambda c: build_proj(c, tracker),
    ):
        with pytest.raises(ValueError, match="expected") as info:
            build(make())
        for word in words:
            assert word in str(info.value)


def test_unknown_names_and_layouts_of_a_weight() -> None:
    fc = nn.Linear(D, C)
    with pytest.raises(ValueError, match=r"no attribute 'kernel'.*weight=\.\.\."):
        spalign.Classifier(fc, weight="kernel")
    with pytest.raises(ValueError, match=r"Linear\.bias has shape \(5,\)"):
        spalign.Classifier(fc, weight="bias")
    for wrong in (2, -1, "0", None):
        with pytest.raises(ValueError, match=rf"class_dim is {wrong!r}, expected 0.*1"):
            spalign.Classifier(fc, class_dim=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", FIXED)
@pytest.mark.parametrize("build", [build_slerp, build_proj])
def test_rotation_and_projection_refuse_a_fixed_classifier(kind: str, build: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"is fixed.*SpARegLoss.*align='features'"):
        build(FIXED[kind](torch.randn(C, D)), fed())


def test_align_options() -> None:
    fc = nn.Linear(D, C)
    with pytest.raises(ValueError, match=r"align is 'weights', expected 'both', 'classifier' or 'features'"):
        spalign.SpARegLoss(fc, align="weights")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"align='classifier'.*fixed.*align='features'"):
        spalign.SpARegLoss(torch.randn(C, D), align="classifier")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"alpha_max": -0.1}, "alpha_max is -0.1, expected a share of the angle in [0, 1]"),
        ({"alpha_max": 1.1}, "alpha_max is 1.1, expected a share of the angle in [0, 1]"),
        ({"alpha_max": float("nan")}, "alpha_max is nan"),
        ({"threshold": 1.01}, "threshold is 1.01, expected a cosine in [-1, 1]"),
        ({"threshold": -2.0}, "threshold is -2.0, expected a cosine in [-1, 1]"),
        ({"threshold": float("nan")}, "threshold is nan"),
        *(({"alpha_max": x}, f"alpha_max is {x!r}, expected a share of the angle in [0, 1]") for x in NOT_NUMBERS),
        *(({"threshold": x}, f"threshold is {x!r}, expected a cosine in [-1, 1]") for x in NOT_NUMBERS),
        *(({"total_steps": x}, f"total_steps is {x!r}, expected a positive integer") for x in ("5", None, [5])),
        ({"total_steps": 0}, "total_steps is 0, expected a positive integer"),
        ({"total_steps": -5}, "total_steps is -5"),
        ({"total_steps": 2.5}, "total_steps is 2.5"),
    ],
)
def test_slerp_arguments_out_of_range(arguments: dict[str, Any], words: str) -> None:
    fc, tracker = nn.Linear(D, C), fed()
    before, weight = state_of(tracker), fc.weight.detach().clone()
    with pytest.raises(ValueError, match=re.escape(words)):
        build_slerp(fc, tracker, **arguments)
    assert same_state(tracker, before)
    assert torch.equal(fc.weight, weight)


@pytest.mark.parametrize("make", [float, np.float32, np.float64, Fraction])
def test_numbers_of_every_type_are_taken_as_floats(make: Callable[[float], Any]) -> None:
    fc = nn.Linear(D, C)
    tracker = spalign.ClassMeanTracker(C, D, momentum=make(0.5), ignore_index=np.int64(255))
    slerp = build_slerp(fc, tracker, alpha_max=make(0.5), threshold=make(0.5))
    optimizer = spalign.SpAProj(torch.optim.SGD(fc.parameters(), lr=0.1), fc, tracker, gamma=make(0.5))
    for value in (tracker.momentum, slerp.alpha_max, slerp.threshold, optimizer.gamma):
        assert (type(value), value) == (float, 0.5)
    assert type(tracker.ignore_index) is int


@pytest.mark.parametrize("edges", [{"alpha_max": 0.0, "threshold": -1.0}, {"alpha_max": 1.0, "threshold": 1.0}])
def test_slerp_arguments_at_the_edges_are_accepted(edges: dict[str, float]) -> None:
    build_slerp(nn.Linear(D, C), fed(), **edges).step()


@pytest.mark.parametrize("state", [{}, {"last_step": -1}, {"last_step": 1.5}, {"last_step": "3"}, {"last_step": None}])
def test_slerp_refuses_a_bad_state_and_keeps_its_own(state: dict[str, Any]) -> None:
    slerp = build_slerp(nn.Linear(D, C), fed())
    slerp.step()
    with pytest.raises(ValueError, match=r"last_step = .*expected a count"):
        slerp.load_state_dict(state)
    assert slerp.last_step == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gamma": -0.1}, "gamma is -0.1, expected a share of the original gradient in [0, 1]"),
        ({"gamma": 1.5}, "gamma is 1.5, expected a share of the original gradient in [0, 1]"),
        ({"gamma": float("nan")}, "gamma is nan"),
        *(({"gamma": x}, f"gamma is {x!r}, expected a share of the original gradient in [0, 1]") for x in NOT_NUMBERS),
        ({"radial": "none"}, "radial is 'none', expected 'paper' or 'keep'"),
    ],
)
def test_projection_arguments_out_of_range_leave_the_optimizer_alone(arguments: dict[str, Any], words: str) -> None:
    fc, tracker = nn.Linear(D, C), fed()
    optimizer = torch.optim.SGD(fc.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=re.escape(words)):
        spalign.SpAProj(optimizer, fc, tracker, **{"gamma": 0.5, **arguments})
    assert not optimizer._optimizer_step_pre_hooks


def test_projection_wants_a_real_optimizer() -> None:
    """Pitfall A2: the wrapper of a trainer is no place for a hook."""

    class Prepared(torch.optim.Optimizer):
        """An optimizer that never ran ``Optimizer.__init__``, like Accelerate's."""

        def __init__(self) -> None:
            pass

    for wrong in (object(), Prepared(), None):
        with pytest.raises(ValueError, match=r"optimizer is a .*expected a torch\.optim\.Optimizer.*prepare"):
            spalign.SpAProj(wrong, nn.Linear(D, C), fed(), gamma=0.5)  # type: ignore[arg-type]


def test_projection_refuses_other_parametrizations() -> None:
    fc = nn.utils.parametrizations.spectral_norm(nn.Linear(D, C))
    with pytest.raises(ValueError, match=r"parametrized by _SpectralNorm.*SpARegLoss"):
        build_proj(fc, fed())


def test_one_of_features_and_targets_is_not_enough() -> None:
    spareg = spalign.SpARegLoss(nn.Linear(D, C))
    with pytest.raises(ValueError, match="go together"):
        spareg(H)
    with pytest.raises(ValueError, match="go together"):
        spareg(targets=Y)
    assert not spareg.tracker.seen.any()


def test_a_classifier_on_another_device_names_both_and_changes_nothing() -> None:
    """On the CPU the other device is meta."""
    fc = nn.Linear(D, C)
    tracker = fed()
    spareg, slerp = spalign.SpARegLoss(fc, tracker), build_slerp(fc, tracker)
    optimizer = spalign.SpAProj(torch.optim.SGD(fc.parameters(), lr=0.1), fc, tracker, gamma=0.5)
    before = state_of(tracker)
    fc.to("meta")
    words = r"the classifier is on meta but the class means on cpu.*\.to\('meta'\)"
    with pytest.raises(ValueError, match=words):
        spareg(H, Y)
    with pytest.raises(ValueError, match=words):
        spareg()
    with pytest.raises(ValueError, match=words):
        slerp.step()
    assert (slerp.last_step, slerp.alpha) == (0, 0.0)
    for p in fc.parameters():
        p.grad = torch.empty_like(p)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert same_state(tracker, before)


def test_a_failed_call_does_not_disturb_the_next() -> None:
    fc = nn.Linear(D, C)
    a, b = spalign.SpARegLoss(fc), spalign.SpARegLoss(fc)
    h, y = make_batch(1, 12, C, D)
    with pytest.raises(ValueError, match="label"):
        a(h, y + C)
    la, lb = a(h, y), b(h, y)
    la.backward()
    assert torch.equal(la, lb)
    assert same_state(a, state_of(b))


# ----------------------------------------------------------------------------------------------------------------------
# Functions of tensors: what broadcasts would give a wrong value, and what does not an error without a name
# ----------------------------------------------------------------------------------------------------------------------

RowFunction = Callable[..., object]
ROW_FUNCTIONS: dict[str, RowFunction] = {
    "alignment": functional.alignment,
    "alignment_loss": functional.alignment_loss,
    "alignment_loss_and_grad": functional.alignment_loss_and_grad,
    "slerp": partial(functional.slerp, alpha=0.5, threshold=0.5),
    "project_gradient": lambda w, *rest, **more: functional.project_gradient(w, w, *rest, gamma=0.5, **more),
    "directions": lambda w, *rest, **more: functional.directions(*rest, **more),
    "nc3": lambda *rest, center_D: spalign.metrics.nc3(*rest),
}
# What a function does not take cannot be wrong.
NOT_TAKEN = {"directions": "weight", "nc3": "center"}


@pytest.mark.parametrize("name", ROW_FUNCTIONS)
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight": torch.ones(D, C)}, f"mean_CD has shape .{C}, {D}., .*other tensors .{D}, {C}."),
        ({"weight": torch.ones(1, D)}, f"other tensors .1, {D}."),
        ({"mean": torch.ones(1, D)}, f"mean_CD has shape .1, {D}."),
        ({"mean": torch.ones(D)}, f"mean_CD has shape .{D},."),
        ({"seen": torch.ones(C)}, "dtype torch.float32"),
        ({"seen": torch.ones(1, dtype=torch.bool)}, "seen_C .1,."),
        ({"center": torch.ones(1)}, "center_D .1,."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_functions_refuse_rows_that_would_broadcast(name: str, changed: dict[str, torch.Tensor], words: str) -> None:
    given = {"weight": torch.ones(C, D), "mean": torch.ones(C, D), "seen": torch.ones(C) > 0, "center": torch.ones(D)}
    given |= changed
    refused = contextlib.nullcontext() if NOT_TAKEN.get(name) in changed else pytest.raises(ValueError, match=words)
    with refused:
        ROW_FUNCTIONS[name](given["weight"], given["mean"], given["seen"], center_D=given["center"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda rows: functional.slerp(*rows, alpha=1.5, threshold=0.5), "alpha is 1.5"),
        (lambda rows: functional.slerp(*rows, alpha=float("nan"), threshold=0.5), "alpha is nan"),
        (lambda rows: functional.project_gradient(rows[0], *rows, gamma=1.1), "gamma is 1.1"),
        (lambda rows: functional.cosine_schedule(1, 0, 0.2), "total_steps is 0"),
        (lambda rows: functional.global_mean(rows[1], torch.ones(C)), "expected .* bool for seen_C"),
    ],
)
def test_functions_refuse_values_out_of_range(call: Callable[[Any], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call((torch.ones(C, D), torch.ones(C, D), torch.ones(C) > 0))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"features": torch.ones(4, D + 1)}, f"features have shape .4, {D + 1}."),
        ({"features": torch.ones(4, D).long()}, "dtype torch.int64, expected .* float dtype"),
        ({"features": torch.ones(4, D, 2)}, "dense predictions"),
        ({"targets": torch.zeros(3).long()}, "targets have shape .3,."),
        ({"targets": torch.zeros(4, 1).long()}, "targets have shape .4, 1."),
        ({"targets": torch.zeros(4, 1)}, f"expected .4, {C}.: class indices"),
        ({"targets": torch.zeros(4) > 0}, "torch.bool"),
        ({"weight": torch.zeros(1)}, "weight_C .1,."),
        ({"mean": torch.zeros(D)}, f"mean_CD has shape .{D},."),
        ({"total": torch.zeros(1, dtype=torch.float64)}, "mean_sum_D .1,."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_functions_refuse_batches_and_change_nothing(changed: dict[str, torch.Tensor], words: str) -> None:
    given = {"mean": torch.zeros(C, D), "weight": torch.zeros(C), "total": torch.zeros(D).double()}
    given |= {"features": torch.ones(4, D), "targets": torch.zeros(4).long()} | changed
    state = given["mean"], given["weight"], given["total"]
    with pytest.raises(ValueError, match=words):
        functional.update_class_means_(*state[:2], given["features"], given["targets"], mean_sum_D=state[2])
    assert all(not tensor.any() for tensor in state)
    if "features" not in changed and "targets" not in changed:
        return
    if given["features"].shape != (4, D + 1):  # of which any width will do
        with pytest.raises(ValueError, match="expected"):
            functional.class_statistics(given["features"], given["targets"], C)
        with pytest.raises(ValueError, match="expected"):
            spalign.metrics.class_moments(given["features"], given["targets"], C)
