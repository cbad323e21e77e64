r"""The Markdown extension `mdproof.maths`: formulas are set when the site is built.

`$...$` in a line; `$$` alone on its lines for a display equation, which is numbered if it holds
`\label{eq:name}`. A dollar in code, or after a backslash, is a dollar. A formula that KaTeX
refuses, and a reference to an equation that does not exist, stop the build with file and line.
"""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from markdown import Markdown
from markdown.blockparser import BlockParser
from markdown.blockprocessors import BlockProcessor
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.postprocessors import Postprocessor
from markdown.treeprocessors import Treeprocessor
from markdown.util import AtomicString

from mdproof import equations, katex
from mdproof.errors import PageError, build_error
from mdproof.site import Site, is_collecting, link, load_site, page_of

INLINE = r"(?<![\\$])\$(?![\s$])((?:\\.|[^\\$\x02\x03])+?)(?<!\s)\$(?![\d$])"
_STRAY = r"(?<!\\)\$\$"
_NUMBERS_ITSELF = re.compile(r"\\begin\{(align|alignat|gather|equation|multline|eqnarray|CD)\}")
_HELD = re.compile("\x02mdproof-maths:(\\d+)\x03")
_IN_TAG = re.compile("<[A-Za-z][^<>]*\x02mdproof-maths:[^<>]*>")


class _Held:
    """The rendered formulas of one conversion; in the text stand short placeholders for them."""

    def __init__(self, md: Markdown) -> None:
        self.md = md
        self.html: list[str] = []
        self.plain: list[Callable[[], str]] = []

    def hold(self, text: str, plain: Callable[[], str] = str) -> str:
        self.html.append(text)
        self.plain.append(plain)
        return f"\x02mdproof-maths:{len(self.html) - 1}\x03"

    def release(self, text: str) -> str:
        # In an attribute (the `alt` of an image) there is no room for elements.
        # Python-Markdown puts a backslash before what it takes out of a stash there.
        text = _IN_TAG.sub(
            lambda found: self.release_plain(found.group().replace("\\\x02", "\x02")), text
        )
        return _HELD.sub(lambda found: self.html[int(found[1])], text)

    def release_plain(self, text: str) -> str:
        return _HELD.sub(lambda found: html.escape(self.plain[int(found[1])]()), text)

    @property
    def page(self) -> str | None:
        return page_of(self.md)

    @property
    def site(self) -> Site | None:
        return _site()

    def refuse(self, needle: str, message: str, position: int = 0) -> Exception:
        """Return the error that stops the build, with the line of `needle`."""
        site = self.site
        file, line = equations.locate(site, self.page, needle, position) if site else ("?", 1)
        return build_error(PageError(file, line, message))

    def render(self, tex: str, *, display: bool, whole: str) -> str:
        """Set a formula; `whole` is its text on the page, by which an error finds its line.

        Both have the same length but for leading dollars, so that positions agree.
        """
        if is_collecting(self.md):
            return ""
        try:
            return _render(tex, display=display, site=self.site)
        except katex.TexError as error:
            dollars = len(whole) - len(whole.lstrip("$"))
            position = dollars + (error.position or 0)
            raise self.refuse(whole, f"KaTeX: {error.message}", position) from None


def _site() -> Site | None:
    try:
        return load_site()
    except FileNotFoundError:  # a formula outside any site
        return None


def _options(site: Site | None) -> dict[str, Any]:
    if site is None:
        return {}
    return {"macros": site.settings.get("macros"), "cache": _cache(site.root)}


def _cache(root: Path) -> Path:
    return root / ".cache" / "mdproof" / "katex"


def _render(tex: str, *, display: bool, site: Site | None) -> str:
    return katex.render(tex, display=display, **_options(site))


def render_inline(text: str) -> str:
    r"""Return a line of text with `$...$` (a description, a caption) as HTML.

    Text is escaped, a code span becomes `<code>`, `\$` a dollar.

    Raises:
        katex.TexError: If KaTeX refuses a formula.
    """
    site = _site()
    return _inline(
        text,
        lambda tex, after: katex.joined(_render(tex, display=False, site=site), after),
        lambda code: f"<code>{html.escape(code, quote=False)}</code>",
        lambda rest: html.escape(rest, quote=False),
    )


def plain_inline(text: str) -> str:
    r"""Return a line of text with `$...$` as text alone, for a search result or a `<meta>`."""
    site = _site()
    return _inline(text, lambda tex, _: katex.plain(tex, **_options(site)), str, str)


_PIECES = re.compile(rf"(?P<code>`+)(?P<inside>.+?)(?<!`)(?P=code)(?!`)|{INLINE}", re.DOTALL)


def _inline(
    text: str,
    formula: Callable[[str, str], str],
    code: Callable[[str], str],
    rest: Callable[[str], str],
) -> str:
    out, done = [], 0
    for found in _PIECES.finditer(text):
        start, end = found.span()
        out.append(rest(text[done:start].replace(r"\$", "$")))
        if found["code"]:
            out.append(code(found["inside"].strip()))
        else:
            out.append(formula(found[3], text[end : end + 1]))
        done = end
    return "".join([*out, rest(text[done:].replace(r"\$", "$"))])


class _Inline(InlineProcessor):
    """`$...$` within a line."""

    def __init__(self, md: Markdown, held: _Held) -> None:
        super().__init__(INLINE, md)
        self.held = held

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # type: ignore[override]  # noqa: N802
        tex = m.group(1)
        if equations.LABEL.search(tex):
            raise self.held.refuse(m.group(), "only a display equation has a label")
        rendered = self.held.render(tex, display=False, whole=m.group())
        rendered = katex.joined(rendered, data[m.end() : m.end() + 1])
        options = _options(self.held.site)
        return self.held.hold(rendered, lambda: katex.plain(tex, **options)), m.start(), m.end()


class _Stray(InlineProcessor):
    """`$$` in the middle of a line."""

    def __init__(self, md: Markdown, held: _Held) -> None:
        super().__init__(_STRAY, md)
        self.held = held

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # type: ignore[override]  # noqa: N802
        around = next(line for line in data.splitlines() if "$$" in line)
        around = re.split("\x02|\x03", around[around.index("$$") :])[0]
        raise self.held.refuse(around, "`$$` stands alone on its lines, with a blank line around")


class _Display(BlockProcessor):
    """A block that starts with `$$`, or (`inside`) one that comes to a line with `$$`."""

    def __init__(self, parser: BlockParser, held: _Held, *, inside: bool) -> None:
        super().__init__(parser)
        self.held = held
        self.start = (
            re.compile(r"^[ \t]*\$\$", re.MULTILINE) if inside else re.compile(r" {0,3}\$\$")
        )

    def _find(self, block: str) -> re.Match[str] | None:
        return (
            self.start.search(block) if self.start.flags & re.MULTILINE else self.start.match(block)
        )

    def test(self, parent: Element, block: str) -> bool:
        return self._find(block) is not None

    def run(self, parent: Element, blocks: list[str]) -> None:
        block = blocks.pop(0)
        found = self._find(block)
        assert found is not None
        before, lines = block[: found.start()].rstrip("\n"), block[found.end() :].split("\n")
        if before.strip():
            self.parser.parseBlocks(parent, [before])
        ends = (count for count, line in enumerate(lines, 1) if line.rstrip().endswith("$$"))
        count = next(ends, 0)
        if not count:
            message = "`$$` is not closed: it ends a line, and no blank line comes before it"
            raise self.held.refuse("$$" + "\n".join(lines), message)
        body = "\n".join(lines[:count]).rstrip()[:-2]
        after = "\n".join(lines[count:])
        self._append(parent, body)
        if after.strip():
            blocks.insert(0, after)

    def _append(self, parent: Element, body: str) -> None:
        held = self.held
        labels = equations.LABEL.findall(body)
        if found := _NUMBERS_ITSELF.search(body):
            raise held.refuse(
                body,
                f"inside `$$` write aligned, not {found.group(1)}: numbers come from \\label",
                found.start(),
            )
        if len(labels) > 1:
            raise held.refuse(body, f"one display equation has one label, not {len(labels)}")
        if labels and re.search(r"\\tag\b", body):
            raise held.refuse(body, r"an equation has a \label or a \tag, not both")
        # The label's place stays blank, so that positions in KaTeX's messages stay true.
        tex = equations.LABEL.sub(lambda found: " " * len(found.group()), body)
        rendered = held.render(tex, display=True, whole=body)
        box = f'<div class="mdproof-eq__box">{rendered}</div>'
        element = SubElement(parent, "div", {"class": "mdproof-eq"})
        if labels and not is_collecting(held.md):
            box += self._number(element, labels[0].strip(), body)
        element.text = AtomicString(held.hold(box))

    def _number(self, element: Element, label: str, body: str) -> str:
        held, md = self.held, self.held.md
        site, page = held.site, held.page
        if site is None or page is None:  # a docstring, or a formula outside a builder
            if site is not None:
                raise held.refuse(body, "a label belongs on a page, not in a docstring")
            return ""
        known = _registry(site, page)
        equation = known.find(label, page)
        if equation is None or equation.page != page:
            message = f"the label {label} is not in the source of this page"
            raise held.refuse(body, message, max(0, body.find("\\label")))
        element.set("id", equation.anchor)
        element.set("class", "mdproof-eq mdproof-eq--numbered")
        number = f'<a class="mdproof-eq__number" href="#{equation.anchor}">({equation.number})</a>'
        cited = equations.cited_by(label, known, lambda target: link(md, target))
        return number + (
            f'<div class="mdproof-eq__code" data-search-exclude>{cited}</div>' if cited else ""
        )


def _registry(site: Site, page: str | None) -> equations.Registry:
    try:
        known = equations.registry(site, page)
    except PageError as error:
        raise build_error(error) from None
    for problem in known.problems():
        raise build_error(problem)
    return known


class _Headings(Treeprocessor):
    """A heading with a formula has a plain name in the table of contents, and an `id` from it."""

    def __init__(self, md: Markdown, held: _Held) -> None:
        super().__init__(md)
        self.held = held

    def run(self, root: Element) -> None:
        if is_collecting(self.md):
            return
        names = self.md.treeprocessors
        toc: Any = names["toc"] if "toc" in names else None  # noqa: SIM401 (a registry has no get)
        taken = {element.get("id") for element in root.iter() if element.get("id")}
        for element in root.iter():
            if not (isinstance(element.tag, str) and re.fullmatch("h[1-6]", element.tag)):
                continue
            text = "".join(element.itertext())
            if not _HELD.search(text):
                continue
            label = " ".join(self.held.release_plain(text).split())
            element.attrib.setdefault("data-toc-label", label)
            if toc is not None and "id" not in element.attrib:
                slug = base = toc.slugify(label, toc.sep)
                count = 0
                while slug in taken:
                    count += 1
                    slug = f"{base}_{count}"
                element.set("id", slug)
                taken.add(slug)


class _Finish(Postprocessor):
    """References become links, then formulas take the place of what stood for them."""

    def __init__(self, md: Markdown, held: _Held) -> None:
        super().__init__(md)
        self.held = held

    def run(self, text: str) -> str:
        held, md = self.held, self.md
        site, page = held.site, held.page
        if "(eq:" in text and site is not None and page is not None and not is_collecting(md):
            known = _registry(site, page)
            text = equations.link_references(
                text,
                known,
                page,
                lambda target: link(md, target),
                lambda label: held.refuse(f"({label})", known.unknown(label)),
            )
        return held.release(text)


class MathsExtension(Extension):
    """See the module."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        self.held = held = _Held(md)
        md.registerExtension(self)
        if "$" not in md.ESCAPED_CHARS:
            md.ESCAPED_CHARS = [*md.ESCAPED_CHARS, "$"]
        # After code spans (190), before backslash escapes (180).
        md.inlinePatterns.register(_Stray(md, held), "mdproof-maths-stray", 189.8)
        md.inlinePatterns.register(_Inline(md, held), "mdproof-maths", 189.9)
        # After indented code (80); before paragraphs (10).
        blocks = md.parser.blockprocessors
        blocks.register(_Display(md.parser, held, inside=False), "mdproof-maths", 79.9)
        blocks.register(_Display(md.parser, held, inside=True), "mdproof-maths-inside", 10.5)
        md.treeprocessors.register(_Headings(md, held), "mdproof-maths", 5.5)  # before toc (5)
        md.postprocessors.register(_Finish(md, held), "mdproof-maths", 5)  # after raw HTML

    def reset(self) -> None:
        """Forget the formulas of the last conversion."""
        self.held.html.clear()
        self.held.plain.clear()


def makeExtension(**options: Any) -> MathsExtension:  # noqa: N802
    """Return the extension; Python-Markdown calls this."""
    return MathsExtension(**options)
