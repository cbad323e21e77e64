r"""Fences rendered, fences collected: the comparison on the Markdown of public documentation sites.

Run by hand; nothing of those sites is in this repository. Each argument is a checkout's folder,
with the folder of its pages and, if it has one, its configuration (MkDocs' YAML) after colons:

    python tests/mdproof/bench_collect.py ~/httpx:docs:mkdocs.yml ~/textual:docs:mkdocs-common.yml

For every page, two independent routes. (a) Python-Markdown with the site's own extensions, without
mdproof, writes HTML; `html.parser` counts in it the listings whose class says Python and keeps
their text. (b) mdproof collects the page, in its `lenient` mode. The two must have the same number
of listings with the same text (in any order: footnotes are rendered last), and mdproof's line must
be the one in which the fence opens; for text that an include brought, the line of the include.
Each difference is printed; the exit status is their number.

Collected are the blocks and what is "only shown": a shell's session, and Python spelt in a way that
the engine does not run (`Python`). Of those only the number is compared. Where a fence's body is an
include, its line is checked to be a fence's and its text against the HTML. A runner's options in a
fence's first line (markdown-exec) are allowed on both sides. An extension that is not installed, or
fails alone, is left out, and said.

With `--peers PYTHON`, an interpreter that has sybil, pytest-examples and pytest-markdown-docs, the
same pages are also given to those three.
"""

import argparse
import html.parser
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from markdown import Markdown

from mdproof.collect import collect, make_pipeline, read_page, split_front_matter
from mdproof.config import markdown_extensions
from mdproof.errors import PageError
from mdproof.site import _building, load_site

MATERIAL = [
    "admonition", "attr_list", "def_list", "footnotes", "md_in_html", "tables",
    "pymdownx.details", "pymdownx.highlight", "pymdownx.superfences",
    {"pymdownx.tabbed": {"alternate_style": True}},
]  # fmt: skip
"""For a site whose configuration is not MkDocs' YAML."""

PEERS = r"""
import json, sys
from pathlib import Path
out = {}
pages = json.load(sys.stdin)
def count(name, what):
    total = failed = 0
    for page in pages:
        try:
            total += what(page)
        except Exception:
            failed += 1
    out[name] = [total, failed]
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.document import Document
count("sybil", lambda p: len(list(Document.parse(p, PythonCodeBlockParser()))))
from pytest_examples import find_examples
count("pytest-examples", lambda p: len(list(find_examples(p))))
from pytest_markdown_docs.plugin import extract_fence_tests
from markdown_it import MarkdownIt
def docs(p):
    parser = MarkdownIt(config="commonmark")
    return len(list(extract_fence_tests(parser, Path(p).read_text(encoding="utf-8"), 0, "py")))
count("pytest-markdown-docs", docs)
print(json.dumps(out))
"""


class _Loader(yaml.SafeLoader):
    """YAML in which what cannot be imported is left out."""


def _name(loader: Any, suffix: str, node: Any) -> Any:
    try:
        module, _, name = suffix.rpartition(".")
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", _name)
_Loader.add_multi_constructor("", lambda loader, suffix, node: None)


class Listings(html.parser.HTMLParser):
    """The text of every `<code>` in a `<pre>` below an element whose class says Python."""

    NAMES = re.compile(r"(?:^|\s)language-(?:python3?|py|pycon|console)(?:\s|$)", re.IGNORECASE)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[tuple[str, str]] = []
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kind = dict(attrs).get("class") or ""
        if tag == "code" and self._inside("pre") and self._python():
            self.found.append("")
        if tag not in ("br", "img", "hr", "input", "link", "meta", "source", "path", "wbr"):
            self.stack.append((tag, kind))

    def handle_endtag(self, tag: str) -> None:
        if any(name == tag for name, _ in self.stack):
            while self.stack.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        number = any("linenos" in kind for _, kind in self.stack)
        if self._inside("pre") and self._inside("code") and self._python() and not number:
            self.found[-1] += data

    def _inside(self, tag: str) -> bool:
        return any(name == tag for name, _ in self.stack)

    def _python(self) -> bool:
        return any(self.NAMES.search(kind) for _, kind in self.stack)


def settings(root: Path, config: str) -> tuple[list[Any], list[str]]:
    """Return the site's list of extensions, and what of it is left out here."""
    names, options, left = MATERIAL, {}, []
    if config:
        read = yaml.load((root / config).read_text(encoding="utf-8"), _Loader)
        names, options = markdown_extensions(read)
    else:
        names, options = markdown_extensions({"markdown_extensions": MATERIAL})
        left = ["(no MkDocs configuration: a Material-like list)"]
    if "pymdownx.superfences" not in names and "pymdownx.extra" not in names:
        names += ["pymdownx.superfences"]
        left += ["(fenced_code and codehilite replaced by superfences and highlight)"]
        names = [name for name in names if name != "codehilite"]
    # First, because superfences takes the settings of the first; the class of a listing is one.
    names = ["pymdownx.highlight", *(name for name in names if name != "pymdownx.highlight")]
    options.setdefault("pymdownx.highlight", {})["pygments_lang_class"] = True
    kept: list[Any] = []
    for name in ("pymdownx.snippets", "mdx_include"):
        options.setdefault(name, {}).setdefault(
            "base_path", "." if name == "mdx_include" else ["."]
        )
    os.chdir(root)
    for name in names:
        given = _usable(options.get(name) or {}, root)
        try:
            Markdown(extensions=[name], extension_configs={name: given}).convert("[a](b.md)")
        except Exception as error:
            left.append(f"{name} ({type(error).__name__})")
            continue
        kept.append({name: given})
    return kept, left


def _usable(value: Any, root: Path) -> Any:
    if isinstance(value, dict):
        paths = {
            "base_path": lambda v: (
                str(root / v) if isinstance(v, str) else [str(root / x) for x in v]
            )
        }
        found = {k: paths.get(k, lambda v: _usable(v, root))(v) for k, v in value.items()}
        return {k: v for k, v in found.items() if v is not None}
    if isinstance(value, list):
        done = [_usable(item, root) for item in value]
        return [x for x in done if not (isinstance(x, dict) and "name" in x and "format" not in x)]
    return value


def compare(root: Path, docs: str, config: str, peers: str) -> dict[str, Any]:
    """Return the figures of one site, and print its differences."""
    extensions, left = settings(root, config)
    names = [name for entry in extensions for name in entry]
    configs = {name: given for entry in extensions for name, given in entry.items()}
    plain = Markdown(extensions=names, extension_configs=configs)
    allow_options(plain)
    with tempfile.TemporaryDirectory() as folder:
        site_root = Path(folder)
        listed = [*extensions, "mdproof.markdown"]
        text = yaml.dump({"site_name": "x", "docs_dir": str(root / docs)})
        (site_root / "mkdocs.yml").write_text(text, encoding="utf-8")
        (site_root / "pyproject.toml").write_text("[tool.mdproof]\nlenient = true\n")
        _building.set(site_root / "mkdocs.yml")  # includes are relative to the checkout
        site = load_site()
        site.settings["mkdocs"]["markdown_extensions"] = listed  # type: ignore[index]
        object.__setattr__(site, "root", root)
        md = make_pipeline(site)
        figures: dict[str, Any] = {
            "site": root.name, "pages": 0, "rendered": 0, "collected": 0, "only shown": 0,
            "refused": [], "differences": [], "left": left,
        }  # fmt: skip
        files = []
        for page in site.pages():
            body, _ = split_front_matter(read_page(site, page))
            plain.reset()
            try:
                shown = Listings(plain.convert(body)).found
            except Exception as error:
                figures["refused"].append(f"{page}: not rendered: {error!r:.120}")
                continue
            figures["pages"] += 1
            figures["rendered"] += len(shown)
            files.append(str(site.docs / page))
            try:
                got = collect(site, page, md)
            except PageError as error:
                figures["refused"].append(f"{error} [{len(shown)} rendered]")
                continue
            shells = _only_shown(got)
            figures["collected"] += len(got.blocks) + shells
            figures["only shown"] += shells
            _compare_page(figures["differences"], site, page, shown, got)
        figures["peers"] = _peers(peers, files) if peers else {}
    return figures


def _only_shown(got: Any) -> int:
    """Count the listings that are collected as such: shells, and Python in another spelling."""
    return sum(
        Listings.NAMES.search(f"language-{language}") is not None for language, _ in got.listings
    )


def allow_options(plain: Markdown) -> None:
    """Stand in for the runners of other sites (markdown-exec): their options make no text of it."""
    fences: Any = plain.preprocessors["fenced_code_block"].extension  # type: ignore[attr-defined]
    formatter = fences.superfences[0]["formatter"]

    def validate(language: str, inputs: Any, options: Any, attrs: Any, md: Any) -> bool:
        md.preprocessors["fenced_code_block"].get_hl_settings()
        options |= {k: v for k, v in inputs.items() if k in ("title", "hl_lines", "linenums")}
        return True

    for language in ("python", "py", "python3", "pycon", "console"):
        fences.extend_super_fences(language, formatter, validate, None)


def _compare_page(differences: list[str], site: Any, page: str, shown: list[str], got: Any) -> None:
    raw = read_page(site, page).split("\n")
    shells = _only_shown(got)
    if len(shown) != len(got.blocks) + shells:
        more = f"{len(shown)} rendered, {len(got.blocks)} + {shells} only shown"
        differences.append(f"{page}: {more}")
    theirs = sorted(_normal(text) for text in shown)
    for block in got.blocks:
        code = _normal(block.code)
        if code in theirs:
            theirs.remove(code)
        else:
            differences.append(f"{page}:{block.line}: text {code[:80]!r} is not rendered")
        opening = raw[block.line - 1]
        fence = re.search(r"`{3,}|~{3,}", opening)
        following = "\n".join(line.strip(" \t>") for line in raw[block.line :])
        first = "\n".join(line.strip(" \t>") for line in block.code.split("\n"))
        if fence and (
            first.strip("\n") == following.lstrip("\n")[: len(first.strip("\n"))]
            or re.search(r"8<|\{[*!]", following[:400])
        ):
            continue
        if not fence and re.search(r"8<|\{[*!]", opening):
            continue
        differences.append(f"{page}:{block.line}: {opening!r} does not open {code[:60]!r}")


def _normal(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").split("\n")).strip("\n")


def _peers(python: str, files: list[str]) -> dict[str, list[int]]:
    done = subprocess.run(
        [python, "-c", PEERS], input=json.dumps(files), capture_output=True, text=True, check=False
    )
    return json.loads(done.stdout) if done.returncode == 0 else {done.stderr[-300:]: [0, 0]}


def main() -> int:
    """Compare, print the table, and return the number of differences."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sites", nargs="+", help="CHECKOUT[:DOCS[:CONFIG]]")
    parser.add_argument("--peers", default="", help="an interpreter that has the peers")
    given = parser.parse_args()
    wrong = 0
    for entry in given.sites:
        folder, docs, config = (entry.split(":") + ["docs", ""][entry.count(":") :])[:3]
        figures = compare(Path(folder).resolve(), docs, config, given.peers)
        wrong += len(figures["differences"])
        print(json.dumps(figures, ensure_ascii=False, indent=1), flush=True)
    return min(wrong, 100)


if __name__ == "__main__":
    sys.exit(main())
