"""mdproof: what a Markdown page shows is what ran.

Public are the command line, the pytest options `--stale` and `--update`, the Markdown extensions
`mdproof.markdown`, `mdproof.directives`, `mdproof.maths` and `mdproof.chinese`, the options of a
fence, the settings of `[tool.mdproof]`, the proofs under `docs/proofs`, the reports, and four names
for programs:

    load_site      the site of a folder: its pages, its settings
    collect_page   the blocks and the listings of a page
    payloads       the texts that the copy buttons of a page give
    PageError      what is wrong on a page, with file and line

Every other module may change from one version to the next.
"""

from typing import Any

__all__ = ["PageError", "collect_page", "load_site", "payloads"]

_HOMES = {
    "PageError": ("errors", "PageError"),
    "collect_page": ("collect", "collect"),
    "load_site": ("site", "load_site"),
    "payloads": ("copy", "payloads"),
}


def __getattr__(name: str) -> Any:
    # Late: a worker that runs blocks imports this package, and needs none of it.
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"mdproof.{module}"), attribute)
