"""A small site of its own for each test of the engine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import mdproof
from mdproof.collect import Collected, collect
from mdproof.page_run import PageRun, Servers, open_page
from mdproof.record import Updated, update_page
from mdproof.site import Site, load_site

MKDOCS = """\
site_name: 样例
theme: {name: material, language: zh, font: false}
plugins: []
markdown_extensions:
  - admonition
  - attr_list
  - footnotes
  - tables
  - pymdownx.details
  - pymdownx.highlight
  - pymdownx.snippets: {base_path: [.], check_paths: true}
  - pymdownx.superfences:
      custom_fences:
        - name: mermaid
          class: mermaid
          format: !!python/name:pymdownx.superfences.fence_code_format
  - pymdownx.tabbed: {alternate_style: true}
  - mdproof.markdown
"""

PYPROJECT = """\
[project]
name = "sample"
version = "1.0"

[tool.mdproof]
source = ["src"]
packages = ["sample"]
lock = "requirements.lock"
articles = ["articles"]
front_matter = ["title", "date"]
"""

MODULE = '''\
"""A module."""

import math

FACTOR = 3


def scale(x):
    """Multiply."""
    return x * FACTOR


def area(r):
    r"""Return the area of a disc.

    More words.
    """
    return scale(r) * r * math.pi / FACTOR
'''


class Sample:
    """A site in a temporary folder, and what can be done with it."""

    def __init__(self, root: Path, servers: list[Servers]) -> None:
        self.root = root
        self._servers = servers

    @property
    def site(self) -> Site:
        """The site."""
        return load_site(self.root)

    def write(self, text: str, page: str = "page.md") -> str:
        """Write a page and return its path below `docs`."""
        file = self.root / "docs" / page
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="")
        return page

    def collect(self, text: str, page: str = "page.md") -> Collected:
        """Write a page and collect its blocks."""
        return collect(self.site, self.write(text, page))

    def collect_written(self, page: str = "page.md") -> Collected:
        """Collect the blocks of a page that is there."""
        return collect(self.site, page)

    def open(self, page: str = "page.md") -> PageRun:
        """Open a page with its proof."""
        if not self._servers:
            self._servers.append(Servers(self.site))
        return open_page(self.site, page, self._servers[0])

    def prove(self, text: str, page: str = "page.md") -> Updated:
        """Write a page, run it and record what it shows."""
        return update_page(self.open(self.write(text, page)))


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sample]:
    """A fresh sample site, and the working directory in it."""
    for folder in ("docs", "src/sample"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "mkdocs.yml").write_text(MKDOCS, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (tmp_path / "requirements.lock").write_text("", encoding="utf-8")
    (tmp_path / "src/sample/__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "src/sample/shapes.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    ours = Path(mdproof.__file__).parents[1]  # the workers run the engine that is tested
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'src'}{os.pathsep}{ours}")
    servers: list[Servers] = []
    yield Sample(tmp_path, servers)
    for each in servers:
        each.close()
