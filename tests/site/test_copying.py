"""The copy buttons put on the clipboard exactly the text that is tested."""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdproof.site import load_site

Open = Callable[..., Any]
ROOT = Path(__file__).parents[2]
PAGE = "large-models/dpo"
READ = "navigator.clipboard.readText()"
RUNNABLE = re.compile(r'<button[^>]*class="mdproof-copy"[^>]*data-mdproof-copy="([^"]*)"')


def articles() -> list[str]:
    site = load_site(ROOT)
    return [page for page in site.pages() if site.is_article(page)]


def open_with_clipboard(open_page: Open, path: str) -> Any:
    page = open_page(path)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    return page


@pytest.mark.parametrize(
    "selector", [".mdproof-copy:not(.mdproof-copy--bare)", ".mdproof-copy--bare"]
)
def test_a_button_puts_its_text_on_the_clipboard(open_page: Open, selector: str) -> None:
    page = open_with_clipboard(open_page, f"{PAGE}/")
    buttons = page.locator(f".mdproof-actions .mdproof-copy{selector}")
    assert buttons.count() > 3
    for position in (0, buttons.count() - 1):
        button = buttons.nth(position)
        before = button.bounding_box()
        button.click()
        page.wait_for_function(
            "node => node.dataset.mdproofDone === 'true'", arg=button.element_handle()
        )
        assert page.evaluate(READ) == button.get_attribute("data-mdproof-copy")
        after = button.bounding_box()
        assert abs(after["width"] - before["width"]) < 1, "the button jumped"
        assert abs(after["height"] - before["height"]) < 1, "the button jumped"
    page.wait_for_function("document.getElementById('mdproof-status')?.textContent === '已复制'")


def test_copying_works_where_the_clipboard_is_not_offered(open_page: Open) -> None:
    page = open_with_clipboard(open_page, f"{PAGE}/")
    page.evaluate("Object.defineProperty(window, 'isSecureContext', { get: () => false })")
    button = page.locator(".mdproof-actions .mdproof-copy").first
    button.click()
    page.wait_for_function(
        "node => node.dataset.mdproofDone === 'true'", arg=button.element_handle()
    )
    assert page.evaluate(READ) == button.get_attribute("data-mdproof-copy")


def test_copying_works_after_instant_navigation_and_by_keyboard(open_page: Open) -> None:
    page = open_with_clipboard(open_page, "")
    page.evaluate("window.sameDocument = true")
    page.locator(".md-tabs a", has_text="大模型").first.click()  # home shows the latest only
    page.locator("a.article-title[href*='dpo']").first.click()
    button = page.locator(".mdproof-actions .mdproof-copy").first
    button.wait_for()
    assert page.evaluate("window.sameDocument"), "navigation was not instant"
    button.focus()
    page.keyboard.press("Enter")
    page.wait_for_function(
        "node => node.dataset.mdproofDone === 'true'", arg=button.element_handle()
    )
    assert page.evaluate(READ) == button.get_attribute("data-mdproof-copy")


def test_an_ordinary_listing_can_be_copied(open_page: Open) -> None:
    page = open_with_clipboard(open_page, "about/")
    listing = page.locator(".highlight", has_text="make serve")
    listing.hover()
    button = listing.locator(".mdproof-copy--listing")
    button.click()
    page.wait_for_function(
        "node => node.dataset.mdproofDone === 'true'", arg=button.element_handle()
    )
    assert page.evaluate(READ) == listing.locator("code").text_content()


@pytest.mark.parametrize("page", articles())
def test_the_copy_buttons_hold_the_text_that_the_proof_engine_tests(built: Path, page: str) -> None:
    from mdproof.copy import payloads

    text = (built / page.removesuffix(".md") / "index.html").read_text(encoding="utf-8")
    shown = [html.unescape(found) for found in RUNNABLE.findall(text)]
    assert shown == payloads(page, load_site(ROOT))
