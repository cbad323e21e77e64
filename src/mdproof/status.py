"""`mdproof status`: what is proven, page by page."""

import dataclasses
import datetime
import json
from typing import Any

from mdproof.article import read_article
from mdproof.errors import PageError
from mdproof.proof import orphans
from mdproof.site import Site
from mdproof.standing import Standing
from mdproof.standings import read_standings
from mdproof.tables import table

_HEADING = ("page", "blocks", "state", "verified", "days", "seconds", "excuses")


def status(site: Site, *, as_json: bool = False, titles: bool = False) -> int:
    """Print a table of pages; return 0 if everything is proven now, else 1."""
    standings = read_standings(site)
    left = orphans(site, (standing.page for standing in standings))
    names = [file.relative_to(site.root).as_posix() for file in left]
    bad = [standing for standing in standings if standing.state != "fresh"]
    if as_json:
        print(_json(standings, names))
    else:
        if standings:
            rows = [_row(site, standing, titles=titles) for standing in standings]
            heading = (*_HEADING, *(["title"] if titles else []))
            print(table([heading, *rows], right=(1, 4, 5, 6)))
        for standing in bad:
            if standing.problem:
                print(standing.problem)
        for name in names:
            print(f"{name}: no page has these blocks: delete it")
        print(_summary(standings))
    return 1 if bad or left else 0


def _row(site: Site, standing: Standing, *, titles: bool) -> list[str]:
    state = f"{len(standing.stale)} stale" if standing.stale else standing.state
    row = [
        standing.page,
        str(standing.blocks),
        state,
        shorten(standing.verified),
        str(age(standing.date)) if standing.date else "",
        f"{standing.seconds:.1f}" if standing.date else "",
        str(len(standing.excuses)) if standing.excuses else "",
    ]
    return [*row, *([_title(site, standing.page)] if titles else [])]


def _title(site: Site, page: str) -> str:
    try:
        return read_article(site, page).title
    except PageError:
        return ""


def age(date: str) -> int:
    """Return how many days ago a day was."""
    today = datetime.datetime.now(datetime.UTC).date()
    return max(0, (today - datetime.date.fromisoformat(date)).days)


def shorten(verified: tuple[str, ...]) -> str:
    """Return ways of verifying as one phrase: "cpu, interpreter, sm_80/90/100"."""
    targets = [name.removeprefix("sm_") for name in verified if name.startswith("sm_")]
    others = [name for name in verified if not name.startswith("sm_")]
    if targets:
        place = sum(name in ("cpu", "interpreter") for name in others)
        others.insert(place, "sm_" + "/".join(targets))
    return ", ".join(others)


def _summary(standings: list[Standing]) -> str:
    blocks = sum(standing.blocks for standing in standings)
    excused = sum(len({e.block for e in standing.excuses}) for standing in standings)
    bad = sum(standing.state != "fresh" for standing in standings)
    return f"{blocks} blocks, {excused} excused; {bad} pages need `mdproof prove`"


def _json(standings: list[Standing], left: list[str]) -> str:
    pages = []
    for standing in standings:
        record: dict[str, Any] = dataclasses.asdict(standing)
        record["stale"] = [{"block": n, "reason": why} for n, why in standing.stale.items()]
        record["age_days"] = age(standing.date) if standing.date else None
        pages.append(record)
    states = [standing.state for standing in standings]
    summary = {state: states.count(state) for state in ("fresh", "stale", "failed", "forged")}
    summary["blocks"] = sum(standing.blocks for standing in standings)
    summary["excuses"] = sum(len(standing.excuses) for standing in standings)
    return json.dumps(
        {"schema": 1, "summary": summary, "pages": pages, "orphans": left},
        ensure_ascii=False,
        indent=1,
    )
