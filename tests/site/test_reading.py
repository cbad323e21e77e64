"""A reader finds the way, on every width, in light and in dark."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Open = Callable[..., Any]

# What the reader sees of a page, without code and without the source of formulas.
VISIBLE_TEXT = """() => {
  const body = document.querySelector(".md-content").cloneNode(true);
  const hidden = "pre, code, script, style, svg, annotation, .mdproof-output, .mermaid";
  body.querySelectorAll(hidden).forEach((node) => node.remove());
  return document.title + "\\n" + document.querySelector(".md-sidebar--secondary")?.textContent
    + document.querySelector(".md-nav--primary")?.textContent
    + body.textContent;
}"""
RAW_MATHS = re.compile(r"\$\$|\\\(|\\\[|\$[^$\n]*\\[a-zA-Z]+[^$\n]*\$|\\begin\{")


def assert_maths_is_rendered(page: Any) -> None:
    found = RAW_MATHS.search(page.evaluate(VISIBLE_TEXT))
    assert found is None, f"raw mathematics on {page.url}: {found and found.group()[:80]}"
    assert page.locator(".katex-error, merror").count() == 0, f"a formula failed on {page.url}"


def test_from_home_to_an_article_to_the_reference_and_back(open_page: Open) -> None:
    page = open_page()
    page.evaluate("window.sameDocument = true")
    page.locator(".md-tabs a", has_text="大模型").first.click()  # home shows the latest only
    page.locator("a.article-title[href*='dpo']").first.click()
    page.wait_for_url("**/large-models/dpo/")
    page.locator(".md-content h1", has_text="DPO").wait_for()
    page.locator("a.mdproof-source, a.mdproof-ref").first.click()
    page.wait_for_url("**/reference/large-models/dpo/#zhizhi.large_models.dpo.*")
    page.locator(".usage a", has_text="DPO").first.click()
    page.wait_for_url(re.compile(r".*/large-models/dpo/(#.*)?$"))
    page.go_back()
    page.wait_for_url("**/reference/large-models/dpo/**")
    page.locator(".md-logo").first.click()
    page.locator("h2", has_text="最新更新").wait_for()
    assert page.evaluate("window.sameDocument"), "navigation was not instant"


def test_a_name_in_code_leads_to_its_description(open_page: Open) -> None:
    page = open_page("large-models/dpo/")
    link = page.locator(".mdproof a.mdproof-ref").first
    address = link.evaluate("node => node.href")
    page.goto(address)
    anchor = address.partition("#")[2]
    assert page.locator(f"[id='{anchor}']").count() == 1


def test_mathematics_is_rendered_after_instant_navigation(open_page: Open) -> None:
    page = open_page()
    assert_maths_is_rendered(page)
    page.evaluate("window.sameDocument = true")
    page.locator(".md-tabs a", has_text="大模型").first.click()  # home shows the latest only
    page.locator("a.article-title[href*='dpo']").first.click()
    page.locator(".md-content h1", has_text="DPO").wait_for()
    assert page.evaluate("window.sameDocument"), "navigation was not instant"
    assert page.locator(".md-content .katex, .md-content math").count() > 20
    assert_maths_is_rendered(page)


def test_every_page_fits_a_phone_and_is_whole(open_page: Open, paths: list[str]) -> None:
    page = open_page(width=390, height=844)
    served = page.url
    problems = []
    for path in paths:
        page.goto(served + path)
        html = page.locator("html")
        if html.get_attribute("lang") != "zh":
            problems.append(f"{path}: lang is {html.get_attribute('lang')}")
        if not page.title().strip() or page.locator(".md-content h1").count() != 1:
            problems.append(f"{path}: needs a title and one h1")
        too_wide = page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        if too_wide > 0:
            problems.append(f"{path}: {too_wide} px too wide")
        hidden = page.evaluate(
            """[...document.querySelectorAll(".md-content__inner > *")].filter((node) => {
              const box = node.getBoundingClientRect();
              return box.width && box.right > innerWidth + 1;
            }).map((node) => node.outerHTML.slice(0, 80))"""
        )
        problems += [f"{path}: cut off at the right: {node}" for node in hidden]
        assert_maths_is_rendered(page)
    assert problems == []


def test_the_title_of_every_page_is_its_own(built: Path, paths: list[str]) -> None:
    titles: dict[str, str] = {}
    for path in paths:
        text = (built / path / "index.html").read_text(encoding="utf-8")
        found = re.search(r"<title>(.*?)</title>", text, re.DOTALL)
        assert found is not None, path
        assert titles.setdefault(found.group(1), path) == path


def test_light_and_dark_can_be_chosen_and_stay(open_page: Open) -> None:
    page = open_page(color_scheme="dark")
    scheme = "document.body.getAttribute('data-md-color-scheme')"
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(scheme) == "slate", "the system's choice comes first"
    dark = page.evaluate(background)
    page.locator("label.md-header__button[for^='__palette']:visible").click()
    assert page.evaluate(scheme) == "default"
    light = page.evaluate(background)
    assert light != dark
    page.reload()
    assert page.evaluate(scheme) == "default", "the choice was forgotten"
    page.locator("label.md-header__button[for^='__palette']:visible").click()
    assert page.evaluate(scheme) == "slate"
    assert page.evaluate(background) == dark


def test_a_figure_has_one_version_for_light_and_one_for_dark(
    open_page: Open, built: Path, paths: list[str]
) -> None:
    pages = [
        path for path in paths if "mdproof-figure" in (built / path / "index.html").read_text()
    ]
    assert pages, "no page has a figure"
    for scheme, other in (("light", "dark"), ("dark", "light")):
        page = open_page(pages[0], color_scheme=scheme)
        assert page.locator(f".mdproof-figure .mdproof-{scheme}").first.is_visible()
        assert page.locator(f".mdproof-figure .mdproof-{other}").first.is_hidden()


def test_a_film_plays_when_it_is_seen_again_on_demand_and_never_for_less_motion(
    open_page: Open, built: Path, paths: list[str]
) -> None:
    pages = [path for path in paths if "mdproof-film" in (built / path / "index.html").read_text()]
    assert pages, "no page has a film"
    page = open_page(pages[0])
    film = page.locator(".mdproof-film").first
    image = film.locator("img:visible")
    film.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.mdproof-film img[src*=\"?play=\"]')")
    address = image.get_attribute("src")
    page.wait_for_function(
        "(node) => node.complete && node.naturalWidth", arg=image.element_handle()
    )
    early = image.screenshot()
    page.wait_for_timeout(2500)
    assert image.screenshot() != early, "the film stands still"
    film.get_by_role("button").click()
    assert image.get_attribute("src") != address
    still = open_page(pages[0], reduced_motion="reduce")
    film = still.locator(".mdproof-film").first
    film.scroll_into_view_if_needed()
    assert film.get_by_role("button").count() == 0, "a button that does nothing"
    image = film.locator("img:visible")
    still.wait_for_function("(node) => node.complete", arg=image.element_handle())
    assert image.evaluate("node => node.currentSrc").endswith("#still")
    early = image.screenshot()
    still.wait_for_timeout(1500)
    assert image.screenshot() == early, "the film moves"


def test_every_picture_says_what_it_shows(built: Path, paths: list[str]) -> None:
    for path in paths:
        text = (built / path / "index.html").read_text(encoding="utf-8")
        for image in re.findall(r"<img\b[^>]*>", text):
            assert re.search(r'\balt="[^"]', image), f"{path}: {image}"


def test_a_diagram_is_drawn_without_another_host(
    open_page: Open, built: Path, paths: list[str]
) -> None:
    pages = [
        path for path in paths if 'class="mermaid"' in (built / path / "index.html").read_text()
    ]
    assert pages, "no page has a diagram"
    page = open_page(pages[0])
    page.wait_for_function(
        "[...document.querySelectorAll('div.mermaid')].some(node => node.offsetHeight > 50)"
    )


def test_a_page_without_a_diagram_does_not_load_mermaid(open_page: Open) -> None:
    page = open_page("about/verification/")
    page.wait_for_load_state("networkidle")
    loaded = page.evaluate("performance.getEntriesByType('resource').map(e => e.name)")
    assert not [name for name in loaded if "mermaid.min" in name]


def test_a_wrong_address_is_answered_in_the_reader_s_language(built: Path) -> None:
    text = (built / "404.html").read_text(encoding="utf-8")
    assert "没有这一页" in text
