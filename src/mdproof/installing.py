"""`mdproof init`: bring the style and the script into a site, and say what `mkdocs.yml` lacks."""

from pathlib import Path
from typing import Any

from mdproof.config import markdown_extensions
from mdproof.proof import write_bytes
from mdproof.site import Site

ASSETS = {"extra_css": "mdproof.css", "extra_javascript": "mdproof.js"}
"""The files that a page needs in the browser, by the setting that names them."""

EXTENSIONS = ("pymdownx.highlight", "pymdownx.superfences", "mdproof.markdown")
"""The extensions that show proofs, in their order."""


class AssetsError(Exception):
    """The style or the script cannot be found or written; `str()` is one line."""


def asset(name: str) -> Path:
    """Return the style or the script: a part of the installed engine, or of its sources.

    Raises:
        AssetsError: If it is in neither place.
    """
    here = Path(__file__).parent
    for folder in (here / "assets", here.parents[1] / "docs" / "assets"):
        if (folder / name).is_file():
            return folder / name
    raise AssetsError(f"{name} is not part of this installation")


def init(site: Site) -> int:
    """Write the files that are missing or old, and print the lines that `mkdocs.yml` lacks."""
    docs = site.docs.relative_to(site.root).as_posix()
    for name in ASSETS.values():
        data = asset(name).read_bytes()
        file = site.docs / "assets" / name
        if not file.is_file() or file.read_bytes() != data:
            try:
                write_bytes(file, data)
            except OSError as error:
                raise AssetsError(f"{docs}/assets/{name} cannot be written: {error}") from None
            print(f"{docs}/assets/{name}: written")
    lacking = missing(site.settings["mkdocs"])
    if lacking:
        print("mkdocs.yml lacks these lines:")
        for key, values in lacking.items():
            print("\n".join([f"{key}:", *(f"  - {value}" for value in values)]))
        return 1
    print("mkdocs.yml has what pages need")
    return 0


def missing(mkdocs: dict[str, Any]) -> dict[str, list[str]]:
    """Return which values the lists of `mkdocs.yml` lack."""
    names, _ = markdown_extensions(mkdocs)
    found: dict[str, list[str]] = {}
    extensions = [name for name in EXTENSIONS if name not in names]
    if extensions:
        found["markdown_extensions"] = extensions
    for key, name in ASSETS.items():
        given = [str(value) for value in mkdocs.get(key) or []]
        if not any(value.endswith(name) for value in given):
            found[key] = [f"assets/{name}"]
    return found
