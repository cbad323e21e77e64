"""Every fence that a reader sees is collected, with its line; what is lost is an error."""

import textwrap

import pytest
from tests.mdproof.conftest import Sample

from mdproof.errors import PageError
from mdproof.site import _load_site


def page(text: str) -> str:
    return textwrap.dedent(text).lstrip("\n")


SHAPES = {
    "plain": "```python\na = 1\n```\n",
    "title and lines": '```python title="x.py" hl_lines="1" linenums="1"\na = 1\n```\n',
    "attribute list": '```{.python .extra #named title="x"}\na = 1\n```\n',
    "tildes": "~~~python\na = 1\n~~~\n",
    "four backticks": "````python\na = 1\n````\n",
    "py": "```py\na = 1\n```\n",
    "python3": "```python3\na = 1\n```\n",
    "admonition": "!!! note\n    ```python\n    a = 1\n    ```\n",
    "details": '??? note "more"\n    ```python\n    a = 1\n    ```\n',
    "tab": '=== "one"\n    ```python\n    a = 1\n    ```\n',
    "list": "- item\n\n    ```python\n    a = 1\n    ```\n",
    "numbered list": "1. item\n\n    ```python\n    a = 1\n    ```\n",
    "quote": "> ```python\n> a = 1\n> ```\n",
    "footnote": "text[^1]\n\n[^1]:\n    note\n\n    ```python\n    a = 1\n    ```\n",
    "crlf": "```python\r\na = 1\r\n```\r\n",
    "bom": "\ufeff```python\na = 1\n```\n",
    "front matter": "---\ntitle: x\n---\n\n```python\na = 1\n```\n",
    "tab in a tab": '=== "a"\n    !!! tip\n        ```python\n        a = 1\n        ```\n',
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fence_is_collected_in_every_shape_it_takes(sample: Sample, shape: str) -> None:
    text = SHAPES[shape]
    blocks = sample.collect(text).blocks
    assert [block.code for block in blocks] == ["a = 1"]
    lines = text.replace("\r\n", "\n").split("\n")
    assert "a = 1" in lines[blocks[0].first - 1]


def test_a_fence_inside_a_longer_fence_is_text_and_not_a_block(sample: Sample) -> None:
    found = sample.collect("````markdown\n```python\na = 1\n```\n````\n")
    assert found.blocks == []
    assert found.listings == [("markdown", 1)]


def test_listings_in_other_languages_are_counted_with_their_line(sample: Sample) -> None:
    found = sample.collect(
        "```bash\nls\n```\n\n```mermaid\ngraph LR\n```\n\n```python\na = 1\n```\n"
    )
    assert found.listings == [("bash", 1)]
    assert [(block.index, block.line) for block in found.blocks] == [(1, 9)]


def test_a_snippet_is_expanded_and_its_block_found_again_behind_it(sample: Sample) -> None:
    (sample.root / "part.md").write_text("one\n\ntwo\n", encoding="utf-8")
    blocks = sample.collect('--8<-- "part.md"\n\n```python\na = 1\n```\n').blocks
    assert blocks[0].line == 3


WRONG = {
    "unknown option": ('x\n\n```python titel="x"\na = 1\n```\n', 3, 'unknown fence option "titel"'),
    "no value": ("```python norun\na = 1\n```\n", 1, 'fence option "norun" needs a value'),
    "not a number": (
        '```python tol="wide"\na = 1\n```\n',
        1,
        'tol="wide" is not a positive number',
    ),
    "contradiction": (
        '```python norun="x" raises="ValueError"\na = 1\n```\n',
        1,
        'a fence with "norun" has no output',
    ),
    "not closed": ("text\n\n```python\na = 1\n", 3, "this fence is not closed"),
    "malformed": ("text\n\n```python title=x\na = 1\n```\n", 3, "its options are malformed"),
    "no language": ("text\n\n```\na = 1\n```\n", 3, "a code block needs a language"),
    "indented": ("text\n\n    a = 1\n", 3, "a code block needs a language"),
    "fence in indented code": (
        "text\n\n        ```python\n        a = 1\n        ```\n",
        3,
        "indented",
    ),
    "empty": ("```python\n```\n", 1, "this fence is empty"),
    "full source fence": (
        '```python source="sample.shapes.area"\na\n```\n',
        1,
        "a source fence is",
    ),
    "no such object": (
        'x\n\n```python source="sample.shapes.volume"\n```\n',
        3,
        'source="sample.shapes.volume": sample.shapes has no volume',
    ),
    "no such module": ('```python source="sample.forms.area"\n```\n', 1, "forms"),
    "not a name": ('```python source="area"\n```\n', 1, "is not a dotted name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_fence_that_makes_no_sense_is_one_line_with_file_and_line(
    sample: Sample, case: str
) -> None:
    text, line, message = WRONG[case]
    with pytest.raises(PageError) as error:
        sample.collect(text)
    assert str(error.value).startswith(f"docs/page.md:{line}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_utf_8_is_one_line_with_the_line_of_the_bad_byte(sample: Sample) -> None:
    (sample.root / "docs/page.md").write_bytes("好\n\n".encode() + b"\xff\xfe bad\n")
    with pytest.raises(PageError, match=r"^docs/page\.md:3: the file is not UTF-8$"):
        sample.collect_written()


def test_an_article_without_a_field_is_one_line_with_file_and_line(sample: Sample) -> None:
    with pytest.raises(PageError, match=r"^docs/articles/a\.md:\d+: .*`date`"):
        sample.collect("---\ntitle: A\n---\n\n# A\n\n```python\na = 1\n```\n", "articles/a.md")


def test_a_source_fence_shows_the_object_and_stands_for_its_import(sample: Sample) -> None:
    block = sample.collect('```python source="sample.shapes.area"\n```\n').blocks[0]
    assert block.kind == "source"
    assert block.code == "from sample.shapes import area"
    assert block.shown.startswith("def area(r):")


def test_a_second_superfences_does_not_take_the_fences_away(sample: Sample) -> None:
    """`pymdownx.extra` brings one, which takes the place of the first."""
    settings = sample.root / "mkdocs.yml"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace("  - mdproof", "  - pymdownx.extra\n  - mdproof"))
    assert len(sample.collect("```python\na = 1\n```\n").blocks) == 1


def test_a_second_superfences_behind_the_engine_is_refused(sample: Sample) -> None:
    settings = sample.root / "mkdocs.yml"
    settings.write_text(settings.read_text(encoding="utf-8") + "  - pymdownx.extra\n")
    with pytest.raises(PageError) as error:
        sample.collect("```python\na = 1\n```\n")
    assert str(error.value) == (
        "mkdocs.yml:1: markdown_extensions: list pymdownx.superfences before mdproof.markdown"
    )


def test_extensions_may_be_given_as_a_table(sample: Sample) -> None:
    settings = sample.root / "mkdocs.yml"
    settings.write_text(
        "site_name: x\nmarkdown_extensions:\n  pymdownx.snippets: {base_path: [parts]}\n"
        "  pymdownx.superfences:\n  mdproof.markdown:\n"
    )
    (sample.root / "parts").mkdir()
    (sample.root / "parts/a.md").write_text("```python\na = 1\n```\n")
    assert [block.code for block in sample.collect('--8<-- "a.md"\n').blocks] == ["a = 1"]


INCLUDE = """
from markdown import Extension
from markdown.preprocessors import Preprocessor

class Include(Preprocessor):
    def run(self, lines):
        text = ["```python", "a = 1", "```", "", "/// tip", ""]
        return [out for line in lines for out in (text if line == "{* it *}" else [line])]

class IncludeExtension(Extension):
    def extendMarkdown(self, md):
        md.preprocessors.register(Include(md), "include", 101)

def makeExtension(**options):
    return IncludeExtension(**options)
"""


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("{* it *}\n", [1]),
        (
            "a\n\n{* it *}\n\n/// tip\n\nb\n\n{* it *}\n\n/// tip\n\n```python\na = 1\n```\n",
            [3, 9, 13],
        ),
    ],
)
def test_an_include_of_an_unknown_kind_brings_blocks_at_its_line(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, text: str, lines: list[int]
) -> None:
    settings = sample.root / "mkdocs.yml"
    settings.write_text(settings.read_text(encoding="utf-8") + "  - include_of_a_kind\n")
    (sample.root / "src/include_of_a_kind.py").write_text(INCLUDE)
    monkeypatch.syspath_prepend(sample.root / "src")
    assert [block.line for block in sample.collect(text).blocks] == lines


LENIENT = {
    "no language": ("```\na\n```\n", 0, [("", 1)]),
    "another runner's option": ('```{.python test="skip"}\na = 1\n```\n', 1, []),
    "another name of Python": ("```ipython\nIn [1]: a\n```\n", 0, [("ipython", 1)]),
    "empty": ("```python\n```\n", 1, []),
    "a shell that starts Python": ("```console\n$ python\n>>> 1\n```\n", 0, [("console", 1)]),
    "indented": ("text\n\n    a = 1\n", 0, [("", 3)]),
}


@pytest.mark.parametrize("case", LENIENT)
def test_a_lenient_site_keeps_its_habits(sample: Sample, case: str) -> None:
    text, blocks, listings = LENIENT[case]
    with pytest.raises(PageError):
        sample.collect(text)
    settings = sample.root / "pyproject.toml"
    settings.write_text(settings.read_text() + "lenient = true\n")
    _load_site.cache_clear()
    found = sample.collect(text)
    assert len(found.blocks) == blocks
    assert found.listings == listings


def test_a_lenient_site_is_told_of_a_fence_that_is_not_closed(sample: Sample) -> None:
    settings = sample.root / "pyproject.toml"
    settings.write_text(settings.read_text() + "lenient = true\n")
    with pytest.raises(PageError, match=r"^docs/page\.md:3: this fence is not closed"):
        sample.collect("text\n\n```python\na = 1\n")
