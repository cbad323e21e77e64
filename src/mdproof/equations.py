r"""Numbered equations: who has which label, what refers to it, and which code implements it.

A display equation with `\label{eq:name}` is numbered on its page in order of appearance. The name
in parentheses, anywhere in prose, in a comment or in a docstring, is a reference. Labels are read
from the Markdown sources, and references from the Python sources, so a page may be rendered alone.
"""

import ast
import difflib
import functools
import html
import io
import re
import time
import tokenize
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mdproof.errors import PageError
from mdproof.reference import dotted_name, read_module, reference_target
from mdproof.site import Site

_NAME = r"eq:[A-Za-z0-9]+(?:[-_.:][A-Za-z0-9]+)*"
REFERENCE = re.compile(rf"\(({_NAME})\)")
LABEL = re.compile(r"\\label\s*\{([^{}]*)\}")

_WORDS = {
    "zh": {"code": "实现：", "test": "测试：", "and": "、", "tests": "{} 中的 {} 项"},
    "en": {"code": "Code: ", "test": "Tests: ", "and": ", ", "tests": "{}: {} tests"},
}


@dataclass(frozen=True)
class Equation:
    """One numbered equation."""

    label: str
    page: str
    line: int
    number: int

    @property
    def anchor(self) -> str:
        """The `id` of the equation on its page."""
        return anchor(self.label)


@dataclass(frozen=True)
class Citation:
    """A comment or a docstring that names an equation.

    Attributes:
        file: The file, from the root of the repository.
        module: Its dotted name; of a test, the name of the file.
        name: The function, method or class around the citation, or '' in a module's docstring.
    """

    label: str
    file: str
    line: int
    module: str
    name: str
    is_test: bool

    @property
    def shown(self) -> str:
        """What a reader calls it."""
        return self.name.removesuffix(".__init__") or self.module.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class _Page:
    title: str
    labels: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Registry:
    """All numbered equations of a site and all that cites them in its sources."""

    site: Site
    titles: Mapping[str, str] = field(default_factory=dict)
    equations: Mapping[tuple[str, str], Equation] = field(default_factory=dict)
    citations: Mapping[str, tuple[Citation, ...]] = field(default_factory=dict)

    def find(self, label: str, page: str | None = None) -> Equation | None:
        """Return the equation of a label, in the language of a page if it exists there."""
        for language in dict.fromkeys((_language(page or ""), "")):
            if (language, label) in self.equations:
                return self.equations[language, label]
        return None

    def text(self, equation: Equation, page: str | None) -> str:
        """Return what a reference reads: `(3)`, or `(DPO 3)` from another page."""
        if page == equation.page:
            return f"({equation.number})"
        return f"({_room(self.titles[equation.page], equation.page)} {equation.number})"

    def problems(self) -> list[PageError]:
        """Return every citation in the Python sources whose label does not exist."""
        return [
            PageError(found.file, found.line, self.unknown(label))
            for label, citations in self.citations.items()
            if self.find(label) is None
            for found in citations
        ]

    def unknown(self, label: str) -> str:
        """Return the message for a label that does not exist."""
        labels = sorted({key for _, key in self.equations})
        near = difflib.get_close_matches(label, labels, n=1)
        return f"no equation is labelled {label}" + (f"; did you mean {near[0]}?" if near else "")


def anchor(label: str) -> str:
    """Return the `id` for a label: `eq:dpo-loss` becomes `eq-dpo-loss`."""
    return re.sub(r"[^\w-]", "-", label)


def _language(page: str) -> str:
    """Return the language of `room.en.md`, which is `en`, or '' for the default language."""
    found = re.search(r"\.([a-z]{2}(?:-[A-Za-z]+)?)\.md$", page)
    return found.group(1) if found else ""


def _room(title: str, page: str) -> str:
    """Return a short name of a page: its title up to the colon, or its file's name if long."""
    name = re.split(r"[：:]", title, maxsplit=1)[0].strip()
    width = sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in name)
    if not name or width > 20:
        name = page.rsplit("/", 1)[-1].split(".", 1)[0]
    return name


# ---- reading the sources -------------------------------------------------------------------------

_PREFIX = re.compile(r"^(?:[ \t>]|[-*+][ \t]|\d+[.)][ \t])*")
_FENCE = re.compile(r"(`{3,}|~{3,})")


def displays(text: str) -> Iterator[tuple[int, str]]:
    """Yield each display equation of a Markdown text: the line of its first `$$`, and its TeX."""
    fence, comment, opened, body = "", False, 0, []
    for line, raw in _after_front_matter(text):
        content = raw[len(_PREFIX.match(raw).group()) :]  # type: ignore[union-attr]
        if fence:
            end = content.strip()
            if len(end) >= len(fence) and end == fence[0] * len(end):
                fence = ""
        elif opened:
            bare = raw.lstrip(" \t>").rstrip()
            if bare.endswith("$$"):
                yield opened, "\n".join([*body, bare[:-2]])
                opened, body = 0, []
            elif bare:
                body.append(bare)
            else:
                opened, body = 0, []  # never closed: the page that is rendered says so
        elif comment or content.startswith("<!--"):
            comment = "-->" not in raw
        elif found := _FENCE.match(content):
            if found.group() == "~~~" or found.group()[0] not in content[len(found.group()) :]:
                fence = found.group()
        elif content.startswith("$$"):
            rest = content[2:].rstrip()
            if rest.endswith("$$"):
                yield line, rest[:-2]
            else:
                opened, body = line, [rest]


def _after_front_matter(text: str) -> Iterator[tuple[int, str]]:
    lines = text.splitlines()
    start = 0
    if lines and lines[0].strip() == "---":
        start = next((i for i, line in enumerate(lines[1:], 2) if line.strip() == "---"), 0)
    return enumerate(lines[start:], start + 1)


@functools.lru_cache(maxsize=65536)
def _scan_page(file: Path, mtime: int, size: int) -> _Page:
    text = file.read_text(encoding="utf-8")
    labels = tuple(
        (label.strip(), line + tex[: found.start()].count("\n"))
        for line, tex in displays(text)
        for found in LABEL.finditer(tex)
        for label in [found.group(1)]
    )
    return _Page(_title(text), labels)


def _title(text: str) -> str:
    front = text.split("\n---", 1)[0] if text.startswith("---") else ""
    found = re.search(r"^title:[ \t]*(.+)$", front, re.MULTILINE)
    if found is None:
        found = re.search(r"^#[ \t]+(.+)$", text, re.MULTILINE)
    return found.group(1).strip().strip("'\"") if found else ""


@functools.lru_cache(maxsize=65536)
def _scan_code(file: Path, mtime: int, size: int) -> tuple[tuple[str, int], ...]:
    """Return the labels, with lines, in the comments and the docstrings of a Python file."""
    text = file.read_text(encoding="utf-8")
    if "(eq:" not in text:
        return ()
    try:
        tree = ast.parse(text)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (SyntaxError, tokenize.TokenError):
        return ()  # the linter's business
    strings = {
        (node.lineno, node.col_offset)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return tuple(
        (found.group(1), token.start[0] + token.string[: found.start()].count("\n"))
        for token in tokens
        if token.type == tokenize.COMMENT
        or (token.type == tokenize.STRING and token.start in strings)
        for found in REFERENCE.finditer(token.string)
    )


def cited_labels(file: Path) -> tuple[tuple[str, int], ...]:
    """Return the labels, with lines, that a Python file cites in comments and docstrings."""
    stamp = _stamp(file)
    return _scan_code(*stamp) if stamp else ()


def _stamp(file: Path) -> tuple[Path, int, int] | None:
    try:
        stat = file.stat()
    except OSError:  # gone between the listing and now
        return None
    return file, stat.st_mtime_ns, stat.st_size


def _sources(site: Site) -> Iterator[tuple[Path, bool]]:
    """Yield the Python files that may cite an equation, and whether they are tests."""
    for root in site.source:
        for package in site.packages:
            for file in sorted((root / package).rglob("*.py")):
                yield file, False
    for file in sorted((site.root / "examples").rglob("*.py")):
        yield file, False
    for folder in site.settings.get("tests", ("tests",)):
        for file in sorted((site.root / folder).rglob("*.py")):
            yield file, True


def read_registry(site: Site) -> Registry:
    """Read all pages and sources; what has not changed since the last time is not read again.

    Raises:
        PageError: If a label is not well formed, or is used twice in one language.
    """
    titles: dict[str, str] = {}
    equations: dict[tuple[str, str], Equation] = {}
    for page in site.pages():
        stamp = _stamp(site.docs / page)
        if stamp is None:
            continue
        scanned = _scan_page(*stamp)
        titles[page] = scanned.title
        for number, (label, line) in enumerate(scanned.labels, 1):
            here = file_of(site, page)
            if not re.fullmatch(_NAME, label):
                raise PageError(here, line, f"a label is written eq:name, not {label!r}")
            other = equations.get((_language(page), label))
            if other is not None:
                place = f"{file_of(site, other.page)}:{other.line}"
                raise PageError(here, line, f"the label {label} is already used at {place}")
            equations[_language(page), label] = Equation(label, page, line, number)
    citations: dict[str, list[Citation]] = {}
    for file, is_test in _sources(site):
        stamp = _stamp(file)
        for label, line in _scan_code(*stamp) if stamp else ():
            around = read_module(file).enclosing(line)
            module = file.name if is_test else dotted_name(file, site) or file.stem
            where = file.relative_to(site.root).as_posix()
            found = Citation(label, where, line, module, around.name if around else "", is_test)
            citations.setdefault(label, []).append(found)
    return Registry(site, titles, equations, {key: tuple(all_) for key, all_ in citations.items()})


_kept: dict[Path, tuple[float, dict[str, tuple[Path, int, int] | None], Registry]] = {}


def registry(site: Site, page: str | None = None) -> Registry:
    """Return the registry of a site; the one of a second ago will do, if `page` is unchanged."""
    found = _kept.get(site.root)
    now = time.monotonic()
    stamp = _stamp(site.docs / page) if page else None
    if found is not None and now - found[0] < 1.0:
        _, stamps, known = found
        if known.site == site and (page is None or stamps.setdefault(page, stamp) == stamp):
            return known
    fresh = read_registry(site)
    _kept[site.root] = (time.monotonic(), {page: stamp} if page else {}, fresh)
    return fresh


def file_of(site: Site, page: str) -> str:
    """Return a page as a path from the root of the repository, for messages."""
    file = site.docs / page
    return file.relative_to(site.root).as_posix() if file.is_relative_to(site.root) else str(file)


def locate(site: Site, page: str | None, needle: str, position: int = 0) -> tuple[str, int]:
    """Return file and line of a piece of text: on the page, or in a docstring shown there."""
    wanted = _squeeze(needle)
    skipped = len(_squeeze(needle[:position]))
    files = [site.docs / page] if page else []
    for file in [*files, *(file for file, _ in _sources(site))]:
        if not file.is_file():
            continue
        kept: list[str] = []
        lines: list[int] = []
        for line, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            squeezed = _squeeze(text)
            kept.append(squeezed)
            lines += [line] * len(squeezed)
        start = "".join(kept).find(wanted)
        if start >= 0 and wanted:
            line = lines[min(start + skipped, start + len(wanted) - 1)]
            return file.relative_to(site.root).as_posix(), line
    return (file_of(site, page), 1) if page else ("?", 1)


def _squeeze(text: str) -> str:
    return re.sub(r"[\s>]", "", text)


# ---- writing HTML --------------------------------------------------------------------------------


def cited_by(label: str, known: Registry, link: Callable[[str], str]) -> str:
    """Return a quiet line: the functions that implement an equation, the tests that cite it.

    Args:
        label: The label of the equation.
        known: The registry.
        link: Turns a target below `docs` into a link for the page that is rendered.
    """
    words = _WORDS.get(known.site.language[:2], _WORDS["en"])
    code: dict[str, str] = {}
    tests: dict[str, dict[str, Citation]] = {}
    for found in known.citations.get(label, ()):
        if found.is_test:
            tests.setdefault(found.file, {}).setdefault(found.shown, found)
        else:
            key = f"{found.module}.{found.name}"
            if key not in code:
                target = _target(found, known.site)
                code[key] = _place(found, link(target) if target else None)
    lines = []
    if code:
        lines.append(words["code"] + words["and"].join(code.values()))
    if tests:
        shown = []
        for names in tests.values():
            first = next(iter(names.values()))
            page = _page_of_test(first, known.site)
            href = link(page) if page else None
            if len(names) > 1:
                shown.append(words["tests"].format(_place(first, href, first.module), len(names)))
            else:
                shown.append(_place(first, href))
        lines.append(words["test"] + words["and"].join(shown))
    return "".join(f"<span>{line}</span>" for line in lines)


def _target(found: Citation, site: Site) -> str | None:
    """Return where the reference describes what cites an equation (`__init__`: its class)."""
    if not found.name:
        return reference_target(found.module, site)
    parts = found.name.split(".")
    candidates = (".".join([found.module, *parts[:end]]) for end in range(len(parts), 0, -1))
    return next(filter(None, (reference_target(name, site) for name in candidates)), None)


def _page_of_test(found: Citation, site: Site) -> str | None:
    """Return where the reference lists the tests of a room; `tests/a/test_b.py` is of room a/b."""
    room = re.sub(r"(?:^|(?<=/))test_|\.py$", "", found.file.partition("/")[2]).replace("_", "-")
    page = f"reference/{room}.md"
    file = site.docs / page
    listed = file.is_file() and "{#used-by}" in file.read_text(encoding="utf-8")
    return f"{page}#used-by" if listed else None


def _place(found: Citation, href: str | None, text: str = "") -> str:
    where = html.escape(f"{found.file}:{found.line}")
    shown = f"<code>{html.escape(text or found.shown)}</code>"
    if href is None:
        return f'<span title="{where}">{shown}</span>'
    return f'<a href="{html.escape(href)}" title="{where}">{shown}</a>'


_TOKEN = re.compile(
    r"<!--.*?-->"
    r"|<(?P<raw>script|style|textarea|svg|template)\b.*?</(?P=raw)\s*>"
    r"|<(?P<close>/?)(?P<tag>[A-Za-z][^\s/>]*)(?P<rest>(?:\"[^\"]*\"|'[^']*'|[^'\">])*)>",
    re.DOTALL | re.IGNORECASE,
)
_CLASS = re.compile(r"""\bclass\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""")
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "wbr"}
_COMMENT = {"c", "c1", "cm", "ch", "cs", "cp", "cpf", "sd"}  # Pygments: comments, docstrings


def link_references(
    text: str,
    known: Registry,
    page: str | None,
    link: Callable[[str], str],
    refuse: Callable[[str], Exception],
) -> str:
    """Turn every reference in rendered HTML into a link.

    In prose everywhere; in highlighted code only inside comments and docstrings. Attributes,
    scripts, inline code and recorded output (class `mdproof-output`) stay as they are.

    Args:
        text: The HTML of a page.
        known: The registry.
        page: The page below `docs`.
        link: Turns a target below `docs` into a link for this page.
        refuse: Makes the exception for a label that does not exist.
    """
    if "(eq:" not in text:
        return text

    def one(found: re.Match[str]) -> str:
        label = found.group(1)
        equation = known.find(label, page)
        if equation is None:
            raise refuse(label)
        shown = html.escape(known.text(equation, page))
        if in_link:
            return shown
        if equation.page == page:
            return f'<a class="mdproof-eqref" href="#{equation.anchor}">{shown}</a>'
        href = html.escape(link(f"{equation.page}#{equation.anchor}"))
        title = html.escape(known.titles[equation.page])
        return f'<a class="mdproof-eqref" href="{href}" title="{title}">{shown}</a>'

    out: list[str] = []
    # Of each open element: its name, how references in it are treated, whether it is in a link.
    stack = [("", "live", False)]
    end = 0
    for token in _TOKEN.finditer(text):
        piece = text[end : token.start()]
        _, state, in_link = stack[-1]
        if state == "live" and "(eq:" in piece:
            piece = REFERENCE.sub(one, piece)
        out += [piece, token.group()]
        end = token.end()
        tag = (token["tag"] or "").lower()
        if not tag:
            continue
        if token["close"]:
            if any(name == tag for name, *_ in stack[1:]):
                while stack.pop()[0] != tag:
                    pass
        elif tag not in _VOID and not token["rest"].rstrip().endswith("/"):
            stack.append((tag, _state(state, tag, token["rest"]), in_link or tag == "a"))
    _, state, in_link = stack[-1]
    piece = text[end:]
    out.append(REFERENCE.sub(one, piece) if state == "live" and "(eq:" in piece else piece)
    return "".join(out)


def _state(around: str, tag: str, attributes: str) -> str:
    """Return how references are treated in an element: `live`, `quiet`, or `code`.

    In `code` only comments and docstrings are live; what is quiet stays so to its end.
    """
    if around == "quiet":
        return "quiet"
    found = _CLASS.search(attributes)
    classes = next(filter(None, found.groups()), "").split() if found else []
    if "mdproof-output" in classes:
        return "quiet"
    if around == "code":
        return "live" if _COMMENT.intersection(classes) else "code"
    if tag == "pre":
        return "code"
    return "quiet" if tag in ("code", "kbd", "samp") else around
