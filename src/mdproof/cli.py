"""The command line: prove pages, lint and format them, tell what is proven, begin an article."""

import argparse
import os
import signal
import sys
from pathlib import Path

from mdproof.errors import PageError
from mdproof.installing import AssetsError, init
from mdproof.scaffold import ScaffoldError, begin_article
from mdproof.site import Site, load_site
from mdproof.tools import ToolError


def lint(site: Site, pages: list[str], *, types: bool) -> int:
    """Print what the linter and the type checker say about pages."""
    from mdproof.lint import lint_pages
    from mdproof.typecheck import check_types

    findings = lint_pages(site, pages)
    findings += check_types(site, pages) if types else []
    for finding in sorted(findings):
        print(finding)
    if findings:
        files = len({finding.file for finding in findings})
        print(f"{len(findings)} errors on {files} pages", file=sys.stderr)
    return 1 if findings else 0


def format_pages(site: Site, pages: list[str], *, check: bool, diff: bool) -> int:
    """Format the blocks of pages, or tell which ones are not formatted."""
    from mdproof.collect import collect, make_pipeline, shown
    from mdproof.formatting import difference, format_page, write_formatted

    md, wrong = make_pipeline(site), False
    for page in pages:
        blocks = collect(site, page, md).blocks
        if not blocks:
            continue
        formatted = format_page(site, page, blocks)
        wrong |= bool(formatted.elsewhere) or ((check or diff) and bool(formatted.changed))
        for block in formatted.elsewhere:
            print(f"{shown(site, page)}:{block.line}: not formatted, and comes from a snippet")
        if diff:
            print(difference(site, formatted), end="")
        elif check:
            for block in formatted.changed:
                print(f"{shown(site, page)}:{block.first}: not formatted")
        elif formatted.changed:
            write_formatted(site, formatted)
            print(f"{shown(site, page)}: {len(formatted.changed)} blocks formatted")
    return 1 if wrong else 0


def bench(site: Site, pages: list[str]) -> int:
    """Measure on this machine's device what pages have a benchmark for, and record the rows."""
    from mdproof.benchmark import record_benchmark
    from mdproof.page_run import Servers, open_page
    from mdproof.proof import ForgedError

    servers, failed = Servers(site), 0
    try:
        if servers.device is None:
            print("there is no CUDA device on this machine")
            return 1
        for page in pages:
            try:
                rows = record_benchmark(open_page(site, page, servers), servers.device)
                print(f"{page}: {rows} rows measured on {servers.device.name}")
            except (PageError, ForgedError) as error:
                print(error)
                failed += 1
    finally:
        servers.close()
    return 1 if failed else 0


def _page(site: Site, given: str) -> str:
    """Return a page that was named by its path, or by its path below `docs`."""
    for file in (Path(given).resolve(), site.docs / given):
        if file.is_file() and file.is_relative_to(site.docs):
            return file.relative_to(site.docs).as_posix()
    raise PageError(given, 1, f"no such page below {site.docs.name}")


def _count(text: str) -> int:
    """Read a number of pages."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pages, from 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mdproof", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str, *, pages: str = "") -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about)
        if pages:
            made.add_argument("pages", nargs="*", help=f"pages below docs; default: {pages}")
        return made

    command("init", "bring the style and the script into a site, and say what mkdocs.yml lacks")
    telling = command("status", "which pages are proven")
    telling.add_argument("--json", action="store_true", help="for programs")
    telling.add_argument("--titles", action="store_true", help="also the title of each page")
    proving = command("prove", "run what is stale and record it", pages="all that are stale")
    proving.add_argument("--all", action="store_true", help="also pages whose proof is fresh")
    proving.add_argument("--jobs", type=_count, default=1, metavar="N", help="pages at a time")
    proving.add_argument("--junit", type=Path, metavar="FILE", help="write a report in JUnit XML")
    proving.add_argument("--json", type=Path, metavar="FILE", help="write a report in JSON")
    proving.add_argument("--annotate", action="store_true", help="print GitHub's annotations, too")
    measuring = command("bench", "measure on this machine's device what pages have a benchmark for")
    measuring.add_argument("pages", nargs="+", help="pages below docs that have a benchmark")
    linting = command("lint", "lint the blocks of pages and check their types", pages="all")
    linting.add_argument("--no-types", action="store_true", help="leave out the type checker")
    formatting = command("format", "format the blocks of pages, nothing else", pages="all")
    formatting.add_argument(
        "--check", action="store_true", help="change nothing, tell by exit code"
    )
    formatting.add_argument("--diff", action="store_true", help="change nothing, show what would")
    command("doctor", "which pages are proven for the versions installed here, and what is amiss")
    beginning = command("new", "begin an article on all floors: page, module, test, reference")
    beginning.add_argument("room", help="wing and room, such as large-models/dpo")
    beginning.add_argument("--title", required=True, help="title of the page")
    return parser


def new(site: Site, room: str, title: str) -> int:
    """Begin an article and print its files."""
    files, left = begin_article(site, room, title)
    print("\n".join(files))
    if left:
        print(left)
    return 0


def _run(site: Site, given: argparse.Namespace) -> int:
    if given.command == "status":
        from mdproof.status import status

        return status(site, as_json=given.json, titles=given.titles)
    if given.command == "init":
        return init(site)
    if given.command == "doctor":
        from mdproof.doctor import doctor

        return doctor(site)
    if given.command == "new":
        return new(site, given.room, given.title)
    pages = [_page(site, page) for page in given.pages]
    if given.command == "bench":
        return bench(site, pages)
    if given.command == "lint":
        return lint(site, pages or site.pages(), types=not given.no_types)
    if given.command == "format":
        return format_pages(site, pages or site.pages(), check=given.check, diff=given.diff)
    from mdproof.proving import prove

    return prove(
        site,
        pages,
        everything=given.all or bool(pages),
        jobs=given.jobs,
        junit=given.junit,
        json_file=given.json,
        annotate=given.annotate,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0 if all is well, 1 if something is wrong, 2 if not run.

    141 says that whoever read the output has gone; what was recorded until then is whole.
    """
    given = _parser().parse_args(arguments)
    try:
        code = _run(load_site(), given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
        return 128 + signal.SIGPIPE
    except (FileNotFoundError, PageError, ToolError, ScaffoldError, AssetsError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
