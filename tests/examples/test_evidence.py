"""The figures of a stage hold the curves of its records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import evidence  # noqa: E402


def test_a_stage_of_several_settings_has_a_row_of_panels_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of `regimes` trains for fewer epochs than the others."""
    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    evidence.figure(evidence.RESULTS, "regimes", tmp_path / "regimes.svg")
    assert (tmp_path / "regimes.svg").stat().st_size > 0
    stage, records = evidence.STAGES["regimes"], evidence.read_records(evidence.RESULTS, "regimes")
    panels = [(setting, key) for setting in stage.settings for key in ("accuracy", "train_accuracy", "alignment")]
    for axis, (setting, key) in zip(drawn[0].axes, panels, strict=True):
        assert [line.get_label() for line in axis.get_lines()] == list(stage.variants)
        for line in axis.get_lines():
            same = [r["curves"][key] for r in records if (r["setting"], r["variant"]) == (setting, line.get_label())]
            np.testing.assert_allclose(line.get_ydata(), np.mean(same, axis=0), rtol=1e-12)  # float64, a sum of two
    monkeypatch.undo()
    plt.close(drawn[0])


def test_a_stage_without_a_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"evidence-main\.jsonl holds no finished run; train first"):
        evidence.figure(tmp_path, "main", tmp_path / "main.svg")
    assert not (tmp_path / "main.svg").exists()
