"""Search finds the page that a reader means: Chinese, English, identifiers and their parts."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mdproof.search import VERSION

Open = Callable[..., Any]
QUERIES = yaml.safe_load((Path(__file__).parent / "queries.yml").read_text(encoding="utf-8"))
TOP = 3


def wanted(case: dict[str, Any]) -> set[str]:
    """The pages of which one should be found."""
    return {case["page"]} if isinstance(case["page"], str) else set(case["page"])


def type_in(page: Any, text: str) -> None:
    """Type as with an input method: the text is there at once, then a key goes up."""
    box = page.locator(".md-search__input")
    box.click()
    box.fill(text)
    box.dispatch_event("keyup")


@pytest.fixture(scope="module")
def results(browser: Any, served: str) -> Any:
    """Ask the search box, and return the pages it offers, best first."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="zh-CN")
    page = context.new_page()
    page.goto(served)
    box = page.locator(".md-search__input")
    box.click()

    def ask(query: str) -> list[str]:
        for text in ("", query):
            box.fill(text)
            box.dispatch_event("keyup")
            page.wait_for_function(
                """waiting => {
                  const said = document.querySelector(".md-search-result__meta").textContent.trim();
                  const found = document.querySelectorAll(".md-search-result__item").length;
                  const idle = said.includes("键入以开始搜索") || said.includes("正在初始化");
                  return waiting ? idle && !found : !idle;
                }""",
                arg=not text,
            )
        found = page.evaluate(
            """[...document.querySelectorAll(".md-search-result__item")].map(
              (item) => item.querySelector(".md-search-result__link").pathname
            )"""
        )
        return [path.strip("/") for path in found]

    yield ask
    context.close()


@pytest.mark.parametrize("case", QUERIES, ids=lambda case: case["query"])
def test_the_page_is_among_the_first_three(results: Any, case: dict[str, Any]) -> None:
    found = results(case["query"])[:TOP]  # one item a page
    assert set(found) & wanted(case), f"{case['query']}: found {found}"


def test_nine_times_in_ten_it_is_the_first(results: Any) -> None:
    missed = [
        case["query"] for case in QUERIES if not wanted(case) & set(results(case["query"])[:1])
    ]
    assert len(missed) <= 0.1 * len(QUERIES), missed


def test_there_are_enough_queries() -> None:
    assert len({case["query"] for case in QUERIES}) == len(QUERIES) >= 150


def test_a_query_loads_little(open_page: Open, built: Path) -> None:
    page = open_page(search=True)
    bodies: list[str] = []
    page.on("response", lambda response: bodies.append(response.url))
    type_in(page, "注意力")
    page.locator(".md-search-result__item").first.wait_for()
    files = {built / "search" / url.split("/search/")[1] for url in bodies if "/search/" in url}
    assert any(file.parent.name == "terms" for file in files)
    files |= {built / "search" / name for name in ("search_index.json", f"{VERSION}/pages.json")}
    assert sum(len(gzip.compress(file.read_bytes())) for file in files) < 150_000


def test_a_result_shows_the_section_and_marks_the_words(open_page: Open) -> None:
    page = open_page(search=True)
    type_in(page, "奖励模型")
    first = page.locator(".md-search-result__item").first
    first.locator("mark", has_text="奖励模型").first.wait_for()
    assert first.locator("h1").inner_text()
    assert first.locator("h2").count() >= 1
    page.keyboard.press("Enter")
    page.wait_for_url("**/large-models/dpo/**")
    page.locator(
        ".md-content mark", has_text="奖励模型"
    ).first.wait_for()  # marked on the page as well


def test_on_a_phone_the_results_fill_the_screen(open_page: Open) -> None:
    page = open_page(width=390, height=850, search=True)
    page.locator("label[for=__search]:visible").first.click()
    type_in(page, "奖励模型")
    page.locator(".md-search-result__item").first.wait_for()
    page.wait_for_function(
        "document.querySelector('.md-search__scrollwrap').getBoundingClientRect().height > 700"
    )


def test_nothing_found_is_said(open_page: Open) -> None:
    page = open_page(search=True)
    type_in(page, "阿司匹林")
    page.locator(".md-search-result__meta", has_text="没有找到").wait_for()


def test_a_formula_is_shown_once(built: Path) -> None:
    texts = (built / "search" / VERSION / "text").glob("*.json")
    found = "".join(text.read_text(encoding="utf-8") for text in texts)
    assert "ε2=0" in found
    assert "ε2=0ε2=0" not in found


def test_the_search_opens_by_keyboard(open_page: Open) -> None:
    page = open_page(search=True)
    page.keyboard.press("/")
    page.wait_for_function("document.activeElement?.classList.contains('md-search__input')")
    page.keyboard.type("dpo")
    page.locator(".md-search-result__item").first.wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**/dpo/**")
