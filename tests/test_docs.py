"""The pages' snippets run, their links lead somewhere, and the method cards name the defaults that the library has."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import spalign

ROOT = Path(__file__).resolve().parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]
CARDS = {
    "spa_reg.md": spalign.SpARegLoss,
    "spa_slerp.md": spalign.SpASlerp,
    "spa_proj.md": spalign.SpAProj,
    "class_means.md": spalign.ClassMeanTracker,
}
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the tests run without the documentation here")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def snippets() -> list[Any]:
    """Return the Python of all pages; what has prompts is run by doctest."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        plain = [block for block in blocks if not block.startswith(">>>")]
        found += [pytest.param(block, id=f"{name_of(page)}-{i}") for i, block in enumerate(plain)]
    return found


@pytest.mark.parametrize("code", snippets())
def test_snippets_run(code: str) -> None:
    torch.manual_seed(0)
    exec(code, {})


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name_of(page)} links to {link}, which does not exist"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)} links to {link}, and there is no such heading"


@pytest.mark.parametrize("card", CARDS)
def test_cards_name_the_settings_and_their_defaults(card: str) -> None:
    text = (ROOT / "docs" / "methods" / card).read_text(encoding="utf-8")
    settings = inspect.signature(CARDS[card]).parameters
    named = []
    for names, default in re.findall(r"^\| (`[^|]+`)[^|]* \| ([^|]*)\|", text, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            if card == "spa_reg.md" and name in ("lam", "momentum"):  # of the loop, and of the tracker
                continue
            assert name in settings, f"{card} names {name}, which {CARDS[card].__name__} does not take"
            expected = settings[name].default
            shown = default.strip().strip("`")
            if expected is inspect.Parameter.empty:
                assert not shown, f"{name} has no default"
            else:
                assert ast.literal_eval(shown) == expected, name
            named.append(name)
    what_the_loop_has = {"classifier", "tracker", "optimizer", "num_classes", "feature_dim", "device"}
    assert set(named) == set(settings) - what_the_loop_has


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"({name_of(page)}" in text, f"README.md does not link to {name_of(page)}"
