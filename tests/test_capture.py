"""FeatureCapture: what it records, when, and that it holds nothing longer than it must."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spalign


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def test_records_the_input_of_the_classifier_in_its_graph() -> None:
    net = model()
    features = spalign.FeatureCapture(net[2])
    x = torch.randn(5, 4)
    net(x)
    h = features()
    assert torch.equal(h, net[1](net[0](x)))
    (grad,) = torch.autograd.grad(h.sum(), next(net.parameters()))
    assert grad.any()


def test_two_forward_passes_are_concatenated_in_order() -> None:
    net = model()
    features = spalign.FeatureCapture(net[2])
    a, b = torch.randn(5, 4), torch.randn(3, 4)
    net(a)
    net(b)
    h = features()
    assert torch.equal(h, torch.cat([net[:2](a), net[:2](b)]))


def test_reading_releases_and_reading_again_raises() -> None:
    net = model()
    features = spalign.FeatureCapture(net[2])
    net(torch.randn(5, 4))
    h = features()
    gone = weakref.ref(h)
    with pytest.raises(RuntimeError, match=r"no features were captured.*forward pass.*compiled"):
        features()
    del h
    gc.collect()
    assert gone() is None


def test_nothing_is_recorded_in_evaluation_or_without_gradients() -> None:
    net = model()
    features = spalign.FeatureCapture(net[2])
    net.eval()(torch.randn(5, 4))
    with pytest.raises(RuntimeError, match="no features"):
        features()
    net.train()
    net(torch.randn(2, 4))
    assert features().shape == (2, 8)


def test_keyword_input() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8))

        def forward(self, *, hidden: Tensor) -> Tensor:
            return hidden @ self.weight.t()

    head = Head()
    features = spalign.FeatureCapture(head)
    head(hidden=torch.ones(2, 8))
    assert features().shape == (2, 8)


def test_dense_shapes_come_out_as_the_tracker_takes_them() -> None:
    linear, conv = nn.Linear(8, 3), nn.Conv2d(8, 3, 1)
    tokens, pixels = spalign.FeatureCapture(linear), spalign.FeatureCapture(conv)
    x = torch.randn(2, 5, 8)
    linear(x)
    h = tokens()
    assert torch.equal(h, x.movedim(-1, 1))
    spalign.ClassMeanTracker.for_classifier(linear).update(h, torch.zeros(2, 5, dtype=torch.int64))
    conv(torch.randn(2, 8, 4, 6))
    h = pixels()
    assert h.shape == (2, 8, 4, 6)
    spalign.ClassMeanTracker.for_classifier(conv).update(h, torch.zeros(2, 4, 6, dtype=torch.int64))


def test_adapter_names_the_module() -> None:
    fc = nn.Linear(8, 3)
    features = spalign.FeatureCapture(spalign.Classifier(fc))
    fc(torch.ones(2, 8))
    assert features().shape == (2, 8)


def test_remove_stops_and_releases() -> None:
    net = model()
    features = spalign.FeatureCapture(net[2])
    net(torch.randn(5, 4))
    features.remove()
    assert not net[2]._forward_pre_hooks
    with pytest.raises(RuntimeError, match="no features"):
        features()
    net(torch.randn(5, 4))
    with pytest.raises(RuntimeError, match="no features"):
        features()


def test_forgetting_to_read_raises_before_memory_runs_out() -> None:
    fc = nn.Linear(8, 3)
    features = spalign.FeatureCapture(fc)

    def forget() -> None:
        for _ in range(1000):
            fc(torch.ones(1, 8))

    with pytest.raises(RuntimeError, match=r"none read"):
        forget()
    fc(torch.ones(1, 8))
    assert len(features()) == 1


def test_bare_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Parameter, expected a module"):
        spalign.FeatureCapture(nn.Parameter(torch.ones(3, 8)))


def test_copy_of_the_model_records_for_itself() -> None:
    net = model()
    features = spalign.FeatureCapture(net[2])
    net(torch.randn(5, 4))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other(torch.randn(7, 4))
        other(torch.randn(7, 4))
        hook: Any = next(iter(other[2]._forward_pre_hooks.values()))
        own = hook.__self__
        assert isinstance(own, spalign.FeatureCapture)
        assert own is not features
        assert len(own()) == 14, "the copy starts with nothing pending"
        own.remove()
        assert not other[2]._forward_pre_hooks
    assert len(features()) == 5
    assert len(net[2]._forward_pre_hooks) == 1


def test_shared_head_called_twice_and_the_loss_of_a_two_view_step() -> None:
    net = model()
    features, spareg = spalign.FeatureCapture(net[2]), spalign.SpARegLoss(net[2])
    y = torch.tensor([0, 1, 2])
    logits = torch.cat([net(torch.randn(3, 4)), net(torch.randn(3, 4))])
    targets = torch.cat([y, y])
    loss = nn.functional.cross_entropy(logits, targets) + spareg(features(), targets)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    assert all(g.any() for g in grads)


def test_a_custom_convolution_has_its_features_second() -> None:
    """Its weight says so, where there is no kernel_size; with as many columns as features nothing else would notice."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.conv2d(x, self.weight)

    head = Head()
    features = spalign.FeatureCapture(head)
    x = torch.randn(2, 5, 5, 5)
    head(x)
    assert torch.equal(features(), x)


def test_a_linear_layer_has_its_features_last_where_fsdp1_has_flattened_its_weight() -> None:
    fc = nn.Linear(8, 3)
    weight, fc.weight = fc.weight, nn.Parameter(torch.randn(24))
    features = spalign.FeatureCapture(fc)
    fc.weight = weight  # as in a forward pass
    x = torch.randn(2, 5, 8)
    fc(x)
    assert torch.equal(features(), x.movedim(-1, 1))


def test_a_copied_model_that_nobody_reads_is_named() -> None:
    net = model()
    spalign.FeatureCapture(net[2])
    teacher = copy.deepcopy(net)

    def forget() -> None:
        for _ in range(100):
            teacher(torch.ones(1, 4))

    with pytest.raises(RuntimeError, match=r"a copy of a model copies its capture: run the copy under torch\.no_grad"):
        forget()
    with torch.no_grad():
        for _ in range(100):
            teacher(torch.ones(1, 4))
