"""Every script of examples/integrations: its diff is short, acts as it says, and switched off changes no bit."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import integration_scripts as scripts
import pytest
import torch

import spalign

scripts.available()

PACKAGES = {
    "lightning_callback": "lightning",
    "lightning_manual": "lightning",
    "accelerate_loop": "accelerate",
    "hf_trainer": "transformers",
    "timm_loop": "timm",
    "swa_loop": "torch",
    "cuda_graph_loop": "torch",
}
EPOCHS, BATCHES = 3, 8
every_script = pytest.mark.parametrize("name", PACKAGES)

pytestmark = scripts.FOREIGN_WARNINGS


def options(name: str, tmp_path: Path) -> dict[str, Any]:
    """Return what keeps a script quick and quiet, on the CPU; skip if its package is missing."""
    package = PACKAGES[name]
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[integrations]'")
    if package == "lightning":
        return dict(scripts.QUIET_LIGHTNING)
    if package == "accelerate":
        return {"cpu": True}
    if package == "transformers":
        pytest.importorskip("accelerate", reason="accelerate is not installed: pip install -e '.[integrations]'")
        return {"output_dir": str(tmp_path), "use_cpu": True}
    return {"device": "cpu", "capture": False} if name == "cuda_graph_loop" else {}


def test_every_script_is_here() -> None:
    assert {path.stem for path in scripts.FOLDER.glob("*.py")} == {*PACKAGES, "digits"}


def lines_in_training(statement: ast.stmt, lines: list[str]) -> list[str]:
    """Return what a marked statement adds besides imports, constructors and a class's own head."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return []
    if isinstance(statement, ast.ClassDef):
        body = [s for s in statement.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        return [line for s in body for line in lines_in_training(s, lines)]
    if isinstance(statement, ast.FunctionDef):
        body = [s for s in statement.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        inner = [line for s in body for line in lines_in_training(s, lines)]
        return [] if statement.name == "on_train_begin" else [lines[statement.lineno - 1], *inner]
    text = lines[statement.lineno - 1]
    assembled = isinstance(statement, ast.Assign | ast.AugAssign) and any(
        isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (*spalign.__all__, "SlerpCallback")
        for node in ast.walk(statement)
    )
    return [] if assembled or "to resume" in text else [text]


@every_script
def test_a_user_adds_at_most_three_lines_to_the_training_code(name: str) -> None:
    """Besides imports and constructors; and the docstring shows each of them."""
    text = scripts.source(name)
    lines = [line for s in scripts.added(name) for line in lines_in_training(s, text.splitlines())]
    assert 2 <= len(lines) <= 3, lines
    docstring = ast.get_docstring(ast.parse(text)) or ""
    shown = [line for line in docstring.splitlines() if re.match(r"\s*\+ (?!class )", line)]
    assert len(shown) == len(lines)
    for part in ("SpARegLoss", "SpASlerp", "SpAProj", "FeatureCapture"):
        assert any(part in ast.unparse(s) for s in scripts.added(name))


@every_script
def test_the_page_of_the_docs_shows_the_script_s_own_diff(name: str) -> None:
    page = (scripts.FOLDER.parents[1] / "docs" / "integrations.md").read_text()
    section = page.split(f"(../examples/integrations/{name}.py)")[1]
    shown = section.split("```diff\n")[1].split("```")[0]
    docstring = ast.get_docstring(ast.parse(scripts.source(name))) or ""
    block = [line for line in docstring.splitlines() if line.startswith("    ") and "python examples" not in line]
    assert shown.splitlines() == [line[4:] for line in block if "pip install" not in line]


def test_the_page_s_constructors_run() -> None:
    page = (scripts.FOLDER.parents[1] / "docs" / "integrations.md").read_text()
    built: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], built)
    assert isinstance(built["optimizer"], spalign.SpAProj)


@every_script
def test_switched_off_a_script_is_bit_equal_to_the_one_without_its_lines(name: str, tmp_path: Path) -> None:
    """D12: lambda 0, alpha 0, gamma 1."""
    more = options(name, tmp_path)
    with scripts.counting() as before:
        want = scripts.seeded(scripts.plain(name).train, scripts.strengths("all"), EPOCHS, **more)
    assert (before.fed, before.projected, before.rotated) == (0, 0, 0), "the twin has no alignment in it"
    got = scripts.seeded(scripts.script(name).train, scripts.strengths("off"), EPOCHS, **more)
    assert scripts.same_weights(got, want)


@every_script
def test_each_part_acts_once(name: str, tmp_path: Path) -> None:
    """A1, A7, A13, B11: the tracker is fed once per batch, projection runs once per step, rotation once per epoch."""
    from digits import evaluate

    more, train = options(name, tmp_path), scripts.script(name).train
    off = scripts.seeded(train, scripts.strengths("off"), EPOCHS, **more)
    with scripts.counting() as counts:
        aligned = scripts.seeded(train, scripts.strengths("all"), EPOCHS, **more)
    assert (counts.fed, counts.projected, counts.steps) == (EPOCHS * BATCHES,) * 3
    assert counts.rotated == EPOCHS
    (slerp,) = counts.slerps
    assert (slerp.last_step, slerp.alpha) == (EPOCHS, slerp.alpha_max)
    assert slerp.num_rotated > 0
    (tracker,) = counts.trackers
    # Every sample has weight 1, mixed ones too, up to the rounding of their labels.
    assert tracker.weight.sum().item() == pytest.approx(EPOCHS * BATCHES * 32, rel=1e-3)
    assert evaluate(aligned)[1] > evaluate(off)[1], "alignment of the plain twin"


@every_script
def test_each_strategy_changes_the_training(name: str, tmp_path: Path) -> None:
    more, train = options(name, tmp_path), scripts.script(name).train
    off = scripts.seeded(train, scripts.strengths("off"), 2, **more)  # 2: averages take a rotation in one batch later
    for strategy in ("reg", "slerp", "proj"):
        assert not scripts.same_weights(scripts.seeded(train, scripts.strengths(strategy), 2, **more), off), strategy


@every_script
def test_from_the_command_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints plain beside aligned, and leaves nothing behind; the captured loop says what it lacks."""
    options(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--epochs", "2"])
    if name == "cuda_graph_loop" and not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs a CUDA device"):
            runpy.run_path(str(scripts.FOLDER / f"{name}.py"), run_name="__main__")
        return
    runpy.run_path(str(scripts.FOLDER / f"{name}.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:-1]]
    assert [row[0] for row in rows] == ["accuracy", "plain", "aligned"]
    assert float(rows[2][-1]) > float(rows[1][-1]), "alignment"
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(sys, "argv", [name, "--epochs", "0"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(scripts.FOLDER / f"{name}.py"), run_name="__main__")
    assert "--epochs is 0, expected at least 1" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["off", "all"])
def test_the_captured_loop_equals_the_loop(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """D9: replays of the captured step against ordinary steps."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    train = scripts.script("cuda_graph_loop").train
    eager = scripts.seeded(train, scripts.strengths(strategy), 2, capture=False)
    captured = scripts.seeded(train, scripts.strengths(strategy), 2)
    for (key, a), b in zip(eager.state_dict().items(), captured.state_dict().values(), strict=True):
        # Sums may add up in another order, and 16 steps amplify a rounding.
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=key)
