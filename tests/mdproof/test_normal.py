"""Keys see code, and not comments, docstrings or layout."""

import pytest

from mdproof.normal import digest, normalise

SAME = [
    ("a=1", "a = 1  # one"),
    ('def f():\n    """Doc."""\n    return 1', "def f():\n\n    return 1"),
    ('"""Module."""\na = 1', "a = 1"),
    ("f(x, y)", "f(\n    x,\n    y,\n)"),
    ("a = 'x'", 'a = "x"'),
    ("a = u'x'", "a = 'x'"),
]
DIFFERENT = [
    ("a = 1", "a = 2"),
    ("a = 1", "a = 1.0"),
    ("a - b", "a + b"),
    ("a = 'x'", "a = b'x'"),
    ("f(x=1)", "f(y=1)"),
    ("a = '''doc'''", "a = '''dog'''"),
    ("def f(a, /): ...", "def f(a): ..."),
    ("f'{a!r}'", "f'{a}'"),
    ("x: int", "x: float"),
    ("async def f(): pass", "def f(): pass"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_comments_docstrings_and_layout_do_not_count(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_everything_else_counts(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


def test_a_digest_does_not_run_texts_together() -> None:
    assert digest("ab", "c") != digest("a", "bc")
