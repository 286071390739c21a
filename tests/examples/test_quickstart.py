"""The quickstart runs as a user would run it, and refuses bad options before it trains."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def run(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "error", str(SCRIPT), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=300)


def test_quickstart_prints_a_table_and_saves_a_figure(tmp_path: Path) -> None:
    result = run(tmp_path, "--epochs", "2", "--seeds", "1")
    assert result.returncode == 0, result.stderr
    assert "8/8" in result.stderr  # the progress bar got to its end: 4 variants x 2 epochs
    lines = result.stdout.splitlines()[-12:]
    header = next(i for i, line in enumerate(lines) if "alignment" in line and "few" in line and "±" not in line)
    rows = [line.split() for line in lines[header + 1 : header + 5]]
    assert [row[0] for row in rows] == ["plain", "+Reg", "+SLERP", "+Proj"]
    for row in rows:
        values = [float(cell) for cell in row[1::3]]
        assert len(values) == 6
        assert all(0.0 <= accuracy <= 100.0 for accuracy in values[:4])
        assert -1.0 <= values[4] <= 1.0
    assert "docs/results.md" in lines[-1]
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", "0"), "--epochs is 0, expected at least 1"),
        (("--seeds", "-3"), "--seeds is -3, expected at least 1"),
        (("--output", "figure.txt"), "--output is figure.txt, expected a .png, .pdf or .svg file"),
        (("--output", "missing/figure.png"), "in a folder that exists"),
    ],
)
def test_quickstart_refuses_bad_options(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = run(tmp_path, *options)
    assert result.returncode == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())
