"""The front matter of an article: read from the file, checked, with the line of what is wrong."""

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from mdproof.errors import PageError
from mdproof.site import Site

_FRONT = re.compile(r"\A---[ \t]*\n(.*?)^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# What each known field must be, in the words of the error message.
_KINDS = {
    "title": "a line of text",
    "description": "one line of text",
    "date": "a date such as 2026-11-21",
    "updated": "a date such as 2026-11-21",
    "tags": "a list of words, such as [RLHF, DPO]",
    "prerequisites": "a list of rooms, such as [python/autograd]; [] if there are none",
}


@dataclass(frozen=True)
class Article:
    """One page with its front matter.

    Attributes:
        page: The page, as a path below `docs`.
        title: Its title; may hold mathematics.
        date: The day it was first published, or None where the site does not ask for it.
        updated: The day of its last change that readers should know about.
        tags: Its tags.
        description: One sentence; may hold mathematics.
        prerequisites: Rooms that a reader needs first, such as `python/autograd`.
        body: The Markdown below the front matter.
        body_line: The line of the file on which `body` begins.
        meta: The whole front matter.
    """

    page: str
    title: str
    date: datetime.date | None
    updated: datetime.date | None
    tags: tuple[str, ...]
    description: str
    prerequisites: tuple[str, ...]
    body: str
    body_line: int
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def room(self) -> str:
        """The page without its suffix, such as `large-models/dpo`."""
        return self.page.removesuffix(".md")

    @property
    def wing(self) -> str:
        """The folder of the page, such as `large-models`."""
        return self.page.rpartition("/")[0]


def read_article(site: Site, page: str) -> Article:
    """Read a page and check its front matter.

    An article must have every field of `site.front_matter`; on another page what is there must
    still be of the right type.

    Args:
        site: The site.
        page: The page, as a path below `docs`.

    Raises:
        PageError: If the front matter is not YAML, lacks a required field, has one of the wrong
            type, names a prerequisite that does not exist, or disagrees with the page's heading.
    """
    path = site.docs / page
    file = path.relative_to(site.root).as_posix()
    text = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    front = _FRONT.match(text)
    if front is None and text.startswith("---\n"):
        raise PageError(file, 1, "the front matter is not closed: a line `---` must end it.")
    required = site.front_matter if site.is_article(page) else ()
    if front is None and required:
        raise PageError(file, 1, f"no front matter; an article needs {', '.join(required)}.")
    values, lines = _parse(file, front.group(1)) if front else ({}, {})
    end = text.count("\n", 0, front.end()) if front else 0
    for name in required:
        if name not in values:
            raise PageError(file, max(end, 1), f"the front matter lacks `{name}`: {_kind(name)}.")
    for name in _KINDS.keys() & values.keys():
        if not _fits(name, values[name]):
            shown = repr(values[name]) if values[name] is not None else "nothing"
            raise PageError(file, lines[name], f"`{name}` must be {_kind(name)}; it is {shown}.")

    date, updated = values.get("date"), values.get("updated")
    if date and updated and updated < date:
        raise PageError(file, lines["updated"], f"`updated` {updated} is before `date` {date}.")
    for room in values.get("prerequisites", ()):
        if f"{room}.md" == page:
            raise PageError(file, lines["prerequisites"], f"`{room}` is its own prerequisite.")
        if not (site.docs / f"{room}.md").is_file():
            docs = site.docs.relative_to(site.root).as_posix()
            message = f"prerequisite `{room}`: there is no page {docs}/{room}.md."
            raise PageError(file, lines["prerequisites"], message)

    body = text[front.end() :] if front else text
    article = Article(
        page=page,
        title=values.get("title", ""),
        date=date,
        updated=updated or date,
        tags=tuple(values.get("tags", ())),
        description=values.get("description", ""),
        prerequisites=tuple(values.get("prerequisites", ())),
        body=body,
        body_line=end + 1,
        meta=values,
    )
    if "title" in required:
        _check_heading(file, article)
    return article


def list_articles(site: Site) -> list[Article]:
    """Read every article of the site, newest first, then by page."""
    articles = [read_article(site, page) for page in site.pages() if site.is_article(page)]
    return sorted(articles, key=lambda article: (-_day(article.updated), -_day(article.date)))


def _day(date: datetime.date | None) -> int:
    return date.toordinal() if date else 0


def _kind(name: str) -> str:
    return _KINDS.get(name, "it is required")


def _fits(name: str, value: Any) -> bool:
    if name in ("title", "description"):
        return isinstance(value, str) and bool(value.strip()) and "\n" not in value.strip()
    if name in ("date", "updated"):
        return type(value) is datetime.date  # a datetime is a date, too
    return isinstance(value, list) and all(isinstance(item, str) and item.strip() for item in value)


def _parse(file: str, text: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the fields and the line of each in the file; the text begins on line 2."""
    loader = _LOADER(text)
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise PageError(file, 2, "the front matter must be lines of `field: value`.")
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 2
            if name in values:
                message = f"`{name}` stands twice, first on line {lines[name]}."
                raise PageError(file, line, message)
            lines[name] = line
            try:
                values[name] = loader.construct_object(value, deep=True)
            except ValueError as error:  # 2026-13-01 looks like a date
                raise PageError(file, line, f"`{name}`: {error}: {value.value}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = " (quote a value that holds `: `)" if "mapping values" in str(error.problem) else ""
        line = (mark.line if mark else 0) + 2
        raise PageError(file, line, f"front matter: {error.problem}{hint}.") from None
    finally:
        loader.dispose()
    return values, lines


def _check_heading(file: str, article: Article) -> None:
    for number, line in enumerate(article.body.split("\n"), article.body_line):
        if not line.strip():
            continue
        heading = re.sub(r"\s*\{[#.:][^}]*\}\s*$", "", line).strip()
        if heading != f"# {article.title.strip()}":
            message = f"the page must open with its title, `# {article.title.strip()}`."
            raise PageError(file, number, message)
        return
    raise PageError(file, article.body_line, "the page is empty.")
