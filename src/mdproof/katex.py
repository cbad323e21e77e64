"""Set a formula with KaTeX, in an embedded V8: no Node, no browser, one context a process.

KaTeX's output is kept twice: in the process and under `.cache/` of the site, which may be deleted
at any time. A cold formula costs some milliseconds, a kept one some microseconds.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import html
import json
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

SCRIPT = Path(__file__).parent / "vendor" / "katex" / "katex.min.js"

_SHAPE = "4"  # of what `_tidy` makes of KaTeX's output; enters the key
_GLUE = """
function mdproofRender(tex, display, macros) {
  let broken = false;
  const strict = code => {
    broken = broken || code === "newLineInDisplayMode";  // LaTeX ignores such a line break
    return code === "unicodeTextInMathMode" ? "ignore" : "error";
  };
  try {
    const html = katex.renderToString(tex, {
      displayMode: display, output: "htmlAndMathml", throwOnError: true, trust: false,
      macros: Object.assign({}, macros), strict});
    return broken ? {error: "a line break needs aligned, cases or the like around it"} : {html};
  } catch (error) {
    if (!(error instanceof katex.ParseError)) throw error;
    return {error: error.rawMessage || error.message, position: error.position};
  }
}
"""


class TexError(ValueError):
    """KaTeX refuses a formula; `position` is the place in the formula, where KaTeX knows it."""

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message)
        self.message, self.position = message, position


@functools.cache
def version() -> str:
    """Return what identifies the vendored script, without starting it."""
    return hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:16]


class _Engine:
    """The one V8 context of this process.

    It is closed while threads still run: left to the end of the interpreter, mini_racer waits for
    a thread that is gone. A forked child has none of V8's threads; it leaves the context it
    inherited alone for good and starts its own.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.context: Any = None
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self.abandon)

    def call(self, tex: str, display: bool, macros: Mapping[str, str]) -> dict[str, Any]:
        with self.lock:
            if self.context is None:
                from py_mini_racer import MiniRacer  # late: it loads V8

                self.context = MiniRacer()
                self.context.eval(SCRIPT.read_text(encoding="utf-8"))
                self.context.eval(_GLUE)
            return self.context.call("mdproofRender", tex, display, dict(macros))

    def close(self) -> None:
        with self.lock:
            if self.context is not None:
                self.context.close()
                self.context = None

    def abandon(self) -> None:
        self.lock = threading.Lock()
        if self.context is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.context))  # never collected
            self.context = None


_engine = _Engine()
_kept: dict[str, str] = {}


def render(
    tex: str,
    *,
    display: bool = False,
    macros: Mapping[str, str] | None = None,
    cache: Path | None = None,
) -> str:
    """Return a formula as HTML with MathML for screen readers beside it.

    Args:
        tex: The formula, without dollars.
        display: Set it large, on a line of its own.
        macros: Names with a backslash, and what they stand for.
        cache: A folder to keep results in between processes, or None.

    Raises:
        TexError: With KaTeX's message.
    """
    macros = macros or {}
    key = hashlib.sha256(
        json.dumps([tex, display, sorted(macros.items()), version(), _SHAPE]).encode()
    ).hexdigest()[:32]
    if key in _kept:
        return _kept[key]
    file = cache / key[:2] / f"{key}.html" if cache else None
    if file is not None:
        with contextlib.suppress(OSError):
            _kept[key] = file.read_text(encoding="utf-8")
            return _kept[key]
    answer = _engine.call(tex, display, macros)
    if "html" not in answer:
        message = answer["error"].removeprefix("KaTeX parse error: ")
        message = message.split("strict mode is set to 'error': ")[-1]
        raise TexError(" ".join(message.split()), answer.get("position"))
    result = _tidy(answer["html"])
    _kept[key] = result
    if file is not None:
        _write(file, result)
    return result


def _write(file: Path, text: str) -> None:
    """Write a file whole or not at all; a cache that cannot be written is no error."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(name, file)


_ANNOTATION = re.compile(
    r"<annotation\b.*?</annotation>|</?semantics>|(?<=<math) xmlns=\"[^\"]*\"", re.DOTALL
)
_MATH = re.compile(r"<math\b.*?</math>", re.DOTALL)


def _tidy(text: str) -> str:
    """Leave out the copy of the source, and keep search engines to one of the two renderings."""
    return _ANNOTATION.sub("", text).replace(
        '<span class="katex-html" aria-hidden="true">',
        '<span class="katex-html" aria-hidden="true" data-search-exclude data-pagefind-ignore>',
    )


_CLOSING = frozenset(")]}）］｝」』》〉】”’，。；：、！？,.;:!?%")
_BASE = '<span class="base">'
_END = "</span></span>"


def joined(rendered: str, after: str) -> str:
    """Keep the end of a formula in a line together with the punctuation after it.

    A browser may break a line behind a formula's box, so that a full stop begins the next. It
    does not where the parent of the box forbids breaks; before `；` and `：`, which Unicode
    counts with small kana, it needs a word joiner as well (seen in Chromium 156).

    Args:
        rendered: The formula, from `render`.
        after: The character after it.
    """
    start = rendered.rfind(_BASE)
    last = rendered[start : -len(_END)]
    if (
        not after
        or after not in _CLOSING
        or start < 0
        or last.count("<span") != last.count("</span")
    ):
        return rendered
    joiner = "\u2060" if after in "；：" else ""
    return f'{rendered[:start]}<span class="mdproof-joined">{last}{joiner}</span>{_END}'


def plain(tex: str, *, macros: Mapping[str, str] | None = None, cache: Path | None = None) -> str:
    r"""Return a formula as one line of text, for a table of contents or a search result.

    `\frac{\pi_\theta}{2}` becomes `π_θ/2`.
    """
    rendered = render(tex, macros=macros, cache=cache)
    found = _MATH.search(rendered)
    tree = ElementTree.fromstring(found.group().replace("&nbsp;", " ")) if found else None
    text = _flat(tree) if tree is not None else html.unescape(rendered)
    return " ".join(re.sub("[\u2061-\u2064]", "", text).split())


def _flat(node: ElementTree.Element) -> str:
    parts = [_flat(child) for child in node]
    match node.tag, parts:
        case "mfrac", [above, below]:
            return f"{_group(above)}/{_group(below)}"
        case "msub" | "munder", [base, below]:
            return f"{base}_{_group(below)}"
        case "mover", [base, above] if node.get("accent") == "true":
            return base + _ACCENTS.get(above, above)
        case "msup" | "mover", [base, above]:
            return base + above if above in _MARKS else f"{base}^{_group(above)}"
        case "msubsup" | "munderover", [base, below, above]:
            return f"{base}_{_group(below)}^{_group(above)}"
        case "msqrt", _:
            return f"√{_group(''.join(parts))}"
        case "mroot", [inside, degree]:
            return f"{_group(inside)}^(1/{degree})"
        case "mtr", _:
            return " ".join(parts) + "; "
        case (("mi" | "mn" | "mtext" | "ms"), _):
            return node.text or ""
        case "mo", _:
            sign = node.text or ""
            if sign == "\u2061":  # the space between a function and its argument
                return " "
            return f" {sign} " if sign in _SPACED else sign
        case _:
            return "".join(parts)


_SPACED = set("=<>≤≥≠≈∼≃∝∈∉⊂⊆→←↔⇒⇔↦≡≪≫+−±×≔")
_MARKS = {"′", "′′", "″", "‴", "∗", "*", "⊤"}
_ACCENTS = {
    "ˉ": "\u0304",
    "‾": "\u0305",
    "^": "\u0302",
    "~": "\u0303",
    "˙": "\u0307",
    "¨": "\u0308",
    "⃗": "\u20d7",
    "ˇ": "\u030c",
}


def _group(text: str) -> str:
    text = text.strip()
    if text.startswith("− "):
        text = "−" + text[2:]
    return text if len(text) <= 1 or text.isalnum() else f"({text})"
