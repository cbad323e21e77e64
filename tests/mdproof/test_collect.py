"""Every fence that a reader sees is collected, with its line; what is lost is an error."""

import textwrap

import pytest
from tests.mdproof.conftest import Sample

from mdproof.errors import PageError


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
