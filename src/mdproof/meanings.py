"""What the names of a program stand for, looked up while it runs.

A name has a meaning if it stands for an object of the repository at the moment its statement reads
it. Modules, classes and instances are looked into as Python looks into them, but nothing is called,
and an object that merely says it is ours is not believed: it must be what stands at its address.
"""

import contextlib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mdproof.names import Program, Reference


class Meanings:
    """Resolves the references of one block while it runs.

    Args:
        program: The block's references.
        namespace: The page's.
        packages: The repository's packages; only what is theirs has a meaning.
        origins: Where names were imported from, kept from block to block: name, object, dotted.
    """

    def __init__(
        self,
        program: Program,
        namespace: Mapping[str, Any],
        packages: Iterable[str],
        origins: dict[str, tuple[Any, str]],
    ) -> None:
        self.program, self.namespace, self.origins = program, namespace, origins
        self.packages = tuple(packages)
        self.found: dict[int, str] = {}
        self._before: dict[int, tuple[Any, str]] = {}
        self._later: dict[int, tuple[Any, str] | None] = {}

    def before(self, statement: int) -> None:
        """Look at what a statement is about to read."""
        self._before = {
            number: (self.namespace[one.root], self._meaning(one))
            for number, one in self._of(statement)
            if not one.deferred and one.imported is None and one.root in self.namespace
        }

    def after(self, statement: int) -> None:
        """Look at what a statement has imported, and forget what it has bound anew."""
        done = self.program.statements[statement]
        for name in done.stored:
            self.origins.pop(name, None)
        for number, one in self._of(statement):
            if one.imported is not None:
                self._import(number, one)
            elif one.deferred:
                self._later[number] = None
            elif number in self._before:
                value, dotted = self._before[number]
                same = self.namespace.get(one.root, self) is value
                if dotted and (same if one.root not in done.stored else done.simple):
                    self.found[number] = dotted
        self._look_again()

    def _look_again(self) -> None:
        """What a function reads has a meaning if its name stands for one object to the end."""
        for number, known in list(self._later.items()):
            one = self.program.references[number]
            if one.root not in self.namespace:
                continue
            value, meaning = self.namespace[one.root], self._meaning(one)
            if known is None:
                self._later[number] = (value, meaning)
            elif known[0] is not value or known[1] != meaning:
                self._later[number] = (value, "")

    def result(self) -> dict[int, str]:
        """Return the meanings, dotted, by the number of the reference."""
        later = {number: known[1] for number, known in self._later.items() if known and known[1]}
        return dict(sorted((self.found | later).items()))

    def _of(self, statement: int) -> Iterator[tuple[int, Reference]]:
        for number, one in enumerate(self.program.references):
            if one.statement == statement:
                yield number, one

    def _import(self, number: int, one: Reference) -> None:
        assert one.imported is not None
        module, name = one.imported
        owner = sys.modules.get(module)
        if not isinstance(owner, types.ModuleType):
            return
        value = vars(owner).get(name, sys.modules.get(f"{module}.{name}")) if name else owner
        bound = self.namespace.get(one.root, value)
        if one.root and name and bound is not value and not one.deferred:
            return
        dotted = self._dotted(value) or (f"{module}.{name}" if name and value is not None else "")
        if one.root and name and not one.deferred:
            self.origins[one.root] = (value, dotted)
        if self._ours(dotted):
            self.found[number] = dotted

    def _ours(self, dotted: str) -> bool:
        return dotted.partition(".")[0] in self.packages

    def _meaning(self, one: Reference) -> str:
        value = self.namespace[one.root]
        known = self.origins.get(one.root)
        dotted = known[1] if known is not None and known[0] is value else self._dotted(value)
        for attribute in one.chain:
            found = self._follow(value, attribute)
            if found is None:
                return ""
            value, dotted = found
        return dotted if self._ours(dotted) else ""

    def _follow(self, value: Any, attribute: str) -> tuple[Any, str] | None:
        """Return an attribute and its dotted name as Python finds it, calling nothing."""
        if isinstance(value, types.ModuleType):
            if attribute not in vars(value):
                return None
            child = vars(value)[attribute]
            named = self._dotted(child) or f"{value.__name__}.{attribute}"
            return child, named
        is_class = isinstance(value, type)
        own = None if is_class else _instance_dict(value)
        for base in type.mro(value) if is_class else type.mro(type(value)):
            if attribute in vars(base):
                raw = vars(base)[attribute]
                if own is not None and attribute in own and not hasattr(type(raw), "__set__"):
                    break
                dotted = f"{base.__module__}.{base.__qualname__}.{attribute}"
                ours = self._ours(dotted) and self._dotted(base) and "<" not in dotted
                child = getattr(raw, "__func__", raw) if not isinstance(raw, property) else None
                return child, dotted if ours else ""
        if own is not None and attribute in own:
            return own[attribute], self._dotted(own[attribute])
        return None

    def _dotted(self, value: Any) -> str:
        """Return an object's dotted name, if it is what stands there."""
        if isinstance(value, types.ModuleType):
            return value.__name__
        with contextlib.suppress(Exception):  # an object may answer getattr with anything
            inner = value if isinstance(value, type) else getattr(value, "fn", value)  # a kernel
            module, name = inner.__module__, inner.__qualname__
            if isinstance(module, str) and self._ours(module):
                found: Any = sys.modules[module]
                for part in name.split("."):
                    found = vars(found)[part]
                if found is value:
                    return f"{module}.{name}"
        return ""


def _instance_dict(value: Any) -> Mapping[str, Any]:
    with contextlib.suppress(Exception):
        found = object.__getattribute__(value, "__dict__")
        if isinstance(found, dict):
            return found
    return {}
