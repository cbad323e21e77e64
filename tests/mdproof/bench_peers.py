"""Measure mdproof beside other tools that run the code of pages, on the same pages in one run.

    python tests/mdproof/bench_peers.py --peers PYTHON [--rounds 3] [--json FILE] [PAGE ...]

`PYTHON` is an interpreter with `requirements/bench.txt` and this project. Blocks of articles are
written as a plain site, a heading and a fence for each, in the dialect that each tool needs to keep
the names of one fence for the next. Each round takes every tool in turn, in an order that rotates:

- cold: nothing is recorded or cached;
- warm: the same command again, nothing has changed;
- edit: a statement that does nothing is put into one function that some page calls.

Fences count as passed, failed, or not run; a command that ends with an error and does not say which
fence failed stops the measurement. Memory is the sum of proportional set sizes over the processes.
"""

import argparse
import ast
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from mdproof.block import Block
from mdproof.collect import collect
from mdproof.copy import plain_code
from mdproof.site import load_site

ROOT = Path(__file__).parents[2]
PAGES = [
    "large-models/attention.md",
    "python/dual-numbers.md",
    "reinforcement-learning/grid-world.md",
    "reinforcement-learning/rl-basics.md",
    "reinforcement-learning/value-policy-iteration.md",
    "generative-models/noise-schedule.md",
    "deep-learning/gradient-checkpointing.md",
]

MKDOCS = """\
site_name: pages
theme: {name: mkdocs}
plugins: [PLUGINS]
markdown_extensions:
  - pymdownx.superfences
EXTENSION"""
PYPROJECT = """\
[project]
name = "pages"
version = "1.0"

[tool.mdproof]
source = ["src"]
packages = ["zhizhi"]
lock = "requirements.lock"
"""

# Each of these is run in the folder of a site; it prints what became of its fences as JSON.
SYBIL = """
import os
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()], path=os.path.join(os.getcwd(), "docs"), patterns=["*.md"]
).pytest()
"""
EXAMPLES = """
import pytest
from pytest_examples import find_examples
names = {}
@pytest.mark.parametrize("example", list(find_examples("docs")), ids=str)
def test_example(example, eval_example):
    known = names.setdefault(example.path, {})
    known.update(eval_example.run(example, module_globals=dict(known)))
"""
NOTEBOOKS = """
import json, sys
from pathlib import Path
import jupytext, nbclient
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
cache = get_cache("cache") if sys.argv[1:] == ["cache"] else None
passed = failed = 0
for file in sorted(Path("docs").rglob("*.md")):
    book = jupytext.read(file, fmt="md")
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    try:
        if cache is None:
            raise KeyError
        book = cache.merge_match_into_notebook(book)[1]
    except KeyError:
        # Times of cells would be part of the cache's key.
        client = nbclient.NotebookClient(book, timeout=600, allow_errors=True, record_timing=False)
        client.execute()
        if cache is not None:
            bundle = CacheBundleIn(book, str(file))
            cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
    for cell in book.cells:
        if cell.cell_type == "code" and cell.source.strip():
            bad = any(out.output_type == "error" for out in cell.outputs)
            passed, failed = passed + (not bad), failed + bad
print(json.dumps({"passed": passed, "failed": failed}))
"""
BUILD = """
import json, logging
from mkdocs.commands.build import build
from mkdocs.config import load_config
import markdown_exec, markdown_exec._internal.main as inner
ran, failed = [], []
formatter = markdown_exec.formatter
def counting(*given, **named):
    ran.append(1)
    return formatter(*given, **named)
class Count(logging.Handler):
    def emit(self, record):
        failed.append(record.getMessage())
markdown_exec.formatter = counting
import markdown_exec._internal.mkdocs_plugin as plugin
plugin.formatter = counting
logging.getLogger("mkdocs.plugins.markdown_exec").addHandler(Count(logging.WARNING))
build(load_config("mkdocs.yml"))
print(json.dumps({"passed": len(ran) - len(failed), "failed": len(failed)}))
"""
BLOCKS = """
import json
from mdproof.collect import collect
from mdproof.page_run import Servers
from mdproof.runner import page_job
from mdproof.site import load_site
site = load_site()
servers = Servers(site)
ran = []
for file in sorted(site.docs.rglob("*.md")):
    page = file.relative_to(site.docs).as_posix()
    ran += servers.run(page_job(site, page, collect(site, page).blocks))
servers.close()
failed = sum(each.failure is not None for each in ran)
print(json.dumps({"passed": len(ran) - failed, "failed": failed}))
"""
PLAIN = """
import json, subprocess, sys
from pathlib import Path
ran = [subprocess.run([sys.executable, file]).returncode for file in Path("scripts").rglob("*.py")]
fences = 0 if any(ran) else int(Path("scripts/fences").read_text())
print(json.dumps({"passed": fences, "failed": sum(map(bool, ran))}))
"""


@dataclass(frozen=True)
class Tool:
    """A tool and how it is called.

    Attributes:
        name: As the table shows it.
        command: The command, run in the folder of its site.
        first, later: What opens a page's first fence, and those that go on with its names.
        counted: What the names of the test cases begin with that stand for fences; "" if the
            command prints its counts as JSON.
        left: What it keeps between runs, removed before a cold run.
    """

    name: str
    command: list[str]
    first: str = "python"
    later: str = "python"
    counted: str = ""
    left: tuple[str, ...] = ()


def tools(helpers: Path, peer: str) -> list[Tool]:
    """Return the tools, their helpers written into a folder."""

    def helper(name: str, text: str) -> str:
        (helpers / name).write_text(text, encoding="utf-8")
        return str(helpers / name)

    helper("sybil_pages.py", SYBIL)
    books = helper("books.py", NOTEBOOKS)
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=told.xml"]
    ours = [sys.executable, *tests, "-p", "mdproof.pytest_plugin"]
    theirs = [peer, *tests]
    proofs = ("docs/proofs",)
    return [
        Tool("python page.py", [sys.executable, helper("plain.py", PLAIN)]),
        Tool("mdproof, blocks alone", [sys.executable, helper("blocks.py", BLOCKS)]),
        Tool(
            "mdproof, blocks and copies, recorded",
            [*ours, "docs", "--stale", "--update"],
            counted="block-",
            left=proofs,
        ),
        Tool("sybil", [*theirs, "-p", "sybil_pages", "docs"], counted="line"),
        Tool(
            "pytest-markdown-docs",
            [*theirs, "-p", "pytest_markdown_docs.plugin", "--markdown-docs", "docs"],
            later="python continuation",
            counted="",
        ),
        Tool(
            "pytest-examples",
            [*theirs, "-p", "pytest_examples", helper("test_examples.py", EXAMPLES)],
            counted="test_example",
        ),
        Tool(
            "markdown-exec",
            [peer, helper("build.py", BUILD)],
            first='python exec="1" session="page"',
            later='python exec="1" session="page"',
            left=("site",),
        ),
        Tool("nbclient", [peer, books]),
        Tool("jupyter-cache", [peer, books, "cache"], left=("cache",)),
    ]


@dataclass
class Site:
    """A tool's own site.

    Attributes:
        root: Its folder.
        fences: Number of its fences.
    """

    root: Path
    fences: int


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of an article that are run; of a source fence the import."""
    return [block for block in collect(load_site(ROOT), page).blocks if not block.options.norun]


def write_site(root: Path, tool: Tool, pages: list[str]) -> Site:
    """Write the blocks of the articles as a plain site in a tool's dialect."""
    shutil.copytree(
        ROOT / "src/zhizhi", root / "src/zhizhi", ignore=shutil.ignore_patterns("*.pyc")
    )
    ours = tool.name.startswith("mdproof")
    config = MKDOCS.replace("PLUGINS", "markdown-exec" if tool.name == "markdown-exec" else "")
    config = config.replace("EXTENSION", "  - mdproof.markdown\n" if ours else "")
    (root / "mkdocs.yml").write_text(config, encoding="utf-8")
    (root / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    shutil.copy(ROOT / "requirements/dev.lock", root / "requirements.lock")
    count = 0
    for page in pages:
        blocks = blocks_of(page)
        codes = [plain_code(block).rstrip("\n") for block in blocks]
        count += len(codes)
        parts = [f"# {page}"]
        for number, (block, code) in enumerate(zip(blocks, codes, strict=True)):
            opening = tool.later if number else tool.first
            if ours and block.options.alt:  # mdproof asks for it wherever a figure is drawn
                opening += ' alt="a figure"'
            parts.append(f"Block {number + 1}.")
            parts.append(f"```{opening}\n{code}\n```")
        file = root / "docs" / page
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        script = (root / "scripts" / page).with_suffix(".py")
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text("\n".join(codes) + "\n", encoding="utf-8")
    (root / "scripts/fences").write_text(str(count), encoding="utf-8")
    return Site(root, count)


@dataclass
class Seen:
    """What one command did: seconds, peak MiB, fences passed, failed and not run."""

    seconds: float
    mib: float
    passed: int
    failed: int
    not_run: int


def tree_mib(root: int) -> float:
    """Return the memory of a process and all below it; what several share is divided among them."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if entry.name.isdigit():
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    total, left = 0, [root]
    while left:
        pid = left.pop()
        left += children.get(pid, [])
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line[:4] == "Pss:")
    return total / 1024


def run(tool: Tool, site: Site, helpers: Path) -> Seen:
    """Run a tool in its site and watch it.

    Raises:
        RuntimeError: If it fails without telling of a fence that failed.
    """
    env = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTHONPATH")}
    ours = os.pathsep.join([str(site.root / "src"), str(helpers), str(ROOT / "src")])
    env |= {"PYTHONPATH": ours, "OMP_NUM_THREADS": "1", "MPLBACKEND": "svg"}
    env |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "NO_MKDOCS_2_WARNING": "1"}
    told = site.root / "told.xml"
    told.unlink(missing_ok=True)
    started = time.perf_counter()
    with subprocess.Popen(
        tool.command,
        cwd=site.root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        peak, done = [0.0], threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                peak[0] = max(peak[0], tree_mib(process.pid))

        thread = threading.Thread(target=watch)
        thread.start()
        out = process.communicate()[0]
        seconds = time.perf_counter() - started
        done.set()
        thread.join()
    passed, failed = counts(tool, told, out)
    if (process.returncode != 0) != (failed > 0) and "pytest" in tool.command:
        raise RuntimeError(
            f"{tool.name}: exit {process.returncode}, {failed} failed\n{out[-3000:]}"
        )
    return Seen(seconds, peak[0], passed, failed, site.fences - passed - failed)


def counts(tool: Tool, told: Path, out: str) -> tuple[int, int]:
    """Return how many fences passed and failed, from JUnit XML or from the last line."""
    if "pytest" not in tool.command:
        try:
            found = json.loads(out.strip().splitlines()[-1])
        except (IndexError, ValueError):
            raise RuntimeError(f"{tool.name} says nothing of its fences:\n{out[-3000:]}") from None
        return found["passed"], found["failed"]
    passed = failed = 0
    for case in ElementTree.parse(told).getroot().iter("testcase"):
        if not case.get("name", "").startswith(tool.counted):
            continue
        bad = case.find("failure") is not None or case.find("error") is not None
        passed += not bad and case.find("skipped") is None
        failed += bad
    return passed, failed


@contextmanager
def edited(root: Path, function: str) -> Iterator[None]:
    """Put a statement that does nothing into a function, `module:name`, for a while."""
    module, _, name = function.partition(":")
    file = root / "src" / (module.replace(".", "/") + ".py")
    old = file.read_text(encoding="utf-8")
    found = [
        node
        for node in ast.parse(old).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    last = found[0].body[-1]
    lines = old.splitlines(keepends=True)
    lines.insert(last.lineno - 1, " " * last.col_offset + "_edited = 1\n")
    file.write_text("".join(lines), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(old, encoding="utf-8")


def functions_called(root: Path) -> dict[str, list[str]]:
    """Return the functions of modules that proven pages entered, each with its pages."""
    found: dict[str, list[str]] = {}
    for proof in sorted((root / "docs/proofs").rglob("*.json")):
        record = json.loads(proof.read_text(encoding="utf-8"))["blocks"][-1]
        for function in record["entered"]:
            module, _, name = function.partition(":")
            file = root / "src" / (module.replace(".", "/") + ".py")
            body = ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []
            if any(isinstance(node, ast.FunctionDef) and node.name == name for node in body):
                found.setdefault(function, []).append(proof.stem)
    return found


@dataclass
class Phases:
    """What a tool did in each phase, a run a round."""

    cold: list[Seen] = field(default_factory=list)
    warm: list[Seen] = field(default_factory=list)
    edit: list[Seen] = field(default_factory=list)


def measure(
    pages: list[str], rounds: int, peer: str, folder: Path, wanted: Callable[[Tool], bool]
) -> tuple[dict[str, Phases], dict[str, list[str]], int]:
    """Return each tool's runs, the functions edited with the pages that call them, the fences."""
    helpers = folder / "helpers"
    helpers.mkdir()
    chosen = [tool for tool in tools(helpers, peer) if wanted(tool)]
    sites = {
        tool.name: write_site(folder / f"site{n}", tool, pages) for n, tool in enumerate(chosen)
    }
    recording = next(tool for tool in chosen if tool.left == ("docs/proofs",))
    run(recording, sites[recording.name], helpers)
    called = functions_called(sites[recording.name].root)
    functions = random.Random(0).sample(sorted(called), rounds)
    seen = {tool.name: Phases() for tool in chosen}
    for number, function in enumerate(functions):
        shift = number * len(chosen) // rounds
        for tool in chosen[shift:] + chosen[:shift]:
            site = sites[tool.name]
            for left in tool.left:
                shutil.rmtree(site.root / left, ignore_errors=True)
            phases = seen[tool.name]
            phases.cold.append(run(tool, site, helpers))
            phases.warm.append(run(tool, site, helpers))
            with edited(site.root, function):
                phases.edit.append(run(tool, site, helpers))
            told = " ".join(
                f"{name} {each[-1].seconds:.1f} s" for name, each in vars(phases).items()
            )
            cold = phases.cold[-1]
            fences = f"{cold.passed} passed, {cold.failed} failed, {cold.not_run} not run"
            print(f"{number + 1} {tool.name}: {told}; {fences}", file=sys.stderr, flush=True)
    fences = next(iter(sites.values())).fences
    return seen, {name: called[name] for name in functions}, fences


def table(seen: dict[str, Phases]) -> str:
    """Return the medians as a Markdown table, times as multiples of plain Python's cold run."""
    plain = seen["python page.py"].cold
    lines = ["| tool | passed | failed | not run | cold | warm | edit | MiB |"]
    lines.append("| --- | --: | --: | --: | --: | --: | --: | --: |")
    for name, phases in seen.items():
        times = [
            statistics.median(
                one.seconds / base.seconds for one, base in zip(each, plain, strict=True)
            )
            for each in (phases.cold, phases.warm, phases.edit)
        ]
        last = phases.cold[-1]
        mib = max(one.mib for each in (phases.cold, phases.warm, phases.edit) for one in each)
        cells = [name, last.passed, last.failed, last.not_run]
        lines.append(
            f"| {' | '.join(map(str, cells))} | "
            f"{' | '.join(f'{ratio:.2f}' for ratio in times)} | {mib:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, and write every run if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--peers", required=True, help="an interpreter with requirements/bench.txt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only tools with this in their name")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    def wanted(tool: Tool) -> bool:
        needed = tool.name == "python page.py" or "recorded" in tool.name
        return needed or given.only in tool.name

    with tempfile.TemporaryDirectory() as folder:
        seen, functions, fences = measure(
            given.pages, given.rounds, given.peers, Path(folder), wanted
        )
    print(f"{len(given.pages)} pages, {fences} fences; edited:")
    for function, pages in functions.items():
        print(f"  {function}, called by {', '.join(pages)}")
    print(table(seen))
    if given.json:
        runs = {
            name: {phase: [vars(one) for one in each] for phase, each in vars(phases).items()}
            for name, phases in seen.items()
        }
        machine = (
            f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        )
        record = {"machine": machine, "fences": fences, "edited": functions, "runs": runs}
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
