"""Accelerate, Lightning and the Hugging Face Trainer, each with two processes of its own making, against one process.

The scripts of examples/integrations as they are, but in float64 and without batch norm, whose statistics are those of a
process's own share. What the processes do is in several_processes.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import integration_scripts as scripts
import pytest
import torch

scripts.available("accelerate", "lightning", "transformers")

from integrations import several_processes  # noqa: E402
from integrations.several_processes import EPOCHS, RUNS, WORLD, train  # noqa: E402

pytestmark = [
    *scripts.FOREIGN_WARNINGS,
    pytest.mark.skipif(not torch.distributed.is_gloo_available() or not hasattr(os, "fork"), reason="needs gloo, fork"),
]
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where processes leave what they come to. All frameworks start at once: most of their time is imports."""
    folder = tmp_path_factory.mktemp("processes")
    path = os.pathsep.join([str(Path(scripts.__file__).parent), *(p for p in sys.path if p)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    started: dict[str, subprocess.Popen[bytes]] = {}
    for name in RUNS:
        command = [sys.executable, "-W", "ignore", several_processes.__file__, name, str(folder)]
        with (folder / f"{name}.log").open("w") as log:
            started[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for name, process in started.items():
            assert process.wait(timeout=200) == 0, (folder / f"{name}.log").read_text()[-4000:]
        yield folder
    finally:
        for process in started.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name: str, folder: Path, tmp_path: Path) -> None:
    """A16, B8, B11, C1 to C3: weights, means and schedule after eight steps on the concatenated batches."""
    first, second = (torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in range(WORLD))
    with mock.patch.dict(os.environ):  # in which Lightning leaves a rank, which Accelerate takes for one of several
        want: dict[str, Any] = train(name, 1, tmp_path)
    assert first.keys() == second.keys() == want.keys()
    assert first["acts"] == second["acts"] == want["acts"] == (STEPS, STEPS, STEPS, EPOCHS, EPOCHS)
    assert want["rotated last"] == first["rotated last"] > 0
    one, other, alone = (
        {k: v for k, v in found.items() if isinstance(v, torch.Tensor)} for found in (first, second, want)
    )
    assert [k for k in one if not torch.equal(one[k], other[k])] == []
    # float64; sums of 64 samples in two parts, and eight steps with momentum that magnify their rounding.
    torch.testing.assert_close(one, alone, rtol=1e-9, atol=1e-10)
