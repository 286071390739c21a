"""What the tests of this folder run: in their own process, on two ranks and on four, to compare what is found.

Run as ``python rank_parts.py FOLDER``, which leaves there what every rank found. A part returns tensors and notes by
name. Alone it gets whole batches; as one of several ranks, its share of them. Names that start with ``local`` may
differ between ranks.

Shapes: N samples of the whole batch, C classes, D feature dimensions; C = 3 divides by neither 2 nor 4.
"""

import contextlib
import copy
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo  # DDP does, in every process
import torch.distributed as dist
from problems import make_batch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import spalign

C, D, N, WIDTH = 3, 4, 12, 5
MANY = 40
"""Classes enough for four ranks to gather N samples each rather than to reduce class sums."""

SPLITS: dict[int, dict[str, tuple[int, ...]]] = {
    2: {"even": (6, 6), "uneven": (7, 5), "single": (11, 1), "empty": (12, 0), "first empty": (0, 12)},
    4: {
        "even": (3, 3, 3, 3),
        "uneven": (5, 1, 4, 2),
        "single": (1, 9, 1, 1),
        "empty": (5, 0, 7, 0),
        "first empty": (0, 0, 0, 12),
    },
}
"""How many samples of a batch each rank gets."""

Results = dict[str, Any]
Found = dict[int, list[dict[str, Results]]]
"""What each rank found, by number of ranks and by part."""

# On the CPU, torch 2.6 raises inside FSDP2.
FSDP_ON_CPU = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)


class Part(NamedTuple):
    """A part, and where it runs."""

    run: Callable[..., Results]
    worlds: tuple[int, ...]
    sharded: bool


PARTS: dict[str, Part] = {}


def part(*worlds: int, sharded: bool = False) -> Callable[[Callable[..., Results]], Callable[..., Results]]:
    """Register a part to run on so many ranks; 1 is the process of the tests. ``sharded`` marks those with FSDP2."""

    def register(run: Callable[..., Results]) -> Callable[..., Results]:
        PARTS[run.__name__] = Part(run, worlds, sharded)
        return run

    return register


class Net(nn.Module):
    """An encoder and a head; returns features and logits."""

    def __init__(self, dtype: torch.dtype = torch.float64, num_classes: int = C, seed: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Linear(WIDTH, D, dtype=dtype)
        self.fc = nn.Linear(D, num_classes, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits."""
        h = torch.tanh(self.encoder(x))
        return h, self.fc(h)


class NetWithTerm(Net):
    """The regularizer inside the model, where DDP broadcasts its buffers before each forward pass."""

    def __init__(self, dtype: torch.dtype, num_classes: int, batch_size: int | None) -> None:
        super().__init__(dtype, num_classes)
        self.spareg = make_term(self, dtype, batch_size)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits and the term."""
        h, logits = super().forward(x)
        term: Tensor = self.spareg(h, y)
        return logits, term


def make_term(
    net: Net, dtype: torch.dtype, batch_size: int | None = None, align: spalign.reg.Align = "both"
) -> spalign.SpARegLoss:
    """Return the regularizer of a net with a tracker of its own in ``dtype``."""
    tracker = spalign.ClassMeanTracker.for_classifier(net.fc, batch_size=batch_size)
    return spalign.SpARegLoss(net.fc, tracker.double() if dtype is torch.float64 else tracker, align=align)


def batch(
    step: int, width: int = WIDTH, dtype: torch.dtype = torch.float64, num_classes: int = C
) -> tuple[Tensor, Tensor]:
    """Return the whole batch of a step."""
    return make_batch(step, N, num_classes, width, dtype)


def share(x: Tensor, rank: int, world: int, split: str = "even") -> Tensor:
    """Return a rank's samples of a batch."""
    return x if world == 1 else x.split(SPLITS[world][split])[rank]


def main_loss(logits: Tensor, y: Tensor, world: int) -> Tensor:
    """Return cross-entropy whose average over ranks is that of the whole batch, whatever the split."""
    return nn.functional.cross_entropy(logits, y, reduction="sum") * (world / N)


def gather(x: Tensor) -> Tensor:
    """Return the whole of what may be sharded, as a copy."""
    return spalign.distributed.full_tensor(x.detach()).clone()


def gradients(net: nn.Module, name: str, world: int = 1) -> Results:
    """Return the gradient of each parameter; averaged over ``world`` ranks where nothing else has done so."""
    out: Results = {}
    for key, p in net.named_parameters():
        grad = gather(torch.zeros_like(p) if p.grad is None else p.grad)
        if world > 1:
            dist.all_reduce(grad)
            grad /= world
        out[f"{name} gradient {key}"] = grad
    return out


def parameters(net: nn.Module, name: str) -> Results:
    """Return each parameter."""
    return {f"{name} {key}": gather(p) for key, p in net.named_parameters()}


def state(tracker: spalign.ClassMeanTracker, name: str) -> Results:
    """Return each buffer of a tracker."""
    return {f"{name} {key}": value.clone() for key, value in tracker.named_buffers()}


WAYS = {"reduce": (C, None), "gather": (MANY, N)}
"""Number of classes and announced batch size that make ranks reduce class sums or gather features."""


def check_way(tracker: spalign.ClassMeanTracker, world: int, way: str) -> None:
    """Make sure that a part tests the way it is named after."""
    exchange = spalign.distributed.Exchange.cheapest(
        tracker.mean, group="", ranks=world, batch_size=tracker.batch_size, feature_dtype=tracker.feature_dtype
    )
    assert bool(exchange.rows) == (way == "gather")


# ----------------------------------------------------------------------------------------------------------------------
# Class means
# ----------------------------------------------------------------------------------------------------------------------


@part(1, 2, 4)
def means(rank: int, world: int, folder: Path) -> Results:
    """C1, C2, C5: uneven and empty parts, ignored labels, soft labels, an infinite feature, dense predictions."""
    out: Results = {}
    for way, (num_classes, batch_size) in WAYS.items():
        for momentum in (None, 0.1):
            tracker = spalign.ClassMeanTracker(num_classes, D, momentum=momentum, batch_size=batch_size).double()
            if world > 1:
                check_way(tracker, world, way)
            for step, split in enumerate(("even", "uneven", "empty", "first empty", "single", "even", "even")):
                h, y = batch(step, D, num_classes=num_classes)
                if step == 2:
                    h[3, 1] = torch.inf
                    y[:2] = -100
                if step == 4:
                    y = torch.full_like(y, -100)
                if step == 5:
                    y = torch.softmax(3 * torch.eye(num_classes, dtype=h.dtype)[y], 1)
                h, y = (share(t, rank, world, split) for t in (h, y))
                if step == 6:  # as many positions as samples
                    h, y = h.reshape(1, len(h), D).movedim(-1, 1), y.reshape(1, len(y))
                tracker.update(h, y)
            out |= state(tracker, f"means {way} {momentum}")
            out[f"means {way} {momentum} directions"] = tracker.directions()
    return out


@part(1, 2, 4)
def half_means(rank: int, world: int, folder: Path) -> Results:
    """D4 and C2: bfloat16 features are sent as they are, and averaged in float32."""
    out: Results = {}
    tracker = spalign.ClassMeanTracker(MANY, D, batch_size=N, feature_dtype=torch.bfloat16)
    for step, split in enumerate(("uneven", "empty")):
        h, y = (share(t, rank, world, split) for t in batch(step, D, torch.float32, MANY))
        # A rank without samples may not know what the model computes in.
        tracker.update(h if len(h) == 0 else h.bfloat16(), y)
    out |= state(tracker, "float32 half")
    before = tracker.mean.clone()
    wrong = {"long": (torch.zeros(N + 1, D).bfloat16(), torch.zeros(N + 1, dtype=torch.long))}
    wrong["wide"] = torch.zeros(2, D), torch.zeros(2, dtype=torch.long)
    for name, wrong_batch in wrong.items() if world > 1 else ():
        try:
            tracker.update(*wrong_batch)
        except ValueError as error:
            out[f"local error {name}"] = str(error)
        assert torch.equal(tracker.mean, before)
    tracker.eval()
    tracker(*wrong["long"])  # an evaluation batch may be of any size
    return out


@part(2, 4)
def validation_on_one_rank(rank: int, world: int, folder: Path) -> Results:
    """B8: the first rank alone leaves training mode; means that ranks share, and those of one alone."""
    out: Results = {}
    for name, group in (("shared", ...), ("local own", None)):
        tracker = spalign.ClassMeanTracker(MANY, D, batch_size=N, process_group=group)
        for step in range(20):
            h, y = (share(t, rank, world) for t in batch(step, D, torch.float32, MANY))
            tracker.update(h, y)
        if rank == 0:
            tracker.eval()
            tracker.train()
        out |= state(tracker, f"{name} validation")
        exact = tracker.mean.double().sum(0)
        # float32 rounding of 20 steps of O(1); that of one rank is summed afresh.
        assert (tracker.mean_sum - exact).abs().max() <= (1e-5 if group is ... or rank else 0.0)
    return out


@part(2, 4)
def group_means(rank: int, world: int, folder: Path) -> Results:
    """Return what trackers hold that share with nobody, or with half of the ranks."""
    half, _ = dist.new_subgroups(max(world // 2, 1))
    out: Results = {}
    for name, group in (("none", None), ("half", half)):
        tracker = spalign.ClassMeanTracker(C, D, process_group=group)
        copied = copy.deepcopy(tracker)  # as weight averaging does
        h, y = batch(0, D, torch.float32)
        tracker.update(share(h, rank, world), share(y, rank, world))
        assert not copied.seen.any()
        copied.update(share(h, rank, world), share(y, rank, world))
        assert torch.equal(copied.mean, tracker.mean)
        out[f"local {name}"] = tracker.mean.clone()
    # What new_group returns on the ranks it leaves out.
    outside = dist.new_group([1])
    try:
        spalign.ClassMeanTracker(C, D, process_group=outside)
        out["local outside"] = ""
    except ValueError as error:
        out["local outside"] = str(error)
    return out


@part(1, 2, 4)
def collapse(rank: int, world: int, folder: Path) -> Results:
    """Neural collapse of all ranks' samples: uneven and empty parts, one rank with no batch at all, a far offset."""
    fc = Net().fc
    out: Results = {}
    for covariance in (False, True):
        tracker = spalign.ClassMeanTracker.for_classifier(fc, momentum=None).double()
        metric = spalign.metrics.NeuralCollapse(fc, tracker, covariance=covariance)
        for step, split in enumerate(("even", "uneven", "empty", "first empty")):
            h, y = (share(t, rank, world, split) for t in batch(step, D))
            h += 100.0
            tracker.update(h, y)
            if len(h) > 0:
                metric.update(h, y, fc(h - 100.0))
        out |= {f"collapse {covariance} {name}": value for name, value in metric.compute().items()}
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Gradients
# ----------------------------------------------------------------------------------------------------------------------


@part(1, 2, 4)
def averaged_gradients(rank: int, world: int, folder: Path) -> Results:
    """C3: gradients of the term alone, averaged by hand."""
    out: Results = {}
    cases = [("reduce", False), ("reduce", True), ("gather", False)]
    aligns: list[spalign.reg.Align] = ["both", "classifier", "features"]
    for dtype in (torch.float64, torch.float32):
        for way, soft in cases:
            num_classes, batch_size = WAYS[way]
            for split in ("even", "uneven", "empty"):
                for align in aligns if dtype is torch.float64 else aligns[:1]:
                    net = Net(dtype, num_classes)
                    spareg = make_term(net, dtype, batch_size, align)
                    for step in range(2):
                        x, y = batch(step, dtype=dtype, num_classes=num_classes)
                        targets = torch.softmax(2 * x[:, :C], 1) if soft else y
                        h, _ = net(share(x, rank, world, split))
                        net.zero_grad()
                        spareg(h, share(targets, rank, world, split)).backward()
                    kind = "soft" if soft else "hard"
                    name = f"{str(dtype)[6:]} averaged {way} {kind} {split} {align}"
                    out |= gradients(net, name, world)
    return out


@part(1, 2, 4)
def tracker_gradients(rank: int, world: int, folder: Path) -> Results:
    """C3: gradients that reach the features through ``tracker.forward``."""
    out: Results = {}
    for way, (num_classes, batch_size) in WAYS.items():
        net = Net()
        tracker = spalign.ClassMeanTracker(num_classes, D, momentum=None, batch_size=batch_size).double()
        x, y = batch(0, num_classes=num_classes)
        h, _ = net(share(x, rank, world, "uneven"))
        (tracker(h, share(y, rank, world, "uneven")) ** 2).sum().backward()
        out |= gradients(net, f"tracker {way}", world)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Training with DDP
# ----------------------------------------------------------------------------------------------------------------------


def _ddp(net: nn.Module, world: int, **options: Any) -> Any:
    return nn.parallel.DistributedDataParallel(net, **options) if world > 1 else net


@part(1, 2, 4)
def data_parallel(rank: int, world: int, folder: Path) -> Results:
    """A16, A17, B8, C1, C3, C6, C7: the term inside and outside of DDP, two views a step, or gradients accumulated."""
    cases = [
        (torch.float64, False, "reduce", "even", "views"),
        (torch.float64, False, "gather", "uneven", "accumulate"),
        (torch.float64, False, "reduce", "empty", "accumulate"),
        (torch.float64, True, "reduce", "uneven", "views"),
        (torch.float64, True, "reduce", "empty", "views"),
        (torch.float64, True, "gather", "first empty", "accumulate"),
        (torch.float32, False, "gather", "uneven", "views"),
        (torch.float32, True, "reduce", "empty", "accumulate"),
    ]
    out: Results = {}
    for dtype, inside, way, split, mode in cases:
        num_classes, batch_size = WAYS[way]
        net = NetWithTerm(dtype, num_classes, batch_size) if inside else Net(dtype, num_classes)
        spareg = net.spareg if isinstance(net, NetWithTerm) else make_term(net, dtype, batch_size)
        optimizer = spalign.SpAProj(torch.optim.SGD(net.parameters(), lr=0.3), net.fc, spareg.tracker, gamma=0.3)
        slerp = spalign.SpASlerp(net.fc, spareg.tracker, total_steps=2, alpha_max=0.2, threshold=1.0)
        broadcast = split != "empty"  # C1: with the term inside and outside of the model, both
        model = _ddp(net, world, gradient_as_bucket_view=not inside, broadcast_buffers=broadcast)
        name = f"{str(dtype)[6:]} ddp {'inside' if inside else 'outside'} {way} {split} {mode}"
        for step in range(2):
            optimizer.zero_grad()
            losses = []
            for view in (0, 10):
                last = view == 10
                wait = model.no_sync() if world > 1 and mode == "accumulate" and not last else contextlib.nullcontext()
                with wait:
                    x, y = (
                        share(t, rank, world, split) for t in batch(step + view, dtype=dtype, num_classes=num_classes)
                    )
                    first, second = model(x, y) if inside else model(x)
                    logits, term = (first, second) if inside else (second, spareg(first, y))
                    losses.append(main_loss(logits, y, world) + 0.5 * term)
                    if mode == "accumulate":
                        losses.pop().backward()
            if losses:
                torch.stack(losses).sum().backward()
            out |= gradients(net, f"{name} {step}")
            optimizer.step()
            assert net.fc.weight.grad is not None
            out[f"{name} {step} projected"] = gather(net.fc.weight.grad)
            slerp.step()
        out |= parameters(net, name) | state(spareg.tracker, name)
    return out


@part(1, 2, 4)
def redundancy(rank: int, world: int, folder: Path) -> Results:
    """A20: ZeroRedundancyOptimizer under the projection is the plain optimizer."""
    out: Results = {}
    kinds: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
        "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    }
    for kind, (optimizer_class, options) in kinds.items():
        net = Net()
        spareg = make_term(net, torch.float64)
        model = _ddp(net, world)
        if world > 1:
            from torch.distributed.optim import ZeroRedundancyOptimizer

            sharded: Any = ZeroRedundancyOptimizer
            inner: torch.optim.Optimizer = sharded(net.parameters(), optimizer_class, **options)
            overlapping = sharded(Net().parameters(), optimizer_class, overlap_with_ddp=True, **options)
            try:
                spalign.SpAProj(overlapping, net.fc, spareg.tracker, gamma=0.3)
            except ValueError as error:
                out["local error overlap"] = str(error)
        else:
            inner = optimizer_class(net.parameters(), **options)
        optimizer = spalign.SpAProj(inner, net.fc, spareg.tracker, gamma=0.3)
        for step in range(4):
            x, y = (share(t, rank, world) for t in batch(step))
            optimizer.zero_grad()
            h, logits = model(x)
            (main_loss(logits, y, world) + 0.5 * spareg(h, y)).backward()
            optimizer.step()
        out |= parameters(net, f"zero {kind}")
    return out


@part(2, 4)
def long_run(rank: int, world: int, folder: Path) -> Results:
    """B8: 200 steps in float32 with parts of any size, rotations among them; ranks may not drift by a bit."""
    out: Results = {}
    for way, (num_classes, batch_size) in WAYS.items():
        net = Net(torch.float32, num_classes)
        spareg = make_term(net, torch.float32, batch_size)
        model = _ddp(net, world, broadcast_buffers=False)
        inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        optimizer = spalign.SpAProj(inner, net.fc, spareg.tracker, gamma=0.3)
        slerp = spalign.SpASlerp(net.fc, spareg.tracker, total_steps=10, alpha_max=0.2, threshold=0.9)
        names = list(SPLITS[world])
        start = net.fc.weight.detach().clone()
        for step in range(200):
            split = names[step % len(names)]
            x, y = (share(t, rank, world, split) for t in batch(step, dtype=torch.float32, num_classes=num_classes))
            optimizer.zero_grad()
            h, logits = model(x)
            (main_loss(logits, y, world) + 0.5 * spareg(h, y)).backward()
            optimizer.step()
            if step % 20 == 19:
                slerp.step()
        assert not torch.equal(net.fc.weight, start)
        out |= parameters(net, f"long {way}") | state(spareg.tracker, f"long {way}")
    return out


@part(1, 2)
def bucket_views(rank: int, world: int, folder: Path) -> Results:
    """A17: 20 steps with gradients that are views of DDP's buckets and with gradients of their own."""
    out: Results = {}
    for views in (False, True):
        net = Net()
        spareg = make_term(net, torch.float64)
        model = _ddp(net, world, gradient_as_bucket_view=views)
        inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        optimizer = spalign.SpAProj(inner, net.fc, spareg.tracker, gamma=0.3)
        for step in range(20):
            x, y = (share(t, rank, world, "uneven") for t in batch(step))
            optimizer.zero_grad(set_to_none=False)  # the views stay
            h, logits = model(x)
            (main_loss(logits, y, world) + 0.5 * spareg(h, y)).backward()
            optimizer.step()
        out |= parameters(net, f"bucket views {views}")
    return out


@part(2)
def unused_head(rank: int, world: int, folder: Path) -> Results:
    """C6: the head outside of DDP's forward, where DDP looks for unused parameters."""

    class Headless(Net):
        def forward(self, x: Tensor) -> Any:
            return self.encoder(x)

    net = Headless()
    spareg = make_term(net, torch.float64)
    model = _ddp(net, world, find_unused_parameters=True)
    x, y = (share(t, rank, world) for t in batch(0))
    h = model(x)
    try:
        (h.square().mean() + spareg(h, y)).backward()
    except RuntimeError as error:
        return {"local unused": str(error)}
    return {"local unused": "no error"}


@part(2)
def compiled(rank: int, world: int, folder: Path) -> Results:
    """The update stays one node of a compiled step: written out, backward would read buffers that moved since."""
    half, _ = dist.new_subgroups(world)
    out: Results = {}
    # The partitioner of inductor, which decides what backward computes again, without its kernels.
    partition = torch._dynamo.lookup_backend("aot_eager_decomp_partition")
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nodes.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return partition(graph, inputs)

    for way, (num_classes, batch_size) in WAYS.items():
        for fast in (False, True):
            nodes.clear()
            torch.compiler.reset()
            net = Net(num_classes=num_classes)
            tracker = spalign.ClassMeanTracker(
                num_classes, D, batch_size=batch_size, process_group=half if way == "gather" else ...
            ).double()
            spareg = spalign.SpARegLoss(net.fc, tracker)

            def loss(x: Tensor, y: Tensor, net: Net = net, spareg: spalign.SpARegLoss = spareg) -> Tensor:
                h, logits = net(x)
                total: Tensor = main_loss(logits, y, 2) + 0.5 * spareg(h, y)
                return total

            step = torch.compile(loss, fullgraph=True, backend=backend) if fast else loss
            for i in range(2):
                net.zero_grad()
                x, y = (share(t, rank, world) for t in batch(i, num_classes=num_classes))
                step(x, y).backward()
                out |= gradients(net, f"{'compiled' if fast else 'eager'} {way} {i}", world)
            out |= state(tracker, f"{'compiled' if fast else 'eager'} {way}")
        out[f"nodes {way}"] = list(nodes)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Sharded classifiers
# ----------------------------------------------------------------------------------------------------------------------


def _fully_shard(net: Net, own_group: bool, world: int, **options: Any) -> None:
    if world > 1:
        from torch.distributed.fsdp import fully_shard

        if own_group:
            fully_shard(net.fc, **options)
        fully_shard(net, **options)


@part(1, 2, 4, sharded=True)
def sharded_training(rank: int, world: int, folder: Path) -> Results:
    """A15, B1, B3, B4: train under FSDP2 with the head as its own group and not; uneven and empty shards of rows."""
    out: Results = {}
    for num_classes in (3, 1):
        for own_group in (False, True):
            net = Net(num_classes=num_classes)
            spareg = make_term(net, torch.float64)
            inner = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
            optimizer = spalign.SpAProj(inner, net.fc, spareg.tracker, gamma=0.3)
            _fully_shard(net, own_group, world)
            inner.param_groups[0]["params"] = list(net.parameters())  # A15: as Accelerate does after sharding
            slerp = spalign.SpASlerp(net.fc, spareg.tracker, total_steps=4, alpha_max=0.4, threshold=1.0)
            for step in range(2):
                name = f"fsdp {num_classes} {own_group} {step}"
                x, y = (share(t, rank, world, "uneven") for t in batch(step, num_classes=num_classes))
                optimizer.zero_grad()
                h, logits = net(x)
                (main_loss(logits, y, world) + 0.5 * spareg(h, y)).backward()
                out |= gradients(net, name)
                optimizer.step()
                assert net.fc.weight.grad is not None
                out[f"{name} projected"] = gather(net.fc.weight.grad)
                slerp.step()
                out |= parameters(net, name)
    return out


@part(1, 2, 4, sharded=True)
def sharded_validation(rank: int, world: int, folder: Path) -> Results:
    """B2: after a validation pass the root group stays gathered, and what is written there is lost."""
    out: Results = {}
    for num_classes in (3, 1):
        for own_group in (False, True):
            net = Net(num_classes=num_classes)
            _fully_shard(net, own_group, world, reshard_after_forward=False)
            tracker = spalign.ClassMeanTracker(num_classes, D).double()
            tracker.update(*(share(t, rank, world) for t in batch(1, D, num_classes=num_classes)))
            optimizer = spalign.SpAProj(torch.optim.SGD(net.parameters(), lr=0.3), net.fc, tracker, gamma=0.3)
            slerp = spalign.SpASlerp(net.fc, tracker, total_steps=1, alpha_max=0.4, threshold=1.0)
            x, y = (share(t, rank, world) for t in batch(0, num_classes=num_classes))
            main_loss(net(x)[1], y, world).backward()
            with torch.no_grad():
                net(x)
                # Gathered parameters hold no gradient; the projection finds it all the same.
                optimizer.step()
                net(x)
                slerp.step()
                # The forward pass that follows shows what was kept.
                logits = net(x)[1]
                if world > 1:
                    whole = [torch.zeros_like(logits) for _ in range(world)]
                    dist.all_gather(whole, logits)
                    logits = torch.cat(whole)
                spalign.Classifier(net.fc).reshard()
            out[f"validated {num_classes} {own_group} logits"] = logits.clone()
            out[f"validated {num_classes} {own_group} weight"] = gather(net.fc.weight)
    return out


def _half_sharded(own_group: bool, world: int) -> Net:
    net = Net(torch.float32)
    if world > 1:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        _fully_shard(net, own_group, world, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return net


@part(1, 2, sharded=True)
def mixed_precision(rank: int, world: int, folder: Path) -> Results:
    """B2, B7: the gathered weight is bfloat16, the one to rotate is the float32 one that is kept."""
    out: Results = {}
    for own_group in (False, True):
        net = _half_sharded(own_group, world)
        tracker = spalign.ClassMeanTracker(C, D)
        h, y = (share(t, rank, world) for t in batch(1, D, torch.float32))
        tracker.update(h, y)
        before = gather(net.fc.weight)
        with torch.no_grad():
            net(share(batch(0, dtype=torch.float32)[0], rank, world))
        slerp = spalign.SpASlerp(net.fc, tracker, total_steps=1, alpha_max=0.4, threshold=0.2)
        slerp.step()
        after = gather(net.fc.weight)
        out[f"float32 mixed {own_group} weight"] = after
        out[f"float32 mixed {own_group} kept rows"] = (after == before).all(1)
    return out


@part(1, 2, sharded=True)
def mixed_precision_training(rank: int, world: int, folder: Path) -> Results:
    """B3, B7: loss and projection where forward and backward go through bfloat16 copies of float32 weights."""
    out: Results = {}
    for own_group in (False, True):
        name = f"half {own_group}"
        net = _half_sharded(own_group, world)
        spareg = make_term(net, torch.float32)
        optimizer = spalign.SpAProj(torch.optim.SGD(net.parameters(), lr=0.3), net.fc, spareg.tracker, gamma=0.3)
        for step in range(2):
            x, y = (share(t, rank, world, "uneven") for t in batch(step, dtype=torch.float32))
            optimizer.zero_grad()
            h, logits = net(x)
            assert h.dtype is (torch.bfloat16 if world > 1 else torch.float32)
            term = spareg(h, y)
            if step == 0:  # the term alone
                term.backward()
                out |= gradients(net, f"{name} term")
                optimizer.zero_grad()
                continue
            (main_loss(logits.float(), y, world) + 0.5 * term).backward()
            out |= gradients(net, name)
            out |= {f"{name} rows": gather(net.fc.weight)} | state(spareg.tracker, name)
            optimizer.step()
            assert net.fc.weight.grad is not None
            out |= {f"{name} projected": gather(net.fc.weight.grad), f"{name} stepped": gather(net.fc.weight)}
    return out


@part(1, 2, 4)
def sharded_tensors(rank: int, world: int, folder: Path) -> Results:
    """B3, B4: parameters that are DTensors in every layout, rows and columns, sharded along either, both or none."""
    out: Results = {}
    generator = torch.Generator().manual_seed(1)
    for num_classes, dtype in ((3, torch.float64), (1, torch.float64), (3, torch.bfloat16)):
        w, g = (torch.randn(num_classes, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        for class_dim in (0, 1):
            for layout in ("rows", "columns", "replicated", "hybrid"):
                stored, grad = (w, g) if class_dim == 0 else (w.t().contiguous(), g.t().contiguous())
                wrap: Callable[[Tensor], Tensor] = torch.clone
                if world > 1:
                    from torch.distributed.device_mesh import init_device_mesh
                    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

                    hybrid = layout == "hybrid"
                    mesh = init_device_mesh("cpu", (world // 2, 2) if hybrid else (world,))
                    placement = {"rows": Shard(0), "columns": Shard(1)}.get(layout, Replicate())
                    placements = [Replicate(), Shard(0)] if hybrid else [placement]

                    def wrap(x: Tensor, mesh: Any = mesh, placements: Any = placements) -> Tensor:
                        sharded: Tensor = distribute_tensor(x.clone(), mesh, placements)  # replicated, it may alias x
                        return sharded

                p = nn.Parameter(wrap(stored))
                classifier = spalign.Classifier(p, class_dim=class_dim)
                tracker = spalign.ClassMeanTracker.for_classifier(classifier).double()
                tracker.update(*(share(t, rank, world) for t in batch(0, D, num_classes=num_classes)))
                name = f"{str(dtype)[6:]} dtensor {num_classes} {class_dim} {layout}"
                loss = spalign.SpARegLoss(classifier, tracker)()
                loss.backward()
                assert p.grad is not None
                out[f"{name} loss"], out[f"{name} gradient"] = loss.detach(), gather(p.grad)
                optimizer = spalign.SpAProj(torch.optim.SGD([p], lr=0.1), classifier, tracker, gamma=0.3)
                p.grad = wrap(grad)
                optimizer.step()
                out[f"{name} projected"], out[f"{name} stepped"] = gather(p.grad), gather(p)
                spalign.SpASlerp(classifier, tracker, total_steps=1, alpha_max=0.4, threshold=1.0).step()
                out[f"{name} rotated"] = gather(p)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Collectives
# ----------------------------------------------------------------------------------------------------------------------


COLLECTIVES: list[tuple[int, int, int | None, torch.dtype | None]] = [
    (8, 5, None, None),
    (8, 5, N, None),
    (8, MANY, N, None),
    (3, MANY, N, None),
    (8, MANY, None, None),
    (8, MANY, N, torch.bfloat16),
]
"""D, C, announced batch size and dtype of features."""


class Collectives(TorchDispatchMode):
    """Writes down every collective: its name, and what each tensor it works on is."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []
        self.received = 0.0
        self.ranks = dist.get_world_size()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the bytes that a rank receives in a ring."""
        if func.namespace in ("c10d", "_c10d_functional"):
            name = str(func).split(".")[1]
            flat = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            self.seen.append(f"{name} {[(tuple(t.shape), str(t.dtype)) for t in flat]}")
            size = max(t.numel() * t.element_size() for t in flat)
            factor = {"allreduce_": 2.0, "_allgather_base_": 1.0}[name]  # of the whole result
            self.received += factor * (self.ranks - 1) / self.ranks * size
        return func(*args, **(kwargs or {}))


@part(2, 4)
def collectives(rank: int, world: int, folder: Path) -> Results:
    """C4, C5: the collectives of one update, for every kind of batch."""
    out: Results = {}
    for case in COLLECTIVES:
        dim, num_classes, batch_size, dtype = case
        for kind in ("whole", "empty", "ignored", "infinite", "short"):
            tracker = spalign.ClassMeanTracker(num_classes, dim, batch_size=batch_size, feature_dtype=dtype)
            h, y = make_batch(0, N, num_classes, dim, torch.float32 if dtype is None else dtype)
            if kind == "ignored":
                y = torch.full_like(y, -100)
            if kind == "infinite":
                h = h * torch.inf
            if rank == world - 1 and kind in ("empty", "short"):
                h, y = (t[:0] if kind == "empty" else t[:5] for t in (h, y))
            h.requires_grad_()
            with Collectives() as seen:
                loss = spalign.SpARegLoss(torch.ones(num_classes, dim), tracker)(h, y)
                loss.backward()
            out[f"calls {case} {kind}"] = str(seen.seen)
            out[f"bytes {case} {kind}"] = torch.tensor(seen.received)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


class Run:
    """A training run with every strategy, sharded where there are ranks."""

    def __init__(self, rank: int, world: int, seed: int) -> None:
        self.rank, self.world, self.step = rank, world, 0
        self.net = Net(seed=seed)
        self.spareg = make_term(self.net, torch.float64)
        _fully_shard(self.net, False, world)
        inner = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        self.optimizer = spalign.SpAProj(inner, self.net.fc, self.spareg.tracker, gamma=0.3)
        self.slerp = spalign.SpASlerp(self.net.fc, self.spareg.tracker, total_steps=9, alpha_max=0.4, threshold=0.99)

    def train(self, steps: int) -> Tensor:
        """Train, and return the losses of the whole batches."""
        losses = []
        for _ in range(steps):
            x, y = (share(t, self.rank, self.world) for t in batch(self.step))
            self.optimizer.zero_grad()
            h, logits = self.net(x)
            main, term = main_loss(logits, y, self.world), self.spareg(h, y)
            (main + 0.5 * term).backward()
            self.optimizer.step()
            self.slerp.step()
            self.step += 1
            loss = main.detach() / self.world
            if self.world > 1:
                dist.all_reduce(loss)
            losses.append(loss + 0.5 * term.detach())
        return torch.stack(losses)

    def state(self) -> dict[str, Any]:
        """Return everything to save, in the form of ``torch.distributed.checkpoint``."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        return {
            "model": get_model_state_dict(self.net),
            "optimizer": get_optimizer_state_dict(self.net, self.optimizer),
            "spareg": self.spareg.state_dict(),
            "slerp": self.slerp.state_dict(),
            "step": self.step,
        }

    def load(self, path: Path) -> None:
        """Continue a run that was saved on any number of ranks."""
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        saved = self.state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            load(saved, checkpoint_id=path)
        set_model_state_dict(self.net, saved["model"])
        set_optimizer_state_dict(self.net, self.optimizer, saved["optimizer"])
        self.spareg.load_state_dict(saved["spareg"])
        self.slerp.load_state_dict(saved["slerp"])
        self.step = saved["step"]


@part(1, 2, 4, sharded=True)
def checkpoint(rank: int, world: int, folder: Path) -> Results:
    """A9, A10, B12, C13: saved on two ranks, resumed on one, two and four."""
    from torch.distributed.checkpoint.state_dict_saver import save

    out: Results = {}
    run = Run(rank, world, seed=3)
    run.train(3)
    if world == 2:
        save(run.state(), checkpoint_id=folder / "saved")
    out["checkpoint uninterrupted"] = run.train(5)
    resumed = Run(rank, world, seed=4)
    resumed.load(folder / "saved")
    out["checkpoint resumed"] = resumed.train(5)
    out["checkpoint calls"] = torch.tensor(resumed.slerp.last_step)
    out |= parameters(resumed.net, "checkpoint")
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Ranks that die
# ----------------------------------------------------------------------------------------------------------------------


def last_steps(rank: int, world: int) -> Results:
    """Train until the last rank is gone: killed, one of four; by an error it alone raises, one of two."""
    net = Net(num_classes=MANY)
    spareg = make_term(net, torch.float64, batch_size=N)
    last = rank == world - 1
    for step in range(5):
        x, y = (share(t, rank, world) for t in batch(step, num_classes=MANY))
        if step == 2 and last and world == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 2 and last and world == 2:
            x, y = x.repeat(5, 1), y.repeat(5)
        h, logits = net(x)
        try:
            (main_loss(logits, y, world) + 0.5 * spareg(h, y)).backward()
        except ValueError:
            raise
        except RuntimeError as error:
            return {"step": step, "error": str(error)}
    return {"step": 5, "error": ""}


def names(world: int) -> list[str]:
    """Return the parts that run on so many ranks."""
    return [n for n, p in PARTS.items() if world in p.worlds and (FSDP_ON_CPU or not p.sharded)]


def run(rank: int, world: int, folder: Path) -> dict[str, Results]:
    """Run every part. One that raises is named by the tests; ended here, a rank would take the others along."""
    results: dict[str, Results] = {}
    for name in names(world):
        try:
            results[name] = PARTS[name].run(rank, world, folder)
        except Exception:  # noqa: PERF203
            results[name] = {"raised": traceback.format_exc()}
    return results


def main(rank: int, world: int, folder: Path) -> None:
    """Run every part as one rank of a gloo group and save what it found."""
    # A rank that is waited for in vain fails the others well before the tests give up on all.
    options: dict[str, Any] = {"rank": rank, "world_size": world, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{folder / f'init{world}'}", **options)
    torch.save(run(rank, world, folder), folder / f"world{world}rank{rank}.pt")
    torch.save(last_steps(rank, world), folder / f"last{world}rank{rank}.pt")


def fork(rank: int, world: int, folder: Path) -> int:
    """Start a rank, which inherits the imports, and return its process id."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            main(rank, world, folder)
            status = 0
        except BaseException:
            (folder / f"error{world}rank{rank}.txt").write_text(traceback.format_exc())
        os._exit(status)  # the group is broken: nothing to take leave of
    return process


if __name__ == "__main__":
    torch.set_num_threads(1)
    ended = {}
    for size in (2, 4):
        processes = [fork(rank, size, Path(sys.argv[1])) for rank in range(size)]
        ended[size] = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    torch.save(ended, Path(sys.argv[1]) / "ended.pt")
