"""`mdproof doctor`: which articles are proven for what is installed here, and what is amiss."""

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass, field

from mdproof.proof import ForgedError, canonical, load_proof, locked_versions, orphans
from mdproof.site import Site
from mdproof.standing import Standing
from mdproof.standings import read_standings
from mdproof.tables import table
from mdproof.tools import ToolError, find_tool

TOOLS = {"ruff": "mdproof lint and format"}
"""Programs that the engine calls, and what for."""


@dataclass
class Finding:
    """What the doctor has to say.

    Attributes:
        wrong: Sentences about what must be mended.
        notes: Sentences about what may be as it is.
        rows: The table of pages.
    """

    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def installed_version(name: str) -> str:
    """Return a distribution's installed version without its local part, "" if it is missing."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def examine(site: Site) -> Finding:
    """Return what is amiss with the site, its proofs and this environment."""
    finding = Finding(rows=[["page", "state", "here"]])
    standings = read_standings(site)
    for standing in standings:
        _examine_page(site, standing, finding)
    for file in orphans(site, (standing.page for standing in standings)):
        name = file.relative_to(site.root).as_posix()
        finding.wrong.append(f"{name}: no page has these blocks: delete it")
    _examine_tools(site, finding)
    _examine_lock(site, finding)
    return finding


def _examine_page(site: Site, standing: Standing, finding: Finding) -> None:
    if standing.problem:
        finding.wrong.append(standing.problem)
        finding.rows.append([standing.page, standing.state, ""])
        return
    for why in dict.fromkeys(standing.stale.values()):
        blocks = [str(block) for block, other in standing.stale.items() if other == why]
        numbers = f"block{'s' * (len(blocks) > 1)} {', '.join(blocks)}"
        finding.wrong.append(f"{site.docs.name}/{standing.page}: {numbers}: {why}")
    differ = _differences(site, standing)
    finding.wrong += [f"{site.docs.name}/{standing.page}: {text}" for text in differ]
    here = "proven for what is installed here" if not differ else f"{len(differ)} versions differ"
    state = f"{len(standing.stale)} stale" if standing.stale else standing.state
    finding.rows.append([standing.page, state, here if not standing.stale else ""])


def _recorded(site: Site, page: str) -> dict[str, set[str]]:
    """Return the versions that the records of a page name; there should be one of each."""
    try:
        proof = load_proof(site, page)
    except ForgedError:
        return {}
    found: dict[str, set[str]] = {}
    for record in proof.blocks if proof else ():
        for name, version in record["libraries"].items():
            found.setdefault(name, set()).add(version)
    return found


def _differences(site: Site, standing: Standing) -> list[str]:
    """Return how the recorded, the locked and the installed versions of a page disagree."""
    locked = locked_versions(site)
    found: list[str] = []
    for name, versions in sorted(_recorded(site, standing.page).items()):
        recorded = "/".join(sorted(versions))
        installed = installed_version(name)
        lock = locked.get(canonical(name), "").partition("+")[0]
        if versions != {installed} or (lock and lock != installed):
            parts = [f"recorded {recorded}"]
            parts += [f"locked {lock}"] if lock else []
            parts += [f"installed {installed}" if installed else "not installed"]
            found.append(f"{name}: {', '.join(parts)}")
    here = platform.python_version()
    if standing.python and standing.python.split(".")[:2] != here.split(".")[:2]:
        found.append(f"Python: recorded {standing.python}, running {here}")
    return found


def _examine_tools(site: Site, finding: Finding) -> None:
    wanted = dict(TOOLS)
    if site.settings.get("types", "none") != "none":
        wanted[site.settings["types"]] = "mdproof lint with types"
    for name, use in wanted.items():
        try:
            find_tool(name, use)
        except ToolError:
            finding.notes.append(f"{name} is not installed: {use} needs it (pip install {name})")
    for name in site.preload:
        if importlib.util.find_spec(name) is None:
            finding.wrong.append(f"[tool.mdproof] preload names {name}, which is not installed")


def _examine_lock(site: Site, finding: Finding) -> None:
    if site.lock is None:
        finding.notes.append("no lock file: a proof is bound to the versions it was recorded with")
    elif not site.lock.is_file():
        name = site.lock.relative_to(site.root).as_posix()
        finding.wrong.append(f"[tool.mdproof] lock: there is no file {name}")
    for folder in site.source:
        if not folder.is_dir():
            name = folder.relative_to(site.root).as_posix()
            finding.wrong.append(f"[tool.mdproof] source: there is no folder {name}")
    for package in site.packages:
        places = [root / name for root in site.source for name in (package, f"{package}.py")]
        if not any(place.exists() for place in places):
            finding.wrong.append(f"[tool.mdproof] packages: no source folder holds {package}")
    for wing in site.articles:
        if not (site.docs / wing).is_dir():
            name = f"{site.docs.name}/{wing}"
            finding.wrong.append(f"[tool.mdproof] articles: there is no folder {name}")


def doctor(site: Site) -> int:
    """Print what is amiss; return 0 if every page is proven for what is installed here, else 1."""
    finding = examine(site)
    if len(finding.rows) > 1:
        print(table(finding.rows))
    print(f"Python {platform.python_version()}")
    for text in finding.notes:
        print(f"note: {text}")
    for text in finding.wrong:
        print(f"wrong: {text}")
    print("all is well" if not finding.wrong else f"{len(finding.wrong)} things are wrong")
    return 1 if finding.wrong else 0
