"""Train an example in float64, alone or as one of the processes that its framework starts.

Run as ``python several_processes.py NAME FOLDER``; every process leaves there what it has come to.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import integration_scripts as scripts
import torch
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import DataLoader, TensorDataset

import spalign

EPOCHS, WORLD, WHOLE = 2, 2, 64
"""``WHOLE`` samples make a step, whatever the number of processes: 8 steps in all."""

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "accelerate": ("accelerate_loop", {"cpu": True}),
    "lightning": ("lightning_callback", {**scripts.QUIET_LIGHTNING, "strategy": "ddp", "gradient_clip_val": 5.0}),
    "transformers": ("hf_trainer", {"use_cpu": True, "ddp_backend": "gloo"}),
}


class Term(spalign.SpARegLoss):
    """The loss term with float64 means."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__(classifier)
        self.double()


def train(name: str, world: int, folder: Path) -> dict[str, Any]:
    """Train this process's share and return the network's and the tracker's state, and how often each part acted."""
    script, options = RUNS[name]
    module = scripts.script(script)
    from digits import Network, digits

    def network() -> Network:
        """Without batch statistics, which are those of a process's own share."""
        torch.manual_seed(0)
        made = Network()
        for i, layer in enumerate(made.backbone):
            if isinstance(layer, nn.BatchNorm2d):
                made.backbone[i] = nn.GroupNorm(4, layer.num_features)
        return made.double()

    def data() -> tuple[TensorDataset, TensorDataset]:
        one, two = (TensorDataset(part.tensors[0].double(), part.tensors[1]) for part in digits())
        return one, two

    module.Network, module.digits, module.BATCH_SIZE = network, data, WHOLE // world
    module.train_loader = lambda: DataLoader(data()[0], batch_size=WHOLE // world, drop_last=True)
    module.spalign = SimpleNamespace(**{**vars(spalign), "SpARegLoss": Term})
    more = {"devices": world} if name == "lightning" else {"output_dir": str(folder)} if name == "transformers" else {}
    with scripts.counting() as counts:
        trained = module.train(scripts.strengths("all"), EPOCHS, **options, **more)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    assert ranks == world, "processes that know nothing of each other"
    (tracker,), (slerp,) = counts.trackers, counts.slerps
    states = {"network": trained.state_dict(), "tracker": tracker.state_dict()}
    found: dict[str, Any] = {f"{of} {k}": v.clone() for of, state in states.items() for k, v in state.items()}
    found["acts"] = (counts.fed, counts.projected, counts.steps, counts.rotated, slerp.last_step)
    found["rotated last"] = int(slerp.num_rotated)
    return found


def leave(name: str, folder: Path) -> None:
    """Train as one of several processes."""
    torch.set_num_threads(1)
    found = train(name, WORLD, folder)
    torch.save(found, folder / f"{name}{torch.distributed.get_rank()}.pt")


def launched(rank: int, name: str, folder: Path, port: int) -> None:
    """Train with the variables set that ``torchrun`` and ``accelerate launch`` set."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ.update({**{k: str(v) for k, v in ranks.items()}, "MASTER_ADDR": "127.0.0.1"})
    leave(name, folder)


if __name__ == "__main__":
    scripts.available()
    name, folder = sys.argv[1], Path(sys.argv[2])
    if name == "lightning":
        leave(name, folder)  # its strategy starts this script again for the other process
    else:
        scripts.script(RUNS[name][0])  # imports, once for all that are forked
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start: Any = start_processes
        start(launched, (name, folder, port), WORLD, start_method="fork")
