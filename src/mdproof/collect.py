"""Collect a page's blocks by the site's own Markdown pipeline, so that none can be missed."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from markdown import Markdown

from mdproof.block import Block
from mdproof.config import markdown_extensions
from mdproof.errors import PageError
from mdproof.site import Site, making_pipeline

FENCE = re.compile(r"^[ \t>]*(?:[-*+]|\d+[.)])?[ \t>]*(`{3,}|~{3,})")
"""What a reader takes for the first line of a fence."""

_KNOWN = re.compile(
    r"(markdown\.extensions\.)?(abbr|admonition|attr_list|def_list|extra|fenced_code|footnotes|"
    r"md_in_html|meta|sane_lists|smarty|tables|toc|wikilinks)|pymdownx\..+|mdproof\..+"
)


@dataclass
class Collected:
    """What the pipeline found on one page.

    Attributes:
        page: Path below `docs`.
        blocks: Fences that are run (or excused), in page order.
        listings: Language and line of the fences that are only shown.
    """

    page: str
    blocks: list[Block] = field(default_factory=list)
    listings: list[tuple[str, int]] = field(default_factory=list)


def read_page(site: Site, page: str) -> str:
    """Return a page's text.

    Raises:
        PageError: If the file is not UTF-8, with the line of the first bad byte.
    """
    data = (site.docs / page).read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PageError(shown(site, page), line, "the file is not UTF-8") from None


def shown(site: Site, page: str) -> str:
    """Return a page's path as error messages show it: from the site's root."""
    return (site.docs / page).relative_to(site.root).as_posix()


def split_front_matter(text: str) -> tuple[str, int]:
    """Return a page's body and the number of lines of front matter above it."""
    if not text.startswith("---\n"):
        return text, 0
    end = re.search(r"^(?:---|\.\.\.)[ \t]*$", text[4:], re.MULTILINE)
    if end is None:
        return text, 0
    body = text[4 + end.end() :].removeprefix("\n")
    return body, text.count("\n", 0, len(text) - len(body))


class _Visible(HTMLParser):
    """Gathers what stands outside code blocks, to see whether a fence was left lying there.

    A fence whose options cannot be parsed comes out as inline code over several lines.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.lost = False
        self.blocks: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("pre", "code", "script", "style"):
            self.open.append(tag)
        number = dict(attrs).get("data-mdproof-block")
        if number:
            self.blocks.append(int(number))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not self.open:
            self.lost |= "```" in data or "~~~" in data
        elif self.open == ["code"]:
            self.lost |= "\n" in data.strip()


def make_pipeline(site: Site) -> Markdown:
    """Return the Markdown converter that `mkdocs.yml` describes.

    Raises:
        PageError: If an extension that it lists is not installed.
    """
    mkdocs: dict[str, Any] = site.settings["mkdocs"]
    names, options = markdown_extensions(mkdocs)
    token = making_pipeline.set(True)
    try:
        md = Markdown(extensions=names, extension_configs=options)
    except ModuleNotFoundError as error:
        raise PageError("mkdocs.yml", 1, f"a Markdown extension is missing: {error}") from None
    finally:
        making_pipeline.reset(token)
    if not hasattr(md, "mdproof_state"):
        raise PageError("mkdocs.yml", 1, "markdown_extensions: mdproof.markdown is not listed")
    md.mdproof_collecting = True  # type: ignore[attr-defined]
    return md


def _brings_no_text(site: Site) -> bool:
    """Tell whether no extension puts text on a page unasked; only snippets may, which are marked.

    An extension that is not known here may include files by a syntax of its own.
    """
    names, options = markdown_extensions(site.settings["mkdocs"])
    snippets = options.get("pymdownx.snippets", {})
    return all(map(_KNOWN.fullmatch, names)) and not snippets.get("auto_append")


def collect(site: Site, page: str, md: Markdown | None = None) -> Collected:
    """Return every fence of a page, as the site renders it.

    Args:
        site: The site.
        page: Path below `docs`.
        md: A pipeline to use again; it is reset.

    Raises:
        PageError: If a fence has options that make no sense, is lost in rendering, or has no
            language; with file and line.
    """
    text = read_page(site, page)
    body, _ = split_front_matter(text)
    marks = ("```", "~~~", "    ", "\t", "8<-")
    if _brings_no_text(site) and not any(mark in body for mark in marks):
        return Collected(page)
    md = md or make_pipeline(site)
    md.reset()
    md.mdproof_page = page  # type: ignore[attr-defined]
    file = shown(site, page)
    try:
        html = md.convert(body)
    except PageError:
        raise
    except Exception as error:  # of another extension: a snippet that is not there
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise PageError(file, 1, f"the page cannot be rendered: {told}") from None
    state = md.mdproof_state  # type: ignore[attr-defined]
    visible = _Visible()
    visible.feed(html)
    rendered = set(visible.blocks)
    for block in state.blocks:
        if block.index not in rendered:
            raise PageError(
                file, block.line, "this fence is not shown as code (indented, or commented out)"
            )
    if visible.lost and state.left:
        raise PageError(
            file, state.left[0], "this fence is not closed, or its options are malformed"
        )
    for language, line in state.listings:
        if not language and site.settings.get("require_language", not site.lenient):
            raise PageError(
                file, line, "a code block needs a language (use ```text for plain text)"
            )
    return Collected(page, list(state.blocks), list(state.listings))
