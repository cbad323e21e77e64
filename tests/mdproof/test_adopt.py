"""The page for adopters is true: its files and commands, in its order, make a proven site."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.mdproof.conftest import MKDOCS, Sample

import mdproof
from mdproof import cli, installing
from mdproof.installing import missing
from mdproof.site import load_site

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/about/adopt.md"

_FENCE = re.compile(r'^(`{3,})(\w+)(?: title="([^"]*)")?\n(.*?)^\1$', re.MULTILINE | re.DOTALL)
_INSTALLS = re.compile(r"^(git clone|python -m venv|\. \.venv|pip install)\b.*$", re.MULTILINE)


def steps() -> list[tuple[str, str, str]]:
    """Return language, title and text of the page's fences."""
    return [(found[2], found[3] or "", found[4]) for found in _FENCE.finditer(PAGE.read_text())]


def follow(folder: Path, env: dict[str, str], *, installed: bool) -> dict[str, str]:
    """Do what the page says; return what each series of commands printed."""
    printed: dict[str, str] = {}
    last = ""
    for language, title, text in steps():
        if language == "bash":
            script = _INSTALLS.sub("", text) if installed else text
            done = subprocess.run(
                ["bash", "-e", "-c", script], cwd=folder, env=env, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            last = printed[text] = done.stdout
        elif title == "输出":
            wanted = re.sub(r"\d+", r"\\d+", re.escape(text.strip()).replace("\\ ", " "))
            assert re.search(re.sub(" +", " +", wanted), last), f"{text}\n{last}"
        elif title:
            file = folder / title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return printed


def environment(folder: Path) -> dict[str, str]:
    """Return an environment in which the page's commands are those of this checkout."""
    tools = folder / "bin"
    tools.mkdir()
    for name in ("mdproof", "mkdocs", "pytest"):
        script = f'#!/bin/sh\nexec "{sys.executable}" -m {name} "$@"\n'
        (tools / name).write_text(script, encoding="utf-8")
        (tools / name).chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "CI"}
    path = f"{tools}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    own = f"{folder / 'site/src'}{os.pathsep}{ROOT / 'src'}"
    return env | {"PATH": path, "PYTHONPATH": own, "NO_MKDOCS_2_WARNING": "1"}


def test_following_the_page_to_the_letter_makes_a_proven_site(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    printed = follow(folder, environment(tmp_path), installed=True)
    proving = [text for command, text in printed.items() if "mdproof prove" in command]
    assert len(proving) == 3
    assert all(re.search(r"\d+ proven, \d+ fresh, 0 failed", text) for text in proving)
    html = (folder / "site/series/index.html").read_text(encoding="utf-8")
    assert "1.6439" in html
    assert "✓ verified" in html
    assert "def partial_sums" in html
    assert not re.search(r"[㐀-鿿]", html)
    assert (folder / "site/assets/mdproof.css").is_file()
    data = {path.name for path in (folder / "site").rglob("*.json")}
    assert data == {"search_index.json"}  # proofs are not published


def test_the_page_names_every_command_and_every_setting() -> None:
    text = PAGE.read_text(encoding="utf-8")
    commands = cli._parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    for name in commands:
        assert f"`mdproof {name}" in text, name
    from mdproof.site import _SETTINGS

    unsaid = [name for name in _SETTINGS if f"`{name}`" not in text]
    assert unsaid == ["macros", "tests"]  # of mdproof.maths and mdproof.equations alone


def test_what_is_public_is_there_and_nothing_else() -> None:
    assert sorted(mdproof.__all__) == ["PageError", "collect_page", "load_site", "payloads"]
    for name in mdproof.__all__:
        assert getattr(mdproof, name).__module__.startswith("mdproof.")
        assert name in str(mdproof.__doc__)
        assert f"`mdproof.{name}`" in PAGE.read_text(encoding="utf-8")
    with pytest.raises(AttributeError) as caught:
        mdproof.nonsense  # noqa: B018
    assert str(caught.value) == "module 'mdproof' has no attribute 'nonsense'"


def test_the_engine_is_packed_alone_with_style_and_script(tmp_path: Path) -> None:
    target = tmp_path / "repository"
    for name in ("packaging/mdproof", "src/mdproof"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    (target / "docs/assets").mkdir(parents=True)
    for name in (*installing.ASSETS.values(), "search-worker.js"):
        shutil.copy(ROOT / "docs/assets" / name, target / "docs/assets")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(
        command, cwd=target / "packaging/mdproof", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    ours = list((ROOT / "src/mdproof").rglob("*.py"))
    packed = [name for name in names if name.endswith(".py")]
    assert len(packed) == len(ours)
    for name in (*installing.ASSETS.values(), "search-worker.js"):
        assert f"mdproof/assets/{name}" in names
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    assert "torch" not in zipfile.ZipFile(wheel).read(metadata).decode()


def test_init_writes_the_files_and_says_what_is_lacking(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["init"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "docs/assets/mdproof.css: written",
        "docs/assets/mdproof.js: written",
        "mkdocs.yml lacks these lines:",
        "extra_css:",
        "  - assets/mdproof.css",
        "extra_javascript:",
        "  - assets/mdproof.js",
    ]
    more = "extra_css: [assets/mdproof.css]\nextra_javascript: [assets/mdproof.js]\n"
    (sample.root / "mkdocs.yml").write_text(MKDOCS + more, encoding="utf-8")
    load_site.__globals__["_load_site"].cache_clear()
    assert cli.main(["init"]) == 0
    assert capsys.readouterr().out == "mkdocs.yml has what pages need\n"


def test_init_says_which_extensions_are_lacking_in_their_order() -> None:
    assert missing({"markdown_extensions": ["pymdownx.highlight"]})["markdown_extensions"] == [
        "pymdownx.superfences",
        "mdproof.markdown",
    ]


def test_an_installation_without_the_files_says_so(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installing, "__file__", str(sample.root / "a/b/installing.py"))
    assert cli.main(["init"]) == 2
    assert capsys.readouterr().err == "mdproof.css is not part of this installation\n"
