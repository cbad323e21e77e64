"""A line break inside Chinese text leaves no space; elsewhere it stays."""

import pytest
from markdown import markdown


@pytest.mark.parametrize(
    ("source", "html"),
    [
        ("甲\n乙", "<p>甲乙</p>"),
        ("甲，\n乙", "<p>甲，乙</p>"),
        ("甲，\nDPO 丙", "<p>甲，DPO 丙</p>"),
        ("DPO\n（丙）", "<p>DPO（丙）</p>"),
        ("甲\nDPO 丙", "<p>甲\nDPO 丙</p>"),
        ("one\ntwo", "<p>one\ntwo</p>"),
        ("甲\n[乙](x.md)\n丙", '<p>甲<a href="x.md">乙</a>丙</p>'),
        ("甲。\n*two*\n丙", "<p>甲。<em>two</em>\n丙</p>"),
        ("甲\n`x`\n丙", "<p>甲\n<code>x</code>\n丙</p>"),
        ("“甲”\n乙", "<p>“甲”乙</p>"),
    ],
)
def test_a_line_break_between_chinese_characters_is_no_space(source: str, html: str) -> None:
    assert markdown(source, extensions=["mdproof.chinese"]) == html


def test_code_keeps_its_lines() -> None:
    html = markdown("    甲\n    乙\n", extensions=["mdproof.chinese"])
    assert html == "<pre><code>甲\n乙\n</code></pre>"
