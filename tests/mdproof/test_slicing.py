"""A closed program holds what its block needs, and runs to the same result."""

import contextlib
import io
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdproof.slicing import LEVELS, close, read_statements


def closed(*blocks: str, level: str = "slice") -> list[str]:
    parsed = [read_statements(textwrap.dedent(block), n) for n, block in enumerate(blocks)]
    earlier = [statement for block in parsed[:-1] for statement in block]
    return close(earlier, parsed[-1], level=level)


def run(text: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(text, "copy", "exec"), {"__name__": "__main__"})
    return out.getvalue()


def test_what_a_block_does_not_need_is_left_out() -> None:
    assert closed("import math\nimport os\na = 1\nb = 2\nprint(a)\n", "print(a)\n") == ["a = 1"]


def test_only_the_names_needed_are_kept_of_an_import() -> None:
    assert closed("from math import pi, e, tau as t\nimport os, sys\n", "print(t, sys)\n") == [
        "from math import tau as t",
        "import sys",
    ]


def test_a_name_bound_anew_makes_the_earlier_binding_needless() -> None:
    assert closed("a = 1\nb = a\na = 2\n", "print(a)\n") == ["a = 2"]


def test_a_function_brings_what_its_body_needs_even_if_defined_later() -> None:
    kept = closed("def f():\n    return g() + K\n", "K = 1\ndef g():\n    return K\n", "f()\n")
    assert kept == ["def f():\n    return g() + K", "K = 1", "def g():\n    return K"]


def test_a_local_name_of_a_function_is_not_a_need() -> None:
    assert closed("x = 5\ndef f(x):\n    y = x\n    return y\n", "f(1)\n") == [
        "def f(x):\n    y = x\n    return y"
    ]


CHANGES = {
    "augmented": "a = [1]\na += [2]\n",
    "method": "a = []\na.append(1)\n",
    "item": "a = {}\na['k'] = 1\n",
    "attribute": "import types\na = types.SimpleNamespace()\na.x = 1\n",
    "loop": "a = []\nfor i in range(2):\n    a.append(i)\n",
    "deep": "a = {'k': []}\na['k'].append(1)\n",
    "argument": "a = []\ndef f(z):\n    z.append(1)\nf(a)\n",
    "delete": "a = [1, 2]\ndel a[0]\n",
    "with": "import io\na = []\nwith io.StringIO() as s:\n    a.append(1)\n",
    "condition": "a = []\nif not a:\n    a.append(1)\n",
    "comprehension": "b = [1]\na = [x + b[0] for x in b]\n",
    "global": "a = 0\ndef f():\n    global a\n    a = 1\nf()\n",
    "walrus": "b = (a := 3)\n",
    "unpacking": "a, b = 1, 2\n",
    "starred": "b, *a = 1, 2, 3\n",
    "try": "try:\n    a = 1\nexcept ImportError:\n    a = 2\n",
    "decorator": "def d(f):\n    return lambda: 7\n@d\ndef a():\n    pass\na = a()\n",
    "class": "K = 2\nclass C:\n    y = K\n    def m(self):\n        return K\na = C().m()\n",
    "star import": "from math import *\na = sqrt(4)\n",
    "exec order": "a = 1\ndef f():\n    return a\na = f() + 1\n",
    "semicolons": "a = 1; a = a + 1; b = 3\n",
    "annotated": "a: int = 4\n",
    "match": "match 3:\n    case a:\n        pass\n",
    "nested def": "def f():\n    def g():\n        return K\n    return g()\nK = 4\na = f()\n",
    "alias import": "import os.path as p\na = p.sep\n",
    "dotted import": "import os.path\na = os.path.sep\n",
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", CHANGES)
def test_what_changes_a_needed_object_is_kept(case: str, level: str) -> None:
    before, block = CHANGES[case], "print(vars(a) if hasattr(a, '__dict__') else a)\n"
    text = "\n".join(closed(before, block, level=level)) + "\n" + block
    assert run(text) == run(before + block)


def test_an_alias_that_changes_the_object_is_why_there_are_wider_levels() -> None:
    before, block = "a = []\nb = a\nc = b.append(1)\n", "print(a)\n"
    assert run("\n".join(closed(before, block)) + "\n" + block) == "[]\n"  # the trap
    assert run("\n".join(closed(before, block, level="all")) + "\n" + block) == "[1]\n"


@pytest.mark.parametrize(
    "statement",
    [
        "import os\nos.environ['X'] = '1'\n",
        "import os\nif True:\n    os.environ['X'] = '1'\n",
        "import random\nrandom.seed(0)\n",
        "import warnings\nwarnings.simplefilter('ignore')\n",
    ],
)
def test_what_later_code_cannot_see_but_feels_is_kept(statement: str) -> None:
    assert "\n".join(closed(statement, "print(1)\n")) == statement.rstrip("\n")


def test_a_seeded_generator_is_no_global_seed() -> None:
    before = "import random\nr = random.Random()\nr.seed(0)\nx = 1\n"
    assert closed(before, "print(x)\n") == ["x = 1"]


def test_a_draw_from_a_generator_moves_it() -> None:
    before = "import random\nrng = random.Random(0)\na = draw(3, rng=rng)\n"
    assert "a = draw(3, rng=rng)" in closed(before, "print(rng)\n")


def test_comments_above_a_statement_go_with_it() -> None:
    assert closed("# why\na = 1\n\n# other\nb = 2\n", "print(a)\n") == ["# why\na = 1"]


def test_a_printed_final_expression_changes_nothing() -> None:
    assert closed("a = [1]\na.count(1)\n", "print(a)\n") == ["a = [1]"]


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^level is 'huge'; known are tight, slice, wide, all$"):
        closed("a = 1\n", "a\n", level="huge")


def test_a_name_bound_in_a_body_before_it_is_read_needs_nothing_from_before() -> None:
    block = "for i in (1, 2):\n    out = i\n    print(out)\n"
    assert closed("out = 0\ni = 5\n", block) == []
    assert closed("out = 0\n", "for i in (1, 2):\n    print(out)\n    out = i\n") == ["out = 0"]
    assert closed("out = 0\n", "if True:\n    out = 1\nprint(out)\n") == ["out = 0"]
    assert closed("out = 0\n", "while True:\n    out = 1\n    break\nprint(out)\n") == ["out = 0"]
    stream = "with io.StringIO() as f:\n    f.write('x')\n"
    assert closed("import io\nf = 0\n", stream) == ["import io"]
    assert closed("a = 0\n", "try:\n    a = 1\nexcept OSError:\n    print(a)\n") == ["a = 0"]
    assert closed("a = []\n", "for a[0:1] in ([1],):\n    pass\n") == ["a = []"]


NAMES = st.sampled_from("abcd")
STATEMENTS = st.one_of(
    st.builds("{} = {}".format, NAMES, st.integers(0, 9)),
    st.builds("{} = [{}]".format, NAMES, st.integers(0, 9)),
    st.builds("{} = {}".format, NAMES, NAMES),
    st.builds("{} = {} + {}".format, NAMES, NAMES, NAMES),
    st.builds("{} += {}".format, NAMES, NAMES),
    st.builds("for i in range(2):\n    {} = {} + {}".format, NAMES, NAMES, NAMES),
    st.builds("if {}:\n    {} = {}".format, NAMES, NAMES, NAMES),
    st.builds("for i in (1, 2):\n    {} = {}\n    {} = {}".format, NAMES, NAMES, NAMES, NAMES),
    st.builds("try:\n    {} = {}\nfinally:\n    {} = {}".format, NAMES, NAMES, NAMES, NAMES),
    st.builds("def {}(v=1):\n    return {}".format, st.sampled_from("fg"), NAMES),
    st.builds("{} = (lambda: {})()".format, NAMES, NAMES),
    st.builds("{}, {} = {}, {}".format, NAMES, NAMES, NAMES, NAMES),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STATEMENTS, max_size=12), NAMES)
def test_a_slice_of_a_random_program_prints_what_the_whole_prints(
    statements: list[str], name: str
) -> None:
    # Numbers and lists by value only: names bound to one list twice are the alias trap above.
    before = "a = b = c = d = 0\ndef f(): return a\ndef g(): return b\n"
    body = [s for s in statements if "= [" not in s and "+=" not in s]
    before += "".join(f"{statement}\n" for statement in body)
    block = f"print({name}, f(), g())\n"
    assert run("\n".join(closed(before, block)) + "\n" + block) == run(before + block)
