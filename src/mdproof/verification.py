"""The public record: what of every page is verified, how, and every excuse with its reason.

The directive `[[verification]]` writes it as Markdown, so that links are checked by the builder.
"""

import html
import re
from collections.abc import Callable, Mapping

from mdproof.article import read_article
from mdproof.errors import PageError
from mdproof.overview import nav_pages
from mdproof.site import Site
from mdproof.standing import Standing, read_standing
from mdproof.status import shorten

_WORDS: dict[str, dict[str, str]] = {
    "zh": {
        "page": "页面",
        "blocks": "代码段",
        "passed": "已验证",
        "how": "怎样验证",
        "date": "日期",
        "seconds": "用时",
        "pages": "页面",
        "excused": "例外",
        "stale": "待验证",
        "count": "{} 段",
        "left": "{} 段待验证",
        "took": "{:.1f} 秒",
        "block": "第 {} 段",
        "line": "第 {} 行",
        "colon": "：",
        "stop": "；",
        "list": "、",
        "norun": "不运行",
        "varies": "不比对",
        "nodevice": "不在设备上比对",
        "network": "需要网络",
        "warns": "允许警告",
        "cpu": "CPU",
        "interpreter": "解释器",
        "excuses": "例外与理由",
        "excuses_about": "这些代码段不运行、不比对，或者少验证一样东西；理由写在各段的首行。",
        "no_excuses": "全站没有不运行或不比对的代码段。",
        "allowed": "全站放行的警告",
        "allowed_about": "依赖的库在自己内部发出、页面改不了的弃用警告；其余的弃用警告一律算失败。",
        "unchecked": "没有检验的代码段",
        "unchecked_about": "这些代码段运行过，却没有打印、断言或画出读者能核对的东西。",
    },
    "en": {
        "page": "Page",
        "blocks": "Blocks",
        "passed": "Verified",
        "how": "How",
        "date": "Date",
        "seconds": "Time",
        "pages": "pages",
        "excused": "excused",
        "stale": "to verify",
        "count": "{}",
        "left": "{} to verify",
        "took": "{:.1f} s",
        "block": "block {}",
        "line": "line {}",
        "colon": ": ",
        "stop": "; ",
        "list": ", ",
        "norun": "not run",
        "varies": "not compared",
        "nodevice": "not compared on a device",
        "network": "needs the network",
        "warns": "may warn",
        "cpu": "CPU",
        "interpreter": "interpreter",
        "excuses": "Excuses and reasons",
        "excuses_about": "Less is verified of these blocks than of others; the reason stands "
        "in the first line of each.",
        "no_excuses": "Every block of this site is run and compared.",
        "allowed": "Warnings that fail no page",
        "allowed_about": "Deprecations inside of libraries that no page can mend. Others fail.",
        "unchecked": "Blocks that check nothing",
        "unchecked_about": "These blocks ran, and show nothing that a reader could check.",
    },
}

SHOWN = ("torch", "triton", "numpy", "jax", "tensorflow")
"""Libraries whose versions the table names; the proof holds them all."""


def write_verification(
    site: Site, to_page: Callable[[str], str], to_block: Callable[[str, int], str]
) -> list[str]:
    """Return the record of the whole site as lines of Markdown.

    Args:
        site: The site.
        to_page: Returns the link to a page, for Markdown.
        to_block: Returns the link to a block of a page, for HTML.
    """
    words = _WORDS["zh" if site.language.startswith("zh") else "en"]
    standings = [
        standing for page in _in_order(site) if (standing := read_standing(site, page)) is not None
    ]
    lines = [*_totals(standings, words), "", *_table(site, standings, words, to_page), ""]
    excused = [standing for standing in standings if standing.excuses]
    if not excused:
        lines += [words["no_excuses"], ""]
    else:
        lines += [f"## {words['excuses']} {{#excuses}}", "", words["excuses_about"], ""]
        for standing in excused:
            lines += [f"[{_title(site, standing.page)}]({to_page(standing.page)})", ""]
            for excuse in standing.excuses:
                where = _place(words, to_block(standing.page, excuse.block), excuse.block)
                kind = words.get(excuse.kind, excuse.kind)
                line = words["line"].format(excuse.line)
                lines.append(
                    f"- {where}（{line}）{kind}{words['colon']}{escape(excuse.reason)}"
                    if words is _WORDS["zh"]
                    else f"- {where} ({line}), {kind}{words['colon']}{escape(excuse.reason)}"
                )
            lines.append("")
    if site.allowed_warnings:
        lines += [f"## {words['allowed']} {{#warnings}}", "", words["allowed_about"], ""]
        for warning, reason in site.allowed_warnings:
            lines.append(f"- <code>{escape(warning)}</code>{words['colon']}{escape(reason)}")
        lines.append("")
    return [*lines, *_unchecked(site, standings, words, to_page, to_block)]


def _unchecked(
    site: Site,
    standings: list[Standing],
    words: Mapping[str, str],
    to_page: Callable[[str], str],
    to_block: Callable[[str, int], str],
) -> list[str]:
    found = [standing for standing in standings if standing.unchecked]
    if not found:
        return []
    lines = [f"## {words['unchecked']} {{#unchecked}}", "", words["unchecked_about"], ""]
    for standing in found:
        blocks = (_place(words, to_block(standing.page, n), n) for n in standing.unchecked)
        page = f"[{_title(site, standing.page)}]({to_page(standing.page)})"
        lines.append(f"- {page}{words['colon']}{words['list'].join(blocks)}")
    return [*lines, ""]


def _in_order(site: Site) -> list[str]:
    """Return the pages as the navigation names them, the others behind."""
    pages = site.pages()
    first = [page for page in dict.fromkeys(nav_pages(site)) if page in set(pages)]
    return [*first, *(page for page in pages if page not in set(first))]


def _totals(standings: list[Standing], words: Mapping[str, str]) -> list[str]:
    numbers = {
        "pages": len(standings),
        "blocks": sum(standing.blocks for standing in standings),
        "passed": sum(standing.passed for standing in standings),
        "excused": sum(len({e.block for e in standing.excuses}) for standing in standings),
        "stale": sum(_left(standing) for standing in standings),
    }
    items = "".join(
        f'<span class="verification-{name}"><b>{number}</b> {words[name]}</span>'
        for name, number in numbers.items()
        if number or name != "stale"
    )
    return [f'<div class="verification-totals">{items}</div>']


def _left(standing: Standing) -> int:
    return standing.blocks if standing.state in ("failed", "forged") else len(standing.stale)


def _table(
    site: Site,
    standings: list[Standing],
    words: Mapping[str, str],
    to_page: Callable[[str], str],
) -> list[str]:
    columns = ("page", "passed", "how", "date", "seconds")
    lines = ['<div class="verification-table" markdown="1">', ""]
    lines += ["| " + " | ".join(words[name] for name in columns) + " |"]
    lines += ["| --- | --: | --- | --- | --: |"]
    for standing in standings:
        title = _title(site, standing.page).replace("|", "\\|")
        passed = f"{standing.passed} / {standing.blocks}"
        cells = [
            f"[{title}]({to_page(standing.page)})",
            passed,
            " · ".join(part for part in (_how(standing, words), _versions(standing)) if part),
            standing.date,
            words["took"].format(standing.seconds) if standing.date else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", "</div>"]


def _how(standing: Standing, words: Mapping[str, str]) -> str:
    if standing.problem:
        return f'<span class="verification-left">{html.escape(_cell(standing.problem))}</span>'
    how = " · ".join(words.get(way, way) for way in shorten(standing.verified).split(", ") if way)
    if standing.stale:
        left = words["left"].format(len(standing.stale))
        return f'<span class="verification-left">{left}</span>' + (f" · {how}" if how else "")
    return how


def _versions(standing: Standing) -> str:
    named = [f"{name} {standing.libraries[name]}" for name in SHOWN if name in standing.libraries]
    python = [f"Python {standing.python}"] if standing.python else []
    return " · ".join([*named, *python])


def _cell(text: str) -> str:
    return text.replace("|", "&#124;")


def _place(words: Mapping[str, str], target: str, block: int) -> str:
    return f'<a href="{html.escape(target)}">{words["block"].format(block)}</a>'


def _title(site: Site, page: str) -> str:
    """Return the title of a page, by its front matter, its heading or its path."""
    try:
        article = read_article(site, page)
    except PageError:
        return page
    heading = re.search(r"^#[ \t]+(.+?)[ \t]*$", article.body, re.MULTILINE)
    return article.title or (heading[1] if heading else page)


_MARKS = re.compile(r"([\\`*_{}\[\]<>#|])")


def escape(text: str) -> str:
    """Return a plain text as Markdown, its mathematics and its code left alone."""
    parts = re.split(r"(\$[^$]+\$|`[^`]+`)", text)
    return "".join(
        part if position % 2 else _MARKS.sub(r"\\\1", part).replace("\\<", "&lt;")
        for position, part in enumerate(parts)
    )
