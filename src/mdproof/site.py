"""Where things are: root, pages, proofs and sources, read from two files.

`mkdocs.yml` says where the pages are and how they are rendered; `[tool.mdproof]` in
`pyproject.toml` says what the engine needs beyond that. Nothing here imports a builder.
"""

import functools
import posixpath
import re
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown import Markdown

from mdproof.errors import PageError


@dataclass(frozen=True)
class Site:
    """One site: its folders and the settings of `[tool.mdproof]`.

    Attributes:
        root: The folder of `mkdocs.yml`, or of the file that stands for it.
        docs: The folder of the pages.
        source: Roots of the repository's own Python sources.
        packages: Names of the repository's own packages; what they import is part of a proof.
        lock: The lock file whose versions enter a proof's key, or None.
        preload: Libraries imported once, before a process is forked for each page.
        articles: Folders of `docs` whose pages must have the `front_matter` fields.
        front_matter: The required fields.
        language: Language of the words that the engine prints on a page.
    """

    root: Path
    docs: Path
    source: tuple[Path, ...] = ()
    packages: tuple[str, ...] = ()
    lock: Path | None = None
    preload: tuple[str, ...] = ()
    articles: tuple[str, ...] = ()
    front_matter: tuple[str, ...] = ()
    language: str = "en"
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def allowed_warnings(self) -> tuple[tuple[str, str], ...]:
        """Beginnings of the deprecations inside of libraries that fail no page, each with why."""
        entries = self.settings.get("allow_warnings", ())
        return tuple((entry["warning"], entry["reason"]) for entry in entries)

    @property
    def proofs(self) -> Path:
        """The folder of recorded results."""
        return self.docs / "proofs"

    @property
    def lenient(self) -> bool:
        """Whether pages keep the habits of their site: see `lenient` in CONTRIBUTING.md."""
        return bool(self.settings.get("lenient", False))

    def pages(self) -> list[str]:
        """Return every page, as paths below `docs`, sorted."""
        return sorted(
            path.relative_to(self.docs).as_posix()
            for path in self.docs.rglob("*.md")
            if not path.is_relative_to(self.proofs)
        )

    def is_article(self, page: str) -> bool:
        """Tell whether a page is an article, which needs front matter; a folder's index is not."""
        folder, _, name = page.rpartition("/")
        return folder in self.articles and name != "index.md" and not name.startswith("index.")


def find_root(start: Path | None = None) -> Path:
    """Return the nearest folder at or above `start` that holds `mkdocs.yml`.

    Raises:
        FileNotFoundError: If there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "mkdocs.yml").is_file():
            return folder
    raise FileNotFoundError(f"no mkdocs.yml in {start} or above it: run mdproof inside a site")


_SETTINGS: dict[str, type] = {
    "source": list,
    "packages": list,
    "lock": str,
    "preload": list,
    "articles": list,
    "front_matter": list,
    "require_language": bool,
    "lenient": bool,
    "macros": dict,
    "tests": list,
    "types": str,
    "types_ignore": list,
    "floors": list,
    "allow_warnings": list,
}
"""What `[tool.mdproof]` may hold."""

_VALUES: dict[str, tuple[str, ...]] = {"types": ("none", "pyrefly")}
"""Settings that are one of a few words."""


def _read_project(file: Path) -> dict[str, Any]:
    """Return `pyproject.toml`, `[tool.mdproof]` checked; empty if there is none."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    try:
        project = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PageError(file.name, 1, f"not TOML: {error}") from None
    for key, value in project.get("tool", {}).get("mdproof", {}).items():
        line = _line_of(text, key)
        if key not in _SETTINGS:
            known = ", ".join(_SETTINGS)
            raise PageError(file.name, line, f"[tool.mdproof] has no {key!r}; known are {known}")
        if not isinstance(value, _SETTINGS[key]):
            kind = _SETTINGS[key].__name__
            raise PageError(file.name, line, f"[tool.mdproof] {key} is {value!r}, not a {kind}")
        if key in _VALUES and value not in _VALUES[key]:
            known = ", ".join(_VALUES[key])
            raise PageError(
                file.name, line, f"[tool.mdproof] {key} is {value!r}; known are {known}"
            )
        if key == "allow_warnings" and not all(map(_is_excuse, value)):
            what = 'each entry is { warning = "Category: text", reason = "..." }'
            raise PageError(file.name, line, f"[tool.mdproof] {key}: {what}")
    return project


def _is_excuse(entry: Any) -> bool:
    """Tell whether an entry names a warning and says why it is no failure."""
    return (
        isinstance(entry, dict)
        and set(entry) == {"warning", "reason"}
        and all(isinstance(text, str) and text.strip() for text in entry.values())
    )


def _line_of(text: str, key: str) -> int:
    """Return the line of a key of `[tool.mdproof]`."""
    lines = text.split("\n")
    header = next((n for n, line in enumerate(lines) if line.strip() == "[tool.mdproof]"), 0)
    name = re.compile(rf"[\"']?{re.escape(key)}[\"']?\s*=")
    return 1 + next((n for n in range(header, len(lines)) if name.match(lines[n])), header)


@functools.cache
def _load_site(config: Path) -> Site:
    from mdproof.config import read_mkdocs  # late: it reads YAML

    root = config.parent
    mkdocs = read_mkdocs(config)
    project = _read_project(root / "pyproject.toml")
    settings = project.get("tool", {}).get("mdproof", {})
    # A site that has declared articles watches over every fence; another may have old ones.
    strict = bool(settings.get("articles")) and not settings.get("lenient", False)
    settings.setdefault("require_language", strict)
    lock = settings.get("lock")
    theme = mkdocs.get("theme") or {}
    return Site(
        root=root,
        docs=root / mkdocs.get("docs_dir", "docs"),
        source=tuple(root / folder for folder in settings.get("source", ())),
        packages=tuple(settings.get("packages", ())),
        lock=root / lock if lock else None,
        preload=tuple(settings.get("preload", ())),
        articles=tuple(settings.get("articles", ())),
        front_matter=tuple(settings.get("front_matter", ())),
        language=theme.get("language", "en") if isinstance(theme, Mapping) else "en",
        settings={**settings, "mkdocs": mkdocs, "project": project.get("project", {})},
    )


def load_site(start: Path | None = None) -> Site:
    """Read the site that `start` belongs to; by default the one being built, or of the directory.

    Raises:
        FileNotFoundError: If there is none.
        PageError: If its settings make no sense.
    """
    config = _building.get() if start is None else None
    return _load_site(config or find_root(start) / "mkdocs.yml")


_building: ContextVar[Path | None] = ContextVar("building", default=None)


def enter_site(md: Markdown) -> None:
    """Make the site whose page a builder renders with `md` the default, wherever it was started."""
    if "relpath" in md.treeprocessors:  # MkDocs
        config = md.treeprocessors["relpath"].config.config_file_path  # type: ignore[attr-defined]
    elif "rendering_context" in md.preprocessors:  # Zensical
        folder = md.preprocessors["rendering_context"].config["root_dir"]  # type: ignore[attr-defined]
        config = f"{folder}/mkdocs.yml"
    else:
        return
    if Path(config).is_file():
        _building.set(Path(config).resolve())


def page_of(md: Markdown) -> str | None:
    """Return the page that `md` is rendering, as a path below `docs`, or None outside a builder."""
    given = getattr(md, "mdproof_page", None)  # our own collector
    if given is not None:
        return given
    if "relpath" in md.treeprocessors:  # MkDocs
        return md.treeprocessors["relpath"].file.src_uri  # type: ignore[attr-defined]
    if "rendering_context" in md.preprocessors:  # Zensical
        return md.preprocessors["rendering_context"].page.path  # type: ignore[attr-defined]
    return None


making_pipeline: ContextVar[bool] = ContextVar("making_pipeline", default=False)
"""Whether the engine is making the pipeline for itself, and will look at each page alone."""


def is_collecting(md: Markdown) -> bool:
    """Tell whether the engine runs the pipeline only to see which fences a page has."""
    return bool(getattr(md, "mdproof_collecting", False))


def link(md: Markdown, target: str) -> str:
    """Return a file below `docs` as a link for raw HTML on the page that `md` is rendering.

    MkDocs leaves raw HTML alone, so the link is relative to the page's address; Zensical rewrites
    raw HTML, so it is relative to the source file.
    """
    path, _, anchor = target.partition("#")
    anchor = f"#{anchor}" if anchor else ""
    if "relpath" in md.treeprocessors:
        here = md.treeprocessors["relpath"].file.url  # type: ignore[attr-defined]
        folder = here if here.endswith("/") else posixpath.dirname(here)
        if path.endswith(".md"):
            path = path.removesuffix(".md").removesuffix("index")
            path = path if path.endswith("/") or not path else path + "/"
        relative = posixpath.relpath(path or ".", folder or ".")
        return relative + ("/" if path.endswith("/") or not path else "") + anchor
    page = page_of(md) or ""
    return posixpath.relpath(path, posixpath.dirname(page) or ".") + anchor
