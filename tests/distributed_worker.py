"""What test_distributed_smoke.py runs: once in its own process, once on two ranks, and compares.

Run as ``python distributed_worker.py RANK WORLD FOLDER``. Everything is float64; C = 3 classes do not divide by 2.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from problems import make_batch
from torch import Tensor, nn

import spalign

C, D, N = 3, 4, 8
Results = dict[str, Tensor]


class Net(nn.Module):
    """An encoder and a head; returns features and logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Linear(5, D, dtype=torch.float64)
        self.fc = nn.Linear(D, C, dtype=torch.float64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits."""
        h = torch.tanh(self.encoder(x))
        return h, self.fc(h)


class NetWithTerm(Net):
    """The regularizer inside the model, where DDP broadcasts its buffers before each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.spareg = spalign.SpARegLoss(self.fc, spalign.ClassMeanTracker(C, D).double())

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits and the term."""
        h, logits = super().forward(x)
        term: Tensor = self.spareg(h, y)
        return logits, term


def batch(step: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the whole batch of a step."""
    return make_batch(step, N, C, width, torch.float64)


def part(x: Tensor, rank: int, world: int, first: int = N // 2) -> Tensor:
    """Return a rank's part of a batch; rank 0 of 2 gets the first ``first`` samples."""
    return x if world == 1 else x[:first] if rank == 0 else x[first:]


def gather(x: Tensor) -> Tensor:
    """Return the whole of what may be sharded, as a copy."""
    return spalign.distributed.full_tensor(x.detach()).clone()


def means(rank: int, world: int) -> Results:
    """Feed uneven parts, an empty one, ignored and soft labels (pitfalls C1, C2, C5)."""
    out: Results = {}
    for momentum in (None, 0.1):
        tracker = spalign.ClassMeanTracker(C, D, momentum=momentum).double()
        for step, first in enumerate((4, 1, 8, 0, 5, 7)):
            h, y = batch(step, D)
            targets = y
            if step == 4:
                targets = torch.softmax(h[:, :C], 1)
            if step == 5:
                targets = torch.full_like(y, -100)
            tracker.update(part(h, rank, world, first), part(targets, rank, world, first))
        for name, value in tracker.named_buffers():
            out[f"means {momentum} {name}"] = value.clone()
        out[f"means {momentum} directions"] = tracker.directions()
    return out


def local_means(rank: int, world: int) -> Results:
    """Return what trackers hold that share with nobody or with a group of one: this rank's part alone."""
    groups = [None, dist.new_subgroups(1)[0]] if world > 1 else [None]
    out: Results = {}
    for group in groups:
        tracker = spalign.ClassMeanTracker(C, D, process_group=group)
        h, y = batch(0, D)
        tracker.update(part(h.float(), rank, world), part(y, rank, world))
        out[f"local {'none' if group is None else 'own'}"] = tracker.mean.clone()
    return out


def averaged_gradients(rank: int, world: int) -> Results:
    """Average the gradients of the term over ranks with uneven parts (pitfall C3)."""
    out: Results = {}
    for name, first in (("even", 4), ("uneven", 3), ("empty", 8)):
        for soft in (False, True):
            for align in ("both", "classifier", "features"):
                net = Net()
                tracker = spalign.ClassMeanTracker(C, D).double()
                spareg = spalign.SpARegLoss(net.fc, tracker, align=align)
                for step in range(2):
                    x, y = batch(step, 5)
                    targets = torch.softmax(2 * x[:, :C], 1) if soft else y
                    h, _ = net(part(x, rank, world, first))
                    net.zero_grad()
                    spareg(h, part(targets, rank, world, first)).backward()
                for key, p in net.named_parameters():
                    grad = torch.zeros_like(p) if p.grad is None else p.grad
                    if world > 1:
                        dist.all_reduce(grad)
                        grad /= world
                    out[f"gradient {name} {soft} {align} {key}"] = grad
    return out


def tracker_gradients(rank: int, world: int) -> Results:
    """Average the gradients that reach the features through ``tracker.forward``."""
    net, tracker = Net(), spalign.ClassMeanTracker(C, D, momentum=None).double()
    x, y = batch(0, 5)
    h, _ = net(part(x, rank, world, 3))
    (tracker(h, part(y, rank, world, 3)) ** 2).sum().backward()
    grad = net.encoder.weight.grad
    assert grad is not None
    if world > 1:
        dist.all_reduce(grad)
        grad /= world
    return {"tracker gradient": grad}


def data_parallel(rank: int, world: int) -> Results:
    """Train with the term inside and outside of DDP, two forward passes per backward pass (pitfalls C1, C7, B8)."""
    out: Results = {}
    for inside in (False, True):
        net = NetWithTerm() if inside else Net()
        spareg = net.spareg if isinstance(net, NetWithTerm) else None
        if spareg is None:
            spareg = spalign.SpARegLoss(net.fc, spalign.ClassMeanTracker(C, D).double())
        optimizer = spalign.SpAProj(torch.optim.SGD(net.parameters(), lr=0.3), net.fc, spareg.tracker, gamma=0.3)
        slerp = spalign.SpASlerp(net.fc, spareg.tracker, total_steps=2, alpha_max=0.2, threshold=1.0)
        options: dict[str, Any] = {"gradient_as_bucket_view": not inside, "broadcast_buffers": True}
        model: nn.Module = nn.parallel.DistributedDataParallel(net, **options) if world > 1 else net
        for step in range(3):
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for view in (0, 10):
                x, y = (part(t, rank, world) for t in batch(step + view, 5))
                first, second = model(x, y) if inside else model(x)
                logits, term = (first, second) if inside else (second, spareg(first, y))
                total = total + nn.functional.cross_entropy(logits, y) + 0.5 * term
            total.backward()
            optimizer.step()
            slerp.step()
        for key, p in net.named_parameters():
            out[f"ddp {inside} {key}"] = p.detach().clone()
        out[f"ddp {inside} mean"] = spareg.tracker.mean.clone()
    return out


def sharded_training(rank: int, world: int) -> Results:
    """Train under FSDP2 with the head as its own group and not (pitfall B3), then rotate after a validation pass."""
    out: Results = {}
    for own_group in (False, True):
        net = Net()
        if world > 1:
            from torch.distributed.fsdp import fully_shard

            if own_group:
                fully_shard(net.fc)
            fully_shard(net)
        spareg = spalign.SpARegLoss(net.fc, spalign.ClassMeanTracker(C, D).double())
        inner = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
        optimizer = spalign.SpAProj(inner, net.fc, spareg.tracker, gamma=0.3)
        slerp = spalign.SpASlerp(net.fc, spareg.tracker, total_steps=4, alpha_max=0.4, threshold=1.0)
        name = f"fsdp {own_group}"
        for step in range(3):
            x, y = (part(t, rank, world) for t in batch(step, 5))
            optimizer.zero_grad()
            h, logits = net(x)
            (nn.functional.cross_entropy(logits, y) + 0.5 * spareg(h, y)).backward()
            for key, p in net.named_parameters():
                assert p.grad is not None
                out[f"{name} {step} gradient {key}"] = gather(p.grad)
            optimizer.step()
            assert net.fc.weight.grad is not None
            out[f"{name} {step} projected"] = gather(net.fc.weight.grad)
            slerp.step()
            for key, p in net.named_parameters():
                out[f"{name} {step} {key}"] = gather(p)
    return out


def sharded_validation(rank: int, world: int) -> Results:
    """Rotate after a validation pass: the root group stays gathered then, and edits of the views are lost (B2)."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    out: Results = {}
    for own_group in (False, True):
        net = Net()
        if world > 1:
            if own_group:
                fully_shard(net.fc)
            fully_shard(net)
        tracker = spalign.ClassMeanTracker(C, D).double()
        h, y = batch(1, D)
        tracker.update(part(h, rank, world), part(y, rank, world))
        slerp = spalign.SpASlerp(net.fc, tracker, total_steps=1, alpha_max=0.4, threshold=1.0)
        net.eval()
        x = part(batch(0, 5)[0], rank, world)
        with torch.no_grad():
            net(x)
        slerp.step()
        with torch.no_grad():
            # The forward pass that follows shows what was kept.
            logits = net(x)[1]
            if world > 1:
                whole = [torch.zeros_like(logits) for _ in range(world)]
                dist.all_gather(whole, logits)
                logits = torch.cat(whole)
                for module in (net.fc, net):
                    if isinstance(module, FSDPModule):
                        module.reshard()
        out[f"validated {own_group} logits"] = logits.clone()
        out[f"validated {own_group} weight"] = gather(net.fc.weight)
    return out


def sharded_tensors(rank: int, world: int) -> Results:
    """Use parameters that are DTensors in every layout, rows and columns, sharded along either or none."""
    out: Results = {}
    generator = torch.Generator().manual_seed(1)
    w, g = (torch.randn(C, D, generator=generator, dtype=torch.float64) for _ in range(2))
    for class_dim in (0, 1):
        for layout in ("rows", "columns", "replicated"):
            stored, grad = (w, g) if class_dim == 0 else (w.t().contiguous(), g.t().contiguous())
            wrap: Callable[[Tensor], Tensor] = torch.clone
            if world > 1:
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.tensor import Replicate, Shard, distribute_tensor

                mesh = init_device_mesh("cpu", (world,))
                placement = {"rows": Shard(0), "columns": Shard(1), "replicated": Replicate()}[layout]

                def wrap(x: Tensor, mesh: Any = mesh, placement: Any = placement) -> Tensor:
                    sharded: Tensor = distribute_tensor(x.clone(), mesh, [placement])  # replicated, it may alias x
                    return sharded

            p = nn.Parameter(wrap(stored))
            classifier = spalign.Classifier(p, class_dim=class_dim)
            tracker = spalign.ClassMeanTracker.for_classifier(classifier).double()
            tracker.update(*(part(t, rank, world) for t in batch(0, D)))
            name = f"dtensor {class_dim} {layout}"
            loss = spalign.SpARegLoss(classifier, tracker)()
            loss.backward()
            assert p.grad is not None
            out[f"{name} loss"], out[f"{name} gradient"] = loss.detach(), gather(p.grad)
            inner = torch.optim.SGD([p], lr=0.1)
            optimizer = spalign.SpAProj(inner, classifier, tracker, gamma=0.3)
            p.grad = wrap(grad)
            optimizer.step()
            out[f"{name} projected"], out[f"{name} stepped"] = gather(p.grad), gather(p)
            spalign.SpASlerp(classifier, tracker, total_steps=1, alpha_max=0.4, threshold=1.0).step()
            out[f"{name} rotated"] = gather(p)
    return out


PARTS: list[Callable[[int, int], Results]] = [
    means,
    local_means,
    averaged_gradients,
    tracker_gradients,
    data_parallel,
    sharded_training,
    sharded_validation,
    sharded_tensors,
]


def main(rank: int, world: int, folder: Path) -> None:
    """Run every part as one rank of a gloo group and save what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for run in PARTS:
        try:
            results.update(run(rank, world))
        except Exception as error:  # noqa: PERF203  the test names the part; a rank that dies leaves the other waiting
            results[f"{run.__name__} raised"] = repr(error)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
