"""On the built site: fences rendered = collected = run + excused, and what is shown is recorded."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mdproof.collect import collect, make_pipeline
from mdproof.copy import payloads
from mdproof.proof import load_proof
from mdproof.site import load_site

ROOT = Path(__file__).parents[2]


class Built(HTMLParser):
    """What a reader of the built page gets: blocks, their states, copies, outputs, listings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.states: list[str] = []
        self.copies: list[str] = []
        self.images: list[str] = []
        self.python_listings = 0
        self.bare_pre = 0
        self._open: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        classes = given.get("class", "").split()
        if "data-mdproof-state" in given:
            self.states.append(given["data-mdproof-state"])
        if "mdproof-copy" in classes and "mdproof-copy--bare" not in classes:
            self.copies.append(given["data-mdproof-copy"])
        if tag == "img" and {"mdproof-light", "mdproof-dark"} & set(classes):
            assert given["alt"], "a figure without a text alternative"
            self.images.append(given["src"])
        inside = any("data-mdproof-state" in kind for _, kind in self._open)
        if not inside and "language-python" in classes:
            self.python_listings += 1
        if tag in ("div", "pre", "figure"):
            self._open.append((tag, " ".join(given)))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("div", "pre", "figure"):
            while self._open and self._open.pop()[0] != tag:
                pass


def pages() -> list[str]:
    site, found = load_site(ROOT), []
    md = make_pipeline(site)
    for page in site.pages():
        if collect(site, page, md).blocks:
            found.append(page)
    return found


@pytest.mark.parametrize("page", pages())
def test_rendered_is_collected_is_run_plus_excused(built: Path, page: str) -> None:
    site = load_site(ROOT)
    folder = built / page.removesuffix(".md").removesuffix("index")
    text = (folder / "index.html").read_text(encoding="utf-8")
    shown = Built(text)
    blocks, proof = collect(site, page).blocks, load_proof(site, page)
    assert proof is not None
    run = [record for record in proof.blocks if record["status"] == "passed"]
    excused = [record for record in proof.blocks if record["status"] == "excused"]
    assert len(shown.states) == len(blocks) == len(run) + len(excused)
    assert shown.states.count("verified") == len(run)
    assert shown.states.count("excused") == len(excused)
    assert shown.python_listings == 0, "Python that nobody runs"
    assert shown.copies == payloads(page, site)
    assert all((folder / source).resolve().is_file() for source in shown.images)
    words = html.unescape(re.sub(r"<[^>]+>", "", text))
    for record in run:
        for out in record["outputs"]:
            assert out["type"] == "figure" or out["text"].strip() in words


def test_every_page_with_python_has_blocks_and_no_page_is_left_out() -> None:
    site = load_site(ROOT)
    fence = re.compile(r"^[ >]*(```|~~~) ?\{?\.?(python|py|python3|pycon)\b", re.MULTILINE)
    shown = re.compile(r"^(`{4,}).*?^\1$", re.MULTILINE | re.DOTALL)  # a page shown on a page
    with_fence = {
        page
        for page in site.pages()
        if fence.search(shown.sub("", (site.docs / page).read_text(encoding="utf-8")))
    }
    assert with_fence == set(pages())
    assert len(with_fence) >= 11
