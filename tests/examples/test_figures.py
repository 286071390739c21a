"""The figures draw what the records say, and the toy example and the theory what the library computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt


def write_run(folder: Path, accuracies: list[float | None], *, end: str = "\n") -> Path:
    """Write what a run with these accuracies by epoch leaves; None where it did not evaluate."""
    folder.mkdir(parents=True)
    lines = []
    for epoch, accuracy in enumerate(accuracies, 1):
        record: dict[str, Any] = {
            "epoch": epoch,
            "alignment": {"all": epoch / 10, "many": 0.1, "medium": 0.2, "few": 0.3},
        }
        if accuracy is not None:
            record["accuracy"] = {"all": accuracy}
        lines.append(json.dumps(record) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines)[:-1] + end)
    return folder


def test_curves_hold_the_epochs_that_all_seeds_have(tmp_path: Path) -> None:
    seeds = [write_run(tmp_path / "0", [None, 20.0, 25.0]), write_run(tmp_path / "1", [10.0, 30.0])]
    curves = figures.curves_of(seeds, ["accuracy/all", "alignment/all"])
    epochs, values_SE = curves["accuracy/all"]
    assert epochs.tolist() == [2]
    assert values_SE.tolist() == [[20.0], [30.0]]
    assert curves["alignment/all"][0].tolist() == [1, 2]


def test_the_table_has_mean_and_deviation_of_the_last_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a", [9.0, 20.0]), write_run(tmp_path / "b", [9.0, 30.0])
    one = write_run(tmp_path / "c", [40.0])
    output = tmp_path / "figure.svg"
    assert figures.main(["curves", f"CE={a}", f"CE={b}", f"with = in it={one}", "--output", str(output)]) == 0
    rows = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["CE"] == ["25.00", "±", "7.07", "0.200", "±", "0.000", "2"]  # sqrt(50), of two seeds
    assert rows["with = in it"] == ["40.00", "0.100", "1"]
    text = output.read_text()
    assert ">CE<" in text
    assert "test accuracy" not in text  # the records of a run with a validation set are of that
    assert "<dc:date>" not in text
    assert figures.main(["groups", f"CE={a}", f"CE={b}", "--output", str(tmp_path / "groups.png")]) == 0
    assert (tmp_path / "groups.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_that_a_run_is_writing_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [10.0, 20.0, 30.0], end="")
    assert [record["epoch"] for record in figures.read_run(run)] == [1, 2]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (None, "holds no metrics.jsonl; expected an output folder of cifar_lt.py"),
        ("", "is empty: the run has not finished an epoch yet"),
        ('{"epoch": 1}\nx\n{"epoch": 3}\n', "line 2, is no record"),
        ('{"epoch": 1}\n', "no epoch has accuracy/all in all of"),
    ],
    ids=("no run", "no epoch", "a bad line", "no accuracy"),
)
def test_what_is_no_run_is_named(
    tmp_path: Path, records: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if records is not None:
        (tmp_path / "metrics.jsonl").write_text(records)
    with pytest.raises(SystemExit) as stop:
        figures.main(["curves", f"CE={tmp_path}", "--output", str(tmp_path / "figure.png")])
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert str(tmp_path) in error
    assert not (tmp_path / "figure.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["curves", "runs/ce"], "'runs/ce' is not NAME=FOLDER; write for example CE=runs/ce"),
        (["groups", "=runs/ce"], "'=runs/ce' is not NAME=FOLDER"),
        (["exponents", "--output", "figure.txt"], "--output is figure.txt, expected a .png, .pdf or .svg file"),
        (["sphere", "--spareg", "nan"], "--spareg is nan, expected a finite weight"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        figures.main(options)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_sphere_shows_unit_vectors_that_the_term_brings_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "SNAPSHOTS", (0, 10))
    plain, aligned = (figures.train_toy(weight, 0, (0, 10)) for weight in (0.0, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(plain[0], aligned[0], strict=True)), "before training they are one"
    for w_CD, mean_CD in (*plain.values(), *aligned.values()):
        for x_CD in (w_CD, mean_CD):
            assert x_CD.norm(dim=1).numpy() == pytest.approx(np.ones(4), rel=1e-5)  # float32, three dimensions
    cosine = [(w_CD * mean_CD).sum(1).mean().item() for w_CD, mean_CD in (plain[10], aligned[10])]
    assert cosine[1] > cosine[0] + 0.1  # 0.64 and 0.99 where this was written
    assert figures.main(["sphere", "--output", str(tmp_path / "sphere.png")]) == 0
    last = capsys.readouterr().out.splitlines()[-2].split()
    assert [float(x) for x in last[-4:]] == pytest.approx((aligned[10][0] * aligned[10][1]).sum(1).tolist(), abs=5e-4)


def test_the_exponents_of_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed for a plane of three classes turned by 75 degrees, in plain numpy: 0.0335, above the bound."""
    turn = np.radians(75)
    etf = np.array([[np.cos(a), np.sin(a)] for a in (0, 2 * np.pi / 3, 4 * np.pi / 3)])
    w = etf @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    pairs = [(c, k) for c in range(3) for k in range(3) if c != k]
    printed = min(((w[c] - w[k]) @ etf[c]) ** 2 / (2 * ((w[c] - w[k]) ** 2).sum()) for c, k in pairs)
    assert printed == pytest.approx(0.0335, abs=5e-5)
    assert figures.printed_exponent(torch.tensor(etf), torch.tensor(w)) == pytest.approx(printed, rel=1e-12)

    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    assert figures.main(["exponents", "--output", str(tmp_path / "exponents.svg")]) == 0
    for axis in drawn[0].axes:
        lines = {line.get_label(): np.asarray(line.get_ydata(), dtype=float) for line in axis.get_lines()}
        bound = lines["Eq. 14, the bound"]
        (wide,) = (values for label, values in lines.items() if str(label).startswith("the same in"))
        assert wide == pytest.approx(bound, abs=1e-12)  # float64; with enough dimensions the bound is attained
        for label, values in lines.items():
            if label != "Eq. 13 as printed":
                assert (values <= bound + 1e-12).all(), label
    monkeypatch.undo()
    plt.close(drawn[0])
