"""`mdproof prove`: prove pages that are stale, one after another or several at a time."""

import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from markdown import Markdown

from mdproof import reports
from mdproof.collect import collect, make_pipeline, shown
from mdproof.errors import PageError
from mdproof.page_run import PageRun, Servers, open_page
from mdproof.proof import ForgedError
from mdproof.record import Updated, update_page
from mdproof.reports import BlockResult, PageResult
from mdproof.site import Site, load_site


class Progress:
    """Says how far proving has come: a line for each page, and in a terminal what runs now."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self.total, self.done, self._stream = total, 0, stream
        self._live = stream.isatty()
        self._started = time.monotonic()
        self._page, self._blocks, self._count = "", 0, 0

    def start(self, page: str, blocks: int) -> None:
        """Say that a page begins."""
        self._page, self._blocks, self._count = page, blocks, 0
        self._started = time.monotonic()
        self._draw()

    def block(self) -> None:
        """Say that a block, or a copy of one, has run."""
        self._count += 1
        self._draw()

    def _draw(self) -> None:
        if self._live:
            seconds = time.monotonic() - self._started
            count = f"{min(self._count, self._blocks)}/{self._blocks} blocks"
            copies = max(0, self._count - self._blocks)
            count += f", {copies} copies" if copies else ""
            text = f"{self._number(self.done + 1)} {self._page}: {count}, {seconds:.0f} s"
            columns = shutil.get_terminal_size().columns  # a line that wraps cannot be taken back
            self._stream.write(f"\r\x1b[K{text[: columns - 1]}")
            self._stream.flush()

    def _number(self, number: int) -> str:
        return f"[{number:>{len(str(self.total))}}/{self.total}]"

    def finish(self, result: PageResult) -> None:
        """Print the line of a page, and what failed on it."""
        self.done += 1
        if self._live:
            self._stream.write("\r\x1b[K")
        parts = [f"{len(result.blocks)} blocks", f"{result.seconds:.1f} s", result.state]
        told = result.state if result.state in ("fresh", "error") else ", ".join(parts)
        print(f"{self._number(self.done)} {result.file}: {told}", file=self._stream)
        for line in reports.lines(result):
            print(line, file=self._stream)
        self._stream.flush()


@dataclass
class Prover:
    """Proves pages in this process.

    Attributes:
        site: The site.
        everything: Whether pages whose proof is fresh are proven, too.
        servers: Where blocks run.
        md: The pipeline.
        started: Is told the page's file and its number of blocks when it begins to run.
    """

    site: Site
    everything: bool
    servers: Servers = field(init=False)
    md: Markdown = field(init=False)
    started: Callable[[str, int], None] = lambda file, blocks: None

    def __post_init__(self) -> None:
        self.md, self.servers = make_pipeline(self.site), Servers(self.site)

    def prove(self, page: str) -> PageResult | None:
        """Prove a page and record what was seen; return None if it has no blocks."""
        started = time.monotonic()
        file = shown(self.site, page)
        try:
            collected = collect(self.site, page, self.md)
            if not collected.blocks:
                return None
            run = open_page(self.site, page, self.servers, collected)
            if not self.everything and run.fresh:
                return PageResult(page, file, "fresh", 0.0, _blocks(run, Updated({})))
            self.started(file, sum(not block.options.norun for block in run.blocks))
            updated = update_page(run)
        except (PageError, ForgedError) as error:
            line = getattr(error, "line", 1)
            message = str(error).removeprefix(f"{file}:{line}: ")
            return PageResult(page, file, "error", line=line, message=message)
        state = "failed" if updated.failures else "proven"
        seconds = round(time.monotonic() - started, 3)
        return PageResult(page, file, state, seconds, _blocks(run, updated))


def _blocks(run: PageRun, updated: Updated) -> tuple[BlockResult, ...]:
    found: list[BlockResult] = []
    for block in run.blocks:
        failure = updated.failures.get(block.index)
        ran = run.ran.get(block.index)
        seconds = round(ran.seconds, 3) if ran else 0.0
        if failure is not None:
            found.append(
                BlockResult(
                    block.index, failure.line, "failed", seconds, failure.message, failure.frames
                )
            )
        elif block.options.norun:
            found.append(
                BlockResult(block.index, block.line, "excused", message=block.options.norun)
            )
        else:
            change = updated.changes.get(block.index, "")
            found.append(BlockResult(block.index, block.line, "passed", seconds, change=change))
    return tuple(found)


_prover: Prover | None = None


def _begin(config: str, everything: bool) -> None:
    """Make a process of the pool ready; its workers read its end and end with it."""
    global _prover
    _prover = Prover(load_site(Path(config)), everything)


def _prove_in_pool(page: str) -> PageResult | None:
    assert _prover is not None
    return _prover.prove(page)


def _results(
    site: Site, pages: Sequence[str], progress: Progress, *, everything: bool, jobs: int
) -> Iterator[PageResult | None]:
    if jobs == 1:
        prover = Prover(site, everything, progress.start)
        prover.servers.told = progress.block
        try:
            for page in pages:
                yield prover.prove(page)
        finally:
            prover.servers.close()
        return
    spawn = multiprocessing.get_context("spawn")
    arguments = (str(site.root), everything)
    with ProcessPoolExecutor(jobs, spawn, _begin, arguments) as pool:
        waiting = [pool.submit(_prove_in_pool, page) for page in pages]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def prove(
    site: Site,
    pages: Sequence[str] = (),
    *,
    everything: bool = False,
    jobs: int = 1,
    junit: Path | None = None,
    json_file: Path | None = None,
    annotate: bool = False,
    stream: TextIO | None = None,
) -> int:
    """Prove pages and record what was seen.

    Args:
        site: The site.
        pages: Paths below `docs`; all pages if there are none.
        everything: Whether pages whose proof is fresh are proven, too.
        jobs: How many pages run at a time.
        junit: Where to write a report in JUnit XML.
        json_file: Where to write a report in JSON.
        annotate: Whether failures are printed as GitHub's workflow commands, too.
        stream: Where progress is printed.

    Returns:
        0 if every page is proven, else 1.
    """
    started = time.monotonic()
    stream = stream or sys.stdout
    chosen = list(pages) or [page for page in site.pages() if _may_have_blocks(site, page)]
    progress = Progress(len(chosen), stream)
    results: list[PageResult] = []
    for result in _results(site, chosen, progress, everything=everything, jobs=jobs):
        if result is None:
            progress.total -= 1
            continue
        progress.finish(result)
        results.append(result)
    results.sort(key=lambda result: result.page)
    for line in reports.annotations(results) if annotate else ():
        print(line, file=stream)
    if junit is not None:
        reports.write_junit(junit, results)
    if json_file is not None:
        reports.write_json(json_file, results)
    print(reports.summary(results, time.monotonic() - started), file=stream)
    return 1 if any(result.failures() for result in results) else 0


def _may_have_blocks(site: Site, page: str) -> bool:
    """Tell whether a page could have blocks, so that the number of pages is right."""
    data = (site.docs / page).read_bytes()
    return any(mark in data for mark in (b"```", b"~~~", b"    ", b"\t", b"8<-"))
