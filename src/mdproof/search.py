"""A MkDocs plugin: a search index in shards, so that a query loads little however large the site.

Material fetches its whole index with the first page, and ranks Chinese by the words that a
segmenter happened to find. This plugin takes what Material collected
(`search/search_index.json`) and writes

- `search/v1/pages.json`: address and title of every page, and how many sections it has;
- `search/v1/terms/K.json`: for each term of shard K, the sections that have it and their weights;
- `search/v1/words.json`: the terms that are not Chinese, for beginnings of words and misspellings;
- `search/v1/text/P.json`: anchor, title and text of the sections of page P, for the excerpts.

`search-worker.js` takes the place of Material's worker and answers from these files; the search box
and its results stay Material's. A term is a pair of neighbouring Chinese characters, a whole
identifier, or a part of one. The worker splits queries by the same rules.
"""

import html
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import BasePlugin, CombinedEvent, event_priority
from mkdocs.structure.pages import Page

from mdproof.installing import AssetsError, asset

VERSION = "v1"
_HAN = r"\u3400-\u4dbf\u4e00-\u9fff"
_LETTER = r"A-Za-z0-9\u0370-\u03ff"
_WORD = re.compile(rf"[{_HAN}]+|[{_LETTER}]+(?:[-_@:.+][{_LETTER}]+)*")
_PART = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+|[\u0370-\u03ff]+")
_JOINT = re.compile(r"[-_@:.+]")
_TAG = re.compile(r"<[^>]*>")
_EXCLUDED = re.compile(r"<([a-z][a-z0-9-]*)(?=\s)[^>]*\sdata-search-exclude(?=[\s=>])[^>]*>")

SHARD_BYTES = 30_000
"""About how large a shard becomes, uncompressed."""

PAGE_TITLE, SECTION_TITLE, PAGE_TAG = 12.0, 5.0, 3.0
"""How much a term in a title or a tag counts; one in the text counts 1."""

USUAL_LENGTH = 160
"""The number of terms at which a section is neither favoured nor punished."""


def is_han(word: str) -> bool:
    """Tell whether a word, or a term, is Chinese."""
    return "\u3400" <= word[0] <= "\u9fff"


def words(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each word of a text with its terms.

    A run of Chinese characters gives its pairs (a character alone gives itself). Any other word
    gives itself in lower case, then its parts: `grouped_query` gives `grouped`, `query`, and
    `FlashAttention2` gives `flash`, `attention`, `2`.
    """
    for match in _WORD.finditer(text):
        word = match[0]
        if is_han(word):
            yield word, [word] if len(word) == 1 else [a + b for a, b in pairwise(word)]
            continue
        whole = word.lower()
        parts = [part.lower() for part in _PART.findall(word)] + _JOINT.split(whole)
        yield word, list(dict.fromkeys([whole, *parts]))


def shard(term: str, shards: int) -> int:
    """Return the shard of a term: its FNV-1a hash over UTF-16 code units, modulo `shards`."""
    value = 2166136261
    for letter in term:
        value = ((value ^ ord(letter)) * 16777619) & 0xFFFFFFFF
    return value % shards


def plain(text: str) -> str:
    """Return text without tags, references to characters, and marks between words."""
    text = html.unescape(_TAG.sub(" ", text)).replace("\u200b", "").replace("\xb6", "")
    return re.sub(r"\s+", " ", text).strip()


def without_excluded(content: str) -> str:
    """Return HTML without the elements marked `data-search-exclude`.

    Material's parser stops excluding at the first end tag of the same name, also of an element
    inside, so that formulas, which are spans in spans, would be found and shown twice.
    """
    kept = []
    position = 0
    while start := _EXCLUDED.search(content, position):
        kept.append(content[position : start.start()])
        depth = 0
        for tag in re.compile(rf"<(/?){start[1]}(?=[\s>])[^>]*>").finditer(content, start.start()):
            depth += -1 if tag[1] else 1
            if not depth:
                position = tag.end()
                break
        else:
            return "".join(kept)
    return "".join([*kept, content[position:]])


def weights(
    title: str, text: str, tags: list[str], *, first: bool, boost: float = 1.0
) -> dict[str, int]:
    """Return the weight of each term of a section, 1 to 63: BM25's saturation and length.

    Args:
        title: The section's title, or the page's for its first section.
        text: The section's text.
        tags: The page's tags.
        first: Whether the section is the page's first.
        boost: A factor, the page's `search: {boost: ...}`.
    """
    counts: dict[str, float] = defaultdict(float)
    length = 0
    for _, terms in words(text):
        for term in terms:
            counts[term] += 1
            length += 1
    for _, terms in words(title):
        for term in terms:
            counts[term] += PAGE_TITLE if first else SECTION_TITLE
    if first:
        for word, terms in (pair for tag in [title, *tags] for pair in words(tag)):
            single = word if is_han(word) else ""
            for term in {*terms, *single}:  # a query of one character finds titles and tags
                counts[term] += PAGE_TAG
    slow = 1.2 * (0.6 + 0.4 * (length + 20) / USUAL_LENGTH)
    return {
        term: max(1, min(63, round(32 * boost * count / (count + slow))))
        for term, count in counts.items()
    }


def write(docs: list[dict[str, Any]], folder: Path) -> None:
    """Write the index of Material's documents (`location`, `title`, `text`, `tags`) to a folder."""
    pages: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for doc in docs:
        pages[doc["location"].partition("#")[0]].append(doc)
    (folder / "terms").mkdir(parents=True, exist_ok=True)
    (folder / "text").mkdir(exist_ok=True)

    postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
    listed: list[list[Any]] = []
    section = 0
    for number, (location, sections) in enumerate(pages.items()):
        texts = []
        for position, doc in enumerate(sections):
            title, text = plain(doc["title"]), plain(doc["text"])
            texts.append([doc["location"][len(location) :], title, text])
            tags = doc.get("tags", [])
            found = weights(title, text, tags, first=not position, boost=doc.get("boost", 1.0))
            for term, weight in found.items():
                postings[term].append((section, weight))
            section += 1
        listed.append([location, texts[0][1], len(texts)])
        _json(folder / "text" / f"{number}.json", texts)

    size = 5 * sum(map(len, postings.values()))
    shards = max(8, 2 ** round(math.log2(max(1, size / SHARD_BYTES))))
    tables: list[dict[str, list[int]]] = [{} for _ in range(shards)]
    for term in sorted(postings):
        row, last = [], 0
        for section_number, weight in postings[term]:
            row += [section_number - last, weight]
            last = section_number
        tables[shard(term, shards)][term] = row
    for number, table in enumerate(tables):
        _json(folder / "terms" / f"{number}.json", table)
    _json(folder / "words.json", [term for term in sorted(postings) if not is_han(term)])
    _json(folder / "pages.json", {"sections": section, "shards": shards, "pages": listed})


def _json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


class SearchPlugin(BasePlugin):
    """`plugins: [search, mdproof-search]`: writes the index when the site is built."""

    def __init__(self) -> None:
        self._content = ""

    @event_priority(100)
    def _hide(self, context: Any, *, page: Page, **_: Any) -> None:
        """Before Material reads a page: without what is excluded."""
        self._content = page.content or ""
        page.content = without_excluded(self._content)

    @event_priority(-100)
    def _show(self, context: Any, *, page: Page, **_: Any) -> None:
        """After it: whole again."""
        page.content = self._content

    on_page_context = CombinedEvent(_hide, _show)

    @event_priority(-100)
    def on_post_build(self, *, config: MkDocsConfig) -> None:
        """Write the shards, empty Material's index, and put our worker in the place of Material's.

        Raises:
            PluginError: If Material's index or worker, or our worker, is not where it should be.
        """
        site = Path(config.site_dir)
        whole = site / "search" / "search_index.json"
        workers = list((site / "assets" / "javascripts" / "workers").glob("search.*.js"))
        if not whole.is_file() or len(workers) != 1:
            raise PluginError("mdproof-search needs Material's search plugin")
        try:
            worker = asset("search-worker.js").read_bytes()
        except AssetsError as error:
            raise PluginError(f"mdproof-search: {error}") from None
        index = json.loads(whole.read_text(encoding="utf-8"))
        write(index["docs"], whole.parent / VERSION)
        _json(whole, {**index, "docs": []})
        workers[0].write_bytes(worker)
