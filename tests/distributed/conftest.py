"""The ranks: one process starts two and then four others, once, and each of them runs every part."""

import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for `import rank_parts`

import pytest
import rank_parts
import torch
from rank_parts import Found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ranks leave what they found, and checkpoints; all have ended."""
    folder = tmp_path_factory.mktemp("ranks")
    # The package under test, which may be on the path of this process alone.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    log = folder / "log.txt"
    with log.open("w") as output:
        command = [sys.executable, "-W", "ignore", str(Path(rank_parts.__file__)), str(folder)]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        # Generous: a hang is what is looked for, not slowness.
        process.wait(timeout=500)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        pytest.fail("the ranks wait for each other: " + log.read_text()[-4000:])
    assert process.returncode == 0, log.read_text()[-4000:]
    return folder


@pytest.fixture(scope="session")
def found(folder: Path) -> Found:
    """Return what each rank found, and this process, which resumes what two ranks have saved."""
    found: Found = {}
    for world in (2, 4):
        paths = [folder / f"world{world}rank{rank}.pt" for rank in range(world)]
        assert all(path.exists() for path in paths), [path.read_text() for path in folder.glob("error*.txt")]
        found[world] = [torch.load(path, weights_only=True) for path in paths]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found[1] = [{name: rank_parts.PARTS[name].run(0, 1, folder) for name in rank_parts.names(1)}]
    torch.set_num_threads(threads)
    return found
