"""One room, one name on every floor; imports run downhill."""

import ast
from pathlib import Path

import pytest

from mdproof.article import read_article
from mdproof.overview import reading_order
from mdproof.site import load_site

ROOT = Path(__file__).parents[1]
WINGS = ["python", "deep_learning", "reinforcement_learning", "large_models", "generative_models"]
SITE = load_site(ROOT)


def modules() -> list[Path]:
    """Return the public modules, kernels included."""
    return [
        path.relative_to(ROOT / "src/zhizhi")
        for path in sorted((ROOT / "src/zhizhi").glob("*/*.py"))
        if not path.stem.startswith("_")
    ]


def rooms() -> list[tuple[str, str]]:
    """Return wing and room of each public module that is not the kernel of another."""
    return [(path.parent.name, path.stem) for path in modules() if not is_kernel(path)]


def is_kernel(path: Path) -> bool:
    return path.stem.endswith("_triton")


def dashed(name: str) -> str:
    return name.replace("_", "-")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name of what is imported"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_wings_are_the_folders() -> None:
    found = {
        path.name for path in (ROOT / "src/zhizhi").iterdir() if (path / "__init__.py").is_file()
    }
    assert found == set(WINGS)
    assert {dashed(wing) for wing in WINGS} == set(SITE.articles)


@pytest.mark.parametrize(("wing", "room"), rooms())
def test_a_module_has_a_page_a_test_and_a_reference(wing: str, room: str) -> None:
    wanted = [
        f"docs/reference/{dashed(wing)}/{dashed(room)}.md",
        f"tests/{wing}/test_{room}.py",
    ]
    assert [path for path in wanted if not (ROOT / path).is_file()] == []
    if not (ROOT / f"docs/{dashed(wing)}/{dashed(room)}.md").is_file():  # then others explain it
        shown = f'source="zhizhi.{wing}.{room}.'
        pages = [(ROOT / "docs" / page).read_text(encoding="utf-8") for page in SITE.pages()]
        assert any(shown in text for text in pages), f"no page shows {wing}/{room}"


@pytest.mark.parametrize("path", [path for path in modules() if is_kernel(path)], ids=str)
def test_a_kernel_stands_beside_its_definition_and_on_its_page(path: Path) -> None:
    wing, room = path.parent.name, path.stem.removesuffix("_triton")
    assert (wing, room) in rooms()
    assert (ROOT / f"tests/{wing}/test_{path.stem}.py").is_file()
    reference = ROOT / f"docs/reference/{dashed(wing)}/{dashed(room)}.md"
    assert f"::: zhizhi.{wing}.{path.stem}\n" in reference.read_text(encoding="utf-8")


def test_a_reference_page_describes_the_module_of_its_name() -> None:
    folder = ROOT / "docs/reference"
    found = {path.relative_to(folder).as_posix() for path in folder.glob("*/*.md")}
    assert found == {f"{dashed(wing)}/{dashed(room)}.md" for wing, room in rooms()}
    for wing, room in rooms():
        text = (folder / dashed(wing) / f"{dashed(room)}.md").read_text(encoding="utf-8")
        for line in (f"::: zhizhi.{wing}.{room}", f"[[usage: zhizhi.{wing}.{room}]]"):
            assert f"\n{line}\n" in text, f"{wing}/{room}: no `{line}`"


def test_every_article_is_in_the_reading_order_of_its_wing() -> None:
    for wing in SITE.articles:
        found = [page for page in SITE.pages() if page.startswith(f"{wing}/")]
        assert sorted(reading_order(SITE, wing)) == [
            page for page in found if SITE.is_article(page)
        ]


def test_the_reading_order_puts_prerequisites_first() -> None:
    for wing in SITE.articles:
        order = reading_order(SITE, wing)
        for position, page in enumerate(order):
            for room in read_article(SITE, page).prerequisites:
                if room.startswith(f"{wing}/"):
                    assert f"{room}.md" in order[:position], f"{page} stands before {room}"


@pytest.mark.parametrize("path", modules(), ids=str)
def test_a_module_imports_from_its_own_wing_or_a_lower_one(path: Path) -> None:
    height = WINGS.index(path.parent.name)
    for name in imported(ROOT / "src/zhizhi" / path):
        parts = name.split(".")
        assert parts[0] != "mdproof", f"{path} imports {name}"
        if parts[0] == "zhizhi":
            assert WINGS.index(parts[1]) <= height, f"{path} imports {name} from above"
            if not is_kernel(path):
                assert not any(part.endswith("_triton") for part in parts), f"{path}: {name}"


def test_the_engine_imports_neither_the_package_nor_torch() -> None:
    for path in sorted((ROOT / "src/mdproof").rglob("*.py")):
        if "triton" in path.relative_to(ROOT / "src/mdproof").parts:
            continue  # the adapter for kernels loads when a page uses it
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"zhizhi", "torch", "triton"}, path


def test_an_init_file_holds_a_docstring_and_nothing_else() -> None:
    for path in sorted((ROOT / "src/zhizhi").rglob("__init__.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, path
        assert isinstance(body[0], ast.Expr), path
