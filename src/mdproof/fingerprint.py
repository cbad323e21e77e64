"""What a value is, as a short hash: to see whether a copy gives a name what the page gives it.

Numbers, texts and containers count by content, arrays and tensors by their bytes, modules of a
network by their state, other objects by their type and attributes to a small depth; what has no
content (a function, a figure, a file) by its name. Only the standard library is imported here.
"""

import hashlib
import itertools
import sys
import types
from collections.abc import Iterable
from typing import Any

_DEPTH = 5
_ITEMS = 2000
_PLAIN = (int, float, complex, str, bytes, bool, type(None), type(Ellipsis), range, slice)
_DRAWN = ("matplotlib", "PIL")


def fingerprint(value: Any) -> str:
    """Return a hash that two values share if, as far as can be seen, they are alike."""
    return hashlib.sha256(_describe(value, _DEPTH, set()).encode()).hexdigest()[:16]


def _describe(value: Any, depth: int, above: set[int]) -> str:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, _PLAIN):
        return f"{name}:{value!r}"
    if depth == 0 or id(value) in above or kind.__module__.partition(".")[0] in _DRAWN:
        return name
    inside = above | {id(value)}
    try:
        return f"{name}:{_content(value, depth - 1, inside)}"
    except Exception as error:  # an object may answer with anything
        return f"{name}!{type(error).__name__}"


def _content(value: Any, depth: int, above: set[int]) -> str:
    def several(items: Iterable[Any]) -> list[str]:
        return [_describe(item, depth, above) for item in itertools.islice(items, _ITEMS)]

    if isinstance(value, types.ModuleType | type | types.FunctionType | types.BuiltinFunctionType):
        return str(getattr(value, "__qualname__", getattr(value, "__name__", "")))
    if isinstance(value, types.MethodType):
        return f"{value.__qualname__} of {_describe(value.__self__, depth, above)}"
    if isinstance(value, dict):
        pairs = (f"{k}={v}" for k, v in zip(several(value), several(value.values()), strict=True))
        return f"{len(value)}{list(pairs)}"
    if isinstance(value, set | frozenset):
        return f"{len(value)}{sorted(several(value))}"
    if isinstance(value, list | tuple):
        return f"{len(value)}{several(value)}"
    data = _bytes(value)
    if data is not None:
        return data
    for method in ("state_dict", "get_state", "getstate"):  # networks, optimizers, generators
        read = getattr(value, method, None)
        if callable(read) and not isinstance(value, type):
            return _describe(read(), depth, above)
    bits = getattr(value, "bit_generator", None)
    if bits is not None:
        return _describe(bits.state, depth, above)
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        return _content(attributes, depth, above)
    slots = [name for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)]
    return str(several(getattr(value, name) for name in slots))


def _bytes(value: Any) -> str | None:
    """Return the content of an array or a tensor, None for what is neither."""
    for method in ("detach", "resolve_conj", "resolve_neg", "cpu"):
        value = getattr(value, method, lambda same=value: same)()
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return None
    read = getattr(value, "tobytes", None)
    torch = sys.modules.get("torch")  # there if the page has imported it
    if read is not None:
        data = read()
    elif torch is not None and isinstance(value, torch.Tensor):
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        return None
    return f"{tuple(value.shape)}{value.dtype}{hashlib.sha256(data).hexdigest()}"
