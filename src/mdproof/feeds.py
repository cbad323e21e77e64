"""Feeds of the newest articles, Atom and RSS; formulas become text that every reader shows."""

import datetime
import html
import re
from collections.abc import Sequence
from email.utils import format_datetime

from mdproof import katex
from mdproof.article import Article
from mdproof.site import Site

LATEST = 30
"""How many articles a feed holds."""

_MATHS = re.compile(r"\$([^$]+)\$")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


def spoken(text: str) -> str:
    r"""Return one line of Markdown as plain text: `$\bar\alpha_t$` becomes `ᾱ_t`."""
    text = _MATHS.sub(lambda formula: katex.plain(formula[1]), text)
    return " ".join(_LINK.sub(r"\1", text).replace("`", "").replace("**", "").split())


def atom(site: Site, articles: Sequence[tuple[Article, str]], base: str) -> str:
    """Return an Atom feed.

    Args:
        site: The site.
        articles: Articles and their addresses; those without a date are left out.
        base: Address of the site, ending in a slash.
    """
    newest = _newest(articles)
    mkdocs = site.settings["mkdocs"]
    updated = max((_changed(article) for article, _ in newest), default=datetime.date(1970, 1, 1))
    author = html.escape(mkdocs.get("site_author") or mkdocs.get("site_name", ""))
    parts = [
        '<?xml version="1.0" encoding="utf-8"?>',
        f'<feed xmlns="http://www.w3.org/2005/Atom" xml:lang="{_language(site)}">',
        f"<title>{html.escape(mkdocs.get('site_name', ''))}</title>",
        f"<subtitle>{html.escape(mkdocs.get('site_description', ''))}</subtitle>",
        f'<link href="{base}"/>',
        f'<link rel="self" href="{base}atom.xml"/>',
        f"<id>{base}</id>",
        f"<updated>{_moment(updated).isoformat()}</updated>",
        f"<author><name>{author}</name></author>",
    ]
    for article, url in newest:
        tags = "".join(f'<category term="{html.escape(tag)}"/>' for tag in article.tags)
        parts.append(
            f"<entry><title>{html.escape(spoken(article.title))}</title>"
            f'<link href="{url}"/><id>{url}</id>'
            f"<published>{_moment(article.date or updated).isoformat()}</published>"
            f"<updated>{_moment(_changed(article)).isoformat()}</updated>{tags}"
            f"<summary>{html.escape(spoken(article.description))}</summary></entry>"
        )
    return "\n".join([*parts, "</feed>", ""])


def rss(site: Site, articles: Sequence[tuple[Article, str]], base: str) -> str:
    """Return an RSS 2.0 feed; arguments as in `atom`."""
    mkdocs = site.settings["mkdocs"]
    parts = [
        '<?xml version="1.0" encoding="utf-8"?>',
        '<rss version="2.0" xmlns:atom="http://www.w3.org/2005/Atom"><channel>',
        f"<title>{html.escape(mkdocs.get('site_name', ''))}</title>",
        f"<link>{base}</link>",
        f'<atom:link rel="self" type="application/rss+xml" href="{base}rss.xml"/>',
        f"<description>{html.escape(mkdocs.get('site_description', ''))}</description>",
        f"<language>{_language(site)}</language>",
    ]
    for article, url in _newest(articles):
        tags = "".join(f"<category>{html.escape(tag)}</category>" for tag in article.tags)
        day = _moment(article.date or _changed(article))
        parts.append(
            f"<item><title>{html.escape(spoken(article.title))}</title><link>{url}</link>"
            f'<guid isPermaLink="true">{url}</guid><pubDate>{format_datetime(day)}</pubDate>{tags}'
            f"<description>{html.escape(spoken(article.description))}</description></item>"
        )
    return "\n".join([*parts, "</channel></rss>", ""])


def _newest(articles: Sequence[tuple[Article, str]]) -> list[tuple[Article, str]]:
    dated = [pair for pair in articles if pair[0].date is not None]
    dated.sort(key=lambda pair: (_changed(pair[0]), pair[0].date, pair[1]), reverse=True)
    return dated[:LATEST]


def _changed(article: Article) -> datetime.date:
    return article.updated or article.date or datetime.date(1970, 1, 1)


def _moment(day: datetime.date) -> datetime.datetime:
    return datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC)


def _language(site: Site) -> str:
    theme = site.settings["mkdocs"].get("theme") or {}
    return html.escape(str(theme.get("language", "en")) if isinstance(theme, dict) else "en")
