"""An article to take along, and the feeds: what is written is what the page shows."""

import json
import re
import subprocess
import sys
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mdproof.article import Article, read_article
from mdproof.collect import collect
from mdproof.editions import address, write
from mdproof.feeds import LATEST, spoken
from mdproof.proof import load_proof
from mdproof.site import Site, load_site

ROOT = Path(__file__).parents[2]
BASE = "https://example.org/"
PAGE = "generative-models/noise-schedule.md"
ATOM = "{http://www.w3.org/2005/Atom}"


@pytest.fixture(scope="module")
def site() -> Site:
    """This repository's site."""
    return load_site(ROOT)


@pytest.fixture(scope="module")
def folder(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its editions."""
    path = tmp_path_factory.mktemp("editions")
    write(site, path, BASE)
    return path


def articles(site: Site) -> list[Article]:
    return [read_article(site, page) for page in site.pages() if site.is_article(page)]


def file(folder: Path, article: Article, suffix: str) -> Path:
    return folder / address(article.page) / f"article{suffix}"


def notebook(folder: Path, article: Article) -> dict[str, Any]:
    return json.loads(file(folder, article, ".ipynb").read_text(encoding="utf-8"))


def test_every_script_is_python_with_every_block_in_order(site: Site, folder: Path) -> None:
    for article in articles(site):
        text = file(folder, article, ".py").read_text(encoding="utf-8")
        compile(text, article.page, "exec")
        numbers = [int(n) for n in re.findall(r"^# %% \[(\d+)\]$", text, re.MULTILINE)]
        assert numbers == [block.index for block in collect(site, article.page).blocks]
        assert f"# {BASE}{address(article.page)}\n" in text


def test_a_script_runs_alone_and_prints_what_the_page_records(
    site: Site, folder: Path, tmp_path: Path
) -> None:
    article = read_article(site, PAGE)
    script = file(folder, article, ".py").read_text(encoding="utf-8")
    here = tmp_path / "taken.py"
    here.write_text("import matplotlib\nmatplotlib.use('agg')\n" + script, encoding="utf-8")
    command = [sys.executable, str(here)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    proof = load_proof(site, PAGE)
    assert proof is not None
    recorded = "".join(
        out["text"]
        for record in proof.blocks
        for out in record["outputs"]
        if out["type"] == "stdout"
    )
    assert ran.stdout.split() == recorded.split()


def test_what_does_not_run_is_a_comment(site: Site, folder: Path) -> None:
    kept = 0
    for article in articles(site):
        text = file(folder, article, ".py").read_text(encoding="utf-8")
        for block in collect(site, article.page).blocks:
            if block.options.norun or block.options.raises or block.kind == "doctest":
                cell = text.split(f"# %% [{block.index}]\n")[1].split("\n# %% ")[0]
                assert all(line.startswith("#") for line in cell.strip().split("\n"))
                kept += 1
    assert kept > 0


def test_every_notebook_holds_the_article_and_what_its_proof_recorded(
    site: Site, folder: Path
) -> None:
    for article in articles(site):
        book = notebook(folder, article)
        assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
        names = [cell["id"] for cell in book["cells"]]
        assert len(set(names)) == len(names)
        assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
        blocks = collect(site, article.page).blocks
        cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
        assert ["".join(cell["source"]) for cell in cells] == [b.code.rstrip("\n") for b in blocks]
        proof = load_proof(site, article.page)
        assert proof is not None
        for cell, record in zip(cells, proof.blocks, strict=True):
            assert len(cell["outputs"]) == len(record["outputs"]), article.page
        prose = "".join(
            "".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "markdown"
        )
        assert r"\label{" not in prose
        assert "(eq:" not in prose
        assert not re.search(r"\]\((?!https?:)[^)]*\.md", prose)
        for heading in re.findall(r"^## .+$", article.body, re.MULTILINE):
            assert heading in prose


def test_figures_are_in_the_notebook_with_their_words(folder: Path, site: Site) -> None:
    book = notebook(folder, read_article(site, PAGE))
    figures = [
        out["data"]
        for cell in book["cells"]
        for out in cell.get("outputs", [])
        if out["output_type"] == "display_data"
    ]
    assert len(figures) == 3
    for data in figures:
        ElementTree.fromstring(data["image/svg+xml"])
        assert data["text/plain"]


def test_the_feeds_hold_the_newest_articles_and_no_tex(site: Site, folder: Path) -> None:
    newest = max(article.updated or article.date for article in articles(site) if article.date)
    atom = ElementTree.parse(folder / "atom.xml").getroot()
    entries = atom.findall(f"{ATOM}entry")
    assert len(entries) == LATEST
    days = [entry.findtext(f"{ATOM}updated") for entry in entries]
    assert days == sorted(days, reverse=True)
    assert days[0][:10] == newest.isoformat() == atom.findtext(f"{ATOM}updated")[:10]
    channel = ElementTree.parse(folder / "rss.xml").getroot().find("channel")
    items = channel.findall("item")
    links = [entry.find(f"{ATOM}link").get("href") for entry in entries]
    assert [item.findtext("link") for item in items] == links
    for item, link in zip(items, links, strict=True):
        parsedate_to_datetime(item.findtext("pubDate"))
        assert (folder / link.removeprefix(BASE) / "index.md").is_file()
        said = item.findtext("title") + item.findtext("description")
        assert not re.search(r"\$|\\[a-z]|\]\(", said), said


def test_formulas_are_spoken_and_links_are_words() -> None:
    assert spoken(r"从 $\beta_t$ 到 [DDPM](ddpm.md)，`x` 与 **y**") == "从 β_t 到 DDPM，x 与 y"
    assert spoken("a-b_c - d") == "a-b_c - d"
