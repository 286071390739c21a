"""`imagenet_lt.py` on two machines: two network namespaces of this one, with names of their own."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from imagenet_ranks import EXAMPLES, SECONDS, make_tree, options
from torch._C._distributed_c10d import TCPStore

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install -e '.[imagenet]'")
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not beside the tests", allow_module_level=True)
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))

from longtail.parallel import meet

NETWORK = "10.77.13"


# --- who belongs to which start ---------------------------------------------------------------------------------------


def start(port: int, ranks: range, size: int, seconds: float = 20.0) -> list[str | Exception]:
    """Let ranks meet, each with a connection of its own, and return what each got."""
    got: list[Any] = [None] * len(ranks)

    def one(place: int, rank: int) -> None:
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=seconds))
        try:
            got[place] = meet(store, rank, size)
        except Exception as error:  # for the test to look at
            got[place] = error

    threads = [threading.Thread(target=one, args=place) for place in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def test_every_start_on_one_store_has_a_name_of_its_own() -> None:
    """Also after a start that some ranks never came to, or that was left before its first rank had come."""
    server = TCPStore("127.0.0.1", 0, is_master=True)
    names = [start(server.port, range(size), size) for size in (3, 3, 1, 2, 3)]
    assert all(len(set(of_one)) == 1 for of_one in names)
    assert len({of_one[0] for of_one in names}) == len(names)
    incomplete, *_ = start(server.port, range(2), 3, seconds=1.0)
    assert "of 3 ranks, 2 came within 0:00:01" in str(incomplete)
    (alone,) = start(server.port, range(2, 3), 3, seconds=1.0)
    assert isinstance(alone, dist.DistError)
    after = start(server.port, range(3), 3)
    assert len({str(name) for name in after}) == 1
    assert str(after[0]) not in {str(of_one[0]) for of_one in names}


# --- two machines -----------------------------------------------------------------------------------------------------


def run(command: str) -> None:
    subprocess.run(shlex.split(command), check=True, capture_output=True)


@contextlib.contextmanager
def machines(folder: Path) -> Iterator[list[str]]:
    """Make two network namespaces, joined by a cable, and yield their names."""
    names = [f"spalign-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            run(f"ip netns add {name}")
        run(f"ip link add cable0 netns {names[0]} type veth peer name cable1 netns {names[1]}")
        for number, name in enumerate(names):
            run(f"ip -n {name} addr add {NETWORK}.{number + 1}/24 dev cable{number}")
            run(f"ip -n {name} link set cable{number} up")
            run(f"ip -n {name} link set lo up")
        hosts = "".join(f"{NETWORK}.{number + 1} node{number}\n" for number in range(2))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


class Machine:
    """torchrun with one process on a machine."""

    def __init__(self, number: int, name: str, folder: Path, argv: list[str]) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        torchrun += ["--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=1", "--rdzv-endpoint=node0:29500"]
        inside = f"mount --bind {folder / 'hosts'} /etc/hosts && hostname node{number} && exec "
        inside += shlex.join([*torchrun, str(EXAMPLES / "imagenet_lt.py"), *argv])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.log = folder / f"machine{number}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "bash", "-c", inside],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def rank(self) -> int:
        """Return the process that trains."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=True)
        return int(found.stdout.split()[-1])

    def wait(self) -> int:
        try:
            return self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def can_make_machines() -> bool:
    tools = all(shutil.which(tool) for tool in ("ip", "unshare", "mount", "hostname", "pgrep"))
    probe = ["unshare", "--net", "--uts", "--mount", "true"]
    return tools and os.geteuid() == 0 and subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_make_machines(), reason="needs root, network namespaces, iproute2 and procps")
def test_a_rank_that_dies_on_either_machine_costs_no_bit(tmp_path: Path) -> None:
    """torchrun counts restarts on that machine alone, and offers both machines the store of the first start."""
    tree = make_tree(tmp_path / "tree")
    ended = {}
    with machines(tmp_path) as names:
        for dies in (None, 0, 1):
            folder = tmp_path / f"run-{dies}"
            argv = options(tree, folder, *["--epochs", "4", "--spareg", "0.3", "--spaslerp", "--spaproj"])
            both = [Machine(number, name, tmp_path, argv) for number, name in enumerate(names)]
            if dies is not None:
                end = time.monotonic() + SECONDS
                while not list((folder / "checkpoints").glob("epoch-0001*")) and time.monotonic() < end:
                    time.sleep(0.05)
                os.kill(both[dies].rank(), signal.SIGKILL)
            assert [machine.wait() for machine in both] == [0, 0], both[0].log.read_text()[-3000:]
            ended[dies] = torch.load(folder / "model.pt", weights_only=True)
    for dies in (0, 1):
        for name, value in ended[None].items():
            assert torch.equal(ended[dies][name], value), (dies, name)
