"""Check the types of the code of pages with the project's type checker, line for line.

Which checker and which of its errors count is said in `[tool.mdproof]`: `types = "pyrefly"` turns
it on, and each entry of `types_ignore` names a kind of error, or a kind and a pattern of its
message: "missing-attribute: class `NoneType`".
"""

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdproof.collect import collect, make_pipeline, shown
from mdproof.lint import Finding
from mdproof.program import Program, make_program
from mdproof.site import Site
from mdproof.tools import find_tool, run_tool


def check_types(site: Site, pages: Sequence[str]) -> list[Finding]:
    """Return what the type checker says about the programs of pages.

    Blocks that are not run are left out, because they may need what is not installed; so are errors
    in a block that must raise, because it is wrong on purpose.

    Raises:
        PageError: If a fence of a page makes no sense.
        ToolError: If the checker is missing or fails.
    """
    if site.settings.get("types", "none") == "none":
        return []
    pyrefly = find_tool("pyrefly", "`mdproof lint` with types")
    md = make_pipeline(site)
    with tempfile.TemporaryDirectory(prefix="mdproof-") as folder:
        programs: dict[Path, Program] = {}
        for number, page in enumerate(pages):
            program = make_program(site, collect(site, page, md).blocks, excused=False)
            if program.blocks:
                file = Path(folder).resolve() / f"page_{number}.py"
                file.write_text(program.text, encoding="utf-8")
                programs[file] = program
        if not programs:
            return []
        text = run_tool(site, [*_command(site, pyrefly), *map(str, programs)])
    findings: list[Finding] = []
    for error in json.loads(text)["errors"]:
        program = programs.get((site.root / error["path"]).resolve())
        finding = _read(site, program, error) if program is not None else None
        if finding is not None and not _is_ignored(site, finding):
            findings.append(finding)
    return sorted(findings)


def _command(site: Site, pyrefly: str) -> list[str]:
    command = [pyrefly, "check", "--output-format=json", "--summary=none"]
    command += ["--python-interpreter-path", sys.executable]
    for folder in site.source:
        command += ["--search-path", str(folder)]
    for name in ("pyrefly.toml", "pyproject.toml"):
        if (site.root / name).is_file():
            return [*command, "--config", str(site.root / name)]
    return command


def _read(site: Site, program: Program, error: dict[str, Any]) -> Finding | None:
    place = program.place(error["line"])
    if place is None or place.block.kind == "source" or place.block.options.raises:
        return None
    message = " ".join(error["concise_description"].split())
    column = error["column"] + place.column
    return Finding(shown(site, place.block.page), place.line, column, error["name"], message)


def _is_ignored(site: Site, finding: Finding) -> bool:
    for entry in site.settings.get("types_ignore", ()):
        kind, _, pattern = entry.partition(": ")
        if kind == finding.code and re.search(pattern, finding.message):
            return True
    return False
