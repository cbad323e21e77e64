"""The probe sees what a GPU keeps to itself: stray addresses, races, traffic."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
from tests.mdproof import triton_canaries as kernels

from mdproof.triton.probe import probe

TABLE = list(torch.arange(32.0).reshape(4, 8).clone().unbind())
"""Tensors that a kernel finds by addresses that it loads."""


def by_table(k: ModuleType) -> torch.Tensor:
    addresses = torch.tensor([x.data_ptr() for x in TABLE])
    return launch(k.by_table, (4,), addresses, torch.empty(4, 8), BLOCK=8)


InterpreterError = triton.runtime.errors.InterpreterError


def test_bytes_are_counted_and_masked_elements_are_not():
    x, y = torch.randn(100), torch.empty(100, dtype=torch.float16)
    with probe() as trace:
        kernels.cast[(4,)](x, y, 100, BLOCK=32)
    assert (trace.launches, trace.programs) == (1, 4)
    assert (trace.bytes_loaded, trace.bytes_stored, trace.bytes_atomic) == (400, 200, 0)
    assert (trace.out_of_bounds, trace.races) == ([], [])


def test_flops_of_a_dot_are_2mnk():
    a = torch.randn(16, 16)
    with probe() as trace:
        kernels.matmul[(1,)](a, a, torch.empty(16, 16), N=16)
    assert trace.flops == 2 * 16**3


@pytest.mark.parametrize(
    ("kernel", "what"),
    [(kernels.reads_past_the_end, "load"), (kernels.writes_past_the_end, "store")],
)
def test_out_of_bounds_access_is_named_and_stops_the_kernel(kernel, what):
    x, y = torch.randn(100), torch.empty(100)
    with (
        probe() as trace,
        pytest.raises(InterpreterError, match=f"28 out-of-bounds addresses in a {what}"),
    ):
        kernel[(4,)](x, y, 100, BLOCK=32)
    assert len(trace.out_of_bounds) == 1
    assert trace.out_of_bounds[0].startswith(f"{kernel.__name__}: program 3 ")


def test_two_programs_that_store_one_address_are_a_race():
    x, y = torch.randn(64), torch.empty(64)
    with probe() as trace:
        kernels.two_programs_store_one_address[(2,)](x, y, 64, BLOCK=32)
    assert trace.races == [
        "two_programs_store_one_address: program 1 stores where program 0 stores"
    ]


@pytest.mark.parametrize("order", ["serial", "reverse"])
def test_reading_what_another_program_stores_is_a_race_in_every_order(order):
    x = torch.arange(64.0)
    with probe(order=order) as trace:
        kernels.reads_what_the_neighbour_stores[(2,)](x, BLOCK=32)
    assert trace.races


@pytest.mark.parametrize("order", ["serial", "reverse"])
def test_a_foreign_reader_is_remembered_although_the_owner_reads_too(order):
    with probe(order=order) as trace:
        kernels.the_first_program_looks_ahead[(2,)](torch.arange(64.0), BLOCK=32)
    assert trace.races


def test_program_order_changes_the_result_of_a_racing_kernel():
    results = []
    for order in ("serial", "reverse"):
        x = torch.arange(64.0)
        with probe(order=order):
            kernels.reads_what_the_neighbour_stores[(2,)](x, BLOCK=32)
        results.append(x)
    assert not torch.equal(*results)


def test_shuffled_order_runs_every_program_once():
    x, y = torch.randn(1000), torch.empty(1000)
    with probe(order="shuffle", seed=3) as trace:
        kernels.cast[(32,)](x, y, 1000, BLOCK=32)
    assert trace.programs == 32
    assert torch.equal(x, y)


def test_atomics_are_counted_apart():
    x, y = torch.randn(64), torch.zeros(32)
    with probe() as trace:
        kernels.adds_atomically[(2,)](x, y, BLOCK=32)
    assert (trace.bytes_loaded, trace.bytes_stored, trace.bytes_atomic) == (256, 0, 256)


def test_the_interpreter_is_as_before_when_the_probe_ends():
    before = kernels.cast[(1,)], triton.runtime.interpreter.InterpreterBuilder.create_masked_load
    with pytest.raises(ZeroDivisionError), probe():
        raise ZeroDivisionError
    assert triton.runtime.interpreter.InterpreterBuilder.create_masked_load is before[1]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def launch(kernel, grid, *args, out: int = 1, **constants) -> torch.Tensor:
    kernel[grid](*args, **constants)
    return args[out].clone()  # torch reads all of it


GOOD: dict[str, Callable[[ModuleType], torch.Tensor]] = {
    "cast": lambda k: launch(k.cast, (4,), randn(100), torch.empty(100), 100, BLOCK=32),
    "copies_rows": lambda k: launch(
        # rows of 10 in a storage whose rows are 16 apart: the holes belong to nobody
        k.copies_rows, (6,), randn(6, 16)[:, :10], torch.empty(6, 10), 16, 10, BLOCK=16,
    ),
    "differences": lambda k: launch(
        k.differences, (4,), randn(100), torch.empty(100), 100, BLOCK=32
    ),
    "copies_by_descriptor": lambda k: launch(
        k.copies_by_descriptor, (2, 2), randn(24, 24), torch.empty(24, 24), 24, 24, BLOCK=16
    ),
    "histogram": lambda k: launch(
        k.histogram, (3,), torch.arange(96) % 7, torch.zeros(7, dtype=torch.int32), 7, BLOCK=32
    ),
    "last_program_adds_up": lambda k: launch(
        k.last_program_adds_up, (4,), randn(128), torch.empty(4), torch.empty(1),
        torch.zeros(1, dtype=torch.int32), BLOCK=32, out=3,
    ),
    "adds_under_a_lock": lambda k: launch(
        k.adds_under_a_lock, (4,), randn(128), torch.zeros(32),
        torch.zeros(1, dtype=torch.int32), BLOCK=32,
    ),
    "softmax": lambda k: launch(k.softmax, (5,), randn(5, 20), torch.empty(5, 20), 20, BLOCK=32),
    "by_table": by_table,
}  # fmt: skip


@pytest.mark.parametrize("order", ["serial", "reverse", "shuffle"])
@pytest.mark.parametrize("name", GOOD)
def test_good_kernels_raise_no_alarm(name, order):
    with probe(order=order, reachable=TABLE) as trace:
        result = GOOD[name](kernels)
    assert trace.defects == []
    assert result.isfinite().all()


STORE = "tl.store(part_ptr + pid, total)"
RELEASE = 'done = tl.atomic_add(count_ptr, 1, sem="acq_rel")'
MUTANTS = {
    # out of bounds
    "mask one too far, load": ("cast", "x_ptr + o, mask=o <", "x_ptr + o, mask=o <=", "has 1 out"),
    "mask one too far, store": ("cast", "mask=o < n)\n", "mask=o <= n)\n", "has 1 out"),
    "mask of another axis": ("copies_rows", "c < n, other", "c < BLOCK, other", "has 6 out"),
    "hole of a strided view": ("copies_rows", "r * stride + c", "r * n + c", "out-of-bounds"),
    "negative offset": ("differences", "mask=(o < n) & (o > 0)", "mask=o < n", "has 1 out"),
    "descriptor larger than its tensor": (
        "copies_by_descriptor", "x_ptr, shape=[M, N]", "x_ptr, shape=[M + 8, N]", "in a load",
    ),
    "descriptor stores beyond its tensor": (
        "copies_by_descriptor", "y_ptr, shape=[M, N]", "y_ptr, shape=[M + 8, N]", "in a store",
    ),
    "atomic out of bounds": ("histogram", "count_ptr + x % n", "count_ptr + x", None),
    "atomic before the start": (
        "histogram", "count_ptr + x % n", "count_ptr + x % n - 1", "in an atomic operation",
    ),
    "table read beyond its end": ("by_table", "table_ptr + i)", "table_ptr + i + 1)", "has 1 out"),
    "foreign address": ("by_table", "x_ptr + c)", "x_ptr + c + 4096)", "has 8 out"),
    # races
    "two programs own one row": (
        "copies_rows", "y_ptr + r * n", "y_ptr + r // 2 * n", "stores where",
    ),
    "every program adds up": (
        "last_program_adds_up", "done == tl.num_programs(0) - 1", "done >= 0", "stores where",
    ),
    "semaphore that orders nothing": (
        "last_program_adds_up", 'count_ptr, 1, sem="acq_rel"', 'count_ptr, 1, sem="relaxed"',
        "loads where",
    ),
    "semaphore that does not acquire": (
        "last_program_adds_up", 'count_ptr, 1, sem="acq_rel"', 'count_ptr, 1, sem="release"',
        "loads where",
    ),
    "partial sum stored after the release": (
        "last_program_adds_up",
        f"    {STORE}\n    {RELEASE}\n", f"    {RELEASE}\n    {STORE}\n", "loads where",
    ),
    "no lock": (
        "adds_under_a_lock", "while tl.atomic_cas(lock_ptr, 0, 1) == 1:", "while False:",
        "where program",
    ),
    "a plain store beside atomics": (
        "histogram", "tl.atomic_add(count_ptr + x % n, 1)", "tl.store(count_ptr + x % n, 1)",
        "stores where",
    ),
    "lanes store different values": (
        "softmax", "y_ptr + pid * n + c", "y_ptr + pid * n + c // 2", "different values",
    ),
    # uninitialised
    "half of the output": ("softmax", "mask=c < n)\n", "mask=c < n // 2)\n", "clone reads 50"),
    "reads its own output": (
        "differences", "here = tl.load(x_ptr", "here = tl.load(y_ptr", "nothing has written",
    ),
    "adds to what is not there": (
        "last_program_adds_up", STORE, "tl.atomic_add(part_ptr + pid, total)",
        "updates 1 elements that nothing has written",
    ),
}  # fmt: skip


def mutate(old: str, new: str, folder: Path, kernel: str) -> ModuleType:
    """Load the canaries with one kernel changed."""
    source = Path(kernels.__file__).read_text(encoding="utf-8")
    start = source.index(f"def {kernel}(")
    end = source.find("@triton.jit", start)
    body = source[start : end if end > 0 else None]
    assert old in body, f"the mutant of {kernel} no longer applies"
    file = folder / "mutant_canaries.py"
    file.write_text(source.replace(body, body.replace(old, new)), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutant_canaries", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("order", ["serial", "shuffle"])
@pytest.mark.parametrize("name", MUTANTS)
def test_every_seeded_defect_is_found_and_named(name, order, tmp_path):
    kernel, old, new, expected = MUTANTS[name]
    mutant = mutate(old, new, tmp_path, kernel)
    try:
        with (
            probe(order=order, seed=1, reachable=TABLE) as trace,
            contextlib.suppress(InterpreterError),
        ):
            GOOD[kernel](mutant)
    finally:
        del sys.modules["mutant_canaries"]
    if expected is None:  # the same program in other words
        assert trace.defects == []
    else:
        assert any(expected in sentence for sentence in trace.defects), trace.defects


def test_an_access_in_the_storage_and_not_in_the_view_can_be_allowed():
    x = randn(6, 16)
    view = x[:, :10]
    with probe(within="storages") as trace:
        kernels.copies_rows[(6,)](view, torch.empty(6, 16), 16, 16, BLOCK=16)
    assert trace.defects == []


def test_a_neighbouring_tensor_is_out_of_bounds_although_it_is_an_argument():
    both = randn(200)
    x, y = both[:100], both[100:]  # y begins where x ends
    message = "differences: program 3 has 1 out-of-bounds addresses in a load"
    with probe() as trace, pytest.raises(InterpreterError, match=message):
        kernels.differences[(4,)](x, y, 101, BLOCK=32)
    assert trace.out_of_bounds == [message]


def test_different_bytes_are_counted_once():
    x = randn(100)
    with probe() as trace:
        kernels.differences[(4,)](x, torch.empty(100), 100, BLOCK=32)
        kernels.cast[(4,)](x, torch.empty(100), 100, BLOCK=32)
    first, second = trace.kernels
    assert (first.bytes_loaded, first.distinct_loaded) == (400 + 396, 400)
    assert (second.bytes_loaded, second.distinct_loaded, second.distinct_stored) == (400, 400, 400)
    assert trace.distinct_loaded == 800
    assert [row.kernel for row in trace.kernels] == ["differences", "cast"]


def test_arithmetic_outside_of_products_is_counted_by_kind():
    rows, n, block = 5, 20, 32
    with probe() as trace:
        kernels.softmax[(rows,)](randn(rows, n), torch.empty(rows, n), n, BLOCK=block)
    # max and sum take block - 1 steps each, subtraction and division block each
    assert trace.elementwise_flops == rows * (2 * (block - 1) + 2 * block)
    assert trace.special_flops == rows * block
    assert trace.flops == 0


def test_a_scaled_product_is_right_and_counted():
    n, k = 32, 64
    a, b = randn(n, k).to(torch.float8_e4m3fn), randn(k, n).to(torch.float8_e4m3fn)
    scales = torch.randint(125, 130, (2, n, k // 32), dtype=torch.uint8)  # powers of two, by 127
    c = torch.empty(n, n)
    with probe() as trace:
        kernels.scaled_product[(1,)](a, scales[0], b, scales[1], c, N=n, K=k)
    assert trace.defects == []
    assert trace.flops == 2 * n * n * k
    left, right = (2.0 ** (s.double() - 127).repeat_interleave(32, 1) for s in scales)
    expected = (a.double() * left) @ (b.double() * right.T)
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_table_of_the_launches_can_be_printed():
    with probe() as trace:
        kernels.cast[(4,)](randn(100), torch.empty(100), 100, BLOCK=32)
        kernels.matmul[(1,)](randn(16, 16), randn(16, 16), torch.empty(16, 16), N=16)
    assert trace.table().split("\n") == [
        "kernel  programs  bytes loaded  bytes stored  bytes atomic  flops",
        "cast           4           400           400             0      0",
        "matmul         1          2048          1024             0   8192",
    ]


def test_a_trace_has_no_other_numbers():
    with probe() as trace:
        pass
    with pytest.raises(AttributeError, match=r"^a trace has no bytes_lost$"):
        trace.bytes_lost  # noqa: B018


def test_where_kernels_are_compiled_nothing_can_be_watched(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = (
        r"^kernels are compiled here; set TRITON_INTERPRET=1 before importing them to watch them\.$"
    )
    with pytest.raises(RuntimeError, match=message), probe():
        pass


def test_an_unknown_order_is_refused():
    message = r"^order is 'random'; it must be 'serial', 'reverse' or 'shuffle'\.$"
    with pytest.raises(ValueError, match=message), probe(order="random"):
        pass


def test_an_unknown_extent_is_refused():
    message = r"^within is 'rows'; it must be 'views' or 'storages'\.$"
    with pytest.raises(ValueError, match=message), probe(within="rows"):
        pass
