"""An article to take along: as a script of its blocks, and as a notebook with recorded outputs."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from mdproof.article import Article
from mdproof.block import Block
from mdproof.equations import LABEL, REFERENCE, Registry, registry
from mdproof.proof import figure_folder
from mdproof.site import Site


def script(article: Article, blocks: Sequence[Block], url: str) -> str:
    """Return the blocks of an article as one program, in the order in which they were proven.

    What cannot stand in a program stays as a comment: blocks that are not run, that must raise, and
    sessions with prompts. Cells begin with `# %%`, which editors and Jupytext know.

    Args:
        article: The article.
        blocks: Its blocks.
        url: Its address.
    """
    parts = [f"# {article.title}\n# {url}\n"]
    for block in blocks:
        why = block.options.norun and f"not run: {block.options.norun}"
        why = why or (block.options.raises and f"raises {block.options.raises}")
        why = why or (block.kind == "doctest" and "a session")
        code = block.code.rstrip("\n")
        if why:
            lines = [f"# ({why})", *(f"# {line}".rstrip() for line in code.split("\n"))]
            code = "\n".join(lines)
        parts.append(f"# %% [{block.index}]\n{code}\n")
    return "\n".join(parts)


def notebook(
    site: Site,
    article: Article,
    blocks: Sequence[Block],
    found: Sequence[dict[str, Any]],
    spans: Sequence[tuple[int, int]],
    absolute: Callable[[str], str],
    url: str,
) -> str:
    """Return an article as a notebook (nbformat 4.5) that shows what its proof recorded.

    Args:
        site: The site.
        article: The article.
        blocks: Its blocks.
        found: Its blocks as `editions.snippets` gives them.
        spans: First and last line of each block's fence in the page's file, from 0.
        absolute: Gives links between pages their whole address.
        url: The article's address.
    """
    lines = ["\n"] * (article.body_line - 1) + article.body.split("\n")
    known = registry(site)
    cells: list[dict[str, Any]] = []

    def prose(start: int, end: int) -> None:
        text = "\n".join(lines[start:end]).strip()
        if text:
            cells.append(
                _cell("markdown", f"text-{len(cells)}", absolute(_readable(text, article, known)))
            )

    at = article.body_line - 1
    cells.append(_cell("markdown", "source", f"<{url}>"))
    for block, snippet, (first, last) in zip(blocks, found, spans, strict=True):
        prose(at, first)
        at = last + 1
        cell = _cell("code", f"block-{block.index}", block.code.rstrip("\n"))
        cell |= {"execution_count": None, "outputs": list(_outputs(site, article, snippet))}
        if block.options.norun or block.options.raises or block.kind == "doctest":
            cell["metadata"]["tags"] = ["raises-exception" if block.options.raises else "skip"]
        cells.append(cell)
    prose(at, len(lines))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


def _cell(kind: str, name: str, source: str) -> dict[str, Any]:
    return {
        "cell_type": kind,
        "id": name,
        "metadata": {},
        "source": source.splitlines(keepends=True),
    }


def _readable(text: str, article: Article, known: Registry) -> str:
    """Number equations and references, which a notebook cannot do across cells."""

    def tag(label: re.Match[str]) -> str:
        equation = known.find(label[1].strip(), article.page)
        return rf"\tag{{{equation.number}}}" if equation else ""

    def reference(name: re.Match[str]) -> str:
        equation = known.find(name[1], article.page)
        return known.text(equation, article.page) if equation else name[0]

    return REFERENCE.sub(reference, LABEL.sub(tag, text))


def _outputs(site: Site, article: Article, snippet: dict[str, Any]) -> Any:
    for out in snippet["outputs"]:
        if out["type"] == "figure":
            file = figure_folder(site, article.page) / f"{out['name']}.light.svg"
            data: dict[str, Any] = {"image/svg+xml": file.read_text(encoding="utf-8")}
            if snippet["alt"]:
                data["text/plain"] = snippet["alt"]
            yield {"output_type": "display_data", "data": data, "metadata": {}}
        elif out["type"] == "value":
            data = {"text/plain": out["text"]}
            yield {
                "output_type": "execute_result",
                "execution_count": None,
                "data": data,
                "metadata": {},
            }
        else:
            name = "stderr" if out["type"] == "error" else "stdout"
            yield {"output_type": "stream", "name": name, "text": out["text"]}
