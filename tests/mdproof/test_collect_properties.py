"""Pages made at random, of which every block is known: collected = known = rendered."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from markdown import Markdown
from tests.mdproof.bench_collect import Listings, allow_options
from tests.mdproof.conftest import Sample
from tests.mdproof.test_hostile_collection import EXTENSIONS

from mdproof.block import Options
from mdproof.collect import collect, make_pipeline
from mdproof.config import markdown_extensions
from mdproof.site import Site

CODE_LINES = [
    "a = 1",
    "if a:\n    b = '好'",
    "s = '```python'",
    "s = '~~~'",
    "# --> </pre> &lt; <!--",
    "",
    "x = '''\n\n  - item\n\n    > quote\n'''",
    "c = '\u00a0\u2028\x0b'",
    "*a*, _ = b, `c`" + "  # [x](y) [^1] $z$",
    "=== 'tab'",
    "!!! note",
    "1. one",
]
"""Lines that mean something to Markdown, to Python, or to both."""

OPTIONS = {
    "": Options(),
    ' title="```"': Options(),
    ' hl_lines="1" linenums="3"': Options(),
    ' tol="0.5"': Options(tol=0.5),
    " varies=\"a = b, 'c'\"": Options(varies="a = b, 'c'"),
    ' norun="好 } {" title="x"': Options(norun="好 } {"),
    ' alt="a" caption="b"  timeout="2"': Options(alt="a", caption="b", timeout=2.0),
}

KINDS = {
    "python": "code",
    "py": "code",
    "python3": "code",
    "pycon": "doctest",
    "console": "doctest",
}


@dataclass
class Page:
    """A page's lines, and what is on it."""

    lines: list[str] = field(default_factory=list)
    blocks: list[tuple[int, str, str, Options]] = field(default_factory=list)
    listings: list[tuple[str, int]] = field(default_factory=list)

    def inside(self, head: list[str], lead: str, blank: str) -> "Page":
        """Return this page as the content of something: below `head`, behind `lead`."""
        lines = [lead + line if line else blank for line in self.lines]
        moved = Page([*head, *lines, ""])
        moved.blocks = [(at + len(head), *rest) for at, *rest in self.blocks]
        moved.listings = [(language, at + len(head)) for language, at in self.listings]
        return moved

    def then(self, other: "Page") -> "Page":
        """Return this page with another below."""
        behind = other.inside(self.lines, "", "")
        return Page(behind.lines, self.blocks + behind.blocks, self.listings + behind.listings)


@st.composite
def fences(draw: st.DrawFn) -> Page:
    """A fence, run or shown."""
    language = draw(st.sampled_from([*KINDS, "bash", "text", "c++", "console $"]))
    code = draw(st.lists(st.sampled_from(CODE_LINES), min_size=1, max_size=3))
    text = "\n".join(code)
    if not text.strip():
        text = "a = 2"
    if KINDS.get(language) == "doctest":
        text = ">>> a\n" + text
    mark = draw(st.sampled_from(["```", "````", "~~~", "~~~~~"]))
    runs = language in KINDS
    option = draw(st.sampled_from(list(OPTIONS))) if runs else ""
    if language == "console $":
        language, text = "console", "$ ls\n# root"
    braces = draw(st.booleans())
    head = f"{mark}{{.{language}{option}}}" if braces else f"{mark}{language}{option}"
    page = Page([head, *text.split("\n"), mark, ""])
    if runs:
        page.blocks = [(1, KINDS[language], text, OPTIONS[option])]
    else:
        page.listings = [(language, 1)]
    return page


PROSE = [
    ["text", ""],
    ["# heading", ""],
    ["| a | b |", "| - | - |", "| `c` | d |", ""],
    ["***", ""],
]

pieces = st.one_of(fences(), st.sampled_from(PROSE).map(lambda lines: Page(list(lines))))


def containers(inner: st.SearchStrategy[Page]) -> st.SearchStrategy[Page]:
    """Pages in something, and pages one below the other."""
    heads = st.sampled_from(
        [
            ["!!! note"],
            ["!!! note", ""],
            ['??? tip "more"', ""],
            ['=== "tab"', ""],
            ["- item", ""],
            ["1. item", ""],
            ["term", ":   meaning", ""],
        ]
    )
    blank = st.sampled_from(["", "    ", "  "])
    indented = st.builds(lambda page, head, b: page.inside(head, "    ", b), inner, heads, blank)
    below = st.builds(lambda page, other: page.then(Page(["word", ""])).then(other), inner, inner)
    return st.one_of(indented, below, below)


pages = st.recursive(pieces, containers, max_leaves=6)
quoted = pages | fences().map(lambda page: page.inside([], "> ", ">"))


@pytest.fixture
def site(sample: Sample) -> Site:
    (sample.root / "mkdocs.yml").write_text(EXTENSIONS, encoding="utf-8")
    return sample.site


def write(site: Site, page: Page, front: str, end: str, bom: bool) -> None:
    text = front + "\n".join(page.lines)
    data = ("\ufeff" * bom + text.replace("\n", end)).encode()
    Path(site.docs / "page.md").write_bytes(data)


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(
    page=quoted,
    front=st.sampled_from(["", "---\ntitle: x\n---\n", "---\na: |\n  ```python\n---\n\n\n"]),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_what_is_written_is_collected_and_rendered(
    site: Site, page: Page, front: str, end: str, bom: bool
) -> None:
    write(site, page, front, end, bom)
    moved = front.count("\n")
    found = collect(site, "page.md", pipeline(site))
    known = [(line + moved, kind, text, options) for line, kind, text, options in page.blocks]
    assert [(b.line, b.kind, b.code, b.options) for b in found.blocks] == known
    assert found.listings == [(language, line + moved) for language, line in page.listings]
    seen = shown(site, page)
    shells = [text for text in seen if text.startswith("$ ls")]
    runs = [text.strip("\n") for text in seen if not text.startswith("$ ls")]
    assert runs == [text.strip("\n") for _, _, text, _ in page.blocks]
    assert len(shells) == sum(language == "console" for language, _ in page.listings)


_made: dict[Path, tuple[Markdown, Markdown]] = {}


def _pair(site: Site) -> tuple[Markdown, Markdown]:
    if site.root not in _made:
        names, options = markdown_extensions(site.settings["mkdocs"])
        names.remove("mdproof.markdown")
        options.setdefault("pymdownx.highlight", {}).update(pygments_lang_class=True, stripnl=False)
        plain = Markdown(extensions=names, extension_configs=options)
        allow_options(plain)
        _made[site.root] = make_pipeline(site), plain
    return _made[site.root]


def pipeline(site: Site) -> Markdown:
    """Return the site's pipeline, made once."""
    return _pair(site)[0]


def shown(site: Site, page: Page) -> list[str]:
    """Return the code that Python-Markdown alone shows as Python."""
    plain = _pair(site)[1]
    plain.reset()
    return Listings(plain.convert("\n".join(page.lines))).found
