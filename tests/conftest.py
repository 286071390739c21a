"""One thread, one seed, no timing limits: the suite says the same on every machine."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent / "distributed"))  # for `import rank_parts`
sys.path.insert(0, str(Path(__file__).parent))  # for `import reference`: importlib mode leaves sys.path alone

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("spalign", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("spalign")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
