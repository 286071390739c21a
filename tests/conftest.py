"""One thread, one seed, no timing limits: the suite says the same on every machine."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell's background, which would be inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).parent / "distributed"))  # for `import rank_parts`
sys.path.insert(0, str(Path(__file__).parent))  # for `import reference`: importlib mode leaves sys.path alone

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # Triton asks when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("spalign", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("spalign")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pretend-gpu",
        action="store_true",
        help="run the tests of a GPU on a pretended one: shows slips in code and tests, and nothing of CUDA's numbers",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is None:
            continue
        if not config.getoption("--pretend-gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif marker.kwargs.get("real"):
            item.add_marker(pytest.mark.skip(reason="needs a real CUDA device"))


@pytest.fixture(autouse=True)
def _pretended_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    marker = request.node.get_closest_marker("gpu")
    if torch.cuda.is_available() or marker is None:
        yield
        return
    from pretended_gpu import pretended_gpu, why_kernels_cannot_run

    with pretended_gpu(own_kernels=marker.kwargs.get("own_kernels", True) and not why_kernels_cannot_run()):
        yield


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
