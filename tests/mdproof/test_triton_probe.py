"""The probe sees what a GPU keeps to itself: stray addresses, races, traffic."""

import pytest
import torch
import triton
from tests.mdproof import triton_canaries as kernels

from mdproof.triton.probe import probe

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
    assert trace.races == ["two_programs_store_one_address: program 1 stores where program 0 was"]


@pytest.mark.parametrize("order", ["serial", "reverse"])
def test_reading_what_another_program_stores_is_a_race_in_every_order(order):
    x = torch.arange(64.0)
    with probe(order=order) as trace:
        kernels.reads_what_the_neighbour_stores[(2,)](x, BLOCK=32)
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


def test_an_unknown_order_is_refused():
    message = r"^order is 'random'; it must be 'serial', 'reverse' or 'shuffle'\.$"
    with pytest.raises(ValueError, match=message), probe(order="random"):
        pass
