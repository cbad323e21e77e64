"""Directives become Markdown; a mistake is one line with file and line."""

import json
import os
import re
from pathlib import Path

import pytest

from mdproof import overview
from mdproof.errors import PageError
from mdproof.proof import SCHEMA, Proof, save_proof
from mdproof.site import Site, load_site

FIELDS = '["title", "date", "updated", "tags", "description", "prerequisites"]'
MKDOCS = """\
site_name: S
theme: {name: material, language: LANGUAGE}
markdown_extensions: [attr_list, def_list, md_in_html, tables, pymdownx.superfences, EXTENSIONS]
nav:
  - 首页: index.md
  - 大模型: [llm/index.md, llm/dpo.md, llm/ppo.md]
"""
PYPROJECT = f"""\
[project]
name = "pack"
version = "1"
[tool.mdproof]
source = ["src"]
packages = ["pack"]
articles = ["llm"]
front_matter = {FIELDS}
"""
MODULE = '''\
"""Losses."""


def loss(x):
    """Return the loss.

    >>> loss(1)
    1
    """
    return x


def unused(x):
    return x


def _private(x):
    return x
'''
TESTS = """\
import pytest
from pack.llm.dpo import loss
from pack.llm import dpo


def helper(x):
    return loss(x)


def test_loss_is_small():
    assert loss(1) == 1  # (eq:dpo-loss)


def test_through_a_helper():
    assert helper(1) == 1


def test_by_the_module():
    assert dpo.loss(1) == 1


def test_something_else():
    assert True
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    write(tmp_path, "mkdocs.yml", mkdocs("zh"))
    write(tmp_path, "pyproject.toml", PYPROJECT)
    write(tmp_path, "src/pack/__init__.py", '"""Pack."""\n')
    write(tmp_path, "src/pack/llm/__init__.py", '"""Wing."""\n')
    write(tmp_path, "src/pack/llm/dpo.py", MODULE)
    write(tmp_path, "tests/test_dpo.py", TESTS)
    article(tmp_path, "ppo", "PPO：剪切", "2026-11-20", '```python norun="no GPU"\ntrain()\n```\n')
    fence = '```python source="pack.llm.dpo.loss"\n```\n\n```python\nprint(1)\n```\n'
    article(tmp_path, "dpo", "DPO：偏好", "2026-11-21", fence, prerequisites="[llm/ppo]")
    write(tmp_path, "docs/index.md", "# 首页\n")
    monkeypatch.chdir(tmp_path)
    return load_site(tmp_path)


def mkdocs(language: str) -> str:
    extensions = "mdproof.markdown, mdproof.directives"
    return MKDOCS.replace("LANGUAGE", language).replace("EXTENSIONS", extensions)


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def article(
    root: Path, room: str, title: str, date: str, body: str, prerequisites: str = "[]"
) -> None:
    front = f"title: {title}\ndate: {date}\nupdated: {date}\ntags: [甲, 乙]\n"
    front += f"description: 关于 $x$ 的 {room}。\nprerequisites: {prerequisites}\n"
    write(root, f"docs/llm/{room}.md", f"---\n{front}---\n\n# {title}\n\n{body}")


def render(site: Site, page: str, text: str) -> str:
    from mdproof.collect import make_pipeline

    md = make_pipeline(site)
    md.mdproof_collecting = False  # type: ignore[attr-defined]
    md.mdproof_page = page  # type: ignore[attr-defined]
    return md.convert(text)


def test_latest_lists_the_newest_first_with_its_facts(site: Site) -> None:
    html = render(site, "index.md", "[[latest: 10]]")
    assert html.index("llm/dpo.md") < html.index("llm/ppo.md")
    for part in ("大模型", "2026-11-21", "关于 $x$ 的 dpo。", "约 1 分钟", "2 段代码待验证"):
        assert part in html
    assert "llm/ppo.md" not in render(site, "index.md", "[[latest: 1]]")


def test_reading_order_follows_the_nav_and_names_prerequisites(site: Site) -> None:
    html = render(site, "llm/index.md", "[[reading-order: llm]]")
    assert html.index("../llm/dpo.md") < html.index('class="article-number">2<')
    assert '先读：<a href="../llm/ppo.md">PPO</a>' in html


def test_usage_names_articles_and_tests(site: Site) -> None:
    html = render(site, "reference/llm/dpo.md", "[[usage: pack.llm.dpo]]")
    first, second = html.split("unused", 1)
    assert '<a href="../../llm/dpo.md">DPO：偏好</a>' in first
    assert "第 1 段" in first
    assert "3 项测试" in first
    assert "文档字符串里的例子随测试运行。" in first
    assert "文档字符串里的例子随测试运行。" not in second
    for name in ("loss is small (eq:dpo-loss)", "through a helper", "by the module"):
        assert f"<li>{name}</li>" in first
    assert "something else" not in html
    assert "还没有文章用到它。" in second
    assert "没有直接的测试。" in second
    assert "_private" not in html


def test_verification_counts_and_gives_reasons(site: Site) -> None:
    html = render(site, "about.md", "[[verification]]")
    assert html.count("<tr>") == 3  # heading, two pages
    assert "不运行：no GPU" in html
    assert "llm/ppo.md#block-1" in html
    assert "<b>3</b> 代码段" in html
    assert "<b>1</b> 例外" in html
    assert "<b>3</b> 待验证" in html
    assert "<td>0 / 2</td>" in re.sub(r"<td[^>]*>", "<td>", html)
    assert html.index("PPO：剪切") > html.index("DPO：偏好")  # the order of the nav


def test_an_article_shows_its_facts_below_the_title(site: Site) -> None:
    html = render(site, "llm/dpo.md", "# DPO：偏好\n\ntext\n")
    assert html.index("</h1>") < html.index("发表于") < html.index("<p>text</p>")
    assert "标签：甲、乙" in html


def test_the_words_follow_the_language(tmp_path: Path, site: Site) -> None:
    english = tmp_path / "english"
    write(english, "mkdocs.yml", mkdocs("en"))
    write(english, "pyproject.toml", PYPROJECT)
    article(english, "ppo", "PPO", "2026-11-20", "")
    os.chdir(english)
    assert "1 min read · <" in render(load_site(english), "index.md", "[[latest: 1]]")


def test_a_stale_block_is_never_counted_as_verified(site: Site) -> None:
    (site.docs / "proofs/llm").mkdir(parents=True)
    record = {"key": "old", "modules": [], "entered": [], "files": [], "libraries": {}, "names": {}}
    save_proof(site, Proof("llm/dpo.md", [{**record, "date": "2026-11-21"}] * 2))
    state = overview.read_state(site, "llm/dpo.md")
    assert (state.passed, state.stale, state.date) == (0, 2, "")


def test_a_forged_proof_is_reported(site: Site) -> None:
    file = site.docs / "proofs/llm/dpo.json"
    write(site.root, "docs/proofs/llm/dpo.json", json.dumps({"schema": SCHEMA, "seal": "x"}))
    assert file.is_file()
    with pytest.raises(PageError, match=r"docs/llm/dpo.md:1: .*docs/proofs/llm/dpo.json"):
        overview.read_state(site, "llm/dpo.md")


@pytest.mark.parametrize(
    ("directive", "message"),
    [
        ("[[newest: 3]]", "`[[newest]]` is no directive; there are: latest, modules, pages, "),
        ("[[latest: many]]", "`[[latest]]` needs a number of articles"),
        ("[[latest]]", "`[[latest]]` needs a number of articles"),
        ("[[reading-order: nowhere]]", "the nav of mkdocs.yml has no article of `nowhere`"),
        ("[[usage: pack.llm.dop]]", "did you mean dpo?"),
        ("[[usage: pack.llm.dpo.loss]]", "pack.llm.dpo.loss is a function; give a module."),
        ("[[verification: all]]", "`[[verification]]` takes no argument."),
        ("[[pages: nowhere]]", "`[[pages]]` there is no folder 'nowhere'."),
    ],
)
def test_a_mistake_is_reported_with_file_and_line(site: Site, directive: str, message: str) -> None:
    text = f"# 首页\n\n```text\n[[latest: 2]]\n```\n\n{directive}\n"
    write(site.root, "docs/index.md", text)
    with pytest.raises(PageError) as caught:
        render(site, "index.md", text)
    assert str(caught.value).startswith("docs/index.md:7: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_only_looks_like_a_directive_is_left_alone(site: Site) -> None:
    text = "x = [[1, 2]] 与 [[latest: 3]]\n\n```text\n[[latest: 3]]\n```\n"
    html = render(site, "index.md", text)
    assert "article-list" not in html
