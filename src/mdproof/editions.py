"""A MkDocs plugin: the site for programs, beside the pages for people.

When the site is built it writes

- `llms.txt`: every article by wing, in reading order, with its description;
- beside each article's HTML its Markdown, `index.md`: what the author wrote, with the code of
  source fences in place, and behind each block its recorded output, how it was verified, and the
  hash of its runnable copy;
- beside it the article as a script and as a notebook, `article.py` and `article.ipynb`;
- `snippets.json`: every block of the articles with its runnable copy, outputs and verification;
- `atom.xml` and `rss.xml`: the newest articles.
"""

import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import BasePlugin

from mdproof.article import Article, read_article
from mdproof.block import Block, excuses
from mdproof.collect import collect, make_pipeline, read_page
from mdproof.copy import recorded_copy, stale_reasons
from mdproof.downloads import notebook, script
from mdproof.feeds import atom, rss
from mdproof.overview import nav_title, reading_order
from mdproof.proof import load_proof
from mdproof.site import Site, load_site

SCHEMA = 1
_FENCE = re.compile(r"(?P<before>[^`~]*)(?P<marks>`{3,}|~{3,})")
_LINK = re.compile(r"(?<=\]\()(?P<page>[^)\s:#]+)\.md(?P<anchor>#[^)\s]*)?(?=\))")


def address(page: str) -> str:
    """Return the address of a page below the site's: `a/b.md` is at `a/b/`."""
    name = page.removesuffix(".md")
    return "" if name == "index" else f"{name.removesuffix('/index')}/"


def snippets(site: Site, page: str, base: str, blocks: Sequence[Block]) -> Iterator[dict[str, Any]]:
    """Yield for each block of a page what a program may want of it.

    Args:
        site: The site.
        page: Path below `docs`.
        base: Address of the site, ending in a slash.
        blocks: The page's blocks.
    """
    proof = load_proof(site, page)
    reasons = stale_reasons(site, blocks, proof)
    for position, (block, reason) in enumerate(zip(blocks, reasons, strict=True)):
        record = proof.blocks[position] if proof and position < len(proof.blocks) else None
        state = "stale" if reason or record is None else "verified"
        if block.options.norun:  # its record proves only that it was not to be run: never verified
            state = "not run"
        held = record if state == "verified" and record else None
        copy = recorded_copy(site, blocks[: position + 1], held) if held else None
        outputs = [
            {key: value for key, value in out.items() if key in ("type", "text", "name")}
            for out in (held["outputs"] if held else [])
        ]
        yield {
            "page": page,
            "url": f"{base}{address(page)}#block-{block.index}",
            "block": block.index,
            "kind": block.kind,
            "shown": block.shown or block.code,
            "source": block.options.source,
            "state": state,
            "why": reason,
            "code": copy.text if copy else "",
            "sha256": copy.sha256 if copy else "",
            "verified": held["verified"] if held else [],
            "date": held["date"] if held else "",
            "libraries": held["libraries"] if held else {},
            "outputs": outputs,
            "excuses": excuses(block.options),
            "alt": block.options.alt,
        }


def _end(lines: Sequence[str], start: int) -> int:
    """Return the number of the line that closes the fence which opens on line `start`, from 0."""
    opening = _FENCE.match(lines[start])
    if opening is None:  # the line includes a snippet, which brings the fence
        return start
    marks = opening["marks"]
    for number in range(start + 1, len(lines)):
        text = lines[number].lstrip("> \t").rstrip()
        if text and set(text) == {marks[0]} and len(text) >= len(marks):
            return number
    return len(lines) - 1


def _fenced(text: str, info: str, indent: str) -> list[str]:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return [indent + line for line in (marks + info, *text.rstrip("\n").split("\n"), marks)]


def _behind(snippet: dict[str, Any], base: str, indent: str) -> list[str]:
    """Return the lines behind a block: its output and how it was verified."""
    lines: list[str] = []
    printed = "".join(out["text"] for out in snippet["outputs"] if out["type"] != "figure")
    if printed.strip():
        lines += ["", *_fenced(printed, "text", indent)]
    for out in snippet["outputs"]:
        if out["type"] == "figure":
            page = snippet["page"].removesuffix(".md")
            lines += [
                "",
                f"{indent}![{snippet['alt']}]({base}proofs/{page}/{out['name']}.light.svg)",
            ]
    ways = ", ".join(
        way.get("target") or way.get("device") or way["how"] for way in snippet["verified"]
    )
    excused = "; ".join(f"{kind}: {why}" for kind, why in snippet["excuses"].items())
    said = [f"block {snippet['block']}", snippet["state"]]
    said += [ways, snippet["date"], snippet["sha256"] and f"copy {snippet['sha256']}", excused]
    comment = " · ".join(filter(None, said)).replace("--", "—")  # which would end the comment
    return [*lines, "", f"{indent}<!-- {comment} -->"]


def markdown(
    site: Site,
    article: Article,
    base: str,
    blocks: Sequence[Block],
    found: Sequence[dict[str, Any]],
) -> str:
    """Return an article as Markdown with what its blocks gave.

    Args:
        site: The site.
        article: The article.
        base: Address of the site, ending in a slash.
        blocks: Its blocks.
        found: Its blocks as `snippets` gives them.
    """
    lines = read_page(site, article.page).split("\n")
    for block, snippet in sorted(zip(blocks, found, strict=True), key=lambda pair: -pair[0].line):
        start = block.line - 1
        end = _end(lines, start)
        opening = _FENCE.match(lines[start])
        indented = re.sub(r"[^>\s]", " ", opening["before"]) if opening else ""
        own = lines[start : end + 1]
        if block.kind == "source" and end > start:
            own = _fenced(snippet["shown"], "python", indented)
        lines[start : end + 1] = [*own, *_behind(snippet, base, indented)]
    return _absolute("\n".join(lines), article, base)


def _absolute(text: str, article: Article, base: str) -> str:
    """Give the links to other pages their whole address."""
    folder = article.page.rpartition("/")[0]

    def whole(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link["page"] + ".md"))
        return base + address(target) + (link["anchor"] or "")

    return _LINK.sub(whole, text)


def _take_along(
    site: Site,
    article: Article,
    base: str,
    blocks: Sequence[Block],
    found: Sequence[dict[str, Any]],
    place: Path,
) -> None:
    """Write an article's script and notebook."""
    url = base + address(article.page)
    lines = read_page(site, article.page).split("\n")
    spans = [(block.line - 1, _end(lines, block.line - 1)) for block in blocks]
    (place / "article.py").write_text(script(article, blocks, url), encoding="utf-8")
    text = notebook(
        site, article, blocks, found, spans, lambda text: _absolute(text, article, base), url
    )
    (place / "article.ipynb").write_text(text, encoding="utf-8")


def write(site: Site, folder: Path, base: str) -> None:
    """Write the editions of a site into the folder of its HTML.

    Args:
        site: The site.
        folder: Where the site was built.
        base: Address of the site; a slash is added if it does not end in one.
    """
    base = base.rstrip("/") + "/"
    mkdocs = site.settings["mkdocs"]
    listing = [f"# {mkdocs.get('site_name', '')}", "", f"> {mkdocs.get('site_description', '')}"]
    md = make_pipeline(site)
    every: list[dict[str, Any]] = []
    dated: list[tuple[Article, str]] = []
    for wing in site.articles:
        try:
            pages = reading_order(site, wing)
        except LookupError:
            continue
        listing += ["", f"## {nav_title(site, f'{wing}/index.md') or wing}", ""]
        for page in pages:
            article = read_article(site, page)
            blocks = collect(site, page, md).blocks
            found = list(snippets(site, page, base, blocks))
            every += found
            place = folder / address(page)
            place.mkdir(parents=True, exist_ok=True)
            text = markdown(site, article, base, blocks, found)
            (place / "index.md").write_text(text, encoding="utf-8")
            _take_along(site, article, base, blocks, found, place)
            dated.append((article, base + address(page)))
            link = f"[{article.title}]({base}{address(page)}index.md)"
            listing.append(f"- {link}: {article.description}")
    for name, feed in (("atom.xml", atom), ("rss.xml", rss)):
        (folder / name).write_text(feed(site, dated, base), encoding="utf-8")
    (folder / "llms.txt").write_text("\n".join([*listing, ""]), encoding="utf-8")
    whole = {"schema": SCHEMA, "site": mkdocs.get("site_name", ""), "url": base, "snippets": every}
    text = json.dumps(whole, ensure_ascii=False, indent=1)
    (folder / "snippets.json").write_text(text + "\n", encoding="utf-8")


class EditionsPlugin(BasePlugin):
    """`plugins: [mdproof-editions]`: writes the editions when the site is built."""

    def on_post_build(self, *, config: MkDocsConfig) -> None:
        """Write `llms.txt`, `snippets.json`, feeds, and each article to take along."""
        site = load_site(Path(config.config_file_path).parent)
        write(site, Path(config.site_dir), config.site_url or "/")
