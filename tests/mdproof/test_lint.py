"""What the linter and the type checker say about a page stands at the line of the Markdown file."""

import shutil
from pathlib import Path

import pytest
from tests.mdproof.conftest import PYPROJECT, Sample

from mdproof import cli, tools
from mdproof.lint import lint_pages
from mdproof.program import find_fence, make_program
from mdproof.site import load_site
from mdproof.typecheck import check_types

RUFF = '\n[tool.ruff.lint]\nselect = ["B", "E", "F", "I", "N", "SIM"]\n'
FENCE = "```python\n{}\n```\n"


def lint(sample: Sample, text: str, page: str = "page.md") -> list[str]:
    file = sample.root / "pyproject.toml"
    if RUFF not in file.read_text(encoding="utf-8"):
        file.write_text(PYPROJECT + RUFF, encoding="utf-8")
    sample.write(text, page)
    return [str(finding) for finding in lint_pages(sample.site, [page])]


def types(sample: Sample, text: str, settings: str = "") -> list[str]:
    file = sample.root / "pyproject.toml"
    text_ = PYPROJECT + 'types = "pyrefly"\n' + settings
    file.write_text(text_, encoding="utf-8")
    site = sample.site.__class__(
        **{**vars(sample.site), "settings": {**sample.site.settings, **_settings(text_)}}
    )
    sample.write(text)
    return [str(finding) for finding in check_types(site, ["page.md"])]


def _settings(text: str) -> dict:
    import tomllib

    return tomllib.loads(text)["tool"]["mdproof"]


def test_an_error_has_the_line_and_the_column_of_the_markdown_file(sample: Sample) -> None:
    text = "# Title\n\ntext\n\n" + FENCE.format("a = 1\n\n\ndef f():\n    b = 2")
    text += "\n- item\n\n    ```python\n    if a == None:\n        print(a)\n    ```\n"
    assert lint(sample, text) == [
        "docs/page.md:10:5: F841 Local variable `b` is assigned to but never used",
        "docs/page.md:16:13: E711 Comparison to `None` should be `cond is None`",
    ]


def test_names_of_earlier_blocks_are_defined_and_later_ones_are_not(sample: Sample) -> None:
    text = FENCE.format("import os\n\na = 1") + FENCE.format("print(a, os.sep, later)")
    text += FENCE.format("later = 1")
    assert lint(sample, text) == ["docs/page.md:7:18: F821 Undefined name `later`"]
    assert lint(sample, FENCE.format("print(nowhere)")) == [
        "docs/page.md:2:7: F821 Undefined name `nowhere`"
    ]


def test_what_is_normal_on_a_page_is_no_error(sample: Sample) -> None:
    text = FENCE.format("a = 1\nprint(a)\na")
    text += '```python source="sample.shapes.area"\n```\n\n'
    text += FENCE.format("import math\n\nfrom sample.shapes import area\n\narea(\n    math.pi,\n)")
    text += "```pycon\n>>> import sys\n>>> a\n1\n>>> sys.maxsize > a\nTrue\n```\n"
    assert lint(sample, text, "a-page.md") == []


def test_an_expression_whose_value_is_lost_is_an_error(sample: Sample) -> None:
    text = FENCE.format("a = [1]\na\na == [2]\nb = 2")
    assert lint(sample, text) == [
        "docs/page.md:3:1: B018 Found useless expression. Either assign it to a variable or "
        "remove it.",
        "docs/page.md:4:1: B015 Pointless comparison. Did you mean to assign a value? Otherwise, "
        "prepend `assert` or remove it.",
    ]


def test_an_import_that_no_block_uses_is_an_error_in_its_own_line(sample: Sample) -> None:
    # A block imports what it uses, though another has: what a function uses later counts as well.
    text = FENCE.format("import math") + "\n" + FENCE.format("import math\n\nprint(math.pi)")
    assert lint(sample, text) == []
    assert lint(sample, FENCE.format("import math")) == [
        "docs/page.md:2:8: F401 `math` imported but unused"
    ]


def test_the_imports_of_each_block_are_sorted_by_themselves(sample: Sample) -> None:
    good = FENCE.format("import sys") + FENCE.format("import os\n\n\ndef f():\n    return os, sys")
    assert lint(sample, good) == []
    text = FENCE.format("import abc") + FENCE.format("import sys\nimport os\n\nprint(abc, os, sys)")
    assert lint(sample, text) == [
        "docs/page.md:5:1: I001 Import block is un-sorted or un-formatted"
    ]
    wrong = FENCE.format("import sys\nimport os\n\nprint(os, sys)")
    assert lint(sample, wrong) == [
        "docs/page.md:2:1: I001 Import block is un-sorted or un-formatted"
    ]


def test_a_block_that_is_not_formatted_is_an_error(sample: Sample) -> None:
    assert lint(sample, "text\n\n" + FENCE.format("a = {'b':1}")) == [
        "docs/page.md:4:1: format the block is not formatted: run `mdproof format`"
    ]


def test_a_syntax_error_is_found_and_one_on_purpose_is_not(sample: Sample) -> None:
    found = lint(sample, FENCE.format("a = = 1"))
    assert found[0] == "docs/page.md:2:5: invalid-syntax Expected an expression"
    purpose = (
        '```python raises="SyntaxError"\na = = 1\n```\n```python norun="a part"\nx = = 2\n```\n'
    )
    assert lint(sample, purpose + FENCE.format("a = 1")) == []


def test_a_comment_silences_a_rule_as_everywhere(sample: Sample) -> None:
    assert lint(sample, FENCE.format("import math  # noqa: F401")) == []


def test_an_error_in_a_snippet_is_told_at_its_fence(sample: Sample) -> None:
    code = "import math\n\n\ndef f():\n    pass\n"
    (sample.root / "part.py").write_text(code, encoding="utf-8")
    text = "text\n\n```python\n--8<-- 'part.py'\n```\n\n" + FENCE.format("a = f == None")
    assert lint(sample, text) == [
        "docs/page.md:3:8: F401 `math` imported but unused",
        "docs/page.md:8:10: E711 Comparison to `None` should be `cond is None`",
    ]


def test_every_line_of_a_program_is_the_line_of_the_file(sample: Sample) -> None:
    text = "# T\n\n> ```python\n>\n> a = 1\n>\n> b = a\n> ```\n\n" + FENCE.format("\nc = b\n")
    blocks = sample.collect(text).blocks
    program = make_program(sample.site, blocks, excused=False)
    lines = text.split("\n")
    assert all(find_fence(lines, block) is not None for block in blocks)
    for number, line in enumerate(program.text.split("\n"), 1):
        place = program.place(number)
        if line and not line.startswith("#"):
            assert place is not None
            assert place.line == number
            assert lines[number - 1][place.column :] == line


def test_types_are_checked_over_the_whole_page_and_told_at_the_line(sample: Sample) -> None:
    text = "text\n\n" + FENCE.format("def f(x: int) -> str:\n    return str(x)")
    text += "\n- item\n\n    ```python\n    f('a').upper()\n    ```\n"
    assert types(sample, text) == [
        "docs/page.md:11:7: bad-argument-type Argument `Literal['a']` is not assignable to "
        "parameter `x` with type `int` in function `f`"
    ]


def test_types_of_the_sites_own_package_are_known(sample: Sample) -> None:
    (sample.root / "src/sample/typed.py").write_text(
        '"""Typed."""\n\n\ndef half(x: float) -> float:\n    """Halve."""\n    return x / 2\n',
        encoding="utf-8",
    )
    text = '```python source="sample.typed.half"\n```\n\n' + FENCE.format("half(1.0).upper()")
    assert types(sample, text) == [
        "docs/page.md:5:1: missing-attribute Object of class `float` has no attribute `upper`"
    ]


def test_what_is_wrong_on_purpose_or_not_run_is_not_type_checked(sample: Sample) -> None:
    text = '```python raises="TypeError"\n"a" + 1\n```\n\n```python norun="far"\n"a" + 1\n```\n'
    assert types(sample, text) == []


def test_a_kind_of_error_is_left_out_by_name_or_by_its_message(sample: Sample) -> None:
    text = FENCE.format('"a".nope\n(1).nope')
    assert len(types(sample, text)) == 2
    kept = types(sample, text, 'types_ignore = ["missing-attribute: class `int`"]\n')
    assert [line.split(": ")[0] for line in kept] == ["docs/page.md:2:1"]
    assert types(sample, text, 'types_ignore = ["missing-attribute"]\n') == []


def test_types_are_off_unless_asked_for_and_an_unknown_checker_is_refused(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.write(FENCE.format('"a" + 1'))
    assert check_types(sample.site, ["page.md"]) == []
    load_site.__globals__["_load_site"].cache_clear()
    file = sample.root / "pyproject.toml"
    file.write_text(PYPROJECT + 'types = "mypy"\n', encoding="utf-8")
    line = file.read_text(encoding="utf-8").split("\n").index('types = "mypy"') + 1
    assert cli.main(["lint"]) == 2
    assert capsys.readouterr().err == (
        f"pyproject.toml:{line}: [tool.mdproof] types is 'mypy'; known are none, pyrefly\n"
    )


def test_the_command_prints_what_it_found_and_fails(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.write(FENCE.format("import math"))
    assert cli.main(["lint", "docs/page.md"]) == 1
    told = capsys.readouterr()
    assert told.out == "docs/page.md:2:8: F401 `math` imported but unused\n"
    assert told.err == "1 errors on 1 pages\n"
    sample.write(FENCE.format("a = 1"))
    assert cli.main(["lint"]) == 0
    assert capsys.readouterr() == ("", "")


def test_without_pyrefly_the_command_says_what_to_install(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sample.root / "pyproject.toml"
    file.write_text(PYPROJECT + 'types = "pyrefly"\n', encoding="utf-8")
    sample.write("no code\n")
    monkeypatch.setattr(tools.sys, "executable", str(sample.root / "python"))
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/true" if name == "ruff" else None)
    assert cli.main(["lint"]) == 2
    assert capsys.readouterr().err == (
        "`mdproof lint` with types needs pyrefly, which is not installed: pip install pyrefly\n"
    )


def test_a_checker_that_fails_and_says_nothing_is_one_line(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PYPROJECT + 'types = "pyrefly"\n\n[tool.pyrefly]\nproject-includes = 3\n'
    (sample.root / "pyproject.toml").write_text(text, encoding="utf-8")
    sample.write(FENCE.format("a = 1"))
    assert cli.main(["lint"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyrefly failed: ")
    assert error.count("\n") == 1


def test_the_pages_of_this_site_are_clean() -> None:
    site = load_site(Path(__file__).parents[2])
    assert lint_pages(site, site.pages()) == []
