"""The site for programs: what is written is what the pages show and the proofs record."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mdproof.article import Article, read_article
from mdproof.block import Block
from mdproof.collect import collect
from mdproof.copy import payloads
from mdproof.editions import EditionsPlugin, _end, address, markdown, snippets, write
from mdproof.site import Site, load_site

ROOT = Path(__file__).parents[2]
BASE = "https://example.org/"


@pytest.fixture(scope="module")
def site() -> Site:
    """This repository's site."""
    return load_site(ROOT)


@pytest.fixture(scope="module")
def folder(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its editions; the address given without a slash."""
    path = tmp_path_factory.mktemp("editions")
    write(site, path, BASE.rstrip("/"))
    return path


@pytest.fixture(scope="module")
def index(folder: Path) -> dict[str, Any]:
    """What `snippets.json` holds."""
    return json.loads((folder / "snippets.json").read_text(encoding="utf-8"))


def articles(site: Site) -> list[str]:
    return [page for page in site.pages() if site.is_article(page)]


def test_every_article_is_listed_once_and_its_file_is_there(site: Site, folder: Path) -> None:
    text = (folder / "llms.txt").read_text(encoding="utf-8")
    links = re.findall(r"^- \[.+\]\((\S+)\): \S", text, re.MULTILINE)
    assert sorted(links) == sorted(f"{BASE}{address(page)}index.md" for page in articles(site))
    for link in links:
        assert (folder / link.removeprefix(BASE)).is_file()
    assert text.startswith("# 致知\n\n> ")


def test_every_block_is_indexed_with_the_copy_that_the_page_gives(
    site: Site, index: dict[str, Any]
) -> None:
    assert (index["schema"], index["url"]) == (1, BASE)
    for page in articles(site):
        blocks = collect(site, page).blocks
        found = [each for each in index["snippets"] if each["page"] == page]
        assert [each["block"] for each in found] == [block.index for block in blocks]
        assert [each["code"] for each in found if each["code"]] == payloads(page, site)


def test_what_is_not_run_is_not_called_verified(index: dict[str, Any]) -> None:
    for each in index["snippets"]:
        if "norun" in each["excuses"]:
            assert each["state"] == "not run"
        else:
            assert (each["state"], each["why"]) == ("verified", "")
            assert each["verified"]
            assert each["sha256"] == hashlib.sha256(each["code"].encode()).hexdigest()[:32]


def test_the_markdown_has_each_block_its_output_and_its_hash(
    site: Site, folder: Path, index: dict[str, Any]
) -> None:
    for page in articles(site):
        text = (folder / address(page) / "index.md").read_text(encoding="utf-8")
        found = [each for each in index["snippets"] if each["page"] == page]
        numbers = re.findall(r"<!-- block (\d+) · ", text)
        assert numbers == [str(each["block"]) for each in found]
        parts = re.split(r"<!-- block \d+ · .*? -->", text)
        for part, each in zip(parts, found, strict=False):
            bare = re.sub(r"(?m)^[ \t]+", "", part)
            for line in each["shown"].splitlines():
                assert line.strip() in bare
            for out in each["outputs"]:
                if out["type"] != "figure":
                    assert out["text"].strip().splitlines()[0].strip() in bare
        if found:
            assert found[-1]["sha256"] in text
        assert not re.search(r"\]\([^)\s:]+\.md[#)]", text)  # links lead to the site


def test_a_link_leads_where_it_led(folder: Path) -> None:
    text = (folder / "python/dual-numbers/index.md").read_text(encoding="utf-8")
    assert f"]({BASE}python/autograd/" in text


@pytest.mark.parametrize(
    ("lines", "end"),
    [
        (["```python", "x", "```", "y"], 2),
        (["````python", "```", "x", "```", "````"], 4),
        (["  ~~~ python", "  ```", "  ~~~~", "y"], 2),
        (["```python", "x", "``` not the end"], 2),
        (["- ```python", "  x", "  ```", "y"], 2),
        (["> ```python", "> x", "> ```", "y"], 2),
        (['--8<-- "part.md"'], 0),
    ],
)
def test_the_end_of_a_fence(lines: list[str], end: int) -> None:
    assert _end(lines, 0) == end


@pytest.mark.parametrize(
    ("page", "where"),
    [("index.md", ""), ("a/index.md", "a/"), ("a/b.md", "a/b/"), ("a/b-index.md", "a/b-index/")],
)
def test_addresses(page: str, where: str) -> None:
    assert address(page) == where


def test_a_stale_block_says_so_and_gives_no_copy(site: Site) -> None:
    page = "large-models/attention.md"
    blocks = list(collect(site, page).blocks)
    blocks[1] = replace(blocks[1], code=blocks[1].code + "\nprint(1)\n")
    found = list(snippets(site, page, BASE, blocks))
    assert (found[0]["state"], found[1]["state"]) == ("verified", "stale")
    assert found[1]["why"]
    assert (found[1]["code"], found[1]["outputs"], found[1]["verified"]) == ("", [], [])
    text = markdown(site, read_article(site, page), BASE, blocks, found)
    assert "<!-- block 2 · stale -->" in text


def test_the_plugin_writes_beside_the_pages(tmp_path: Path) -> None:
    config = SimpleNamespace(
        config_file_path=str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), site_url=BASE
    )
    EditionsPlugin().on_post_build(config=config)  # type: ignore
    assert {path.name for path in tmp_path.iterdir()} > {"llms.txt", "snippets.json"}


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (["- text", "- ```python", "  print(1)", "  ```", "  more"], "  ```text\n  1\n  ```"),
        (["> ```python", "> print(1)", "> ```"], "> ```text\n> 1\n> ```"),
    ],
)
def test_the_output_stands_where_its_block_stands(
    site: Site, tmp_path: Path, written: list[str], shown: str
) -> None:
    (tmp_path / "page.md").write_text("\n".join(written), encoding="utf-8")
    start = next(number for number, line in enumerate(written, 1) if "```" in line)
    block = Block("page.md", 1, start, "code", "print(1)\n")
    found = {
        "page": "page.md",
        "block": 1,
        "state": "verified",
        "verified": [{"how": "cpu"}],
        "date": "2026-11-27",
        "sha256": "",
        "outputs": [{"type": "stdout", "text": "1\n"}],
        "excuses": {"varies": "a --> b"},
        "shown": "",
        "alt": "",
    }
    here = replace(site, docs=tmp_path)
    article = Article("page.md", "", None, None, (), "", (), "", 1, {})
    text = markdown(here, article, BASE, [block], [found])
    closed = text.index(written[-1] if written[-1] != "  more" else "  ```")
    assert text.index(shown) > closed
    assert text.count("-->") == 1
