"""The HTML around a block: chip, copy buttons, output, figures, links of its names."""

import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mdproof.block import Block
from mdproof.copy import Copy
from mdproof.kernels import benchmark_tables, compiled_table
from mdproof.names import Program

_PIECE = re.compile(r"<[^>]*>|[^<]+")
_CLASS = re.compile(r'\bclass="([^"]*)"')


def link_names(
    code: str,
    text: str,
    program: Program,
    links: Mapping[str, str],
    target: Callable[[str], str | None],
) -> str:
    """Link the tokens of highlighted code that stand for an object with a reference page.

    A token is found by its place, and only if the highlighter takes it for a name; where the
    highlighted text is not the text of the program, nothing is linked.

    Args:
        code: Highlighted HTML.
        text: The program that it shows.
        program: The references of the program.
        links: Dotted name of the object by the number of the reference.
        target: Link of a dotted name, or None.
    """
    begins = [0]
    for line in text.split("\n"):
        begins.append(begins[-1] + len(line) + 1)
    marks: dict[int, tuple[int, str, str]] = {}
    for number, dotted in links.items():
        if not number.isdecimal() or int(number) >= len(program.references):
            continue
        one = program.references[int(number)]
        href = target(dotted)
        if href is not None:
            marks[begins[one.line - 1] + one.column] = (len(one.text), href, dotted)
    pieces = _PIECE.findall(code)
    shown = "".join(piece for piece, _, inside in _within_code(pieces) if inside)
    skipped = len(text) - len(text.lstrip("\n"))  # the highlighter drops empty lines at both ends
    if not marks or html.unescape(shown).strip("\n") != text.strip("\n"):
        return code
    out: list[str] = []
    at = skipped
    for piece, is_name, inside in _within_code(pieces):
        if not inside:
            out.append(piece)
            continue
        plain = html.unescape(piece)
        out.append(_linked(plain, at, marks) if is_name else piece)
        at += len(plain)
    return "".join(out)


def _within_code(pieces: Sequence[str]) -> Iterator[tuple[str, bool, bool]]:
    """Yield each piece of highlighted HTML: whether it is a name, and text of the program."""
    classes: list[str] = []
    depth = 0
    for piece in pieces:
        if not piece.startswith("<"):
            name = (bool(classes) and classes[-1][:1] == "n") or classes[-1:] == ["fm"]
            numbered = any(each in ("linenos", "normal", "special") for each in classes)
            yield piece, name, depth > 0 and not numbered
            continue
        tag = piece.strip("</>").split(None, 1)[0].lower()
        if tag == "code":
            depth += -1 if piece.startswith("</") else 1
        elif tag == "span":
            if piece.startswith("</"):
                del classes[-1:]
            else:
                found = _CLASS.search(piece)
                classes.append(found[1] if found else "")
        yield piece, False, False


def _linked(plain: str, at: int, marks: Mapping[int, tuple[int, str, str]]) -> str:
    """Return a text as HTML, with links where a mark lies wholly inside."""
    out, done = [], 0
    for start in range(len(plain)):
        length, href, dotted = marks.get(at + start, (0, "", ""))
        if length and start >= done and start + length <= len(plain):
            token = html.escape(plain[start : start + length], quote=False)
            link = f'<a class="mdproof-ref" href="{html.escape(href)}" title="{dotted}">{token}</a>'
            out += [html.escape(plain[done:start], quote=False), link]
            done = start + length
    return "".join([*out, html.escape(plain[done:], quote=False)])


def how_verified(
    record: Mapping[str, Any],
    words: Mapping[str, str],
    shown: Sequence[str],
    old: Mapping[str, str] | None = None,
) -> str:
    """Return how a block was verified, in words: "CPU · torch 2.13.0 · 2026-11-21 · 0.3 s".

    A device in `old` is not among it: what ran there was another kernel.
    """
    parts: list[str] = []
    compiled: list[str] = []
    for way in record["verified"]:
        if way["how"] == "compiled":
            compiled.append(way["target"])
        elif way["how"] == "device":
            if not (old or {}).get(way.get("device")) and "key" in way:
                parts.append(words["device"].format(way["device"], way["date"]))
        else:
            parts.append(words[way["how"]])
    if compiled:
        targets = "sm_" + "/".join(target.removeprefix("sm_") for target in compiled)
        parts.insert(
            1 + ("interpreter" in {w["how"] for w in record["verified"]}),
            words["compiled"].format(targets),
        )
    parts += [
        f"{name} {record['libraries'][name]}" for name in shown if name in record["libraries"]
    ]
    parts += [record["date"], words["seconds"].format(record["seconds"])]
    return " · ".join(parts)


def _attribute(text: str) -> str:
    """Return a text as an attribute's value on one line, whatever a builder does to lines."""
    return html.escape(text, quote=True).replace("\n", "&#10;")


_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|.)")
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def screen(text: str) -> str:
    """Return an output as a terminal leaves it: no colours, and what a progress bar wrote last."""
    lines = _ESCAPE.sub("", text).replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines).translate(_CONTROL)


def _label(kind: str, label: str, text: str) -> str:
    return (
        f'<div class="mdproof-output{kind}" data-search-exclude>'
        f'<span class="mdproof-label">{html.escape(label)}</span>'
        f'<pre tabindex="0"><code>{html.escape(screen(text).rstrip())}</code></pre></div>'
    )


def _buttons(copy: Copy | None, bare: str, words: Mapping[str, str]) -> str:
    def button(text: str, label: str, kind: str) -> str:
        attribute = _attribute(text)
        title = html.escape(words[f"{label}_hint"], quote=True)
        return (
            f'<button type="button" class="mdproof-copy{kind}" title="{title}" '
            f'data-mdproof-copy="{attribute}">{words[label]}</button>'
        )

    runnable = button(copy.text, "copy", "") if copy is not None else ""
    only = button(bare, "bare", " mdproof-copy--bare")
    return f'<span class="mdproof-actions">{runnable}{only}</span>'


def _outputs(
    block: Block,
    record: Mapping[str, Any],
    words: Mapping[str, str],
    figure: Callable[[str], str],
    caption: str,
) -> str:
    parts: list[str] = []
    text = "".join(
        out["text"] if out["text"].endswith("\n") else out["text"] + "\n"
        for out in record["outputs"]
        if out["type"] in ("stdout", "value")
    )
    if text.strip():
        label = words["output"]
        if block.options.varies:
            label += f"（{words['varies']}{block.options.varies}）"
        parts.append(_label("", label, text))
    for out in record["outputs"]:
        if out["type"] == "error":
            parts.append(_label(" mdproof-error", words["raises"], out["text"]))
        elif out["type"] == "figure":
            size = f'width="{out["width"]}" height="{out["height"]}"'
            alt = html.escape(block.options.alt, quote=True)
            images = "".join(
                _still(source, bool(out.get("frames")))
                + f'<img class="mdproof-{theme}" src="{source}" '
                f'alt="{alt}" {size} loading="lazy" decoding="async">'
                + ("</picture>" if out.get("frames") else "")
                for theme in ("light", "dark")
                for source in [html.escape(figure(f"{out['name']}.{theme}.svg"))]
            )
            below = f"<figcaption>{caption}</figcaption>" if caption else ""
            kind = "mdproof-figure"
            if out.get("frames"):  # the script plays it when it is seen, and again on demand
                again = html.escape(words["replay"])
                images += f'<button type="button" class="mdproof-replay" hidden>{again}</button>'
                kind += " mdproof-film"
            parts.append(f'<figure class="{kind}">{images}{below}</figure>')
    return "".join(parts)


def _still(source: str, film: bool) -> str:
    """Return what stands before the image of a film: its last frame, for less motion."""
    if not film:
        return ""
    less = "(prefers-reduced-motion: reduce)"
    return f'<picture><source media="{less}" srcset="{source}#still">'


def _outdated(record: Mapping[str, Any], words: Mapping[str, str], old: Mapping[str, str]) -> str:
    """Return the devices on which another kernel ran, greyed."""
    hint = html.escape(words["outdated_hint"], quote=True)
    return "".join(
        f'<span class="mdproof-how mdproof-outdated" title="{hint}">'
        f"{html.escape(words['outdated'].format(way['device'], way['date']))}</span>"
        for way in record["verified"]
        if way["how"] == "device" and "device" in way and old.get(way["device"])
    )


def render_block(
    block: Block,
    code: str,
    *,
    record: Mapping[str, Any] | None,
    reason: str,
    copy: Copy | None,
    words: Mapping[str, str],
    shown_libraries: Sequence[str],
    figure: Callable[[str], str],
    caption: str = "",
    document: str = "",
    outdated: Mapping[str, str] | None = None,
    remeasure: Mapping[str, str] | None = None,
) -> str:
    """Return the whole HTML of a block.

    Args:
        block: The block.
        code: Its highlighted code, links included.
        record: Its record in the proof, or None.
        reason: Why the record does not hold; "" if it does.
        copy: Its runnable copy, or None.
        words: The words of the page's language.
        shown_libraries: Libraries whose versions the chip names.
        figure: Link of a recorded figure's file.
        caption: HTML below the figures.
        document: HTML between the code and the bar, of a source fence.
        outdated: By device, why what was seen there no longer holds.
        remeasure: By device, why what was measured there no longer holds besides.
    """
    bare = block.shown or block.code
    outputs = how = grey = ""
    old = outdated or {}
    if block.options.norun:
        state, hint = "excused", block.options.norun
        how = hint
    elif record is None or reason:
        state, copy = "stale", None
        hint = words["stale_hint"]
    else:
        state, hint = "verified", words["verified_hint"]
        how = how_verified(record, words, shown_libraries, old)
        outputs = _outputs(block, record, words, figure, caption) + compiled_table(record, words)
        outputs += benchmark_tables(
            record, words, {**old, **{k: v for k, v in (remeasure or {}).items() if v}}
        )
        grey = _outdated(record, words, old)
    key = f' data-mdproof-key="{record["key"]}"' if record is not None and not reason else ""
    return (
        f'<div class="mdproof" id="block-{block.index}" data-mdproof-block="{block.index}" '
        f'data-mdproof-state="{state}"{key}>{code}{document}'
        f'<div class="mdproof-bar" data-search-exclude>'
        f'<span class="mdproof-chip" title="{_attribute(hint)}">{words[state]}</span>'
        f'<span class="mdproof-how">{html.escape(how)}</span>{grey}'
        f"{_buttons(copy, bare, words)}</div>"
        f"{outputs}</div>"
    )
