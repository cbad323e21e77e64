"""Whether a block checks anything, or proves only that it runs."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mdproof.block import Block
from mdproof.copy import plain_code
from mdproof.slicing import needed_before, read_statements


def _own(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _own(child)


def _asserts(code: str) -> bool:
    """Tell whether code asserts when it runs, by `assert` or a call such as `assert_close`."""
    for node in _own(ast.parse(code)):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name.startswith("assert"):
                return True
    return False


def checks_nothing(block: Block, record: Mapping[str, Any], later: Sequence[Block] = ()) -> str:
    """Return why a block checks nothing, or "" if it checks something.

    A block that only binds names is fine where a later block looks one of them up: that one fails
    if the name is wrong. A source fence shows what tests elsewhere hold to account.

    Args:
        block: The block.
        record: Its record in the proof.
        later: The page's blocks after it.
    """
    if block.kind == "source" or block.options.norun or block.options.raises:
        return ""
    code = plain_code(block)
    if record.get("outputs") or _asserts(code):
        return ""
    bound = {name for statement in read_statements(code, 0) for name in statement.binds}
    for other in later:
        if bound & needed_before(read_statements(plain_code(other), 0)):
            return ""
    return "no assertion, no output, no figure, and no later block uses its names"
