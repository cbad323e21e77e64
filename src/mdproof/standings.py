"""How all pages stand, remembered: a page is read again when a file that it depends on changed.

The memory lies under `.cache/` of the site and may be deleted. It holds for each page the size and
the time of change of every file that its standing was worked out from: the page, its proof and
figures, the modules and data that the proof names, the lock file. It serves `mdproof status`; what
the site shows and what tests compare is worked out anew.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdproof.collect import make_pipeline, read_page
from mdproof.errors import PageError
from mdproof.proof import figure_folder, module_file, proof_file, write_bytes
from mdproof.site import Site
from mdproof.standing import Excuse, Standing, read_standing

Stamp = tuple[int, int]


def read_standings(site: Site) -> list[Standing]:
    """Return how every page with blocks stands, in the order of their paths."""
    file = site.root / ".cache" / "mdproof" / "standings.json"
    setting = _setting(site)
    old = _read(file, setting)
    md = make_pipeline(site)  # also where there is nothing to read: it tells what cannot work
    found: list[Standing] = []
    kept: dict[str, dict[str, Any]] = {}
    stamps: dict[str, Stamp | None] = {}

    def stamp(path: str) -> Stamp | None:
        if path not in stamps:
            stamps[path] = _stamp(site.root / path)
        return stamps[path]

    for page in site.pages():
        entry = old.get(page)
        if entry is None or any(stamp(p) != tuple(s) for p, s in entry["files"].items()):
            standing = read_standing(site, page, md)
            files = _files(site, page)
            entry = None
            if files is not None:
                names = [path.relative_to(site.root).as_posix() for path in files]
                shown = dataclasses.asdict(standing) if standing else None
                entry = {"files": {name: stamp(name) for name in names}, "standing": shown}
        else:
            standing = _restore(entry["standing"])
        if entry is not None:
            kept[page] = entry
        if standing is not None:
            found.append(standing)
    if kept != old:
        _write(file, {"setting": setting, "pages": kept})
    return found


def _files(site: Site, page: str) -> list[Path] | None:
    """Return every file that a page's standing depends on; None if they cannot all be named."""
    try:
        text = read_page(site, page)
    except PageError:
        return None
    if "--8<--" in text or ";--" in text:  # includes files that nobody lists
        return None
    found = [site.docs / page]
    record = proof_file(site, page)
    if not record.is_file():  # a page without blocks, or one that was never proven
        return found if "```" not in text and "~~~" not in text and "    " not in text else None
    found.append(record)
    try:
        blocks = json.loads(record.read_text(encoding="utf-8"))["blocks"]
        names = {name for block in blocks for name in block["modules"]}
        files = {name for block in blocks for name in block["files"]}
    except (ValueError, KeyError, TypeError):
        return None
    for name in sorted(names):
        module = module_file(name, site)
        if module is None:
            return None
        found.append(module)
    found += [site.root / name for name in sorted(files)]
    folder = figure_folder(site, page)
    found += sorted(folder.glob("*.svg")) if folder.is_dir() else []
    return found if all(path.is_file() and _below(path, site.root) for path in found) else None


def _below(path: Path, root: Path) -> bool:
    return path.is_relative_to(root)


def _setting(site: Site) -> str:
    """Return a hash of what every standing depends on: the engine, the settings, the lock file."""
    fields = {
        field.name: getattr(site, field.name)
        for field in dataclasses.fields(site)
        if field.name != "settings"
    }
    whole = hashlib.sha256(sys.version.encode())
    whole.update(json.dumps(fields, default=str, sort_keys=True).encode())
    whole.update(repr([(str(path), _stamp(path)) for path in _common(site)]).encode())
    return whole.hexdigest()


def _common(site: Site) -> Iterator[Path]:
    yield from sorted(Path(__file__).parent.rglob("*.py"))
    if site.lock is not None:
        yield site.lock
    for name in ("mkdocs.yml", "zensical.toml", "mdproof.toml", "pyproject.toml"):  # the settings
        yield site.root / name


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _restore(kept: dict[str, Any] | None) -> Standing | None:
    if kept is None:
        return None
    fields: dict[str, Any] = dict(kept)
    fields |= {name: tuple(kept[name]) for name in ("verified", "unchecked")}
    fields["excuses"] = tuple(Excuse(**excuse) for excuse in kept["excuses"])
    fields["stale"] = {int(number): why for number, why in kept["stale"].items()}
    return Standing(**fields)


def _read(file: Path, setting: str) -> dict[str, dict[str, Any]]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        pages = kept["pages"] if kept["setting"] == setting else {}
        for entry in pages.values():
            _restore(entry["standing"])
            dict(entry["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a memory that is broken is no memory
    return pages


def _write(file: Path, kept: dict[str, Any]) -> None:
    try:
        write_bytes(file, json.dumps(kept, ensure_ascii=False).encode())
    except OSError:
        return  # a folder that cannot be written only costs time
