"""The formatter changes what stands between the fences, and not one byte elsewhere."""

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.mdproof.conftest import Sample
from tests.mdproof.test_run import records

from mdproof import cli, tools
from mdproof.collect import collect
from mdproof.formatting import format_page, write_formatted
from mdproof.proof import block_code

UGLY = "x = {'a':1}\nprint( x['a'] )"
NEAT = 'x = {"a": 1}\nprint(x["a"])'


def formatted(sample: Sample, text: str) -> str:
    page = sample.write(text)
    write_formatted(sample.site, format_page(sample.site, page))
    return (sample.root / "docs" / page).read_bytes().decode()


def fenced(code: str, prefix: str = "", end: str = "\n", opening: str = "```python") -> str:
    lines = [opening, *code.split("\n"), "```"]
    return "".join((prefix + line).rstrip(" \t") + end for line in lines)


SHAPES = {
    "plain": ("", ""),
    "list": ("- item\n\n", "    "),
    "admonition": ("!!! note\n\n", "    "),
    "details": ('??? note "more"\n\n', "    "),
    "tab": ('=== "one"\n\n', "    "),
    "tab in a tab": ('=== "a"\n\n    !!! tip\n\n', "        "),
    "indented by a tab": ("- item\n\n", "\t"),
    "quotation": ("", "> "),
    "list in a quotation": ("> - item\n>\n", ">     "),
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_is_formatted_where_it_stands(sample: Sample, shape: str, end: str) -> None:
    above, prefix = SHAPES[shape]
    code = "def f( a ):\n    return  a\n\n\nprint( f(1) )"
    neat = "def f(a):\n    return a\n\n\nprint(f(1))"
    before = f"text\n\n{above}".replace("\n", end)
    after = f"\ntext  \n\n\n{'~' * 3}text\n a  =1\n~~~\n".replace("\n", end)
    text = before + fenced(code, prefix, end) + after
    assert formatted(sample, text) == before + fenced(neat, prefix, end) + after


def test_sessions_source_fences_listings_and_code_that_is_no_python_stay(sample: Sample) -> None:
    text = (
        "```pycon\n>>> x = {'a':1}\n```\n\n"
        '```python source="sample.shapes.area"\n```\n\n'
        "```text\nx = {'a':1}\n```\n\n"
        "```python raises=\"SyntaxError\"\nx = = {'a':1}\n```\n"
    )
    assert formatted(sample, text) == text


def test_a_byte_order_mark_and_a_missing_last_newline_stay(sample: Sample) -> None:
    text = "\ufeff" + fenced(UGLY).removesuffix("\n")
    assert formatted(sample, text) == "\ufeff" + fenced(NEAT).removesuffix("\n")


def test_a_string_that_is_the_value_of_its_block_is_not_taken_for_a_docstring(
    sample: Sample,
) -> None:
    text = fenced("'''  two\n  lines  '''")
    assert formatted(sample, text) == text


def test_code_from_a_snippet_is_reported_and_not_rewritten(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    (sample.root / "part.py").write_text(UGLY + "\n", encoding="utf-8")
    text = "text\n\n```python\n--8<-- 'part.py'\n```\n"
    sample.write(text)
    assert cli.main(["format"]) == 1
    assert capsys.readouterr().out == "docs/page.md:3: not formatted, and comes from a snippet\n"
    assert (sample.root / "docs/page.md").read_text(encoding="utf-8") == text


def test_check_and_diff_change_nothing_and_say_what_would_change(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "text\n\n" + fenced(UGLY)
    sample.write(text)
    assert cli.main(["format", "--check"]) == 1
    assert capsys.readouterr().out == "docs/page.md:4: not formatted\n"
    assert cli.main(["format", "--diff", "docs/page.md"]) == 1
    assert capsys.readouterr().out == (
        "--- docs/page.md\n+++ docs/page.md (formatted)\n@@ -1,6 +1,6 @@\n text\n \n ```python\n"
        "-x = {'a':1}\n-print( x['a'] )\n+x = {\"a\": 1}\n+print(x[\"a\"])\n ```\n"
    )
    assert (sample.root / "docs/page.md").read_text(encoding="utf-8") == text
    assert cli.main(["format"]) == 0
    assert capsys.readouterr().out == "docs/page.md: 1 blocks formatted\n"
    assert cli.main(["format", "--check"]) == 0
    assert capsys.readouterr().out == ""


def test_a_proof_holds_after_formatting(sample: Sample) -> None:
    page = fenced("y=  2") + "\n" + fenced("x = {'a':y} # why\nprint( x['a'] )")
    assert sample.prove(page).failures == {}
    shown = records(sample)
    neat = fenced("y = 2") + "\n" + fenced('x = {"a": y}  # why\nprint(x["a"])')
    assert formatted(sample, page) == neat
    run = sample.open()
    assert run.stale == ["", ""]
    from mdproof.prove import check_block, check_copy

    for block in run.blocks:
        assert check_block(run, block) is None
        assert check_copy(run, block) is None
    assert records(sample) == shown


def test_a_copy_whose_code_is_another_is_not_the_recorded_one(sample: Sample) -> None:
    from mdproof.copy import build_copy, is_recorded

    assert sample.prove(fenced("x = 1  # one")).failures == {}
    (record,) = records(sample)
    for code, same in (("x  =  1", True), ("x = 1.0", False)):
        blocks = sample.collect(fenced(code)).blocks
        copy = build_copy(sample.site, blocks, level="slice", libraries={})
        assert is_recorded(sample.site, blocks, record, copy) is same


def test_a_file_keeps_its_mode(sample: Sample) -> None:
    sample.write(fenced(UGLY))
    file = sample.root / "docs/page.md"
    file.chmod(0o600)
    assert cli.main(["format"]) == 0
    assert file.stat().st_mode & 0o777 == 0o600


def test_without_ruff_the_command_says_what_to_install(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.write(fenced(UGLY))
    monkeypatch.setattr(tools.sys, "executable", str(sample.root / "python"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cli.main(["format"]) == 2
    assert capsys.readouterr().err == (
        "`mdproof format` needs ruff, which is not installed: pip install ruff\n"
    )
    assert cli.main(["lint"]) == 2
    assert capsys.readouterr().err == (
        "`mdproof lint` needs ruff, which is not installed: pip install ruff\n"
    )


def test_a_mistake_in_ruffs_settings_is_one_line(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.write(fenced(UGLY))
    (sample.root / "ruff.toml").write_text('line-length = "x"\n', encoding="utf-8")
    assert cli.main(["format"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ruff failed: ")
    assert error.count("\n") == 1


# Whatever stands around the fences: the rest of the file is the same bytes.

_PROSE = st.sampled_from(
    ["", "text", "  trailing  ", "# Title", "| a | b |", "`x = {'a':1}`", "a\ttab", "---", "“引号”"]
)
_CODE = st.sampled_from(
    [
        UGLY,
        "y = 1",
        "",
        "def f( a,\n   b ):\n\n\n\n    return ( a )",
        "s = '''\n\n  kept  \n'''",
        "import  os\nfrom sys import( path )",
        "x = 1 # a\n\n\n\n\ny=2",
        "'alone'",
        "x = = 1",
        "f'{ 1  = }'",
    ]
)
_WHERE = st.sampled_from(list(SHAPES.values()))
_KIND = st.sampled_from(["```python", "```py", '```python title="a b"', "```text", "```{.python}"])


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    parts=st.lists(st.tuples(_PROSE, _WHERE, _KIND, _CODE), min_size=1, max_size=4),
    end=st.sampled_from(["\n", "\r\n"]),
    front=st.sampled_from(["", "\ufeff", "---\ntitle: a\n---\n\n"]),
)
def test_nothing_else_of_the_file_changes(
    sample: Sample, parts: list[tuple[str, tuple[str, str], str, str]], end: str, front: str
) -> None:
    text = front.replace("\n", end)
    for prose, (above, prefix), opening, code in parts:
        if not code and opening != "```text":
            code = "pass"
        text += (prose + "\n\n" + above).replace("\n", end)
        text += fenced(code, prefix, end, opening) + end + "<!-- -->" + end + end
    page = sample.write(text)
    before = collect(sample.site, page).blocks
    new = formatted(sample, text)
    after = collect(sample.site, page).blocks
    assert outside(new) == outside(text)
    assert [block_code(block) for block in after] == [block_code(block) for block in before]
    assert formatted(sample, new) == new


def outside(text: str) -> str:
    """Return a file without what stands between its fences of Python."""
    inside = re.compile(
        r"(^[ \t>]*```(?:py|\{\.py)[^\n]*\n).*?(^[ \t>]*```\r?$)", re.DOTALL | re.MULTILINE
    )
    return inside.sub(r"\1\2", text)


def test_the_pages_of_this_site_are_formatted() -> None:
    from mdproof.site import load_site

    site = load_site(Path(__file__).parents[2])
    for page in site.pages():
        assert format_page(site, page).changed == (), page
