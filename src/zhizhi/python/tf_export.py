"""API registries in the manner of `@tf_export`: a decorator that names, a partial that shortens."""

import inspect
import keyword
from collections.abc import Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

Symbol = TypeVar("Symbol")


class Partial:
    r"""A callable with some arguments fixed: what `functools.partial` is, in ten lines.

    $$
    \mathrm{partial}(f, a, k{=}u)(b, k{=}w) = f(a, b, k{=}w)
    $$

    Positional arguments are fixed from the left; a fixed keyword is a default that the caller may
    override. A partial of a partial is one partial.

    Args:
        func: What is called.
        args: Its first positional arguments.
        keywords: Its keyword arguments.

    Raises:
        TypeError: If func cannot be called.

    Example:
        >>> binary = Partial(int, base=2)
        >>> binary("101"), binary("101", base=3)
        (5, 10)

    Reference:
        Python documentation, `functools.partial`.
    """

    def __init__(self, func: Any, /, *args: Any, **keywords: Any) -> None:
        if not callable(func):
            raise TypeError(f"{func!r} cannot be called: the first argument must be a callable.")
        if isinstance(func, Partial):
            args, keywords = (*func.args, *args), {**func.keywords, **keywords}
            func = func.func
        self.func, self.args, self.keywords = func, args, keywords

    def __call__(self, /, *args: Any, **keywords: Any) -> Any:
        """Call the function with the fixed arguments before the new ones."""
        return self.func(*self.args, *args, **{**self.keywords, **keywords})


class Registry:
    r"""The names of an API, and the objects they stand for.

    Args:
        api: The name of the API; attributes that it leaves on objects carry it.

    Example:
        >>> import functools
        >>> registry = Registry("demo")
        >>> export = functools.partial(Export, registry=registry)
        >>> @export("nn.relu", "relu")
        ... def relu(x): return max(x, 0)
        >>> registry.lookup("relu") is relu, registry.canonical_name(relu)
        (True, 'nn.relu')
    """

    def __init__(self, api: str) -> None:
        self.api = api
        self._symbols: dict[str, Any] = {}

    @property
    def symbols(self) -> Mapping[str, Any]:
        """Every name and its object, in the order of export; read-only."""
        return MappingProxyType(self._symbols)

    def add(self, name: str, value: Any) -> None:
        """Give a value a name; a constant, which cannot carry its own names, is exported so.

        Raises:
            ValueError: If the name is not a dotted name, is taken by another value, or would be
                both a namespace and a value.
        """
        parts = name.split(".")
        if not all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
            raise ValueError(f"{name!r} is not a dotted name.")
        if self._symbols.get(name, value) is not value:
            raise ValueError(f"{name!r} is {self._symbols[name]!r}: it cannot be {value!r} too.")
        inside = next((known for known in self._symbols if known.startswith(f"{name}.")), None)
        above = (".".join(parts[:i]) for i in range(1, len(parts)))
        clash = inside or next((known for known in above if known in self._symbols), None)
        if clash is not None:
            raise ValueError(f"{name!r} and {clash!r}: one would be a namespace and a value.")
        self._symbols[name] = value

    def lookup(self, name: str) -> Any:
        """Return the object of a name.

        Raises:
            KeyError: If nothing has this name.
        """
        return self._symbols[name]

    def names(self, symbol: Any) -> tuple[str, ...]:
        """Return the names under which a function or class was itself exported, the first first.

        The names of a base class are not those of its subclasses: the object's own `__dict__` is
        read, and `getattr`, which would look at the bases, is not used.
        """
        return vars(_undecorated(symbol)).get(self.attribute, ())

    def canonical_name(self, symbol: Any) -> str | None:
        """Return the first name of a function or class, None if it was not exported."""
        return next(iter(self.names(symbol)), None)

    @property
    def attribute(self) -> str:
        """The attribute of an exported object that holds its names."""
        return f"_{self.api}_api_names"

    def build(self) -> ModuleType:
        """Return the API as a tree of modules, one for each namespace; nothing is imported.

        The modules are not put into `sys.modules`.
        """
        root = ModuleType(self.api)
        for name, value in self._symbols.items():
            *path, last = name.split(".")
            module = root
            for part in path:
                if not hasattr(module, part):
                    setattr(module, part, ModuleType(f"{module.__name__}.{part}"))
                module = getattr(module, part)
            setattr(module, last, value)
        return root

    def __iter__(self) -> Iterator[str]:
        return iter(self._symbols)


class Export:
    r"""A decorator that gives a function or class public names and returns it unchanged.

    Two calls: the first takes the names, the second the object.

    $$
    \texttt{@Export("a", registry=r) def f} \;\equiv\; f = \mathrm{Export}(\texttt{"a"},
    \mathrm{registry}{=}r)(f)
    $$

    Args:
        names: Dotted names; the first is the canonical one.
        registry: Where the names are kept.

    Raises:
        ValueError: If there is no name. On the second call: if a name is taken or makes no sense,
            or the object was exported before; then nothing is registered.

    Example:
        >>> registry = Registry("demo")
        >>> @Export("math.twice", registry=registry)
        ... def twice(x): return 2 * x
        >>> twice.__name__, registry.build().math.twice(4)
        ('twice', 8)

    Reference:
        TensorFlow 2.21, `tensorflow/python/util/tf_export.py`, class `api_export`.
    """

    def __init__(self, *names: str, registry: Registry) -> None:
        if not names:
            raise ValueError("no names: at least one is needed.")
        self.names, self.registry = names, registry

    def __call__(self, symbol: Symbol) -> Symbol:
        """Register a function or class under the names, and return it."""
        registry = self.registry
        known = registry.names(symbol)
        if known:
            raise ValueError(f"{symbol!r} is exported as {known}: it cannot be {self.names} too.")
        before = dict(registry.symbols)
        try:
            for name in self.names:
                registry.add(name, symbol)
        except ValueError:
            registry._symbols = before
            raise
        setattr(_undecorated(symbol), registry.attribute, self.names)
        return symbol


def _undecorated(symbol: Any) -> Any:
    """Return what a chain of `functools.wraps` wraps: the names belong to the thing itself."""
    return inspect.unwrap(symbol) if callable(symbol) else symbol
