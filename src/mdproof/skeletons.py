"""What a new article begins with, in the language of the site."""

_MODULE = '''\
r"""TODO: what this module is about, in one line."""


def {room}(x: float) -> float:
    r"""TODO: say in one imperative line what it returns.

    Args:
        x: TODO.
    """
    raise NotImplementedError("{source} is not written yet")
'''

_TEST = '''\
"""TODO: the sentence that these tests prove."""

from {module} import {room}


def test_{room}_is_written_and_has_an_independent_route() -> None:
    assert {room}(0.0) == 0.0  # TODO: the same number by another way
'''

_REFERENCE = """\
---
title: {module}
---

# `{module}`

::: {module}
"""

_CODE = """\
```python source="{source}"
```
"""

_BLOCK = """\
```python
from {module} import {room}

print({room}(0.0))
```
"""

_ALONE = """\
```python
print("TODO")
```
"""

_ZH = """\
{front}

# {title}

TODO：用一段话提出问题，说清读者读完会知道什么。

## 想法

TODO：一句话讲明白的直觉。

## 推导

TODO：一步不缺的推导；后文要用的式子编号。

## 实现

CODE
## 实验

TODO：每个实验都以读者看得见的检验结束。

BLOCK
## 局限与常见错误

TODO

## 来源

TODO：题名、年份、编号、用到的公式或小节。

## 下一步

TODO
"""

_EN = """\
{front}

# {title}

TODO: the question in a paragraph, and what the reader will know at the end.

## The idea

TODO

## Derivation

TODO: no missing step; number the equations that are used later.

## Implementation

CODE
## Experiments

TODO: each ends in a check that the reader can see.

BLOCK
## Limits and common mistakes

TODO

## Sources

TODO: title, year, identifier, equation or section.

## Next steps

TODO
"""


def _page(text: str, *, module: bool) -> str:
    code = _CODE if module else "TODO\n"
    return text.replace("CODE", code).replace("BLOCK", _BLOCK if module else _ALONE)


def _all(text: str, usage: str) -> dict[str, str]:
    return {
        "page": _page(text, module=True),
        "page_alone": _page(text, module=False),
        "module": _MODULE,
        "test": _TEST,
        "reference": _REFERENCE,
        "usage": usage,
    }


SKELETONS = {
    "zh": _all(_ZH, "\n## 出现在 {{#used-by}}\n\n[[usage: {module}]]\n"),
    "en": _all(_EN, "\n## Used by {{#used-by}}\n\n[[usage: {module}]]\n"),
}
"""The texts of each floor by language; fields in braces are filled in."""
