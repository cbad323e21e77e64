"""The programs of others that the engine calls: found beside this Python, or on the path."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mdproof.site import Site


class ToolError(Exception):
    """A tool is missing or does not do its work; `str()` is one line."""


def find_tool(name: str, wanted_for: str) -> str:
    """Return the path of a program.

    Args:
        name: Its name, which is also that of its distribution.
        wanted_for: What needs it, for the error.

    Raises:
        ToolError: If it is neither beside this Python nor on the path.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if found is None:
        raise ToolError(f"{wanted_for} needs {name}, which is not installed: pip install {name}")
    return found


def run_tool(
    site: Site, command: Sequence[str], text: str = "", *, accepted: Sequence[int] = (0, 1)
) -> str:
    """Return what a program prints when it is run in the site's root.

    Args:
        site: The site.
        command: The program and its arguments.
        text: What it reads from its standard input.
        accepted: The exit codes that mean it did its work.

    Raises:
        ToolError: If it ends in another way, or fails and says nothing; with what it wrote last.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=site.root, input=text.encode(), env=env, capture_output=True, check=False
    )
    silent = result.returncode != 0 and not result.stdout.strip()
    if result.returncode not in accepted or silent:
        said = result.stderr.decode(errors="replace").split("\n")
        lines = [" ".join(line.split()) for line in said if line.strip()]
        why = "; ".join(lines[:3]) or f"exit code {result.returncode}"
        raise ToolError(f"{Path(command[0]).name} failed: {why}")
    return result.stdout.decode()
