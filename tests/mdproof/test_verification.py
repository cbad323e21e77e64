"""The public record shows every page, how it was verified, and every excuse with its reason."""

import re
from pathlib import Path

import pytest
from tests.mdproof.conftest import MKDOCS, Sample

from mdproof import standing, verification
from mdproof.collect import make_pipeline
from mdproof.proof import load_proof, save_proof
from mdproof.site import load_site

PAGE = "# A | title\n\n```python\na = 1\n```\n\n```python\nprint(a + 1)\n```\n"
EXCUSED = (
    '\n```python norun="needs *eight* <GPUs>, $x_0$ and `a_b`"\nb\n```\n'
    '\n```python varies="a clock"\nprint(a)\n```\n'
)


def record(sample: Sample) -> str:
    text = (sample.root / "mkdocs.yml").read_text(encoding="utf-8")
    if "mdproof.directives" not in text:
        extra = "  - md_in_html\n  - mdproof.directives\n"
        (sample.root / "mkdocs.yml").write_text(MKDOCS + extra, encoding="utf-8")
        load_site.__globals__["_load_site"].cache_clear()
    sample.write("[[verification]]\n", "about.md")
    md = make_pipeline(load_site(sample.root))
    md.mdproof_collecting, md.mdproof_page = False, "about.md"  # type: ignore[attr-defined]
    return md.convert("[[verification]]\n")


def cells(html: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [
        [
            re.sub(r"<[^>]+>", "", cell).strip()
            for cell in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row)
        ]
        for row in rows
    ]


def test_a_page_says_how_with_which_versions_when_and_how_long(sample: Sample) -> None:
    sample.prove("# One\n\n```python\nimport numpy\n\nprint(numpy.zeros(1))\n```\n")
    proof = load_proof(sample.site, "page.md")
    assert proof is not None
    ways = ["interpreter", "cpu", "sm_100", "sm_90"]
    proof.blocks[0] |= {"date": "2026-01-02", "seconds": 1.25, "python": "3.11.7"}
    proof.blocks[0]["verified"] = [
        {"how": "compiled", "target": way} if way.startswith("sm_") else {"how": way}
        for way in ways
    ] + [{"how": "device", "device": "H100"}]
    save_proof(sample.site, proof)
    (_, row) = cells(record(sample))
    numpy = proof.blocks[0]["libraries"]["numpy"]
    how = f"CPU · 解释器 · sm_90/100 · H100 · numpy {numpy} · Python 3.11.7"
    assert row == ["One", "1 / 1", how, "2026-01-02", "1.2 秒"]


def test_every_excuse_has_block_line_kind_and_reason(sample: Sample) -> None:
    sample.prove(PAGE + EXCUSED)
    html = record(sample)
    assert "<b>4</b> 代码段" in html
    assert "<b>2</b> 已验证" in html
    assert "<b>2</b> 例外" in html
    assert "待验证" not in html
    items = re.findall(r"<li>(.*?)</li>", html)
    assert items == [
        '<a href="page.md#block-3">第 3 段</a>（第 11 行）不运行：needs *eight* &lt;GPUs&gt;, '
        "$x_0$ and <code>a_b</code>",
        '<a href="page.md#block-4">第 4 段</a>（第 15 行）不比对：a clock',
    ]


def test_a_new_kind_of_excuse_shows_up_by_its_name(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample.prove(PAGE)
    monkeypatch.setattr(standing, "excuses", lambda options: {"moonlight": "only at night"})
    assert "moonlight：only at night" in record(sample)


def test_blocks_that_check_nothing_are_listed(sample: Sample) -> None:
    sample.prove(PAGE)
    assert "没有检验的代码段" not in record(sample)
    sample.prove("```python\nunseen = 1\n```\n")
    html = record(sample)
    assert "没有检验的代码段" in html
    assert '<a href="page.md#block-1">第 1 段</a>' in html


def test_stale_and_forged_pages_are_not_called_verified(sample: Sample) -> None:
    sample.prove(PAGE, "forged.md")
    sample.prove(PAGE)
    sample.write(PAGE.replace("a + 1", "a + 2"))
    file = sample.root / "docs/proofs/forged.json"
    file.write_text(file.read_text().replace('"2\\n"', '"3\\n"'), encoding="utf-8")
    html = record(sample)
    _, forged, page = cells(html)
    assert forged[1:3] == [
        "0 / 2",
        "docs/proofs/forged.json: the proof does not match its seal: it was edited by hand",
    ]
    assert page[1:3] == ["1 / 2", "1 段待验证 · CPU"]
    assert "<b>1</b> 已验证" in html
    assert "<b>3</b> 待验证" in html


def test_titles_with_bars_do_not_break_the_table(sample: Sample) -> None:
    sample.prove(PAGE)
    assert cells(record(sample))[1][0] == "A | title"


def test_the_language_of_the_theme_decides(sample: Sample) -> None:
    text = MKDOCS.replace("language: zh", "language: en") + "  - md_in_html\n"
    (sample.root / "mkdocs.yml").write_text(text + "  - mdproof.directives\n", encoding="utf-8")
    sample.prove(PAGE + EXCUSED)
    html = record(sample)
    assert "block 3</a> (line 11), not run: needs" in html
    assert not re.search(r"[㐀-鿿]", html)


def test_markdown_in_a_reason_is_text() -> None:
    assert verification.escape("a_b [c](d) <e> $x_0$ `f_g`") == (
        "a\\_b \\[c\\](d) &lt;e\\> $x_0$ `f_g`"
    )


def test_this_site_shows_every_page_that_has_blocks() -> None:
    site = load_site(Path(__file__).parents[2])
    lines = verification.write_verification(site, lambda page: page, lambda page, n: f"{page}#{n}")
    text = "\n".join(lines)
    for wing in site.articles:
        for page in site.pages():
            if page.startswith(f"{wing}/") and site.is_article(page):
                assert f"]({page})" in text
