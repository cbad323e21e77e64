"""`mdproof new` builds every floor of an article or none, and inserts lines into the nav."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.mdproof.conftest import MKDOCS, PYPROJECT, Sample

from mdproof import cli, scaffold
from mdproof.article import read_article
from mdproof.collect import collect
from mdproof.nav import NavError, insert
from mdproof.site import load_site

ROOT = Path(__file__).parents[2]
NAV = """
# The order is the reading order.
nav:
  - Home: index.md
  - Articles:  # a wing
      - articles/index.md
      - articles/one.md   # first
  - Reference:
      - reference/index.md
      - Articles:
          - one: reference/articles/one.md

extra:
  key: value
"""


@pytest.fixture
def building(sample: Sample) -> Sample:
    """Make the sample a site with all floors."""
    (sample.root / "mkdocs.yml").write_text(MKDOCS + NAV, encoding="utf-8")
    for folder in ("tests", "docs/reference", "src/sample/articles"):
        (sample.root / folder).mkdir(parents=True)
    (sample.root / "src/sample/articles/__init__.py").write_text("", encoding="utf-8")
    return sample


def files(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_an_article_is_begun_on_every_floor(
    building: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(building.root)
    assert cli.main(["new", "articles/big-step", "--title", "大步: 一"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "docs/articles/big-step.md",
        "src/sample/articles/big_step.py",
        "tests/articles/test_big_step.py",
        "docs/reference/articles/big-step.md",
        "mkdocs.yml",
    ]
    after = files(building.root)
    assert {name for name in after if after[name] != before.get(name)} == {
        "docs/articles/big-step.md",
        "src/sample/articles/big_step.py",
        "tests/articles/test_big_step.py",
        "docs/reference/articles/big-step.md",
        "mkdocs.yml",
    }
    article = read_article(building.site, "articles/big-step.md")
    assert article.title == "大步: 一"
    blocks = collect(building.site, "articles/big-step.md").blocks
    assert [block.kind for block in blocks] == ["source", "code"]
    old, new = (text["mkdocs.yml"].decode().split("\n") for text in (before, after))
    added = [line for line in new if line not in old]
    assert [line for line in new if line not in added] == old
    assert added == [
        "      - articles/big-step.md",
        "          - big_step: reference/articles/big-step.md",
    ]
    assert new[new.index(added[0]) - 1] == "      - articles/one.md   # first"


def test_a_site_without_packages_gets_a_page_that_can_be_proven(sample: Sample) -> None:
    (sample.root / "pyproject.toml").unlink()
    load_site.__globals__["_load_site"].cache_clear()
    assert cli.main(["new", "hello", "--title", "Hello"]) == 0
    from mdproof.record import update_page

    assert update_page(sample.open("hello.md")).failures == {}
    changed = {name for name in files(sample.root) if "hello" in name}
    assert changed == {"docs/hello.md", "docs/proofs/hello.json"}


def test_floors_can_be_chosen(building: Sample) -> None:
    file = building.root / "pyproject.toml"
    file.write_text(PYPROJECT + 'floors = ["page", "test"]\n', encoding="utf-8")
    site = building.site
    load_site.__globals__["_load_site"].cache_clear()
    assert scaffold.floors(load_site(site.root), "articles/two") == ["page", "test"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            PYPROJECT + 'floors = ["page", "cellar"]\n',
            "[tool.mdproof] floors names 'cellar'; known are: page, module, test, reference",
        ),
        (
            '[tool.mdproof]\nfloors = ["page", "test"]\n',
            "[tool.mdproof] floors: a module needs `source` and `packages`",
        ),
    ],
)
def test_floors_that_cannot_be_built_are_refused(
    building: Sample, settings: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (building.root / "pyproject.toml").write_text(settings, encoding="utf-8")
    assert cli.main(["new", "articles/two", "--title", "Two"]) == 2
    assert capsys.readouterr().err == message + "\n"
    assert not (building.root / "docs/articles/two.md").exists()


@pytest.mark.parametrize(
    "floor",
    [
        "docs/articles/two.md",
        "src/sample/articles/two.py",
        "tests/articles/test_two.py",
        "docs/reference/articles/two.md",
    ],
)
def test_a_floor_that_is_there_is_refused_and_nothing_is_written(
    building: Sample, floor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (building.root / floor).parent.mkdir(parents=True, exist_ok=True)
    (building.root / floor).write_text("mine\n", encoding="utf-8")
    before = files(building.root)
    assert cli.main(["new", "articles/two", "--title", "Two"]) == 2
    assert capsys.readouterr().err == f"{floor} is there already: nothing was written\n"
    assert files(building.root) == before


@pytest.mark.parametrize(
    ("room", "title", "message"),
    [
        ("other/two", "Two", "there is no wing 'other' for the room 'two'; wings are: articles"),
        ("two", "Two", "there is no wing '' for the room 'two'; wings are: articles"),
        (
            "articles/Two_x",
            "Two",
            "'Two_x' is no name for a wing or a room: small letters and digits, words joined by "
            "hyphens, and no word of Python",
        ),
        (
            "articles/class",
            "Two",
            "'class' is no name for a wing or a room: small letters and digits, words joined by "
            "hyphens, and no word of Python",
        ),
        (
            "../out",
            "Two",
            "'..' is no name for a wing or a room: small letters and digits, words joined by "
            "hyphens, and no word of Python",
        ),
        ("articles/two", "Two\nlines", "a title is one line of text"),
        ("articles/two", "  ", "a title is one line of text"),
    ],
)
def test_names_that_make_no_sense_are_refused(
    building: Sample, room: str, title: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(building.root)
    assert cli.main(["new", room, "--title", title]) == 2
    assert capsys.readouterr().err == message + "\n"
    assert files(building.root) == before


def test_what_was_written_is_taken_back_when_the_disk_is_full(
    building: Sample, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(building.root)
    folders = {path for path in building.root.rglob("*") if path.is_dir()}
    write = scaffold.write_bytes

    def full(file: Path, data: bytes) -> None:
        if file.name == "mkdocs.yml":
            raise OSError("no space left on device")
        write(file, data)

    monkeypatch.setattr(scaffold, "write_bytes", full)
    assert cli.main(["new", "articles/two", "--title", "Two"]) == 2
    assert capsys.readouterr().err == "nothing was written: no space left on device\n"
    assert files(building.root) == before
    assert {path for path in building.root.rglob("*") if path.is_dir()} == folders


def test_a_copy_of_this_repository_keeps_its_layout(tmp_path: Path) -> None:
    for name in ("docs", "src", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "proofs", "vendor")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("mkdocs.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, "-m", *command)
        return subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )

    made = call("mdproof", "new", "large-models/a-new-room", "--title", "一个新房间：它讲什么")
    assert made.returncode == 0, made.stderr
    layout = call("pytest", "tests/test_layout.py", "-q", "-p", "no:cacheprovider")
    assert layout.returncode == 0, layout.stdout
    test = call("pytest", "tests/large_models/test_a_new_room.py", "-q", "-p", "no:cacheprovider")
    assert "NotImplementedError: zhizhi.large_models.a_new_room.a_new_room is not" in test.stdout
    assert "1 failed" in test.stdout
    ruff = [str(Path(sys.executable).parent / "ruff"), "check", "--no-cache", "src", "tests"]
    told = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout
    assert call("mdproof", "lint", "--no-types", "large-models/a-new-room.md").returncode == 0


# The nav.


def nav_of(text: str) -> list:
    return yaml.safe_load(text)["nav"]


def test_a_page_goes_behind_the_last_of_its_folder_in_their_style() -> None:
    text = "nav:\n  - a.md\n  - One: w/a.md\n  - Two: w/b.md\n  - z.md\nother: 1\n"
    assert insert(text, "w/c.md", "Three") == text.replace(
        "  - z.md", "  - Three: w/c.md\n  - z.md"
    )
    assert insert(text, "c.md") == text.replace("  - z.md\n", "  - z.md\n  - c.md\n")


def test_a_new_folder_gets_a_section() -> None:
    text = "nav:\n  - a.md\n  - Reference:\n      - reference/index.md\n"
    new = insert(text, "reference/w/a.md", "a")
    assert nav_of(new) == [
        "a.md",
        {"Reference": ["reference/index.md", {"w": [{"a": "reference/w/a.md"}]}]},
    ]
    new = insert(text, "w/a.md")
    assert {"w": ["w/a.md"]} in nav_of(new)


def test_ends_of_lines_and_comments_stay() -> None:
    text = "nav:  # order\r\n  # first\r\n  - a.md\r\n\r\n# after\r\nother: 1\r\n"
    assert insert(text, "b.md") == text.replace("  - a.md\r\n", "  - a.md\r\n  - b.md\r\n")


def test_a_file_without_nav_stays_as_it_is() -> None:
    assert insert("site_name: x\n", "b.md") == "site_name: x\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nav: [a.md]\n", "the nav of mkdocs.yml is not a list of lines: add w/b.md to it"),
        (
            "nav:\n  - One: |\n      - w/a.md\n",
            "the nav of mkdocs.yml cannot be extended by a line: add w/b.md to it",
        ),
    ],
)
def test_a_nav_that_lines_cannot_extend_is_left_alone(text: str, message: str) -> None:
    with pytest.raises(NavError) as caught:
        insert(text, "w/b.md")
    assert str(caught.value) == message


def test_an_article_is_begun_and_the_nav_is_left_to_the_author(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    text = MKDOCS + "nav: [index.md]\n"
    (sample.root / "mkdocs.yml").write_text(text, encoding="utf-8")
    assert cli.main(["new", "articles/two", "--title", "Two"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "the nav of mkdocs.yml is not a list of lines: add articles/two.md to it"
    )
    assert (sample.root / "mkdocs.yml").read_text(encoding="utf-8") == text
