"""Run `examples/imagenet_lt.py` by several gloo processes on a tiny tree of JPEGs."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partialmethod
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
COUNTS = (14, 9, 6, 4, 3)
PER_TEST_CLASS = 4
SECONDS = 120.0  # after which a run that hangs is given up


def make_tree(root: Path) -> Path:
    """Write JPEGs of noise around a pattern for each class, a training and a test list, and return their folder."""
    from PIL import Image

    random = np.random.default_rng(0)
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for label, count in enumerate(COUNTS):
        pattern = random.integers(0, 256, (6, 6, 3))
        for number in range(count + PER_TEST_CLASS):
            name = "train" if number < count else "test"
            file = f"{name}/n{label}/{number}.JPEG"
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(pattern + random.integers(-60, 60, pattern.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((48, 40)).save(root / file)
            lists[name].append(f"{file} {label}\n")
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("".join(lines))
    return root


def options(tree: Path, output: Path, *more: str) -> list[str]:
    """Return a command line that trains for three short epochs; later options win over earlier ones."""
    common = (
        "--recipe small --warmup-epochs 0 --epochs 3 --resolution 32 --batch-size 12 --workers 0 --threads 1 "
        "--device cpu --deterministic --checkpoint-steps 1 --no-tensorboard --quiet"
    )
    lists = [f"--data-dir={tree}", f"--train-list={tree / 'train.txt'}", f"--test-list={tree / 'test.txt'}"]
    return [*common.split(), *lists, f"--output-dir={output}", *more]


def main(environment: dict[str, str], argv: list[str], errors: Path | None, prepare: Callable[[], None] | None) -> None:
    """Be one process."""
    os.environ.update(environment)
    if errors is not None:
        with (errors / f"stderr{environment['RANK']}").open("w") as file:
            os.dup2(file.fileno(), 2)
    sys.path.insert(0, str(EXAMPLES))
    import imagenet_lt

    if prepare is not None:
        prepare()
    sys.exit(imagenet_lt.main(argv))


def end_like_nccl() -> None:
    """Have the end of a process group wait for collectives that others are in, as NCCL does: here, without end."""
    import torch.distributed as dist

    dist.destroy_process_group = lambda *_: time.sleep(SECONDS)


def fail_on_rank_1() -> None:
    """Let the second process raise what nobody expects, in its second step."""
    end_like_nccl()
    from longtail.imagenet.engine import Trainer

    whole = Trainer._train_step

    def failing(self: Trainer, step: int, *args: Any) -> None:
        whole(self, step, *args)
        if self.world.rank == 1 and step == 1:
            raise RuntimeError("nobody expects it")

    Trainer._train_step = failing  # type: ignore[assignment, method-assign]


def compile_to_graphs() -> None:
    """Have modules compiled to whole graphs or not at all, which the eager backend then runs: in seconds."""
    import torch

    whole = torch.nn.Module.compile
    torch.nn.Module.compile = partialmethod(whole, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]


class Ranks:
    """The processes of one run, as torchrun would start them.

    Args:
        argv: of the script.
        size: how many.
        errors: folder for what each writes to stderr; None leaves it where it goes.
        prepare: what each calls first.
    """

    def __init__(
        self,
        argv: Sequence[str],
        size: int = 2,
        *,
        errors: Path | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        context = _context()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
        self.processes: list[ForkServerProcess] = []
        for rank in range(size):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=main, args=(environment, list(argv), errors, prepare))
            process.start()
            self.processes.append(process)

    def wait(self) -> list[int | None]:
        """Wait for all and return their exit codes; what still runs after `SECONDS` is killed, as its code says."""
        end = time.monotonic() + SECONDS
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0))
        return self.kill()

    def kill(self) -> list[int | None]:
        """Kill what still runs and return the exit codes."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def until(self, happened: Callable[[], Any]) -> None:
        """Wait for something that the processes do."""
        end = time.monotonic() + SECONDS
        while not happened():
            if time.monotonic() > end or not all(process.is_alive() for process in self.processes):
                raise AssertionError(f"did not happen; exit codes {self.kill()}")
            time.sleep(0.01)


def _context() -> ForkServerContext:
    """Processes are forked from one that has imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torchvision.transforms.v2", "torch.distributed.checkpoint.state_dict", "tqdm", "scipy.stats"]
    )
    return context
