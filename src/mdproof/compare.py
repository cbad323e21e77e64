"""Compare a new output with the recorded one as a person would: numbers by value, words exactly."""

import math
import re
from difflib import unified_diff

# A unit may stick to a number with a point, as in 1.25ms; v1.2, 2.0rc1, 0x1f and sm_80 are words.
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:"
    r"(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?(?=(?:[^\W\d_]{0,4})(?!\w))"
    r"|\d+(?:[eE][-+]?\d+)?(?!\w)"
    r")(?!\.\d)"
)

# What stands between the brackets of an array of numbers: 1.5e-3, nan, inf, True, 2j and "...".
_IN_ARRAY = frozenset("0123456789+-.,[] \neEnaifTruFlsj")

_ELEMENT = r"""(?:'[^'\\]*'|"[^"\\]*"|[-+]?\d+)"""
_SET = re.compile(rf"\{{({_ELEMENT}(?:, {_ELEMENT})+)\}}")


def _ordered_sets(line: str) -> str:
    """Return a line with the elements of every printed set of strings and integers in one order.

    Strings hash anew in every interpreter, so `{'a', 'b'}` and `{'b', 'a'}` are one value. A
    dictionary keeps its order, and is left alone: a colon follows its keys.
    """

    def ordered(found: re.Match[str]) -> str:
        return "{" + ", ".join(sorted(re.findall(_ELEMENT, found[1]))) + "}"

    return _SET.sub(ordered, line)


def _unit(text: str) -> float:
    """Return one unit of the last printed decimal: 0.01 for 3.14, 1e-7 for 1.5e-6, 0 for 4.

    NumPy and torch print `4.` where nothing was rounded away.
    """
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals or exponent else 0.0


def _is_integer(text: str) -> bool:
    return text.lstrip("+-").isdigit()


def _plain(integer: str) -> str:
    sign = "-" if integer.startswith("-") else ""
    digits = integer.lstrip("+-0")
    return sign + digits if digits else "0"


def same_number(recorded: str, new: str, *, rtol: float) -> bool:
    """Tell whether two printed numbers agree.

    Integers agree if they are equal. Others agree within `rtol` or one unit of the last digit that
    the recorded one shows, whichever is larger; an integer shows no such digit.
    """
    if _is_integer(recorded) and _is_integer(new):
        return _plain(recorded) == _plain(new)
    a, b = float(recorded), float(new)
    if math.isinf(a) or math.isinf(b):  # 1e999; the word inf is compared as a word
        return a == b
    unit = 0.0 if _is_integer(recorded) else 1.001 * _unit(recorded)
    return abs(a - b) <= max(rtol * max(abs(a), abs(b)), unit)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _unwrapped(text: str) -> str:
    """Return a text with every array of numbers, however its rows are broken, on one line."""
    parts: list[str] = []
    at = 0
    while (start := text.find("[", at)) >= 0:
        parts.append(text[at:start])
        at = end = start
        depth = 0
        while end < len(text) and text[end] in _IN_ARRAY:
            depth += (text[end] == "[") - (text[end] == "]")
            end += 1
            if depth == 0:
                at = end
                break
        at = max(at, start + 1)
        inside = text[start:at]
        parts.append(" ".join(inside.split()) if "\n" in inside else inside)
    return "".join([*parts, text[at:]])


def first_difference(recorded: str, new: str, *, rtol: float) -> tuple[str, str] | None:
    """Return the first pair of lines that disagree, or None.

    White space at line ends, the width of runs of blanks (a column of numbers may grow by a sign)
    and where the rows of an array of numbers are broken are not compared.
    """
    difference = _first_difference(_lines(recorded), _lines(new), rtol=rtol)
    if difference is None:
        return None
    old_lines, new_lines = _lines(_unwrapped(recorded)), _lines(_unwrapped(new))
    if _first_difference(old_lines, new_lines, rtol=rtol) is None:
        return None
    return difference


def _first_difference(
    old_lines: list[str], new_lines: list[str], *, rtol: float
) -> tuple[str, str] | None:
    for old, now in zip(old_lines, new_lines, strict=False):
        if not _same_line(old, now, rtol=rtol):
            return old, now
    if len(old_lines) != len(new_lines):
        longer = old_lines if len(old_lines) > len(new_lines) else new_lines
        extra = longer[min(len(old_lines), len(new_lines))]
        return (extra, "(no such line)") if longer is old_lines else ("(no such line)", extra)
    return None


def _same_line(old: str, new: str, *, rtol: float) -> bool:
    if old == new:
        return True
    old, new = _ordered_sets(old), _ordered_sets(new)
    words_old = [" ".join(part.split()) for part in _NUMBER.split(old)]
    words_new = [" ".join(part.split()) for part in _NUMBER.split(new)]
    if words_old != words_new:
        return False
    pairs = zip(_NUMBER.findall(old), _NUMBER.findall(new), strict=True)
    return all(same_number(a, b, rtol=rtol) for a, b in pairs)


def text_diff(recorded: str, new: str) -> str:
    """Return a unified diff of two outputs without its header, "" if they are the same."""
    pair = (_lines(recorded), _lines(new))
    return "\n".join(list(unified_diff(*pair, n=1, lineterm=""))[2:])


_ADDRESS = re.compile(r"<[^<>\n]* at 0x[0-9a-fA-F]{6,}[^<>\n]*>")


def address_in(text: str) -> str:
    """Return the first object that an output shows by its address, which no two runs share."""
    found = _ADDRESS.search(text)
    return found[0] if found else ""


_IMAGE = re.compile(r'"data:image/png;base64,[^"]*"')
_SVG_ID = re.compile(r'(?:id|xlink:href|href|clip-path)="[^"]*"')
_GLYPH = re.compile(r'href="#([\w.-]+-[0-9a-f]+)"')
_PLAIN = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def same_figure(recorded: str, new: str, *, points: float = 0.75) -> bool:
    """Tell whether two SVG drawings agree: the same elements, coordinates within `points`.

    Embedded images are compared by the caller, who can decode them; here they only must be there.
    """
    if _GLYPH.findall(recorded) != _GLYPH.findall(new):  # the characters of its texts
        return False
    old, now = (_SVG_ID.sub("", _IMAGE.sub("IMAGE", text)) for text in (recorded, new))
    if _PLAIN.sub("#", old) != _PLAIN.sub("#", now):
        return False
    pairs = zip(_PLAIN.findall(old), _PLAIN.findall(now), strict=True)
    return all(abs(float(a) - float(b)) <= max(points, 0.01 * abs(float(a))) for a, b in pairs)


def images(svg: str) -> list[str]:
    """Return the base64 text of every PNG in a drawing."""
    return [found[len('"data:image/png;base64,') : -1] for found in _IMAGE.findall(svg)]
