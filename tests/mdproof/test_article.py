"""The front matter is checked, and a mistake is reported with its line."""

import datetime
from pathlib import Path

import pytest

from mdproof.article import list_articles, read_article
from mdproof.errors import PageError
from mdproof.site import Site

FIELDS = ("title", "date", "updated", "tags", "description", "prerequisites")
GOOD = {
    "title": "DPO：把奖励藏进策略",
    "date": "2026-11-20",
    "updated": "2026-11-21",
    "tags": "[对齐, RLHF]",
    "description": "温度 $\\beta$ 决定走多远。",
    "prerequisites": "[python/autograd]",
}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path, tmp_path / "docs", articles=("llm", "python"), front_matter=FIELDS)
    write(site, "python/autograd.md", {**GOOD, "prerequisites": "[]", "updated": "2026-11-20"})
    return site


def write(site: Site, page: str, fields: dict[str, str], body: str | None = None) -> None:
    path = site.docs / page
    path.parent.mkdir(parents=True, exist_ok=True)
    front = "".join(f"{name}: {value}\n" for name, value in fields.items())
    body = f"\n# {fields.get('title', '')}\n\ntext\n" if body is None else body
    path.write_text(f"---\n{front}---\n{body}", encoding="utf-8")


def test_a_correct_article_is_read(site: Site) -> None:
    write(site, "llm/dpo.md", GOOD)
    article = read_article(site, "llm/dpo.md")
    assert article.title == GOOD["title"]
    assert article.date == datetime.date(2026, 11, 20)
    assert article.updated == datetime.date(2026, 11, 21)
    assert article.tags == ("对齐", "RLHF")
    assert article.description == GOOD["description"]
    assert article.prerequisites == ("python/autograd",)
    assert (article.room, article.wing) == ("llm/dpo", "llm")
    text = (site.docs / "llm/dpo.md").read_text(encoding="utf-8")
    assert "\n".join(text.split("\n")[article.body_line - 1 :]) == article.body


def test_articles_come_newest_first(site: Site) -> None:
    write(site, "llm/dpo.md", GOOD)
    assert [article.page for article in list_articles(site)] == ["llm/dpo.md", "python/autograd.md"]


def test_a_page_that_is_no_article_needs_no_front_matter(site: Site) -> None:
    (site.docs / "index.md").write_text("# 首页\n", encoding="utf-8")
    assert read_article(site, "index.md").title == ""


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_named(site: Site, name: str) -> None:
    fields = {key: value for key, value in GOOD.items() if key != name}
    write(site, "llm/dpo.md", fields, body=f"# {GOOD['title']}\n")
    with pytest.raises(PageError) as caught:
        read_article(site, "llm/dpo.md")
    assert str(caught.value).startswith(f"docs/llm/dpo.md:7: the front matter lacks `{name}`: ")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("date", "yesterday", "`date` must be a date such as 2026-11-21; it is 'yesterday'."),
        ("date", "2026-13-01", "`date`: month must be in 1..12"),
        ("updated", "2026-11-21 10:00:00", "`updated` must be a date"),
        ("updated", "2026-11-19", "`updated` 2026-11-19 is before `date` 2026-11-20."),
        ("tags", "RLHF", "`tags` must be a list of words"),
        ("tags", "[RLHF, 3]", "`tags` must be a list of words"),
        ("description", "", "it is nothing."),
        ("description", "DPO: what", "front matter: mapping values are not allowed"),
        ("prerequisites", "[llm/ppo]", "prerequisite `llm/ppo`: there is no page docs/llm/ppo.md."),
        ("prerequisites", "[llm/dpo]", "`llm/dpo` is its own prerequisite."),
        ("prerequisites", "", "`prerequisites` must be a list of rooms"),
    ],
)
def test_a_wrong_field_is_reported_on_its_line(
    site: Site, name: str, value: str, message: str
) -> None:
    write(site, "llm/dpo.md", {**GOOD, name: value})
    line = list(GOOD).index(name) + 2
    with pytest.raises(PageError) as caught:
        read_article(site, "llm/dpo.md")
    assert str(caught.value).startswith(f"docs/llm/dpo.md:{line}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(("value", "quoted"), [("a: b", True), ("[a", False), ("'a", False)])
def test_only_a_colon_brings_the_advice_to_quote(site: Site, value: str, quoted: bool) -> None:
    path = site.docs / "llm/dpo.md"
    path.parent.mkdir()
    path.write_text(f"---\ntitle: {value}\n---\n# a\n", encoding="utf-8")
    with pytest.raises(PageError) as caught:
        read_article(site, "llm/dpo.md")
    assert "front matter: " in str(caught.value)
    assert ("(quote a value that holds `: `)" in str(caught.value)) == quoted


def test_a_field_that_stands_twice_is_refused(site: Site) -> None:
    path = site.docs / "llm/dpo.md"
    path.parent.mkdir()
    path.write_text("---\ntitle: a\ntitle: b\n---\n# a\n", encoding="utf-8")
    with pytest.raises(PageError, match=r"dpo.md:3: `title` stands twice, first on line 2\."):
        read_article(site, "llm/dpo.md")


def test_an_article_without_front_matter_is_refused(site: Site) -> None:
    path = site.docs / "llm/dpo.md"
    path.parent.mkdir()
    path.write_text("# a\n", encoding="utf-8")
    with pytest.raises(PageError, match=r"docs/llm/dpo.md:1: no front matter; an article needs "):
        read_article(site, "llm/dpo.md")


def test_an_open_front_matter_is_refused(site: Site) -> None:
    path = site.docs / "llm/dpo.md"
    path.parent.mkdir()
    path.write_text("---\ntitle: a\n", encoding="utf-8")
    with pytest.raises(PageError, match=r"docs/llm/dpo.md:1: the front matter is not closed"):
        read_article(site, "llm/dpo.md")


def test_the_heading_must_be_the_title(site: Site) -> None:
    write(site, "llm/dpo.md", GOOD, body="\n# DPO\n")
    with pytest.raises(PageError, match=r"docs/llm/dpo.md:10: the page must open with its title"):
        read_article(site, "llm/dpo.md")
