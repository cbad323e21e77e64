"""A Python-Markdown extension: one-line directives that write a list from what the site knows.

    [[latest: 10]]                          the articles that changed last
    [[reading-order: large-models]]         a wing, in the order of the nav
    [[usage: zhizhi.large_models.dpo]]      the articles and tests that use a module
    [[modules]]                             the public modules, wing by wing
    [[verification]]                        every page with its blocks and its excuses
    [[pages: about/decisions]]              the pages of a folder, the last name first

A directive stands alone on its line. It becomes Markdown that the rest of the pipeline renders, so
mathematics in a description works and links are checked. An article also gets a line of facts below
its title. A preprocessor does it, so that both builders have it.
"""

import html
import re
from collections.abc import Callable
from typing import Any

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

from mdproof import overview
from mdproof.article import Article, list_articles, read_article
from mdproof.errors import PageError, build_error
from mdproof.exercised import Evidence
from mdproof.site import Site, is_collecting, link, load_site, page_of
from mdproof.verification import write_verification

_LINE = re.compile(r"^\[\[([a-z][a-z-]*)(?::[ \t]*(.*?))?[ \t]*\]\][ \t]*$")
_CHINESE = re.compile(r"[㐀-鿿]")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})", re.MULTILINE)

_WORDS = {
    "zh": {
        "minutes": "约 {} 分钟",
        "verified": "✓ {} 段代码已验证",
        "partly": "✓ {} 段代码已验证，{} 段例外",
        "unverified": "{} 段代码待验证",
        "no_code": "没有代码",
        "published": "发表于 {}",
        "updated": "更新于 {}",
        "first": "先读：",
        "tags": "标签：",
        "list": "、",
        "no_use": "还没有文章用到它。",
        "block": "第 {} 段",
        "tests": "{} 项测试",
        "example": "文档字符串里的例子随测试运行。",
        "no_tests": "没有直接的测试。",
    },
    "en": {
        "minutes": "{} min read",
        "verified": "✓ {} blocks verified",
        "partly": "✓ {} blocks verified, {} excused",
        "unverified": "{} blocks to verify",
        "no_code": "no code",
        "published": "published {}",
        "updated": "updated {}",
        "first": "Read first: ",
        "tags": "Tags: ",
        "list": ", ",
        "no_use": "No article uses it yet.",
        "block": "block {}",
        "tests": "{} tests",
        "example": "The example in its docstring runs with the tests.",
        "no_tests": "No test names it.",
    },
}


class _DirectiveError(Exception):
    """A directive is wrong; the text says how."""


class _Writer:
    """Writes the Markdown of the directives of one page."""

    def __init__(self, md: Markdown, site: Site, page: str) -> None:
        self.md, self.site, self.page = md, site, page
        language = site.language.partition("-")[0]
        self.words = _WORDS.get(language, _WORDS["en"])

    # Directives: one method each, named by it.

    def latest(self, argument: str) -> list[str]:
        if not argument.isdecimal() or argument == "0":
            raise _DirectiveError(
                f"needs a number of articles, such as `[[latest: 10]]`; it is {argument!r}"
            )
        lines = ['<div class="article-list" data-search-exclude markdown="1">', ""]
        for article in list_articles(self.site)[: int(argument)]:
            wing = overview.nav_title(self.site, f"{article.wing}/index.md")
            label = f'<span class="article-wing">{html.escape(wing)}</span>' if wing else ""
            day = f'<time datetime="{article.updated}">{article.updated}</time>'
            lines += self._entry(article, label + day)
        return [*lines, "</div>"]

    def reading_order(self, argument: str) -> list[str]:
        try:
            pages = overview.reading_order(self.site, argument)
        except LookupError as error:
            raise _DirectiveError(str(error)) from None
        lines = [
            '<div class="article-list article-list--order" data-search-exclude markdown="1">',
            "",
        ]
        for number, page in enumerate(pages, 1):
            if not (self.site.docs / page).is_file():
                raise _DirectiveError(f"the nav of mkdocs.yml names {page}, which does not exist")
            article = read_article(self.site, page)
            label = f'<span class="article-number">{number}</span>'
            lines += self._entry(article, label, prerequisites=True)
        return [*lines, "</div>"]

    def modules(self, argument: str) -> list[str]:
        if argument:
            raise _DirectiveError("takes no argument")
        lines: list[str] = []
        for wing in self.site.articles:
            rows = []
            for page in self.site.pages():
                if page.startswith(f"reference/{wing}/") and not page.endswith("/index.md"):
                    module = self._module(page)
                    about = overview.summary(self.site, module)
                    rows += [f"[`{module}`]({self._to(page)})", f":   {about}", ""]
            if rows:
                title = overview.nav_title(self.site, f"{wing}/index.md") or wing
                lines += [f"## {title}", "", *rows]
        return lines

    def usage(self, argument: str) -> list[str]:
        try:
            objects = overview.public_objects(self.site, argument)
        except LookupError as error:
            raise _DirectiveError(str(error)) from None
        articles = overview.articles_using(self.site, argument)
        tests = overview.tests_using(self.site, argument)
        lines = ['<div class="usage" markdown="1">', ""]
        for dotted in objects:
            links = [self._article_link(page, block) for page, block in articles.get(dotted, ())]
            where = self.words["list"].join(links) if links else self.words["no_use"]
            lines += [f"[`{dotted.rpartition('.')[2]}`][{dotted}]", f":   {where}", ""]
            files = tests.get(dotted, {})
            if overview.has_example(self.site, dotted):
                lines += [f"    {self.words['example']}", ""]
            elif not files:
                lines += [f"    {self.words['no_tests']}", ""]
            for file, names in files.items():
                count = self.words["tests"].format(len(names))
                items = "".join(f"<li>{self._tested(test)}</li>" for test in names)
                lines += [
                    f"    <details><summary><code>{html.escape(file)}</code> · {count}</summary>"
                    f"<ul>{items}</ul></details>",
                    "",
                ]
        return [*lines, "</div>"]

    def verification(self, argument: str) -> list[str]:
        if argument:
            raise _DirectiveError("takes no argument")
        return write_verification(
            self.site, self._to, lambda page, block: link(self.md, f"{page}#block-{block}")
        )

    def pages(self, argument: str) -> list[str]:
        folder = argument.strip("/")
        found = [
            page
            for page in self.site.pages()
            if page.rpartition("/")[0] == folder and not page.endswith("/index.md")
        ]
        if not (self.site.docs / folder).is_dir():
            raise _DirectiveError(f"there is no folder {argument!r}")
        lines: list[str] = []
        for page in sorted(found, reverse=True):
            text = read_article(self.site, page).body
            heading = re.search(r"^#[ \t]+(.+?)[ \t]*$", text, re.MULTILINE)
            title = heading.group(1) if heading else page
            day = re.match(r"\d{4}-\d{2}-\d{2}", page.rpartition("/")[2])
            lines.append(f"- {day.group() + ' · ' if day else ''}[{title}]({self._to(page)})")
        return lines

    # What an article shows below its title.

    def facts(self, article: Article) -> list[str]:
        words = self.words
        facts = []
        if article.date:
            day = f'<time datetime="{article.date}">{article.date}</time>'
            facts.append(words["published"].format(day))
        if article.updated and article.updated != article.date:
            day = f'<time datetime="{article.updated}">{article.updated}</time>'
            facts.append(words["updated"].format(day))
        facts += [words["minutes"].format(_minutes(article)), self._state(article)]
        lines = ['<div class="article-facts" data-search-exclude markdown="1">', ""]
        lines += ['<span class="article-sep"> · </span>'.join(facts), ""]
        if article.prerequisites:
            lines += [self._prerequisites(article), ""]
        if article.tags:
            lines += [words["tags"] + html.escape(words["list"].join(article.tags)), ""]
        return [*lines, "</div>", ""]

    # Parts.

    def _entry(self, article: Article, label: str, prerequisites: bool = False) -> list[str]:
        facts = f"{self.words['minutes'].format(_minutes(article))} · {self._state(article)}"
        lines = [
            '<div class="article-card" markdown="1">',
            "",
            f'<p class="article-label">{label}<span class="article-meta">{facts}</span></p>',
            "",
            f"[{article.title}]({self._to(article.page)}){{.article-title}}",
            "",
            article.description,
            "",
        ]
        if prerequisites and article.prerequisites:
            lines += [self._prerequisites(article), "{.article-first}", ""]
        return [*lines, "</div>", ""]

    def _prerequisites(self, article: Article) -> str:
        return self.words["first"] + self.words["list"].join(
            f"[{_short(read_article(self.site, f'{room}.md').title)}]({self._to(f'{room}.md')})"
            for room in article.prerequisites
        )

    def _state(self, article: Article) -> str:
        state = overview.read_state(self.site, article.page)
        if not state.blocks:
            return f'<span class="article-state">{self.words["no_code"]}</span>'
        if state.stale:
            text = self.words["unverified"].format(state.stale)
            return f'<span class="article-state article-state--stale">{text}</span>'
        excused = len(state.unrun) + len(state.varying)
        text = self.words["partly" if excused else "verified"].format(state.passed, excused)
        return f'<span class="article-state article-state--verified">{text}</span>'

    def _article_link(self, page: str, block: int) -> str:
        title = html.escape(read_article(self.site, page).title)
        target = link(self.md, f"{page}#block-{block}")
        return f"[{title}]({self._to(page)})（{self._raw_link(target, block)}）"

    def _raw_link(self, target: str, block: int) -> str:
        return f'<a href="{html.escape(target)}">{self.words["block"].format(block)}</a>'

    def _to(self, page: str) -> str:
        """Return a page as a Markdown link relative to this one, which the builder checks."""
        here = self.page.split("/")[:-1]
        return "/".join([*[".."] * len(here), page]) if here else page

    def _module(self, page: str) -> str:
        rooms = page.removeprefix("reference/").removesuffix(".md").replace("-", "_")
        return f"{self.site.packages[0]}.{rooms.replace('/', '.')}"

    @staticmethod
    def _tested(test: Evidence) -> str:
        """Return a test's name as a sentence, with the equations that it cites."""
        sentence = test.name.removeprefix("test_").replace("_", " ")
        return " ".join([html.escape(sentence), *(f"({label})" for label in test.equations)])


def _short(title: str) -> str:
    """Return what stands before the colon of a title."""
    return re.split(r"[：:]", title, maxsplit=1)[0]


def _minutes(article: Article) -> int:
    """Estimate the reading time: 300 characters a minute, half a minute for a listing."""
    fences = len(_FENCE.findall(article.body)) // 2
    return max(1, round(len(_CHINESE.findall(article.body)) / 300 + fences / 2))


class _Directives(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        page = page_of(self.md)
        if page is None or is_collecting(self.md):
            return lines
        try:
            return self._run(lines, load_site(), page)
        except PageError as error:
            raise build_error(error) from None

    def _run(self, lines: list[str], site: Site, page: str) -> list[str]:
        writer = _Writer(self.md, site, page)
        known: dict[str, Callable[[str], list[str]]] = {
            "latest": writer.latest,
            "reading-order": writer.reading_order,
            "modules": writer.modules,
            "usage": writer.usage,
            "verification": writer.verification,
            "pages": writer.pages,
        }
        out: list[str] = []
        titled = not site.is_article(page)
        for line in lines:
            if not titled and line.startswith("# "):
                titled = True
                out += [line, "", *writer.facts(read_article(site, page))]
                continue
            found = _LINE.match(line)
            if found is None:
                out.append(line)
                continue
            name, argument = found.group(1), (found.group(2) or "").strip()
            try:
                if name not in known:
                    raise _DirectiveError(f"is no directive; there are: {', '.join(sorted(known))}")
                out += ["", *known[name](argument), ""]
            except _DirectiveError as error:
                raise self._error(site, page, line, f"`[[{name}]]` {error}.") from None
        return out

    @staticmethod
    def _error(site: Site, page: str, line: str, message: str) -> PageError:
        file = site.docs / page
        text = file.read_text(encoding="utf-8").split("\n")
        number = next((n for n, other in enumerate(text, 1) if other.strip() == line.strip()), 1)
        return PageError(file.relative_to(site.root).as_posix(), number, message.replace("..", "."))


def diagram(
    source: str, language: str, css_class: str, options: Any, md: Markdown, **kwargs: Any
) -> str:
    """Return a diagram's source for the theme to draw; the search does not read it."""
    code = html.escape(source, quote=False)
    return f'<pre class="{css_class}" data-search-exclude><code>{code}</code></pre>'


class DirectivesExtension(Extension):
    """The extension `mdproof.directives`."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Run after fences are taken out (25) and before raw HTML is (20)."""
        md.preprocessors.register(_Directives(md), "mdproof_directives", 22)


def makeExtension(**options: Any) -> DirectivesExtension:  # noqa: N802
    """Return the extension; Python-Markdown calls this by name."""
    return DirectivesExtension(**options)
