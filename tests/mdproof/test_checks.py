"""A block without assertion, output or figure is reported, unless a later one uses its names."""

import pytest

from mdproof.block import Block, Options
from mdproof.checks import checks_nothing

NOTHING = "no assertion, no output, no figure, and no later block uses its names"


def block(code: str, kind: str = "code", **options: str) -> Block:
    """Return a block of a page."""
    return Block("a.md", 1, 1, kind, code, Options(**options))  # pyrefly: ignore


@pytest.mark.parametrize(
    "code", ["x = 1", "def f():\n    assert True", "import math", "sorted([2, 1])\ny = 2"]
)
def test_a_block_that_only_runs_is_reported(code: str) -> None:
    assert checks_nothing(block(code), {"outputs": []}) == NOTHING


@pytest.mark.parametrize(
    "code", ["assert 1 < 2", "for i in (1, 2):\n    assert i", "t.assert_close(a, b)"]
)
def test_an_assertion_checks_something(code: str) -> None:
    assert checks_nothing(block(code), {"outputs": []}) == ""


def test_an_output_checks_something() -> None:
    assert checks_nothing(block("x = 1"), {"outputs": [{"type": "stdout", "text": "1"}]}) == ""


def test_a_definition_that_a_later_block_uses_is_checked_there() -> None:
    first = block("def f():\n    return 1")
    assert checks_nothing(first, {}, [block("y = 2"), block("print(f())")]) == ""
    assert checks_nothing(first, {}, [block("f = 2\nprint(f)")]) == NOTHING


def test_a_source_fence_an_exception_and_a_block_that_is_not_run_are_not_asked() -> None:
    assert checks_nothing(block("import a", kind="source"), {}) == ""
    assert checks_nothing(block("x = 1", raises="ValueError"), {}) == ""
    assert checks_nothing(block("x = 1", norun="slow"), {}) == ""
