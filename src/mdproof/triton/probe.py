"""Watch kernels while the interpreter runs them: traffic, arithmetic, addresses, races, order.

A GPU says nothing when a kernel reads past its tensor or when two programs store to one address;
the result is merely wrong, sometimes. Here every address is looked at:

    with probe(order="shuffle", seed=1) as trace:
        my_kernel[grid](...)
    assert not trace.races and trace.bytes_loaded == formula
"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

_WATCHED = (
    "create_masked_load",
    "create_masked_store",
    "create_dot",
    "create_atomic_rmw",
    "set_grid_idx",
    "set_grid_dim",
)
_MANY = -1


@dataclass
class Trace:
    """What the launches inside one `probe` did.

    Attributes:
        launches: Number of kernel launches.
        programs: Number of programs that ran.
        bytes_loaded: Bytes that loads touched, masked-out elements not counted.
        bytes_stored: The same for stores.
        bytes_atomic: The same for atomic updates.
        flops: Floating-point operations of `tl.dot`, 2MNK each.
        out_of_bounds: A sentence for each access outside the storage of every argument.
        races: A sentence for each pair of programs of one launch of which one stores where the
            other loads or stores.
    """

    launches: int = 0
    programs: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0
    bytes_atomic: int = 0
    flops: int = 0
    out_of_bounds: list[str] = field(default_factory=list)
    races: list[str] = field(default_factory=list)


def _extents(arguments: Any) -> set[tuple[int, int]]:
    """Return first and last address + 1 of every storage behind the arguments."""
    if isinstance(arguments, tuple | list):
        return set().union(*map(_extents, arguments)) if arguments else set()
    tensor = getattr(arguments, "base", arguments)  # a tensor descriptor has a base
    if not isinstance(tensor, torch.Tensor):
        return set()
    storage = tensor.untyped_storage()
    return {(storage.data_ptr(), storage.data_ptr() + storage.nbytes())}


class _Launch:
    """The addresses of one launch and who touched them. Programs are numbered from 1."""

    def __init__(self, name: str, arguments: Any, *, races: bool) -> None:
        self.name, self.program = name, 0
        extents = sorted(_extents(arguments))
        self.first = np.array([low for low, _ in extents], dtype=np.uint64)
        self.last = np.array([high for _, high in extents], dtype=np.uint64)
        sizes = [high - low if races else 0 for low, high in extents]
        self.readers = [np.zeros(size, dtype=np.int32) for size in sizes]
        self.writers = [np.zeros(size, dtype=np.int32) for size in sizes]

    def locate(self, addresses: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the storage of each address, and whether the access stays inside it."""
        if not self.first.size:
            return np.zeros(addresses.shape, np.int64), np.zeros(addresses.shape, bool)
        at = np.searchsorted(self.first, addresses, side="right").astype(np.int64) - 1
        inside = (at >= 0) & (addresses + np.uint64(width) <= self.last[np.maximum(at, 0)])
        return at, inside

    def conflict(
        self, addresses: np.ndarray, at: np.ndarray, width: int, *, stores: bool
    ) -> str | None:
        """Enter one access into the books; return the sentence of a race, or None."""
        sentence = None
        for index in np.unique(at):
            offset = (addresses[at == index] - self.first[index]).astype(np.int64)
            offset = (offset[:, None] + np.arange(width)).ravel()
            readers, writers = self.readers[index], self.writers[index]
            others = [writers[offset]]
            if stores:
                others.append(readers[offset])
                writers[offset] = self.program
            else:
                before = readers[offset]
                readers[offset] = np.where(
                    (before == 0) | (before == self.program), self.program, _MANY
                )
            for other in others:
                foreign = other[(other != 0) & (other != self.program)]
                if foreign.size:
                    who = "several programs" if foreign[0] == _MANY else f"program {foreign[0] - 1}"
                    does = "stores" if stores else "loads"
                    sentence = f"{self.name}: program {self.program - 1} {does} where {who} was"
        return sentence


@contextlib.contextmanager
def probe(*, order: str = "serial", seed: int = 0, races: bool = True) -> Iterator[Trace]:
    """Watch every kernel that the interpreter runs in this context.

    An access outside the storages of the arguments is entered into the trace and stops the kernel.

    Args:
        order: In which order the programs of a grid run: "serial", "reverse" or "shuffle".
        seed: Seed of the shuffle.
        races: Whether to keep books on who touched which byte (8 bytes of memory for each).

    Yields:
        The trace, complete when the context ends.

    Raises:
        ValueError: If the order is none of the three.
    """
    if order not in ("serial", "reverse", "shuffle"):
        raise ValueError(f"order is {order!r}; it must be 'serial', 'reverse' or 'shuffle'.")
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    original = {name: getattr(builder, name) for name in _WATCHED}
    run_grid = executor.__call__
    trace = Trace()
    launch = _Launch("no kernel", (), races=False)
    programs: Iterator[int] = iter(())
    grid = (1, 1, 1)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal launch
        launch = _Launch(self.fn.__name__, [*args, *kwargs.values()], races=races)
        trace.launches += 1
        return run_grid(self, *args, **kwargs)

    def set_grid_dim(self: Any, *dim: int) -> Any:
        nonlocal programs, grid
        grid = dim
        numbers = list(range(int(np.prod(dim))))
        if order == "reverse":
            numbers.reverse()
        elif order == "shuffle":
            random.Random(seed).shuffle(numbers)
        programs = iter(numbers)
        return original["set_grid_dim"](self, *dim)

    def set_grid_idx(self: Any, *_: int) -> Any:
        number = next(programs)
        launch.program = number + 1
        trace.programs += 1
        return original["set_grid_idx"](self, *(int(i) for i in np.unravel_index(number, grid)))

    def touch(pointers: Any, mask: Any, *, stores: bool) -> int:
        data, keep = np.broadcast_arrays(pointers.data, mask.data)
        addresses = data[keep].astype(np.uint64).ravel()
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at, inside = launch.locate(addresses, width)
        if not inside.all():
            what = "store" if stores else "load"
            sentence = (
                f"{launch.name}: program {launch.program - 1} has {int((~inside).sum())} "
                f"out-of-bounds addresses in a {what}"
            )
            trace.out_of_bounds.append(sentence)
            raise IndexError(sentence)
        if races:
            sentence = launch.conflict(addresses, at, width, stores=stores)
            if sentence:
                trace.races.append(sentence)
        return addresses.size * width

    def load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        trace.bytes_loaded += touch(pointers, mask, stores=False)
        return original["create_masked_load"](self, pointers, mask, other, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        trace.bytes_stored += touch(pointers, mask, stores=True)
        return original["create_masked_store"](self, pointers, value, mask, *rest)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        trace.flops += 2 * int(np.prod(a.data.shape)) * b.data.shape[-1]
        return original["create_dot"](self, a, b, *rest)

    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        width = max(1, value.dtype.scalar.primitive_bitwidth // 8)
        trace.bytes_atomic += int(np.sum(mask.data)) * width
        return original["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    replacements = (load, store, dot, atomic, set_grid_idx, set_grid_dim)
    try:
        for name, replacement in zip(_WATCHED, replacements, strict=True):
            setattr(builder, name, replacement)
        executor.__call__ = call
        yield trace
    finally:
        for name, method in original.items():
            setattr(builder, name, method)
        executor.__call__ = run_grid
