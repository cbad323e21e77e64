"""Code tokens link to what they stand for while their statement runs, and to nothing else."""

import re

import pytest
from tests.mdproof.conftest import Sample

from mdproof.collect import collect
from mdproof.names import read_program
from mdproof.proof import load_proof
from mdproof.render import link_names

EXTRA = '''\
"""More."""

import functools

from sample.shapes import FACTOR, area

LIMIT = 7


class Disc:
    """A disc."""

    unit = 1

    def __init__(self, r):
        self.r = r
        self.grow = 5

    def area(self):
        """Return the area."""
        return area(self.r)

    def grow(self):
        """Hidden by an attribute of each instance."""

    @property
    def width(self):
        """Return the diameter."""
        return 2 * self.r

    @classmethod
    def small(cls):
        """Return a small one."""
        return cls(1)


@functools.lru_cache
def cached(x):
    """Return x."""
    return x
'''


@pytest.fixture
def named(sample: Sample) -> Sample:
    (sample.root / "src/sample/more.py").write_text(EXTRA, encoding="utf-8")
    return sample


def links(sample: Sample, *codes: str, fence: str = "```python") -> list[list[str]]:
    """Prove a page of blocks; return for each what is linked: "line:column text dotted"."""
    page = "# Page\n\n" + "\n\n".join(f"{fence}\n{code}\n```" for code in codes) + "\n"
    assert sample.prove(page).failures == {}
    proof = load_proof(sample.site, "page.md")
    assert proof is not None
    found = []
    for block, record in zip(collect(sample.site, "page.md").blocks, proof.blocks, strict=True):
        program = read_program(block.code, kind=block.kind)
        rows = []
        for number, dotted in record["links"].items():
            one = program.references[int(number)]
            line = block.code.split("\n")[one.line - 1]
            assert line[one.column : one.column + len(one.text)] == one.text
            rows.append(f"{one.line}:{one.column} {one.text} {dotted}")
        found.append(rows)
    return found


AREA, SCALE, DISC = "sample.shapes.area", "sample.shapes.scale", "sample.more.Disc"
CASES: dict[str, tuple[str, list[str]]] = {
    "an import and a call": (
        "from sample.shapes import area\narea(2)",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}", f"2:0 area {AREA}"],
    ),
    "import as": (
        "from sample.shapes import area as disc, scale\nx = disc(2) + scale(1)",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}", f"1:40 scale {SCALE}",
         f"2:4 disc {AREA}", f"2:14 scale {SCALE}"],
    ),
    "a module and a chain": (
        "import sample.shapes\nimport sample.shapes as s\ny = sample.shapes.area(1) + s.scale(2)",
        ["1:7 sample.shapes sample.shapes", "2:7 sample.shapes sample.shapes", "3:4 sample sample",
         "3:11 shapes sample.shapes", f"3:18 area {AREA}", "3:28 s sample.shapes",
         f"3:30 scale {SCALE}"],
    ),
    "a chain over two lines": (
        "import sample.shapes\ny = (sample\n     .shapes\n     .area(1))",
        ["1:7 sample.shapes sample.shapes", "2:5 sample sample", "3:6 shapes sample.shapes",
         f"4:6 area {AREA}"],
    ),
    "an alias": (
        "from sample.shapes import area\nf = area\nf(1)",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}", f"2:4 area {AREA}",
         f"3:0 f {AREA}"],
    ),
    "constants, re-exported or not": (
        "from sample.more import FACTOR, LIMIT\nimport sample.more as m\nFACTOR + LIMIT + m.LIMIT",
        ["1:5 sample.more sample.more", "1:24 FACTOR sample.more.FACTOR",
         "1:32 LIMIT sample.more.LIMIT", "2:7 sample.more sample.more",
         "3:0 FACTOR sample.more.FACTOR", "3:9 LIMIT sample.more.LIMIT", "3:17 m sample.more",
         "3:19 LIMIT sample.more.LIMIT"],
    ),
    "a constant bound anew": (
        "from sample.more import LIMIT\nLIMIT = 7\nprint(LIMIT)",
        ["1:5 sample.more sample.more", "1:24 LIMIT sample.more.LIMIT"],
    ),
    "methods, properties, class methods": (
        "from sample.more import Disc\nd = Disc(1)\nd.area(), d.width, d.r\nDisc.small().area()\n"
        "Disc.area(d), d.unit",
        ["1:5 sample.more sample.more", f"1:24 Disc {DISC}", f"2:4 Disc {DISC}",
         f"3:2 area {DISC}.area", f"3:12 width {DISC}.width", f"4:0 Disc {DISC}",
         f"4:5 small {DISC}.small", f"5:0 Disc {DISC}", f"5:5 area {DISC}.area",
         f"5:16 unit {DISC}.unit"],
    ),
    "an attribute that hides a method": (
        "from sample.more import Disc\nd = Disc(1)\nprint(d.grow)",
        ["1:5 sample.more sample.more", f"1:24 Disc {DISC}", f"2:4 Disc {DISC}"],
    ),
    "a cached function": (
        "from sample.more import cached\ncached(1)",
        ["1:5 sample.more sample.more", "1:24 cached sample.more.cached",
         "2:0 cached sample.more.cached"],
    ),
    "strings, comments, keywords": (
        "from sample.shapes import scale  # scale\n'scale', dict(scale=scale(1))\nprint('scale')",
        ["1:5 sample.shapes sample.shapes", f"1:26 scale {SCALE}", f"2:20 scale {SCALE}"],
    ),
    "a parameter of the same name": (
        "from sample.shapes import area\ndef f(area):\n    return area\ng = lambda area: area",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}"],
    ),
    "a local of the same name, even before it is bound": (
        "from sample.shapes import area\ndef f():\n    y = area\n    area = 1\n",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}"],
    ),
    "a closure over a local": (
        "from sample.shapes import area\ndef f():\n    area = abs\n    def g():\n"
        "        return area(1)\n    return g()\nf()",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}"],
    ),
    "global in one function is local in another": (
        "from sample.shapes import area\ndef f():\n    area = 1\n    def g():\n"
        "        global area\n        return area\n    return area\nf()",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}", f"6:15 area {AREA}"],
    ),
    "a function reads what is global": (
        "from sample.shapes import area\ndef f(x):\n    return area(x) + scale(1)\n"
        "from sample.shapes import scale\nf(1)",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}", f"3:11 area {AREA}",
         f"3:21 scale {SCALE}", "4:5 sample.shapes sample.shapes", f"4:26 scale {SCALE}"],
    ),
    "a function whose global is bound anew later": (
        "from sample.shapes import area\ndef f(x):\n    return area(x)\narea = abs\nf(1)",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}"],
    ),
    "bound anew": (
        "from sample.shapes import area\nx = area(1)\narea = x\nprint(area)",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}", f"2:4 area {AREA}"],
    ),
    "bound anew from itself": (
        "from sample.shapes import area\narea = area(1)\nprint(area)",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}", f"2:7 area {AREA}"],
    ),
    "bound anew by :=": (
        "from sample.shapes import area\nprint((area := abs)(-1), area)",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}"],
    ),
    "a loop over functions": (
        "from sample.shapes import area, scale\nfor f in (area, scale):\n    f(1)\n",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}", f"1:32 scale {SCALE}",
         f"2:10 area {AREA}", f"2:16 scale {SCALE}"],
    ),
    "a loop that binds the name": (
        "from sample.shapes import area\nfor area in (area,):\n    area(1)\n",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}"],
    ),
    "comprehensions": (
        "from sample.shapes import area\nprint([area for area in (1, 2)], [area(x) for x in (1,)])",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}", f"2:34 area {AREA}"],
    ),
    "a class body": (
        "from sample.shapes import area\nclass C:\n    area = area\n    b = abs\n"
        "    def m(self):\n        return area(1)\n",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}", f"6:15 area {AREA}"],
    ),
    "a wrapper that calls itself like ours": (
        "import functools\nfrom sample.shapes import area\n"
        "mine = functools.wraps(area)(lambda r: 0)\nmine(1)\nimport sample.shapes as s\n",
        ["2:5 sample.shapes sample.shapes", f"2:26 area {AREA}", f"3:23 area {AREA}",
         "5:7 sample.shapes sample.shapes"],
    ),
    "an object that answers everything": (
        "class Any:\n    def __getattr__(self, name):\n        return 'x'\n"
        "a = Any()\na.area, a.fn, a.__qualname__",
        [],
    ),
    "a name that is exchanged while the block runs": (
        "import sys\nfrom sample.shapes import area\n"
        "sys.modules[__name__].__dict__.update(area=abs)\narea(-1)",
        ["2:5 sample.shapes sample.shapes", f"2:26 area {AREA}"],
    ),
    "other alphabets": (
        "from sample.shapes import area\n半径 = 'é'; x = area(1)",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}", f"2:14 area {AREA}"],
    ),
    "the same letters written otherwise": (
        "from sample.shapes import area\nｘ = 𝐚𝐫𝐞𝐚(1)",
        ["1:5 sample.shapes sample.shapes", f"1:26 area {AREA}"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_linked(named: Sample, case: str) -> None:
    code, expected = CASES[case]
    assert links(named, code) == [expected]


def test_what_a_later_block_binds_anew_is_linked_until_then(named: Sample) -> None:
    blocks = links(named, "from sample.shapes import area\narea(1)", "area(2)", "area = 3", "area")
    assert [row[-1:] for row in blocks] == [[f"2:0 area {AREA}"], [f"1:0 area {AREA}"], [], []]


def test_the_call_that_raises_is_linked(named: Sample) -> None:
    code = "from sample.shapes import area\narea('x', 1)"
    rows = links(named, code, fence='```python raises="TypeError"')
    assert rows[0][-1] == f"2:0 area {AREA}"


def test_doctests_are_linked_example_by_example(named: Sample) -> None:
    code = (
        ">>> from sample.more import Disc\n>>> d = Disc(1)\n>>> d.width\n2\n"
        ">>> for i in (1,):\n...     print(Disc(i).r)\n1\n>>> Disc = 3\n>>> Disc\n3"
    )
    assert links(named, code, fence="```pycon") == [
        ["1:9 sample.more sample.more", f"1:28 Disc {DISC}", f"2:8 Disc {DISC}",
         f"3:6 width {DISC}.width", f"6:14 Disc {DISC}"]
    ]  # fmt: skip


def anchors(html: str) -> list[str]:
    return re.findall(r'<a class="mdproof-ref" href="(\S+)" title="\S+">([^<]*)</a>', html)


def test_comments_and_layout_may_change_under_a_proof(named: Sample) -> None:
    code = "from sample.shapes import area\nprint(area(1))"
    links(named, code)
    named.write(f"# Page\n\n```python\n# area, area\n\n\n{code}  # area\n```\n")
    run = named.open()
    assert run.stale == [""]
    record, text = run.proof.blocks[0], run.blocks[0].code
    html = highlight(text)
    linked = link_names(html, text, read_program(text), record["links"], lambda name: f"#{name}")
    assert [token for _, token in anchors(linked)] == ["sample.shapes", "area", "area"]
    assert "# area, area</span>" in linked
    assert strip(linked) == strip(html)


def highlight(code: str) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return highlight(code, PythonLexer(), HtmlFormatter(wrapcode=True))


def strip(html: str) -> str:
    return re.sub(r"<[^>]*>", "", html)


@pytest.mark.parametrize("text", ["f'{area(1)} area'", "@area\ndef f():\n    pass", "a < area > b"])
def test_tokens_are_linked_where_the_highlighter_sees_a_name(text: str) -> None:
    program = read_program(text)
    every = {str(n): "sample.shapes.area" for n, r in enumerate(program.references)
             if r.text == "area"}  # fmt: skip
    linked = link_names(highlight(text), text, program, every, lambda name: "#a")
    assert anchors(linked) == [("#a", "area")]
    assert strip(linked) == strip(highlight(text))


def test_html_of_another_text_is_left_alone() -> None:
    program = read_program("area(1)")
    html = highlight("other(1)")
    assert link_names(html, "area(1)", program, {"0": "a.b"}, lambda name: "#a") == html


def test_a_source_fence_links_the_names_in_the_shown_code(named: Sample) -> None:
    named.write("# Home\n", "index.md")
    named.write("# Shapes\n\n## scale {#sample.shapes.scale}\n", "reference/shapes.md")
    named.write("# More\n\n## cached {#sample.more.cached}\n", "reference/more.md")
    page = (
        '# Page\n\n```python source="sample.shapes.area"\n```\n\n'
        '```python source="sample.more.cached"\n```\n'
    )
    assert named.prove(page).failures == {}
    from tests.mdproof.test_markdown import build

    code, output, text = build(named, "mkdocs")
    assert code == 0, output
    assert [token for _, token in anchors(text)] == ["area", "scale", "FACTOR", "cached"]
    assert "…" in text  # the docstring is folded, and the names below it are still in place
