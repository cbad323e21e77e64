"""The object that a source fence shows, closed over what it needs of its module."""

import ast

from mdproof.block import Block
from mdproof.reference import find_source
from mdproof.site import Site
from mdproof.slicing import cached_statements, close


def object_closure(site: Site, block: Block) -> tuple[list[str], str]:
    """Return what of its module an object needs, and the object itself, closed over the module."""
    source = find_source(block.options.source, site)
    module = source.file.read_text(encoding="utf-8")
    statements = [
        statement
        for statement in cached_statements(module, 0)
        if not (
            isinstance(statement.node, ast.Expr) and isinstance(statement.node.value, ast.Constant)
        )
    ]
    inside = [
        statement
        for statement in statements
        if statement.node.lineno <= source.last_line
        and (statement.node.end_lineno or 0) >= source.first_line
    ]
    others = [statement for statement in statements if statement not in inside]
    kept = close(others, inside, level="slice")
    before = [s.text for s in others if s.node.lineno < source.first_line]
    after = {s.text for s in others if s.node.lineno > source.last_line}
    first = [text for text in kept if text in before or text not in after]
    later = [text for text in kept if text not in first]
    return [*first, *later], "\n\n\n".join(statement.text for statement in inside)
