"""Options that are wrong end with exit code 2 and a line that says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cifar_lt
import pytest

Options = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--imbalance 0.5", "--imbalance is 0.5; expected 1 or more"),
        ("--imbalance 1000", "leaves class"),
        ("--epochs 0", "--epochs is 0"),
        ("--warmup-epochs 3", "less than the 3 epochs"),
        ("--lr -1", "--lr is -1.0"),
        ("--lr nan", "--lr is nan"),
        ("--batch-size 1", "--batch-size is 1"),
        ("--weight-decay -1", "--weight-decay"),
        ("--depth 10", "depth is 10"),
        ("--width 0", "width is 0"),
        ("--resolution 12", "resolution is 12"),
        ("--mixup -1", "--mixup is -1.0"),
        ("--accumulate 33", "--accumulate is 33"),
        ("--clip-norm -1", "--clip-norm"),
        ("--threads 0", "--threads is 0"),
        ("--validation -1", "--validation is -1"),
        ("--seed -1", "--seed is -1"),
        ("--subset-seed -1", "--subset-seed is -1"),
        ("--device abacus", "device is 'abacus'"),
        ("--stop-after-epochs 0", "--stop-after-epochs is 0"),
        ("--evaluate-every 0", "--evaluate-every is 0"),
        ("--spareg inf", "--spareg is inf"),
        ("--alpha-max 2", "--alpha-max is 2.0"),
        ("--threshold 2", "--threshold is 2.0"),
        ("--gamma -0.1", "--gamma is -0.1"),
        ("--momentum 0", "--momentum is 0.0"),
        ("--method arb --clamp-logits -1", "--clamp-logits is -1.0; expected 0 or more"),
        ("--frozen-head --spaslerp", "--frozen-head fixes the classifier"),
        ("--frozen-head --spareg 1 --spareg-align classifier", "--spareg-align features"),
        ("--recipe ldam", "two recipes"),
        ("--resume --overwrite", "leave one out"),
        ("--capture", "--capture records a CUDA graph, which cpu has not"),
        ("--capture --amp fp16", "use --amp bf16 or off"),
        ("--data-dir nowhere", "--data-dir"),
        ("--dataset cifar100", "no cifar100 under"),
    ],
)
def test_bad_value(
    tiny_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    assert cifar_lt.main(tiny_options("run", *more.split())) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", ["--spareg", "--amp fp8", "--recipe best", "--epochs x"])
def test_bad_syntax(tiny_options: Options, more: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cifar_lt.main(tiny_options("run", *more.split()))
    assert caught.value.code == 2


def test_help_and_defaults() -> None:
    args = cifar_lt.build_parser().parse_args(["--data-dir", "d"])
    settings = cifar_lt.settings_from(args)
    assert (settings.recipe_name, settings.recipe.epochs, settings.alignment.names) == ("ldam", 200, [])
    assert settings.output_dir == Path("runs/cifar100-if100-ldam-ce-seed0")
    assert "--spareg-align" in cifar_lt.build_parser().format_help()


def test_given_options_replace_the_recipe() -> None:
    command = "--data-dir d --recipe etfdr --epochs 7 --warmup-epochs 0 --mixup 0 --width 4 --channels-last"
    recipe = cifar_lt.settings_from(cifar_lt.build_parser().parse_args(command.split())).recipe
    assert (recipe.epochs, recipe.warmup_epochs, recipe.mixup, recipe.width) == (7, 0, 0.0, 4)
    assert recipe.channels_last
    assert recipe.batch_size == 128


def test_missing_images_exit_2(tiny_options: Options, capsys: pytest.CaptureFixture[str], tiny_data: Path) -> None:
    (tiny_data / "cifar-10-batches-py" / "data_batch_5").unlink()
    assert cifar_lt.main(tiny_options("run")) == 2
    assert "data_batch_5" in capsys.readouterr().err
