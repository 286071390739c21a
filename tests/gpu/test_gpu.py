"""What only a CUDA device can show: no sync, CUDA graphs, determinism, half precision, mixed devices."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems import HEADS, head_on, make_batch, make_problem, same_state, state_of
from torch import Tensor, nn

import spalign
from spalign import functional as F

# Setting the mode in which waits raise warns of a prototype.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode")]

DEVICE = "cuda"
C, D, N = 10, 16, 64


class Setup:
    """A small model on the device with everything attached."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(1)
        self.encoder, self.fc = nn.Linear(8, D).to(DEVICE), nn.Linear(D, C).to(DEVICE)
        self.parameters = [*self.encoder.parameters(), *self.fc.parameters()]
        self.tracker = spalign.ClassMeanTracker.for_classifier(self.fc)
        self.spareg = spalign.SpARegLoss(self.fc, self.tracker)
        inner = torch.optim.SGD(self.parameters, lr=0.1, momentum=0.9, **options)
        self.optimizer = spalign.SpAProj(inner, self.fc, self.tracker, gamma=0.3)
        self.slerp = spalign.SpASlerp(self.fc, self.tracker, total_steps=10, alpha_max=0.2, threshold=0.9)

    def loss(self, x: Tensor, y: Tensor, targets: Tensor) -> Tensor:
        h = torch.tanh(self.encoder(x))
        loss: Tensor = nn.functional.cross_entropy(self.fc(h), y) + 0.5 * self.spareg(h, targets)
        return loss

    def step(self, x: Tensor, y: Tensor, targets: Tensor | None = None) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        self.loss(x, y, y if targets is None else targets).backward()
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters] + list(state_of(self.tracker).values())


def batch(seed: int) -> tuple[Tensor, Tensor]:
    x, y = make_batch(seed, N, C, 8)
    return x.to(DEVICE), y.to(DEVICE)


@pytest.fixture
def no_sync() -> Iterator[Callable[[], None]]:
    """Return a function from which on any wait for the device raises, until the test ends."""

    def start() -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield start
    torch.cuda.set_sync_debug_mode("default")


def test_a_full_step_never_waits_for_the_device(no_sync: Callable[[], None]) -> None:
    """Pitfall D1: update, loss forward and projection, rotation; hard, ignored, soft and dense labels."""
    s = Setup()
    x, y = batch(1)
    ignored = torch.where(y == 3, -100, y)
    q = torch.softmax(torch.randn(N, C, device=DEVICE), 1)
    dense_h = torch.randn(4, D, 3, 5, device=DEVICE, requires_grad=True)
    dense_y = torch.randint(0, C, (4, 3, 5), device=DEVICE)

    def everything() -> None:
        for targets in (y, ignored, q):
            s.step(x, y, targets)
        s.spareg(dense_h, dense_y).backward()
        s.tracker.update(dense_h, dense_y)
        s.slerp.step()
        s.tracker.directions()
        s.spareg.eval()
        s.spareg()
        s.spareg.train()

    everything()  # libraries wait when they are first used
    no_sync()
    everything()


@pytest.mark.parametrize("kind", HEADS)
def test_rotation_and_projection_of_every_head_never_wait(kind: str, no_sync: Callable[[], None]) -> None:
    """Pitfall D1."""
    classifier, parameters = head_on(DEVICE, kind, C, D)
    tracker = spalign.ClassMeanTracker.for_classifier(classifier)
    h, y = make_batch(1, N, C, D)
    tracker.update(h.to(DEVICE), y.to(DEVICE))
    optimizer = spalign.SpAProj(torch.optim.SGD(parameters, lr=0.1), classifier, tracker, gamma=0.3)
    slerp = spalign.SpASlerp(classifier, tracker, total_steps=2, alpha_max=0.2, threshold=0.9)

    def everything() -> None:
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        slerp.step()

    everything()
    no_sync()
    everything()


@pytest.mark.filterwarnings("ignore:The AccumulateGrad")  # warming up on another stream, as torch's manual has it
def test_captured_step_replays_as_eager() -> None:
    """Pitfall D9: update, loss, backward and projected step in one CUDA graph."""
    eager, graphed = Setup(), Setup()
    x, y = (t.clone() for t in batch(0))
    start = [p.detach().clone() for p in graphed.parameters]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            graphed.step(x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step(x, y)
    with torch.no_grad():
        for p, old in zip(graphed.parameters, start, strict=True):
            p.copy_(old)
        for state in graphed.optimizer.state.values():
            state["momentum_buffer"].zero_()
    graphed.tracker.reset()

    for seed in range(10):
        new_x, new_y = batch(seed)
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        eager.step(new_x, new_y)
    for a, b in zip(graphed.state(), eager.state(), strict=True):
        # Atomic additions arrive in any order; ten steps pass the rounding on.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_captured_rotation_takes_a_new_alpha_at_each_replay() -> None:
    """Pitfall D9: a Python number would be baked in."""
    p = make_problem(1, num_classes=C, dim=D, dtype=torch.float32)
    w, mean, seen = (t.to(DEVICE) for t in p[:3])
    alpha = torch.full((), 0.1, device=DEVICE)
    F.slerp(w, mean, seen, alpha=alpha, threshold=0.9)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = F.slerp(w, mean, seen, alpha=alpha, threshold=0.9).weight
    for value in (0.0, 0.3, 1.0):
        alpha.fill_(value)
        graph.replay()
        want = F.slerp(w, mean, seen, alpha=value, threshold=0.9).weight
        # The scalar enters in float32 or as a Python number: a rounding.
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_deterministic_algorithms(soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall D5: nothing raises, and two runs are bit-equal."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for where matrices are multiplied

    def run() -> list[Tensor]:
        s = Setup()
        for seed in range(5):
            x, y = batch(seed)
            s.step(x, y, torch.softmax(x.repeat(1, 2)[:, :C], 1) if soft else y)
        s.slerp.step()
        return s.state()

    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_mixed_devices_raise_an_error_that_names_both_and_the_fix() -> None:
    tracker = spalign.ClassMeanTracker(C, D)
    before = state_of(tracker)
    h, y = make_batch(1, N, C, D)
    for features, targets, what in ((h.to(DEVICE), y.to(DEVICE), "features"), (h, y.to(DEVICE), "targets")):
        with pytest.raises(ValueError, match=rf"{what} are on cuda:0 but the class means on cpu.*\.to\('cuda:0'\)"):
            tracker.update(features, targets)
    fc = nn.Linear(D, C).to(DEVICE)
    spareg = spalign.SpARegLoss(fc, tracker)
    slerp = spalign.SpASlerp(fc, tracker, total_steps=1, alpha_max=0.1, threshold=0.9)
    for call in (spareg, slerp.step):
        with pytest.raises(ValueError, match=r"classifier is on cuda:0 but the class means on cpu"):
            call()
    assert same_state(tracker, before)
    spareg.to(DEVICE)
    spareg(h.to(DEVICE), y.to(DEVICE))


def test_for_classifier_and_moves_follow_the_device() -> None:
    fc = nn.Linear(D, C).to(DEVICE)
    tracker = spalign.ClassMeanTracker.for_classifier(fc)
    assert all(b.is_cuda for b in tracker.buffers())
    y = batch(1)[1]
    tracker.update(torch.randn(N, D, device=DEVICE), y)
    tracker.half().cpu().to(DEVICE)
    assert tracker.mean.dtype == torch.float32
    tracker.update(torch.randn(N, D, device=DEVICE, dtype=torch.float16), y)


def test_labels_out_of_range_change_nothing_and_kill_no_context() -> None:
    """Pitfall D2: an out-of-range index would be an assertion on the device."""
    tracker = spalign.ClassMeanTracker(C, D, device=DEVICE)
    tracker.update(torch.randn(N, D, device=DEVICE), torch.arange(N, device=DEVICE) % C)
    before = state_of(tracker)
    bad = torch.tensor([C, C + 1000, -1, -100, 2**40], device=DEVICE)
    tracker.update(torch.randn(5, D, device=DEVICE), bad)
    torch.cuda.synchronize()
    assert same_state(tracker, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_training_with_grad_scaler(dtype: torch.dtype) -> None:
    """Pitfalls A4, D4: fused SGD under a scaler; state float32; losses close to those of float32."""
    plain, cast = Setup(), Setup(fused=True)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, enabled=dtype == torch.float16)
    for seed in range(5):
        x, y = batch(seed)
        plain.step(x, y)
        cast.optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype):
            loss = cast.loss(x, y, y)
        scaler.scale(loss).backward()
        scaler.step(cast.optimizer)
        scaler.update()
    assert cast.tracker.mean.dtype == torch.float32
    for a, b in zip(cast.state(), plain.state(), strict=True):
        # Features and logits carry 8 or 11 bits; five steps of 0.1 pass that on.
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
    before = [p.detach().clone() for p in cast.parameters]
    if dtype == torch.float16:
        cast.optimizer.zero_grad()
        scaler.scale(cast.loss(*batch(9), batch(9)[1]) * torch.inf).backward()
        scaler.step(cast.optimizer)
        scaler.update()
        assert all(torch.equal(a, b) for a, b in zip(cast.parameters, before, strict=True))


def test_results_equal_the_reference() -> None:
    """TF32 or atomics aside, the device computes what the loops say."""
    p = make_problem(1, num_classes=C, dim=D, dtype=torch.float32)
    nw, nmean, nseen, ng = p.numpy()
    w, mean, seen, g = (t.to(DEVICE) for t in p)
    close: dict[str, Any] = {"rtol": 2e-5, "atol": 5e-6}  # float32 sums of 16 terms
    center = torch.from_numpy(reference.global_mean(nmean, nseen)).float().to(DEVICE)
    for given in (None, center):
        loss, grad = F.alignment_loss_and_grad(w, mean, seen, center_D=given)
        np.testing.assert_allclose(loss.item(), reference.alignment_loss(nw, nmean, nseen), **close)
        np.testing.assert_allclose(grad.cpu().numpy(), reference.alignment_loss_grad_weight(nw, nmean, nseen), **close)
        projected = F.project_gradient(g, w, mean, seen, gamma=0.3, center_D=given)
        want = reference.project_gradient(ng, nw, nmean, nseen, 0.3)
        np.testing.assert_allclose(projected.cpu().numpy(), want, **close)
    new = F.slerp(w, mean, seen, alpha=0.3, threshold=1.0).weight
    np.testing.assert_allclose(new.cpu().numpy(), reference.slerp(nw, nmean, nseen, 0.3, 1.0), **close)
    h, y = make_batch(1, N, C, D)
    for targets in (y, torch.softmax(h[:, :C], 1)):
        tracker = spalign.ClassMeanTracker(C, D, device=DEVICE)
        tracker.update(h.to(DEVICE), targets.to(DEVICE))
        start = np.zeros((C, D)), np.zeros(C)
        want, _ = reference.update_class_means(*start, h.double().numpy(), targets.numpy(), 0.1)
        np.testing.assert_allclose(tracker.mean.cpu().numpy(), want, **close)


@pytest.mark.gpu(real=True)
def test_inductor_on_the_device() -> None:
    """The fused kernels of the compiled functionals give the eager numbers."""
    p = make_problem(1, num_classes=C, dim=D, dtype=torch.float32)
    w, mean, seen, g = (t.to(DEVICE) for t in p)

    def run(w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        loss, grad = F.alignment_loss_and_grad(w, mean, seen)
        return loss, grad, F.project_gradient(g, w, mean, seen, gamma=0.3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        got = torch.compile(run, fullgraph=True)(w, g)
    for a, b in zip(got, run(w, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # another order of sums


def test_ranks_that_repeat_each_other_s_update_hold_the_same_bits() -> None:
    """B8: every rank takes in a gathered batch; a class's samples, added in any order, would let ranks drift."""
    h, y = make_batch(0, 4096, 3, D)
    states = []
    for _ in range(5):
        tracker = spalign.ClassMeanTracker(5000, D, device=DEVICE)
        for momentum in (0.1, None):
            whole = F._parse_batch(h.to(DEVICE), y.to(DEVICE), 5000, -1, torch.float32)
            state = (tracker.mean, tracker.weight, whole)
            F._update_from_rows_(*state, y.to(DEVICE), momentum, tracker.mean_sum, same_bits=True)
        states.append(state_of(tracker))
    for other in states[1:]:
        for name, value in states[0].items():
            assert torch.equal(other[name], value), name
