"""`mdproof new`: begin an article on every floor that the site has, or on none.

The floors are the page, the module, its test and its reference page; `[tool.mdproof] floors` says
which, and without it those are built that the site already has elsewhere.
"""

import datetime
import json
import keyword
import re
from pathlib import Path
from typing import Any

import yaml

from mdproof.config import markdown_extensions
from mdproof.nav import NavError, insert
from mdproof.proof import write_bytes
from mdproof.site import Site
from mdproof.skeletons import SKELETONS

FLOORS = ("page", "module", "test", "reference")

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


class ScaffoldError(Exception):
    """An article cannot be begun; `str()` is one line."""


def begin_article(site: Site, room: str, title: str) -> tuple[list[str], str]:
    """Write the files of a new article and put its pages into the `nav`.

    Args:
        site: The site.
        room: Wing and room, such as `large-models/dpo`; the room alone where there are no wings.
        title: The title of the page.

    Returns:
        The files that were written or changed, below the root; and what is left to do by hand.

    Raises:
        ScaffoldError: If the names make no sense, or a file of the article is there already.
    """
    _check_names(site, room, title)
    files = _files(site, room, title)
    for name in files:
        if (site.root / name).exists():
            raise ScaffoldError(f"{name} is there already: nothing was written")
    settings = site.root / "mkdocs.yml"
    old = settings.read_bytes()
    text, left = old.decode("utf-8"), []
    try:
        text = insert(text, f"{room}.md", "")
        reference = f"reference/{room}.md"
        if (site.docs / reference).relative_to(site.root).as_posix() in files:
            text = insert(text, reference, _snake(room).rpartition("/")[2])
    except NavError as error:
        left.append(str(error))
    _write(site, files, settings, old, text.encode())
    changed = ["mkdocs.yml"] if text.encode() != old else []
    return [*files, *changed], "; ".join(left)


def _check_names(site: Site, room: str, title: str) -> None:
    if not title.strip() or "\n" in title:
        raise ScaffoldError("a title is one line of text")
    wing, _, name = room.rpartition("/")
    for part in room.split("/"):
        if not _NAME.fullmatch(part) or keyword.iskeyword(part.replace("-", "_")):
            rule = "small letters and digits, words joined by hyphens, and no word of Python"
            raise ScaffoldError(f"{part!r} is no name for a wing or a room: {rule}")
    if site.articles and wing not in site.articles:
        wings = ", ".join(site.articles)
        raise ScaffoldError(f"there is no wing {wing!r} for the room {name!r}; wings are: {wings}")


def floors(site: Site, room: str) -> list[str]:
    """Return which floors an article of this wing has."""
    given = site.settings.get("floors")
    if given is not None:
        unknown = [repr(floor) for floor in given if floor not in FLOORS]
        if unknown:
            known = ", ".join(FLOORS)
            raise ScaffoldError(f"[tool.mdproof] floors names {unknown[0]}; known are: {known}")
        if given != ["page"] and not (site.packages and site.source):
            raise ScaffoldError("[tool.mdproof] floors: a module needs `source` and `packages`")
        return [floor for floor in FLOORS if floor in given]
    found = ["page"]
    if site.packages and site.source and "/" in room:
        found.append("module")
        found += ["test"] if (site.root / "tests").is_dir() else []
        found += ["reference"] if (site.docs / "reference").is_dir() else []
    return found


def _snake(name: str) -> str:
    return name.replace("-", "_")


def _files(site: Site, room: str, title: str) -> dict[str, str]:
    """Return the text of each file of an article, by its path below the root."""
    built = floors(site, room)
    wing, _, name = _snake(room).rpartition("/")
    package = site.packages[0] if site.packages else ""
    dotted = ".".join(part for part in [package, *wing.split("/"), name] if part)
    words: dict[str, Any] = {
        "title": title,
        "room": name,
        "module": dotted,
        "source": f"{dotted}.{name}",
        "front": _front_matter(site, title),
    }
    language = "zh" if site.language.startswith("zh") else "en"
    texts = SKELETONS[language]
    docs = site.docs.relative_to(site.root).as_posix()
    kind = "page" if "module" in built else "page_alone"
    files = {f"{docs}/{room}.md": texts[kind].format(**words)}
    if "module" in built:
        source = site.source[0].relative_to(site.root).as_posix()
        module = Path(source, *dotted.split(".")).with_suffix(".py")
        for folder in list(module.parents)[::-1]:
            init = folder / "__init__.py"
            if folder.is_relative_to(Path(source, package)) and not (site.root / init).is_file():
                files[init.as_posix()] = f'"""The wing {folder.name}."""\n'
        files[module.as_posix()] = texts["module"].format(**words)
    if "test" in built:
        files[Path("tests", wing, f"test_{name}.py").as_posix()] = texts["test"].format(**words)
    if "reference" in built:
        text = texts["reference"].format(**words)
        names, _ = markdown_extensions(site.settings["mkdocs"])
        if "mdproof.directives" in names:
            text += texts["usage"].format(**words)
        files[f"{docs}/reference/{room}.md"] = text
    return files


def _front_matter(site: Site, title: str) -> str:
    """Return the front matter that the site asks for, each field with a value of the right type."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    known = {
        "title": _scalar(title),
        "date": today,
        "updated": today,
        "tags": "[]",
        "description": "TODO",
        "prerequisites": "[]",
    }
    fields = site.front_matter or ("title",)
    lines = [f"{name}: {known.get(name, 'TODO')}" for name in fields]
    return "\n".join(["---", *lines, "---"])


def _scalar(text: str) -> str:
    """Return a text as YAML, quoted only where it must be."""
    try:
        plain = yaml.safe_load(f"title: {text}\n") == {"title": text}
    except yaml.YAMLError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)


def _write(site: Site, files: dict[str, str], settings: Path, old: bytes, new: bytes) -> None:
    """Write all files, or leave everything as it was."""
    made: list[Path] = []
    try:
        for name, text in files.items():
            file = site.root / name
            made += [
                folder
                for folder in reversed([file, *file.parents])
                if folder.is_relative_to(site.root) and not folder.exists()
            ]
            write_bytes(file, text.encode())
        if new != old:
            write_bytes(settings, new)
    except BaseException as error:
        for path in reversed(made):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ScaffoldError(f"nothing was written: {error}") from None
        raise
