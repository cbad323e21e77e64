"""Both builders make the same site, and a mistake stops them with one line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("docs", "overrides", "requirements", "src", "tests")
FILES = ("mkdocs.yml", "pyproject.toml", "README.md")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository, to be built or broken."""
    for name in PARTS:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def build(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


def pages(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.html")}


def test_zensical_builds_the_same_pages(built: Path, copy: Path) -> None:
    done = build(copy, "zensical", "build", "--clean")
    assert done.returncode == 0, done.stdout + done.stderr
    assert pages(copy / "site") == pages(built)
    for name in ("index.html", "reference/large-models/dpo/index.html"):
        html = (copy / "site" / name).read_text(encoding="utf-8")
        left = re.search(r"\[\[[a-z-]+(: [^\]]*)?\]\]", html)
        assert left is None, f"{name}: not expanded: {left}"


def test_an_unknown_directive_stops_the_build_with_file_and_line(copy: Path) -> None:
    page = copy / "docs/about/verification.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text + "\n[[verifications]]\n", encoding="utf-8")
    line = text.count("\n") + 2
    done = build(copy, "mkdocs", "build", "--strict", "-q", "-d", str(copy / "site"))
    assert done.returncode != 0
    assert f"docs/about/verification.md:{line}: `[[verifications]]` is no directive" in done.stderr
    assert "Traceback" not in done.stderr
