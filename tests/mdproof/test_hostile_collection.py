"""The pages `hostile/collect-*.md`: each says which blocks it has, or how it is refused."""

import json
import re
from pathlib import Path

import pytest
from markdown import Markdown
from tests.mdproof.bench_collect import Listings
from tests.mdproof.conftest import MKDOCS, Sample

from mdproof.collect import read_page, split_front_matter
from mdproof.config import markdown_extensions
from mdproof.errors import PageError

PAGES = sorted((Path(__file__).parent / "hostile").glob("collect-*.md"))

EXTENSIONS = MKDOCS.replace("  - admonition\n", "  - admonition\n  - def_list\n  - md_in_html\n")

LIBRARY = "one = 1\n# --8<-- [start:two]\ntwo = 2\n# --8<-- [end:two]\n"

FENCES = "```python\na = 1\n```\n\n```python\na = 2\n```\n"


def said(text: str, key: str) -> str | None:
    found = re.search(rf"^\ufeff?<!-- {key}: (.*) -->\r?$", text, re.MULTILINE)
    return found.group(1) if found else None


def rendered(sample: Sample) -> list[str]:
    """Return the code that a reader sees as Python, by Python-Markdown without the engine."""
    names, options = markdown_extensions(sample.site.settings["mkdocs"])
    names.remove("mdproof.markdown")
    options.setdefault("pymdownx.highlight", {}).update(pygments_lang_class=True, stripnl=False)
    body, _ = split_front_matter(read_page(sample.site, "page.md"))
    return Listings(Markdown(extensions=names, extension_configs=options).convert(body)).found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem.removeprefix("collect-"))
def test_a_hostile_page_is_collected_whole_or_refused_with_its_line(
    sample: Sample, page: Path
) -> None:
    (sample.root / "mkdocs.yml").write_text(EXTENSIONS, encoding="utf-8")
    (sample.root / "lib.py").write_text(LIBRARY, encoding="utf-8")
    (sample.root / "fences.md").write_text(FENCES, encoding="utf-8")
    data = page.read_bytes()
    (sample.root / "docs/page.md").write_bytes(data)
    text = data.decode()
    refused = said(text, "refuse")
    if refused is not None:
        with pytest.raises(PageError) as error:
            sample.collect_written()
        assert str(error.value) == f"docs/page.md:{refused}"
        return
    expected = said(text, "expect")
    assert expected is not None, "the page says neither what to expect nor how it is refused"
    found = sample.collect_written()
    assert [[block.line, block.code] for block in found.blocks] == json.loads(expected)
    listings = said(text, "listings")
    if listings is not None:
        assert [list(listing) for listing in found.listings] == json.loads(listings)
    shown = rendered(sample)
    shells = sum(language == "console" for language, _ in found.listings)
    assert len(shown) == len(found.blocks) + shells
    for block in found.blocks:
        assert block.code.rstrip("\n") in [code.rstrip("\n") for code in shown]


def test_there_are_hostile_pages() -> None:
    assert len(PAGES) >= 50
