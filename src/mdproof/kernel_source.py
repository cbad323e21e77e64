"""What decides what a kernel computes: its own code and all that it names, without importing it."""

import ast
import textwrap
from collections.abc import Iterable
from pathlib import Path

from mdproof.normal import digest, normalise
from mdproof.proof import module_file
from mdproof.reference import Module, read_module
from mdproof.site import Site


def kernel_sources(site: Site, kernels: Iterable[str]) -> str:
    """Return a hash of kernels and of the definitions that they reach by name.

    Comments, docstrings and everything else in the same files do not count: the function that
    launches a kernel may change, and what was seen of the kernel still holds.

    Args:
        site: The site.
        kernels: Kernels as "package.module:name". One that is written on a page has no file here;
            the block that writes it counts elsewhere.
    """
    found: dict[str, str] = {}
    for kernel in kernels:
        module, _, name = kernel.partition(":")
        _reach(site, module, name, found)
    return digest(*(f"{key}={found[key]}" for key in sorted(found)))


def _reach(site: Site, module: str, name: str, found: dict[str, str]) -> None:
    """Enter a definition of a module into `found`, and those that it names."""
    file = module_file(module, site)
    key = f"{module}:{name}"
    if file is None or key in found:
        return
    parsed = read_module(file)
    definition = parsed.definitions.get(name)
    if definition is None:
        _follow_import(site, parsed, name, found)
        return
    lines = parsed.lines[definition.first_line - 1 : definition.last_line]
    text = textwrap.dedent("".join(lines))
    found[key] = normalise(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            _reach(site, module, node.id, found)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = parsed.imports.get(node.value.id, "")
            if owner.partition(".")[0] in site.packages:
                _reach(site, owner, node.attr, found)


def _follow_import(site: Site, parsed: Module, name: str, found: dict[str, str]) -> None:
    dotted = parsed.imports.get(name, "")
    if dotted.partition(".")[0] in site.packages:
        owner, _, inner = dotted.rpartition(".")
        _reach(site, owner, inner, found)


def script_digest(file: Path) -> str:
    """Return a hash of a program without its comments, "" if there is none."""
    return digest(normalise(file.read_text(encoding="utf-8"))) if file.is_file() else ""


def kernel_program(program: str, kernels: Iterable[str]) -> str:
    """Return the smallest program that defines kernels as a page does, without running the page.

    Args:
        program: The page's code.
        kernels: Names of functions that it defines.

    Returns:
        Its imports, and the functions and plain assignments that the kernels reach by name.
    """
    defined: dict[str, ast.stmt] = {}
    body = ast.parse(program).body
    for node in body:
        if isinstance(node, ast.FunctionDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    kept: set[ast.stmt] = set()
    waiting = [name for name in kernels if name in defined]
    while waiting:
        node = defined[waiting.pop()]
        if node not in kept:
            kept.add(node)
            names = (child.id for child in ast.walk(node) if isinstance(child, ast.Name))
            waiting += [name for name in names if name in defined]
    imports = (ast.Import, ast.ImportFrom)
    wanted = [node for node in body if isinstance(node, imports) or node in kept]
    return "\n\n".join(ast.unparse(node) for node in wanted) + "\n"
