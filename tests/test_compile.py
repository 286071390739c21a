"""``torch.compile(fullgraph=True)`` takes every functional, and the result is the eager one.

Most tests compile with backends that run the traced graph as it is, so results are bit-equal to eager ones; inductor,
which is slow to compile, is tried once.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import HEADS, Problem, make_batch, make_problem, same_state, state_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import spalign
from spalign import functional as F

# The tracer and inductor use deprecated parts of torch themselves.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

C, D, N = 5, 6, 12


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def compiled(function: Callable[..., Any], backend: Any = "eager") -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend)


def problem() -> Problem:
    return make_problem(1, num_classes=C, dim=D, dtype=torch.float32)


def loss_and_grads(w: Tensor, mean: Tensor, seen: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return F.alignment_loss(w, mean, seen), F.alignment_loss(w, mean, seen, center_D=F.global_mean(mean, seen))


def feature_loss(w: Tensor, mean: Tensor, seen: Tensor, g: Tensor) -> Tensor:
    mean, weight = mean.detach().clone(), seen.float()
    share = F.update_class_means_(mean, weight, g.detach(), torch.arange(C))
    return F.alignment_loss(w, mean, weight > 0, features=g, share=share)


def soft(g: Tensor) -> Tensor:
    return torch.softmax(3 * g.detach()[:, :C], 1)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Any]] = {
    "class_statistics hard": lambda w, m, s, g: F.class_statistics(g, torch.arange(C), C),
    "class_statistics soft": lambda w, m, s, g: F.class_statistics(g, soft(g), C),
    "update_class_means hard": lambda w, m, s, g: F.update_class_means(m, s.float(), g, torch.arange(C)),
    "update_class_means soft": lambda w, m, s, g: F.update_class_means(m, s.float(), g, soft(g), momentum=None),
    "global_mean": lambda w, m, s, g: F.global_mean(m, s),
    "directions": lambda w, m, s, g: F.directions(m, s),
    "alignment": lambda w, m, s, g: F.alignment(w, m, s),
    "alignment_loss": loss_and_grads,
    "alignment_loss by features": feature_loss,
    "alignment_loss_and_grad": lambda w, m, s, g: F.alignment_loss_and_grad(w, m, s),
    "slerp": lambda w, m, s, g: F.slerp(w, m, s, alpha=0.3, threshold=0.9),
    "project_gradient paper": lambda w, m, s, g: F.project_gradient(g, w, m, s, gamma=0.3),
    "project_gradient keep": lambda w, m, s, g: F.project_gradient(g, w, m, s, gamma=0.3, radial="keep"),
}


def flat(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [t for part in x for t in flat(part)]


def value_and_grads(function: Callable[..., Any], p: Problem) -> list[Tensor]:
    """Return the results, and the gradients of their sum by the weight, the means and the features, where there are."""
    w, mean, g = (x.clone().requires_grad_() for x in (p.w, p.mean, p.g))
    out = flat(function(w, mean, p.seen, g))
    scalars = [x.sum() for x in out if x.requires_grad]
    grads = torch.autograd.grad(sum(scalars), (w, mean, g), allow_unused=True) if scalars else ()  # type: ignore[arg-type]
    return [x.detach() for x in (*out, *grads) if x is not None]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_functionals_compile_whole_and_equal_eager(name: str, backend: str) -> None:
    function = FUNCTIONS[name]
    want, got = value_and_grads(function, problem()), value_and_grads(compiled(function, backend), problem())
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_in_place_update_compiles_whole(momentum: float | None, backend: str) -> None:
    """Every buffer moves, the running sums too: a tracer that drops a mutation would go unnoticed for long."""

    def run(function: Callable[..., Any]) -> list[Tensor]:
        state = spalign.ClassMeanTracker(C, D)
        for seed in range(3):
            h, y = make_batch(seed, N, C, D)
            function(state.mean, state.weight, h, y, momentum=momentum, mean_sum_D=state.mean_sum)
        return [state.mean, state.weight, state.mean_sum]

    for a, b in zip(run(compiled(F.update_class_means_, backend)), run(F.update_class_means_), strict=True):
        assert torch.equal(a, b)


def test_a_schedule_passed_as_a_tensor_does_not_recompile() -> None:
    p = problem()
    counter = CompileCounter()
    function = compiled(lambda w, alpha: F.slerp(w, p.mean, p.seen, alpha=alpha, threshold=0.9).weight, counter)
    for t in range(1, 6):
        alpha = torch.tensor(F.cosine_schedule(t, 5, 0.3))
        got = function(p.w, alpha)
        assert torch.equal(got, F.slerp(p.w, p.mean, p.seen, alpha=alpha, threshold=0.9).weight)
    assert counter.frame_count == 1


def test_batches_of_other_sizes_recompile_at_most_once() -> None:
    """The second size makes the batch dimension dynamic; no later one costs anything."""
    counter = CompileCounter()
    function = compiled(lambda h, y: F.class_statistics(h, y, C), counter)
    for n in (8, 9, 17, 33):
        function(*make_batch(n, n, C, D))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("align", "backend"),
    [("both", "eager"), ("features", "eager"), ("both", "aot_eager"), ("features", "aot_eager"), ("both", "inductor")],
)
def test_a_whole_training_step_compiles(backend: str, align: spalign.reg.Align) -> None:
    """Model, main loss, tracker update and regularizer in one graph, forward and backward.

    Written out in the graph, the update was taken in twice by gradients that the partitioner recomputed in backward.
    """

    def train(compile_it: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        torch.manual_seed(1)
        encoder, fc = nn.Linear(4, D), nn.Linear(D, C)
        spareg = spalign.SpARegLoss(fc, align=align)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            h = torch.tanh(encoder(x))
            out: Tensor = nn.functional.cross_entropy(fc(h), y) + 0.5 * spareg(h, y)
            return out

        step = compiled(loss, backend) if compile_it else loss
        parameters = [*encoder.parameters(), *fc.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            step(*make_batch(seed, N, C, 4)).backward()
            optimizer.step()
        return [p.detach() for p in parameters], state_of(spareg.tracker)

    (want, want_state), (got, got_state) = train(False), train(True)
    for a, b in zip(got, want, strict=True):
        # The compiled graph may add gradients of a shared input in another order.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for name in want_state:
        torch.testing.assert_close(got_state[name], want_state[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", ["hard", "soft", "dense"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_tracker_update_compiles_whole(targets: str, backend: str) -> None:
    a, b = spalign.ClassMeanTracker(C, D), spalign.ClassMeanTracker(C, D)
    update = compiled(a.update, backend)
    for seed in range(2):
        h, y = make_batch(seed, N, C, D)
        batch: tuple[Tensor, Tensor] = (h, y)
        if targets == "soft":
            batch = (h, torch.softmax(h[:, :C], 1))
        if targets == "dense":
            batch = (h.reshape(2, 6, D).movedim(-1, 1), y.reshape(2, 6))
        update(*batch)
        b.update(*batch)
    assert same_state(a, state_of(b))


@pytest.mark.parametrize("kind", HEADS)
def test_projected_step_compiles(kind: str) -> None:
    """Pitfall A19: hooks are traced, and no counter in them makes the step compile again."""

    def train(compile_it: bool) -> list[Tensor]:
        head = HEADS[kind](problem().w)
        tracker = spalign.ClassMeanTracker.for_classifier(head.classifier)
        tracker.update(*make_batch(1, N, C, D))
        inner = torch.optim.SGD(head.parameters, lr=0.1)
        optimizer = spalign.SpAProj(inner, head.classifier, tracker, gamma=0.3)
        counter = CompileCounter()
        step = torch.compile(optimizer.step, backend=counter) if compile_it else optimizer.step
        frames = []
        for seed in range(4):
            rng = torch.Generator().manual_seed(seed)
            for p in head.parameters:
                p.grad = torch.randn(p.shape, generator=rng)
            step()
            frames.append(counter.frame_count)
        assert frames[-1] == frames[0], "compiled again"  # without momentum a plain step is compiled once, too
        return [p.detach() for p in head.parameters]

    # Bit-equal in newer versions; torch 2.6 fuses the optimizer's own arithmetic in another order.
    for a, b in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_capture_records_in_a_compiled_model_if_attached_first() -> None:
    """Pitfall D10; after the first call hooks never fire, and reading says so."""
    model = nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, C))
    features = spalign.FeatureCapture(model[2])
    fast = torch.compile(model, backend="eager")
    x = torch.randn(3, 4)
    for _ in range(2):
        fast(x)
        assert torch.equal(features(), model[:2](x))
    late_model = nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, C))
    late_fast = torch.compile(late_model, backend="eager")
    late_fast(x)
    late = spalign.FeatureCapture(late_model[2])
    late_fast(x)
    try:
        assert torch.equal(late(), late_model[:2](x))  # a torch that guards on hooks
    except RuntimeError as error:
        assert "before the first compiled call" in str(error)  # noqa: PT017


def test_inductor_equals_eager() -> None:
    """The row functions at once, an unseen class and a bfloat16 gradient included; fused kernels sum in another order.

    One compilation for all: it takes seconds.
    """
    p = make_problem(1, num_classes=20, dim=33, unseen=(2, 7), dtype=torch.float32)

    mean, seen = p.mean, p.seen  # torch 2.6 does not trace attributes of a named tuple that a closure holds

    def rows(w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        loss, grad = F.alignment_loss_and_grad(w, mean, seen)
        new, rotated, _ = F.slerp(w, mean, seen, alpha=0.3, threshold=0.1)
        keep = F.project_gradient(g, w, mean, seen, gamma=0.3, radial="keep")
        paper = F.project_gradient(g, w, mean, seen, gamma=0.3)
        return loss, grad, new, rotated, keep, paper, F.directions(mean, seen)

    g = p.g.bfloat16()
    for a, b in zip(compiled(rows, "inductor")(p.w, g), rows(p.w, g), strict=True):
        assert a.dtype == b.dtype
        # One rounding of the output may fall the other way.
        eps = torch.finfo(torch.bfloat16).eps if a.dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(a, b, rtol=1e-5 + eps, atol=1e-6)


def test_projected_step_under_inductor() -> None:
    """The projection, written into the gradient, and the optimizer's in-place update in one graph of kernels."""

    def train(compile_it: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        head = nn.Linear(D, C)
        tracker = spalign.ClassMeanTracker.for_classifier(head)
        tracker.update(*make_batch(1, N, C, D))
        optimizer = spalign.SpAProj(torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9), head, tracker, gamma=0.3)
        step = torch.compile(optimizer.step) if compile_it else optimizer.step
        for seed in range(3):
            rng = torch.Generator().manual_seed(seed)
            for p in head.parameters():
                p.grad = torch.randn(p.shape, generator=rng)
            step()
        return head.weight.detach(), tracker.mean

    for a, b in zip(train(True), train(False), strict=True):
        # Fused kernels sum in another order.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
