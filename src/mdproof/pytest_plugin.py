"""The pytest end: `pytest docs` proves pages, `--stale` only what changed, `--update` records.

Each block is a test, `docs/large-models/dpo.md::block-3`, and so is each runnable copy, `::copy-3`.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPORT_LINES = 15


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("mdproof", "prove the code of Markdown pages")
    group.addoption("--stale", action="store_true", help="run only pages whose proof is stale")
    group.addoption("--update", action="store_true", help="record what the pages show")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to record in CI, where nobody looks at what changes."""
    config.addinivalue_line("markers", "xdist_group(name): tests that one process must run")
    if config.getoption("--update") and os.environ.get("CI", "").lower() not in ("", "0", "false"):
        raise pytest.UsageError("--update records outputs; it is refused in CI (CI is set)")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what `--update` recorded anew: which outputs changed, and how."""
    from mdproof.reports import change_lines

    changes = [
        (test.nodeid, value)
        for test in terminalreporter.stats.get("passed", [])
        for name, value in test.user_properties
        if name == "mdproof-change" and test.when == "call"
    ]
    if changes:
        terminalreporter.section("recorded anew")
    for place, change in changes:
        for line in change_lines(place, str(change)):
            terminalreporter.write_line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the workers."""
    servers = config.stash.get(_SERVERS, None)
    if servers is not None:
        servers.close()


_SERVERS: pytest.StashKey[Any] = pytest.StashKey()
_PIPELINE: pytest.StashKey[Any] = pytest.StashKey()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "MarkdownPage | None":
    """Collect a page of the site that this folder belongs to."""
    if file_path.suffix != ".md":
        return None
    from mdproof.errors import PageError
    from mdproof.site import load_site

    try:
        site = load_site(file_path.parent)
    except FileNotFoundError:
        return None
    except PageError as error:
        raise pytest.Collector.CollectError(str(error)) from None
    if not file_path.is_relative_to(site.docs) or file_path.is_relative_to(site.proofs):
        return None
    return MarkdownPage.from_parent(parent, path=file_path)


class MarkdownPage(pytest.File):
    """One page."""

    run: Any

    def collect(self) -> Iterable["pytest.Item"]:
        """Return a test for each block and each runnable copy."""
        from mdproof.collect import collect, make_pipeline
        from mdproof.errors import PageError
        from mdproof.page_run import Servers, open_page
        from mdproof.proof import ForgedError
        from mdproof.site import load_site

        site = load_site(self.path.parent)
        stash = self.config.stash
        page = self.path.relative_to(site.docs).as_posix()
        self.update = bool(self.config.getoption("--update"))
        try:
            if _SERVERS not in stash:
                stash[_PIPELINE] = make_pipeline(site)
                stash[_SERVERS] = Servers(site)
            collected = collect(site, page, stash[_PIPELINE])
            if not collected.blocks:
                return
            try:
                self.run = open_page(site, page, stash[_SERVERS], collected)
            except ForgedError:
                if not self.update:
                    raise
                from mdproof.proof import proof_file

                proof_file(site, page).unlink()
                self.run = open_page(site, page, stash[_SERVERS], collected)
        except (PageError, ForgedError) as error:
            yield BrokenPage.from_parent(self, name="page", error=error)
            return
        self.updated: Any = None
        self.fresh = bool(self.config.getoption("--stale")) and self.run.fresh
        yield from self._items()

    def _items(self) -> Iterator["pytest.Item"]:
        group = pytest.mark.xdist_group(self.run.page)
        for block in self.run.blocks:
            item = BlockItem.from_parent(self, name=f"block-{block.index}", block=block)
            item.add_marker(group)
            yield item
        for block in self.run.blocks:
            if not block.options.norun:
                item = CopyItem.from_parent(self, name=f"copy-{block.index}", block=block)
                item.add_marker(group)
                yield item
        proof = self.run.proof
        if proof is not None and any(
            way["how"] == "compiled" for record in proof.blocks for way in record["verified"]
        ):
            item = CompiledItem.from_parent(self, name="compiled", block=self.run.blocks[0])
            item.add_marker(group)
            yield item

        if proof is not None and any(
            way["how"] == "device" and way["device"] == getattr(self.run.servers.device, "name", "")
            for record in proof.blocks
            for way in record["verified"]
        ):
            item = DeviceItem.from_parent(self, name="device", block=self.run.blocks[0])
            item.add_marker(group)
            yield item

    def record(self) -> Any:
        """Prove the page anew, once."""
        from mdproof.record import update_page

        if self.updated is None:
            self.updated = update_page(self.run)
        return self.updated


class BrokenPage(pytest.Item):
    """A page that cannot be read; it fails alone, and the other pages go on."""

    def __init__(self, *, error: Exception, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.error = error

    def runtest(self) -> None:
        """Fail with the error's line."""
        raise self.error

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the one line."""
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, int, str]:
        """Return where the page stands."""
        return self.path, getattr(self.error, "line", 1) - 1, f"{self.path.name}::page"


class BlockFailed(Exception):  # noqa: N818
    """A block failed; holds the failure."""


class _PageItem(pytest.Item):
    def __init__(self, *, block: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block = block

    @property
    def markdown(self) -> MarkdownPage:
        """The page."""
        page = self.parent
        assert isinstance(page, MarkdownPage)
        return page

    def runtest(self) -> None:
        """Prove this block."""
        page = self.markdown
        if page.fresh:
            return
        failure = (
            page.record().failures.get(self.block.index) if page.update else self.check(page.run)
        )
        if failure is not None:
            raise BlockFailed(failure)
        change = page.record().changes.get(self.block.index) if page.update else None
        if change and isinstance(self, BlockItem):
            self.user_properties.append(("mdproof-change", change))

    def check(self, run: Any) -> Any:
        """Return why this item fails, or None."""
        raise NotImplementedError

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return at most 15 lines: file and line, the cause, the code around it."""
        from mdproof.errors import PageError

        if isinstance(excinfo.value, PageError):
            return str(excinfo.value)
        if not isinstance(excinfo.value, BlockFailed):
            return super().repr_failure(excinfo, style)
        return report(self.markdown.run, self.block, excinfo.value.args[0])

    def reportinfo(self) -> tuple[Path, int, str]:
        """Return where the block stands."""
        return self.path, self.block.line - 1, f"{self.markdown.run.file}::{self.name}"


class BlockItem(_PageItem):
    """One block, run in its page."""

    def check(self, run: Any) -> Any:
        """Run the page and compare this block with its record."""
        from mdproof.prove import check_block

        return check_block(run, self.block)


class CopyItem(_PageItem):
    """One runnable copy, run alone."""

    def check(self, run: Any) -> Any:
        """Run the recorded copy."""
        from mdproof.prove import check_copy

        return check_copy(run, self.block)


class CompiledItem(_PageItem):
    """The kernels that a page launches, compiled."""

    def check(self, run: Any) -> Any:
        """Compile and compare with the recorded binaries."""
        from mdproof.compiled_page import check_compiled

        return check_compiled(run)


class DeviceItem(_PageItem):
    """The kernels that a page launches, on the device of this machine; only there is it a test."""

    def check(self, run: Any) -> Any:
        """Run on the device and compare with what is recorded of it."""
        from mdproof.device_run import check_device

        return check_device(run)


def report(run: Any, block: Any, failure: Any) -> str:
    """Return a failure in at most 15 lines."""
    head = [f"{run.file}:{failure.line}: {failure.message}"[:600]]
    head += [f"  at {frame}"[:160] for frame in failure.frames[-3:]]
    code = (block.shown or block.code).splitlines()
    at = failure.line - block.first
    inside = 0 <= at < len(code) and not block.shown
    room = REPORT_LINES - len(head) - 1
    start = max(0, min((at if inside else 0) - room // 2, len(code) - room))
    body: list[str] = []
    for number in range(start, min(len(code), start + room)):
        mark = ">" if inside and number == at else " "
        line = "" if block.shown else block.first + number
        body.append(f"{mark} {line:>4} {code[number]}"[:160])
    return "\n".join([*head, "", *body])
