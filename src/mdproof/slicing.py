"""The smallest program that runs a block alone, by data flow over the statements before it.

Backward from the block: a statement is kept if it binds a name that is needed, changes an object
that a needed name stands for, or sets something ambient (the environment, a global seed). Which
calls change their arguments cannot be known, so there are four levels, each larger: `tight` trusts
that a call whose result is used leaves its arguments alone, and that a result does not call what it
came from; `slice` trusts the first outside of loops only, and the second not; `wide` trusts no
call, `all` keeps everything. Whoever uses a slice runs it and compares the output, and what the
names that the block reads stand for; a level that fails gives way to the next.
"""

import ast
import builtins
import functools
import symtable
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

LEVELS = ("tight", "slice", "wide", "all")

_AMBIENT_CALLS = frozenset(
    {
        "manual_seed", "seed", "set_default_dtype", "set_default_device", "set_num_threads",
        "set_printoptions", "use_deterministic_algorithms", "filterwarnings", "simplefilter",
        "setdefault_env", "setlocale", "chdir", "seterr",
    }
)  # fmt: skip
_CHANGING_CALLS = frozenset(
    {
        "add", "append", "backward", "clear", "discard", "eval", "extend", "fit", "insert",
        "load_state_dict", "pop", "popleft", "put", "remove", "requires_grad_", "reverse", "send",
        "setdefault", "shuffle", "sort", "step", "train", "update", "write", "zero_grad",
    }
)  # fmt: skip
_RANDOM_ARGUMENTS = frozenset({"generator", "rng", "random_state", "out"})
_SILENT_CALLS = frozenset({"print", "display", "pprint"})
_BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__"}


@dataclass(frozen=True)
class Statement:
    """One top-level statement and what it does to the names of its module.

    Attributes:
        node: The syntax tree.
        text: Its source, decorators and the comments right above it included.
        block: Number of the block that it stands in.
        reads: Module-level names that it, or a function in it, may look up before it binds them.
        later: Those of them that a function in it looks up when it is called.
        assigns: Module-level names that a function in it binds when it is called.
        binds: Names that it may bind.
        kills: Names that it certainly binds anew.
        touches: Names whose objects it changes, as far as `slice` believes.
        may_touch: Names whose objects it could change.
        sets: Names whose objects it changes by assignment, `a.b = 1` or `a[0] += 1`.
        calls_on: Names whose objects it changes by a call, as far as `tight` believes.
        values: Module-level names that it reads other than to call them.
        ambient: Names of modules in which it changes something that every later statement feels;
            "" if it does so for certain.
    """

    node: ast.stmt
    text: str
    block: int
    reads: frozenset[str]
    later: frozenset[str]
    assigns: frozenset[str]
    binds: frozenset[str]
    kills: frozenset[str]
    touches: frozenset[str]
    may_touch: frozenset[str]
    sets: frozenset[str]
    calls_on: frozenset[str]
    values: frozenset[str]
    ambient: frozenset[str]


def _scopes(table: symtable.SymbolTable) -> Iterable[symtable.SymbolTable]:
    for child in table.get_children():
        yield child
        yield from _scopes(child)


@dataclass
class _Names:
    reads: set[str]
    later: set[str]
    assigns: set[str]
    binds: set[str]


def _names(text: str, node: ast.stmt) -> _Names:
    """Return the module-level names that a statement looks up and binds, now and when called."""
    table = symtable.symtable(text, "block", "exec")
    found = _Names(
        reads={s.get_name() for s in table.get_symbols() if s.is_referenced()},
        later=set(),
        assigns=set(),
        binds={s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()},
    )
    for scope in _scopes(table):
        for symbol in scope.get_symbols():
            name = symbol.get_name()
            if symbol.is_global() and symbol.is_referenced():
                found.reads.add(name)
                if scope.get_type() == "function":
                    found.later.add(name)
            if symbol.is_declared_global() and symbol.is_assigned():
                found.assigns.add(name)
    for part in ast.walk(node):
        if isinstance(part, ast.AugAssign) and isinstance(part.target, ast.Name):
            found.reads.add(part.target.id)
        if isinstance(part, ast.Delete):
            gone = {target.id for target in part.targets if isinstance(target, ast.Name)}
            found.reads |= gone
            found.binds |= gone
    return found


def _exposed(node: ast.stmt) -> set[str]:
    """Return the names that a statement may look up before it has bound them itself.

    A loop that begins its body with `out = f(x)` and reads `out` after that needs no `out` from
    before.
    """
    if isinstance(node, ast.For | ast.AsyncFor):
        body = _exposed_in(node.body, set(_bound_by(node.target)))
        written = _looked_up(node.target) - _bound_by(node.target)
        return _looked_up(node.iter) | written | body | _exposed_in(node.orelse)
    if isinstance(node, ast.While | ast.If):
        return _looked_up(node.test) | _exposed_in(node.body) | _exposed_in(node.orelse)
    if isinstance(node, ast.With | ast.AsyncWith):
        found, bound = set(), set()
        for item in node.items:
            found |= _looked_up(item.context_expr) - bound
            if item.optional_vars is not None:
                found |= _looked_up(item.optional_vars) - _bound_by(item.optional_vars) - bound
                bound |= _bound_by(item.optional_vars)
        return found | _exposed_in(node.body, bound)
    if isinstance(node, ast.Try | ast.TryStar):
        # A handler may run after any part of the body, so what the body binds does not help it.
        found = _exposed_in(node.body) | _exposed_in(node.orelse) | _exposed_in(node.finalbody)
        for handler in node.handlers:
            found |= _looked_up(handler.type) if handler.type is not None else set()
            found |= _exposed_in(handler.body, {handler.name} if handler.name else set())
        return found
    return _names(ast.unparse(node), node).reads


def _exposed_in(body: Sequence[ast.stmt], bound: set[str] | None = None) -> set[str]:
    bound, found = set(bound or ()), set()
    for node in body:
        found |= _exposed(node) - bound
        bound |= _certain(node)
    return found


def _looked_up(node: ast.expr) -> set[str]:
    return _names(ast.unparse(node), ast.Expr(node)).reads


def _bound_by(target: ast.expr) -> set[str]:
    return _certain(ast.Assign(targets=[target], value=target))


def _certain(node: ast.stmt) -> set[str]:
    """Return the names that a statement binds whatever happens."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names} - {"*"}
    if isinstance(node, ast.AnnAssign) and node.value is None:
        return set()
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = list(node.targets)
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    found: set[str] = set()
    while targets:
        target = targets.pop()
        if isinstance(target, ast.Name):
            found.add(target.id)
        elif isinstance(target, ast.Tuple | ast.List):
            targets.extend(target.elts)
        elif isinstance(target, ast.Starred):
            targets.append(target.value)
    return found


def _base(node: ast.expr) -> str | None:
    """Return the name at the root of `a.b[c].d(...)`."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call | ast.Starred | ast.Await):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _loaded(nodes: Iterable[ast.AST]) -> set[str]:
    return {
        part.id
        for node in nodes
        for part in ast.walk(node)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)
    }


def _call_name(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _own(node: ast.AST) -> Iterable[ast.AST]:
    """Walk what runs with the statement itself, not the bodies of functions that it defines."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield from _own(child)


def _targets(node: ast.AST) -> Sequence[ast.expr]:
    """Return what a statement assigns to or deletes."""
    if isinstance(node, ast.Assign | ast.Delete):
        return node.targets
    if isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For | ast.AsyncFor):
        return (node.target,)
    return ()


def _changes(node: ast.stmt, *, is_last: bool) -> tuple[set[str], set[str]]:
    """Return the names whose objects a statement changes, surely and possibly.

    A block's last expression stands there to be shown: `x.sum()` at the end changes nothing.
    """
    surely: set[str] = set()
    possibly: set[str] = set()
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return surely, possibly
    compound = not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr)
    for part in _own(node):
        targets = _targets(part)
        for target in targets:
            for inner in ast.walk(target):
                if isinstance(inner, ast.Attribute | ast.Subscript):
                    surely |= {name for name in [_base(inner)] if name}
            if isinstance(part, ast.AugAssign) and isinstance(target, ast.Name):
                surely.add(target.id)
        if not isinstance(part, ast.Call):
            continue
        name = _call_name(part)
        if name in _SILENT_CALLS:
            continue
        arguments = [*part.args, *(keyword.value for keyword in part.keywords)]
        touched = _loaded(arguments)
        receiver = _base(part.func) if isinstance(part.func, ast.Attribute) else None
        if receiver:
            touched.add(receiver)
        possibly |= touched
        # A bare call, and a call inside a loop, stands there for what it changes.
        bare = isinstance(node, ast.Expr) and part is node.value
        if compound or (bare and not (is_last and receiver)):
            surely |= touched
        if receiver and (
            name in _CHANGING_CALLS or (name.endswith("_") and not name.startswith("_"))
        ):
            surely.add(receiver)
        surely |= {
            inner
            for keyword in part.keywords
            if keyword.arg in _RANDOM_ARGUMENTS
            for inner in _loaded([keyword.value])
        }
    if isinstance(node, ast.Assert):
        surely = set()
    return surely, possibly | surely


def _tight_changes(node: ast.stmt, *, is_last: bool) -> tuple[set[str], set[str]]:
    """Return the names whose objects a statement changes by assignment, and by a call.

    A call changes something if it stands alone, if its name says so (`append`, `add_`), or if it
    is given a source of randomness. A loop changes what its statements change.
    """
    sets: set[str] = set()
    by_call: set[str] = set()
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return sets, by_call
    for part in _own(node):
        targets = _targets(part)
        for target in targets:
            inner = [n for n in ast.walk(target) if isinstance(n, ast.Attribute | ast.Subscript)]
            sets |= {name for name in map(_base, inner) if name}
            if isinstance(part, ast.AugAssign) and isinstance(target, ast.Name):
                sets.add(target.id)
        value = part.value if isinstance(part, ast.Expr) else None
        call = value.value if isinstance(value, ast.Await) else value
        if isinstance(call, ast.Call):
            is_shown = is_last and part is node and isinstance(call.func, ast.Attribute)
            if not is_shown and _call_name(call) not in _SILENT_CALLS:
                by_call |= _loaded([*call.args, *(k.value for k in call.keywords)])
                by_call |= {name for name in [_base(call.func)] if name}
        if isinstance(part, ast.Call):
            name = _call_name(part)
            says = name in _CHANGING_CALLS or (name.endswith("_") and not name.startswith("_"))
            if says and isinstance(part.func, ast.Attribute):
                by_call |= {base for base in [_base(part.func)] if base}
            random = (k.value for k in part.keywords if k.arg in _RANDOM_ARGUMENTS)
            by_call |= _loaded(random)
        if isinstance(part, ast.With | ast.AsyncWith):
            by_call |= _loaded(item.context_expr for item in part.items)
    return sets, by_call


def _only_called(node: ast.stmt) -> set[str]:
    """Return the names that a statement reads for nothing but to call them."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return set()  # what its body calls, it calls when it is called
    called = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    places = {id(func) for func in called if isinstance(func, ast.Name)}
    reads = [
        part
        for part in ast.walk(node)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)
    ]
    inside = any(isinstance(part, ast.Lambda | ast.FunctionDef) for part in ast.walk(node))
    others = {part.id for part in reads if id(part) not in places}
    return set() if inside else {part.id for part in reads} - others


def _ambient(node: ast.stmt) -> set[str]:
    """Return the modules whose global state a statement sets, "" for the environment.

    `torch.manual_seed(0)` seeds the world, `torch.Generator().manual_seed(0)` an object; whether
    `r.seed(0)` does, depends on what `r` is, and is decided where that is known.
    """
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return set()
    found: set[str] = set()
    for part in _own(node):
        if isinstance(part, ast.Call) and _call_name(part) in _AMBIENT_CALLS:
            receiver = part.func.value if isinstance(part.func, ast.Attribute) else part.func
            if isinstance(receiver, ast.Name | ast.Attribute):
                found |= {name for name in [_base(receiver)] if name}
        targets: Sequence[ast.expr] = ()
        if isinstance(part, ast.Assign | ast.Delete):
            targets = part.targets
        elif isinstance(part, ast.AugAssign):
            targets = (part.target,)
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
            targets = (part.func.value,)
        for target in targets:
            inner = [n for n in ast.walk(target) if isinstance(n, ast.Attribute)]
            if any(n.attr in ("environ", "rcParams") for n in inner):
                found.add("")
    return found


def _text_of(lines: Sequence[str], node: ast.stmt, floor: int) -> str:
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)])
    last = node.end_lineno or first
    behind = lines[last - 1].encode()[node.end_col_offset or 0 :].decode().strip()
    if node.col_offset or (behind and not behind.startswith("#")):  # joined by semicolons
        return ast.get_source_segment("\n".join(lines), node) or ast.unparse(node)
    while first - 1 > floor and lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return "\n".join(lines[first - 1 : last])


def read_statements(code: str, block: int) -> list[Statement]:
    """Split a block into its top-level statements.

    Raises:
        SyntaxError: If the code is not Python.
    """
    lines = code.split("\n")  # as the parser counts; a string may hold other line separators
    found: list[Statement] = []
    floor = 0
    body = ast.parse(code).body
    for node in body:
        text = _text_of(lines, node, floor)
        floor = node.end_lineno or floor
        names = _names(text, node)
        names.reads = _exposed(node) | names.later | (names.reads & names.assigns)
        surely, possibly = _changes(node, is_last=node is body[-1])
        sets, calls_on = _tight_changes(node, is_last=node is body[-1])
        found.append(
            Statement(
                node=node,
                text=text,
                block=block,
                reads=frozenset(names.reads),
                later=frozenset(names.later),
                assigns=frozenset(names.assigns),
                binds=frozenset(names.binds),
                kills=frozenset(_certain(node)),
                touches=frozenset(surely),
                may_touch=frozenset(possibly),
                sets=frozenset(sets),
                calls_on=frozenset(calls_on),
                values=frozenset(names.reads - _only_called(node)),
                ambient=frozenset(_ambient(node)),
            )
        )
    return found


@functools.lru_cache(maxsize=2048)
def cached_statements(code: str, block: int) -> tuple[Statement, ...]:
    """Split a block as `read_statements` does, once."""
    return tuple(read_statements(code, block))


@dataclass
class _Walk:
    live: set[str]
    kept: list[str] = field(default_factory=list)


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def is_future(node: ast.stmt) -> bool:
    """Tell whether a statement changes how all that follows is compiled."""
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _reduced_import(statement: Statement, live: set[str]) -> str:
    node = statement.node
    assert isinstance(node, ast.Import | ast.ImportFrom)
    wanted = [
        alias
        for alias in node.names
        if alias.name == "*"
        or (alias.asname or alias.name).partition(".")[0] in live
        or is_future(node)
    ]
    if len(wanted) == len(node.names):
        return statement.text
    if isinstance(node, ast.Import):
        return ast.unparse(ast.Import(names=wanted))
    return ast.unparse(ast.ImportFrom(module=node.module, names=wanted, level=node.level))


def _fixed(statements: Sequence[Statement]) -> set[str]:
    """Return the names of functions, classes and imports, which a call does not change."""
    defined: set[str] = set()
    others: set[str] = set()
    for statement in statements:
        kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        (defined if isinstance(statement.node, kinds) else others).update(statement.binds)
    return (defined | set(dir(builtins))) - others


def _once(texts: Sequence[str]) -> list[str]:
    """Leave out an import of names that the texts before it have imported in the same way."""
    known: dict[str, str] = {}
    kept: list[str] = []
    for text in texts:
        (node, *rest) = ast.parse(text).body
        if rest or not _is_import(node) or is_future(node):
            for name in _names(text, node).binds:
                known.pop(name, None)
            kept.append(text)
            continue
        assert isinstance(node, ast.Import | ast.ImportFrom)
        origin = "." * getattr(node, "level", 0) + (getattr(node, "module", "") or "")
        given = {a.asname or a.name: f"{origin}:{a.name}:{a.asname}" for a in node.names}
        if "*" in given or any(known.get(name) != where for name, where in given.items()):
            kept.append(text)
        if "*" in given:
            known.clear()
        else:
            known |= given
    return kept


class _Calls:
    """What a mere look at a name may lead to, if it stands for something that can be called.

    A function looks names up, and may bind some, at the time of the call; whoever holds it, by
    whatever name, or an object of a class that does, may call it.
    """

    def __init__(self, statements: Sequence[Statement], *, tight: bool = False) -> None:
        self.later: dict[str, set[str]] = {}
        self.assigns: dict[str, set[str]] = {}
        changed = True
        while changed:
            changed = False
            for statement in statements:
                held = statement.values if tight else statement.reads
                changed_by = statement.sets | statement.calls_on if tight else statement.touches
                later = set(statement.later) | self.looked_up(held)
                assigns = set(statement.assigns) | self.bound(held)
                for name in statement.binds | changed_by:
                    for known, new in ((self.later, later), (self.assigns, assigns)):
                        old = known.setdefault(name, set())
                        changed |= not new <= old
                        old |= new

    def looked_up(self, names: Iterable[str]) -> set[str]:
        """Return the names that calling these may look up."""
        return {found for name in names for found in self.later.get(name, ())}

    def bound(self, names: Iterable[str]) -> set[str]:
        """Return the names that calling these may bind."""
        return {found for name in names for found in self.assigns.get(name, ())}


def _backward(
    earlier: Sequence[Statement],
    live: set[str],
    *,
    level: str,
    calls: _Calls,
    modules: set[str],
    fixed: set[str],
) -> _Walk:
    walk = _Walk(live=set(live) | calls.looked_up(live))
    wide = level == "wide"
    for statement in reversed(earlier):
        touches = set(statement.may_touch if wide else statement.touches)
        if level == "tight":
            touches = statement.sets | (statement.calls_on - fixed)
        defines = isinstance(statement.node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not defines:
            touches |= calls.bound(statement.reads)
        if wide and not defines:
            touches |= calls.looked_up(statement.reads)
        star = isinstance(statement.node, ast.ImportFrom) and any(
            alias.name == "*" for alias in statement.node.names
        )
        felt = statement.ambient & ({""} | modules) or is_future(statement.node)
        if not (statement.binds & walk.live or touches & walk.live or felt or star):
            continue
        walk.kept.append(
            _reduced_import(statement, walk.live) if _is_import(statement.node) else statement.text
        )
        walk.live -= statement.kills
        walk.live |= statement.reads | calls.looked_up(statement.reads)
    walk.kept.reverse()
    return walk


def needed_before(statements: Sequence[Statement]) -> set[str]:
    """Return the names that a run of statements looks up before it binds them."""
    live: set[str] = set()
    for statement in reversed(statements):
        live -= statement.kills
        live |= statement.reads
    return live


def close(earlier: Sequence[Statement], block: Sequence[Statement], *, level: str) -> list[str]:
    """Return the texts of the earlier statements that a block needs, in order.

    Args:
        earlier: Every statement before the block, in page order.
        block: The block's own statements.
        level: One of `LEVELS`.

    Raises:
        ValueError: If the level is unknown.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; known are {', '.join(LEVELS)}")
    if level == "all":
        return [statement.text for statement in earlier]
    calls = _Calls([*earlier, *block], tight=level == "tight")
    modules = {name for s in earlier if _is_import(s.node) for name in s.binds}
    fixed = _fixed([*earlier, *block])
    bound = {name for statement in earlier for name in statement.binds}
    live = needed_before(block)
    while True:
        walk = _backward(earlier, live, level=level, calls=calls, modules=modules, fixed=fixed)
        # A kept function may call one that is defined after it; that name is needed at the end too.
        missing = (walk.live & bound) - _BUILTINS - live
        if not missing:
            return _once(walk.kept)
        live |= missing
