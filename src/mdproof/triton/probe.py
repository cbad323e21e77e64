"""Watch kernels while the interpreter runs them: traffic, arithmetic, addresses, races, order.

A GPU says nothing when a kernel reads past its tensor or when two programs store to one address;
the result is merely wrong, sometimes. Here every address is looked at:

    with probe(order="shuffle", seed=1) as trace:
        my_kernel[grid](...)
    assert not trace.defects and trace.bytes_loaded == formula
    print(trace.table())
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton
from triton._C.libtriton import ir
from triton.runtime import interpreter

from mdproof.triton.addresses import DOES, KEY, Books, Region, tensors_in
from mdproof.triton.fresh import Fresh
from mdproof.triton.trace import Trace, Traffic

_ORDERS = ("serial", "reverse", "shuffle")
_POINTERS = (
    "addptr",
    "splat",
    "unsplat",
    "broadcast",
    "expand_dims",
    "reshape",
    "trans",
    "bitcast",
)
_PLAIN = (np.add, np.subtract, np.multiply, np.divide, np.negative)
_PLAIN += (np.maximum, np.minimum, np.fmax, np.fmin)
_ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
_RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)


class _Watch:
    """Everything that one probe replaces in the interpreter; each method stands for an original."""

    def __init__(
        self, trace: Trace, order: str, seed: int, races: bool, storages: bool, reachable: Any
    ) -> None:
        self.trace, self.order, self.seed = trace, order, seed
        self.races, self.storages, self.reachable = races, storages, reachable
        self.fresh = Fresh()
        self.books = Books("no kernel", races=False)
        self.launch = Traffic("no kernel")
        self.programs: Iterator[int] = iter(())
        self.grid = (1, 1, 1)

    # The launch.

    def call(self, original: Any, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.books = Books(executor.fn.__name__, races=self.races)
        self.launch = Traffic(executor.fn.__name__)
        self.trace.kernels.append(self.launch)
        self.books.regions += [Region(x, whole_storage=False) for x in tensors_in(self.reachable)]
        self.fresh.paused = True
        try:
            return original(executor, *args, **kwargs)
        finally:
            self.fresh.paused = False
            if self.races:
                self.launch.distinct_loaded = self.books.distinct("load")
                self.launch.distinct_stored = self.books.distinct("store")

    def convert(self, original: Any, argument: Any) -> Any:
        """Give a pointer the region of the tensor that it is made from."""
        converted = original(argument)
        tensors = tensors_in(argument) if not isinstance(argument, tuple) else []
        if tensors and hasattr(argument, "data_ptr"):
            region = Region(tensors[0], whole_storage=self.storages)
            self.books.regions.append(region)
            converted.handle.set_attr(KEY, region)
        return converted

    def set_grid_dim(self, original: Any, builder: Any, *dim: int) -> Any:
        self.grid = dim
        numbers = list(range(int(np.prod(dim))))
        if self.order == "reverse":
            numbers.reverse()
        elif self.order == "shuffle":
            random.Random(self.seed).shuffle(numbers)
        self.programs = iter(numbers)
        return original(builder, *dim)

    def set_grid_idx(self, original: Any, builder: Any, *_: int) -> Any:
        number = next(self.programs)
        self.books.begin(number)
        self.launch.programs += 1
        return original(builder, *(int(i) for i in np.unravel_index(number, self.grid)))

    # Memory.

    def pointer(self, original: Any, builder: Any, *args: Any, **kwargs: Any) -> Any:
        """Let a pointer that is made from another one keep its region."""
        result = original(builder, *args, **kwargs)
        region = next((arg.attr[KEY] for arg in args if KEY in getattr(arg, "attr", ())), None)
        if region is not None:
            result.set_attr(KEY, region)
        return result

    def materialize(self, original: Any, descriptor: Any, offsets: Any) -> Any:
        pointers, mask = original(descriptor, offsets)
        if KEY in descriptor.base.attr:
            pointers.set_attr(KEY, descriptor.base.attr[KEY])
        return pointers, mask

    def touch(self, kind: str, pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
        """Check and enter an access; return the addresses that are not masked, and the width."""
        data, keep = np.broadcast_arrays(pointers.data, True if mask is None else mask.data)
        addresses = data[keep].astype(np.uint64).ravel()
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        books = self.books
        inside = books.inside(pointers.attr.get(KEY), addresses, width)
        place = f"{books.name}: program {books.program}"
        if not inside.all():
            count = int((~inside).sum())
            sentence = f"{place} has {count} out-of-bounds addresses in {_A[kind]}"
            self.trace.out_of_bounds.append(sentence)
            raise IndexError(sentence)
        if self.races and (sentence := books.enter(kind, addresses, width)):
            self.trace.races.append(sentence)
        if kind != "store" and (count := self.fresh.unwritten(addresses, width)):
            sentence = f"{place} {DOES[kind]} {count} elements that nothing has written"
            self.trace.uninitialised.append(sentence)
        if kind != "load":
            self.fresh.write(addresses, width)
        return addresses, width

    def load(
        self, original: Any, builder: Any, pointers: Any, mask: Any, *rest: Any, **kw: Any
    ) -> Any:
        addresses, width = self.touch("load", pointers, mask)
        self.launch.bytes_loaded += addresses.size * width
        return original(builder, pointers, mask, *rest, **kw)

    def store(
        self, original: Any, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        addresses, width = self.touch("store", pointers, mask)
        self.launch.bytes_stored += addresses.size * width
        if self.races and addresses.size > 1:
            _, first, index = np.unique(addresses, return_index=True, return_inverse=True)
            if first.size < addresses.size:
                shape = pointers.data.shape
                values = np.broadcast_to(value.data, shape)[np.broadcast_to(mask.data, shape)]
                if (
                    values.ravel().view(f"u{values.itemsize}") != _bits(values)[first][index]
                ).any():
                    where = f"{self.books.name}: program {self.books.program}"
                    self.trace.races.append(f"{where} stores different values at one address")
        return original(builder, pointers, value, mask, *rest)

    def atomic(self, original: Any, builder: Any, *args: Any) -> Any:
        """Watch read-modify-write, compare-and-swap, and atomic loads and stores."""
        pointers = next(arg for arg in args if KEY in getattr(arg, "attr", ()) or _is_pointer(arg))
        handles = [arg for arg in args if isinstance(arg, interpreter.TensorHandle)]
        mask = handles[-1] if handles[-1].dtype.scalar.is_int1() else None
        addresses, width = self.touch("atomic", pointers, mask)
        self.launch.bytes_atomic += addresses.size * width
        meaning = next((arg for arg in args if isinstance(arg, ir.MEM_SEMANTIC)), None)
        if self.races and addresses.size == 1:
            self.books.synchronise(
                int(addresses[0]), acquires=meaning in _ACQUIRES, releases=meaning in _RELEASES
            )
        with self._blind(builder):
            return original(builder, *args)

    @contextlib.contextmanager
    def _blind(self, builder: Any) -> Iterator[None]:
        """Let an atomic operation load and store without being counted twice."""
        kind = type(builder)
        seen = kind.create_masked_load, kind.create_masked_store
        kind.create_masked_load, kind.create_masked_store = (f.__wrapped__ for f in seen)
        try:
            yield
        finally:
            kind.create_masked_load, kind.create_masked_store = seen

    # Arithmetic.

    def dot(self, original: Any, builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        self.launch.flops += 2 * int(np.prod(a.data.shape)) * b.data.shape[-1]
        return original(builder, a, b, *rest)

    def dot_scaled(self, original: Any, builder: Any, *args: Any) -> Any:
        result = original(builder, *args)
        lhs, packed = args[0], args[2] == ir.ScaleDotElemTypeTY.E2M1 and args[7]
        depth = lhs.data.shape[-1] * (2 if packed else 1)  # two numbers of four bits in a byte
        self.launch.flops += 2 * result.data.size * depth
        return result

    def arithmetic(self, original: Any, builder: Any, *args: Any) -> Any:
        result = original(builder, *args)
        if args[0].dtype.scalar.is_floating() and result.data.dtype != bool:
            if args[-1] in _PLAIN:
                self.launch.elementwise_flops += result.data.size
            elif args[-1] not in (np.floor, np.ceil, np.fmod):
                self.launch.special_flops += result.data.size
        return result

    def fma(self, original: Any, builder: Any, *args: Any) -> Any:
        result = original(builder, *args)
        self.launch.elementwise_flops += 2 * result.data.size
        return result

    def special(self, original: Any, builder: Any, *args: Any) -> Any:
        result = original(builder, *args)
        self.launch.special_flops += result.data.size
        return result

    def reduce(self, original: Any, reduction: Any, inputs: Any) -> Any:
        counted = self.launch.elementwise_flops
        results = original(reduction, inputs)
        first = results[0] if isinstance(results, tuple | list) else results
        if inputs[0].dtype.is_floating():
            counted += inputs[0].handle.data.size - first.handle.data.size
        self.launch.elementwise_flops = counted  # however the interpreter went about it
        return results


_A = {"load": "a load", "store": "a store", "atomic": "an atomic operation"}


def _is_pointer(value: Any) -> bool:
    return isinstance(value, interpreter.TensorHandle) and value.dtype.scalar.is_ptr()


def _bits(values: np.ndarray) -> np.ndarray:
    return values.ravel().view(f"u{values.itemsize}")


def _places(watch: _Watch) -> Iterator[tuple[Any, str, Any]]:
    """Yield owner, name and replacement of everything that is watched."""
    builder = interpreter.InterpreterBuilder
    named = {
        "create_masked_load": watch.load,
        "create_masked_store": watch.store,
        "create_atomic_rmw": watch.atomic,
        "create_atomic_cas": watch.atomic,
        "create_atomic_load": watch.atomic,
        "create_atomic_store": watch.atomic,
        "create_dot": watch.dot,
        "create_dot_scaled": watch.dot_scaled,
        "binary_op": watch.arithmetic,
        "unary_op": watch.arithmetic,
        "create_fma": watch.fma,
        "create_erf": watch.special,
        "create_rsqrt": watch.special,
        "set_grid_dim": watch.set_grid_dim,
        "set_grid_idx": watch.set_grid_idx,
    }
    named |= {f"create_{name}": watch.pointer for name in _POINTERS}
    yield from ((builder, name, new) for name, new in named.items() if hasattr(builder, name))
    yield interpreter.TensorDescHandle, "materialize_pointers", watch.materialize
    yield interpreter.ReduceOps, "apply_impl", watch.reduce
    yield interpreter.GridExecutor, "__call__", watch.call
    yield interpreter, "_implicit_cvt", watch.convert


def _replacing(original: Any, replacement: Any) -> Any:
    def watched(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    watched.__wrapped__ = original
    return watched


@contextlib.contextmanager
def probe(
    *,
    order: str = "serial",
    seed: int = 0,
    races: bool = True,
    within: str = "views",
    reachable: Sequence[torch.Tensor] = (),
) -> Iterator[Trace]:
    """Watch every kernel that the interpreter runs in this context.

    A pointer belongs to the argument that it was made from. An access outside of this tensor is
    entered into the trace and stops the kernel.

    Args:
        order: In which order the programs of a grid run: "serial", "reverse" or "shuffle".
        seed: Seed of the shuffle.
        races: Whether to keep books on who touched which byte (13 bytes of memory for each).
        within: Whether a pointer may reach the elements of its argument, "views", or all of the
            storage behind it, "storages".
        reachable: Further tensors that kernels may reach, by addresses that they load.

    Yields:
        The trace, complete when the context ends.

    Raises:
        ValueError: If `order` or `within` is none of these.
        RuntimeError: If kernels are compiled in this process, where nothing can be watched.
    """
    if order not in _ORDERS:
        raise ValueError(f"order is {order!r}; it must be 'serial', 'reverse' or 'shuffle'.")
    if within not in ("views", "storages"):
        raise ValueError(f"within is {within!r}; it must be 'views' or 'storages'.")
    if not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "kernels are compiled here; set TRITON_INTERPRET=1 before importing them to watch them."
        )
    trace = Trace()
    watch = _Watch(trace, order, seed, races, within == "storages", list(reachable))
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in _places(watch)]
    try:
        for owner, name, replacement in _places(watch):
            setattr(owner, name, _replacing(vars(owner)[name], replacement))
        with watch.fresh:
            yield trace
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
        trace.uninitialised += watch.fresh.notes
