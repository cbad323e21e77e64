"""How a page stands: what of it is proven now, how, with which versions, and what is excused."""

from dataclasses import dataclass, field
from typing import Any

from markdown import Markdown

from mdproof.block import excuses
from mdproof.checks import checks_nothing
from mdproof.collect import collect
from mdproof.copy import stale_reasons
from mdproof.errors import PageError
from mdproof.proof import ForgedError, load_proof
from mdproof.site import Site


@dataclass(frozen=True)
class Excuse:
    """Why less is proven of a block than of others.

    Attributes:
        block: Number of the block.
        line: Line of its fence.
        kind: Name of the option.
        reason: What the author gave as the reason.
    """

    block: int
    line: int
    kind: str
    reason: str


@dataclass(frozen=True)
class Standing:
    """How one page stands.

    Attributes:
        page: Path below `docs`.
        state: "fresh", "stale", "failed" (a fence makes no sense) or "forged" (a proof was edited).
        blocks: Number of blocks.
        passed: Number of blocks that ran, whose output was compared and whose proof holds.
        stale: Why a block's proof does not hold, by its number.
        problem: Of a failed or forged page, what is wrong with it, in one line.
        excuses: Blocks of which less is proven.
        verified: How the blocks that hold were verified: "cpu", "interpreter", "sm_90", a device.
        libraries: Versions that the recorded run had.
        python: Version of Python that the recorded run had, "" where the proof does not say.
        date: The oldest day on which a block that holds was verified, or "".
        seconds: Time that the blocks that hold took together.
        unchecked: Numbers of the blocks that check nothing a reader could see.
    """

    page: str
    state: str
    blocks: int = 0
    passed: int = 0
    stale: dict[int, str] = field(default_factory=dict)
    problem: str = ""
    excuses: tuple[Excuse, ...] = ()
    verified: tuple[str, ...] = ()
    libraries: dict[str, str] = field(default_factory=dict)
    python: str = ""
    date: str = ""
    seconds: float = 0.0
    unchecked: tuple[int, ...] = ()


_ORDER = ("cpu", "interpreter", "compiled", "device")


def read_standing(site: Site, page: str, md: Markdown | None = None) -> Standing | None:
    """Return how a page stands, None if it has no blocks; a page that is wrong has a standing, too.

    Args:
        site: The site.
        page: Path below `docs`.
        md: A pipeline to use again.
    """
    try:
        blocks = collect(site, page, md).blocks
    except PageError as error:
        return Standing(page, "failed", problem=str(error))
    if not blocks:
        return None
    made = tuple(
        Excuse(block.index, block.line, kind, reason)
        for block in blocks
        for kind, reason in excuses(block.options).items()
    )
    try:
        proof = load_proof(site, page)
    except ForgedError as error:
        problem = str(error)
        return Standing(page, "forged", len(blocks), problem=problem, excuses=made)
    reasons = stale_reasons(site, blocks, proof)
    records = proof.blocks if proof else []
    unchecked = tuple(
        block.index
        for block, record in zip(blocks, records, strict=False)
        if checks_nothing(block, record, blocks[block.index :])
    )
    stale = {block.index: why for block, why in zip(blocks, reasons, strict=True) if why}
    holds = [
        record
        for block, record in zip(blocks, records, strict=False)
        if block.index not in stale and not block.options.norun
    ]
    varying = [b for b in blocks if b.options.varies and b.index not in stale]
    ways = {_way(way) for record in holds for way in record["verified"]}
    libraries: dict[str, str] = {}
    for record in holds:
        libraries |= record["libraries"]
    return Standing(
        page,
        "stale" if stale else "fresh",
        blocks=len(blocks),
        passed=len(holds) - len(varying),
        stale=stale,
        excuses=made,
        verified=tuple(name for _, name in sorted(ways)),
        libraries=dict(sorted(libraries.items())),
        python=max((record.get("python") or "" for record in holds), default=""),
        date=min((record["date"] for record in holds), default=""),
        seconds=round(sum(record["seconds"] for record in holds), 2),
        unchecked=unchecked,
    )


def _way(way: dict[str, Any]) -> tuple[tuple[int, int, str], str]:
    """Return a way of verifying as a word, behind a key that sorts old targets first."""
    how = way["how"]
    name = {"compiled": way.get("target", how), "device": way.get("device", how)}.get(how, how)
    place = _ORDER.index(how) if how in _ORDER else len(_ORDER)
    digits = "".join(filter(str.isdecimal, name)) if how == "compiled" else ""
    return (place, int(digits or 0), name), name
