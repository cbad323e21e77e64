"""A Python-Markdown extension: a line break inside Chinese text is not a space.

A paragraph is wrapped in the source, and HTML shows each line break as a space. Between Chinese
characters, and beside full-width punctuation, there must be none.
"""

import re
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor

_HAN = r"\u2e80-\u2fdf\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_MARKS = r"\u3000-\u303f\uff01-\uff60\u201c\u201d\u2014\u2026"
_JOIN = re.compile(
    rf"(?<=[{_HAN}{_MARKS}]) *\n *(?=[{_HAN}{_MARKS}])|(?<=[{_MARKS}]) *\n *| *\n *(?=[{_MARKS}])"
)
_KEEP = {"pre", "code", "script", "style", "textarea"}


class _Joiner(Treeprocessor):
    def run(self, root: Element) -> None:
        self._join(root)

    def _join(self, element: Element) -> None:
        """Join the lines of an element; a break may stand between two of its parts."""
        if element.tag in _KEEP:
            return
        before = ""
        element.text = self._text(element.text, before, self._first(list(element)))
        before = (element.text or "")[-1:]
        children = list(element)
        for position, child in enumerate(children):
            self._join(child)
            inside = "".join(child.itertext()) if child.tag not in _KEEP else "x"
            before = inside[-1:] or before
            child.tail = self._text(child.tail, before, self._first(children[position + 1 :]))
            before = (child.tail or "")[-1:] or before

    @staticmethod
    def _first(elements: list[Element]) -> str:
        for element in elements:
            if element.tag in _KEEP:
                return "x"
            text = "".join(element.itertext())
            if text:
                return text[0]
        return ""

    @staticmethod
    def _text(text: str | None, before: str, after: str) -> str | None:
        if not text or "\n" not in text:
            return text
        before, after = before.strip(), after.strip()
        joined = _JOIN.sub("", before + text + after)
        return joined[len(before) : len(joined) - len(after)]


class ChineseExtension(Extension):
    """The extension `mdproof.chinese`."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Run when inline patterns are done (20)."""
        md.treeprocessors.register(_Joiner(md), "mdproof_chinese", 4)


def makeExtension(**options: Any) -> ChineseExtension:  # noqa: N802
    """Return the extension; Python-Markdown calls this by name."""
    return ChineseExtension(**options)
