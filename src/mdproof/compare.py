"""Compare a new output with the recorded one as a person would: numbers by value, words exactly."""

import math
import re

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?(?![\w])(?!\.\d)")

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
    """Return one unit of the last printed digit: 0.01 for 3.14, 1e-7 for 1.5e-6."""
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals)


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


def first_difference(recorded: str, new: str, *, rtol: float) -> tuple[str, str] | None:
    """Return the first pair of lines that disagree, or None.

    White space at line ends and the width of runs of blanks (a column of numbers may grow by a
    sign) are not compared.
    """
    old_lines, new_lines = _lines(recorded), _lines(new)
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
