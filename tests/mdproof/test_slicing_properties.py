"""Random programs, cut into blocks: the copy that the engine would take does what the page does."""

import contextlib
import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdproof.fingerprint import fingerprint
from mdproof.slicing import LEVELS, close, needed_before, read_statements

N = st.sampled_from("abcd")
F = st.sampled_from(["f", "g", "h"])
K = st.integers(0, 5)

STATEMENTS = st.one_of(
    # Values, aliases and names bound anew.
    st.builds("{} = {}".format, N, K),
    st.builds("{} = [{}, {}]".format, N, K, K),
    st.builds("{} = {}".format, N, N),
    st.builds("{} = [{}, {}]".format, N, N, N),
    st.builds("{}, {} = {}, {}".format, N, N, N, N),
    st.builds("{}, *{} = [1, {}, 3]".format, N, N, K),
    st.builds("({} := {})".format, N, K),
    st.builds("{}: int = {}".format, N, K),
    st.builds("del {}; {} = {}".format, N, N, K),
    st.builds("{0} = {1}; del {0}; {0} = {2}".format, N, K, K),
    # Changes in place, direct and through other names.
    st.builds("{} = [*([{}] * 2)]".format, N, K),
    st.builds("box.append({})".format, N),
    st.builds("box += [{}]".format, K),
    st.builds("box[0] = {}".format, N),
    st.builds("table['{}'] = {}".format, N, N),
    st.builds("table.update(k={})".format, K),
    st.builds("other = box\nother.append({})".format, K),
    st.builds("thing.x = {}".format, N),
    st.builds("thing.x += {}".format, K),
    st.builds("del box[-1:]".format),
    st.builds("fill(box, {})".format, K),
    st.builds("{} = fill(box, {})".format, N, K),
    st.builds("random.seed({})".format, K),
    st.builds("{} = random.random()".format, N),
    # Control.
    st.builds("for i in range(3):\n    box.append(i)\n    {} = {}".format, N, N),
    st.builds("for {} in (1, 2):\n    pass\nelse:\n    {} = 3".format, N, N),
    st.builds("while {}:\n    {} = 1\n    break".format, N, N),
    st.builds("if {} == {}:\n    {} = 8\nelse:\n    {} = 9".format, N, K, N, N),
    st.builds("try:\n    {} = 1 / {}\nexcept Exception:\n    {} = 7".format, N, K, N),
    st.builds("with contextlib.suppress(ZeroDivisionError):\n    {} = 1 / 0".format, N),
    st.builds(
        "match {}:\n    case 1:\n        {} = 2\n    case _:\n        {} = 4".format, N, N, N
    ),
    # Functions, classes, closures.
    st.builds("def {}(v=0):\n    return [{}, v]".format, F, N),
    st.builds("def {}(v=0):\n    global {}\n    {} = v + 1\n    return v".format, F, N, N).filter(
        lambda text: text.split("global ")[1][0] == text.split("\n    ")[2][0]
    ),
    st.builds("def {}(v={}):\n    return v".format, F, N),
    st.builds("{} = lambda v=0: ({}, v)".format, F, N),
    st.builds("{} = {}".format, F, F),
    st.builds("{} = {}(2)".format, N, F),
    st.builds("{}()".format, F),
    st.builds("{} = make({})".format, F, N),
    st.builds("@passing\ndef {}(v=0):\n    return ({}, v)".format, F, N),
    st.builds("class Thing:\n    x = {}\n    def m(self):\n        return {}".format, N, N),
    st.builds("thing = Thing()\n{} = thing.m()".format, N),
    st.builds("Thing.m = lambda self: {}".format, K),
    st.builds("{} = [v for v in range({})]".format, N, K),
    st.builds("{} = {{k: {} for k in 'xy'}}".format, N, N),
    st.builds("it = iter([1, 2, 3])\n{} = next(it)".format, N),
    st.builds("{} = [*map({}, (1, 2))]".format, N, F),
    st.builds("from math import *\n{} = floor(2.5)".format, N),
    st.builds("import math as m\n{} = m.sqrt({})".format, N, K),
)

PRELUDE = """\
import contextlib
import random
a = b = c = d = 0
box, table = [1], {}
def f(v=0): return a
def g(v=0): return b
def h(v=0): return v
def fill(target, value):
    target.append(value)
    return value
def make(value):
    def inner(v=0):
        return (value, v)
    return inner
def passing(function):
    return function
class Thing:
    x = 1
    def m(self):
        return a
thing = Thing()
random.seed(0)
"""

BLOCKS = st.lists(
    st.lists(STATEMENTS, min_size=1, max_size=5).map("\n".join), min_size=1, max_size=3
)
SHOW = "print({0}, box, table, {1}(1), thing.x, thing.m())\n"


def run(before: str, block: str) -> tuple[str, dict[str, str], dict[str, str]] | None:
    """Return what a block prints, and what its names stand for at its beginning and its end."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    names = needed_before(read_statements(block, 0))
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(before, "before", "exec"), namespace)
        state = {n: fingerprint(namespace[n]) for n in names if n in namespace}
        with contextlib.redirect_stdout(out):
            exec(compile(block, "block", "exec"), namespace)
    except Exception:
        return None
    end = {n: fingerprint(namespace[n]) for n in names if n in namespace}
    return out.getvalue(), state, end


def copy_of(blocks: list[str], level: str) -> str:
    earlier = [s for i, text in enumerate(blocks[:-1]) for s in read_statements(text, i)]
    return "\n".join(close(earlier, read_statements(blocks[-1], len(blocks)), level=level))


@settings(max_examples=400)
@given(BLOCKS, N, F)
def test_the_copy_that_is_taken_prints_and_leaves_what_the_page_does(
    blocks: list[str], name: str, function: str
) -> None:
    blocks = [PRELUDE, *blocks, SHOW.format(name, function)]
    page = run("\n".join(blocks[:-1]), blocks[-1])
    if page is None:
        return  # the page itself fails
    for level in LEVELS:
        copy = run(copy_of(blocks, level), blocks[-1])
        if copy is not None and copy[:2] == page[:2]:
            assert copy[2] == page[2]
            return
    raise AssertionError("no level does what the page does")


@settings(max_examples=200)
@given(BLOCKS, N, F)
def test_everything_is_always_right(blocks: list[str], name: str, function: str) -> None:
    blocks = [PRELUDE, *blocks, SHOW.format(name, function)]
    page = run("\n".join(blocks[:-1]), blocks[-1])
    if page is not None:
        assert run(copy_of(blocks, "all"), blocks[-1]) == page


@settings(max_examples=200)
@given(BLOCKS, N, F)
def test_a_level_holds_whatever_the_one_below_it_holds(
    blocks: list[str], name: str, function: str
) -> None:
    blocks = [PRELUDE, *blocks, SHOW.format(name, function)]
    if run("\n".join(blocks[:-1]), blocks[-1]) is None:
        return
    sizes = [len(copy_of(blocks, level)) for level in LEVELS]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("level", LEVELS)
def test_a_program_without_aliases_is_right_on_every_level(level: str) -> None:
    blocks = [
        "import random\nrandom.seed(3)\nbox = []\nunused = [1]\nunused.append(2)\n",
        "for i in range(3):\n    box.append(i)\nx = random.random()\n",
        "def f(v):\n    return v + len(box)\n",
        "print(f(1), x, box)\n",
    ]
    page = run("\n".join(blocks[:-1]), blocks[-1])
    assert run(copy_of(blocks, level), blocks[-1]) == page
