r"""Formulas on a page: where they are found, where a dollar is a dollar, what stops the build."""

import contextlib
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markdown import Markdown

from mdproof.errors import PageError
from mdproof.maths import plain_inline, render_inline

EXTENSIONS = [
    "admonition",
    "attr_list",
    "footnotes",
    "md_in_html",
    "tables",
    "toc",
    "pymdownx.betterem",
    "pymdownx.details",
    "pymdownx.superfences",
    "pymdownx.tabbed",
    "mdproof.maths",
]


@pytest.fixture
def site(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text("site_name: x\ntheme: {language: zh}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def convert(site: Path, text: str, page: str = "room.md") -> str:
    file = site / "docs" / page
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    md = Markdown(
        extensions=EXTENSIONS, extension_configs={"pymdownx.tabbed": {"alternate_style": True}}
    )
    md.mdproof_page = page
    return md.convert(text)


def formulas(text: str) -> list[str]:
    """Return the formulas of a page as the text of their MathML."""
    return [
        "".join(ElementTree.fromstring(found).itertext())
        for found in re.findall(r"<math\b.*?</math>", text, re.DOTALL)
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("其中 $x_1*y_2*z_3$ 表示", ["x1∗y2∗z3"]),
        ("**粗 $a$ 体** 与 *斜 $b$*", ["a", "b"]),
        ("$a<b$ 与 $c>d$", ["a<b", "c>d"]),
        ("[链接 $x$](other.md)", ["x"]),
        ("- 一 $a$\n- 二 $b$", ["a", "b"]),
        ("> 引 $q$", ["q"]),
        ("## 标题 $h$", ["h"]),
        ('!!! note "题 $a$"\n    文 $b$', ["a", "b"]),
        ("??? tip\n    $$\n    b\n    $$", ["b"]),
        ('=== "甲 $a$"\n\n    $$ b $$\n', ["a", "b"]),
        (
            "| $a$ | b |\n| --- | --- |\n| $\\lVert c\\rVert$ | $p(x\\mid y)$ |",
            ["a", "∥c∥", "p(x∣y)"],
        ),
        ("脚注[^1]\n\n[^1]: 见 $n$", ["n"]),
        ("<div markdown>\n\n$$\nd\n$$\n\n</div>", ["d"]),
        ("1. 项\n\n    $$\n    a\n    $$\n\n    续 $b$\n\n2. 项", ["a", "b"]),
        ("- 项\n    $$\n    z\n    $$", ["z"]),
        ("> $$\n> E > 0\n> $$", ["E>0"]),
        ("段落\n$$\nk\n$$\n之后 $m$", ["k", "m"]),
        ("$$ one $$", ["one"]),
        ("第一 $a$ 行\n第二 $b\n+c$ 行", ["a", "b+c"]),
    ],
)
def test_a_formula_is_found_wherever_text_is(site, text, found):
    assert formulas(convert(site, text)) == found


@pytest.mark.parametrize(
    "text",
    [
        "`$x$`",
        "```python\ncost = '$x$'\n```",
        "```text\n$$\nx\n$$\n```",
        "    $$\n    x\n    $$",
        r"价格 \$5 和 \$6",
        "从 $5 到 $10",
        "5$ 与 6$",
        "单个 $ 不动",
    ],
)
def test_a_dollar_is_a_dollar(site, text):
    done = convert(site, text)
    assert formulas(done) == []
    assert done.count("$") == text.count("$")
    assert r"\$" not in done


def test_a_list_goes_on_behind_a_display_equation(site):
    done = convert(site, "1. 一\n\n    $$\n    a\n    $$\n\n    续\n\n2. 二\n")
    assert done.count("<ol>") == 1
    assert done.count("<li>") == 2


def test_a_heading_has_a_plain_name_and_an_id_from_it(site):
    file = site / "docs" / "room.md"
    text = "## 式 $\\hat A_t$ 的含义\n\n## 式 $\\hat A_t$ 的含义\n\n## 别的 {#own}\n"
    file.write_text(text)
    md = Markdown(extensions=EXTENSIONS)
    md.mdproof_page = "room.md"
    done = md.convert(text)
    assert [token["name"] for token in md.toc_tokens] == [*["式 A\u0302_t 的含义"] * 2, "别的"]
    ids = [token["id"] for token in md.toc_tokens]
    assert len(set(ids)) == 3
    assert all(f'id="{name}"' in done for name in ids)
    assert "katex" not in "".join(ids)


def test_in_an_attribute_stands_text(site):
    done = convert(site, '![图中 $\\pi_\\theta$](a.png)\n\n<span title="$x_1$">一</span>')
    assert 'alt="图中 π_θ"' in done
    assert 'title="x_1"' in done


def test_a_converter_may_be_used_again(site):
    md = Markdown(extensions=EXTENSIONS)
    md.mdproof_page = "room.md"
    (site / "docs" / "room.md").write_text("$a$ $b$")
    assert formulas(md.convert("$a$")) == ["a"]
    assert formulas(md.reset().convert("$b$")) == ["b"]
    assert "mdproof-maths:" not in md.reset().convert("## $a$\n\n$b$")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("# x\n\n好。\n\n$$\na\n+ \\foo\n$$\n", 7, r"KaTeX: Undefined control sequence: \foo"),
        ("# x\n\n一\n二 $\\frac{a}$ 三\n", 4, "KaTeX: Unexpected end of input"),
        ("# x\n\n> $$\n> a\n> \\foo\n> $$\n", 5, "KaTeX: Undefined control sequence"),
        ("# x\n\n- 项\n\n    $$\n    \\foo\n    $$\n", 6, "KaTeX: Undefined control sequence"),
        ("# x\n\n$$\na \\label{eq:x} \\foo\n$$\n", 4, "KaTeX: Undefined control sequence"),
        ("# x\n\n$$\na\n\nb\n$$\n", 3, "`$$` is not closed"),
        ("# x\n\n行内 $$x$$ 不行\n", 3, "`$$` stands alone on its lines"),
        ("# x\n\n$$\n\\begin{align}a\\end{align}\n$$\n", 4, "inside `$$` write aligned, not align"),
        ("# x\n\n$$\na\\label{eq:x}\\label{eq:y}\n$$\n", 4, "one display equation has one label"),
        ("# x\n\n$$\na\\label{eq:x}\\tag{2}\n$$\n", 4, r"an equation has a \label or a \tag"),
        ("# x\n\n$x\\label{eq:x}$\n", 3, "only a display equation has a label"),
        ("# x\n\n$$\na \\\\ b\n$$\n", 4, "KaTeX: a line break needs aligned"),
    ],
)
def test_a_mistake_stops_the_build_with_its_line(site, text, line, message):
    with pytest.raises(PageError) as caught:
        convert(site, text, "wing/room.md")
    assert str(caught.value).startswith(f"docs/wing/room.md:{line}: {message}")
    assert "\n" not in str(caught.value)


def test_while_fences_are_collected_nothing_is_set(site):
    md = Markdown(extensions=EXTENSIONS)
    md.mdproof_page, md.mdproof_collecting = "room.md", True
    (site / "docs" / "room.md").write_text("x")
    assert "katex" not in md.convert("## $\\foo$\n\n$$\n\\bar \\label{eq:x}\n$$\n\n式 (eq:none)")


def test_macros_come_from_the_settings(site):
    (site / "pyproject.toml").write_text("[tool.mdproof.macros]\n'\\KL' = '\\mathrm{KL}'\n")
    assert formulas(convert(site, "$\\KL$")) == ["KL"]


def test_results_are_kept_in_the_folder_of_the_site(site):
    convert(site, "$\\mathfrak{kept}$")
    assert list((site / ".cache" / "mdproof" / "katex").rglob("*.html"))


def test_a_description_is_set_by_itself(site):
    done = render_inline(r"一句 <话>，$\beta$ 与 `$x$`，\$5。")
    assert formulas(done) == ["β"]
    assert done.startswith("一句 &lt;话&gt;，")
    assert done.endswith(" 与 <code>$x$</code>，$5。")
    assert plain_inline(r"见 $\pi_\theta$，`a_b`，\$5") == "见 π_θ，a_b，$5"


def test_without_a_site_a_formula_is_set_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert formulas(Markdown(extensions=["mdproof.maths"]).convert("$x$\n\n$$ y $$")) == ["x", "y"]
    assert formulas(render_inline("$z$")) == ["z"]


@pytest.mark.parametrize("text", ["$" * 3000, "$a " * 3000, "\\$" * 3000, "$`" * 3000])
def test_odd_dollars_take_no_time(site, text):
    start = time.perf_counter()
    with contextlib.suppress(PageError):
        convert(site, text)
    assert time.perf_counter() - start < 3
