"""Put a page into the `nav` of `mkdocs.yml` and leave every other byte of the file alone."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from mdproof.config import parse_mkdocs

_ENTRY = re.compile(
    r"^(?P<indent>[ ]*)- (?:(?P<title>[^#:]+?|\"[^\"]*\"|'[^']*'): +)?(?P<page>\S+\.md)"
)


class NavError(ValueError):
    """The file's `nav` is written in a way that cannot be extended line by line."""


def insert(text: str, page: str, title: str = "") -> str:
    """Return the text of `mkdocs.yml` with a page behind the last one of its folder.

    Args:
        text: The file.
        page: The page, as a path below `docs`.
        title: What the navigation calls it, where its neighbours have such titles.

    Raises:
        NavError: If there is a `nav` and no line of it names a page of the folder or of the one
            above it, or the result would not be the same settings with this page added.
    """
    old = parse_mkdocs(text)
    if not old.get("nav"):
        return text
    lines = text.split("\n")
    first = next((n for n, line in enumerate(lines) if re.match(r"nav:\s*(#.*)?\r?$", line)), None)
    if first is None:
        raise NavError(f"the nav of mkdocs.yml is not a list of lines: add {page} to it")
    last = next(
        (n for n in range(first + 1, len(lines)) if re.match(r"[^\s#-]", lines[n])), len(lines)
    )
    folder = page.rpartition("/")[0]
    found = [(n, _ENTRY.match(lines[n])) for n in range(first + 1, last)]
    entries = [(n, entry) for n, entry in found if entry is not None]
    near = [(n, e) for n, e in entries if e["page"].rpartition("/")[0] == folder]
    titled = [pair for pair in near if pair[1]["title"] and not _is_index(pair[1]["page"])]
    if near:
        place, entry = near[-1]
        prefix = f"{entry['indent']}- "
        new = [f"{prefix}{title}: {page}" if title and titled else f"{prefix}{page}"]
    else:
        above = folder.rpartition("/")[0]
        near = [(n, e) for n, e in entries if above and e["page"].startswith(f"{above}/")]
        if not near and above:
            raise NavError(f"the nav of mkdocs.yml has no page of {folder} or {above}: add {page}")
        place = near[-1][0] if near else entries[-1][0] if entries else first
        indent = near[0][1]["indent"] if near else entries[0][1]["indent"] if entries else "  "
        name = folder.rpartition("/")[2]
        item = f"{title}: {page}" if title and above else page
        new = [f"{indent}- {name}:", f"{indent}    - {item}"] if folder else [f"{indent}- {page}"]
    end = "\r" if lines[place].endswith("\r") else ""
    result = "\n".join([*lines[: place + 1], *(line + end for line in new), *lines[place + 1 :]])
    if not _is_added(old, result, page):
        raise NavError(f"the nav of mkdocs.yml cannot be extended by a line: add {page} to it")
    return result


def _is_index(page: str) -> bool:
    return page.rpartition("/")[2].startswith("index.")


def _is_added(old: dict[str, Any], text: str, page: str) -> bool:
    """Tell whether a text holds the old settings, and the page once in `nav`."""
    try:
        new = parse_mkdocs(text)
    except yaml.YAMLError:
        return False
    pages = list(_pages(new.get("nav")))
    before = list(_pages(old.get("nav")))
    rest = [name for name in pages if name != page]
    same = all(
        repr(new[key]) == repr(old[key]) for key in old if key != "nav" and _is_plain(old[key])
    )
    return same and new.keys() == old.keys() and rest == before and pages.count(page) == 1


def _is_plain(value: Any) -> bool:
    return " at 0x" not in repr(value)


def _pages(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        for value in entry.values():
            yield from _pages(value)
    elif isinstance(entry, list):
        for item in entry:
            yield from _pages(item)
