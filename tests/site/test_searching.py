"""Search finds the page that a reader means: Chinese, English, identifiers and their parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Open = Callable[..., Any]
QUERIES = yaml.safe_load((Path(__file__).parent / "queries.yml").read_text(encoding="utf-8"))
TOP = 3


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
    expected = [case["page"]] if isinstance(case["page"], str) else case["page"]
    found = results(case["query"])[:TOP]  # one item a page
    assert set(found) & set(expected), f"{case['query']}: found {found}"


def test_there_are_enough_queries() -> None:
    assert len(QUERIES) >= 30


def test_the_search_opens_by_keyboard(open_page: Open) -> None:
    page = open_page(search=True)
    page.keyboard.press("/")
    page.wait_for_function("document.activeElement?.classList.contains('md-search__input')")
    page.keyboard.type("dpo")
    page.locator(".md-search-result__item").first.wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**/dpo/**")
