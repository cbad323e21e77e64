"""Over the whole site: an edit of a function makes stale the pages that enter or show it.

What a page enters is found here by another route than the engine's: the page is run as a plain
script under `sys.settrace`.
"""

import ast
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mdproof.collect import collect, make_pipeline
from mdproof.copy import build_copy, plain_code
from mdproof.proof import load_proof, staleness
from mdproof.runner import environment
from mdproof.site import load_site

ROOT = Path(__file__).parents[1]
SITE = load_site(ROOT)
PACKAGE = ROOT / "src/zhizhi"

TRACER = """
import os, sys, threading
_seen, _log = set(), os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def _call(frame, event, argument):
    code = frame.f_code
    if code.co_filename.startswith({package!r}) and code not in _seen:
        _seen.add(code)
        os.write(_log, f"{{code.co_filename}}\\t{{code.co_qualname}}\\n".encode())
threading.settrace(_call)
sys.settrace(_call)
"""


def functions_of(file: Path) -> dict[str, ast.FunctionDef]:
    """Return a module's functions and methods, those inside of functions left out."""
    found: dict[str, ast.FunctionDef] = {}

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                found[f"{prefix}{node.name}"] = node
            elif isinstance(node, ast.ClassDef):
                walk(node.body, f"{prefix}{node.name}.")

    walk(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return found


def entered(page: str, folder: Path) -> set[tuple[str, str]]:
    """Run a page as a script and return the functions of the package that it entered."""
    blocks = [block for block in collect(SITE, page).blocks if not block.options.norun]
    name = page.replace("/", "-").removesuffix(".md")
    log, script = folder / f"{name}.log", folder / f"{name}.py"
    head = TRACER.format(log=str(log), package=f"{PACKAGE}{os.sep}")
    codes = [plain_code(block) for block in blocks if not block.options.raises]
    script.write_text("\n".join([head, *codes]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{page}: {done.stderr[-2000:]}"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    pairs = (line.split("\t") for line in lines)
    return {(file, name.partition(".<locals>")[0]) for file, name in pairs}


def shown(page: str, module: str) -> str:
    """Return what the copies of the page's source fences of a module say.

    Two modules may have a function of the very same text; the page shows the one that it names.
    """
    return "\n".join(text for source, text in copies(page) if source.startswith(f"{module}."))


@functools.cache
def copies(page: str) -> list[tuple[str, str]]:
    """Return the object that each source fence of a page shows, and the text of its copy."""
    blocks = collect(SITE, page).blocks
    return [
        (block.options.source, build_copy(SITE, blocks[:i], level="slice", libraries={}).text)
        for i, block in enumerate(blocks, start=1)
        if block.options.source
    ]


def edited(file: Path, name: str) -> str:
    """Return a module in which one function fails as soon as it is entered."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    *classes, last = name.split(".")
    body = tree.body
    for part in classes:
        body = next(n.body for n in body if isinstance(n, ast.ClassDef) and n.name == part)
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == last:
            node.body.insert(
                1 if ast.get_docstring(node) else 0, ast.parse("raise ValueError").body[0]
            )
    return ast.unparse(tree)


@pytest.mark.slow
def test_no_page_that_reaches_a_function_is_missed_and_few_others_are_run(tmp_path: Path) -> None:
    md = make_pipeline(SITE)
    pages = [page for page in SITE.pages() if collect(SITE, page, md).blocks]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        truth = dict(zip(pages, pool.map(lambda page: entered(page, tmp_path), pages), strict=True))
    proofs = {page: load_proof(SITE, page) for page in pages}
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    scratch = dataclasses.replace(SITE, source=(tmp_path / "src",))
    blocks = {page: collect(SITE, page, md).blocks for page in pages}
    imported = {
        page: {module for record in proof.blocks for module in record["modules"]}
        for page, proof in proofs.items()
        if proof is not None
    }
    for page in pages:
        assert not any(staleness(scratch, blocks[page], proofs[page])), f"{page} is stale itself"
    reached, missed, extra = 0, [], []
    for file in sorted(PACKAGE.glob("*/*.py")):
        below = file.relative_to(ROOT / "src")
        module, text = ".".join(below.with_suffix("").parts), file.read_text(encoding="utf-8")
        texts = {page: shown(page, module) for page in pages}
        for name, node in functions_of(file).items():
            (tmp_path / "src" / below).write_text(edited(file, name), encoding="utf-8")
            source = ast.get_source_segment(text, node) or ""
            for page in pages:
                proof = proofs[page]
                must = (str(file), name) in truth[page] or source in texts[page]
                does = module in imported[page] and any(staleness(scratch, blocks[page], proof))
                reached += must
                missed += [(page, module, name)] if must and not does else []
                extra += [(page, module, name)] if does and not must else []
        (tmp_path / "src" / below).write_text(text, encoding="utf-8")
    print(f"{reached} pairs of page and function, {len(missed)} missed, {len(extra)} extra")
    assert reached > 100
    assert missed == []
    assert len(extra) <= 0.1 * reached, extra
