"""The published recipes, as their codes run them."""

from __future__ import annotations

import math

import pytest
from longtail.recipes import RECIPES, Schedule, get_recipe


def rates(name: str, epochs: int = 200) -> list[float]:
    recipe = get_recipe(name, "cifar100")
    schedule = Schedule(recipe.lr, epochs, recipe.warmup_epochs, recipe.schedule, recipe.milestones)
    return [schedule(epoch) for epoch in range(epochs)]


def published(epoch: int, first: float, second: tuple[int, float]) -> float:
    """The rule of the published codes, for 1-based epochs."""
    if epoch <= 5:
        return 0.1 * epoch / 5
    if epoch > second[0]:
        return 0.1 * second[1]
    return 0.1 * first if epoch > 160 else 0.1


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("ldam", 0.01, (180, 1e-4)),
        ("mislas", 0.1, (180, 0.01)),
        ("etfdr", 0.1, (180, 0.01)),
        ("arb", 0.1, (240, 0.01)),
    ],
)
def test_step_schedules(name: str, first: float, second: tuple[int, float]) -> None:
    assert rates(name) == pytest.approx([published(epoch, first, second) for epoch in range(1, 201)])


def test_milestones_scale_with_the_epochs() -> None:
    assert rates("mislas", 20)[5:] == pytest.approx([0.1] * 11 + [0.01] * 2 + [0.001] * 2)
    assert rates("arb", 20)[-1] == pytest.approx(0.01)


def test_cosine_warms_up_and_ends_near_zero() -> None:
    schedule = Schedule(0.1, epochs=10, warmup_epochs=2, kind="cosine")
    values = [schedule(epoch, step, 5) for epoch in range(10) for step in range(5)]
    assert values[:10] == pytest.approx([0.01 * k for k in range(1, 11)])
    assert values[10] == pytest.approx(0.1)
    assert values[30] == pytest.approx(0.05)  # half of the 40 steps after the warm-up
    assert 0 < values[-1] < 0.001
    assert sorted(values[10:], reverse=True) == values[10:]


def test_cosine_without_warm_up() -> None:
    assert Schedule(0.1, epochs=4, warmup_epochs=0, kind="cosine")(0, 0, 5) == pytest.approx(0.1)


def test_published_values() -> None:
    for name in ("ldam", "mislas", "etfdr", "arb"):
        recipe = RECIPES[name]
        assert (recipe.depth, recipe.resolution, recipe.epochs, recipe.batch_size) == (32, 32, 200, 128)
        assert (recipe.lr, recipe.sgd_momentum, recipe.weight_decay) == (0.1, 0.9, 2e-4)
    assert [RECIPES[name].mixup for name in ("ldam", "mislas", "etfdr", "arb")] == [0, 1, 1, 0]
    assert [get_recipe("etfdr", dataset).width for dataset in ("cifar10", "cifar100")] == [1, 2]
    assert [get_recipe("mislas", dataset).width for dataset in ("cifar10", "cifar100")] == [1, 1]


def test_unknown_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="recipe is 'best'"):
        get_recipe("best", "cifar10")


def test_epoch_cosine_warms_up_by_epochs() -> None:
    schedule = Schedule(0.1, epochs=12, warmup_epochs=2, kind="epoch-cosine")
    want = [0.05, 0.1] + [0.05 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    assert [schedule(epoch) for epoch in range(12)] == pytest.approx(want)


def test_the_schedule_that_glmc_sets_after_each_epoch() -> None:
    """As its ImageNet code has it: epoch 0 at the full rate, 0.1 (e + 1) / 10 after epoch e up to 10, then a cosine."""
    schedule = Schedule(0.1, epochs=135, warmup_epochs=10, kind="glmc-published")
    after = [0.1 * (e + 1) / 10 if e <= 10 else 0.05 * (1 + math.cos(math.pi * (e - 9) / 126)) for e in range(134)]
    assert [schedule(epoch) for epoch in range(135)] == pytest.approx([0.1, *after])
