"""Every pitfall has a test that says so, and what docs/pitfalls.md and docs/maths.md name as their tests exists."""

import ast
import functools
import re
from pathlib import Path

import pytest

import spalign

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
LIST = DOCS / "pitfalls.md"
GROUPS = {"A": 20, "B": 12, "C": 13, "D": 12}
PITFALLS = [f"{group}{number}" for group, last in GROUPS.items() for number in range(1, last + 1)]

# Number: where it is said, what is said there, and why no test of behaviour can be.
DOCUMENTED = {
    "B10": (
        spalign.SpASlerp,
        "Momentum buffers of the optimizer keep pointing where they did",
        "momentum that points the old way after a rotation is what a user may want, and nothing of spalign touches it",
    ),
}


def numbers_in(text: str) -> set[str]:
    """Return the pitfalls that a text names, ranges such as "C1 to C3" included."""
    found = set()
    for group, first, last in re.findall(r"\b([A-D])(\d{1,2})\b(?: to [A-D](\d{1,2})\b)?", text):
        found |= {f"{group}{n}" for n in range(int(first), int(last or first) + 1)}
    return found


@functools.cache
def docstrings_of_tests() -> dict[str, str]:
    """Return the docstrings of test functions, and of what they run in other processes, by ``file::name``."""
    found: dict[str, str] = {}
    for file in TESTS.rglob("*.py"):
        if file == Path(__file__):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                found[f"{file.relative_to(TESTS.parent).as_posix()}::{node.name}"] = ast.get_docstring(node) or ""
    return found


@pytest.mark.parametrize("pitfall", [p for p in PITFALLS if p not in DOCUMENTED])
def test_a_test_names_the_pitfall(pitfall: str) -> None:
    named = [name for name, text in docstrings_of_tests().items() if pitfall in numbers_in(text)]
    assert named, f"no docstring of a test names {pitfall}: write a test that fails without its handling, and say so"


def test_what_only_documentation_can_handle_is_documented() -> None:
    """The docstring a user reads says it."""
    for where, what, why in DOCUMENTED.values():
        assert what in " ".join((where.__doc__ or "").split()), why


def test_the_search_finds_what_it_is_there_for() -> None:
    """Ranges, single numbers, no longer words."""
    assert numbers_in("Pitfalls A1, B12 and C1 to C3; CIFAR10, A100 and D are none") == {"A1", "B12", "C1", "C2", "C3"}
    assert len(PITFALLS) == 57


@pytest.mark.skipif(not LIST.exists(), reason="the tests run without the documentation here")
def test_the_list_has_every_pitfall_once_and_a_test_of_each() -> None:
    text = LIST.read_text(encoding="utf-8")
    assert re.findall(r"^\*\*([A-D]\d+)\.", text, re.MULTILINE) == PITFALLS
    for entry in re.split(r"^(?=\*\*[A-D]\d+\.)", text, flags=re.MULTILINE)[1:]:
        assert "`tests/" in entry, f"an entry names no test: {entry[:60]}"


@pytest.mark.skipif(not LIST.exists(), reason="the tests run without the documentation here")
@pytest.mark.parametrize("page", ["pitfalls.md", "maths.md"])
def test_named_tests_exist(page: str) -> None:
    tests = docstrings_of_tests() | {
        f"tests/{Path(__file__).name}::{name}": "" for name in globals() if name.startswith("test_")
    }
    names = re.findall(r"`(tests/[^`]+)`", (DOCS / page).read_text(encoding="utf-8"))
    assert names
    for name in names:
        exists = name in tests if "::" in name else (TESTS.parent / name).exists()
        assert exists, f"docs/{page} names {name}, which does not exist"
